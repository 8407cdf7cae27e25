"""Tokenizers: the language model's own, or one learned from the training reports.

A separator and a padding token are added to both, so that neither is a token that the language model already knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mama.settings.pretrained import loading_errors

SEPARATOR = "<|sentence|>"
PADDING = "<|padding|>"
KNOWN_SENTENCES = 2**16  # sentences whose tokens a process caches


@dataclass(frozen=True)
class Encoded:
    """One text: its tokens, and the positions of the separators at which its sentences end."""

    tokens: list[int]
    separators: list[int]


class Tokenizer:
    """Sentences -> tokens with a separator after each sentence."""

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        base.add_special_tokens({"additional_special_tokens": [SEPARATOR, PADDING]})
        self.base = base
        vocabulary = base.get_vocab()
        self.separator_id, self.pad_id = vocabulary[SEPARATOR], vocabulary[PADDING]
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.base)

    def encode(self, sentences: list[str], max_tokens: int) -> Encoded:
        """At most `max_tokens` tokens; a truncated text ends in a separator too."""
        tokens: list[int] = []
        separators: list[int] = []
        for sentence in sentences:
            room = max_tokens - len(tokens) - 1
            if room < 1:
                break
            tokens += self._words(sentence)[:room]
            separators.append(len(tokens))
            tokens.append(self.separator_id)
        return Encoded(tokens, separators)

    def _words(self, sentence: str) -> list[int]:
        """The tokens of a sentence, cached: reports made from facts repeat their sentences."""
        if sentence not in self._known:
            if len(self._known) >= KNOWN_SENTENCES:
                self._known.clear()
            # A special token's name in a report is plain words and must not end a sentence.
            encoded = self.base(sentence, add_special_tokens=False, split_special_tokens=True)
            self._known[sentence] = encoded["input_ids"]
        return self._known[sentence]

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, separators included."""
        return str(self.base.decode(tokens, clean_up_tokenization_spaces=False)).strip()

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads, in the format of transformers."""
        self.base.save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read the files of `save`. Raises `ConfigError` if they are missing or damaged."""
        with loading_errors(f"{folder}: the tokenizer", "restore it from a copy"):
            return Tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def learn(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016) of at most `vocabulary` tokens and our own two.

    Deterministic: the same texts give the same tokens.
    """
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))


def pretrained(name: str, arguments: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a language model, with `arguments` for `from_pretrained`. Raises `ConfigError` if unreadable."""
    with loading_errors(f"text.model: the tokenizer of {name}"):
        return Tokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False, **arguments))
