"""The tokenizer of a run: `tokenizer/` in its folder."""

from __future__ import annotations

from pathlib import Path

from mama.data import report_text, tokenizer
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.run.files import check_digests, remove, replace_folder, write_digests
from mama.settings.pretrained import locate
from mama.settings.schema import Config

FOLDER = "tokenizer"
VOCABULARY = 2048  # tokens of a learned tokenizer, unless text.config has a vocab_size


def make_tokenizer(config: Config) -> Tokenizer:
    """Return the language model's own tokenizer; for random weights, one learned from the training reports."""
    if config.text.model is not None:
        name, arguments = locate("text.model", config.text.model)
        return tokenizer.pretrained(name, arguments)
    images, style, tell = Images(config.data, "train"), config.data.style, config.data.tell_pathology
    studies = (images.study(n) for n in range(len(images.studies)))
    hidden: frozenset[str] = frozenset()
    texts = (s for study in studies for view in study.views for s in report_text.text(study, view, style, hidden, tell))
    return tokenizer.learn(texts, int(config.text.config.get("vocab_size", VOCABULARY)))


def save_tokenizer(config: Config) -> None:
    """Make the tokenizer of a run and write it, with its digests, to the run folder."""
    partial = config.run_folder / f"{FOLDER}.partial"
    remove(partial)
    make_tokenizer(config).save(partial)
    write_digests(partial)
    replace_folder(partial, config.run_folder / FOLDER)


def load_tokenizer(run: Path) -> Tokenizer:
    """Return the tokenizer of a run. Raises `ConfigError` if it is missing or its files have changed."""
    check_digests(run / FOLDER, "restore it from a copy")
    return Tokenizer.load(run / FOLDER)
