"""Splits of the archive or of the user: who is where, what is refused, and that no build changes under its owner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.check.check import check
from shards.check.quality import quality_page
from shards.errors import ShardError
from shards.pack import splits
from shards.pack.build import Build, open_build
from shards.pack.identity import split_of
from shards.pack.pack import make_plan, pack, pack_part
from shards.pack.settings import PackConfig
from shards.read.manifest import SplitBy, load_manifest
from shards.read.reader import ShardReader
from shards.schema import SPLITS, SourceStudy, SourceView
from shards.sources.all_sources import OFFICIAL_SPLITS, SOURCES
from shards.sources.stated_splits import Stated, in_file
from tests.support import cbis_ddsm_archive, vindr_archive
from tests.support.archives import NUMBER, contents, tiny_source

SIX = ["7", "8", "009", "10", "11", "12"]


@pytest.fixture
def config(tmp_path: Path) -> PackConfig:
    """A table of six patients, with no files: plans are made of it, and nothing is packed."""
    options = {"file": "exams.csv", "columns": {"patient": "Patient", "image": "Image"}}
    config = PackConfig("table", str(tmp_path), str(tmp_path / "out"), options, max_refused=1.0)
    return replace(config, key_file=str(tmp_path / "hash.key"))


def exams(config: PackConfig, *, more: str = "", **columns: str) -> None:
    """Write the table; a column has a word for each of the six."""
    rows = [["Patient", "Image", *columns]]
    rows += [[who, f"{who}.png", *(column.split()[n] for column in columns.values())] for n, who in enumerate(SIX)]
    (Path(config.root) / "exams.csv").write_text("\n".join(map(",".join, rows)) + "\n" + more)


def patients_file(config: PackConfig, text: str, name: str = "folds.csv") -> PackConfig:
    path = Path(config.root) / name
    path.write_text("\n".join(text.split()) + "\n")
    return replace(config, split=str(path))


def opened(config: PackConfig) -> Build:
    """The build with its plan, for which `mama pack` makes the folder when it locks it."""
    (Path(config.out) / "build").mkdir(parents=True, exist_ok=True)
    return open_build(config)


def planned(config: PackConfig) -> dict[str, str]:
    """Patient -> split in the plan."""
    return splits_of(opened(config))


def splits_of(build: Build) -> dict[str, str]:
    return {build.studies[key].patient_id: shard.split for shard in build.plan.shards for key, _ in shard.studies}


def six(words: str) -> dict[str, str]:
    return dict(zip(SIX, words.split(), strict=True))


def by_hash(source: str, patients: list[str]) -> dict[str, str]:
    return {patient: split_of(source, patient) for patient in patients}


def test_a_file_of_patients_decides_in_any_spelling(config: PackConfig) -> None:
    """12.0 is patient 12 and 9 is not 009; rows of a patient may repeat; the order does not matter."""
    exams(config)
    text = "patient,split 12.0,TRAINING 12,train 11,Val 10,dev 009,Test 8,held-out 7,validation 9,train 99,train"
    assert planned(patients_file(config, text)) == six("val test test val val train")


def test_a_file_is_taken_at_its_word(vindr: PackConfig) -> None:
    """No `val` is taken from its training patients; cells of a file with semicolons are no numbers."""
    text = "patient;split;score 1,5;train;0,5 " + " ".join(f"e{n};train;" for n in range(60))
    config = patients_file(vindr, text)
    assert set(planned(config).values()) == {"train"}
    assert in_file(Path(str(config.split)))[0] == Stated("1,5", "train", "row 2 of folds.csv")


def test_a_table_of_folds_serves_as_it_is(config: PackConfig) -> None:
    """One row an image, with patient_id and fold; a data frame has made numbers of both."""
    exams(config)
    text = "image,patient_id,fold a,7,0.0 b,7,0.0 c,8,1 d,009,2 e,10,3 f,11,0 g,12,1"
    config = patients_file(config, text, "train_folds.csv.txt")
    with pytest.raises(ShardError, match=r"^pack.split: '0' in row 2 of train_folds.* pack.split_values"):
        planned(config)
    values: dict[Any, str] = {0: "test", "1": "val", 2: "train", 3: "Training"}
    assert planned(replace(config, split_values=values)) == six("test val train train test val")
    with pytest.raises(ShardError, match=r"^pack.split_values.0: 'eval' is not one of train, val, test$"):
        planned(replace(config, split_values={"0": "eval"}))
    with pytest.raises(ShardError, match=r"^pack.split_values: the hash decides"):
        planned(replace(config, split="hash", split_values=values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,split 7,train 8,testt", "'testt' in row 3 of folds.csv is not one of train, val, test: say what it"),
        ("patient,split 7,train 8,val 7,test 8,val", "1 patients, such as HASH, are in two splits (train in row 2 of"),
        ("patient,split 7,train 8,val 009,", "4 patients, such as HASH, have no split in the file "),
        ("patient,split 7,train 8,val 9,val 10,val 11,val 12,val", "1 patients, such as HASH, have no split in the f"),
        ("who,split 7,train", "folds.csv: needs a column patient, and a column split or fold"),
        ("patient,splitt 7,train", "folds.csv: needs a column patient, and a column split or fold"),
    ],
)
def test_a_file_that_cannot_be_used(config: PackConfig, text: str, message: str) -> None:
    exams(config)
    with pytest.raises(ShardError) as error:
        planned(patients_file(config, text))
    assert message in re.sub(r"[0-9a-f]{16}", "HASH", str(error.value))
    assert str(error.value).startswith("pack.split: ")
    assert "\n" not in str(error.value)
    assert not (Path(config.out) / "build" / "plan.json").exists()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("folds.csv", "pack.split: folds.csv: no such table"),
        ("Foldd", "exams.csv: has no column 'Foldd'; it has Patient, Image, Fold"),
        ("Patient", "exams.csv: 'Patient' is the column of the patients"),
        ("official", "pack.split: source 'table' has no official split; name a file, or give pack.split=hash"),
    ],
)
def test_a_split_that_there_is_not(config: PackConfig, split: str, message: str) -> None:
    exams(config, Fold="train val test train val test")
    with pytest.raises(ShardError, match=re.escape(message)):
        planned(replace(config, split=split))


def test_a_column_of_the_table(config: PackConfig) -> None:
    exams(config, Fold="a b c a b c", split="train val test test val train", more="7,7b.png,b,train\n,x.png,c,test\n")
    options = {**config.options, "columns": {**config.options["columns"], "split": "Fold"}}
    with pytest.raises(ShardError, match=r"^pack.options.columns.split: there is no such field; name the column in"):
        planned(replace(config, options=options))
    letters = {"a": "train", "b": "val", "c": "test"}
    assert planned(config) == {**six("train val test test val train"), "": split_of("table", "")}
    config = replace(config, out=config.out + "2", split="Fold", split_values=letters)
    with pytest.raises(ShardError, match=r"are in two splits \(train in row 2 of exams.csv and val in row 8 of exams"):
        planned(config)
    exams(config, Fold="a b c a b -")
    with pytest.raises(ShardError, match=r"^pack.split: 1 patients, such as .{16}, have no split in the column Fold"):
        planned(config)
    exams(config, Fold="a b c a b c")
    assert planned(config) == six("train val test train val test")


def test_without_a_split_the_hash_decides_as_before(config: PackConfig) -> None:
    exams(config)
    assert planned(config) == by_hash("table", SIX)
    exams(config, split="- - - - - -")
    assert planned(replace(config, out=config.out + "2")) == by_hash("table", SIX)


@pytest.fixture
def vindr(config: PackConfig) -> PackConfig:
    """VinDr-Mammo with 60 exams, of which the first 20 are the official test set."""
    images = [vindr_archive.image(f"e{n}", f"i{n}", split="test" if n < 20 else "training") for n in range(60)]
    vindr_archive.read(Path(config.root), images, [])
    return replace(config, source="vindr", options={})


def test_the_official_split_of_vindr(vindr: PackConfig) -> None:
    """The test set is exactly the official one; `val` is what the hash calls so of the training set."""
    build = opened(vindr)
    found = splits_of(build)
    assert {exam for exam, split in found.items() if split == "test"} == {f"e{n}" for n in range(20)}
    hashed = by_hash("vindr", [f"e{n}" for n in range(20, 60)])
    val = {exam for exam, split in found.items() if split == "val"}
    assert val == {exam for exam, split in hashed.items() if split == "val"}
    assert val
    assert {why: len(who) for why, who in build.plan.moved.items()} == {"val": len(val)}
    assert build.plan.settings["split"] == "official"
    hashes = opened(replace(vindr, out=vindr.out + "2", split="hash"))
    assert splits_of(hashes) == by_hash("vindr", [f"e{n}" for n in range(60)])
    one, other = ({study for shard in plan.shards for study in shard.studies} for plan in (build.plan, hashes.plan))
    assert one == other  # the digests, by which a changed study is noticed, are those of before
    with pytest.raises(ShardError, match=r"^pack.split: 'Fold' is neither official, hash nor a file such as folds.csv"):
        planned(replace(vindr, out=vindr.out + "3", split="Fold"))


def test_exams_that_the_official_split_of_vindr_lacks(vindr: PackConfig) -> None:
    images = [vindr_archive.image(f"e{n}", f"i{n}", split="" if n % 2 else "test") for n in range(20)]
    images += [vindr_archive.image("e1", "again", "LMLO", split="test")]
    vindr_archive.read(Path(vindr.root), images, [])
    build = opened(vindr)
    found = splits_of(build)
    assert {exam for exam, split in found.items() if split == "test"} == {"e1", *(f"e{n}" for n in range(0, 20, 2))}
    assert len(build.plan.moved["unnamed"]) == 9
    text = (Path(vindr.root) / vindr_archive.BREASTS).read_text().replace(",split", ",spl")
    (Path(vindr.root) / vindr_archive.BREASTS).write_text(text)
    assert planned(replace(vindr, out=vindr.out + "2")) == by_hash("vindr", [f"e{n}" for n in range(20)])
    with pytest.raises(ShardError, match=r"source 'vindr' has no official split, or its tables are not in"):
        planned(replace(vindr, out=vindr.out + "3", split="official"))
    images = [vindr_archive.image("e1", name, split=split) for name, split in (("a", "test"), ("b", "training"))]
    vindr_archive.read(Path(vindr.root), images, [])
    with pytest.raises(
        ShardError, match=r"^pack.split: 1 patients, such as .{16}, are in two splits \(test in row 2 of"
    ):
        planned(replace(vindr, out=vindr.out + "3"))


def test_the_official_split_of_cbis_ddsm_loses_no_patient(config: PackConfig) -> None:
    """A patient whose masses are for training and whose calcifications are for testing is in test."""
    root = Path(config.root)
    folders = ["Mass-Training_P_00001_LEFT_CC", "Calc-Test_P_00001_RIGHT_CC", "Mass-Test_P_00002_LEFT_CC"]
    folders += [f"Mass-Training_P_{n:05d}_LEFT_CC" for n in range(3, 30)]
    for folder in folders:
        cbis_ddsm_archive.image(root, folder)
    config = replace(config, source="cbis_ddsm", options={})
    everyone = [f"P_{n:05d}" for n in range(1, 30)]
    assert planned(config) == by_hash("cbis_ddsm", everyone)  # without tables, as the sample of two patients has none
    rows = [cbis_ddsm_archive.abnormality(folder) for folder in folders]
    rows[1] |= {"calc type": "PUNCTATE", "calc distribution": "CLUSTERED"}
    cbis_ddsm_archive.write_tables(root, *rows)
    assert planned(config) == by_hash("cbis_ddsm", everyone)  # begun so, and the owner did not ask for another
    build = opened(replace(config, out=config.out + "2"))
    found = splits_of(build)
    assert sorted(found) == everyone
    assert [patient for patient, split in sorted(found.items()) if split == "test"] == ["P_00001", "P_00002"]
    hashed = by_hash("cbis_ddsm", everyone[2:])
    expected = {patient: "val" if split == "val" else "train" for patient, split in hashed.items()}
    assert {patient: split for patient, split in found.items() if split != "test"} == expected
    assert len(build.plan.moved["divided"]) == 1
    assert build.studies  # the two breasts of the first patient stay together
    assert {len(study.views) for study in build.studies.values() if study.patient_id == "P_00001"} == {2}


def test_a_build_of_an_earlier_release_goes_on_by_the_hash(vindr: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    make_plan(replace(vindr, split="hash"))
    path = Path(vindr.out) / "build" / "plan.json"
    plan = json.loads(path.read_text())
    assert plan["settings"].pop("split") == "hash"
    del plan["moved"]
    path.write_text(json.dumps(plan))
    with pytest.raises(ShardError, match=r"^pack.split: .* was packed with 'hash', now it is 'official'; set it back"):
        opened(replace(vindr, split="official"))
    with caplog.at_level("INFO"):
        build = opened(vindr)
    assert splits_of(build) == by_hash("vindr", [f"e{n}" for n in range(60)])
    assert "split" not in build.plan.settings
    assert any("split by the hash, and still does" in message for message in caplog.messages)


@pytest.fixture
def tiny(config: PackConfig, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """Twelve patients with images, of whom the archive calls 0 to 3 test, 3 to 10 train, and is silent about 11."""

    def source(root: Path) -> Iterator[SourceStudy]:
        for study in tiny_source(root):
            yield replace(study, views=study.views[:1])
        yield SourceStudy("refused", "1", (SourceView(root / "x.dcm", refused=("view", "unknown")),))

    def official(root: Path) -> list[Stated]:
        words = [*((n, "test") for n in range(4)), *((n, "training") for n in range(3, 11)), (99, "train")]
        return [Stated(f"{NUMBER}-{n}", word, f"row {n}") for n, word in words]

    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setitem(OFFICIAL_SPLITS, "tiny", official)
    monkeypatch.setattr(splits, "TEST_WINS", {"tiny"})
    return replace(config, source="tiny", root=str(Path(config.root) / "tiny"), options={}, long_side=48, workers=1)


def test_the_manifest_says_what_decided_and_for_how_many(tiny: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    (Path(tiny.root) / f"{NUMBER}-3").mkdir(parents=True)
    (Path(tiny.root) / f"{NUMBER}-3" / "L_CC.dcm").write_text("no image, so this patient is not stored")
    with caplog.at_level("INFO"):
        manifest = pack(tiny)
    val = [n for n in range(4, 12) if split_of("tiny", f"{NUMBER}-{n}") == "val"]
    assert val  # else this shows nothing
    counts = {"train": 8 - len(val), "val": len(val), "test": 3}
    assert manifest.split_by == SplitBy("official", counts, {"unnamed": 1, "val": len(val)})
    assert load_manifest(Path(tiny.out)) == manifest
    reader = ShardReader(Path(tiny.out))
    stored = [reader.study(i) for i in range(len(reader))]  # patient n is 40 + n years old
    assert {study.age for study in stored if study.split == "test"} == {40, 41, 42}
    assert {study.age for study in stored if study.split == "val"} == {40 + n for n in val}
    said = "The archive's own split decides. 1 patients are not in the archive's split: they count as training."
    assert any(said in message for message in caplog.messages)
    assert check(Path(tiny.out)) == []
    assert said in quality_page([Path(tiny.out)], Path(tiny.out) / "page.html").read_text().replace("&#39;", "'")
    assert pack(tiny) == manifest


def test_check_counts_the_patients_of_each_split(tiny: PackConfig) -> None:
    pack(replace(tiny, split="hash"))
    out = Path(tiny.out)
    document = json.loads((out / "manifest.json").read_text())
    assert document["split_by"]["how"] == "hash"
    assert sum(document["split_by"]["patients"].values()) == 12
    document["split_by"]["patients"]["train"] -= 1
    (out / "manifest.json").write_text(json.dumps(document))
    assert [problem for problem in check(out) if "split_by differs from what the build recorded" in problem]
    (out / "build" / "plan.json").unlink()
    assert [problem for problem in check(out) if "its numbers of patients by split differ" in problem]
    del document["split_by"]  # as an earlier release wrote it
    (out / "manifest.json").write_text(json.dumps(document))
    assert check(out) == []
    assert "A hash of the patient decides the split" in quality_page([out], out / "page.html").read_text()


def test_a_finished_build_keeps_its_split(tiny: PackConfig) -> None:
    """Another way to split, and the same way with another answer for one patient, are refused and change nothing."""
    folds = {f"{NUMBER}-{n}": SPLITS[n % 3] for n in range(12)}
    config = with_folds(tiny, folds)
    pack(config)
    before = contents(config.out)
    for other, message in (
        (replace(config, split="hash"), r"^pack.split: .* was packed with 'file', now it is 'hash'; set it back, or g"),
        (replace(config, split=None), r"^pack.split: .* was packed with 'file', now it is 'official'; set it back"),
        (
            with_folds(tiny, {**folds, f"{NUMBER}-0": "test"}),
            r"^pack.split: 1 patients have another split than .*\(stu",
        ),
    ):
        with pytest.raises(ShardError, match=message):
            pack(other)
        with pytest.raises(ShardError, match=message):
            pack_part(other, 0, 1)
        assert contents(config.out) == before
    with_folds(tiny, {**folds, "one-more": "test"})
    pack(config)
    assert contents(config.out) == before


def with_folds(config: PackConfig, folds: Mapping[str, str]) -> PackConfig:
    path = Path(config.root).parent / "mine.csv"
    path.write_text("patient,split\n" + "".join(f"{patient},{split}\n" for patient, split in folds.items()))
    return replace(config, split=str(path))
