from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mama.data.held_out import Item
from mama.data.wording import Wording
from mama.errors import ConfigError
from mama.evaluate.class_prompts import prompt_ensembles, prompt_templates
from mama.evaluate.task_data import recorded_kinds, task_data
from mama.evaluate.tasks import KINDS, TASKS, Task, load_task, load_tasks, task_name, why_none_of
from mama.settings.load import load, shipped_configs
from shards.schema import Finding, Labels
from tests.support.cohort import study

OWN = """
title: Dense against not dense
label: density
classes: {not dense: [A, B], dense: [C, D]}
images: {view: CC, age: [40, 74], laterality: [L]}
unit: exam
words:
  not dense: [almost entirely fatty, scattered fibroglandular tissue]
  dense: heterogeneously or extremely dense
templates: ["Mammogram. The breast is {}.", "{}"]
"""


def test_the_shipped_tasks_are_the_files() -> None:
    assert sorted(TASKS) == sorted(path.stem for path in (shipped_configs() / "tasks").iterdir())
    assert [task.name for task in load_tasks(TASKS)] == list(TASKS)


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("cancer", {"cancer": True}, 1),
        ("cancer", {"cancer": False}, 0),
        ("cancer", {"birads": 5}, None),
        ("malignancy", {"pathology": "malignant"}, 1),
        ("malignancy", {"pathology": "normal"}, 0),
        ("malignancy", {"pathology": "benign"}, None),
        ("malignancy", {}, None),
        ("birads", {"birads": 0}, 0),
        ("birads", {"birads": 6}, 6),
        ("birads", {}, None),
        ("density", {"density": "A"}, 0),
        ("density", {"density": "D"}, 3),
        ("density", {}, None),
    ],
)
def test_labels(task: str, labels: dict[str, object], expected: int | None) -> None:
    one = study(1, "train")
    view = replace(one.views[0], labels=Labels(**labels))  # type: ignore[arg-type]
    assert load_task(task).label_of(one, view) == expected


def test_only_a_breast_that_is_known_to_have_no_implant_is_without(tmp_path: Path) -> None:
    one = study(1, "train")
    views = {known: replace(one.views[0], implant=known) for known in (True, False, None)}
    told = {known: load_task("cancer_without_implants").label_of(one, view) for known, view in views.items()}
    assert told == {True: None, False: 1, None: None}
    assert {load_task("cancer").label_of(one, view) for view in views.values()} == {1}
    for written, admitted in (("true", [True]), ("[true, false]", [True, False]), ("false", [False])):
        (tmp_path / "own.yaml").write_text(f"{OWN.replace('view: CC', f'implant: {written}')}")
        own = load_task(str(tmp_path / "own.yaml"))
        assert [known for known, view in views.items() if own.admits(one, view)] == admitted


@pytest.mark.parametrize(
    ("labels", "findings", "recorded", "expected"),
    [
        ({"birads": 1}, (), KINDS, 0),
        ({"birads": 2, "cancer": False}, (), KINDS, 0),
        ({}, (), KINDS, 0),
        ({}, (), ("calcification",), None),  # the archive has no masses at all
        ({"birads": 4}, ("calcification",), KINDS, 0),
        ({"birads": 4}, ("calcification", "mass"), KINDS, 1),
        ({}, ("mass",), (), 1),
        *(({"birads": birads}, (), KINDS, None) for birads in (0, 3, 4, 5, 6)),  # something is there, nobody wrote what
        ({"pathology": "malignant"}, (), KINDS, None),
        ({"cancer": True}, (), KINDS, None),
    ],
)
def test_a_finding_is_absent_only_where_the_archive_says_so(
    labels: dict[str, object], findings: tuple[str, ...], recorded: tuple[str, ...], expected: int | None
) -> None:
    one = study(1, "train")
    shown = tuple(Finding(n, kind) for n, kind in enumerate(findings))
    view = replace(one.views[0], labels=Labels(**labels), findings=shown)  # type: ignore[arg-type]
    assert load_task("mass").label_of(one, view, recorded) == expected


def test_what_an_archive_records_is_what_any_of_its_images_shows() -> None:
    """Training images count too, and each source for itself."""
    with_masses = [Item(n, p, study(n, "train")) for n in range(2) for p in range(2)]
    without = [replace(i, study=replace(i.study, source="other")) for i in with_masses if not i.view.findings]
    assert recorded_kinds([*with_masses, *without]) == {"invented": {"mass"}, "other": set()}
    normal = [item for item in with_masses if not item.view.findings]
    assert len(task_data(load_task("mass"), normal, normal, [], Wording()).rows) == 0
    assert task_data(load_task("mass"), normal, with_masses, [], Wording()).labels.tolist() == [0] * len(normal)
    assert len(task_data(load_task("mass"), without, with_masses, [], Wording()).rows) == 0
    assert len(task_data(load_task("asymmetry"), normal, with_masses, [], Wording()).rows) == 0


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    """Ten lines: classes of several values, images by facts, one's own words in each template."""
    path = tmp_path / "dense.yaml"
    path.write_text(OWN)
    assert len(OWN.strip().splitlines()) <= 10
    config = load("quickstart", [f"eval.tasks=[cancer, {path}]"])
    _, task = load_tasks(config.eval.tasks)
    assert (task.name, task_name(str(path)), task.names, task.unit) == (
        "dense",
        "dense",
        ("not dense", "dense"),
        "exam",
    )
    one = study(4, "train")  # density C, 50 years, L and R in CC
    assert [task.label_of(one, view) for view in one.views] == [1, None]
    assert [task.label_of(replace(one, age=age), one.views[0]) for age in (39, 40, 74, 75, None)] == [
        None, 1, 1, None, None,
    ]  # fmt: skip
    assert task.label_of(one, replace(one.views[0], view="MLO")) is None
    assert prompt_ensembles(task, Wording()) == [
        [
            ["Mammogram.", "The breast is almost entirely fatty."],
            ["Mammogram.", "The breast is scattered fibroglandular tissue."],
            ["almost entirely fatty"],
            ["scattered fibroglandular tissue"],
        ],
        [["Mammogram.", "The breast is heterogeneously or extremely dense."], ["heterogeneously or extremely dense"]],
    ]
    first, second = task.templates
    assert prompt_templates(task, Wording()) == [[first, first, second, second], [first, second]]


def test_without_words_of_its_own_a_task_has_those_of_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "dense.yaml"
    path.write_text(OWN.partition("words")[0])
    of_letters = prompt_ensembles(load_task("density"), Wording())
    assert [sorted(texts) for texts in prompt_ensembles(load_task(str(path)), Wording())] == [
        sorted(of_letters[0] + of_letters[1]), sorted(of_letters[2] + of_letters[3]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label: density", "label: densty", "label: 'densty' is not one of birads, density, cancer, pathology, mass"),
        ("label: density\n", "", "label: is missing; a task has a title, a label and classes"),
        ("title", "tilte", "unknown key tilte; did you mean title?"),
        ("[C, D]", "[C, E]", "classes.dense: 'E' is not one of A, B, C, D"),
        ("[C, D]", "[B, C]", "classes.dense: 'B' is in the class not dense too; take it out of one"),
        ("[C, D]", "[]", "classes.dense: is empty; give it values of density"),
        ("not dense: [A, B], ", "", "classes: ['dense'] are less than two"),
        ("not dense: [A, B]", "image: [A, B]", "classes: 'image' is the name of a column of predictions.csv"),
        ("label: density", "label: mass", "classes.not dense: 'A' is not one of false, true"),
        ("view: CC", "view: LCC", "images.view: 'LCC' is not one of CC, MLO"),
        ("view: CC", "veiw: CC", "images.veiw: is not one of view, .* did you mean view?"),
        ("view: CC", "vendor: acme", "images.vendor: 'acme' is not one of hologic, ge, "),
        ("view: CC", "implant: [0]", "images.implant: 0 is not one of false, true"),
        ("[40, 74]", "40", "images.age: 40 is not a smallest and a largest age; write [40, 49]"),
        ("[40, 74]", "[74, 40]", "images.age: [74, 40] is not a smallest"),
        ("unit: exam", "unit: breats", "unit: 'breats' is not one of 'image', 'breast', 'exam', 'patient'"),
        ("unit: exam", "order: [dense]", "order: ['dense'] does not name each class once; they are not dense, dense"),
        (
            "  dense: het",
            "  fat: het",
            "words: ['not dense', 'fat'] are not the classes; these are ['not dense', 'de",
        ),
        ("heterogeneously or extremely dense", "7", "words.dense: 7 is not a list of texts"),
        (
            "heterogeneously or extremely dense",
            "[scattered fibroglandular tissue, almost entirely fatty]",
            "words.not dense: are those of dense too, which tells nothing apart; write its own",
        ),
        ('"{}"]', '"a"]', "templates: 'a' does not hold one {}, the place of the words; add it"),
        ("unit: exam", "name: x", "name: 'x', but a task has the name of its file; leave the line out"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "dense.yaml"
    assert old in OWN
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_task(str(path))
    pattern = ".*".join(map(re.escape, f"{path}: {message}".split(".*")))
    assert re.match(pattern, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_words_of_ones_own_need_no_template_and_a_template_needs_words(tmp_path: Path) -> None:
    path = tmp_path / "dense.yaml"
    path.write_text(OWN.partition("templates")[0])
    assert prompt_templates(load_task(str(path)), Wording()) == [["{}", "{}"], ["{}"]]
    path.write_text(OWN.partition("words")[0] + "templates: ['{}']")
    with pytest.raises(ConfigError, match=r"templates: has nothing to put in; add words, a list for each of \['not"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ({}, "of the 8 images that it is about none has a value of cancer that is in one of its classes"),
        ({"implant": [False]}, "images.implant: no image is false; it is known of none"),
        ({"race": ["white"]}, "images.race: no image is white; there are White"),
        ({"view": ["CC"], "age": [90, 95]}, "images.age: no image is 90 to 95; there are 50, 51, 52, 53"),
        ({"age": [50, 50], "reason": ["diagnostic"]}, "none of these images meets all of the task's `images`"),
    ],
)
def test_a_task_without_an_image_says_which_fact_is_in_the_way(images: dict[str, Any], reason: str) -> None:
    views = [
        (replace(one, race="White", age=50 + number, reason="diagnostic" if number else "screening"), view)
        for number, one in enumerate(study(number, "test") for number in range(4))
        for view in one.views
    ]
    assert why_none_of(Task("x", "cancer", {"no": [False], "yes": [True]}, images), views) == reason


def test_names_of_tasks_are_names_of_folders_and_unlike(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("mine", "cancer", "retrieval"):
            (tmp_path / folder / f"{name}.yaml").write_text(OWN)
    mine = [str(tmp_path / folder / "mine.yaml") for folder in "ab"]
    assert len(load_tasks([mine[0], mine[0], "cancer"])) == 2
    with pytest.raises(ConfigError, match=r"mine.yaml and .*mine.yaml have one name, mine; rename one of the files"):
        load_tasks(mine)
    (tmp_path / "b" / "Mine.yaml").write_text(OWN)  # on some systems both would be one folder
    with pytest.raises(ConfigError, match=r"have one name"):
        load_tasks([mine[0], str(tmp_path / "b" / "Mine.yaml")])
    for name in ("cancer", "retrieval"):
        with pytest.raises(ConfigError, match=f"{name} is the name of a shipped task or folder; rename the file"):
            load_task(str(tmp_path / "a" / f"{name}.yaml"))
    with pytest.raises(ConfigError, match=r"none.yaml: no such task, nor a shipped one \(asymmetry, birads"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"^eval\.tasks: \S+none.yaml: no such task"):
        load_tasks(["cancer", str(tmp_path / "none.yaml")])
