from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from shards.check.check import check_all
from shards.check.quality import quality_page
from shards.check.quality_sides import Sides
from shards.check.quality_studies import sampled
from shards.pack.sample import Refusal, Sample
from shards.read.reader import ShardReader
from shards.schema import FALLBACKS, Finding, Labels, Study, View
from tests.support.browser import CHROMIUM, probe
from tests.support.shard_folder import write_folder

HOSTILE = '<script>document.title="owned"</script>'
SECRET = "SECRET-archive/patient-0815.dcm"
SIZES = ((64, 48), (80, 40))


def sample(number: int, split: str, refusals: tuple[Refusal, ...] = (), pathology: str | None = "benign") -> Sample:
    """A study of two views; every third has no labels. The second view is raw from number 20 on, in 21 rendered."""
    views = []
    for n, position in enumerate(("CC", "MLO")):
        height, width = SIZES[number % 2]
        labels = Labels(number % 6, "ABCD"[number % 4], number % 2 == 0, pathology) if number % 3 else Labels()
        crop, affine = (0, 0, width, height), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        findings = (Finding(1, "mass", (4.0, 4.0, 20.0, 20.0)),) if number % 2 else ()
        size = (height, width)
        views.append(
            View(
                f"{n}.jpg", "LR"[number % 2], position, size, size, (0.07, 0.07), crop, False, affine, labels, findings
            )
        )
    views[0] = replace(views[0], vendor="hologic", fallbacks=("stretch",) if split == "val" else ())
    if split != "val":
        views[0] = replace(views[0], implant=number == 2)
    if number >= 20:
        views[1] = replace(views[1], presentation_intent="FOR PROCESSING", processed=number % 2 == 1)
    study = Study(
        f"{split}{number:03d}", f"p{split}{number // 2}", "invented", split, tuple(views), age=40 + number, race=HOSTILE
    )
    grey = [np.add.outer(*map(np.arange, view.size)).astype(np.uint8) for view in views]
    images = tuple(cv2.imencode(".jpg", pixels)[1].tobytes() for pixels in grey)
    return Sample(study, images, refusals)


def refusal(reason: str) -> Refusal:
    return Refusal(SECRET, reason, f"{SECRET}: said so")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with everything, one without the splits val and test, and one that cannot be read."""
    base = tmp_path_factory.mktemp("quality")
    bad = (refusal("blank"), refusal("blank"), refusal("new-code"), refusal("spot"))
    full = {
        "train": [sample(n, "train", bad if n == 1 else ()) for n in range(9)],
        "val": [sample(n, "val") for n in range(3)],
        "test": [sample(n, "test", pathology=HOSTILE) for n in range(5)],
    }
    write_folder(base / "full", full, per_shard=4)
    manifest = json.loads((base / "full" / "manifest.json").read_text())
    manifest["settings"] = {"source": "invented", "long_side": 1024, "options": {"labels": SECRET, "seed": 3}}
    (base / "full" / "manifest.json").write_text(json.dumps(manifest))
    write_folder(base / "one", {"train": [sample(n, "train") for n in range(20, 22)]}, per_shard=4)
    (base / "broken").mkdir()
    (base / "broken" / "manifest.json").write_text("{")
    return [base / "full", base / "one", base / "broken"]


class Page(HTMLParser):
    """The page as a reader takes it: sections of tiles, tables of rows, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, dict[str, Any]] = {}
        self.section: dict[str, Any] = {}
        self.row: list[str] | None = None
        self.table: list[list[str]] = []
        self.tile: str | None = None
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        told = dict(attributes)
        if tag == "section":
            self.section = self.sections[str(told["id"])] = {"charts": {}, "tiles": {}, "tables": [], "text": ""}
        elif tag == "table":
            self.table = []
            if "data-chart" in told:
                self.section["charts"][told["data-chart"]] = self.table
            elif self.section:
                self.section["tables"].append(self.table)
        elif tag == "tr":
            self.row = []
            self.table.append(self.row)
        elif tag in ("td", "th") and self.row is not None:
            self.row.append("")
        self.tile = told.get("data-tile", told.get("data-total"))

    def handle_endtag(self, tag: str) -> None:
        self.row = None if tag == "tr" else self.row
        self.tile = None

    def handle_data(self, data: str) -> None:
        if self.row:
            self.row[-1] += data
        if self.section:
            self.section["text"] += data
            if self.tile:
                self.section["tiles"][self.tile] = data


def counts_of(chart: list[list[str]]) -> dict[str, dict[str, int]]:
    """split -> value -> number, of a chart on the page."""
    (_, *splits), *rows = chart
    found: dict[str, dict[str, int]] = {split: {} for split in splits}
    for value, *cells in rows:
        for split, cell in zip(splits, cells, strict=True):
            if number := int(cell.split()[0]):
                found[split][value] = number
    return found


@pytest.fixture(scope="module")
def path(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quality_page(sets, tmp_path_factory.mktemp("page") / "new" / "quality.html", check_all(sets))


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text())


def test_numbers_are_those_of_the_manifest(page: Page, sets: list[Path]) -> None:
    words = {"unknown": "not known", "true": "cancer", "false": "no cancer"}
    titles = {"view": "View", "vendor": "Vendor", "density": "Density", "birads": "BI-RADS", "cancer": "Cancer",
              "pathology": "Pathology"}  # fmt: skip
    for number, folder in enumerate(sets[:2], 1):
        document = json.loads((folder / "manifest.json").read_text())
        section = page.sections[f"set-{number}"]
        for fact, title in titles.items():
            expected = {
                split: {words.get(value, value): n for value, n in facts[fact].items()}
                for split, facts in document["labels"].items()
            }
            assert counts_of(section["charts"][title]) == expected
        shards = document["shards"]
        tiles = section["tiles"]
        assert int(tiles["images"]) == document["images"] == sum(sum(shard["view_counts"]) for shard in shards)
        assert int(tiles["studies"]) == sum(shard["samples"] for shard in shards)
        assert int(tiles["patients"]) == len({patient for shard in shards for patient in shard["patients"]})
        assert int(tiles["refused"]) == sum(document["images_refused"].values())
        assert int(tiles["excluded"]) == sum(document["images_excluded"].values())
        assert int(tiles["listed"]) == document["listed"]
        splits = {row[0]: [int(cell) for cell in row[1:5]] for table in section["tables"] for row in table
                  if row and row[0] in ("train", "val", "test")}  # fmt: skip
        for split in document["labels"]:
            mine = [shard for shard in shards if shard["split"] == split]
            assert splits.pop(split) == [
                len({patient for shard in mine for patient in shard["patients"]}),
                sum(shard["samples"] for shard in mine),
                sum(sum(shard["view_counts"]) for shard in mine),
                len(mine),
            ]
        assert not splits


def test_what_only_the_studies_say(page: Page) -> None:
    charts = page.sections["set-1"]["charts"]
    assert counts_of(charts["Long side, stored"])["train"] == {"64 px": 10, "80 px": 8}
    assert counts_of(charts["Age"]) == {"train": {"40–49": 5}, "val": {"40–49": 2}, "test": {"40–49": 3}}
    assert counts_of(charts["Race"])["train"] == {HOSTILE: 5}
    assert counts_of(charts["Findings"])["train"] == {"mass with box": 8}
    assert counts_of(charts["Pixel spacing, original"])["val"] == {"70 µm": 6}
    assert counts_of(charts["Implants"]) == {
        "train": {"implant": 1, "no implant": 8, "not known": 9},
        "val": {"not known": 6},
        "test": {"implant": 1, "no implant": 4, "not known": 5},
    }
    assert "Ethnicity" not in charts  # nothing is known of it
    assert "Presentation intent" not in charts
    raw = page.sections["set-2"]
    intents = {"for processing": 1, "for processing, rendered": 1, "not known": 2}
    assert counts_of(raw["charts"]["Presentation intent"]) == {"train": intents}
    assert "2 stored images are raw (FOR PROCESSING)" in " ".join(raw["text"].split())


def test_reasons_are_listed_and_a_missing_split_is_said(page: Page) -> None:
    reasons = {row[0].split()[0]: int(row[1]) for table in page.sections["set-1"]["tables"] for row in table
               if row and row[0].split()[:1] in (["blank"], ["new-code"], ["spot"])}  # fmt: skip
    assert reasons == {"blank": 2, "new-code": 1, "spot": 1}
    told = " ".join(page.sections["set-1"]["text"].split())
    assert f"3 images were rendered by {FALLBACKS['stretch']}." in told
    text = " ".join(page.sections["set-2"]["text"].split())
    assert "No image was left out." in text
    assert "rendered by" not in text
    assert "No patient of this set is in val or test." in text


def test_hostile_text_is_text_and_the_page_names_no_file(path: Path, page: Page, sets: list[Path]) -> None:
    text = path.read_text()
    assert page.tags["script"] == 0
    assert "&lt;script&gt;" in text
    assert HOSTILE not in text
    bare = re.sub(r'"data:[^"]*"', '""', text)
    assert SECRET not in text
    assert str(sets[0].parent) not in text
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", bare)
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", bare)
    assert "options.labels" in text
    assert all(source.startswith(("data:image/", "#")) for source in re.findall(r'(?:src|href)="([^"]{0,40})', text))


def test_a_sample_of_studies_is_shown_always_the_same_with_all_their_images(sets: list[Path]) -> None:
    reader = ShardReader(sets[0])
    shown = sampled(reader, 6)
    assert shown == sampled(reader, 6)
    assert len({study.key for study in shown}) == 6
    assert {study.key for study in sampled(reader, 60)} == {reader.study(n).key for n in range(len(reader))}
    studies = {reader.study(n).key: reader.study(n) for n in range(len(reader))}
    for study in shown:
        names = [thumb.name for thumb in study.thumbs if thumb.uri]
        assert names == [f"{view.laterality}-{view.view}" for view in studies[study.key].views]
        assert [thumb.name for thumb in study.thumbs] == ["R-CC", "L-CC", "R-MLO", "L-MLO"]


def seen(number: int, side: str, right: bool, extra: int = 0) -> Study:
    """A study of one side with its chest wall on the right or left, and `extra` more images of it."""
    study = sample(number, "train").study
    view = replace(study.views[0], laterality=side, flipped=right)
    return replace(study, views=tuple(replace(view, member=f"{n}.jpg") for n in range(1 + extra)))


@pytest.mark.parametrize(
    ("left", "right", "finding"),
    [
        ((20, 0), (0, 20), "good"),
        ((20, 1), (1, 20), "good"),
        ((0, 20), (20, 0), "swapped"),
        ((1, 20), (20, 1), "swapped"),
        ((20, 0), (20, 0), "one-way"),
        ((0, 20), (0, 20), "one-way"),
        ((14, 6), (3, 17), "mixed"),
        ((0, 20), (3, 0), "none"),
    ],
)
def test_swapped_sides_are_seen(left: tuple[int, int], right: tuple[int, int], finding: str) -> None:
    sides, kinds = Sides(), (("L", False, left[0]), ("L", True, left[1]), ("R", False, right[0]), ("R", True, right[1]))
    studies = [seen(n, side, where) for side, where, number in kinds for n in range(number)]
    assert list(sides.counted(studies)) == studies
    assert sides.finding == finding
    assert (sides.images, sides.agree) == (sum(left + right), left[0] + right[1])


def test_the_page_says_that_all_sides_look_swapped(tmp_path: Path) -> None:
    views = [seen(n, side, side == "L", 9) for n, side in enumerate("LR")]
    images = tuple(cv2.imencode(".jpg", np.full(views[0].views[0].size, 120, np.uint8))[1].tobytes() for _ in range(10))
    write_folder(tmp_path / "set", {"train": [Sample(study, images, ()) for study in views]}, per_shard=4)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    for flip in (True, False):
        manifest["settings"]["flip"] = flip
        (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
        text = quality_page([tmp_path / "set"], tmp_path / "q.html").read_text()
        assert ("All sides look swapped" in text, "In 0 of 20 images (0 %)" in " ".join(text.split())) == (flip, flip)
        assert text.count("<img") == 20


def test_problems_stand_on_the_page_under_the_name_of_the_set(sets: list[Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(sets[1], tmp_path / "one"))
    tar = damaged / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    folders = [sets[1], damaged]
    found = Page(quality_page(folders, tmp_path / "q.html", check_all(folders)).read_text())
    assert "2 problems" in found.sections["set-2"]["text"]
    assert "cut or overwritten" in found.sections["set-2"]["text"]
    assert "2 studies are also in one (train020, ...)" in found.sections["set-2"]["text"]
    assert "problem" not in found.sections["set-1"]["text"]
    assert "one (2)" in found.sections["set-2"]["text"]
    text = quality_page([sets[1]], tmp_path / "q.html", {sets[1]: []}, sample=7).read_text()
    assert "No problem found" in text
    assert "7 images of each shard were decoded." in text
    unread = tar.with_name("gone")
    tar.rename(unread)
    text = quality_page([damaged], tmp_path / "q.html").read_text()
    assert "A shard cannot be read" in text
    assert "The shards were not verified for this page" in text
    assert "<img" not in text


def test_a_set_that_cannot_be_read(page: Page) -> None:
    text = page.sections["set-3"]["text"]
    assert "The manifest cannot be read" in text
    assert "manifest.json: cannot be read" in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(path: Path, sets: list[Path], tmp_path: Path, width: int) -> None:
    dom, attributes = probe(path, tmp_path, width)
    documents = [json.loads((folder / "manifest.json").read_text()) for folder in sets[:2]]
    images = sum(document["images"] for document in documents)
    del attributes["cut"], attributes["scrolls"]  # wide tables scroll
    assert attributes == {"images": str(images), "broken": "0", "wide": "false", "requests": "0"}
    assert "<title>Quality of full, one, broken</title>" in dom
    document = documents[0]
    assert f'<b data-tile="images">{document["images"]}</b>' in dom
