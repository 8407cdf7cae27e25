"""A synthetic screening cohort: DICOM mammograms of invented patients, with every fact known.

Written by this source, no download. Free of any licence but the project's.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ShardError
from shards.files import atomic_write
from shards.processes import start_single_threaded
from shards.progress import progress
from shards.schema import DENSITIES, LATERALITIES, Finding, Labels, SourceStudy, SourceView
from shards.sources.phantom.anatomy import SPACING
from shards.sources.phantom.dicom import TRANSFER_SYNTAXES, Exam, write_mammogram
from shards.sources.phantom.image import Breast, draw_breast
from shards.sources.phantom.lesion import Lesion

VERSION = 2  # of the cohort; increase it when images or facts change
FACTS_FILE = "cohort.json"

# Share of the breast that fibroglandular tissue covers, per BI-RADS density. The ACR gives no figures since its 5th
# edition; these lie about in the middle of the quartiles of the 4th.
GLANDULAR_SHARE = {"A": (0.02, 0.08), "B": (0.18, 0.30), "C": (0.42, 0.56), "D": (0.72, 0.86)}
DENSITY_SHARES = (0.2, 0.3, 0.3, 0.2)
# Shares of the patients, independent. Far more cancers than in screening, so that a few hundred patients suffice.
MALIGNANT_SHARE, BENIGN_SHARE = 0.80, 0.20
MONOCHROME1_SHARE = 0.25
REASONS = {"screening": 0.8, "diagnostic": 0.2}
RACES = {"White": 0.5, "Black or African American": 0.3, "Asian": 0.12, "Other": 0.08}
ETHNICITIES = {"Not Hispanic or Latino": 0.85, "Hispanic or Latino": 0.15}

Rng = np.random.Generator


def phantom(root: Path, patients: int = 400, seed: int = 0) -> Iterator[SourceStudy]:
    """Yield the studies of the cohort in `root`; draw and write it first if it is not there.

    Files. `<root>/<PatientID>/<side>_<view>.dcm`, and cohort.json with all facts. That is written last, and so marks
    the archive as complete. Patient `i` of a seed is the same for any number of patients and processes, because every
    random generator is keyed by (seed, i, ...).

    Labels. All labels and findings are known and match the images. Laterality and view are read from the DICOM headers.

    Nothing is refused. Raises `ShardError` if `root` holds a cohort of another number of patients, seed or version.
    """
    root = Path(root)
    wanted = {"version": VERSION, "patients": patients, "seed": seed}
    if not (root / FACTS_FILE).exists():
        write_archive(root, patients, seed)
    cohort = json.loads((root / FACTS_FILE).read_text())
    for name, value in wanted.items():
        if cohort.get(name) != value:
            raise ShardError(
                f"{root / FACTS_FILE}: {name} is {cohort.get(name)!r}, requested {value!r}; "
                "set another pack.root or remove this folder"
            )
    for study in cohort["studies"]:
        views = tuple(_view(root, view) for view in study["views"])
        yield SourceStudy(**{**study, "views": views})


def write_archive(root: Path, patients: int, seed: int, workers: int = 2) -> None:
    """Draw and write `patients` studies of four DICOM files each, in `workers` processes.

    Raises `ShardError` for fewer than 1 patient and a negative seed.
    """
    if patients < 1 or seed < 0:
        raise ShardError(f"phantom: patients={patients}, seed={seed}; patients must be positive, the seed not negative")
    root.mkdir(parents=True, exist_ok=True)
    write = partial(_write_patient, root, seed)
    if workers > 1:
        # spawn: the caller may hold threads (a tensor library, OpenCV), and those do not survive a fork
        with multiprocessing.get_context("spawn").Pool(workers, start_single_threaded) as pool:
            studies = list(progress(pool.imap(write, range(patients)), patients, "drawing phantoms", "patients"))
    else:
        studies = list(progress(map(write, range(patients)), patients, "drawing phantoms", "patients"))
    cohort = {"version": VERSION, "patients": patients, "seed": seed, "studies": studies}
    atomic_write(root / FACTS_FILE, (json.dumps(cohort, indent=1, sort_keys=True) + "\n").encode())


def _view(root: Path, document: dict[str, Any]) -> SourceView:
    findings = tuple(Finding(**{**f, "box": tuple(f["box"])}) for f in document["findings"])
    return SourceView(root / document["path"], labels=Labels(**document["labels"]), findings=findings)


def _write_patient(root: Path, seed: int, index: int) -> dict[str, Any]:
    """Write one patient's four files; return her study as JSON for cohort.json."""
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
    """Normal, benign or malignant, by side; a benign lesion beside a cancer is in the other breast."""
    first, second = rng.permutation(LATERALITIES)
    malignant, benign = rng.random() < MALIGNANT_SHARE, rng.random() < BENIGN_SHARE
    return {str(first): "malignant" if malignant else "normal", str(second): "benign" if benign else "normal"}


def _birads(pathology: str, rng: Rng) -> int:
    shares = {
        "malignant": {5: 0.70, 4: 0.25, 0: 0.05},
        "benign": {2: 0.6, 3: 0.4},
        "normal": {1: 0.85, 2: 0.15},
    }[pathology]
    return int(rng.choice(list(shares), p=list(shares.values())))


def _lesions(pathology: str, rng: Rng) -> tuple[Lesion, ...]:
    """Random lesions of a breast of this pathology, in BI-RADS terms, with sizes in mm."""
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
            shape, density = str(rng.choice(["round", "oval"])), str(rng.choice(["low", "equal"]))
            mass = Finding(1, "mass", shape=shape, margin="circumscribed", density=density, pathology=pathology)
            return (Lesion(mass, rng.uniform(8, 20)),)
        name = str(rng.choice(["coarse", "round"]))
        coarse = Finding(1, "calcification", calcification_type=name, distribution="grouped", pathology=pathology)
        return (Lesion(coarse, rng.uniform(10, 20)),)
    return ()
