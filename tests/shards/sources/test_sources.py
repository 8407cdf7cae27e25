from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards.errors import ShardError
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.read.reader import ShardReader
from shards.schema import Labels, SourceStudy, SourceView
from shards.sources.all_sources import SOURCES, resolve_root
from shards.sources.cdd_cesm import COLUMNS, TABLE, cdd_cesm
from tests.support.archives import write_png

# --- roots


def test_a_root_is_a_path_or_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_root(str(tmp_path)) == tmp_path
    assert resolve_root("~/archive") == Path.home() / "archive"
    (tmp_path / "archive_in_a_package").mkdir()
    (tmp_path / "archive_in_a_package" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert resolve_root("package:archive_in_a_package") == tmp_path / "archive_in_a_package"


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder", "json/decoder.py", "../x", ""])
def test_a_package_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ShardError, match="is not installed; run `pip install"):
        resolve_root(f"package:{name}")


@pytest.mark.parametrize("name", ["cbis_ddsm", "cdd_cesm"])
def test_a_missing_root_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .*nowhere") as caught:
        list(SOURCES[name](tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


# --- cdd_cesm


def row(image: str, density: str = "_", birads: str = "1", findings: str = "Normal", **more: str) -> dict[str, str]:
    patient, side, kind, view = image.strip().split("_")
    return {
        "Image_name": image,
        "Patient_ID": patient[1:],
        "Side": side,
        "Type": {"DM": "DM", "CM": "CESM"}[kind],
        "Age": "50",
        "Breast density (ACR)": density,
        "BIRADS": birads,
        "Findings": findings,
        "View": view,
        "Tags": "normal",
        "Machine": "1",
        "Pathology Classification/ Follow up": "Normal",
        **more,
    }


ROWS = [
    row("P2_L_DM_CC", density="B"),
    row("P2_L_CM_CC ", birads="3$2", findings="First finding $Second finding$"),  # a space behind the name
    row("P2_L_DM_MLO"),
    row("P2_L_CM_MLO"),  # density of the other view of the breast
    row("P2_L_CM_MLO"),  # twice
    row(
        "P2_R_CM_CC", birads="5", **{"Pathology Classification/ Follow up": "Malignant "}
    ),  # density of the other breast
    row("P10_R_CM_CC", density="C", birads="?", **{"Pathology Classification/ Follow up": "Benign"}),  # DM row wins
    row("P10_R_DM_CC", density="D"),
    row("P11_R_CM_CC"),  # no density anywhere
    row("P12_R_CM_CC"),  # no image
]


def write_cdd(root: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    root.mkdir(exist_ok=True)
    table = pd.DataFrame(rows)
    with pd.ExcelWriter(root / TABLE) as writer:
        table.head(1).to_excel(writer, sheet_name="asymmetry", index=False)  # the order of the sheets does not matter
        table.to_excel(writer, sheet_name="all", index=False)
    for name in ("P2_L_CM_CC", "P2_L_CM_MLO", "P2_R_CM_CC", "P10_R_CM_CC", "P11_R_CM_CC", "P99_L_CM_CC"):
        suffix = "jpg" if name.startswith("P10") else "png"  # the data set comes as JPEG
        write_png(root / "subtracted" / f"{name}.{suffix}", np.full((8, 8), 9, dtype=np.uint8))
    return root


def views_of(studies: list[SourceStudy]) -> dict[str, SourceView]:
    return {view.path.stem: view for study in studies for view in study.views}


def test_cdd_cesm_traps(tmp_path: Path) -> None:
    studies = list(cdd_cesm(write_cdd(tmp_path)))
    assert [study.patient_id for study in studies] == ["2", "10", "11"]
    assert {study.age for study in studies} == {50}
    views = views_of(studies)
    assert sorted(views) == ["P10_R_CM_CC", "P11_R_CM_CC", "P2_L_CM_CC", "P2_L_CM_MLO", "P2_R_CM_CC"]
    assert {name: view.labels.density for name, view in views.items()} == {
        "P2_L_CM_CC": "B",
        "P2_L_CM_MLO": "B",
        "P2_R_CM_CC": "B",
        "P10_R_CM_CC": "D",
        "P11_R_CM_CC": None,
    }
    first = views["P2_L_CM_CC"]
    assert (first.laterality, first.view, first.labels.birads) == ("L", "CC", 3)
    assert first.report == "First finding\nSecond finding"
    assert views["P2_R_CM_CC"].labels == Labels(5, "B", True, "malignant")
    assert views["P10_R_CM_CC"].labels == Labels(None, "D", False, "benign")


def test_cdd_cesm_tables_that_are_not_it_are_one_line(tmp_path: Path) -> None:
    root = write_cdd(tmp_path, [{k: v for k, v in r.items() if k != "BIRADS"} for r in ROWS])
    with pytest.raises(ShardError, match="no column 'BIRADS'"):
        list(cdd_cesm(root))
    (root / TABLE).write_bytes(b"not a zip")
    with pytest.raises(ShardError, match="cannot be read as a table") as caught:
        list(cdd_cesm(root))
    assert "\n" not in str(caught.value)
    assert len(COLUMNS) == 10


def test_the_real_cdd_cesm(cdd_cesm_root: Path) -> None:
    studies = list(cdd_cesm(cdd_cesm_root))
    views = views_of(studies)
    assert (len(studies), len(views)) == (326, 999)
    assert Counter(v.labels.pathology for v in views.values()) == {"normal": 413, "benign": 256, "malignant": 330}
    per_patient = Counter(path.name.split("_")[0] for path in (cdd_cesm_root / "subtracted").iterdir())
    assert {f"P{study.patient_id}": len(study.views) for study in studies} == per_patient
    assert all(v.report and "$" not in v.report and v.labels.birads for v in views.values())
    assert all(
        view.path.stem == f"P{s.patient_id}_{view.laterality}_CM_{view.view}" for s in studies for view in s.views
    )
    # The density of an image is that of the low-energy image beside it, wherever that has one.
    table = pd.read_excel(cdd_cesm_root / TABLE, sheet_name="all", dtype=str)
    for _, r in table[(table["Type"] == "DM") & (table["Breast density (ACR)"] != "_")].iterrows():
        view = views.get(r["Image_name"].strip().replace("_DM_", "_CM_"))
        assert view is None or view.labels.density == r["Breast density (ACR)"].strip()


def test_the_real_cdd_cesm_packs(cdd_cesm_root: Path, tmp_path: Path) -> None:
    config = PackConfig(
        root=str(tmp_path / "some"), out=str(tmp_path / "out"), key_file=str(tmp_path / "key"), workers=1
    )
    (tmp_path / "some" / "subtracted").mkdir(parents=True)
    (tmp_path / "some" / TABLE).symlink_to(cdd_cesm_root / TABLE)
    for path in sorted((cdd_cesm_root / "subtracted").glob("P10_*.png")):
        (tmp_path / "some" / "subtracted" / path.name).symlink_to(path)
    manifest = pack(replace(config, source="cdd_cesm", long_side=512))
    reader = ShardReader(tmp_path / "out")
    study = reader.study(0)
    assert (manifest.studies, manifest.images) == (1, len(study.views))
    assert [view.flipped for view in study.views] == [view.laterality == "R" for view in study.views]
    assert all(reader.image(0, n).shape == view.size for n, view in enumerate(study.views))
