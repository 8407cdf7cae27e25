"""A synthetic screening cohort: DICOM mammograms of patients that never were, with every fact known.

Patient `i` of a seed is the same whatever the number of patients or of processes: all random choices
come from generators keyed by (seed, i, ...). The archive is `<root>/<PatientID>/<side>_<view>.dcm` and
`<root>/cohort.json`, which holds the facts and, being written last, also says that the archive is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.processes import start_single
from shards.progress import progress
from shards.schema import DENSITIES, LATERALITIES, Finding, Labels, ShardError, SourceStudy, SourceView
from shards.sources.phantom.dicom import TRANSFER_SYNTAXES, Exam, write_mammogram
from shards.sources.phantom.image import GLANDULAR_SHARE, SPACING, Breast, draw_breast
from shards.sources.phantom.lesion import Lesion

VERSION = 2  # of the pictures and facts: another number, another cohort
FACTS_FILE = "cohort.json"

DENSITY_SHARES = (0.2, 0.3, 0.3, 0.2)
# Of the patients, independently. Far more cancers than in screening: a few hundred patients must show enough of them.
MALIGNANT_SHARE, BENIGN_SHARE = 0.80, 0.20
MONOCHROME1_SHARE = 0.25
REASONS = {"screening": 0.8, "diagnostic": 0.2}
RACES = {"White": 0.5, "Black or African American": 0.3, "Asian": 0.12, "Other": 0.08}
ETHNICITIES = {"Not Hispanic or Latino": 0.85, "Hispanic or Latino": 0.15}

Rng = np.random.Generator


def phantom(root: Path, patients: int = 400, seed: int = 0) -> Iterator[SourceStudy]:
    """Yields the studies of the cohort under `root`, after writing it there if it is not there yet.

    Laterality and view are left to the DICOM headers. Raises `ShardError` if `root` holds a cohort made
    with another number of patients, another seed or another version of this source.
    """
    root = Path(root)
    wanted = {"version": VERSION, "patients": patients, "seed": seed}
    if not (root / FACTS_FILE).exists():
        write_archive(root, patients, seed)
    cohort = json.loads((root / FACTS_FILE).read_text())
    for name, value in wanted.items():
        if cohort.get(name) != value:
            raise ShardError(
                f"{root / FACTS_FILE}: {name} is {cohort.get(name)!r}, asked for {value!r}; "
                "give another root or remove this one"
            )
    for study in cohort["studies"]:
        views = tuple(_view(root, view) for view in study["views"])
        yield SourceStudy(**{**study, "views": views})


def write_archive(root: Path, patients: int, seed: int, workers: int = 2) -> None:
    """Draws and writes `patients` studies of four DICOM files each, in `workers` processes."""
    if patients < 1 or seed < 0:
        raise ShardError(
            f"phantom: patients={patients}, seed={seed}; patients must be at least 1 and the seed not negative"
        )
    root.mkdir(parents=True, exist_ok=True)
    write = partial(_write_patient, root, seed)
    if workers > 1:
        # spawn: the caller may hold threads (a tensor library, OpenCV), and those do not survive a fork
        with multiprocessing.get_context("spawn").Pool(workers, start_single) as pool:
            studies = list(progress(pool.imap(write, range(patients)), patients, "drawing phantoms", "patients"))
    else:
        studies = list(progress(map(write, range(patients)), patients, "drawing phantoms", "patients"))
    cohort = {"version": VERSION, "patients": patients, "seed": seed, "studies": studies}
    aside = root / f"{FACTS_FILE}.part"
    aside.write_text(json.dumps(cohort, indent=1, sort_keys=True) + "\n")
    os.replace(aside, root / FACTS_FILE)


def _view(root: Path, document: dict[str, Any]) -> SourceView:
    findings = tuple(Finding(**{**f, "box": tuple(f["box"])}) for f in document["findings"])
    return SourceView(root / document["path"], labels=Labels(**document["labels"]), findings=findings)


def _write_patient(root: Path, seed: int, index: int) -> dict[str, Any]:
    """Writes one patient's four files; returns her study as it stands in the facts file."""
    rng = np.random.default_rng([seed, index])
    patient = f"PHANTOM-{seed}-{index:05d}"
    density = str(rng.choice(DENSITIES, p=DENSITY_SHARES))
    age = int(np.clip(rng.normal(60 - 3 * DENSITIES.index(density), 9), 35, 89))
    syntax = TRANSFER_SYNTAXES[rng.integers(len(TRANSFER_SYNTAXES))]
    exam = Exam(patient, f"{patient}-1", age, bool(rng.random() < MONOCHROME1_SHARE), syntax)
    facts = {"race": _choose(RACES, rng), "ethnicity": _choose(ETHNICITIES, rng), "reason": _choose(REASONS, rng)}
    share, depth = rng.uniform(*GLANDULAR_SHARE[density]), float(np.clip(rng.normal(98, 15), 72, 128))
    (root / patient).mkdir(exist_ok=True)
    views = []
    pathologies = _pathologies(rng)
    for side, laterality in enumerate(LATERALITIES):
        pathology = pathologies[laterality]
        labels = Labels(_birads(pathology, rng), density, pathology == "malignant", pathology)
        breast = Breast(laterality, share, depth + rng.normal(0, 2), _lesions(pathology, rng))
        for view, picture in draw_breast(breast, (seed, index, side)).items():
            path = Path(patient, f"{laterality}_{view}.dcm")
            write_mammogram(root / path, picture.pixels, SPACING, laterality, view, exam)
            findings = [asdict(finding) for finding in picture.findings]
            views.append({"path": path.as_posix(), "labels": asdict(labels), "findings": findings})
    return {"patient_id": patient, "study_id": exam.study, "age": age, **facts, "views": views}


def _choose(shares: dict[str, float], rng: Rng) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _pathologies(rng: Rng) -> dict[str, str]:
    """Of each breast: normal, benign or malignant; a benign lesion beside a cancer is in the other breast."""
    first, second = rng.permutation(LATERALITIES)
    malignant, benign = rng.random() < MALIGNANT_SHARE, rng.random() < BENIGN_SHARE
    found = {str(first): "normal", str(second): "normal"}
    if malignant:
        found[str(first)] = "malignant"
    if benign:
        found[str(second)] = "benign"
    return found


def _birads(pathology: str, rng: Rng) -> int:
    shares = {
        "malignant": {5: 0.70, 4: 0.25, 0: 0.05},
        "benign": {2: 0.6, 3: 0.4},
        "normal": {1: 0.85, 2: 0.15},
    }[pathology]
    return int(rng.choice(list(shares), p=list(shares.values())))


def _lesions(pathology: str, rng: Rng) -> tuple[Lesion, ...]:
    """What a breast of this pathology shows, in BI-RADS words; sizes in mm."""
    kind = rng.random()
    if pathology == "malignant":
        margin = "spiculated" if rng.random() < 0.8 else "indistinct"
        mass = Finding(1, "mass", shape="irregular", margin=margin, density="high", pathology=pathology)
        fine = {"fine pleomorphic": "grouped", "fine linear or fine linear branching": "linear"}
        name = "fine pleomorphic" if rng.random() < 0.7 else "fine linear or fine linear branching"
        specks = Finding(1, "calcification", calcification_type=name, distribution=fine[name], pathology=pathology)
        size = rng.uniform(15, 28)
        if kind < 0.10:
            return (Lesion(specks, rng.uniform(12, 20)),)
        if kind < 0.40:
            return (Lesion(mass, size), Lesion(replace(specks, number=2), rng.uniform(0.6, 1.0) * size))
        return (Lesion(mass, size),)
    if pathology == "benign":
        if kind < 0.65:
            shape, density = rng.choice(["round", "oval"]), rng.choice(["low", "equal"])
            mass = Finding(
                1, "mass", shape=str(shape), margin="circumscribed", density=str(density), pathology=pathology
            )
            return (Lesion(mass, rng.uniform(8, 20)),)
        name = str(rng.choice(["coarse", "round"]))
        coarse = Finding(1, "calcification", calcification_type=name, distribution="grouped", pathology=pathology)
        return (Lesion(coarse, rng.uniform(10, 20)),)
    return ()
