"""Sweeps from YAML: their points and names, mistakes in one line, and what is saved."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mama.errors import ConfigError
from mama.settings.checks import folder_name
from mama.settings.load import load, shipped_configs
from mama.settings.values import values_of, with_settings
from mama.sweep.definition import load_sweep, with_default_profile
from mama.sweep.names import short, token
from mama.sweep.points_table import describe_points
from mama.sweep.saved import save_sweep
from mama.sweep.sweep import STAGES, Evaluation, Sweep
from tests.support.checkout import CHECKOUT

SHIPPED = sorted(path.stem for path in (shipped_configs() / "sweeps").glob("*.yaml"))
RECIPE = "name: of-the-recipe\nruns: elsewhere\ndata: {shards: [runs/shards/x]}\noptim: {warmup_steps: 7}\n"
ROUND_TRIP = """
settings: {train.steps: 30, vision.config: {model_type: vit, hidden_size: 48}}
grid:
  data.image_size: [[32, 16], [64, 32]]
  vision.config.hidden_size: [48, 96]
  vision.model: [null, "null", "1e-3", "yes"]
list: [{}, {data.augment: {blur: 0, crop_scale: [0.5, 1]}}, {text.config: {a: 1, b: true, c: [1.5, null, "012"]}}]
random: {points: 3, seed: 5, optim.lr: {loguniform: [1e-5, 1e-3]}}
seeds: [0, 1]
stages: [eval, train]
evaluations: {own: {}, other: {data.shards: [b], eval: {tasks: [cancer], bootstrap: 0}}}
profiles: {default: cluster, eval: local}
at_once: 3
baseline: {recipe: two, data.image_size: [64, 32]}
"""

Write = Callable[..., Sweep]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE + (f"loss: {{view: {2 if name == 'two' else 1}}}\n"))
    return tmp_path


@pytest.fixture
def sweep(folder: Path) -> Write:
    """Load a sweep of these lines."""

    def loaded(text: str, *overrides: str, recipe: str = "one.yaml") -> Sweep:
        file = folder / "study.yaml"
        file.write_text(f"recipe: {recipe}\n{text}")
        return load_sweep(file, (f"runs={folder / 'runs'}", *overrides))

    return loaded


@pytest.fixture
def complaint(sweep: Write) -> Callable[..., str]:
    """The one line with which a sweep is refused, without the name of its file."""

    def refused(text: str, *overrides: str, **recipe: str) -> str:
        with pytest.raises(ConfigError) as caught:
            sweep(text, *overrides, **recipe)
        message = str(caught.value)
        assert "\n" not in message
        return re.sub(r"^\S*study\.yaml: ", "", message)

    return refused


def names(sweep: Sweep) -> list[str]:
    return [point.name for point in sweep.points]


def settings(sweep: Sweep, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(values_of(point.config)[key] for key in keys) for point in sweep.points]


def test_points_are_the_product_of_recipes_axes_and_seeds(sweep: Write) -> None:
    found = sweep(
        "grid: {optim.lr: [1e-4, 2e-4], loss.local: [0, 1]}\nlist: [{loss.anchor_text: 3}]\nseeds: [4, 0]",
        recipe="[one.yaml, two.yaml]",
    )
    cells = [(lr, local, 1.0) for lr in (1e-4, 2e-4) for local in (0.0, 1.0)] + [(4e-5, 1.0, 3.0)]
    expected = [(view, *cell, seed) for view in (1.0, 2.0) for cell in cells for seed in (4, 0)]
    assert settings(found, "loss.view", "optim.lr", "loss.local", "loss.anchor_text", "seed") == expected
    assert len(set(names(found))) == len(expected) == 20
    assert found.points[0].name == "one_lr-0.0001_local-0_seed-4"
    assert found.points[0].differs == {"recipe": "one", "optim.lr": 1e-4, "loss.local": 0.0, "seed": 4}
    assert list(found.points[-1].differs) == ["recipe", "loss.anchor_text", "seed"]


def test_each_point_is_an_ordinary_run_of_its_recipe(sweep: Write, folder: Path) -> None:
    (point,) = sweep("settings: {train: {steps: 3}, optim.lr: 1e-3}", "train.ranks=2").points
    runs = f"runs={folder}/runs/study"
    changes = ["train.steps=3", "optim.lr=1e-3", "train.ranks=2", runs, "name=one"]
    assert point.config == load(folder / "one.yaml", changes)
    assert point.config.run_folder == folder / "runs" / "study" / "one"


def test_defaults(sweep: Write, folder: Path) -> None:
    found = sweep("")
    assert (found.name, found.folder, found.own) == (
        "study",
        folder / "runs" / "study",
        folder / "runs" / "study" / "sweep",
    )
    assert found.stages == ["train", "consolidate", "eval"]
    assert found.evaluations == [Evaluation("eval")]
    assert (found.profiles, found.at_once, found.baseline) == ({}, None, {})


def test_what_is_done_with_the_points(sweep: Write) -> None:
    found = sweep(ROUND_TRIP, recipe="[one.yaml, two.yaml]")
    assert found.stages == ["train", "eval"]
    assert found.evaluations == [
        Evaluation("eval-own"),
        Evaluation("eval-other", {"data.shards": ["b"], "eval.tasks": ["cancer"], "eval.bootstrap": 0}),
    ]
    assert found.steps() == ["train", "eval-own", "eval-other"]
    assert (found.profiles, found.at_once) == ({"default": "cluster", "eval": "local"}, 3)
    assert found.baseline == {"recipe": "two", "data.image_size": (64, 32)}
    assert sweep("stages: [train]\nevaluations: {a: {}}").evaluations == []
    assert len(sweep("evaluations: {a: {}, b: {eval.split: val}, c: {data.shards: [y]}}").evaluations) == 3


def test_the_order_of_stages_is_that_of_the_line(sweep: Write) -> None:
    everything = (
        "settings: {pack: {source: phantom, out: runs/shards/x}}\nstages: [eval, pack, check, consolidate, train]"
    )
    assert sweep(everything).stages == list(STAGES)


@pytest.mark.parametrize(
    "grid",
    [
        "grid: {optim.lr: [1e-3, 0.001, 1.0e-3, .001]}",
        "grid: {optim: {lr: [1e-3, 0.001]}}",
        "grid: {optim.lr: [1e-3]}\nlist: [{optim.lr: 0.001}, {optim: {lr: 1.0e-3}}]",
        "grid: {optim.lr: [1e-3]}\nlist: [{optim.lr: 1e-3, loss.view: 1}, {optim.lr: 1e-3, data.style: report}]",
        "random: {points: 5, optim.lr: {choice: [1e-3, 0.001]}}",
    ],
)
def test_two_spellings_are_one_point(sweep: Write, grid: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = sweep(grid)
    assert names(found) == ["lr-0.001"]
    assert re.search(r"[1-4] of [2-5] points have the settings of another", caplog.text)


def test_recipes_that_are_the_same_are_one(sweep: Write, folder: Path) -> None:
    assert names(sweep("", recipe="[one.yaml, ./one.yaml]")) == ["one"]
    (folder / "copy.yaml").write_text((folder / "one.yaml").read_text())
    assert names(sweep("", recipe="[one.yaml, copy.yaml]")) == ["one"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("grid: {optim.lr: [1e-4]}", "grid: {optim.lr: [3e-4, 2e-4, 1e-4, 5]}"),
        ("grid: {optim.lr: [1e-4]}\nseeds: [3]", "grid: {optim.lr: [2e-4, 1e-4]}\nseeds: [1, 2, 3]"),
        ("list: [{loss.view: 0}]", "list: [{}, {heads.norm: batch}, {loss.view: 0, loss.local: 0}, {loss.view: 0}]"),
        ("list: [{text.config.a: 1}]", "list: [{text.config.a: 1}, {vision.config.a: 1}, {vision.model: x}]"),
        ("list: [{text.model: a/b}]", "list: [{text.model: a/b}, {text.model: c/b}, {vision.model: a/b}]"),
        ("random: {points: 3, optim.lr: {uniform: [0, 1]}}", "random: {points: 9, optim.lr: {uniform: [0, 1]}}"),
        ("seeds: [0]", "seeds: [0, 1]\nlist: [{}, {loss.view: 0}]"),
    ],
)
def test_more_points_rename_none(sweep: Write, before: str, after: str) -> None:
    first, more = sweep(before), sweep(after)
    assert set(names(first)) < set(names(more))
    assert {p.name: p.config for p in first.points}.items() <= {p.name: p.config for p in more.points}.items()


def test_a_point_that_ran_keeps_its_name_however_it_is_reached(sweep: Write) -> None:
    first = sweep("list: [{}, {loss.local: 0}]\nseeds: [0]")
    assert names(first) == ["one_seed-0", "local-0_seed-0"]
    more = "grid: {loss.view: [1, 0]}\nlist: [{loss.local: 0.0}, {loss.local: 0, loss.view: 0}]\nseeds: [0]"
    assert names(sweep(more))[0] == "view-1_seed-0"
    save_sweep(first)
    found = sweep(more)
    assert names(found) == ["one_seed-0", "view-0_seed-0", "local-0_seed-0", "local-0_view-0_seed-0"]
    assert found.points[0].differs == {"loss.view": 1.0, "seed": 0}


def test_a_new_point_takes_no_name_of_one_that_ran(sweep: Write, folder: Path) -> None:
    save_sweep(sweep("list: [{}]"))
    (folder / "one.yaml").write_text(RECIPE + "loss: {view: 0.5}\n")
    plain, new = names(sweep("list: [{loss.view: 1}, {}]"))
    assert plain == "one"
    assert re.fullmatch(r"one-[0-9a-f]{8}", new)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e-3, "0.001"),
        (1e-5, "1e-05"),
        (1.0, "1"),
        (-2, "-2"),
        (1e22, "1e22"),
        (True, "true"),
        (None, "null"),
        ("caption", "caption"),
        ([], "none"),
        ((224, 112), "224+112"),
        (["cancer", "density"], "cancer+density"),
        ({"a": 1, "b": None}, "a-1+b-null"),
    ],
)
def test_short_values(value: Any, name: str) -> None:
    assert token(value) == name


@pytest.mark.parametrize("value", ["a/b", "a b", "", "größe", "x" * 41, "a+b", "$(rm)", "a=b", "a,b", ["a/b"], "ends/"])
def test_values_that_a_name_cannot_hold_have_a_digest(value: Any) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]{0,40}-[0-9a-f]{6}", token(value))
    assert len({token(v) for v in (value, "a-b", "b", "a", "none", "x" * 40)}) == 6


def test_axes_are_short_where_no_other_setting_ends_alike() -> None:
    given = ["optim.lr", "seed", "text.model", "data.workers", "vision.config.hidden_size", "data.augment.blur"]
    assert [short(axis) for axis in given] == [
        "lr", "seed", "text.model", "data.workers", "vision.config.hidden_size", "blur",
    ]  # fmt: skip
    assert [short(f"finetune.{name}") for name in ("lr", "layer_decay")] == ["finetune.lr", "finetune.layer_decay"]


def test_long_names_are_cut_and_differ(sweep: Write) -> None:
    axes = ("data.augment.horizontal_flip", "data.augment.vertical_flip", "loss.partner_text_start", "loss.local_start")
    grid = ", ".join(f"{axis}: [0, 1]" for axis in axes)
    found = sweep(f"grid: {{{grid}, train.activation_checkpointing: [true, false], data.mask_probability: [0, 1]}}")
    assert len({name.lower() for name in names(found)}) == 64
    assert max(map(len, names(found))) == 100
    for name in names(found):
        folder_name("name", name)
        assert len(name) <= 100
        assert re.fullmatch(r"[A-Za-z0-9._+-]+", name)


def test_a_point_is_not_named_as_the_folder_of_the_sweeps_own_files(sweep: Write, folder: Path) -> None:
    (folder / "Sweep.yaml").write_text(RECIPE)
    (name,) = names(sweep("", recipe="Sweep.yaml"))
    assert re.fullmatch(r"Sweep-[0-9a-f]{8}", name)


def test_names_that_would_be_the_same_differ(sweep: Write, folder: Path) -> None:
    """Also in their capitals only, which some file systems do not tell apart."""
    (folder / "ONE.yaml").write_text(RECIPE + "loss: {view: 3}\n")
    found = names(sweep("", recipe="[one.yaml, ONE.yaml]"))
    assert len({name.lower() for name in found}) == 2


RANDOM = "random: {{points: {points}, seed: {seed}, {axes}}}"
AXES = {
    "optim.lr": "{loguniform: [1e-5, 1e-3]}",
    "optim.weight_decay": "{uniform: [0, 0.2]}",
    "text.lora_rank": "{choice: [4, 8, 16]}",
    "train.steps": "{uniform: [3, 5]}",
    "heads.embed_dim": "{loguniform: [16, 1024]}",
}


def drawn(sweep: Write, points: int, *axes: str, seed: int = 0) -> list[tuple[Any, ...]]:
    text = RANDOM.format(points=points, seed=seed, axes=", ".join(f"{axis}: {AXES[axis]}" for axis in axes))
    return settings(sweep(text), *axes)


def test_draws_are_in_their_range_and_cover_it(sweep: Write) -> None:
    rates, decays, ranks, steps, widths = zip(*drawn(sweep, 300, *AXES), strict=True)
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    below = sum(rate < 1e-4 for rate in rates)
    assert 110 < below < 190  # half of them, as the logarithm is uniform; a uniform draw would give 27
    assert all(0 <= decay <= 0.2 for decay in decays)
    assert 110 < sum(decay < 0.1 for decay in decays) < 190
    assert set(ranks) == {4, 8, 16}
    assert set(steps) == {3, 4, 5}
    assert all(isinstance(step, int) for step in steps)
    assert all(16 <= width <= 1024 for width in widths)
    assert 110 < sum(width < math.sqrt(16 * 1025) for width in widths) < 190
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


def test_draws_are_repeatable_and_grow_at_their_end(sweep: Write) -> None:
    once = drawn(sweep, 5, "optim.lr", "optim.weight_decay")
    assert drawn(sweep, 5, "optim.lr", "optim.weight_decay") == once
    assert drawn(sweep, 9, "optim.lr", "optim.weight_decay")[:5] == once
    assert drawn(sweep, 5, "optim.lr", "optim.weight_decay", seed=1) != once
    other = drawn(sweep, 5, "train.steps", "optim.lr")
    assert [lr for _, lr in other] == [lr for lr, _ in once]
    assert once[:2] == [(0.0009983, 0.118), (0.0001585, 0.03968)], "other draws would begin every sweep anew"


def test_a_recipe_without_a_section_pack_takes_that_of_its_shards(sweep: Write) -> None:
    found = sweep("stages: [pack, train]\nlist: [{}, {pack.root: mine}]", recipe="[clip, mama, slip]")
    of_mama = load("mama").pack
    assert [point.config.pack for point in found.points] == [of_mama, replace(of_mama, root="mine")] * 3


def test_packing_without_a_section_pack_is_refused(complaint: Callable[..., str]) -> None:
    expected = "stages: pack, but no recipe packs the data.shards of point one, ['runs/shards/x']; take pack out"
    assert complaint("stages: [pack, train]", recipe="[one.yaml, mama]").startswith(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: x", "nam: unknown key; did you mean name?"),
        ("train: {steps: 3}", "train: unknown key; settings of every point stand under settings:"),
        ("train.steps: 3", "train.steps: unknown key; settings of every point stand under settings:"),
        ("name: a/b", "name: 'a/b' is not the name of one folder"),
        ("settings: {optim.lrr: 3}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("settings: {optim: {lrr: 3}}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("settings: {learning_rate: 3}", "learning_rate: unknown key; did you mean optim.lr?"),
        ("settings: {optim: {lr: 1}, optim.lr: 1}", "optim.lr: is given twice, nested and dotted"),
        ("settings: {optim: 3}", "optim: '3', but this is a section; its first key is optim.lr"),
        ("settings: {name: x}", "settings: name: belongs to the sweep; write it beside settings"),
        ("settings: {runs: x}", "settings: runs: belongs to the sweep; write it beside settings"),
        ("settings: {seed: 1}\nseeds: [1]", "settings: seed: is given by seeds; leave it out"),
        ("settings: {train.steps: 1:30}", "train.steps: '1:30' is not a whole number"),
        ("settings: {train.steps: 012}", "train.steps: '012' is not a whole number; write 12"),
        ("settings: {train.compile: on}", "train.compile: 'on' is not true or false"),
        ("settings: {train.steps: 0}", "point one: train.steps: 0 is less than 1"),
        ("grid:", "grid: null is not a mapping; write {key: value}"),
        ("grid: {}", "grid: is empty; name at least one entry, or leave it out"),
        ("grid: {optim.lr: []}", "grid: optim.lr: is empty; name at least one value, or leave it out"),
        ("grid: {optim.lr: 1e-3}", "grid: optim.lr: '1e-3' is not a list; write [1e-3]"),
        ("grid: {vision.config: {a: [1, 2]}}", "grid: vision.config: {a: ['1', '2']} is not a list; write [...]"),
        ("grid: {optim.lr: [fast]}", "grid: optim.lr: 'fast' is not a number"),
        ("grid: {optim.lr: [-1]}", "point lr--1: optim.lr: -1.0 is not a number of at least 0"),
        ("grid: {loss.vew: [0]}", "grid: loss.vew: unknown key; did you mean loss.view?"),
        ("grid: {name: [a, b]}", "name: is no axis; points are named by what differs"),
        ("list: [{runs: a}]", "runs: is no axis; all points of a sweep lie in its folder"),
        ("grid: {seed: [1]}\nseeds: [0]", "seed: is no axis; write seeds: [0, 1, 2]"),
        ("random: {points: 2, seed: {choice: [1, 2]}, optim.lr: {choice: [1]}}", "random: seed: {choice: ['1', '2']}"),
        ("grid: {recipe: [clip]}", "grid: recipe: unknown key"),
        ("grid: {data.style: [caption]}\nlist: [{data.style: yes}]", "list: data.style: 'yes' is not one of 'report'"),
        ("list: {}", "list: {} is not a list"),
        ("list: []", "list: is empty"),
        ("list: [1]", "list: a point: '1' is not a mapping"),
        ("random: {optim.lr: {choice: [1]}}", "random: points: is missing; how many points shall be drawn?"),
        ("random: {points: 0, optim.lr: {choice: [1]}}", "random: points: 0 is less than 1"),
        ("random: {points: 2}", "random: names no axis; write for example"),
        ("random: {points: 2, optim.lr: 1e-3}", "random: optim.lr: '1e-3' is not a mapping"),
        ("random: {points: 2, optim.lr: {normal: [0, 1]}}", "random: optim.lr: {normal: ['0', '1']} is not one of uni"),
        ("random: {points: 2, optim.lr: {loguniform: [0, 1]}}", "random: optim.lr: ['0', '1'] has no logarithm"),
        ("random: {points: 2, optim.lr: {uniform: [1, 0]}}", "random: optim.lr: ['1', '0'] is not a smallest and a la"),
        ("random: {points: 2, optim.lr: {uniform: [1]}}", "random: optim.lr: ['1'] is not a smallest and a largest nu"),
        ("random: {points: 2, optim.lr: {uniform: [0, inf]}}", "random: optim.lr: ['0', 'inf'] is not a smallest and"),
        ("random: {points: 2, data.style: {uniform: [report, caption]}}", "random: data.style: ['report', 'caption']"),
        ("random: {points: 2, train.compile: {uniform: [false, true]}}", "random: train.compile: ['false', 'true'] is"),
        ("random: {points: 2, optim.lr: {choice: []}}", "random: optim.lr: is empty"),
        ("random: {points: 10001, optim.lr: {choice: [1]}}", "random: makes 10001 points; a sweep has at most 10000"),
        (f"grid: {{optim.lr: {[1] * 101}, loss.view: {[1] * 101}}}", "grid: makes 10201 points; a sweep has at most"),
        (f"grid: {{optim.lr: {[1] * 101}}}\nseeds: {[1] * 100}", "makes 10100 points; a sweep has at most 10000"),
        ("evaluations: {a: {}, b: {eval.tasks: [cancer]}}", "evaluations.b: evaluates the images of evaluations.a;"),
        ("seeds: 3", "seeds: '3' is not a list; write [3]"),
        ("seeds: []", "seeds: is empty; name at least one value, or leave it out"),
        ("seeds: [012]", "seeds: '012' is not a whole number; write 12"),
        ("seeds: [-1]", "point one_seed--1: seed: -1 is less than 0"),
        ("stages: [train, evl]", "stages: 'evl' is not one of pack, check, train, consolidate, eval"),
        ("stages: []", "stages: is empty"),
        ("stages: train", "stages: 'train' is not a list; write [train]"),
        ("evaluations: {}", "evaluations: is empty"),
        ("evaluations: {a: {eval.on: [y]}}", "evaluations.a: eval.on: ['y']; a sweep names them as evaluations.NAME."),
        ("evaluations: {a/b: {}}", "evaluations.a/b: a name has letters, digits and ._- only"),
        ("evaluations: {a: {optim.lr: 3}}", "evaluations.a: optim.lr: is a setting of training; an evaluation may cha"),
        ("evaluations: {a: {eval.task: [cancer]}}", "eval.task: unknown key; did you mean eval.tasks?"),
        ("evaluations: {a: {eval.tasks: [cancr]}}", "evaluations.a: point one: eval.tasks: 'cancr' is not one of canc"),
        ("profiles: {tran: cpu}", "profiles: 'tran' is not one of default, pack, check, train, consolidate, eval"),
        ("profiles: {train: nowhere}", "profiles.train: nowhere: no such profile, nor a shipped one (cluster, cpu, lo"),
        ("at_once: 0", "at_once: 0 is less than 1"),
        ("at_once: many", "at_once: 'many' is not a whole number"),
        ("baseline: {}", "baseline: is empty"),
        ("baseline: {recipe: clip}", "baseline: {recipe: 'clip'} is none of the points; name values of their axes"),
        ("grid: {loss.view: [0, 1]}\nbaseline: {loss.view: 2}", "baseline: {loss.view: '2'} is none of the points"),
        ("grid: {loss.view: [0, 1]}\nbaseline: {loss.viw: 2}", "loss.viw: unknown key; did you mean loss.view?"),
        ("seeds: [0]\nseeds: [1]", "not YAML: the key seeds is given twice"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(complaint: Callable[..., str], text: str, message: str) -> None:
    assert complaint(text).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nowhere", "nowhere: no such run folder or configuration file, nor a shipped one ("),
        ("[]", "recipe: is empty; name at least one value, or leave it out"),
        ("", "recipe: is missing; name a shipped recipe or a file"),
        ("[one.yaml, copies/one.yaml]", "recipe: FOLDER/one.yaml and FOLDER/copies/one.yaml would give points of the"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe_is_one_line(
    complaint: Callable[..., str], folder: Path, recipe: str, message: str
) -> None:
    (folder / "copies").mkdir()
    (folder / "copies" / "one.yaml").write_text(RECIPE)
    assert complaint("", recipe=recipe).replace(str(folder), "FOLDER").startswith(message)


@pytest.mark.parametrize("text", ["name: x", "grid: {optim.lr: [1]}"])
def test_a_sweep_names_its_recipe(folder: Path, text: str) -> None:
    (folder / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"study\.yaml: recipe: is missing; name a shipped recipe or a file"):
        load_sweep(folder / "study.yaml")


def test_changes_behind_the_sweep(sweep: Write, folder: Path) -> None:
    found = sweep("grid: {loss.view: [0, 1]}", "at_once=2", "seeds=[7]", "optim.lr=1e-3", "name=on", "stages=[train]")
    assert (found.name, found.at_once, found.stages) == ("on", 2, ["train"])
    assert found.folder == folder / "runs" / "on"
    assert settings(found, "optim.lr", "seed") == [(1e-3, 7)] * 2
    found = sweep("", "grid={optim.lr: [1e-3, 2e-3]}", "recipe=[one.yaml, two.yaml]")
    assert len(found.points) == 4


def test_a_change_inside_of_a_dictionary_keeps_the_rest_of_it(sweep: Write, folder: Path) -> None:
    (folder / "shaped.yaml").write_text(f"{RECIPE}vision: {{config: {{a: 0, b: 0, c: 0, d: 0}}}}\n")
    text = "settings: {vision.config.a: 1, vision.config.b: 1}\ngrid: {vision.config.d: [5, 6]}"
    first, second = sweep(text, "vision.config.b=2", "vision.config.c=2", recipe="shaped.yaml").points
    assert first.config.vision.config == {"a": 1, "b": 2, "c": 2, "d": 5}
    assert second.config.vision.config == {"a": 1, "b": 2, "c": 2, "d": 6}
    text = "settings: {vision.config.a: 1, vision.config: {b: 1}}"
    (point,) = sweep(text, "vision.config.a=2", recipe="shaped.yaml").points
    assert point.config.vision.config == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=3", "optim.lr: is an axis of the sweep; change it there"),
        ("seed=3", "seed: is an axis of the sweep; change it there"),
        ("at_onc=3", "at_onc: unknown key; did you mean at_once?"),
        ("optim.lrr=3", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("at_once", "at_once: expected key=value, for example train.steps=100"),
        ("at_once=0", "at_once: 0 is less than 1"),
        ("learning_rate=3", "learning_rate: unknown key; did you mean optim.lr?"),
    ],
)
def test_a_mistaken_change_is_one_line(complaint: Callable[..., str], override: str, message: str) -> None:
    assert complaint("grid: {optim.lr: [1, 2]}\nseeds: [0]", override).startswith(message)


def test_the_folder_of_a_run_is_no_sweep(complaint: Callable[..., str], folder: Path) -> None:
    (folder / "runs" / "study").mkdir(parents=True)
    (folder / "runs" / "study" / "config.yaml").write_text("{}")
    assert "is the folder of a run; choose another name" in complaint("")
    with pytest.raises(ConfigError, match="holds no sweep"):
        load_sweep(folder / "runs" / "study")


def test_files_are_found_beside_the_sweep_then_in_the_working_directory(
    sweep: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    Path("gpu.yaml").write_text("cluster: slurm")
    Path("cpu.yaml").write_text("cluster: slurm")
    (folder / "cpu.yaml").write_text("cluster: slurm")
    Path("three.yaml").write_text(RECIPE + "seed: 3\n")
    found = sweep("profiles: {default: gpu.yaml, pack: cpu.yaml, eval: cluster}", recipe="[three.yaml, one.yaml, clip]")
    assert found.profiles == {
        "default": str(folder / "elsewhere" / "gpu.yaml"),
        "pack": str(folder / "cpu.yaml"),
        "eval": "cluster",
    }
    assert names(found) == ["three", "one", "clip"]


def test_a_profile_given_on_the_command_line_is_found_from_elsewhere(
    sweep: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep is saved with it, and mama jobs retry reads that file."""
    (folder / "mine.yaml").write_text("cluster: slurm\n")
    monkeypatch.chdir(folder)
    found = with_default_profile(sweep("profiles: {default: local, eval: cpu}"), "mine.yaml")
    assert found.profiles == {"default": str(folder / "mine.yaml"), "eval": "cpu"}
    assert with_default_profile(found, "cluster").profiles == {"default": "cluster", "eval": "cpu"}
    with pytest.raises(ConfigError, match=r"nowhere: no such profile"):
        with_default_profile(found, "nowhere")


def test_a_saved_sweep_is_the_same_without_its_files(sweep: Write, folder: Path) -> None:
    first = sweep(ROUND_TRIP, recipe="[one.yaml, two.yaml]")
    assert len(first.points) == 2 * (2 * 2 * 4 + 3 + 3) * 2
    file = save_sweep(first)
    assert file == first.own / "sweep.yaml"
    for path in folder.glob("*.yaml"):
        path.unlink()
    assert load_sweep(first.folder) == load_sweep(file) == first
    again = load_sweep(first.folder, ("at_once=1", "stages=[eval]"))
    assert again == replace(first, at_once=1, stages=["eval"])
    assert save_sweep(first).read_bytes() == file.read_bytes()


def test_the_type_of_a_free_value_survives(sweep: Write) -> None:
    """As Python takes 1, 1.0 and true for the same."""
    first = sweep("grid: {text.config.x: [1, 1.0, true, '1', null, 'null', '1e-3', 'on']}")
    assert len(first.points) == 8
    save_sweep(first)
    kept = [point.config.text.config["x"] for point in load_sweep(first.folder).points]
    assert [repr(value) for value in kept] == ["1", "1.0", "True", "'1'", "None", "'null'", "'1e-3'", "'on'"]


def test_the_type_of_a_free_value_of_a_recipe_survives(sweep: Write, folder: Path) -> None:
    for name, value in (("a", "1"), ("b", "1.0"), ("c", "true")):
        (folder / f"{name}.yaml").write_text(f"{RECIPE}text: {{config: {{x: {value}}}}}\n")
    first = sweep("", recipe="[a.yaml, b.yaml, c.yaml]")
    save_sweep(first)
    kept = [point.config.text.config["x"] for point in load_sweep(first.folder).points]
    assert [repr(value) for value in kept] == ["1", "1.0", "True"]


def test_a_saved_sweep_is_where_it_lies(sweep: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep("seeds: [0, 1]")
    save_sweep(first)
    first.folder.rename(folder / "moved")
    found = load_sweep(folder / "moved")
    assert (found.name, found.folder) == ("moved", folder / "moved")
    assert [point.config.run_folder for point in found.points] == [folder / "moved" / name for name in names(first)]
    monkeypatch.chdir(folder / "moved")
    assert load_sweep(".") == load_sweep("sweep/sweep.yaml") == found


@pytest.mark.parametrize("change", ["optim.lr=3", "seeds=[1]", "name=x", "runs=x", "grid={optim.lr: [1]}"])
def test_the_points_of_a_saved_sweep_are_not_changed(sweep: Write, change: str) -> None:
    first = sweep("")
    save_sweep(first)
    with pytest.raises(ConfigError, match="holds points that were submitted; change the sweep's own file"):
        load_sweep(first.folder, (change,))


@pytest.mark.parametrize(
    "damaged", ["", "base: {}", "points: []", "base: {}\npoints: [{name: a}]", "base: {x: 1}\npoints: [{}]"]
)
def test_a_damaged_file_is_one_line(sweep: Write, damaged: str) -> None:
    first = sweep("")
    file = save_sweep(first)
    file.write_text(damaged)
    for load_it in (lambda: load_sweep(first.folder), lambda: sweep("")):
        with pytest.raises(ConfigError) as caught:
            load_it()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_large_sweep_is_read_back(sweep: Write) -> None:
    """A recipe ends at one megabyte; the points of a sweep may be more."""
    texts = ", ".join(f"{n}{'x' * 9000}" for n in range(120))
    first = sweep(f"grid: {{text.config.a: [{texts}]}}")
    assert save_sweep(first).stat().st_size > 2**20
    assert load_sweep(first.folder) == first
    assert sweep(f"grid: {{text.config.a: [{texts}]}}") == first


def test_an_evaluation_is_the_point_with_other_settings(sweep: Write) -> None:
    found = sweep("evaluations: {other: {data.shards: [b], eval.split: val}}")
    config = with_settings(found.points[0].config, found.evaluations[0].settings)
    assert (config.data.shards, config.eval.split) == (["b"], "val")
    assert config.run_folder == found.points[0].config.run_folder


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_loads(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_sweep(name)
    with pytest.raises(ConfigError, match="no such file; a shipped sweep is named without"):
        load_sweep(f"{name}.yaml")  # a mistyped file of one's own, and not the recipe of that name either
    assert found.folder.parent == Path("runs")
    assert not (shipped_configs() / f"{found.name}.yaml").exists(), "its folder would be that of the recipe's run"
    written = yaml.safe_load((shipped_configs() / "sweeps" / f"{name}.yaml").read_text())
    seeds = len(written.get("seeds", [0]))
    recipes = len(written["recipe"]) if isinstance(written["recipe"], list) else 1
    grid = math.prod(map(len, written["grid"].values())) if "grid" in written else 0
    entries = grid + len(written.get("list", [])) + written.get("random", {}).get("points", 0)
    assert len(found.points) == recipes * max(1, entries) * seeds
    save_sweep(found)
    assert load_sweep(found.folder) == found


def test_every_ablation_is_in_the_sweep_of_ablations() -> None:
    shipped = {path.stem for path in (shipped_configs() / "ablations").glob("*.yaml")}
    assert {point.differs["recipe"] for point in load_sweep("ablation").points} == {"mama", *shipped}


def test_the_points_of_the_paper_share_their_shards() -> None:
    points = load_sweep("paper").points
    assert all(point.config.pack == points[0].config.pack for point in points)


def test_the_example_of_the_documents_has_as_many_points_as_it_says(tmp_path: Path) -> None:
    block = (CHECKOUT / "docs/sweeps.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "rates.yaml").write_text(block)
    found = load_sweep(tmp_path / "rates.yaml", (f"runs={tmp_path}",))
    assert len(found.points) == 36
    assert "clip_lr-2e-05_tune-frozen_seed-1" in names(found)


def test_the_table_of_points(sweep: Write) -> None:
    found = sweep("list: [{loss.view: 0}, {data.shards: [a, bc], loss.view: 0.5}]\nseeds: [0]")
    assert list(describe_points(found)) == [
        "point                        loss.view  data.shards  seed",
        "view-0_seed-0                0                       0",
        'shards-a+bc_view-0.5_seed-0  0.5        ["a", "bc"]  0',
        f"2 points in {found.folder}",
    ]
