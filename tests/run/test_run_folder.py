"""Which settings a resumed run may change, and that every other one is compared."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mama.run.kept_settings import MAY_CHANGE, changed_setting, flat, is_among
from mama.settings.schema import Config

# A new setting belongs here or in MAY_CHANGE: decide which.
COMPARED = (
    *("name", "seed", "vision", "heads", "loss", "optim", "data.augment"),
    *("text.model", "text.config", "text.layers", "text.tune", "text.ignore", "text.sentences"),
    *("text.lora_rank", "text.lora_alpha", "text.lora_dropout"),
    *("data.shards", "data.shard_weights", "data.balance", "data.require", "data.image_size", "data.fit", "data.pairs"),
    *("data.pair_weights", "data.style", "data.tell_pathology", "data.findings", "data.mask_probability"),
    "data.max_tokens",
    *("train.steps", "train.global_batch", "train.grad_cache", "train.precision"),
)
SETTINGS = flat(asdict(Config()))


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_may_change_or_is_compared(key: str) -> None:
    allowed, compared = is_among(key, MAY_CHANGE), is_among(key, COMPARED)
    assert allowed != compared
    assert changed_setting(SETTINGS, SETTINGS | {key: "another value"}) == (key if compared else None)


def test_every_name_is_a_setting_or_a_section() -> None:
    assert [name for name in (*MAY_CHANGE, *COMPARED) if not any(is_among(key, [name]) for key in SETTINGS)] == []


def test_a_setting_whose_name_begins_like_another_is_compared() -> None:
    assert changed_setting({}, {"train.timeout_of_what": 1}) == "train.timeout_of_what"
    assert changed_setting({}, {"packing": 1}) == "packing"
    assert changed_setting({}, {"pack.options.file": 1, "train.timeout": 1}) is None
    assert changed_setting({"vision.config.width": 1}, {}) == "vision.config.width"
