"""The towers against plain transformers models of the same weights, and the model on top of them by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mama.data import augment
from mama.data.batches import Rows, Texts, sentence_rows, tokenise
from mama.errors import ConfigError
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.heads import LogitScale
from mama.model.mama_model import MamaModel, build
from mama.model.text_tower import TextTower, build_text
from mama.model.vision_tower import PatchProjection, VisionTower, build_vision
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, TextConfig, VisionConfig
from tests.support.gradients import Result, assert_equal, by_autograd, by_engine
from tests.support.tiny_backbones import KERNEL, LAST_NORM, REGISTERS, TEXT, VISION, base_of, words_of
from tests.support.tiny_model import PAIRS, batch_of, tiny
from tests.support.word_tokenizer import tokenizer

PREFIX = {"dinov2_with_registers": 1 + REGISTERS, "dinov2": 1, "vit": 1, "dinov3_vit": 1 + REGISTERS}
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}
LORA_PER_BLOCK = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "bert": ("query", "value")}
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
PACKING = pytest.mark.parametrize("packing", [True, False])
TUNES = pytest.mark.parametrize("tune", ["lora", "frozen", "full"])
VISIONS = pytest.mark.parametrize("kind", list(VISION))


def head(module: nn.Module | None) -> nn.Module:
    """A head that the model has because its term has a weight."""
    assert module is not None
    return module


def text_tower(kind: str, **settings: Any) -> TextTower:
    torch.manual_seed(0)
    config = TextConfig(
        model=None, config=TEXT[kind], lora_rank=2, **{"lora_dropout": 0.0, "packing": True, **settings}
    )
    return build_text(config, tokenizer(), KERNEL)


def tuned(kind: str, **settings: Any) -> TextTower:
    """A tower whose trained parameters say something, as after some training."""
    tower = text_tower(kind, **settings)
    torch.manual_seed(1)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return tower.eval()


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def padded(texts: Texts, more: int) -> Texts:
    """The same texts with more padding."""
    pad = tokenizer().pad_id
    return Texts(
        F.pad(texts.tokens, (0, more), value=pad),
        texts.lengths,
        F.pad(texts.separators, (0, 2)),
        F.pad(texts.sentence_mask, (0, 2)),
        Rows(F.pad(texts.sentences.tokens, (0, more), value=pad), texts.sentences.lengths),
        F.pad(texts.sentence_row, (0, 2)),
    )


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


def some_texts() -> Texts:
    return tokenise(
        tokenizer(), [["alpha beta gamma", "delta", "epsilon alpha"], ["beta"], ["gamma delta", "beta"]], 64
    )


# Text tower


@KINDS
@PACKING
def test_padding_changes_nothing(kind: str, packing: bool) -> None:
    tower, texts = tuned(kind, packing=packing), some_texts()
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
@PACKING
def test_features_are_read_from_the_states_of_the_plain_language_model(kind: str, packing: bool) -> None:
    """Each text by itself, unpadded and unbatched: its mean, and its state behind each sentence."""
    tower, texts = text_tower(kind, packing=packing).eval(), some_texts()
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
@PACKING
def test_a_sentence_that_is_read_alone_is_a_text_of_its_own(kind: str, packing: bool) -> None:
    """By the plain language model, unpadded and unbatched: the mean over its tokens, whatever stands around it."""
    tower, texts = text_tower(kind, packing=packing, sentences="alone").eval(), some_texts()
    torch.manual_seed(0)
    shape = AutoConfig.for_model(**TEXT[kind], vocab_size=len(tokenizer()))
    plain = AutoModel.from_config(shape, attn_implementation="eager")
    assert texts.sentences.tokens.shape[0] == 5, "beta stands in two texts"
    with torch.no_grad():
        mean, sentences = tower(texts)[0], tower.alone(texts)
        torch.testing.assert_close(tower.alone(padded(texts, 3))[:, :3], sentences, atol=1e-6, rtol=0)
        torch.testing.assert_close(mean, text_tower(kind, packing=packing).eval()(texts)[0], atol=0, rtol=0)
        for row, ends in enumerate(([3, 5, 8], [1], [2, 4])):
            starts = [0, *(end + 1 for end in ends[:-1])]
            assert texts.separators[row, : len(ends)].tolist() == ends
            for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
                alone = plain(input_ids=texts.tokens[row, None, start : end + 1], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(sentences[row, place], alone.mean(0), atol=1e-5, rtol=0)


def texts_of(lengths: list[int]) -> Texts:
    """Random words; a sentence ends at the last token of each text, and in the middle of those that have one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(tokenizer()), (len(lengths), max(lengths)), generator=generator)
    ends = torch.tensor([[n // 2, n - 1] if n > 1 else [0, 0] for n in lengths])
    told = torch.tensor([[True, n > 1] for n in lengths])
    return Texts(tokens, lengths, ends, told, *sentence_rows(tokens, ends, told, 0))


LENGTHS = pytest.mark.parametrize("lengths", [[3, 1, 64, 7], [5], [1], [6, 6, 6]], ids=str)  # 64: as many as fit


def with_adapters(tower: TextTower, std: float) -> TextTower:
    """LoRA matrices that start at 0 leave the others without a gradient."""
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(0))
    return tower


def features_and_gradients(tower: TextTower, texts: Texts) -> dict[str, Tensor]:
    mean, sentences = tower(texts)
    directions = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, generator=directions).to(x)).sum() for x in (mean, sentences))
    trained = {name: p for name, p in tower.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(cast(Tensor, total), list(trained.values()))
    return {"mean": mean.detach(), "sentences": sentences.detach(), **dict(zip(trained, gradients, strict=True))}


@KINDS
@TUNES
@LENGTHS
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_packed_texts_have_the_features_and_gradients_of_padded_ones(
    kind: str, tune: str, lengths: list[int], dtype: torch.dtype, close: float
) -> None:
    """Of every trained parameter; what is far from 0 by its size."""

    def of(packing: bool) -> dict[str, Tensor]:
        tower = with_adapters(text_tower(kind, tune=tune, packing=packing), std=0.05).eval()
        return features_and_gradients(tower.to(dtype), texts_of(lengths))

    packed, padded = of(True), of(False)
    assert packed.keys() == padded.keys()
    for name, wanted in padded.items():
        size = max(1.0, float(wanted.abs().max()))
        assert packed[name].dtype == dtype
        torch.testing.assert_close(packed[name] / size, wanted / size, atol=close, rtol=0, msg=name)


@KINDS
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_packed_texts_reach_the_kernel_in_one_row_without_a_mask(
    kind: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed on padding, and transformers neither looks for packed texts nor makes a mask of them."""
    calls = []

    def kernel(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        calls.append((tuple(query.shape[::2]), mask, options["packing"].lengths))
        return attention.sdpa(module, query, key, value, mask, **options)

    tower = text_tower(kind, tune=tune)
    name = base_of(tower).config._attn_implementation
    monkeypatch.setitem(AttentionInterface._global_mapping, name, kernel)
    tower(texts_of([4, 1, 9]))
    assert calls == [((1, 14), None, [4, 1, 9])] * 3


@KINDS
def test_dropout_of_packed_texts_is_a_function_of_the_seed(kind: str) -> None:
    drops = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"}
    shape = {name: 0.2 if name in drops else value for name, value in TEXT[kind].items()}
    config = TextConfig(model=None, config=shape, lora_rank=2, lora_dropout=0.2, packing=True)
    torch.manual_seed(0)
    tower, texts = with_adapters(build_text(config, tokenizer(), KERNEL), std=0.3).train(), some_texts()
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(features_and_gradients(tower, texts))
    for name, first in found[0].items():
        assert torch.equal(found[2][name], first), name
    assert not torch.equal(found[1]["mean"], found[0]["mean"])


def test_packed_texts_need_a_kernel_of_ours() -> None:
    shape = TextConfig(model=None, config=TEXT["gpt2"], packing=True)
    with pytest.raises(ValueError, match=r"^attention: eager knows no packed texts; .* or text\.packing=false$"):
        build_text(shape, tokenizer(), "eager")
    build_text(replace(shape, packing=False), tokenizer(), "eager")


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
    everything = replace(texts, lengths=[texts.tokens.shape[1]] * len(texts.tokens))
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
@TUNES
def test_merging_leaves_the_output_unchanged(kind: str, tune: str) -> None:
    tower, texts = tuned(kind, tune=tune), some_texts()
    with torch.no_grad():
        fresh, _ = text_tower(kind, tune=tune).eval()(texts)
        mean, sentences = tower(texts)
        tower.merge_adapters()
        merged_mean, merged_sentences = tower(texts)
    assert not isinstance(tower.backbone, PeftModel)
    shape = AutoConfig.for_model(**TEXT[kind], vocab_size=len(tokenizer()))
    plain = {name for name in AutoModel.from_config(shape).state_dict() if not name.startswith("pooler.")}
    assert {name.removeprefix("backbone.") for name in tower.state_dict()} == plain
    assert (mean - fresh).abs().max() > 0.05  # there was something to merge
    torch.testing.assert_close(merged_mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged_sentences, sentences, atol=1e-5, rtol=0)
    tower.merge_adapters()  # a second time is no error
    with torch.no_grad():
        torch.testing.assert_close(tower(texts)[0], merged_mean, atol=0, rtol=0)


@KINDS
def test_a_frozen_model_still_trains_its_two_own_tokens(kind: str) -> None:
    tower, texts = text_tower(kind, tune="frozen"), some_texts()
    ((name, tokens),) = [(name, p) for name, p in tower.named_parameters() if p.requires_grad]
    assert EMBEDDINGS[kind] in name
    assert tokens.shape == (2, 24)
    mean, sentences = tower(texts)
    ((mean * torch.randn(mean.shape)).sum() + sentences[..., 0].sum()).backward()
    assert tokens.grad is not None
    separator, padding = tokens.grad.abs().amax(1).tolist()
    assert separator > 0
    assert padding == 0.0  # no token that is read sees one
    own = words_of(tower)(torch.tensor([tokenizer().separator_id, tokenizer().pad_id]))
    torch.testing.assert_close(own, tokens, atol=0, rtol=0)  # in this order


@KINDS
def test_a_fully_tuned_model_trains_every_parameter_and_every_word(kind: str) -> None:
    tower, texts = text_tower(kind, tune="full"), some_texts()
    assert not isinstance(tower.backbone, PeftModel)
    mean, sentences = tower(texts)
    directions = torch.Generator().manual_seed(0)
    ((mean * torch.randn(mean.shape, generator=directions)).sum() + sentences[..., 0].sum()).backward()
    for name, parameter in tower.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name.endswith("key.bias"), name  # softmax does not see that bias
    words = gradient_of(words_of(tower).weight).abs().amax(1) > 0
    assert words.nonzero().flatten().tolist() == texts.tokens[texts.mask].unique().tolist()


def test_a_word_with_the_number_of_the_models_own_padding_is_trained() -> None:
    """BERT's tables are built with a row, 0, that PyTorch gives no gradient; here it is a word."""
    tower = text_tower("bert", tune="full")
    tokens, ends, told = torch.tensor([[0, 1, tokenizer().separator_id]]), torch.tensor([[2]]), torch.tensor([[True]])
    texts = Texts(tokens, [3], ends, told, *sentence_rows(tokens, ends, told, tokenizer().pad_id))
    tower(texts)[1][..., 0].sum().backward()
    assert gradient_of(words_of(tower).weight)[0].abs().max() > 0


@KINDS
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_keeps_the_first_blocks(kind: str, layers: int) -> None:
    """The states before the last norm are those behind block N of the whole model."""
    ids = some_texts().tokens
    whole, cut = base_of(text_tower(kind, tune="full")), base_of(text_tower(kind, tune="full", layers=layers))
    norms = {"gpt2": "ln_f", "llama": "norm"}  # BERT's blocks end in their own
    norm = cast(nn.Module, getattr(whole, norms[kind])) if kind in norms else nn.Identity()
    with torch.no_grad():
        states = whole(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        got = cut(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, norm(states[layers]), atol=1e-5, rtol=0)
    assert cut.config.num_hidden_layers == layers
    again = AutoModel.from_config(cut.config).state_dict()  # as a consolidated model is loaded
    assert {name for name in again if not name.startswith("pooler.")} == cut.state_dict().keys()


@KINDS
@pytest.mark.parametrize("layers", [0, 4])
def test_more_layers_than_there_are_is_one_line(kind: str, layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"^text\.layers: {layers}, but the model has 3; name 1 to 3$"):
        text_tower(kind, layers=layers)


def test_an_unknown_text_architecture_is_refused_in_one_line() -> None:
    shape = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match=r"^text: opt is not one of gpt2, llama, bert[^\n]*$"):
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


def vision_tower(kind: str, **shape: Any) -> tuple[VisionTower, PreTrainedModel]:
    """The tower, and a plain model of the same weights; no register or position is zero."""
    torch.manual_seed(0)
    tower = build_vision(VisionConfig(model=None, config={**VISION[kind], **shape}), KERNEL).eval()
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    plain = AutoModel.from_config(AutoConfig.for_model(**{**VISION[kind], **shape}), attn_implementation="eager").eval()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tower.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"{LAST_NORM[kind]}.{part}"] = weights.pop(f"norm.{part}")
    result = plain.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("pooler.") for name in result.missing_keys)
    return tower, plain


def plain_states(kind: str, plain: PreTrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """All token states of a plain model, [b, L, d], in front of its last norm and behind it."""
    before: list[Tensor] = []
    norm = cast(nn.Module, getattr(plain, LAST_NORM[kind]))
    hook = norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    arguments = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        after = plain(pixel_values=images, **arguments).last_hidden_state
    hook.remove()
    return before[0], after


@VISIONS
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (16, 24), (64, 64)])
def test_global_and_patch_features_are_those_of_the_plain_model(kind: str, size: tuple[int, int]) -> None:
    tower, plain = vision_tower(kind)
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        seen = tower(images)
    feature, patches = seen.pooled, seen.patches.unflatten(0, (2, -1))
    before, after = plain_states(kind, plain, images)
    count = size[0] * size[1] // 64
    assert before.shape == (2, PREFIX[kind] + count, 24)
    assert patches.shape == (2, count, 24)
    assert (seen.counts, seen.kept) == ([count] * 2, None)
    torch.testing.assert_close(feature, before.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches, after[:, PREFIX[kind] :], atol=1e-5, rtol=0)
    assert (before.mean(1) - after.mean(1)).abs().max() > 0.1  # before and after the norm differ


@VISIONS
def test_patches_stand_in_row_major_order(kind: str) -> None:
    """With no attention block left, a patch's feature depends on its own pixels alone."""
    tower, _ = vision_tower(kind, num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)  # 6 rows of 2 patches
    changed = images.clone()
    changed[0, 0, 3 * 8 + 2, 8 + 5] = 1.0  # row 3, column 1
    with torch.no_grad():
        difference = (tower(changed).patches - tower(images).patches).abs().amax(1)
    assert difference.nonzero().flatten().tolist() == [3 * 2 + 1]


@pytest.mark.parametrize(("kind", "smooth"), [("dinov2_with_registers", True), ("dinov2", False), ("vit", False)])
def test_a_rectangular_image_has_its_positions_interpolated(kind: str, smooth: bool) -> None:
    tower, _ = vision_tower(kind, num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)
    embeddings = cast(Any, tower.backbone).embeddings
    table = embeddings.position_embeddings[0, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(6, 2), mode="bicubic", align_corners=False, antialias=smooth)
    expected = resized.flatten(2).transpose(1, 2) + embeddings.patch_embeddings.projection.bias
    with torch.no_grad():
        patches = tower(images).patches
        torch.testing.assert_close(patches, tower.norm(expected)[0], atol=1e-5, rtol=0)


def test_dinov3_knows_where_a_patch_is() -> None:
    """It has no table of positions: the attention turns with them. Equal patches at other places see other things."""
    tower, _ = vision_tower("dinov3_vit")
    images = torch.zeros(1, 1, 48, 16)
    images[0, 0, :8, :8] = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = tower(images).patches
    distances = (patches[3] - patches[5:]).abs().amax(1)  # black patches, all but the first
    assert distances.min() > 1e-3


def test_dinov3_trains_after_it_has_embedded_the_same_size() -> None:
    """transformers keeps the coordinates of patches; made in inference mode, they must do for training."""
    tower = vision_tower("dinov3_vit", pos_embed_rescale=None)[0]
    images = torch.rand(1, 1, 40, 56)
    with torch.inference_mode():
        expected = tower(images).pooled.clone()
    got = tower.train()(images).pooled
    got.sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_grey_images_reach_every_channel() -> None:
    tower, plain = vision_tower("dinov2_with_registers", num_channels=3)
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        patches = tower(images).patches.unflatten(0, (2, -1))
        expected = plain(pixel_values=images.repeat(1, 3, 1, 1)).last_hidden_state[:, 1 + REGISTERS :]
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)


@VISIONS
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_everything_in_the_image_tower_is_trained(kind: str, size: tuple[int, int]) -> None:
    tower = vision_tower(kind)[0].train()
    seen = tower(torch.rand(2, 1, *size))
    (seen.pooled[:, 0].sum() + (seen.patches * torch.randn(seen.patches.shape)).sum()).backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name  # softmax does not see that bias
        else:
            assert name.endswith("mask_token")


@VISIONS
def test_the_last_norm_alone_serves_the_patches_alone(kind: str) -> None:
    """Which is what the groups of the optimizer rest on: `norm.` is moved by the local term and no other."""
    tower = vision_tower(kind)[0]
    tower(torch.rand(2, 1, 32, 32)).pooled.square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"norm.weight", "norm.bias"}


def test_no_registers_leave_no_empty_parameter_to_train() -> None:
    tower = vision_tower("dinov3_vit", num_register_tokens=0)[0]
    assert tower(torch.zeros(1, 1, 32, 16)).patches.shape == (8, 24)
    assert all(p.numel() for p in tower.parameters()), "ZeRO-3 knows none without an element"
    named = {name: tensor for name, tensor in tower.state_dict().items() if not tensor.numel()}
    assert list(named) == ["backbone.embeddings.register_tokens"], (
        "files of the weights have the same tensors as before"
    )
    tower.bfloat16()
    assert tower(torch.zeros(1, 1, 32, 16, dtype=torch.bfloat16)).pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_sides_that_differ_in_the_architecture_are_refused_in_one_line(name: str) -> None:
    shape = {**VISION["vit"], name: [16, 8]}
    with pytest.raises(ConfigError, match=rf"^vision\.config: {name} is [^\n]*16, 8[^\n]* one number of pixels$"):
        build_vision(VisionConfig(model=None, config=shape), KERNEL)


def test_an_unknown_image_architecture_is_refused_in_one_line() -> None:
    shape = {
        "model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^vision: clip_vision_model is not one of dinov2, dinov2_with_registers, vit, dinov3_vit$"
    ):
        build_vision(VisionConfig(model=None, config=shape), KERNEL)


# The model


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


def test_patches_become_tokens_by_one_matrix_product_as_by_the_convolution() -> None:
    """What a GPU runs, in the arithmetic of the CPU; patches and images that are no squares."""
    convolution = nn.Conv2d(3, 8, (14, 7), stride=(14, 7))
    images = torch.randn(2, 1, 28, 35).expand(-1, 3, -1, -1)
    wanted = convolution(images)
    convolution.__class__ = PatchProjection
    with mock.patch.object(Tensor, "is_cuda", True):
        got = convolution(images)
    assert got.shape == (2, 8, 2, 5)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


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
