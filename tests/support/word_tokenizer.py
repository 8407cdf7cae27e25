"""A tokeniser of six words, made without a file. It stands alone: importing it imports no model."""

from __future__ import annotations

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mama.data.tokenizer import Tokenizer

WORDS = ["[UNK]", "alpha", "beta", "gamma", "delta", "epsilon"]


def tokenizer() -> Tokenizer:
    """One token a word of `WORDS`."""
    fast = FastTokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]"))
