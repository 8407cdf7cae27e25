"""From texts in YAML files and behind `key=` to typed values."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mama.errors import ConfigError
from mama.settings.load import load, load_profile, save
from mama.settings.schema import Config, DataConfig, TextConfig, VisionConfig
from shards.pack.settings import PackConfig

# As a shell would hand them over. YAML 1.1 makes a number, a truth value, a date or nothing of many, and cuts others.
TEXTS = [
    *(
        "1.10",
        "007",
        "yes",
        "No",
        "on",
        "off",
        "true",
        "12:30",
        "1_000",
        "1e3",
        "0x1f",
        "0o17",
        ".5",
        "2026-11-26",
        "~",
    ),
    *(
        "/data/exam #3",
        "/data/a: b",
        "a,b",
        "[a]",
        "{a}",
        "a=b",
        "50%",
        "@home",
        "`x`",
        "!x",
        "&x",
        "*x",
        "|",
        ">",
        "?",
    ),
    *("- a", "-", "it's", '"half', "'half", "'a' b", "$HOME", "${oc.env:HOME}", "${a.b}", "???", "C:\\x", "\\", "a  b"),
    *(
        "ü",
        "e\u0301",
        "乳房",
        "🩻",
        "NaN",
        ".inf",
        "None",
        "Null",
        "<<",
        "x" * 300,
        "9" * 400,
        "1e999",
        "wide " * 60,
        "a" * 90 + "  b",
    ),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return written(tmp_path, "{}")


def test_a_text_behind_the_file_stays_as_it_is_typed_and_is_found_again(empty: Path, tmp_path: Path) -> None:
    texts = [*TEXTS, "", " a ", " "]
    for text in texts:
        config = load(empty, [f"pack.root={text}", f"data.cache={text}"])
        assert (config.pack.root, config.data.cache) == (text, text)
    config = Config(data=DataConfig(shards=texts), pack=PackConfig(options={"a": texts}))
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "text", ["1.10", "007", "yes", "12:30", "1_000", "0x1f", "2026-11-26", "~", "1e3", "true", "="]
)
def test_a_text_in_a_file_stays_as_it_is_typed(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, f"pack: {{root: {text}}}\ndata:\n  shards: [{text}, '{text}']\n  cache: {text} # said\n")
    config = load(file)
    assert (config.pack.root, config.data.cache, config.data.shards) == (text, text, [text, text])
    assert load(file, [f"data.shards=[{text}, c d]"]).data.shards == [text, "c d"]


def test_quotes_around_a_text_are_taken_off(empty: Path) -> None:
    for typed, text in (("''", ""), ('"007"', "007"), ("'null'", "null"), ('"a #3"', "a #3"), ("'it''s'", "it's")):
        assert load(empty, [f"pack.root={typed}"]).pack.root == text
    assert load(empty, ['data.shards=["a,b", \'c #3\', "[d]"]']).data.shards == ["a,b", "c #3", "[d]"]


def test_null_is_nothing_where_nothing_is_allowed(empty: Path, tmp_path: Path) -> None:
    assert load(empty, ["text.model=null", "vision.model="]).text.model is None
    named = load(empty, ["text.model='null'"])
    assert named.text.model == "null"
    save(named, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == named
    assert load(empty, ["text.layers=null"]).text.layers is None
    for key, fix in (
        ("pack.root", """but this is a text; leave the line out, or write '"null"' for the word"""),
        ("data.shards", "is not a list; write [] for an empty one"),
        ("train.steps", "is not a whole number"),
        ("vision.config", "is not a mapping; write {key: value}, or {} for an empty one"),
        ("data.image_size", "is not a list of 2 values; write for example [1, 2]"),
        ("train.precision", "is not one of 'fp32', 'bf16'"),
        ("train", "but this is a section; its first key is train.steps"),
    ):
        assert complaint(empty, f"{key}=null").replace("null, ", "null ", 1) == f"{key}: null {fix}"
    assert "$" not in complaint(written(tmp_path, "data: {image_size: null}"))


@pytest.mark.parametrize(
    ("typed", "value"),
    [("10", 10), ("+5", 5), (" 7 ", 7), ("'8'", 8), *((text, None) for text in ("010", "1_000", "1e3", "5.0", "0x10"))],
)
def test_whole_numbers(empty: Path, typed: str, value: int | None) -> None:
    if value is None:
        assert complaint(empty, f"train.steps={typed}").startswith(f"train.steps: {typed!r} is not a whole number")
    else:
        assert load(empty, [f"train.steps={typed}"]).train.steps == value


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("010", "; write 10"),
        ("1_000", "; write 1000"),
        ("_", ""),
        ("9" * 400, "is too large"),
        (str(2**63), "too large"),
    ],
)
def test_a_number_that_is_refused_says_how_to_write_it(empty: Path, typed: str, fix: str) -> None:
    message = complaint(empty, f"train.steps={typed}")
    assert fix in message
    assert len(message) < 120


@pytest.mark.parametrize("typed", ["1e-3", "1.0e-3", "0.001", ".001", "1E-03", "+.1e-2"])
def test_numbers_with_a_point_or_an_exponent(tmp_path: Path, typed: str) -> None:
    assert load(written(tmp_path, f"optim: {{lr: {typed}}}")).optim.lr == 1e-3
    config = load(written(tmp_path, "{}"), [f"vision.config.eps={typed}", f"optim.lr={typed}"])
    assert (config.vision.config, config.optim.lr) == ({"eps": 1e-3}, 1e-3)


@pytest.mark.parametrize(
    "typed", ["inf", "-.inf", "nan", ".NaN", "1e999", "1,5", "1_0.0", "12:30", "01.5", "yes", "[1]"]
)
def test_what_is_no_finite_number_is_named(empty: Path, typed: str) -> None:
    assert complaint(empty, f"optim.lr={typed}").startswith("optim.lr: ")


def test_an_infinite_end_of_a_range_is_saved_and_loaded(empty: Path, tmp_path: Path) -> None:
    config = load(empty, ["data.augment.crop_ratio=[1,.inf]"])
    assert config.data.augment.crop_ratio == (1.0, float("inf"))
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_truth_values_are_true_and_false(empty: Path) -> None:
    assert load(empty, ["train.grad_cache=True"]).train.grad_cache
    assert not load(empty, ["pack.crop=false"]).pack.crop
    for word in ("yes", "on", "1", "", "tRUE"):
        assert complaint(empty, f"pack.crop={word}").startswith("pack.crop: ")
        assert complaint(empty, f"pack.crop={word}").endswith("is not true or false")


def test_values_of_free_dictionaries_are_what_they_look_like(tmp_path: Path) -> None:
    """Rather as in JSON than as in YAML 1.1: see the head of mama/settings/typed_values.py."""
    typed = {
        "1": 1, "-3": -3, "010": "010", "1_0": "1_0", "0x1f": "0x1f", "1.10": 1.1, "1e-3": 1e-3,
        ".5": 0.5, ".inf": float("inf"),
        "inf": "inf", "nan": "nan", "true": True, "False": False, "yes": "yes", "off": "off", "12:30": "12:30",
        "2026-11-26": "2026-11-26", "null": None, "~": None, "'1'": "1", '"true"': "true", "a b": "a b",
    }  # fmt: skip
    lines = "".join(f"    k{n}: {text}\n" for n, text in enumerate(typed))
    expected = {f"k{n}": value for n, value in enumerate(typed.values())}
    config = load(written(tmp_path, f"vision:\n  config:\n{lines}"))
    assert config.vision.config == expected
    assert [type(value) for value in config.vision.config.values()] == [type(value) for value in expected.values()]
    behind = [f"vision.config.k{n}={text}" for n, text in enumerate(typed)]
    assert load(written(tmp_path, "{}"), behind).vision.config == expected
    assert load(written(tmp_path, "{}"), ["pack.options.separator=\t"]).pack.options == {"separator": "\t"}
    more = ["pack.options.file=exams #3.csv", "pack.options.columns={patient: '1.10', 7: [1, x]}"]
    assert load(written(tmp_path, "{}"), more).pack.options == {
        "file": "exams #3.csv",
        "columns": {"patient": "1.10", "7": [1, "x"]},
    }


def test_a_whole_dictionary_replaces_and_a_dotted_key_merges(tmp_path: Path) -> None:
    file = written(tmp_path, "vision: {config: {model_type: vit, hidden_size: 8, sub: {a: 1, b: 2}}}\n")
    before = {"model_type": "vit", "hidden_size": 8, "sub": {"a": 1, "b": 2}}
    for overrides, after in (
        (["vision.config={model_type: gpt2}"], {"model_type": "gpt2"}),
        (["vision.config={}"], {}),
        (["vision.config.hidden_size=48"], {**before, "hidden_size": 48}),
        (["vision.config.sub.b=3"], {**before, "sub": {"a": 1, "b": 3}}),
        (["vision.config.sub={c: 3}"], {**before, "sub": {"c": 3}}),
        (["vision.config.new.deep=x"], {**before, "new": {"deep": "x"}}),
        (["vision.config.a=1", "vision.config={b: 2}", "vision.config.c=3"], {"b": 2, "c": 3}),
        (["vision={config: {b: 2}}"], {"b": 2}),
    ):
        assert load(file, overrides).vision.config == after
    assert load(file, ["vision={config: {}}"]).vision.model == VisionConfig().model, "a section merges"
    assert load(file, ["pack.options.x=1", "train={steps: 3}"]).train.steps == 3
    assert "no mapping" in complaint(file, "vision.config.hidden_size.x=1")
    assert "no mapping" in complaint(file, "vision.config..x=1")
    assert "is not a mapping" in complaint(file, "vision.config=vit")


@pytest.mark.parametrize(
    "value", ["[a", "[a] b", "[a] #3", "{a: 1}", "[[a]]", "[{a: b}]", "[a: b]", "a,b", "a", "[*a]", "[!!str a]", "[@a]"]
)
def test_what_is_no_list_of_texts_is_refused_in_one_line(empty: Path, value: str) -> None:
    assert complaint(empty, f"data.shards={value}").startswith("data.shards: ")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vision: {config: {1: a, '1': b}}", "the key 1 is given twice (line 1, column 25)"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "the key train is given twice (line 2, column 1)"),
        ("vision: {config: {<<: {a: 1}}}", "merge keys are not supported; write the values out"),
        ("vision: {config: {? [a] : 1}}", "a list or mapping cannot be a key"),
        ("data: {shards: &a [x]}\nvision: {ignore: *a}", "anchors and aliases are not supported"),
        ("name: !!binary aGk=", "the tag tag:yaml.org,2002:binary is not supported"),
        ("name: a\n---\nname: b", "but found another document"),
        ("vision: {config: {a: " + "[" * 100_000, "nested deeper than 32 levels"),
        ("vision:\n  " + "- " * 200 + "x", "nested deeper than 32 levels"),
        ("a: 1 # " + "x" * 2**20, "holds more than 1048576 bytes"),
    ],
)
def test_yaml_that_could_be_read_in_two_ways_or_for_ever_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = written(tmp_path, text)
    message = complaint(path)
    assert message.startswith(f"{path}: ")
    assert why in message


def test_a_few_lines_that_stand_for_gigabytes_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for read in (load, load_profile):
        with pytest.raises(ConfigError, match="anchors and aliases are not supported"):
            read(written(tmp_path, "\n".join(lines)))


def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert complaint(path) == f"{path}: is not a regular file"
    assert complaint(tmp_path).startswith(f"{tmp_path}: no such run folder or configuration file")


@pytest.mark.parametrize("text", ["a\0b", "a\nb", "a\tb", "\x1b[31m", "\x85", "\udcff"])
def test_control_characters_are_refused(empty: Path, text: str) -> None:
    message = complaint(empty, f"pack.root={text}")
    assert message.startswith("pack.root: ")
    assert message.isascii()
    assert message.isprintable()


def test_any_text_is_saved_and_loaded(tmp_path: Path) -> None:
    """Also in free dictionaries, where texts that look like numbers must stay apart from numbers."""
    draw = random.Random(0)
    alphabet = " \t\n:#-?,[]{}&*!|>'\"%@`~=<\\/$.+_0123456789eExXinfatrulyso\x00\x7f\x85\u2028\ufeffü🩻"

    def text() -> str:
        return draw.choice(TEXTS) if draw.random() < 0.2 else "".join(draw.choices(alphabet, k=draw.randrange(8)))

    for _ in range(40):
        path = "".join(c for c in text() if c.isprintable())
        free: dict[str, Any] = {text(): text() for _ in range(4)} | {
            "n": [text(), {text(): draw.choice([1, 0.1, True, None])}]
        }
        config = Config(
            pack=PackConfig(root=path, options=free),
            data=DataConfig(shards=[path, "x"]),
            text=TextConfig(None, free),
            vision=replace(VisionConfig(), model=path),
        )
        save(config, tmp_path / "config.yaml")
        assert load(tmp_path / "config.yaml") == config
