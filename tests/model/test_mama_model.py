"""The model on top of its towers, by hand; every architecture with checkpointed blocks and under ZeRO-3."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mama.data import augment
from mama.data.batches import Texts, tokenise
from mama.model.blocks import prepare_blocks
from mama.model.heads import LogitScale
from mama.model.mama_model import MamaModel, build
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, TextConfig, VisionConfig
from tests.support.gradients import Result, assert_equal, by_autograd, by_engine
from tests.support.tiny_backbones import KERNEL, TEXT, VISION
from tests.support.tiny_model import PAIRS, batch_of, tiny
from tests.support.word_tokenizer import tokenizer


def head(module: nn.Module | None) -> nn.Module:
    """A head that the model has because its term has a weight."""
    assert module is not None
    return module


def row_of(texts: Texts, row: int) -> Texts:
    """One of the texts, with the padding that it has there."""
    own = slice(row, row + 1)
    return Texts(
        texts.tokens[own],
        texts.lengths[own],
        texts.separators[own],
        texts.sentence_mask[own],
        texts.sentences,
        texts.sentence_row[own],
    )


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny(1)


@pytest.fixture(scope="module")
def model(config: Config) -> MamaModel:
    return build(config, tokenizer(), KERNEL).eval()


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("countable", [True, False])  # False: as on a GPU, no sentences are counted
def test_forward_projects_every_view_and_text_of_the_batch(
    config: Config, model: MamaModel, monkeypatch: pytest.MonkeyPatch, countable: bool
) -> None:
    monkeypatch.setattr("mama.model.mama_model.countable", lambda mask: countable)
    batch = batch_of(config, range(8))  # the partners of even rows have a text of their own
    assert (batch.anchor_text_row != batch.partner_text_row).any()
    assert len(batch.texts.tokens) < 8 + 4  # some texts are shared
    with torch.no_grad():
        e = model(batch)
        anchors = augment.apply(batch.anchors, batch.anchor_changes)
        partners = augment.apply(batch.partners, batch.partner_changes)
        anchor, partner = model.vision(anchors).pooled, model.vision(partners).pooled
        patches = model.vision(anchors).patches.unflatten(0, (8, -1))
        expected = {
            "anchor": unit(model.image_head(anchor)),
            "partner": unit(model.image_head(partner)),
            "anchor_view": unit(head(model.view_head)(anchor)),
            "partner_view": unit(head(model.view_head)(partner)),
            "patches": unit(head(model.patch_head)(patches)),
        }
        for i in range(8):  # each text by itself
            for name, row in (("anchor_text", batch.anchor_text_row[i]), ("partner_text", batch.partner_text_row[i])):
                one = row_of(batch.texts, int(row))
                mean, sentences = model.text(one)
                got = getattr(e, name)[i]
                torch.testing.assert_close(got, unit(model.text_head(mean))[0], atol=1e-5, rtol=0)
                if name == "anchor_text":
                    count = int(one.sentence_mask.sum())
                    assert e.sentence_mask[i].sum() == count
                    local = unit(head(model.sentence_head)(sentences))[0, :count]
                    torch.testing.assert_close(e.sentences[i, :count], local, atol=1e-5, rtol=0)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(e, name), tensor, atol=1e-5, rtol=0, msg=name)
    assert e.anchor.shape == e.partner.shape == e.anchor_text.shape == e.anchor_view.shape == (8, 16)
    assert e.patches.shape == (8, 8, 16)  # 32 x 16 pixels in patches of 8
    assert e.sentences.shape == (*e.sentence_mask.shape, 16)
    assert not e.sentences[~e.sentence_mask].any()
    for name in (*expected, "anchor_text", "partner_text", "sentences"):
        norms = getattr(e, name)[e.sentence_mask if name == "sentences" else ...].norm(dim=-1)
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
    torch.testing.assert_close(texts[batch.anchor_text_row], e.anchor_text, atol=1e-6, rtol=0)


def test_what_is_embedded_of_packed_texts_is_that_of_padded_ones(config: Config, model: MamaModel) -> None:
    """As evaluation and predictions ask for it."""
    padded = build(replace(config, text=replace(config.text, packing=False)), tokenizer(), KERNEL).eval()
    texts = batch_of(config, range(8)).texts
    assert len(set(texts.lengths)) > 1
    with torch.no_grad():
        torch.testing.assert_close(model.embed_texts(texts), padded.embed_texts(texts), atol=1e-6, rtol=0)
        sentences = [one.sentence_embeddings(texts) for one in (model, padded)]
    torch.testing.assert_close(*sentences, atol=1e-6, rtol=0)


def test_alignment_is_the_cosine_of_each_sentence_with_each_patch(config: Config, model: MamaModel) -> None:
    images = torch.rand(2, 1, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = tokenise(tokenizer(), [["alpha", "beta gamma", "delta"], ["epsilon epsilon", "alpha"]], 64)
    with torch.no_grad():
        got = model.sentence_embeddings(texts) @ model.patch_embeddings(images).mT
        patches = head(model.patch_head)(model.vision(images).patches).double().unflatten(0, (2, -1))
        sentences = head(model.sentence_head)(model.text(texts)[1]).double()
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


def count_calls(tower: nn.Module, calls: dict[str, int], name: str) -> None:
    """Count how often the first part of the first block runs."""
    block = next(module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer))

    def count(*_: Any) -> None:
        calls[name] += 1

    next(block.children()).register_forward_hook(count)


@pytest.mark.parametrize(
    ("image", "text", "tune", "packing"),
    [
        ("dinov2_with_registers", "gpt2", "lora", True),
        ("dinov2", "llama", "frozen", True),
        ("vit", "bert", "lora", True),
        ("dinov3_vit", "bert", "full", False),
        ("vit", "bert", "frozen", True),
    ],
)
def test_activation_checkpointing_changes_no_gradient(
    config: Config, image: str, text: str, tune: Any, packing: bool
) -> None:
    found = []
    batch = batch_of(config, range(4))
    towers = replace(
        config,
        vision=VisionConfig(model=None, config=VISION[image]),
        text=TextConfig(model=None, config=TEXT[text], lora_rank=2, lora_dropout=0.1, tune=tune, packing=packing),
    )
    for checkpointing in (False, True):
        train = replace(config.train, activation_checkpointing=checkpointing)
        built = build(replace(towers, train=train), tokenizer(), KERNEL).train()
        prepare_blocks(built, train, torch.device("cpu"))
        calls = {"vision": 0, "text": 0}
        for tower in calls:
            count_calls(getattr(built, tower), calls, tower)
        e = built(batch)
        (
            e.anchor[:, 0].sum() + e.sentences[:, 0, 1].sum() + e.anchor_text[:, 2].sum() + e.patches[..., 3].sum()
        ).backward()
        found.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
        assert set(calls.values()) == {2 if checkpointing else 1}
    assert found[0].keys() == found[1].keys()
    for part in ("vision.backbone.", "text.backbone."):
        assert any(name.startswith(part) for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


# Towers of every architecture under ZeRO-3, which takes their weights apart

TOGETHER = [("dinov2", "llama"), ("vit", "bert"), ("dinov3_vit", "gpt2")]  # the last one on tissue


def with_towers(config: Config, vision: str, text: str) -> Config:
    return replace(
        config,
        vision=VisionConfig(
            model=None, config=VISION[vision], tokens="tissue" if (vision, text) == TOGETHER[-1] else "all"
        ),
        text=TextConfig(
            model=None, config={**TEXT[text], "vocab_size": 64}, lora_rank=2, lora_dropout=0.0, packing=True
        ),
    )


def under_zero_3(config: Config) -> list[Result]:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results = [by_engine(with_towers(config, *kinds), 3) for kinds in TOGETHER]
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.ranks
def test_every_architecture_has_the_same_gradients_under_zero_3() -> None:
    config = tiny(2)
    for kinds, found in zip(TOGETHER, run_on_ranks(under_zero_3, config), strict=True):
        alone = replace(config, train=replace(config.train, micro_batch=PAIRS))
        whole = with_towers(alone, *kinds)
        padded = replace(whole, text=replace(whole.text, packing=False))
        assert_equal(found, by_autograd(padded), 1e-6, " and ".join(kinds))
