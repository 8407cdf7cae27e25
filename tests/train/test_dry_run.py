"""`mama train --dry-run`: sizes against the real model, memory against DeepSpeed and autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoConfig

from mama.cli.main import main
from mama.data import augment
from mama.data.batches import Rows, Texts
from mama.data.idle_settings import idle_settings
from mama.data.images import Images
from mama.data.pairs import Pairs
from mama.model.classifier import Classifier
from mama.model.heads import LocalHead
from mama.model.mama_model import build
from mama.model.memory import Transformer, local_head_bytes, states
from mama.model.text_tower import build_text
from mama.model.vision_tower import build_vision
from mama.run.run_tokenizer import make_tokenizer
from mama.settings.load import load, save
from mama.settings.schema import TextConfig, Tokens, VisionConfig
from mama.train.deepspeed_config import deepspeed_settings
from mama.train.dry_run import activation_lines, dry_run, text_lines
from mama.train.estimate import classifier_bytes, rank_bytes, shape_of, text_transformer
from tests.support.cohort import write_shards
from tests.support.tiny_model import on_tissue, tiny
from tests.support.word_tokenizer import tokenizer

Mama = Callable[..., tuple[int, str, str]]

SIZE, LENGTH, WIDTH = 64, 80, 64  # pixels, tokens, numbers
VISION: dict[str, Any] = {
    "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": SIZE, "patch_size": 8,
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 4,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 3, "n_head": 2,
    "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for block in text.split("\n== ")[1:]:
        title, *lines = block.rstrip("\n").split("\n")
        found[title] = lines
    return found


@pytest.fixture
def mama(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mama:
    """Run `mama ARGUMENTS` by its entry point: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mama", *arguments])
        capfd.readouterr()
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0), *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(tiny(2), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def test_the_towers_of_the_paper_are_known_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the papers name: ViT-B/14 with registers, 86 million parameters; BioMedLM, 2.7 billion."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    lines = sections("\n".join(dry_run(load("mama"), 4)))["Parameters"]
    parameters = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[1:]}
    assert parameters["vision"] == pytest.approx(86.6e6, rel=0.01)
    assert parameters["text"] == pytest.approx(2.66e9, rel=0.03)


def test_the_command_tells_the_run_and_writes_nothing(file: Path, mama: Mama) -> None:
    write_shards(file.parent / "shards", {"train": 3, "test": 1})
    before = sorted(file.parent.rglob("*"))
    change = f"data.shards=[{file.parent}/shards]"
    code, out, err = mama("train", str(file), change, "train.zero_stage=3", "--dry-run")
    assert (code, err) == (0, "")
    assert sorted(file.parent.rglob("*")) == before
    told = sections(out)
    config = load(file, [change, "train.zero_stage=3"])
    assert yaml.safe_load("\n".join(told["Configuration"])) == json.loads(json.dumps(asdict(config)))
    assert yaml.safe_load("\n".join(told["DeepSpeed"])) == deepspeed_settings(config, 2)
    pairs = len(Images(config.data, "train"))
    assert pairs == 6
    assert told["Batches"] == [
        "2 ranks x 4 pairs x 1 micro-batches = 8 pairs a step",
        "4 steps x 8 = 32 pairs",
        f"{pairs} pairs in an epoch: {32 / pairs:.1f} epochs",
    ]
    assert [line.split()[0] for line in told["Memory of one of 2 ranks, GiB"] if " * " in line] == ["3"]
    assert "Activations of 4 pairs, GiB" in told
    shown = told["The first texts as the language model reads them"]
    read, texts = make_tokenizer(config), [Pairs(config)[g].anchor_sentences for g in range(3)]
    for line, text in zip(shown, texts, strict=True):
        whole = "<|sentence|> ".join([*text, ""]).strip()
        assert len(read.encode(text, 1000).tokens) > config.data.max_tokens == 64
        start, _, said = line.partition(" are cut off: ")
        assert start.startswith("64 tokens, ")
        assert whole.startswith(said.removesuffix("<|sentence|>"))
        assert said.count("<|sentence|>") >= 2


def test_a_setting_that_changes_nothing_is_named(tmp_path: Path) -> None:
    """In the words of the run itself; not where it changes something, and of shards at a URL nothing is fetched."""
    title = "Settings with nothing to work on"
    write_shards(tmp_path / "density", {"train": 3}, known=("density",))
    write_shards(tmp_path / "findings", {"train": 3})

    def found(folder: str) -> list[str]:
        config = tiny(1)
        data = replace(config.data, shards=[folder], findings="crop", cache=str(tmp_path / "cache"))
        config = replace(config, data=data, loss=replace(config.loss, local_sentences="findings"))
        lines = sections("\n".join(dry_run(config, 1))).get(title, [])
        assert lines == idle_settings(config, fetch=False)
        return lines

    assert [line.partition(":")[0] for line in found(str(tmp_path / "density"))] == [
        "loss.local_sentences",
        "data.findings",
    ]
    assert found(str(tmp_path / "findings")) == []
    assert all("unknown" in line for line in found("http://127.0.0.1:9/x"))


def test_of_tissue_alone_its_share_in_augmented_images_is_counted(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"train": 3, "test": 1})
    config = on_tissue(tiny(1))
    config = replace(config, data=replace(config.data, shards=[str(tmp_path / "shards")]))
    model, pairs = shape_of(config), Pairs(config)
    shares = []
    for pair in (pairs[number] for number in range(64)):
        image, change = torch.from_numpy(pair.anchor)[None, None], torch.from_numpy(pair.anchor_change)[None]
        blocks = (augment.apply(image, change) > 8.5 / 127.5 - 1).unflatten(3, (-1, 4)).unflatten(2, (-1, 4))
        kept = blocks.any(5).any(3)
        shares.append(float(kept.double().mean()) if kept.any() else 1.0)
    share, patches = np.mean(shares), len(blocks[0, 0]) * len(blocks[0, 0, 0, 0])
    said, _, first, *_ = activation_lines(config, model, 1)
    low, high = np.quantile(shares, [0.1, 0.9])
    spread = f"(10th to 90th percentile {low:.0%} to {high:.0%})"
    assert said == f"vision.tokens: {share:.0%} of the patches of 64 augmented images hold tissue {spread}"
    assert share < 0.99
    images = 2 * config.train.micro_batch
    assert first.startswith(f"image tower, {images} x {round(share * patches) + model.vision.prefix:,} tokens ")
    elsewhere = replace(config, data=replace(config.data, shards=[str(tmp_path / "nowhere")]))
    said, _, first, *_ = activation_lines(elsewhere, model, 1)
    assert said.startswith("vision.tokens: every patch is counted, as if all held tissue (")
    assert first.startswith(f"image tower, {images} x {patches + model.vision.prefix:,} tokens ")


@pytest.mark.parametrize(
    ("folder", "said"), [("nowhere", "unknown (nowhere: "), ("https://example.org/x", "not shown")]
)
def test_texts_that_are_not_there_are_a_line(folder: str, said: str) -> None:
    config = tiny(1)
    (line,) = text_lines(replace(config, data=replace(config.data, shards=[folder])))
    assert line.startswith(said)


def test_parameters_are_those_of_the_real_model() -> None:
    config = tiny(1)
    vocabulary = len(tokenizer()) - 2
    config = replace(config, text=replace(config.text, config=config.text.config | {"vocab_size": vocabulary}))
    real = build(config, tokenizer(), "mama_sdpa")
    shape = shape_of(config)
    assert {name: tuple(p.shape) for name, p in shape.named_parameters() if p.requires_grad} == {
        name: tuple(p.shape) for name, p in real.named_parameters() if p.requires_grad
    }
    assert all(p.is_meta for p in shape.parameters())
    rows = {line.split()[0]: line.split()[1:] for line in sections("\n".join(dry_run(config, 1)))["Parameters"][1:]}
    counted = [sum(p.numel() for p in real.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    assert rows["all"] == [f"{count:,}" for count in counted]
    heads = sum(p.numel() for p in real.patch_head.parameters()) if real.patch_head else 0
    assert rows["patch_head"] == [f"{heads:,}"] * 2


def test_of_a_pretrained_model_only_its_configuration_is_read(tmp_path: Path) -> None:
    for name, shape in (("vision", VISION), ("text", GPT2 | {"vocab_size": 50})):
        AutoConfig.for_model(**shape).save_pretrained(tmp_path / name)
        assert [p.name for p in (tmp_path / name).iterdir()] == ["config.json"]
    vision, text = VisionConfig(model=str(tmp_path / "vision")), TextConfig(model=str(tmp_path / "text"))
    by_name = shape_of(replace(tiny(1), vision=vision, text=text))
    vision, text = VisionConfig(None, VISION), TextConfig(None, GPT2 | {"vocab_size": 50})
    by_shape = shape_of(replace(tiny(1), vision=vision, text=text))
    sizes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (by_name, by_shape)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vision.model=no-such/model", "mama: vision.model: the configuration of no-such/model cannot be loaded"),
        ("text.model=no-such/model", "mama: text.model: the configuration of no-such/model cannot be loaded"),
        ("train.global_batch=9", "mama: train.global_batch: 9 is not a multiple of micro_batch x ranks = 4 x 2"),
        ("data.image_size=[33,16]", "mama: data.image_size: [33, 16] is not a multiple"),
        ("text.layers=9", "mama: text.layers: 9, but the model has 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(file: Path, mama: Mama, change: str, said: str) -> None:
    code, out, err = mama("train", str(file), change, "--dry-run")
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("tokens", ["all", "tissue"])
def test_auto_says_how_much_memory_keeps_all_activations(tokens: Tokens) -> None:
    chosen = tiny(2, activation_checkpointing=False)
    chosen = on_tissue(chosen) if tokens == "tissue" else chosen
    config = replace(chosen, train=replace(chosen.train, activation_checkpointing="auto"))
    model = shape_of(config)
    (said,) = (line for line in activation_lines(config, model, 2) if "auto" in line)
    need = rank_bytes(chosen, model, 2, checkpointed=False)[0] / 0.9 / 2**30
    assert f" {need:.2f} GiB" in said
    assert ("tissue" in said) == (tokens == "tissue")
    assert not any("auto" in line for line in activation_lines(chosen, model, 2))
    assert not any("*" in line for line in activation_lines(config, model, 2))


@pytest.mark.parametrize("ranks", [1, 8])
def test_states_are_those_that_deepspeed_estimates(ranks: int) -> None:
    """Its estimates are for a model that is all trained, in 16 bits."""
    count = 8_000_000

    def mine(stage: int, offload: bool = False) -> int:
        return states(count, count, ranks, stage, "bf16", offload).device

    _, third, _ = estimate_zero3_model_states_mem_needs(count, 0, ranks, 1, cpu_offload=False)
    host, offloaded, _ = estimate_zero3_model_states_mem_needs(
        count, 0, ranks, 1, cpu_offload=True, cpu_offload_params=False, additional_buffer_factor=1
    )
    _, second = estimate_zero2_model_states_mem_needs(count, ranks, 1, cpu_offload=False)
    assert mine(3) == third
    assert mine(2) == second - 2 * count // ranks  # it counts the gradients in 16 bits besides those in 32
    assert mine(3, offload=True) == offloaded
    assert states(count, count, ranks, 3, "bf16", offload=True).host * ranks == host
    assert mine(0) == 18 * count
    assert mine(1) == 6 * count + 12 * count // ranks


def test_a_frozen_parameter_takes_its_weight_alone_and_fp32_has_no_second_copy() -> None:
    assert states(1000, 0, 1, 0, "bf16").device == 2000
    assert states(1000, 0, 4, 3, "fp32").device == 1000
    assert states(1000, 1000, 1, 0, "fp32").device == 16 * 1000


def kept(forward: Callable[[], Any], module: torch.nn.Module) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each storage once, without the weights."""
    own = {parameter.data_ptr() for parameter in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _result = forward()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_the_image_tower_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    tower = build_vision(VisionConfig(model=None, config=VISION), "mama_sdpa").to(dtype)
    tokens = 3 * ((SIZE // 8) ** 2 + tower.prefix)
    counted = kept(lambda: tower(torch.randn(3, 1, SIZE, SIZE, dtype=dtype)), tower)
    formula = Transformer.of(tower.backbone.config).activations(tokens, dtype.itemsize)
    assert counted == pytest.approx(formula, rel=0.2)


def test_a_classifier_takes_its_states_and_the_activations_of_its_tower() -> None:
    base = tiny(1, zero_stage=0)
    config = replace(base, data=replace(base.data, image_size=(SIZE, SIZE)))
    model = Classifier(build_vision(VisionConfig(model=None, config=VISION), "mama_sdpa"), 3)
    images = torch.randn(config.train.micro_batch, 1, SIZE, SIZE)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    states = 4 * trained + frozen  # a weight, its gradient and two moments
    assert classifier_bytes(config, model, 1) == pytest.approx(states + kept(lambda: model(images), model), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [GPT2, GPT2 | {"activation_function": "gelu_pytorch_tanh"}, LLAMA])
def test_activations_of_the_text_tower_are_what_autograd_keeps(shape: dict[str, Any], dtype: torch.dtype) -> None:
    config = TextConfig(model=None, config=shape, lora_rank=2)
    tower = build_text(config, tokenizer(), "mama_sdpa").to(dtype).train()
    tokens = torch.zeros(4, LENGTH, dtype=torch.long)
    texts = Texts(tokens, [LENGTH] * 4, tokens[:, :2], tokens[:, :2].bool(), Rows(tokens, [LENGTH] * 4), tokens[:, :2])
    counted = kept(lambda: tower(texts), tower)
    size = dtype.itemsize
    formula = text_transformer(tower.backbone.config, config).activations(4 * LENGTH, size, mask=size)
    assert counted == pytest.approx(formula, rel=0.2)


def test_a_layer_of_the_source_takes_34_times_its_width() -> None:
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h), without the scores of attention."""
    gpt = Transformer.of(AutoConfig.for_model(**GPT2, activation_function="gelu_pytorch_tanh"))
    assert gpt.activations(1000, 2) == 3 * 34 * WIDTH * 1000
    assert gpt.inputs(1000, 2) == 3 * 2 * WIDTH * 1000


def test_activations_of_the_patch_head_are_what_autograd_keeps() -> None:
    head = LocalHead(48, 64, 32)
    rows = torch.randn(500, 48)
    counted = kept(lambda: torch.nn.functional.normalize(head(rows).float(), dim=-1), head)
    assert counted == pytest.approx(local_head_bytes(500, 48, 64, 32, 4), rel=0.2)
