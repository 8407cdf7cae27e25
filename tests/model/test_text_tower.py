"""The text tower against plain language models of the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from mama.data.batches import Rows, Texts, sentence_rows, tokenise
from mama.errors import ConfigError
from mama.model import attention
from mama.model.text_tower import TextTower, build_text
from mama.settings.schema import TextConfig
from tests.support.tiny_backbones import KERNEL, TEXT, base_of, words_of
from tests.support.word_tokenizer import tokenizer

EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}
LORA_PER_BLOCK = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "bert": ("query", "value")}
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
PACKING = pytest.mark.parametrize("packing", [True, False])
TUNES = pytest.mark.parametrize("tune", ["lora", "frozen", "full"])


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


def some_texts() -> Texts:
    return tokenise(
        tokenizer(), [["alpha beta gamma", "delta", "epsilon alpha"], ["beta"], ["gamma delta", "beta"]], 64
    )


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
