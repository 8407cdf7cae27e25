"""Implants on their way from table and header into the shards, and in builds of releases that did not record them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.check.check import check
from shards.pack.pack import make_plan, pack
from shards.pack.settings import PackConfig
from shards.read.reader import ShardReader
from shards.schema import Study
from tests.support.archives import breast, contents, write_dicom

COLUMNS = {"patient": "patient", "image": "image", "view": "view", "age": "age"}
# age, which tells the images apart in the shards -> (header, table, view, what is stored)
IMAGES: dict[int, tuple[str | None, str, str, bool | None]] = {
    40: ("YES", "", "CC", True),
    41: ("NO", "", "CC", False),
    42: (None, "", "CC", None),
    43: ("NO", "yes", "MLO", True),
    44: ("YES", "no", "CC", False),
    45: (None, "", "MLO-ID", True),
    46: (None, "0", "CC", False),
}


@pytest.fixture
def config(tmp_path: Path) -> PackConfig:
    """Without the column of implants."""
    root = tmp_path / "archive"
    for age, (header, _, view, _) in IMAGES.items():
        tags = {"BreastImplantPresent": header, "ViewPosition": view.removesuffix("-ID")}
        write_dicom(root / f"{age}.dcm", breast("L", seed=age), **tags)
    lines = [f"{100 - age},{age}.dcm,{view},{table},{age}" for age, (_, table, view, _) in IMAGES.items()]
    (root / "t.csv").write_text("\n".join(["patient,image,view,implant,age", *lines]) + "\n")
    options = {"file": "t.csv", "columns": COLUMNS}
    key, out = str(tmp_path / "key"), str(tmp_path / "out")
    return PackConfig("table", str(root), out, options, long_side=48, samples_per_shard=2, workers=1, key_file=key)


def with_column(config: PackConfig) -> PackConfig:
    return replace(config, options={**config.options, "columns": {**COLUMNS, "implant": "implant"}})


def implants(config: PackConfig) -> dict[int | None, bool | None]:
    """Age -> implant, of every stored image."""
    reader = ShardReader(Path(config.out))
    studies = [reader.study(number) for number in range(len(reader))]
    return {study.age: view.implant for study in studies for view in study.views}


def tars(config: PackConfig) -> dict[str, bytes]:
    return {name: data for name, data in contents(config.out).items() if name.endswith(".tar")}


def test_the_shards_say_of_each_image_what_table_or_header_say(config: PackConfig) -> None:
    manifest = pack(with_column(config))
    assert implants(config) == {age: implant for age, (_, _, _, implant) in IMAGES.items()}
    assert (manifest.images, manifest.conflicts) == (len(IMAGES), {"implant": 2})
    assert check(Path(config.out)) == []


def test_a_build_of_before_implants_were_recorded_goes_on_without(
    config: PackConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its bytes stay the same, its studies count as unchanged, and the log says how to have them."""
    caplog.set_level("INFO")
    make_plan(config)
    plan = Path(config.out) / "build" / "plan.json"
    document = json.loads(plan.read_text())
    del document["settings"]["implants"]
    plan.write_text(json.dumps(document))
    pack(config)
    before = tars(config)
    assert not any(b'"implant"' in data for data in before.values())
    assert set(implants(config).values()) == {None}
    name = sorted(before)[0]
    for path in (name, f"build/{Path(name).stem}.json", "manifest.json"):
        (Path(config.out) / path).unlink()
    caplog.clear()
    manifest = pack(with_column(config))
    assert tars(config) == before
    assert "implants" not in manifest.settings
    assert not manifest.conflicts
    assert not any("packed studies" in message for message in caplog.messages)
    assert [message.partition(" was ")[2] for message in caplog.messages if "record implants" in message] == [
        "started by a release that did not record implants, and still does not; another `out` will have them"
    ]
    assert check(Path(config.out)) == []
    pack(replace(with_column(config), out=config.out + "2"))
    assert implants(replace(config, out=config.out + "2")) == {age: told for age, (*_, told) in IMAGES.items()}


def test_a_study_of_an_earlier_release_is_read_and_what_is_unknown_is_not_written(config: PackConfig) -> None:
    pack(config)
    reader = ShardReader(Path(config.out))
    for study in map(reader.study, range(len(reader))):
        for known in (True, False, None):
            one = replace(study, views=tuple(replace(view, implant=known) for view in study.views))
            document: dict[str, Any] = json.loads(one.to_json())
            assert [view.get("implant", "lacking") for view in document["views"]] == [
                "lacking" if known is None else known for _ in study.views
            ]
            assert Study.from_json(one.to_json()) == one
