"""The split of each patient: the archive's own, that of a column or a file of the user's, else the hash of the patient.

1. The rows of a table state it in words (`WORDS`; `pack.split_values` adds to them).
2. A patient in two splits is an error. Only in CBIS-DDSM's own split, which divided masses and calcifications apart,
   `test` wins, so that no image is lost and no patient of the test set is trained on.
3. A patient without a split is an error in a column or file of the user's. In the archive's own split such patients
   count as training, so that the official test set stays what it is.
4. If the archive's own split has no `val`, it is the part of its training set that the hash puts into `val`. A column
   or a file of the user's is taken at its word.

Nobody asks for a split of patients without an image that could be stored.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.pack.identity import patient_key, split_of
from shards.pack.plan import Plan
from shards.pack.settings import PackConfig
from shards.pack.shard_record import Record
from shards.schema import SPLITS, SourceStudy
from shards.sources.all_sources import OFFICIAL_SPLITS
from shards.sources.stated_splits import Stated, by_patient, in_column, in_file, is_file
from shards.sources.table.cell_words import plain

log = logging.getLogger(__name__)

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development", "tune", "tuning"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "hold-out", "held-out"), "test"),
}
TEST_WINS = frozenset({"cbis_ddsm"})  # sources whose own split has patients on both sides
COLUMN = "split"  # of a user's table; used where there is one
OTHER = "or give pack.split=hash"


@dataclass(frozen=True)
class Splits:
    """The splits of the patients of an archive, by its identifiers; none where the hash decides.

    `moved`: key of `schema.SPLIT_MOVES` -> keyed hashes of the patients whose split is not the one that was stated.
    """

    how: str  # official | column | file | hash
    of_patient: Mapping[str, str] = field(default_factory=dict)
    moved: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def given_to(self, studies: Mapping[str, SourceStudy]) -> Mapping[str, SourceStudy]:
        """The studies with the split of their patient; None where the hash decides."""
        if self.how == "hash":
            return studies
        return {name: replace(study, split=self.of_patient.get(study.patient_id)) for name, study in studies.items()}


def check_meanings(values: Mapping[str, Any]) -> None:
    """Raise `ShardError` for a value of `pack.split_values` that names no split."""
    for cell, meant in values.items():
        if plain(str(meant)) not in WORDS:
            raise ShardError(f"pack.split_values.{cell}: {meant!r} is not one of {', '.join(SPLITS)}")


def find_splits(
    config: PackConfig, root: Path, options: Mapping[str, Any], studies: Mapping[str, SourceStudy], key: bytes
) -> Splits:
    """Read and decide the splits of the patients in `studies`. Raises `ShardError` that starts with `pack.split`."""
    try:
        how, rows = _stated(config, root, options)
    except ShardError as error:
        raise ShardError(f"pack.split: {error}") from None
    if how == "hash":
        if config.split_values:
            raise ShardError("pack.split_values: the hash decides the split; name a column or a file in pack.split")
        return Splits(how)
    found = by_patient(rows, _meanings(rows, config.split_values))
    patients = {s.patient_id for s in studies.values() if s.patient_id and any(not view.refused for view in s.views)}
    if how == "file" and (more := len(found.keys() - patients)):
        log.info("pack.split: %d patients of %s have no image in the archive", more, config.split)
    divided = {patient for patient, splits in found.items() if len(splits) > 1}
    unnamed = patients - found.keys()

    def some(of: Collection[str]) -> str:
        return f"{len(of)} patients, such as {patient_key(key, config.source, min(of))},"

    if divided and not (how == "official" and config.source in TEST_WINS):
        twice = " and ".join(f"{split} in {where}" for split, where in found[min(divided)].items())
        raise ShardError(f"pack.split: {some(divided)} are in two splits ({twice}); keep one for each, {OTHER}")
    if unnamed and how != "official":
        what = f"have no split in the {how} {config.split or COLUMN}"
        raise ShardError(f"pack.split: {some(unnamed)} {what}; add them, {OTHER}")
    decided = {patient: "test" if patient in divided else next(iter(splits)) for patient, splits in found.items()}
    decided |= dict.fromkeys(unnamed, "train")
    to_val = _val_of_train(config.source, decided) if how == "official" else set()
    moved = {"divided": divided, "unnamed": unnamed, "val": to_val}
    hashes = {why: tuple(sorted(patient_key(key, config.source, one) for one in of)) for why, of in moved.items() if of}
    return Splits(how, decided | dict.fromkeys(to_val, "val"), hashes)


def _val_of_train(source: str, decided: Mapping[str, str]) -> set[str]:
    """The patients of `train` who become `val`, if there are no others."""
    if "val" in decided.values():
        return set()
    return {one for one, split in decided.items() if split == "train" and split_of(source, one) == "val"}


def _stated(config: PackConfig, root: Path, options: Mapping[str, Any]) -> tuple[str, list[Stated]]:
    """How the split is decided, and the rows that state it."""
    wanted, source = config.split, config.source
    if wanted == "hash":
        return wanted, []
    if wanted in (None, "official"):
        if rows := OFFICIAL_SPLITS[source](root) if source in OFFICIAL_SPLITS else []:
            return "official", rows
        if wanted:
            tables = f", or its tables are not in {root}" if source in OFFICIAL_SPLITS else ""
            raise ShardError(f"source {source!r} has no official split{tables}; name a file, or give pack.split=hash")
        rows = _in_table(root, options, COLUMN, optional=True) if source == "table" else []
        return ("column", rows) if rows else ("hash", [])
    if is_file(wanted):
        return "file", in_file(Path(os.path.expanduser(wanted)))
    if source == "table":
        return "column", _in_table(root, options, wanted)
    raise ShardError(f"{wanted!r} is neither official, hash nor a file such as folds.csv; {source!r} has no columns")


def _in_table(root: Path, options: Mapping[str, Any], column: str, optional: bool = False) -> list[Stated]:
    patient = str(options["columns"]["patient"]).strip()
    return in_column(root / options["file"], patient, column, optional, options["separator"])


def _meanings(rows: Iterable[Stated], values: Mapping[str, Any]) -> dict[str, str]:
    """Word -> split. Raises `ShardError` for a word that means none."""
    own = {plain(str(cell)): WORDS[plain(str(meant))] for cell, meant in values.items()}
    meanings: dict[str, str] = {}
    for row in rows:
        split = own.get(plain(row.word)) or WORDS.get(plain(row.word))
        if split is None:
            fix = f"is not one of {', '.join(SPLITS)}: say what it is in pack.split_values, {OTHER}"
            raise ShardError(f"pack.split: {row.word[:40]!r} in {row.where} {fix}")
        meanings[row.word] = split
    return meanings


def check_unmoved(plan: Plan, records: Mapping[str, Record], studies: Mapping[str, SourceStudy], out: Path) -> None:
    """Raise `ShardError` if a patient with packed or planned images is in another split than when they were planned."""
    moved = {
        studies[key].patient_id: f"study {key} is in {shard.split}, now in {studies[key].split}"
        for shard in plan.shards
        for key in (records[shard.name].shard.keys if shard.name in records else (key for key, _ in shard.studies))
        if key in studies and studies[key].split not in (None, shard.split)
    }
    if moved:
        example = min(moved.values())
        raise ShardError(
            f"pack.split: {len(moved)} patients have another split than {out} was packed with ({example}); set the "
            "table or pack.split_values back, or give another `out`"
        )
