"""Settings with nothing to work on in the shards of a run: the line is there where the pairs of the run show it."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mama.data import idle_settings as module
from mama.data.idle_settings import FIRST, idle_settings
from mama.data.pairs import Pairs
from mama.data.report_text import tells_finding
from mama.settings.schema import AugmentConfig, Config, DataConfig, LossConfig, TrainConfig
from shards.pack.sample import Sample
from shards.schema import Study
from tests.support.cohort import SIZE, sample, study, write_shards
from tests.support.shard_folder import write_folder

TIGHT = AugmentConfig(crop_scale=(0.02, 0.1), min_tissue=0)


def config_of(*folders: Path, local: float = 1.0, **data: Any) -> Config:
    settings: dict[str, Any] = {"findings": "crop", "image_size": SIZE, "augment": TIGHT} | data
    return Config(
        seed=3,
        data=DataConfig(shards=list(map(str, folders)), cache=str(folders[0].parent / "cache"), **settings),
        loss=LossConfig(local=local, local_sentences="findings"),
        train=TrainConfig(global_batch=2, micro_batch=2),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one kind each, besides `findings`, which have boxes."""
    root = tmp_path_factory.mktemp("idle")
    split = {"train": 6}
    write_shards(root / "findings", split)
    write_shards(root / "words", split, words="An irregular mass. It is new.")
    for name, known in (("density", ("density", "cancer")), ("birads", ("birads",)), ("pathology", ("pathology",))):
        write_shards(root / name, split, known=known)
    boxed = [sample(study(number, "train"), None) for number in range(6)]
    write_folder(root / "reports with boxes", {"train": [_told(one) for one in boxed]}, per_shard=4)
    write_folder(root / "no boxes", {"train": [_without_boxes(one) for one in boxed]}, per_shard=4)
    return root


def _told(one: Sample) -> Sample:
    """A radiologist's own words in every image."""
    return replace(one, study=replace(one.study, views=tuple(replace(v, report="A mass.") for v in one.study.views)))


def _without_boxes(one: Sample) -> Sample:
    views = tuple(replace(v, findings=tuple(replace(f, box=None) for f in v.findings)) for v in one.study.views)
    return replace(one, study=replace(one.study, views=views))


def shown_by_pairs(config: Config) -> set[str]:
    """The settings that change nothing, by the texts of the pairs of many epochs, drawn with and without them."""
    pairs, whole = (Pairs(replace(config, data=replace(config.data, findings=how))) for how in ("crop", "image"))
    drawn = [(pairs[number], whole[number]) for number in range(150)]
    texts = [[(one.anchor_sentences, one.partner_sentences) for one in both] for both in drawn]
    found = set()
    if not any(tells_finding(sentence) for ours, _ in texts for sentence in ours[0]):
        found.add("loss.local_sentences")
    if all(ours == theirs for ours, theirs in texts):
        found.add("data.findings")
    return found


def named(lines: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize(
    ("shards", "data", "expected"),
    [
        (["findings"], {}, set()),
        (["words"], {}, {"data.findings"}),
        (["reports with boxes"], {}, {"data.findings"}),
        (["no boxes"], {}, {"data.findings"}),
        (["density"], {}, {"data.findings", "loss.local_sentences"}),
        (["birads"], {}, {"data.findings"}),
        (["pathology"], {}, {"data.findings"}),
        (["density", "findings"], {}, set()),
        (["density", "findings"], {"shard_weights": [1, 0]}, {"data.findings", "loss.local_sentences"}),
        (["density", "birads"], {"require": ["cancer"]}, {"data.findings", "loss.local_sentences"}),
        (["density", "birads"], {"balance": "cancer"}, {"data.findings", "loss.local_sentences"}),
        (["density", "no boxes"], {"shard_weights": [0, 1]}, {"data.findings"}),
    ],
)
def test_a_line_where_the_pairs_of_the_run_show_that_nothing_changes(
    folder: Path, shards: list[str], data: dict[str, Any], expected: set[str]
) -> None:
    config = config_of(*(folder / name for name in shards), **data)
    assert shown_by_pairs(config) == expected
    lines = idle_settings(config, fetch=True)
    assert named(lines) == expected
    assert lines == idle_settings(config, fetch=False)  # these shards are here


def test_the_line_names_field_value_what_follows_and_the_fix(folder: Path) -> None:
    sentences, crop = idle_settings(config_of(folder / "density"), fetch=True)
    assert sentences == (
        "loss.local_sentences: findings, but none of the 12 images that the run draws has a text that tells findings: "
        "the local term is 0; choose all, or shards with findings, BI-RADS or reports"
    )
    assert crop == (
        "data.findings: crop, but none of the 12 images that the run draws has a box of a finding that the text "
        "describes: texts are those of data.findings=image; choose image, or shards with boxes"
    )
    some = idle_settings(config_of(folder / "density", folder / "findings", shard_weights=[1, 0]), fetch=True)
    assert all("none of the 12 images" in line for line in some)


def test_of_many_studies_the_first_are_looked_at_and_the_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the run draws: what lies behind them is not known, and one more than all of them is all."""
    late = config_of(folder / "density", folder / "findings")
    drawn = len(Pairs(config_of(folder / "density")).images.ends)
    assert idle_settings(late, fetch=True) == []
    monkeypatch.setattr("mama.data.idle_settings.STUDIES", drawn)
    lines = idle_settings(late, fetch=True)
    assert named(lines) == {"data.findings", "loss.local_sentences"}
    among = f"none of the images of the first {drawn} studies that the run draws has "
    assert all(among in line and ": where this holds for all, " in line for line in lines)
    assert all("none of the 12 images" in line for line in idle_settings(config_of(folder / "density"), fetch=True))


def test_settings_that_are_not_chosen_are_not_named(folder: Path) -> None:
    config = config_of(folder / "density", local=0.0, findings="image")
    assert idle_settings(config, fetch=True) == []
    assert named(idle_settings(config_of(folder / "density", local=0.0), fetch=True)) == {"data.findings"}


def test_no_more_studies_are_read_than_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = module.Pairs.__init__

    def counted(self: Pairs, *arguments: Any) -> None:
        plain(self, *arguments)
        study_of = self.images.study

        def noted(number: int) -> Study:
            read.append(number)
            return study_of(number)

        monkeypatch.setattr(self.images, "study", noted)

    monkeypatch.setattr(module.Pairs, "__init__", counted)
    assert idle_settings(config_of(folder / "findings"), fetch=True) == []
    assert read == [0, 1]  # every second patient has a mass


def test_shards_that_are_missing_are_a_line(folder: Path) -> None:
    lines = idle_settings(config_of(folder / "nowhere"), fetch=True)
    assert named(lines) == {"data.findings", "loss.local_sentences"}
    assert all("unknown whether the shards have what it works on (" in line and "nowhere" in line for line in lines)


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_of_shards_at_a_url_the_first_pairs_are_looked_at_and_the_line_says_so(
    folder: Path, url: str, tmp_path: Path
) -> None:
    def config(name: str) -> Config:
        here = config_of(folder / name)
        return replace(here, data=replace(here.data, shards=[f"{url}/{name}"], cache=str(tmp_path / name)))

    lines = idle_settings(config("density"), fetch=True)
    assert named(lines) == {"data.findings", "loss.local_sentences"}
    for line in lines:
        assert f"none of the anchor images of the run's first {FIRST} pairs has " in line
        assert "where this holds for all images, " in line
    assert idle_settings(config("findings"), fetch=True) == []
    unknown = idle_settings(config("birads"), fetch=False)
    assert named(unknown) == {"data.findings", "loss.local_sentences"}
    assert all(line.endswith("unknown whether the shards have what it works on: they are not here") for line in unknown)
    assert not (tmp_path / "birads").exists()
    ours = {Pairs(config("findings")).image(number) for number in range(FIRST)}
    assert len(ours) == 12, "the first pairs of so small a folder are all of its images"
