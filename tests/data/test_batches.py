"""Pairs and batches: which images, which words and in which order, whoever computes them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mama.data.augment import IDENTITY
from mama.data.batches import NO_FINDING, Batch, Collate, tokenise, training_batches
from mama.data.images import Images, canvas_geometry, to_canvas
from mama.data.pairs import Pair, Pairs, partner_of
from mama.errors import ConfigError
from mama.settings.schema import Config, DataConfig, TrainConfig
from shards.errors import ShardError
from shards.processes import configure_process
from tests.support.checkout import CHECKOUT
from tests.support.letter_shards import GLOBAL_BATCH, STORED, STUDIES, config_of, content, fingerprint, study_of, write
from tests.support.word_tokenizer import tokenizer

TRAIN_IMAGES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "shards", STUDIES)


# Fitting an image to the canvas


def test_fit_shrinks_by_the_tighter_side_and_fills_the_right_with_air() -> None:
    image = np.random.default_rng(0).integers(1, 256, (40, 20), dtype=np.uint8)
    fitted = to_canvas(image, (20, 30))
    halved = image.reshape(20, 2, 10, 2).mean((1, 3))
    assert fitted.shape == (20, 30)
    assert fitted.dtype == np.uint8
    assert np.abs(fitted[:, :10] - halved).max() <= 1
    assert not fitted[:, 10:].any()


def test_fit_centres_a_wide_image_between_air_and_keeps_the_chest_wall_left() -> None:
    image = np.full((20, 40), 200, np.uint8)
    image[:, :8] = 100  # the chest wall's edge
    fitted = to_canvas(image, (31, 20))  # scale 1/2: 10 x 20, with 21 rows of background, 10 of them above
    assert not fitted[:10].any()
    assert not fitted[20:].any()
    assert (fitted[10:20, :4] == 100).all()
    assert (fitted[10:20, 4:] == 200).all()


def test_fit_enlarges_a_small_image() -> None:
    fitted = to_canvas(np.full((4, 2), 90, np.uint8), (12, 8))
    assert (fitted[:, :6] == 90).all()
    assert not fitted[:, 6:].any()


def test_fit_geometry_tells_where_a_stored_point_lies_on_the_canvas() -> None:
    image = np.zeros((40, 60), np.uint8)
    image[8:16, 20:40] = 255
    across, down, top = canvas_geometry((40, 60), (45, 45), "letterbox")  # 30 x 45, with 15 rows of background
    assert (across, down, top) == (0.75, 0.75, 7)
    rows, columns = np.nonzero(to_canvas(image, (45, 45)))
    assert (rows.min(), rows.max() + 1) == (top + 8 * down, top + 16 * down)
    assert (columns.min(), columns.max() + 1) == (20 * across, 40 * across)


@pytest.mark.parametrize("size", [(80, 90), (20, 30), (80, 30), (20, 90), (40, 60)])
def test_a_stretched_image_fills_the_canvas_and_its_points_with_it(size: tuple[int, int]) -> None:
    """Whether an axis shrinks or grows; a box that begins and ends between whole pixels of the canvas keeps them."""
    image = np.full((40, 60), 100, np.uint8)
    image[8:16, 20:40] = 200
    across, down, top = canvas_geometry((40, 60), size, "stretch")
    assert (across, down, top) == (size[1] / 60, size[0] / 40, 0)
    fitted = to_canvas(image, size, "stretch")
    rows, columns = np.nonzero(fitted >= 150)
    assert (rows.min(), rows.max() + 1) == (8 * down, 16 * down)
    assert (columns.min(), columns.max() + 1) == (20 * across, 40 * across)
    smooth = np.add.outer(np.arange(40.0), np.arange(60.0)).astype(np.uint8) * 2
    middle = [(np.arange(n) + 0.5) * k / n - 0.5 for n, k in zip(size, smooth.shape, strict=True)]
    expected = 2 * np.add.outer(*middle)  # of a slope every average and interpolation is the value in its middle
    assert np.abs(to_canvas(smooth, size, "stretch") - expected)[2:-2, 2:-2].max() <= 1


# Finding images


def test_a_worker_starts_although_opencv_ran_threads_before_it_was_forked(folder: Path) -> None:
    cv2.setNumThreads(2)
    cv2.resize(np.zeros((2000, 2000), np.uint8), (1000, 1000), interpolation=cv2.INTER_AREA)
    time.sleep(0.5)  # until the thread sleeps
    Images(DataConfig([str(folder)]), "train")
    worker = multiprocessing.get_context("fork").Process(target=configure_process)
    worker.start()
    worker.join(20)
    worker.kill()  # where it hangs
    assert worker.exitcode == 0


def test_locate_numbers_the_views_of_ragged_studies_in_manifest_order(folder: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more", {"train": ["r", "LlR"]}, first_grey=150)
    images = Images(DataConfig([str(folder), str(more)]), "train")
    expected = [(n, v) for n, letters in enumerate([*STUDIES["train"], "r", "LlR"]) for v in range(len(letters))]
    assert len(images) == len(expected) == TRAIN_IMAGES + 4
    assert [images.locate(i) for i in range(len(images))] == expected
    # The greys count the images as they were written; those of `val` came first.
    greys = [int(images.pixels(*images.locate(i), STORED).mean().round()) for i in range(len(images))]
    written = [30 + 8 * (2 + i) for i in range(TRAIN_IMAGES)] + [150 + 8 * i for i in range(4)]
    assert greys == pytest.approx(written, abs=2)
    assert [images.study(n).key for n in (0, 4, 5)] == ["train0", "train4", "train0"]


def test_shards_that_hold_nothing_to_train_on_are_one_line(folder: Path, tmp_path: Path) -> None:
    only_val = write(tmp_path / "val", {"val": ["LR"]})
    with pytest.raises(ConfigError, match=r"^data\.shards: empty; name at least one folder.*$"):
        Images(DataConfig(), "train")
    with pytest.raises(ConfigError, match=r"^data\.shards: .*hold no image of the split 'train'$"):
        Pairs(config_of(only_val))
    with pytest.raises(ShardError, match=r"^.*absent: no manifest\.json.*run `mama pack`$"):
        Pairs(config_of(folder, tmp_path / "absent"))


def test_a_folder_without_the_split_adds_nothing(folder: Path, tmp_path: Path) -> None:
    only_val = write(tmp_path / "val", {"val": ["LR"]})
    assert len(Images(DataConfig([str(only_val), str(folder)]), "train")) == TRAIN_IMAGES


# Choosing the partner


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        ("study", {0: {1, 2, 3, 4}, 1: {0, 2, 3, 4}, 3: {0, 1, 2, 4}}),
        ("breast", {0: {1, 2}, 1: {0, 2}, 3: {4}, 4: {3}}),
        ("contralateral", {0: {3, 4}, 2: {3, 4}, 3: {0, 1, 2}}),
        ("augment", {0: {0}, 3: {3}}),
    ],
)
def test_each_pair_policy_draws_from_the_views_it_allows(policy: Any, allowed: dict[int, set[int]]) -> None:
    config, study = DataConfig(pairs=[policy]), study_of("LllRr")
    rng = np.random.default_rng(0)
    for anchor, expected in allowed.items():
        counts = Counter(partner_of(study, anchor, config, rng) for _ in range(600))
        assert set(counts) == expected
        for count in counts.values():  # evenly: within five standard deviations
            share = 1 / len(expected)
            assert abs(count - 600 * share) <= 5 * (600 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    (
        "pairs",
        "weights",
        "shares",
    ),  # shares of: the anchor itself, the other view of the breast, the other breast's two
    [
        (["study", "augment"], [], (1 / 2, 1 / 6, 1 / 3)),
        (["study"], [], (0, 1 / 3, 2 / 3)),
        (["breast", "contralateral", "augment"], [], (1 / 3, 1 / 3, 1 / 3)),
        (["breast", "contralateral", "augment"], [2, 1, 5], (5 / 8, 2 / 8, 1 / 8)),
        (["augment", "contralateral", "study"], [0, 3, 1], (0, 1 / 12, 11 / 12)),
    ],
)
def test_pair_policies_are_mixed_by_their_weights(pairs: Any, weights: Any, shares: tuple[float, ...]) -> None:
    config, study = DataConfig(pairs=pairs, pair_weights=weights), study_of("LlRr")
    rng, draws = np.random.default_rng(1), 4000
    counts = Counter({2: 0, 3: 1}.get(partner_of(study, 2, config, rng), 2) for _ in range(draws))
    for kind, share in enumerate(shares):
        assert abs(counts[kind] - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("policy", "letters"), [("study", "L"), ("breast", "LRr"), ("contralateral", "Ll")])
def test_a_view_without_the_wanted_partner_is_its_own(policy: Any, letters: str) -> None:
    config = DataConfig(pairs=[policy])
    rng = np.random.default_rng(2)
    assert {partner_of(study_of(letters), 0, config, rng) for _ in range(50)} == {0}


# Making pairs


def index_of(pairs: Pairs, key: str) -> int:
    return next(g for g in range(len(pairs.images)) if pairs[g].key == key)


@pytest.mark.parametrize("key", ["train2/0.jpg", "train2/1.jpg"])  # the left and the right view of "LR"
def test_a_partner_of_the_other_breast_brings_the_report_of_its_own_side(folder: Path, key: str) -> None:
    pairs = Pairs(config_of(folder, pairs=["contralateral"], mask_probability=0.0))
    pair = pairs[index_of(pairs, key)]
    here, there = (("left", 2), ("right", 4)) if key.endswith("0.jpg") else (("right", 4), ("left", 2))
    for (side, birads), text in ((here, pair.anchor_sentences), (there, pair.partner_sentences)):
        assert f"Image: type 2D, side {side}, view CC." in text
        assert any(sentence.startswith(f"Impression: BI-RADS {birads},") for sentence in text)
    batch = Collate(tokenizer(), 144)([pair])
    assert batch.anchor_text_row.tolist() == [0]
    assert batch.partner_text_row.tolist() == [1]


@pytest.mark.parametrize("policy", ["breast", "augment"])
def test_a_partner_of_the_same_breast_shares_the_text_row_of_the_anchor(folder: Path, policy: str) -> None:
    pairs = Pairs(config_of(folder, pairs=[policy], mask_probability=0.0))
    some = [pairs[g] for g in range(TRAIN_IMAGES)]
    if policy == "breast":
        pair = pairs[index_of(pairs, "train0/2.jpg")]
        assert abs(pair.anchor.astype(int) - pair.partner).max() > 4  # another image, the MLO view
        assert "Image: type 2D, side right, view CC." in pair.partner_sentences
    batch = Collate(tokenizer(), 144)(some)
    assert torch.equal(batch.anchor_text_row, batch.partner_text_row)


def test_meta_information_is_hidden_with_the_given_probability(folder: Path) -> None:
    def sides(probability: float) -> list[bool]:
        pairs = Pairs(config_of(folder, mask_probability=probability))
        return ["side unknown" in " ".join(pairs[g].anchor_sentences) for g in range(300)]

    assert not any(sides(0.0))
    assert all(sides(1.0))
    assert abs(sum(sides(0.8)) - 240) <= 5 * (300 * 0.8 * 0.2) ** 0.5


def test_only_images_of_the_train_split_are_seen_and_each_once_an_epoch(folder: Path) -> None:
    pairs = Pairs(config_of(folder, pairs=["study"]))
    images = {f"train{n}/{v}.jpg" for n, letters in enumerate(STUDIES["train"]) for v in range(len(letters))}
    written = [30 + 8 * (2 + i) for i in range(TRAIN_IMAGES)]
    for epoch in range(3):
        seen = [pairs[g] for g in range(epoch * TRAIN_IMAGES, (epoch + 1) * TRAIN_IMAGES)]
        assert sorted(pair.key for pair in seen) == sorted(images)
        for pixels in (p for pair in seen for p in (pair.anchor, pair.partner)):
            assert min(abs(int(pixels.max()) - grey) for grey in written) <= 2


def test_a_pair_does_not_depend_on_what_was_asked_before(folder: Path) -> None:
    forwards, backwards = Pairs(config_of(folder)), Pairs(config_of(folder))
    count = 3 * TRAIN_IMAGES
    expected = [content(forwards[g]) for g in range(count)]
    np.random.default_rng().random(3)
    assert [content(backwards[g]) for g in reversed(range(count))] == expected[::-1]
    assert len(set(expected)) == count
    other_seed = Pairs(replace(config_of(folder), seed=2))
    assert [content(other_seed[g]) for g in range(count)] != expected


def test_pairs_and_text_ids_are_the_same_in_another_process(folder: Path) -> None:
    script = f"from tests.support.letter_shards import fingerprint; print(fingerprint({str(folder)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == fingerprint(str(folder))


# Making batches


def pair_of(anchor_text: list[str], partner_text: list[str] | None = None, grey: int = 0) -> Pair:
    image = np.full(STORED, grey, np.uint8)
    change = IDENTITY + np.float32(grey)
    return Pair(f"study/{grey}", image, image + 1, change, change + 1, anchor_text, partner_text or anchor_text)


def test_a_text_without_a_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^texts: one has no sentence$"):
        tokenise(tokenizer(), [["alpha beta"], []], 6)


def test_collate_tokenises_each_distinct_text_once_and_points_to_its_row() -> None:
    long, short, other = ["alpha beta", "gamma"], ["delta"], ["epsilon epsilon epsilon"]
    batch = Collate(tokenizer(), 144)(
        [pair_of(long, grey=3), pair_of(short, other, grey=7), pair_of(list(long), short, grey=9), pair_of(other)]
    )
    sep, pad = tokenizer().separator_id, tokenizer().pad_id
    assert batch.texts.tokens.tolist() == [[1, 2, sep, 3, sep], [4, sep, pad, pad, pad], [5, 5, 5, sep, pad]]
    assert batch.texts.lengths == [5, 2, 4]
    assert batch.texts.mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]]
    assert batch.texts.separators[0].tolist() == [2, 4]
    assert batch.texts.separators[1:, 0].tolist() == [1, 3]
    assert batch.texts.sentence_mask.tolist() == [[True, True], [True, False], [True, False]]
    assert batch.anchor_text_row.tolist() == [0, 1, 0, 2]
    assert batch.partner_text_row.tolist() == [0, 2, 1, 2]
    assert batch.keys == ["study/3", "study/7", "study/9", "study/0"]
    assert batch.anchors.shape == batch.partners.shape == (4, 1, *STORED)
    assert batch.anchors.dtype == torch.uint8
    assert batch.anchors[:, 0, 0, 0].tolist() == [3, 7, 9, 0]
    assert batch.partners[:, 0, 0, 0].tolist() == [4, 8, 10, 1]
    assert batch.anchor_changes[:, 1].tolist() == [3, 7, 9, 0]
    assert batch.partner_changes[:, 1].tolist() == [4, 8, 10, 1]


def test_a_text_that_is_cut_still_ends_in_a_separator() -> None:
    texts = tokenise(tokenizer(), [["alpha beta gamma", "delta epsilon alpha"], ["alpha beta gamma", "delta"]], 6)
    sep, pad = tokenizer().separator_id, tokenizer().pad_id
    assert texts.tokens.tolist() == [[1, 2, 3, sep, 4, sep], [1, 2, 3, sep, 4, sep]]
    texts = tokenise(tokenizer(), [["alpha beta gamma", "delta"], ["alpha"]], 5)
    assert texts.tokens.tolist() == [[1, 2, 3, sep], [1, sep, pad, pad]]
    assert texts.sentence_mask.tolist() == [[True], [True]]


def test_text_ids_are_equal_where_the_anchors_texts_are_equal_and_only_there() -> None:
    texts = [["a b", "c"], ["a", "b c"], ["a b c"], ["a b", "c"], ["c", "a b"], ["a b", "C"]]
    ids = Collate(tokenizer(), 144)([pair_of(text, ["alpha"]) for text in texts]).text_ids
    assert ids.dtype == torch.int64
    assert (ids >= 0).all()
    for i, one in enumerate(texts):
        for j, two in enumerate(texts):
            assert (ids[i] == ids[j]).item() is (one == two)


def test_findings_are_marked_and_numbered_by_what_is_read_of_them() -> None:
    mass, specks = "Findings: alpha.", "Findings: beta."  # four tokens each, like the others
    texts = [
        ["gamma", mass, "delta", specks],
        ["epsilon", mass, specks],  # the same findings
        [mass, "gamma"],
        [specks, mass],
        ["gamma", "the Findings: alpha"],
        ["gamma", "delta " * 7, mass, specks],  # the second finding is cut off: as if only the first were told
        ["alpha " * 14, mass],  # nothing is left of the finding
        ["gamma", "delta " * 3, mass, specks],  # of the second finding three tokens are left
    ]
    batch = Collate(tokenizer(), 15)([pair_of(text, ["alpha"]) for text in texts])
    told = [[False, True, False, True], [False, True, True], [True, False], [True, True], [False] * 2]
    told += [[False, False, True], [False], [False, False, True, True]]
    count = batch.texts.sentence_mask.sum(1)[batch.anchor_text_row].tolist()
    assert [row[:n].tolist() for row, n in zip(batch.finding_mask, count, strict=True)] == told
    assert batch.finding_mask.sum() == sum(map(sum, told))
    assert batch.finding_ids.dtype == torch.int64
    same = [0, 0, 2, 3, 4, 2, 4, 7]
    for i, one in enumerate(same):
        for j, two in enumerate(same):
            assert (batch.finding_ids[i] == batch.finding_ids[j]).item() is (one == two), (i, j)
    assert [n for n, number in enumerate(batch.finding_ids.tolist()) if number == NO_FINDING] == [4, 6]
    assert batch.finding_ids.min() == NO_FINDING


def rows(batches: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """Each pair of the batches by itself: its texts without padding, however they were padded together."""
    found = []
    for batch in batches:
        for i, key in enumerate(batch.keys):
            words = []
            for row in (batch.anchor_text_row[i], batch.partner_text_row[i]):
                texts = batch.texts
                ends = texts.separators[row][texts.sentence_mask[row]].tolist()
                words.append((texts.tokens[row][texts.mask[row]].tolist(), ends))
            tensors = (batch.anchors, batch.partners, batch.anchor_changes, batch.partner_changes)
            found.append((key, *(t[i].numpy().tobytes() for t in tensors), words, batch.text_ids[i].item()))
    return found


WEIGHTED = {"pairs": ["study", "augment", "contralateral"], "pair_weights": [1, 2, 3], "balance": "birads"}


@pytest.fixture(scope="module", params=["each once an epoch", "weighted"])
def ordered(request: pytest.FixtureRequest, folder: Path) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Settings, and their first three global batches, one pair at a time and by nothing but the global index."""
    cache = {"cache": str(folder.parent / "cache")}
    settings = {**WEIGHTED, **cache, "shard_weights": [2.0]} if request.param == "weighted" else cache
    pairs, collate = Pairs(config_of(folder, **settings)), Collate(tokenizer(), 144)
    return settings, [row for g in range(3 * GLOBAL_BATCH) for row in rows([collate([pairs[g]])])]


def gathered(config: Config, steps: range, ranks: int) -> list[tuple[Any, ...]]:
    """What the ranks hold together, micro-batch after micro-batch and rank after rank."""
    each = [list(training_batches(config, tokenizer(), steps, rank, ranks)) for rank in range(ranks)]
    assert {len(batches) for batches in each} == {len(steps) * config.train.accumulation(ranks)}
    assert all(len(batch.keys) == config.train.micro_batch for batches in each for batch in batches)
    return [row for together in zip(*each, strict=True) for row in rows(together)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 6), (3, 2)])
def test_global_batches_do_not_depend_on_ranks_or_workers(
    folder: Path, ordered: tuple[dict[str, Any], list[tuple[Any, ...]]], ranks: int, micro: int, workers: int
) -> None:
    settings, expected = ordered
    config = config_of(folder, micro=micro, workers=workers, **settings)
    assert gathered(config, range(3), ranks) == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("before", "after", "workers"), [((1, 4), (2, 3), 0), ((2, 3), (3, 2), 1), ((3, 4), (1, 12), 3)]
)
def test_a_resume_in_mid_epoch_on_other_ranks_continues_the_same_global_batches(
    folder: Path,
    ordered: tuple[dict[str, Any], list[tuple[Any, ...]]],
    before: tuple[int, int],
    after: tuple[int, int],
    workers: int,
) -> None:
    settings, expected = ordered
    assert 2 * GLOBAL_BATCH % TRAIN_IMAGES, "the resume lies within an epoch"
    (ranks, micro), (other_ranks, other_micro) = before, after
    first = gathered(config_of(folder, micro=micro, workers=workers, **settings), range(2), ranks)
    config = config_of(folder, micro=other_micro, workers=workers, **settings)
    assert first + gathered(config, range(2, 3), other_ranks) == expected
    assert gathered(config, range(3, 3), other_ranks) == []


# Samples that cannot be read


def spoil(folder: Path, *members: str) -> None:
    """Cut off the last bytes of these JPEGs where they lie, or the opening brace of these facts."""
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        with tarfile.open(tar) as archive:
            for info in archive:
                if info.name in members:
                    at = info.offset_data + (0 if info.name.endswith("json") else info.size - 2)
                    content[at : at + 2] = b"\0\0"
        tar.write_bytes(content)


@pytest.mark.parametrize("settings", [{}, WEIGHTED], ids=["each once an epoch", "weighted"])
def test_a_sample_that_cannot_be_read_is_replaced_by_the_same_other_one_everywhere(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    spoil(spoilt, "train3.2.jpg", "train1.json")  # the R of "LlR", and all of "L"
    config = config_of(spoilt, cache=str(tmp_path / "cache"), micro=4, **settings)
    whole, broken = Pairs(replace(config, data=replace(config.data, shards=[str(folder)]))), Pairs(config)
    with caplog.at_level(logging.WARNING):
        some = [broken[g] for g in range(3 * GLOBAL_BATCH)]
    for g, pair in enumerate(some):
        assert pair.key not in ("train1/0.jpg", "train3/2.jpg")
        if pair.unreadable == 0:
            assert content(pair) == content(whole[g])
        elif not settings:  # the anchor or its partner would have been one of them
            assert whole[g].key.startswith(("train1/", "train3/"))
    assert 0 < sum(pair.unreadable > 0 for pair in some) < len(some)
    said = [record.getMessage() for record in caplog.records if "cannot be read and is skipped" in record.getMessage()]
    assert sorted(line.split()[0] for line in said) == sorted(broken.unreadable.errors)
    assert "train3" in broken.unreadable.errors
    assert "the image is cut" in broken.unreadable.errors["train3"]

    for ranks, micro, workers in ((1, 12, 0), (2, 3, 1)):
        config = replace(config, train=TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=micro))
        config = replace(config, data=replace(config.data, workers=workers))
        each = [list(training_batches(config, tokenizer(), range(3), rank, ranks)) for rank in range(ranks)]
        batches = [batch for together in zip(*each, strict=True) for batch in together]
        assert rows(batches) == rows([Collate(tokenizer(), 144)(some)])
        assert sum(batch.unreadable for batch in batches) == sum(pair.unreadable for pair in some)
        assert batches[0].to(torch.device("cpu")).unreadable == batches[0].unreadable


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_samples_that_cannot_be_read_end_the_run_in_one_line(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    spoil(spoilt, "train0.json", "train1.json", "train4.0.jpg")

    def run(limit: int) -> int:
        config = config_of(spoilt, max_corrupt=limit, workers=workers)
        return sum(batch.unreadable for batch in training_batches(config, tokenizer(), range(4), 0, 1))

    assert run(3) > 3, "each time that one is drawn counts in the batch, but towards the limit once"
    with pytest.raises(ShardError) as caught:
        run(2)
    message = str(caught.value)
    assert re.fullmatch(r"data\.max_corrupt: 2, but 3 samples are unreadable; the last: .*", message)
    for key in ("train0", "train1", "train4"):
        assert f"{key} ({spoilt}/train-" in message


def test_where_nothing_can_be_read_the_run_ends(folder: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    for tar in spoilt.glob("train*.tar"):
        tar.unlink()
    with pytest.raises(ShardError, match=r"^data\.shards: 100 samples drawn, all unreadable; .*$"):
        Pairs(config_of(spoilt))[0]
