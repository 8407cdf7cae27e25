"""Sentences and their separators, and the tokenizer that is learned from reports."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from mama.data import tokenizer as tokens
from mama.data.tokenizer import PADDING, SEPARATOR, Tokenizer
from mama.errors import ConfigError

SENTENCES = [
    "Procedure: screening mammogram.",
    "Patient: age 61 years, race unknown, ethnicity unknown.",
    "Image: type 2D, side left, view MLO.",
    "Composition: density C, the breast is heterogeneously dense.",
    "Findings: irregular mass, spiculated margin, high density.",
    "Impression: BI-RADS 5, highly suggestive of malignancy.",
]
AWKWARD = ["Ödem, 12 × 9 mm", "乳房", "tab\tand  two spaces", "(a) [b] {c} #d @e", "naïve — ‘quoted’", "🩻"]


def many_texts() -> list[str]:
    """Enough different words that any vocabulary is filled."""
    rng = random.Random(0)
    return ["".join(rng.choice("abcdefgh") for _ in range(6)) for _ in range(500)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokens.learn(SENTENCES, 400)


def words(tokenizer: Tokenizer, sentence: str) -> list[int]:
    """The tokens of one sentence alone."""
    return list(tokenizer.base(sentence, add_special_tokens=False)["input_ids"])


def test_a_separator_stands_behind_every_sentence_and_nowhere_else(tokenizer: Tokenizer) -> None:
    got = tokenizer.encode(SENTENCES, 1000)
    expected: list[int] = []
    ends = []
    for sentence in SENTENCES:
        expected += words(tokenizer, sentence)
        ends.append(len(expected))
        expected.append(tokenizer.separator_id)
    assert got.tokens == expected
    assert got.separators == ends
    assert [n for n, token in enumerate(got.tokens) if token == tokenizer.separator_id] == ends
    assert got.tokens[-1] == tokenizer.separator_id
    assert tokenizer.pad_id not in got.tokens


def test_each_sentence_lies_between_its_separators(tokenizer: Tokenizer) -> None:
    got = tokenizer.encode(SENTENCES, 1000)
    starts = [0, *(end + 1 for end in got.separators[:-1])]
    spans = [got.tokens[a:b] for a, b in zip(starts, got.separators, strict=True)]
    assert [str(tokenizer.base.decode(span)).strip() for span in spans] == SENTENCES


@pytest.mark.parametrize("limit", range(2, 60))
def test_a_text_that_is_cut_keeps_to_the_limit_and_ends_in_a_separator(tokenizer: Tokenizer, limit: int) -> None:
    whole, cut = tokenizer.encode(SENTENCES, 1000), tokenizer.encode(SENTENCES, limit)
    assert len(whole.tokens) > 60
    assert len(cut.tokens) <= limit
    assert cut.tokens[-1] == tokenizer.separator_id
    assert cut.separators[-1] == len(cut.tokens) - 1
    assert [n for n, token in enumerate(cut.tokens) if token == tokenizer.separator_id] == cut.separators
    assert cut.tokens[:-1] == whole.tokens[: len(cut.tokens) - 1], "what is left is the beginning of the text"
    # Room is given away only where a sentence would have to consist of its separator alone.
    assert len(cut.tokens) == limit or limit - len(cut.tokens) == 1


def test_a_text_that_just_fits_is_not_cut(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(SENTENCES, 1000)
    assert tokenizer.encode(SENTENCES, len(whole.tokens)) == whole
    assert tokenizer.encode(SENTENCES, len(whole.tokens) - 1) != whole


def test_no_text_is_no_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([], 10) == tokens.Encoded([], [])


def test_separator_and_padding_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    for text, number in ((SEPARATOR, tokenizer.separator_id), (PADDING, tokenizer.pad_id)):
        assert words(tokenizer, text) == [number]
        assert tokenizer.base.convert_ids_to_tokens(number) == text
    assert tokenizer.separator_id != tokenizer.pad_id
    assert {tokenizer.separator_id, tokenizer.pad_id} <= set(range(len(tokenizer)))
    for text in [*SENTENCES, *AWKWARD]:
        assert not {tokenizer.separator_id, tokenizer.pad_id} & set(words(tokenizer, text))


def test_a_language_models_own_special_tokens_keep_their_meaning() -> None:
    """GPT-2 ends a text where others pad: that token must become neither padding nor separator."""
    bare = tokens.learn(SENTENCES, 300).base.backend_tokenizer
    base = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="Ġmass", pad_token="Ġmass")
    before = len(base)
    eos = base.eos_token_id
    tokenizer = Tokenizer(base)
    assert eos not in (tokenizer.separator_id, tokenizer.pad_id)
    assert tokenizer.base.eos_token_id == eos
    assert len(tokenizer) == before
    assert Tokenizer(tokenizer.base).separator_id == tokenizer.separator_id, "wrapped twice, nothing is added twice"
    assert len(tokenizer) == before


def test_no_special_token_of_the_language_model_is_added_by_itself(tokenizer: Tokenizer) -> None:
    """Llama and BERT put tokens of their own around every text that they are given."""
    base = tokens.learn(SENTENCES, 400).base
    base.add_special_tokens({"bos_token": "<s>"})
    start = base.convert_tokens_to_ids("<s>")
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    base.backend_tokenizer.post_processor = around
    assert base("mass")["input_ids"][0] == start
    assert Tokenizer(base).encode(SENTENCES, 500) == tokenizer.encode(SENTENCES, 500)


@pytest.mark.parametrize("text", [SEPARATOR, PADDING])
def test_a_report_cannot_bring_in_a_separator_or_padding(tokenizer: Tokenizer, text: str) -> None:
    got = tokenizer.encode([f"Findings: a mass {text} in the left breast.", "Impression: BI-RADS 5."], 200)
    assert [n for n, token in enumerate(got.tokens) if token == tokenizer.separator_id] == got.separators
    assert tokenizer.pad_id not in got.tokens


def test_learning_is_deterministic_and_does_what_it_was_told() -> None:
    one, two = (tokens.learn(many_texts(), 350) for _ in range(2))
    assert one.base.get_vocab() == two.base.get_vocab()
    assert one.base.backend_tokenizer.to_str() == two.base.backend_tokenizer.to_str()
    assert one.encode(SENTENCES, 500) == two.encode(SENTENCES, 500)
    assert one.base.get_vocab() != tokens.learn(many_texts()[:50], 350).base.get_vocab()


def test_words_of_the_training_reports_become_short() -> None:
    learned, stranger = tokens.learn(SENTENCES * 5, 1000), tokens.learn([], 1000)
    for sentence in SENTENCES:
        assert len(words(stranger, sentence)) == len(sentence.encode()) + 1, "a byte a token, and the space before it"
        assert len(words(learned, sentence)) < len(sentence) / 2


@pytest.mark.parametrize("text", [*SENTENCES, *AWKWARD])
def test_what_is_encoded_is_decoded_again_whatever_the_script(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.base.decode(words(tokenizer, text)) == f" {text}"


@pytest.mark.parametrize("size", [260, 300, 500])
def test_ids_are_dense_so_that_every_row_of_the_embedding_has_a_token(size: int) -> None:
    learned = tokens.learn(many_texts(), size)
    assert sorted(learned.base.get_vocab().values()) == list(range(len(learned)))
    assert len(learned) <= size + 2  # separator and padding


@pytest.mark.parametrize("size", [260, 300])
def test_the_vocabulary_is_at_most_what_was_asked_for_and_the_two_of_our_own(size: int) -> None:
    assert len(tokens.learn(many_texts(), size)) <= size + 2


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert (again.separator_id, again.pad_id, len(again)) == (
        tokenizer.separator_id, tokenizer.pad_id, len(tokenizer),
    )  # fmt: skip
    for limit in (7, 30, 1000):
        assert again.encode([*SENTENCES, *AWKWARD], limit) == tokenizer.encode([*SENTENCES, *AWKWARD], limit)
    again.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(SENTENCES, 99) == tokenizer.encode(SENTENCES, 99)
    files = {path.suffix for path in (tmp_path / "tokenizer").iterdir()}
    assert files <= {".json", ".txt", ".jinja"}, "nothing that is run when it is read"
    json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())


def test_a_language_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tokens.pretrained(str(tmp_path), {})
    assert str(caught.value).startswith(f"text.model: the tokenizer of {tmp_path} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_sentences_are_tokenised_alike_whatever_was_asked_before(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "KNOWN_SENTENCES", 4)  # fewer than there are: some are forgotten
    cut = tokenizer.encode(SENTENCES, 9)
    for text in (SENTENCES, AWKWARD, SENTENCES[::-1], SENTENCES[:3]):
        for limit in (5, 1000, 9):
            assert tokenizer.encode(text, limit) == Tokenizer(tokenizer.base).encode(text, limit)
    assert tokenizer.encode(SENTENCES, 9) == cut
