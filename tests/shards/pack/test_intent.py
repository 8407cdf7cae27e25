"""Raw (FOR PROCESSING) images beside the presentation images of the same view: which of them a build keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForProcessing,
)

from shards.check.check import check
from shards.errors import ShardError
from shards.image.header import find_intent
from shards.image.picture import PictureConfig
from shards.pack.pack import make_plan, pack
from shards.pack.sample import Sample, SampleConfig, build_sample
from shards.pack.settings import PackConfig
from shards.read.manifest import load_manifest
from shards.schema import EXCLUDED, SourceStudy, SourceView
from shards.sources.all_sources import SOURCES
from tests.support.archives import breast, contents, mg_header, write_dicom, write_png

RAW: dict[str, Any] = {"PresentationIntentType": "FOR PROCESSING"}
SHOWN: dict[str, Any] = {"PresentationIntentType": "FOR PRESENTATION"}
RAW_CLASS: dict[str, Any] = {"SOPClassUID": DigitalMammographyXRayImageStorageForProcessing}
OTHER = "other-intent"


@pytest.mark.parametrize(
    ("tags", "intent"),
    [
        (RAW, "FOR PROCESSING"),
        ({"PresentationIntentType": "for processing "}, "FOR PROCESSING"),
        (RAW_CLASS, "FOR PROCESSING"),
        ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, "FOR PROCESSING"),
        ({**RAW_CLASS, **SHOWN}, "FOR PRESENTATION"),  # the tag is of the image, the class of its kind
        ({**RAW_CLASS, "ImageType": ["DERIVED", "PRIMARY"]}, "FOR PROCESSING"),
        ({"ImageType": ["ORIGINAL", "PRIMARY"]}, None),
        ({"SOPClassUID": BreastTomosynthesisImageStorage}, None),
    ],
)
def test_a_raw_image_is_known_by_its_tag_or_its_class(tags: dict[str, Any], intent: str | None) -> None:
    assert find_intent(mg_header(**tags)) == intent


def sample_of(root: Path, views: list[SourceView], intent: Any, slab: bool = False) -> Sample:
    config = SampleConfig("test", root, b"k" * 32, PictureConfig(long_side=32, slab=slab), None, intent)
    return build_sample(config, SourceStudy("1", "1", tuple(views)))


def view(root: Path, name: str, **tags: Any) -> SourceView:
    return SourceView(write_dicom(root / f"{name}.dcm", breast("L"), **tags))


def kept(root: Path, views: list[SourceView], intent: Any, slab: bool = False) -> tuple[list[str], dict[str, str]]:
    """The intents that are stored, and the files that are left out with their reason; members are numbered anew."""
    sample = sample_of(root, views, intent, slab)
    assert [stored.member for stored in sample.study.views] == [f"{n}.png" for n in range(len(sample.images))]
    intents = [stored.presentation_intent or "unknown" for stored in sample.study.views]
    return intents, {Path(refusal.file).stem: refusal.reason for refusal in sample.refusals}


def test_a_view_keeps_one_intent_whatever_the_order_of_its_files(tmp_path: Path) -> None:
    views = [view(tmp_path, "raw", **RAW), view(tmp_path, "shown", **SHOWN), view(tmp_path, "class", **RAW_CLASS)]
    alone = view(tmp_path, "alone", ViewPosition="MLO", **RAW)
    for order in permutations(views):
        stored, left = kept(tmp_path, [alone, *order], "presentation")
        assert sorted(stored) == ["FOR PRESENTATION", "FOR PROCESSING"]
        assert left == {"raw": OTHER, "class": OTHER}
        stored, left = kept(tmp_path, [*order, alone], "processing")
        assert (stored, left) == (["FOR PROCESSING"] * 3, {"shown": OTHER})
    assert kept(tmp_path, [*views, alone], "both")[1] == {}
    assert OTHER in EXCLUDED


def test_what_counts_as_the_presentation_of_a_view(tmp_path: Path) -> None:
    raw = view(tmp_path, "raw", **RAW)
    picture = SourceView(write_png(tmp_path / "shown.png", breast("L")), "L", "CC")
    cases: dict[str, tuple[list[SourceView], dict[str, str]]] = {
        "nothing says that it is raw": ([raw, view(tmp_path, "unknown")], {"raw": OTHER}),
        "no DICOM file": ([raw, picture], {"raw": OTHER}),
        "by the table": ([raw, replace(view(tmp_path, "told", ViewPosition="ML", **SHOWN), view="CC")], {"raw": OTHER}),
        "other breast": ([raw, view(tmp_path, "right", ImageLaterality="R", **SHOWN)], {}),
        "synthetic": ([raw, view(tmp_path, "2d", SeriesDescription="L CC C-View", **SHOWN)], {"2d": "2d-synthetic"}),
        "spot": ([raw, view(tmp_path, "spot", ViewPosition="CC S", **SHOWN)], {"spot": "spot"}),
        "only raw": ([raw, view(tmp_path, "raw2", **RAW)], {}),
    }
    found = {name: kept(tmp_path, views, "presentation")[1] for name, (views, _) in cases.items()}
    assert found == {name: left for name, (_, left) in cases.items()}
    volume = breast("L")[None].repeat(3, axis=0)
    slab = write_dicom(tmp_path / "slab.dcm", volume, SOPClassUID=BreastTomosynthesisImageStorage, **SHOWN)
    assert kept(tmp_path, [raw, SourceView(slab)], "presentation", slab=True) == (
        ["FOR PROCESSING", "FOR PRESENTATION"],
        {},
    )


def test_only_an_image_that_can_be_stored_stands_in_for_another(tmp_path: Path) -> None:
    raw, shown = view(tmp_path, "raw", SOPInstanceUID="1.2", **RAW), view(tmp_path, "shown", **SHOWN)
    twice = view(tmp_path, "twice", SOPInstanceUID="1.2", **RAW)
    assert kept(tmp_path, [raw, twice, shown], "presentation")[1] == {"raw": OTHER, "twice": "duplicate"}
    shown.path.write_bytes(shown.path.read_bytes()[:2000])
    assert kept(tmp_path, [raw, shown], "presentation") == (["FOR PROCESSING"], {"shown": "unreadable"})


# --- builds


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """Three patients with an L CC of both intents, and one with a raw image only."""

    def pairs(root: Path) -> Iterator[SourceStudy]:
        for number in range(4):
            named = {"raw": RAW, "shown": SHOWN} if number else {"raw": RAW}
            views = [SourceView(root / f"{number}-{name}.dcm") for name in named]
            for of, tags in zip(views, named.values(), strict=True):
                if not of.path.exists():
                    write_dicom(of.path, breast("L", seed=number), **tags)
            yield SourceStudy(str(number), str(number), tuple(views))

    monkeypatch.setitem(SOURCES, "pairs", pairs)
    folder = str(tmp_path / "archive")
    key = str(tmp_path / "key")
    return PackConfig(
        "pairs", folder, str(tmp_path / "out"), long_side=48, workers=1, key_file=key, samples_per_shard=1
    )


def test_a_build_counts_what_it_leaves_out_and_what_is_raw(
    config: PackConfig, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = pack(replace(config, max_refused=0.0))
    assert (manifest.images, manifest.images_excluded, manifest.images_refused) == (4, {OTHER: 3}, {})
    assert (manifest.raw, manifest.settings["intent"], manifest.settings["raw"]) == (1, "presentation", "stored")
    raw = "images are raw (FOR PROCESSING), stored"
    assert f"1 {raw} unprocessed; pack.raw=processed, in another `out`, renders them" in caplog.messages
    assert check(Path(config.out)) == []
    processed = pack(replace(config, out=config.out + "2", intent="processing", raw="processed"))
    assert (processed.raw, processed.images_excluded) == (4, {OTHER: 3})
    assert f"4 {raw} rendered" in caplog.messages
    path = Path(config.out) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "raw": 2}))
    (Path(config.out) / "build" / "plan.json").unlink()
    assert check(Path(config.out)) == [
        "manifest.json: its number of raw images differs from the shards; run the same `mama pack` again, which "
        "rewrites it"
    ]


def test_a_build_of_before_there_was_a_choice_goes_on_as_it_was_begun(config: PackConfig) -> None:
    """Its plan names neither setting: it meant to keep both as they are, and its shards must not say otherwise."""
    whole = replace(config, out=config.out + "-whole", intent="both")
    assert pack(whole).images == 7
    make_plan(replace(config, intent="both"))
    out = Path(config.out)
    plan = json.loads((out / "build" / "plan.json").read_text())
    assert {plan["settings"].pop(name) for name in ("intent", "raw")} == {"both", "stored"}
    (out / "build" / "plan.json").write_text(json.dumps(plan))
    for change in ({"intent": "processing"}, {"raw": "processed"}):
        with pytest.raises(
            ShardError, match=f"^pack.{next(iter(change))}: .* was packed with '(both|stored)', now it is 'proc"
        ):
            pack(replace(config, **change))  # type: ignore[arg-type]
    pack(config)
    assert {n: d for n, d in contents(config.out).items() if n.endswith(".tar")} == {
        n: d for n, d in contents(whole.out).items() if n.endswith(".tar")
    }
    assert not {"intent", "raw"} & load_manifest(out).settings.keys()
    for path in (out / "manifest.json", *(out / "build").glob("*-*.json")):  # nor were raw images counted
        document = json.loads(path.read_text())
        del document["raw"]
        path.write_text(json.dumps(document))
    assert pack(config) == load_manifest(out)
    assert check(out) == []


def test_another_choice_is_another_build(config: PackConfig) -> None:
    make_plan(config)
    with pytest.raises(
        ShardError, match=r"pack.intent: .* was packed with 'presentation', now it is 'both'; set it back, or give ano"
    ):
        make_plan(replace(config, intent="both"))
