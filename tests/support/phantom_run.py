"""A run on a few synthetic patients, from their DICOM files to a consolidated model, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mama.export.consolidate import consolidate
from mama.settings.schema import Config, EvalConfig, Tokens
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.sources.phantom.studies import write_archive
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of

SEED, PATIENTS = 927, 4  # by the hash two train, one in val, one in test; exams of one reason in train and test
TASKS = ["cancer", "birads", "density"]


def phantom_run(folder: Path, tokens: Tokens = "all") -> Config:
    """The archive in <folder>/dicom, its shards, and the run with model/; the key of hashes is <folder>/hash.key."""
    write_archive(folder / "dicom", PATIENTS, SEED, workers=1)
    packed = PackConfig(
        source="phantom",
        root=str(folder / "dicom"),
        out=str(folder / "shards"),
        options={"patients": PATIENTS, "seed": SEED},
        long_side=96,
        workers=1,
        key_file=str(folder / "hash.key"),
    )
    pack(packed)
    base = config_of(folder, "phantom")
    config = replace(
        base,
        data=replace(base.data, image_size=(64, 32), workers=0, max_tokens=200),
        vision=replace(base.vision, tokens=tokens),
        text=replace(base.text, config=base.text.config | {"n_positions": 256}),
        eval=EvalConfig(tasks=TASKS, batch=3, bootstrap=0, protocols=["zeroshot"]),
    )
    save_run(config)
    consolidate(config)
    return config


def dicom_files(config: Config) -> list[Path]:
    """The files of the archive, by patient and view."""
    return sorted((Path(config.runs).parent / "dicom").rglob("*.dcm"))
