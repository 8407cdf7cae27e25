"""Boxes of detectors from CSV files: figures against plain loops in stored pixels, and every wrong file in one line."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mama.cli.main import cli
from mama.data.held_out import Split
from mama.errors import ConfigError
from mama.evaluate import localisation
from mama.evaluate.box_files import marks
from mama.evaluate.detection import OVERLAPS, RATES
from mama.evaluate.evaluation import evaluate
from mama.evaluate.sets import sets_of
from mama.finetune import fine_tune
from mama.report.page import write_report
from mama.settings.load import save
from mama.settings.schema import Config, DataConfig, EvalConfig
from shards.errors import ShardError
from shards.image.crop import Geometry
from shards.schema import Box
from tests.support.checkout import CHECKOUT
from tests.support.cohort import BOX, SIZE, study, write_shards
from tests.support.oracle_run import install_oracle, oracle_config

Line = tuple[str, Box, float]
HEAD = "image,x0,y0,x1,y1,score"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = oracle_config(tmp_path)
    return replace(config, eval=replace(config.eval, tasks=["cancer"], intensity_baseline=False))


def write_boxes(file: Path, lines: Iterable[Line]) -> str:
    """Beside a column that nobody asks for."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["note", *HEAD.split(",")])
        writer.writerows(["x", image, *box, score] for image, box, score in lines)
    return str(file)


def perfect(config: Config) -> list[Line]:
    """The lesion of each image that has one, and a weaker box in one that has none."""
    items = Split(config, "test").items
    found = [(item.key, BOX, 0.9) for item in items if item.view.findings]
    return [*found, (next(item.key for item in items if not item.view.findings), (0.0, 0.0, 9.0, 9.0), 0.1)]


def with_boxes(config: Config, *files: str) -> Config:
    return replace(config, eval=replace(config.eval, boxes=list(files)))


def overlap(one: Box, other: Box) -> float:
    wide, high = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return wide * high / (sum(areas) - wide * high)


def is_hit(box: Box, lesion: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return lesion[0] <= x <= lesion[2] and lesion[1] <= y <= lesion[3]


def naive_froc(lines: list[Line], truth: dict[str, list[Box]], rate: float) -> float:
    """The share of lesions with a hit, at the lowest threshold with no more than `rate` false boxes an image."""
    best = 0.0
    for threshold in [math.inf, *sorted({score for _, _, score in lines}, reverse=True)]:
        shown = [(image, box) for image, box, score in lines if score >= threshold]
        false = sum(not any(is_hit(box, lesion) for lesion in truth[image]) for image, box in shown)
        if false > rate * len(truth):
            break
        hits = [any(i == image and is_hit(box, one) for i, box in shown) for image, of in truth.items() for one in of]
        best = sum(hits) / len(hits)
    return best


def naive_ap(lines: list[Line], truth: dict[str, list[Box]], least: float) -> float:
    """Box by box from the highest score: a free lesion of its image that it overlaps most, or a false one."""
    free = {image: list(boxes) for image, boxes in truth.items()}
    true = []
    for image, box, _ in sorted(lines, key=lambda line: -line[2]):
        left = [lesion for lesion in free[image] if overlap(box, lesion) >= least]
        true.append(bool(left))
        if left:
            free[image].remove(max(left, key=lambda lesion: overlap(box, lesion)))
    total, precision = sum(map(len, truth.values())), np.cumsum(true) / np.arange(1, len(true) + 1)
    return sum(max(precision[i:]) / total for i in range(len(true)) if true[i])


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_froc_and_average_precision_are_those_of_plain_loops_in_stored_pixels(tmp_path: Path, fit: str) -> None:
    """On a canvas of another shape than the images; images and scores all differ, so that no order is left open."""
    write_shards(tmp_path / "shards", {"test": 30})
    data = DataConfig(shards=[str(tmp_path / "shards")], image_size=(96, 48), fit=fit)  # type: ignore[arg-type]
    config = Config(data=data, eval=EvalConfig(bootstrap=0))
    split = Split(config, "test")
    truth = {item.key: [f.box for f in item.view.findings if f.box] for item in split.items}
    rng = np.random.default_rng(4)
    lines: list[Line] = []
    for image, score in zip(rng.choice(list(truth), 150), rng.permutation(150) / 150, strict=True):
        corner = rng.uniform(4, 30, 2) if rng.random() < 0.5 else np.array(BOX[:2]) + rng.uniform(-4, 4, 2)
        sides = rng.uniform(5, 14, 2)
        lines.append((str(image), tuple(map(float, (*corner, *(corner + sides)))), float(score)))  # type: ignore[arg-type]
    files = marks(with_boxes(config, write_boxes(tmp_path / "mine.csv", lines)), split)
    empty = {"trained": localisation.Maps(*[np.zeros((0, 4, 4), np.float32)] * 5)}
    found = localisation.document(empty, localisation.Search(), split, files, config)["detection"]
    assert (found["images"], found["lesions"], found["without_lesion"], found["left_out"]) == (60, 15, 45, 0)
    (row,) = found["rows"]
    assert (row["model"], row["marks"]) == ("mine", 150)
    shares = [one["sensitivity"]["value"] for one in row["froc"]]
    assert shares == pytest.approx([naive_froc(lines, truth, rate) for rate in RATES])
    areas = [row["ap"][str(least)]["value"] for least in OVERLAPS]
    assert areas == pytest.approx([naive_ap(lines, truth, least) for least in OVERLAPS])
    assert len({*shares, *areas}) > 4


def mama(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_a_detector_stands_beside_the_maps_in_files_on_the_screen_and_in_the_report(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_oracle(config, monkeypatch)
    save(config, config.run_folder / "config.yaml")
    run, folder = str(config.run_folder), config.run_folder / "eval"
    ours = write_boxes(tmp_path / "our detector.csv", perfect(config))
    flood = [
        (item.key, (2.0 + n, 2.0, 4.0 + n, 4.0), 1 - n / 40) for item in Split(config, "test").items for n in range(9)
    ]
    said = mama("eval", run, "--", f"eval.boxes={json.dumps([ours, write_boxes(tmp_path / 'b.csv', flood)])}")
    assert said.exit_code == 0, said.output
    assert "our detector, finding 6 lesions: sensitivity 1.000 [" in said.output
    detected = json.loads((folder / "alignment" / "metrics.json").read_text())["detection"]
    rows = {row["model"]: row for row in detected["rows"]}
    assert list(rows) == ["trained", "untrained", "brightest patch", "random map", "our detector", "b"]
    assert [one["value"] for one in rows["our detector"]["ap"].values()] == [1.0] * 3
    assert (rows["our detector"]["marks"], rows["b"]["marks"]) == (7, 216)
    assert rows["b"]["curve"]["false_positives"][-1] == 8, "where the figure ends"
    marker = json.loads((folder / "complete.json").read_text())
    page = write_report(config, config.run_folder).read_text()
    assert page.count("our detector</th>") == 1
    assert "our detector, b: the boxes and scores of these files" in page
    Path(ours).write_text(Path(ours).read_text().replace("0.1", "0.2"))
    mama("eval", run, f"eval.boxes={json.dumps([ours])}")
    again = json.loads((folder / "complete.json").read_text())
    assert again["settings"]["boxes"].keys() == {"our detector"}
    assert again["settings"]["boxes"]["our detector"] != marker["settings"]["boxes"]["our detector"]


def test_without_maps_the_detector_stands_alone_and_without_lesions_it_is_said(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_oracle(config, monkeypatch)
    config = with_boxes(config, write_boxes(tmp_path / "mine.csv", perfect(config)))
    without = replace(config, loss=replace(config.loss, local=0.0))
    shown: list[str] = []
    found = evaluate(without, without.run_folder, shown.append)["alignment"]
    assert [row["model"] for row in found["detection"]["rows"]] == ["mine"]
    assert (found["reason"], found["rows"]) == ("the model was trained without the local term", [])
    assert shown[-1].startswith("mine, finding 6 lesions: sensitivity 1.000 [")
    page = write_report(without, without.run_folder).read_text()
    assert "Detection: boxes of detectors</h" in page
    assert "highest cosine" not in page
    write_shards(tmp_path / "words", {"train": 8, "test": 4}, words="Mass")
    boxless = replace(config, data=replace(config.data, shards=[str(tmp_path / "words")]))
    boxless = with_boxes(boxless, write_boxes(tmp_path / "mine.csv", [("test001/0.jpg", BOX, 1.0)]))
    found = evaluate(boxless, boxless.run_folder, shown.append)["alignment"]
    assert found["detection"]["rows"] == []
    assert shown[-1].splitlines()[-1] == "boxes of mine: not measured, as no lesion of this split has a box"
    assert "Boxes of mine: not measured, as no lesion of this split has a box." in write_report(
        boxless, boxless.run_folder
    ).read_text()  # fmt: skip


def test_one_file_serves_several_sets_and_other_splits(config: Config, tmp_path: Path) -> None:
    """What is in none of them is refused: a name that is spelt in another way would count as nothing found."""
    write_shards(tmp_path / "small", {"test": 5})
    small, large = (
        replace(config, data=replace(config.data, shards=[shards]))
        for shards in (str(tmp_path / "small"), config.data.shards[0])
    )
    box = write_boxes(
        tmp_path / "all.csv", [(f"{study}/0.jpg", BOX, 0.5) for study in ("test001", "test011", "train003")]
    )
    alone, both = with_boxes(small, box), with_boxes(small, box)
    both = replace(both, eval=replace(both.eval, on=[small.data.shards[0], large.data.shards[0]]))
    found = [marks(one, Split(one, "test"))["all"] for one in sets_of(both).values()]
    assert [len(scores) for _, scores in found[0]] == [0, 0, 1] + [0] * 7
    assert [n for n, (_, scores) in enumerate(found[1]) if len(scores)] == [2, 22]
    assert len(marks(with_boxes(large, box), Split(large, "test"))["all"]) == 24
    with pytest.raises(
        ConfigError, match=r"all\.csv: row 3: image test011/0\.jpg: in no split of .*small; name .*2 such"
    ):
        marks(alone, Split(alone, "test"))
    train = with_boxes(large, write_boxes(tmp_path / "train.csv", [("train003/0.jpg", BOX, 0.5)]))
    with pytest.raises(ConfigError, match=r"train\.csv: has no box in an image of the split test of .*eval\.split\)$"):
        marks(train, Split(train, "test"))


WRONG = [
    ("image,x0,y0,x1,y1", "test001/0.jpg,1,1,9,9", r"wrong\.csv: has no column 'score'; it has image, x0"),
    (HEAD, "test001/0.jpg,1,1,9,9,nan", r"row 2: score nan: no finite number; give one, or leave the box out$"),
    (HEAD, "test001/0.jpg,1,1,9,9,inf", r"row 2: score inf: no finite number"),
    (HEAD, "test001/0.jpg,1,1,9,9,", r"row 2: score \(empty\): no finite number"),
    (HEAD, "test001/0.jpg,1,1,9,9,1\ntest001/0.jpg,1,one,9,9,1", r"row 3: y0 one: no finite number"),
    (HEAD, ",1,1,9,9,1", r"row 2: image \(empty\): name it as predictions\.csv does$"),
    (HEAD, "test001/0.jpg,9,1,1,9,1\n" * 2, r"row 2: x0 9, x1 1: the box is empty; .* \(2 such rows of 2\)$"),
    (HEAD, "test001/0.jpg,1,9,5,9,1", r"row 2: y0 9, y1 9: the box is empty"),
    (HEAD, "test001/0.jpg,1,1,50,9,1", r"row 2: .*x1 50.*: reaches out of the image; give pixels of the stored one$"),
    (HEAD, "test001/0.jpg,1,-2,9,9,1", r"row 2: .*y0 -2.*: reaches out of"),
    (HEAD, "test001/0.png,1,1,9,9,1", r"row 2: image test001/0\.png: in no split of"),
    (HEAD, "test001,1,1,9,9,1", r"row 2: image test001: in no split of"),
    (HEAD, "", r"wrong\.csv: has no box in an image of the split test of"),
]  # fmt: skip


@pytest.mark.parametrize(("head", "lines", "message"), WRONG)
def test_a_wrong_file_is_refused_in_one_line(
    config: Config, tmp_path: Path, head: str, lines: str, message: str
) -> None:
    file = tmp_path / "wrong.csv"
    file.write_text(f"{head}\n{lines}\n")
    wrong = with_boxes(config, str(file))
    with pytest.raises((ConfigError, ShardError), match=message) as refused:
        marks(wrong, Split(wrong, "test"))
    assert "\n" not in str(refused.value)


def test_boxes_may_be_rounded_across_the_edge(config: Config, tmp_path: Path) -> None:
    box = write_boxes(tmp_path / "edge.csv", [("test001/0.jpg", (-0.5, 0.0, SIZE[1] + 0.5, SIZE[0] + 1.0), 1.0)])
    assert len(marks(with_boxes(config, box), Split(config, "test"))["edge"]) == 24


def test_files_that_cannot_have_rows_of_their_own_are_refused_before_a_job_waits(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_oracle(config, monkeypatch)
    save(config, config.run_folder / "config.yaml")
    (tmp_path / "b").mkdir()
    one, other, taken = (write_boxes(tmp_path / n, perfect(config)) for n in ("a.csv", "b/a.csv", "random map.csv"))
    large = write_boxes(tmp_path / "b" / "A.csv", perfect(config))
    for files, message in (
        ([one, other], r"b/a\.csv: its row would be called 'a', but another file has that name; rename the file$"),
        ([one, one], r"a\.csv is named twice; name it once$"),
        ([str(tmp_path)], r"is a folder; name the CSV files in it$"),
        ([one, large], r"A\.csv: its row would be called 'A', but another file has that name"),
        ([taken], r"random map\.csv: its row would be called 'random map', but our own results have such a row;"),
        (
            [str(tmp_path / "none.csv")],
            r"^eval\.boxes: .*none\.csv: no such file; name CSV files with the columns image",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            mama("eval", str(config.run_folder), "--slurm", f"eval.boxes={json.dumps(files)}")


def test_a_wrong_file_ends_before_anything_is_computed_for_any_set(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computes(*arguments: object) -> bool:
        raise AssertionError("it computes")

    monkeypatch.setattr(fine_tune, "fine_tune", computes)
    write_shards(tmp_path / "far", {"test": 14})
    wrong = with_boxes(config, write_boxes(tmp_path / "a.csv", [("test013/0.jpg", BOX, 1.0), ("test002/9", BOX, 1.0)]))
    wrong = replace(wrong, eval=replace(wrong.eval, on=[str(tmp_path / "far"), *config.data.shards]))
    with pytest.raises(ConfigError, match=r"row 3: image test002/9: in no split"):
        fine_tune.evaluate(wrong, wrong.run_folder)


def test_the_documented_way_from_original_pixels_is_that_of_packing() -> None:
    document = (CHECKOUT / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"```python\nfrom shards import ShardReader\n(.*?)\n\nreader", document, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    view = study(1, "test").views[0]
    for flipped in (False, True):
        geometry = Geometry((100, 40, 340, 360), flipped, SIZE, level=1)
        there = replace(view, to_original=geometry.to_original)
        for box in ((250.0, 100.0, 300.5, 200.0), (0.0, 0.0, 260.0, 2000.0), (0.0, 0.0, 50.0, 50.0)):
            assert names["stored"](there, box) == pytest.approx(geometry.box_to_stored(box)), (flipped, box)
