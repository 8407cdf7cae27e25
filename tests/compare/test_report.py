from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mama.compare.report import write_report
from mama.errors import ConfigError
from mama.evaluate.results import shown_rows
from mama.sweep.sweep import Sweep
from tests.support.browser import CHROMIUM, probe
from tests.support.sweep_results import evaluated, sweep_config, sweep_of

METHODS = ("clip", "mama & <b>co</b> | x", "an_unusually_long_name_of_a_recipe_that_nobody_shortened")
CLICKS = """<script>addEventListener("load", () => {
  const table = document.querySelector(".metric-1 .results"), seen = [];
  const column = n => [...table.tBodies[0].rows].map(row => row.cells[n].dataset.value);
  for (const n of [4, 4, 1, 0]) {
    table.tHead.rows[0].cells[n].querySelector("button").click();
    seen.push(column(n));
  }
  const shown = () => [...document.querySelectorAll(".of-metric")].filter(e => e.offsetHeight).map(e => e.className);
  const before = shown();
  document.querySelectorAll(".choices label")[1].click();
  document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
  document.querySelector("#seen").textContent = JSON.stringify({seen, before, after: shown()});
})</script>"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    base = sweep_config(tmp_path_factory.mktemp("report"))
    differing = [{"recipe": r, "optim.lr": lr, "seed": s} for r in METHODS for lr in (1e-4, 1e-3) for s in (1, 2)]
    sweep = sweep_of(base, differing, {"recipe": "clip"})
    points = [replace(p, config=replace(p.config, name=f"point{n}")) for n, p in enumerate(sweep.points)]
    for number, point in enumerate(points[:-2]):
        code = {"commit": "fedcba9876543210"} if number == 3 else {}
        evaluated(point, 0.5 + METHODS.index(point.differs["recipe"]), **code)
    return replace(sweep, points=points)


@pytest.fixture(scope="module")
def written(sweep: Sweep) -> str:
    """What the command prints."""
    _, text = write_report(sweep)
    return text


@pytest.fixture(scope="module")
def page(sweep: Sweep, written: str) -> Path:
    return sweep.folder / "report.html"


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""https?:|//[a-z]+\.|<link|<script[^>]|src=|@import|url\(""", text)
    assert re.findall(r'href="([^"]*)', text) == ["#versions"]
    assert "mama &amp; &lt;b&gt;co&lt;/b&gt; | x" in text
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", text)


def test_the_page_says_what_is_missing_and_which_code_ran(page: Path, sweep: Sweep) -> None:
    text = page.read_text()
    assert re.search(r"not trained</strong>\s*<span[^>]*>point10, point11<", text)
    assert "trained with different versions" in text
    assert "commit <code>fedcba987654</code>" in text
    assert "Settings that all points share" in text
    assert "Bold: the best mean of a column" in text


def test_the_files_are_replaced_as_a_whole(sweep: Sweep, written: str) -> None:
    """Nothing half-written lies beside them, and a second report has the same figures."""
    names = {path.name for path in sweep.folder.iterdir() if path.is_file()}
    assert names == {"report.html", "report.md", "report.csv", "report-methods.csv"}
    before = (sweep.folder / "report-methods.csv").read_text()
    assert write_report(sweep)[1] == written
    assert (sweep.folder / "report-methods.csv").read_text() == before


def test_the_csv_has_every_figure_with_all_its_digits(sweep: Sweep, written: str) -> None:
    found = {
        (r["point"], r["task"], r["protocol"], r["unit"], r["model"], r["metric"]): r
        for r in lines(sweep.folder / "report.csv")
    }
    count = 0
    for point in sweep.points[:-2]:
        for task in ("cancer", "birads", "density"):
            document = json.loads((point.config.run_folder / "eval" / task / "metrics.json").read_text())
            for row in shown_rows(document):
                for metric, estimate in row["metrics"].items():
                    line = found[point.name, task, row["protocol"], row["unit"], row["model"], metric]
                    assert (line["value"] or None) == (None if estimate["value"] is None else str(estimate["value"]))
                    assert line["shards_digest"] == document["shards"]["digest"]
                    assert (line["recipe"], line["seed"]) == (point.differs["recipe"], str(point.differs["seed"]))
                    count += 1
    alignment = [key for key in found if key[1] == "alignment"]
    assert count == len(found) - len(alignment) > 500
    methods = lines(sweep.folder / "report-methods.csv")
    auc = next(
        r
        for r in methods
        if (r["recipe"], r["task"], r["metric"], r["unit"], r["model"])
        == (METHODS[1], "cancer", "auc", "image", "trained")
    )
    values = [float(r["value"]) for key, r in found.items() if r["method"] == auc["method"]
              and key[1:] == (auc["task"], auc["protocol"], "image", "trained", "auc")]  # fmt: skip
    assert float(auc["mean"]) == pytest.approx(sum(values) / 2, abs=1e-15)
    assert (auc["seeds"], auc["points"], auc["interval_over"]) == ("2", "2", "seeds")
    assert auc["baseline"] == f"clip, lr={auc['optim.lr']}"
    assert float(auc["difference_low"]) < float(auc["difference"]) < float(auc["difference_high"])
    assert float(auc["delong_low"]) < float(auc["difference"]) < float(auc["delong_high"])
    assert 0 <= float(auc["delong_p"]) <= 1


def test_the_markdown_and_the_printed_table(sweep: Sweep, written: str) -> None:
    text = (sweep.folder / "report.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert r"| mama & \<b\>co\</b\> \| x, lr=0.0001 | 2 |" in text
    assert re.search(r"\*\*\d\.\d{3} ± \d\.\d{3}\*\*", text)
    assert re.search(r"[+-]\d\.\d{3} \\\[[+-]\d\.\d{3}, [+-]\d\.\d{3}\\\], p (= |\\< )0\.", text)
    assert "not trained: point10, point11" in text
    assert "AUC on shards, test" in written
    assert "not trained: point10, point11" in written
    assert "clip, lr=0.001 " in written


def test_a_sweep_of_which_nothing_was_evaluated_has_a_report(tmp_path: Path) -> None:
    sweep = sweep_of(sweep_config(tmp_path), [{"seed": 1}, {"seed": 2}])
    with pytest.raises(ConfigError, match="the sweep has not begun"):
        write_report(sweep)
    sweep.folder.mkdir(parents=True)
    _, text = write_report(sweep)
    assert text.startswith("no point has been evaluated yet")
    assert "not trained: seed-1, seed-2" in text
    assert "No point has been evaluated yet" in (sweep.folder / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_it_at_every_width_and_sorts_it(page: Path, tmp_path: Path) -> None:
    clicking = tmp_path / "clicking.html"
    clicking.write_text(page.read_text().replace("</body>", CLICKS + "</body>"))
    for width in (1280, 390):
        dom, attributes = probe(clicking, tmp_path, width)
        assert "error" not in attributes
        assert (attributes["wide"], attributes["requests"]) == ("false", "0"), width
    dom, _ = probe(clicking, tmp_path, 1280)
    found = re.search(r"<pre id=\"seen\">([^<]*)</pre>", dom)
    assert found
    said = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    down, up, recipes, names = said["seen"]
    figures = [float(value) for value in down if value]
    assert figures == sorted(figures, reverse=True)
    assert [float(value) for value in up if value] == figures[::-1]
    assert (len(figures), down[-1], up[-1]) == (5, "", ""), "what has no figure stays last"
    assert recipes == sorted(recipes, key=str.lower)
    assert names == sorted(names, key=str.lower)
    assert said["before"] == ["of-metric metric-1"]
    assert said["after"] == ["of-metric metric-2"]
