"""Loading and saving configurations, shipped recipes and profiles, and the messages about mistakes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mama.errors import ConfigError
from mama.settings.load import load, load_profile, save, shipped_configs
from mama.settings.pretrained import locate
from mama.settings.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from mama.settings.values import SYNONYMS, known_keys
from shards.read.remote import local_folder
from shards.sources.all_sources import SOURCES

RECIPES = sorted(path.name for path in shipped_configs().glob("*.yaml"))
ABLATIONS = sorted(f"ablations/{path.name}" for path in (shipped_configs() / "ablations").glob("*.yaml"))
PROFILES = sorted(path.name for path in (shipped_configs() / "slurm").glob("*.yaml"))


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(path: str | Path, *overrides: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value as YAML has it; the mappings that are the user's own stay whole."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        dotted = prefix + key
        if isinstance(value, dict) and dotted not in ("pack.options", "vision.config", "text.config"):
            flat |= leaves(value, f"{dotted}.")
        else:
            flat[dotted] = list(value) if isinstance(value, tuple) else value
    return flat


@pytest.mark.parametrize("name", RECIPES + ABLATIONS)
def test_a_recipe_is_its_file_over_the_defaults(name: str) -> None:
    written_there = leaves(yaml.safe_load((shipped_configs() / name).read_text()))
    assert leaves(asdict(load(name))) == leaves(asdict(Config())) | written_there


# Written although it is the default: the core count of a machine, and what a reader looks for in a recipe.
REPEATED = {
    "cdd_cesm.yaml": {"data.augment.jitter", "data.augment.vertical_flip", "optim.weight_decay"},
    "quickstart.yaml": {"data.augment.vertical_flip", "pack.workers", "train.log_every"},
    "sample_dicom.yaml": {"pack.long_side"},
    "mama_published_code.yaml": {
        *("data.findings", "vision.tokens", "vision.local_block", "text.packing", "loss.view", "loss.local_start"),
        *("text.sentences", "loss.local_sentences", "loss.local_patches", "loss.local_pooling"),
    },
}


ON_EMBED = ("mama_published_code.yaml", "clip.yaml", "slip.yaml", "convirt.yaml")  # on the shards of configs/mama.yaml


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_differences_from_the_defaults(name: str) -> None:
    given, defaults = leaves(yaml.safe_load((shipped_configs() / name).read_text())), leaves(asdict(Config()))
    assert {key for key, value in given.items() if defaults[key] == value} <= REPEATED.get(name, set())


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_and_can_be_run(name: str) -> None:
    config = load(shipped_configs() / name)
    assert config == load(Path(name).stem)
    assert config.name != Config().name
    assert config.pack.source in SOURCES or name in ON_EMBED
    if config.data.shards:
        packed = load("mama").pack.out if name in ON_EMBED else config.pack.out
        assert config.data.shards == [packed]
        assert config.train.accumulation(config.train.ranks) >= 1


def test_recipes_and_profiles_are_shipped() -> None:
    assert {"quickstart.yaml", "cdd_cesm.yaml", "sample_dicom.yaml"} <= set(RECIPES)
    assert {"local.yaml", "cluster.yaml"} <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_every_shipped_profile_loads(name: str) -> None:
    profile = load_profile(f"slurm/{name}")
    assert profile.cluster == {"local.yaml": "local", "cluster.yaml": "slurm"}.get(name, profile.cluster)


def test_a_file_of_the_user_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("name: mine\n")
    assert load("quickstart").name == "mine"
    assert load("quickstart.yaml").name == "quickstart"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 7, ranks: 3}\ndata: {augment: {blur: 0.25}}\n")
    config = load(path, ["train.steps=9", "name=mine=yours", "data.augment.jitter=0"])
    assert (config.train.steps, config.train.ranks, config.train.global_batch) == (9, 3, TrainConfig().global_batch)
    assert config.data.augment == replace(AugmentConfig(), blur=0.25, jitter=0.0)
    assert config.name == "mine=yours"
    assert load(path, ["train.steps=9", "train.steps=11"]).train.steps == 11


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "\n"])
def test_a_file_without_a_setting_does_not_start_the_recipe_of_the_paper(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert complaint(path) == f"{path}: holds no setting; name at least one, or give a shipped file"


def test_an_empty_mapping_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "{}")) == Config()


def test_values_get_the_types_of_their_fields(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {image_size: [64, 48], shards: [a]}\noptim: {lr: 1, betas: [0, 1]}\n")
    config = load(path, ["data.shards=[b,c]", "text.model=null", "text.layers=2", "vision.config.hidden_size=96"])
    assert config.data.image_size == (64, 48)
    assert isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.0, 1.0)
    assert config.data.shards == ["b", "c"]
    assert (config.text.model, config.text.layers) == (None, 2)
    assert config.vision.config == {"hidden_size": 96}


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("train: {stepz: 3}", "train.stepz", "train.steps"),
        ("trian: {steps: 3}", "trian", "train"),
        ("data: {augment: {blurr: 0}}", "data.augment.blurr", "data.augment.blur"),
        ("pack: {long_sides: 3}", "pack.long_sides", "pack.long_side"),
    ],
)
def test_an_unknown_key_in_the_file_is_named_with_the_nearest_one(
    tmp_path: Path, text: str, wrong: str, right: str
) -> None:
    path = written(tmp_path, text)
    assert complaint(path) == f"{path}: unknown key {wrong}; did you mean {right}?"


@pytest.mark.parametrize(
    ("override", "wrong", "right"),
    [
        ("train.stepz=3", "train.stepz", "train.steps"),
        ("steps=3", "steps", "train.steps or finetune.steps"),
        ("data.augment.blurr=0", "data.augment.blurr", "data.augment.blur"),
        ("trainn.steps=3", "trainn.steps", "train.steps or finetune.steps"),
        ("optim.learning_rate=1e-4", "optim.learning_rate", "optim.lr"),
        ("learning_rate=1e-4", "learning_rate", "optim.lr"),
        ("train.batch_size=8", "train.batch_size", "train.global_batch"),
        ("train.workers=2", "train.workers", "pack.workers or data.workers"),
    ],
)
def test_an_unknown_key_behind_the_file_is_named_with_the_nearest_one(
    tmp_path: Path, override: str, wrong: str, right: str
) -> None:
    message = complaint(written(tmp_path, "{}"), override)
    assert message.startswith(wrong)
    assert "unknown key" in message
    assert message.endswith(f"did you mean {right}?")


def test_every_synonym_leads_to_a_setting() -> None:
    assert set(SYNONYMS.values()) <= set(known_keys(Config))


def test_a_key_like_no_other_gets_no_suggestion(tmp_path: Path) -> None:
    assert complaint(written(tmp_path, "{}"), "zzzzqqqq=3") == "zzzzqqqq: unknown key"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("train.steps", "many", "'many'"),
        ("train.steps", "1.5", "'1.5'"),
        ("train.ranks", "null", "null is not a whole number"),
        ("train.activation_checkpointing", "maybe", "'maybe' is not one of 'auto', true, false"),
        ("train.activation_checkpointing", "1", "'auto', true, false"),
        ("train.zero_stage", "true", "0, 1, 2"),
        ("train.precision", "fp99", "'fp32', 'bf16'"),
        ("train.zero_stage", "7", "0, 1, 2"),
        ("data.image_size", "5", "2 values"),
        ("eval.split", "all", "'train', 'val', 'test'"),
        ("pack.long_side", "long", "'long'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(tmp_path: Path, key: str, value: str, reason: str) -> None:
    section, name = key.split(".")
    path = written(tmp_path, f"{section}: {{{name}: {value}}}")
    in_file, behind_it = complaint(path), complaint(written(tmp_path, "{}"), f"{key}={value}")
    assert in_file.startswith(f"{path}: {key}: ")
    assert behind_it.startswith(f"{key}: ")
    assert reason in in_file
    assert reason in behind_it


def test_a_missing_file_names_the_shipped_recipes(tmp_path: Path) -> None:
    message = complaint(tmp_path / "none.yaml")
    assert message.startswith(f"{tmp_path / 'none.yaml'}: no such run folder or configuration file")
    assert all(Path(name).stem in message for name in RECIPES)


@pytest.mark.parametrize("text", ["train: [1", "a: b: c", "\tname: x", "name: !!python/object:os.system x"])
def test_what_is_not_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert complaint(path).startswith(f"{path}: not YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("- train\n- data\n", "list"), ("3", "text"), ("quickstart", "text")])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    path = written(tmp_path, text)
    assert complaint(path) == f"{path}: holds a {kind}, expected `key: value` lines"


def test_an_override_without_an_equals_sign_shows_how_to_write_it(tmp_path: Path) -> None:
    assert complaint(written(tmp_path, "{}"), "train.steps") == (
        "train.steps: expected key=value, for example train.steps=100"
    )


@pytest.mark.parametrize("value", ["[1", "{a: ", '"open'])
def test_an_override_that_is_not_yaml_is_refused(tmp_path: Path, value: str) -> None:
    assert complaint(written(tmp_path, "{}"), f"data.shards={value}").startswith("data.shards: ")


def test_an_override_of_one_item_of_a_list_is_refused(tmp_path: Path) -> None:
    assert "data.shards" in complaint(written(tmp_path, "{}"), "data.shards.0=a")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, b"name: caf\xe9\n")
    assert complaint(path).startswith(f"{path}: ")


def test_a_number_in_the_place_of_a_section_is_named(tmp_path: Path) -> None:
    assert "train:" in complaint(written(tmp_path, "train: 3")).removeprefix(f"{tmp_path}/mine.yaml: ")


@pytest.mark.parametrize("value", ["[a, b]", "[1, 2, 3]", "[1]"])
def test_a_wrong_pair_is_named_with_its_setting(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"data: {{image_size: {value}}}")
    message = complaint(path)
    assert message.startswith(f"{path}: data.image_size: ")
    assert "$" not in message


def test_one_folder_without_brackets_is_shown_with_them(tmp_path: Path) -> None:
    message = complaint(written(tmp_path, "{}"), "data.shards=somewhere")
    assert message.startswith("data.shards: ")
    assert "[somewhere]" in message


@pytest.mark.parametrize("text", ["train: {steps: '${'}", "2020-01-01: 3", "name: &a x", "vision: {config: *a}"])
def test_yaml_that_is_no_configuration_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert complaint(path).startswith(f"{path}: ")


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    assert "steps" in complaint(written(tmp_path, "train:\n  steps: 1\n  steps: 2\n"))


def test_a_short_key_without_its_section_is_suggested_with_it(tmp_path: Path) -> None:
    assert complaint(written(tmp_path, "{}"), "lr=1e-3").endswith("did you mean optim.lr or finetune.lr?")


def test_the_message_about_a_dotted_key_in_a_file_nests_it(tmp_path: Path) -> None:
    message = complaint(written(tmp_path, "train.steps: 3"))
    assert message.endswith("unknown key train.steps; in a file it is nested: train: {steps: ...}")


@pytest.mark.parametrize("override", ["data.image_size=[.inf,1]", "optim.lr=-1", "optim.warmup_steps=-1"])
def test_a_number_out_of_range_is_named(tmp_path: Path, override: str) -> None:
    assert complaint(written(tmp_path, "{}"), override).startswith(override.partition("=")[0] + ": ")


@pytest.mark.parametrize("override", ["=3", ".=3", "train.=3", "train.steps.more=1"])
def test_an_override_with_an_invalid_key_is_refused(tmp_path: Path, override: str) -> None:
    assert complaint(written(tmp_path, "{}"), override)


@pytest.mark.parametrize(
    "override",
    [
        "data.augment.blur=2",
        "data.augment.horizontal_flip=-1",
        "data.augment.crop_scale=[0,1]",
        "data.augment.crop_scale=[0.9,0.1]",
        "data.augment.crop_ratio=[0,1]",
        "data.augment.jitter_strength=-1",
        "data.workers=-1",
        "eval.batch=0",
        "eval.bootstrap=-1",
        "eval.tasks=[]",
        "seed=-1",
    ],
)
def test_a_value_out_of_range_is_refused_when_it_is_loaded(tmp_path: Path, override: str) -> None:
    assert complaint(written(tmp_path, "{}"), override).startswith(override.partition("=")[0] + ": ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["heads.norm=published", "data.style=caption"], "heads.norm: published takes the statistics of a text's sent"),
        (
            ["loss.local_sentences=findings", "data.style=sentence"],
            "loss.local_sentences: findings needs data.style=repo",
        ),
        (["loss.local_temperature=0"], "loss.local_temperature: 0.0 is not a number above 0"),
        (["heads.norm=published", "train.grad_cache=true"], "train.grad_cache: batch norms would take a micro-batch"),
        (["loss.negatives=published", "train.grad_cache=true"], "train.grad_cache: gathers negatives that loss.negat"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert complaint(written(tmp_path, "{}"), *overrides).startswith(message)


def test_saving_writes_every_field_so_that_other_defaults_change_no_run(tmp_path: Path) -> None:
    save(Config(), tmp_path / "config.yaml")
    assert leaves(yaml.safe_load((tmp_path / "config.yaml").read_text())) == leaves(asdict(Config()))


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_is_loaded_again(tmp_path: Path, name: str) -> None:
    config = load(name)
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_configuration_unlike_the_defaults_is_saved_whole(tmp_path: Path) -> None:
    config = Config(
        name="none: 'of' the \"defaults\" # ü",
        seed=9,
        data=DataConfig(
            shards=["a b", "c"],
            image_size=(3, 5),
            pairs=["breast", "augment"],
            pair_weights=[0.125, 3.0],
            mask_probability=0.0,
            max_tokens=2,
            workers=0,
            augment=AugmentConfig((0.1, 0.2), rotation=1e-9),
        ),
        vision=VisionConfig(None, {"model_type": "x", "nested": {"on": True, "nothing": None, "list": [1, 2.5]}}),
        text=TextConfig(None, {}, 3),
        train=replace(TrainConfig(), zero_stage=0, precision="fp32", attention="sdpa", activation_checkpointing=False),
        eval=EvalConfig(["density"], "val"),
    )
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert asdict(config)["data"]["image_size"] == (3, 5)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DataConfig, {"pairs": []}, "data.pairs: empty; name at least one of study, breast, contralateral, augment"),
        (
            DataConfig,
            {"pairs": ["study", "twins"]},
            "data.pairs: 'twins' is not one of study, breast, contralateral, augment",
        ),
        (
            DataConfig,
            {"pair_weights": [1.0]},
            "data.pair_weights: [1.0] has 1 weights, but data.pairs has 2 entries",
        ),
        *(
            (
                DataConfig,
                {"pair_weights": weights},
                f"data.pair_weights: {weights} holds no weight above 0, or one that is not a number of at least 0",
            )
            for weights in ([0.0, 0.0], [1.0, -0.5], [1.0, float("nan")], [1.0, float("inf")])
        ),
        (DataConfig, {"mask_probability": 1.01}, "data.mask_probability: 1.01 is not between 0 and 1"),
        (DataConfig, {"mask_probability": float("nan")}, "data.mask_probability: nan is not between 0 and 1"),
        (DataConfig, {"mask_probability": -0.5}, "data.mask_probability: -0.5 is not between 0 and 1"),
        (DataConfig, {"max_corrupt": -1}, "data.max_corrupt: -1 is less than 0, which allows no sample to fail"),
        (DataConfig, {"max_tokens": 1}, "data.max_tokens: 1 is less than 2, a token and its separator"),
        (DataConfig, {"image_size": (0, 9)}, "data.image_size: [0, 9] is not a height and a width in pixels"),
        (DataConfig, {"image_size": (9, -1)}, "data.image_size: [9, -1] is not a height and a width in pixels"),
        *(
            (TrainConfig, {name: 0}, f"train.{name}: 0 is less than 1")
            for name in ("steps", "global_batch", "micro_batch", "ranks", "log_every", "save_every", "keep_checkpoints")
        ),
        *(
            (TrainConfig, {"patience": minutes}, f"train.patience: {minutes} is not a number of minutes of at least 0")
            for minutes in (-1.0, float("nan"), float("inf"))
        ),
        (
            EvalConfig,
            {"tasks": ["cancer", "birds"]},
            "eval.tasks: 'birds' is not one of cancer, malignancy, birads, density, mass, calcification, asymmetry, "
            "distortion, cancer_without_implants, the path of a YAML file",
        ),
        (EvalConfig, {"fractions": []}, "eval.fractions: is empty; name at least one, or leave it out"),
        (EvalConfig, {"protocols": ["probe", "probe"]}, "eval.protocols: probe is named twice; name it once"),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_section_is_built(
    section: type[DataConfig | TrainConfig | EvalConfig], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == message


def test_the_ends_of_every_range_are_allowed(tmp_path: Path) -> None:
    DataConfig(pair_weights=[0, 1], mask_probability=1, max_tokens=2, image_size=(1, 1))
    TrainConfig(1, 1, 1, ranks=1, log_every=1, save_every=1, keep_checkpoints=1, patience=0)
    EvalConfig(["density", "birads", "malignancy", "cancer"])
    assert complaint(written(tmp_path, "{}"), "train.steps=0") == "train.steps: 0 is less than 1"


@pytest.mark.parametrize(
    ("whole", "micro", "ranks", "count"), [(288, 36, 8, 1), (288, 36, 1, 8), (12, 3, 2, 2), (6, 6, 1, 1)]
)
def test_a_step_is_cut_into_micro_batches(whole: int, micro: int, ranks: int, count: int) -> None:
    assert TrainConfig(global_batch=whole, micro_batch=micro).accumulation(ranks) == count


@pytest.mark.parametrize(("whole", "micro", "ranks"), [(12, 5, 1), (12, 4, 2), (6, 12, 1), (2, 1, 4)])
def test_a_step_that_cannot_be_cut_says_what_to_change(whole: int, micro: int, ranks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(global_batch=whole, micro_batch=micro).accumulation(ranks)
    assert str(caught.value) == (
        f"train.global_batch: {whole} is not a multiple of micro_batch x ranks = {micro} x {ranks}; "
        "change one of the three"
    )


def test_a_run_lies_in_a_folder_of_its_name() -> None:
    assert Config(name="a", runs="b/c").run_folder == Path("b/c/a")


def test_a_name_is_that_of_one_folder_inside_of_runs(tmp_path: Path) -> None:
    for name in ("1.10", "007", "a b", "ü-乳房", "mine=yours", "a.b", "_a", "x" * 200):
        assert load(written(tmp_path, "{}"), [f"name={name}"]).run_folder == Path("runs") / name
    path = "is not the name of one folder; the folder that holds it is runs=..."
    edge = "begins with '-', '.' or a blank, or ends with a blank; take it away"
    inside = "holds a control character or a %; take it out"
    for name, reason in (
        *((name, path) for name in ("", ".", "..", "a/b", "/etc", "../x", "a\\b", "a/", "~/x")),
        *((name, edge) for name in ("-rf", ".git", " a", "a ", "...")),
        *((name, inside) for name in ("a\nb", "a\0b", "\x1b[2J", "a\u2028", "a\u202eb", "\udcff", "a%jb")),
        ("ü" * 101, "is longer than 200 bytes"),
    ):
        with pytest.raises(ConfigError) as caught:
            Config(name=name)
        assert str(caught.value) == f"name: {name[:80]!r} {reason}"
        assert str(caught.value).isprintable()


def test_a_tilde_is_the_home_folder_where_folders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Config(runs="~/r", name="a").run_folder == Path("/home/me/r/a")
    assert Config(runs="~nobody-here/r", name="a").run_folder == Path("~nobody-here/r/a")
    assert local_folder("~/shards", Path("cache")) == Path("/home/me/shards")
    assert locate("vision.model", "~/dino")[0] == "/home/me/dino"
