"""`preprocessing.json`: how the pictures of the training images were made, so that another file's is made alike."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from mama.errors import ConfigError
from mama.export.preprocessing import PREPROCESSING, Preprocessing, read_preprocessing, write_preprocessing
from mama.settings.schema import Config, DataConfig
from shards.errors import ShardError
from shards.image.picture import PictureConfig
from shards.pack.build_settings import settings_of
from shards.pack.picture_settings import jpeg_quality, picture_config
from shards.pack.settings import PackConfig
from shards.read.manifest import load_manifest, save_manifest
from tests.support.cohort import write_shards

OTHER = PackConfig(
    source="table",
    root="/archive/of-jane/mammography",
    out="unused",
    options={"file": "/archive/of-jane/exams.csv", "columns": {"patient": "PatientNumber"}},
    long_side=300,
    codec="png",
    bits=16,
    quality=77,
    crop=False,
    flip=False,
    reduced_jpeg2000=False,
    tomosynthesis="slab",
    intent="both",
    raw="processed",
    key_file="/home/jane/secret.key",
)


def folder(path: Path, settings: dict[str, Any], patients: int = 3) -> str:
    write_shards(path, {"train": patients, "test": 1})
    save_manifest(replace(load_manifest(path), settings=settings, versions={"numpy": "1"}), path)
    return str(path)


def packed(config: PackConfig) -> dict[str, Any]:
    return settings_of(config, config.options, b"k" * 32) | {"split": "hash"}


def written(out: Path, *shards: str, **data: Any) -> Preprocessing:
    write_preprocessing(Config(data=DataConfig(shards=list(shards), **data)), out)
    return read_preprocessing(out)


def test_every_setting_of_packing_comes_back(tmp_path: Path) -> None:
    """None of the values is the default, so that one that is lost is seen."""
    own, default = asdict(picture_config(OTHER)), asdict(PictureConfig())
    assert not [name for name in default if own[name] == default[name]]
    made = written(tmp_path, folder(tmp_path / "a", packed(OTHER)), image_size=(64, 48), fit="stretch")
    assert (made.picture, made.quality, made.intent) == (picture_config(OTHER), None, "both")
    assert (made.canvas.size, made.canvas.fit, made.range) == ((64, 48), "stretch", (-1, 1))
    jpeg = replace(OTHER, codec="jpeg", bits=8)
    assert written(tmp_path, folder(tmp_path / "b", packed(jpeg))).quality == jpeg_quality(jpeg) == 77


def test_nothing_of_the_archive_is_named(tmp_path: Path) -> None:
    settings = packed(OTHER)
    made = written(tmp_path, folder(tmp_path / "shards", settings))
    text = (tmp_path / PREPROCESSING).read_text()
    for secret in ("jane", "/", "PatientNumber", "key", settings["root"], settings["key_file"]):
        assert secret not in text
    (source,) = made.sources
    assert (source.name, source.source, source.patients, source.studies, source.images) == (
        "shards",
        "invented",
        3,
        3,
        6,
    )
    assert made.versions == {"numpy": "1"}


def test_the_folder_with_most_training_studies_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = folder(tmp_path / "few", packed(OTHER), patients=2)
    many = folder(tmp_path / "many", packed(replace(OTHER, long_side=200, crop=True)), patients=3)
    made = written(tmp_path, few, many)
    assert (made.picture.long_side, made.picture.crop) == (200, True)
    assert [(one.name, one.studies, one.settings["long_side"]) for one in made.sources] == [
        ("few", 2, 300),
        ("many", 3, 200),
    ]
    assert "few: was packed with pack.long_side=300, not 200, pack.crop=False, not True as many is" in caplog.text
    caplog.clear()
    equal = folder(tmp_path / "equal", packed(OTHER), patients=3)
    assert written(tmp_path, equal, many).picture.long_side == 300, "the first of equal ones"


def test_an_earlier_release_recorded_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = packed(OTHER)
    for name in ("intent", "raw"):
        del settings[name]
    made = written(tmp_path, folder(tmp_path / "a", settings))
    assert (made.intent, made.picture.process_raw, made.sources[0].assumed) == ("both", False, ())
    assert not caplog.records
    made = written(tmp_path, folder(tmp_path / "b", {"source": "x"}))
    assert made.picture == PictureConfig()
    assert "long_side" in made.sources[0].assumed
    assert "b: its manifest does not say long_side, codec, " in caplog.text


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    shards = folder(tmp_path / "a", packed(OTHER) | {"tomosynthesis": "all"})
    with pytest.raises(
        ShardError, match=r"^a: .*settings were edited .*tomosynthesis: 'all' is not one of refuse, slab"
    ):
        written(tmp_path, shards)


def test_shards_at_an_address(tmp_path: Path) -> None:
    """The address, which may hold a password, is not named."""
    folder(tmp_path / "shards", packed(OTHER))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/shards?token=s3cret"
        made = written(tmp_path, url.partition("?")[0], cache=str(tmp_path / "cache"))
        server.shutdown()
    assert made.sources[0].name == "shards"
    assert made.picture == picture_config(OTHER)
    assert "127.0.0.1" not in (tmp_path / PREPROCESSING).read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("canvas"), "canvas: is missing"),
        (lambda d: d["picture"].update(bits=12), "picture.bits: 12 is not one of 8, 16"),
        (lambda d: d["canvas"].update(fit="crop"), "canvas.fit: 'crop' is not one of letterbox, stretch"),
        (lambda d: d["canvas"].update(size=[0, 5]), "are not 1 pixel at least"),
        (lambda d: d.update(quality=0), "quality: 0 is not in 1..100"),
        (lambda d: d.update(sources=[]), "sources: names no folder"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, change: Any, reason: str) -> None:
    written(tmp_path, folder(tmp_path / "a", packed(OTHER)))
    document = json.loads((tmp_path / PREPROCESSING).read_text())
    change(document)
    (tmp_path / PREPROCESSING).write_text(json.dumps(document))
    with pytest.raises(ConfigError) as error:
        read_preprocessing(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / PREPROCESSING}: is damaged (")
    assert reason in str(error.value)
    assert str(error.value).endswith("; run `mama consolidate` again")


def test_a_missing_file_is_of_an_earlier_release(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is missing, as an earlier release wrote the model; run `mama consolidate` ag"
    ):
        read_preprocessing(tmp_path)
    (tmp_path / PREPROCESSING).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        read_preprocessing(tmp_path)


def test_all_fields_are_read() -> None:
    """A field that packing gains is one that the file has to have."""
    assert {field.name for field in fields(PictureConfig)} == set(asdict(picture_config(PackConfig())))
