"""Compare a manifest with what its build left in the folder: plan, records and `refused.jsonl`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from shards.errors import ShardError
from shards.files import LARGEST_JSON, read_plain
from shards.from_json import from_json, parse_json
from shards.pack.plan import PLAN, Plan, load_plan
from shards.pack.sample import Refusal
from shards.pack.shard_record import METHODS, manifest_of, records_of
from shards.read.manifest import BUILD, MANIFEST, REFUSED, Manifest

REPACK = "run the same `mama pack` again, which rewrites it"
# Fields of the manifest that no tar contains, so that only the records can confirm them.
FROM_RECORDS = (
    *("source", "settings", "versions"),
    *("listed", "images_refused", "images_excluded", "studies_dropped", "raw", "split_by"),
)


def build_problems(folder: Path, manifest: Manifest | None) -> list[str]:
    """Problems that are found without reading a shard. A folder that was copied without `build` has none."""
    try:
        plan = load_plan(folder / BUILD)
    except ShardError as error:
        return [str(error).removeprefix(f"{folder}{os.sep}")]
    except OSError as error:
        return [f"{BUILD}/{PLAN}: cannot be read: {error.strerror}"]
    listed = {shard.name for shard in manifest.shards} if manifest else set()
    planned = {shard.name for shard in plan.shards} if plan else set()
    problems = []
    if planned - listed:
        done = sum((folder / name).exists() for name in planned)
        written = f"{done} of {len(planned)} shards are written"
        problems.append(f"a build is unfinished, {written}; run the same `mama pack` again")
    foreign = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed | planned)
    if manifest is None:
        return problems
    problems += [f"{name}: not in the manifest; remove it" for name in foreign[:3]]
    problems += [f"{len(foreign) - 3} more tars are not in the manifest"] if len(foreign) > 3 else []
    if manifest.deidentification != METHODS:
        problems.append(f"{MANIFEST}: deidentification differs from what this release does; {REPACK}")
    if plan and planned == listed:
        problems += _against_records(folder, manifest, plan)
    if not any(problem.startswith(f"{MANIFEST}: images_") for problem in problems):
        problems += _against_refused(folder / REFUSED, manifest)
    return problems


def _against_records(folder: Path, manifest: Manifest, plan: Plan) -> list[str]:
    try:
        records = records_of(plan, folder / BUILD)
    except ShardError as error:
        return [str(error).removeprefix(f"{folder}{os.sep}")]
    except OSError as error:
        return [f"{BUILD}: its records cannot be read: {error.strerror}"]
    if len(records) < len(plan.shards):
        return []
    built = manifest_of(plan, records.values())
    differing = [name for name in FROM_RECORDS if getattr(built, name) != getattr(manifest, name)]
    return [f"{MANIFEST}: {name} differs from what the build recorded; {REPACK}" for name in differing]


def _against_refused(path: Path, manifest: Manifest) -> list[str]:
    """Compare the reasons in `refused.jsonl` only; its lines name files of the archive and are never quoted."""
    try:
        lines = read_plain(path, LARGEST_JSON).splitlines()
        reasons = Counter(from_json(Refusal, parse_json(line)).reason for line in lines)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [f"{REFUSED}: was edited or damaged; {REPACK}"]
    if reasons != Counter(manifest.images_refused) + Counter(manifest.images_excluded):
        return [f"{REFUSED}: its {reasons.total()} lines differ from the manifest's images left out; {REPACK}"]
    return []
