"""The count of operations against PyTorch's own counter, which sees every product that is run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from mama.data import augment
from mama.data.batches import Batch
from mama.model.blocks import prepare_blocks
from mama.model.flops import pair_flops, peak_flops
from mama.model.mama_model import MamaModel, build
from mama.settings.schema import Config, Sentences, TextConfig
from tests.support.tiny_backbones import TEXT
from tests.support.tiny_model import PAIRS, batch_of, on_tissue, tiny
from tests.support.word_tokenizer import tokenizer


def model_of(config: Config, kind: str, packing: bool = False, sentences: Sentences = "separator") -> MamaModel:
    text = TextConfig(
        model=None, config=TEXT[kind], lora_rank=2, lora_dropout=0.0, packing=packing, sentences=sentences
    )
    model = build(replace(config, text=text), tokenizer(), "mama_sdpa")
    prepare_blocks(model, config.train, torch.device("cpu"))
    return model


def counted(model: MamaModel, batch: Batch) -> int:
    """What PyTorch counts of one forward and backward pass, less the augmentation."""
    with FlopCounterMode(display=False) as augmentation:
        augment.apply(batch.anchors, batch.anchor_changes)
        augment.apply(batch.partners, batch.partner_changes)
    # The counter does not know the CPU's fused attention, and the plain one is two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
        embeddings = model(batch)
        outputs = list(embeddings)
        total = [o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        torch.stack(total).sum().backward()
    return int(counter.get_total_flops() - augmentation.get_total_flops())


def expected(model: MamaModel, batch: Batch, config: Config) -> float:
    """Of images and texts with the lengths that are computed."""
    texts = batch.texts
    padded = [texts.tokens.shape[1]] * len(texts.tokens)
    return PAIRS * pair_flops(
        model,
        config.data.image_size,
        texts.lengths if model.text.packing else padded,
        images=model.vision.lengths,
        each=len(texts.tokens) / PAIRS,
        sentences=int(texts.sentence_mask[batch.anchor_text_row].sum()) / PAIRS,
        alone=texts.sentences.lengths if model.reads_alone else (),
        recompute=config.train.activation_checkpointing is True,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "packing"), [("gpt2", False), ("gpt2", True), ("llama", False)])
def test_the_count_is_that_of_pytorch(kind: str, packing: bool, recompute: bool) -> None:
    config = tiny(1, activation_checkpointing=recompute)
    model, batch = model_of(config, kind, packing).train(), batch_of(config, range(PAIRS))
    # Llama's table of rotary angles, a product of nothing with nothing, is all that may be between them.
    assert counted(model, batch) == pytest.approx(expected(model, batch, config), rel=0 if kind == "gpt2" else 1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_sentences_that_are_read_alone_are_counted_too(recompute: bool) -> None:
    config = tiny(1, activation_checkpointing=recompute)
    model, batch = model_of(config, "gpt2", True, "alone").train(), batch_of(config, range(PAIRS))
    assert len(batch.texts.sentences.lengths) != len(batch.texts.lengths)
    assert counted(model, batch) == expected(model, batch, config)


def test_of_images_in_one_row_what_is_computed_is_counted() -> None:
    config = on_tissue(tiny(1, activation_checkpointing=False))
    model, batch = model_of(config, "gpt2", packing=True).train(), batch_of(config, range(PAIRS))
    found = counted(model, batch)
    assert len(set(model.vision.lengths)) > 1
    # The patch head sees the anchors alone, and is counted for the mean of all images.
    assert found == pytest.approx(expected(model, batch, config), rel=0.01)
    model.vision.lengths.clear()
    assert expected(model, batch, config) > 1.15 * found, "of all patches"


def test_what_no_term_needs_is_not_counted() -> None:
    config = tiny(1, activation_checkpointing=False)
    config = replace(config, loss=replace(config.loss, view=0, partner_text=0, local=0))
    model, batch = model_of(config, "gpt2"), batch_of(config, range(PAIRS))
    with FlopCounterMode(display=False) as partner:
        augment.apply(batch.partners, batch.partner_changes)
    assert expected(model, batch, config) == counted(model, batch) + partner.get_total_flops()


def test_a_frozen_tower_is_only_run_forward_and_a_full_one_learns_everywhere() -> None:
    config = tiny(1, activation_checkpointing=False)
    model, batch = model_of(config, "gpt2"), batch_of(config, range(PAIRS))
    adapted = expected(model, batch, config)
    model.text.requires_grad_(True)
    full = expected(model, batch, config)
    assert full == counted(model, batch)
    model.text.requires_grad_(False)
    frozen = expected(model, batch, config)
    assert frozen < adapted < full
    # Its heads' first products are counted with a gradient of their input, which nobody asks for.
    assert frozen == pytest.approx(counted(model, batch), rel=0.01)


def test_the_published_model_takes_what_its_parameters_say() -> None:
    """ViT-B/14 at 518 x 518: 6 operations a weight and token, and attention; the text tower left small."""
    with torch.device("meta"):
        config = tiny(1)
        shape = config.vision.config | {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4,
            "patch_size": 14, "image_size": 518, "num_channels": 3,
        }  # fmt: skip
        size = replace(config.data, image_size=(518, 518))
        config = replace(config, vision=replace(config.vision, config=shape), data=size)
        model = build(config, tokenizer(), "mama_sdpa")
    tokens, blocks = 1369 + 5, 12 * 12 * 768**2
    image = 6 * tokens * blocks + 12 * 12 * tokens**2 * 768
    assert pair_flops(model, (518, 518), [100]) == pytest.approx(2 * image, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_known_of_some_cards_only(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
