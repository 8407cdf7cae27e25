"""Recall among held-out images: by hand on one rank, and the same on two, under ZeRO-3 between two steps."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch

from mama.data import report_text
from mama.data import tokenizer as tokens
from mama.data.batches import tokenise
from mama.data.held_out import Split
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.evaluate.embeddings import embed_images
from mama.model.mama_model import MamaModel, build
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, DataConfig
from mama.train import validation
from mama.train.validation import recall, validation_images
from shards.errors import ShardError
from shards.pack.sample import Sample
from tests.support.cohort import SIZE, study, write_shards
from tests.support.shard_folder import write_folder
from tests.support.tiny_model import tiny

CPU = torch.device("cpu")
STUDIES = 11  # of two images: an odd number on each of two ranks, so that both have a short last batch


def noise(number: int, split: str) -> Sample:
    """A patient of the cohort with noise for images, so that no two images are equal while some texts are."""
    rng = np.random.default_rng(number)
    pixels = [rng.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(2)]
    return Sample(study(number, split), tuple(cv2.imencode(".jpg", p)[1].tobytes() for p in pixels), ())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("validation")
    samples = {"train": [noise(number, "train") for number in range(4)]}
    samples["val"] = [noise(number, "val") for number in range(STUDIES)]
    write_folder(folder / "shards", samples, per_shard=4)
    base = tiny(1)
    data = DataConfig(shards=[str(folder / "shards")], image_size=SIZE, max_tokens=200, workers=0)
    return replace(base, data=data, text=replace(base.text, config=base.text.config | {"n_positions": 200}))


def reports(config: Config, split: str = "val") -> list[list[str]]:
    images = Images(config.data, split)
    places = [images.locate(i) for i in range(len(images))]
    return [report_text.report(images.study(n), images.study(n).views[v]) for n, v in places]


def tokenizer_of(config: Config) -> Tokenizer:
    return tokens.learn((s for text in reports(config, "train") for s in text), 300)


def model_of(config: Config, tokenizer: Tokenizer) -> MamaModel:
    """Random towers whose embeddings differ enough to be told apart."""
    model = build(config, tokenizer, "mama_sdpa")
    for head in (model.image_head, model.text_head):
        torch.nn.init.normal_(head.weight, std=1.0, generator=torch.Generator().manual_seed(3))
    return model


def by_hand(model: MamaModel, config: Config, tokenizer: Tokenizer) -> dict[str, float]:
    """Image by image and text by text, with sorted lists."""
    images = Images(config.data, "val")
    pixels = [images.pixels(*images.locate(i), config.data.image_size) for i in range(len(images))]
    texts = reports(config)
    model.eval()
    with torch.no_grad():
        vectors = [model.embed_images(torch.tensor(p / 127.5 - 1).float()[None, None])[0][0].numpy() for p in pixels]
        spoken = [model.embed_texts(tokenise(tokenizer, [t], 200))[0].numpy() for t in texts]
        scale = model.scale().item()
    different = sorted({"\n".join(t) for t in texts})
    own = ["\n".join(t) for t in texts]
    of = dict(zip(own, spoken, strict=True))
    found: dict[str, float] = {}
    for k in (1, 5, 10):
        hits = [own[i] in sorted(different, key=lambda t: -float(v @ of[t]))[:k] for i, v in enumerate(vectors)]
        found[f"validation/recall_at_{k}_i2t"] = float(np.mean(hits))
        ranked = {t: sorted(range(len(own)), key=lambda i: -float(vectors[i] @ of[t]))[:k] for t in different}
        found[f"validation/recall_at_{k}_t2i"] = float(np.mean([t in {own[i] for i in ranked[t]} for t in different]))
    scores = scale * np.array([[float(v @ s) for s in spoken] for v in vectors], dtype=np.float64)
    losses = []
    for table in (scores, scores.T):
        logs = table - np.log(np.exp(table).sum(1, keepdims=True))
        losses += [-np.mean([logs[i, j] for j in range(len(own)) if own[j] == own[i]]) for i in range(len(own))]
    found["validation/clip_loss"] = float(np.mean(losses))
    return found


def test_one_rank_gives_what_sorting_by_hand_gives(config: Config) -> None:
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    texts = {"\n".join(text) for text in reports(config)}
    assert 8 < len(texts) < 2 * STUDIES  # some images share their text
    model.train()
    state = torch.random.get_rng_state()
    found = validation.validate(model, config, tokenizer, CPU)
    assert model.training
    assert model.text.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    expected = by_hand(model, config, tokenizer)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(expected.values())) > 4  # no figure is trivial
    model.eval()
    validation.validate(model, config, tokenizer, CPU)
    assert not model.training


def test_loader_workers_change_nothing(config: Config) -> None:
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    workers = replace(config, data=replace(config.data, workers=1))
    state = torch.random.get_rng_state()
    assert validation.validate(model, workers, tokenizer, CPU) == validation.validate(model, config, tokenizer, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_fails_leaves_no_loader_process(config: Config) -> None:
    """Whoever handles the error holds the loader alive with it, and could not exit before its processes."""
    tokenizer = tokenizer_of(config)
    model, workers = model_of(config, tokenizer), replace(config, data=replace(config.data, workers=1))
    held_out = Split(workers, "val")
    with patch.object(MamaModel, "embed_images", side_effect=ValueError("no memory")):
        with pytest.raises(ValueError, match="no memory") as first:
            validation.validate(model, workers, tokenizer, CPU)
        with pytest.raises(ValueError, match="no memory") as second:
            embed_images(model, held_out, workers, CPU, "trained")
    assert not multiprocessing.active_children(), (first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_left_out(config: Config, tmp_path: Path, workers: int) -> None:
    """As if it had never been chosen; and more of them than the budget end the run with one line."""
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    shutil.copytree(config.data.shards[0], tmp_path / "shards")
    data = replace(config.data, shards=[str(tmp_path / "shards")], workers=workers, max_corrupt=1)
    spoilt = replace(config, data=data)
    picture = noise(0, "val").images[0]
    (place,) = [path for path in (tmp_path / "shards").glob("val-*.tar") if picture in path.read_bytes()]
    place.write_bytes(place.read_bytes().replace(picture, bytes(len(picture))))

    whole = validation_images(config)
    rest = [image for image in whole.chosen if whole.images.locate(image) != (0, 0)]
    with patch.object(validation, "validation_images", partial(chosen_only, rest)):
        expected = validation.validate(model, config, tokenizer, CPU)
    assert validation.validate(model, spoilt, tokenizer, CPU) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ShardError, match=r"^data\.max_corrupt: 0, but 1 samples are unreadable; the last: [^\n]+$"):
        validation.validate(model, replace(spoilt, data=replace(data, max_corrupt=0)), tokenizer, CPU)


def chosen_only(images: list[int], config: Config) -> Split:
    held_out = validation_images(config)
    held_out.chosen = images
    return held_out


def on_ranks(config: Config) -> dict[str, float]:
    """On two ranks, plain and then as ZeRO-3 has it between two training steps."""
    from mama.runtime.collectives import gather, rank, world_size
    from mama.train import deepspeed_engine as engine_module
    from tests.support.tiny_model import PAIRS, batch_of

    engine_module.join_ranks()
    tokenizer = tokenizer_of(config)
    model = model_of(config, tokenizer)
    calls: list[int] = []
    model.vision.register_forward_hook(lambda *_: calls.append(1))
    model.text.register_forward_hook(lambda *_: calls.append(2))
    plain = validation.validate(model, config, tokenizer, CPU)
    passes = gather(torch.tensor([len(calls)]))
    assert passes[0] == passes[1] == 6, passes  # 11 images a rank in batches of at most 4, and as many of texts

    settings = engine_module.deepspeed_settings
    in_pieces = {"stage3_param_persistence_threshold": 100}  # else it would leave so small a model whole
    engine_module.deepspeed_settings = lambda *a: (
        settings(*a) | {"zero_optimization": settings(*a)["zero_optimization"] | in_pieces}
    )
    engine = engine_module.start_engine(model, config)
    batch = batch_of(config, range(rank() * PAIRS // world_size(), (rank() + 1) * PAIRS // world_size()))
    sharded = []
    for rate in (0.0, 1e-2):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        e = engine(batch)
        engine.backward((e.anchor @ e.anchor_text.t()).sum())
        engine.step()
        assert model.text_head.weight.numel() == 0  # each rank keeps its piece elsewhere
        sharded.append(validation.validate(engine.module, config, tokenizer, CPU))
        assert engine.module.training
    assert sharded[0] == pytest.approx(plain, abs=1e-5)
    assert sharded[1]["validation/clip_loss"] != sharded[0]["validation/clip_loss"]
    same = gather(torch.tensor([[v for found in (plain, *sharded) for v in found.values()]], dtype=torch.float64))
    assert torch.equal(same[0], same[1])
    torch.distributed.destroy_process_group()
    return plain


@pytest.mark.ranks
def test_two_ranks_give_the_values_of_one_also_under_zero_3(config: Config) -> None:
    tokenizer = tokenizer_of(config)
    one = validation.validate(model_of(config, tokenizer), config, tokenizer, CPU)
    two = replace(config, train=replace(config.train, ranks=2, micro_batch=2, global_batch=4, zero_stage=3))
    assert run_on_ranks(on_ranks, two) == pytest.approx(one, abs=1e-5)


def test_equal_texts_are_equally_right_and_take_one_place() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]])
    right = torch.tensor([[False, True, True], [True, False, False]])
    assert [recall(scores, right, k) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]


def test_a_model_that_says_the_same_of_everything_finds_nothing() -> None:
    assert recall(torch.ones(20, 20), torch.eye(20, dtype=torch.bool), 10) == 0.0


def test_a_large_split_is_sampled_the_same_way_each_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "LARGEST", 7)
    chosen = validation_images(config).chosen
    assert len(chosen) == len(validation_images(config)) == len(set(chosen)) == 7
    assert chosen == sorted(chosen) == validation_images(replace(config, seed=99)).chosen
    assert chosen != list(range(7))
    assert validation_images(config)[3][1] == reports(config)[chosen[3]]


def test_shards_without_a_split_val_are_refused_in_one_line(tmp_path: Path, config: Config) -> None:
    write_shards(tmp_path / "shards", {"train": 2})
    none = replace(
        config,
        data=replace(config.data, shards=[str(tmp_path / "shards")]),
        train=replace(config.train, validate_every=5),
    )
    line = f"train.validate_every: 5, but data.shards: {tmp_path / 'shards'} hold no image of the split 'val'"
    with pytest.raises(ConfigError, match=rf"^{re.escape(line)}; pack some, or set it to 0$"):
        validation_images(none)
