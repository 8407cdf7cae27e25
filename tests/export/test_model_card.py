"""The model card and the figures beside it: what `mama eval` measured of a model, where a reader of it looks."""

from __future__ import annotations

import getpass
import json
import logging
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel

from mama.data.batches import tokenise
from mama.errors import ConfigError
from mama.evaluate import own_figures, result_folders
from mama.evaluate.evaluation import evaluate
from mama.evaluate.sets import evaluate_sets
from mama.export.consolidate import Export, consolidate
from mama.export.figures import CALIBRATION, METRICS, read_calibration, read_metrics
from mama.export.licences import TERMS, licence_of
from mama.export.model_card import CARD, write_card
from mama.export.model_folder import load_model, weights_digest
from mama.run.files import DIGESTS, check_digests, write_with_digest
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.schema import Config, Tokens
from shards.read.manifest import load_manifest, save_manifest
from shards.sources.all_sources import SOURCES
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run, small_run
from tests.support.tiny_backbones import TEXT, VISION

BESIDE = (CARD, METRICS, CALIBRATION)  # files of a model folder that an evaluation writes


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was consolidated and then evaluated; tests that change it work on a copy."""
    config = small_run(tmp_path_factory.mktemp("jane-roe"), val=20)
    consolidate(config)
    evaluate(config, config.run_folder)
    return config


@pytest.fixture
def own(evaluated: Config, tmp_path: Path) -> Config:
    """A copy of it."""
    shutil.copytree(evaluated.runs, tmp_path / "runs")
    return replace(evaluated, runs=str(tmp_path / "runs"))


def model_of(config: Config) -> Path:
    return config.run_folder / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(path: Path) -> dict[str, Any]:
    """The content of a file of figures but for its digest."""
    document: dict[str, Any] = json.loads(path.read_text())
    del document["digest"]
    return document


def results(config: Config, task: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((config.run_folder / "eval" / task / "metrics.json").read_text())
    return document


def trained_rows(config: Config, task: str) -> list[dict[str, Any]]:
    return [row for row in results(config, task)["rows"] if row["model"] == "trained"]


def quick(config: Config, **settings: Any) -> Config:
    return replace(config, eval=replace(config.eval, tasks=["cancer"], bootstrap=0, heat_maps=0, **settings))


def test_the_head_is_one_that_the_hub_reads(evaluated: Config) -> None:
    card = ModelCard.load(model_of(evaluated) / CARD)
    assert (card.data.license, card.data.license_name) == ("other", "terms-of-training-data")
    assert card.data.datasets == ["invented"]
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    found = {
        (
            one.dataset_config,
            one.metric_type,
            "zero-shot" in one.metric_name,
            re.findall(r"by (\w+)", one.metric_name)[0],
        ): (
            one.metric_value,
            one.metric_args,
        )
        for one in card.data.eval_results
    }
    expected = {
        (task, kind, row["protocol"] == "zero-shot", row["unit"]): (
            round(row["metrics"][name]["value"], 4),
            {
                "confidence": 0.95,
                "low": round(row["metrics"][name]["low"], 4),
                "high": round(row["metrics"][name]["high"], 4),
            },
        )
        for task in evaluated.eval.tasks
        for row in trained_rows(evaluated, task)
        if row["unit"] in ("image", results(evaluated, task)["unit"])
        for kind, name in (("roc_auc", "auc"), ("balanced_accuracy", "balanced_accuracy"))
    }
    assert found == expected


def test_the_card_shows_the_figures(evaluated: Config) -> None:
    text = (model_of(evaluated) / CARD).read_text()
    assert "**Not for clinical use.**" in text
    assert "The split `test` of shards: 7 patients, 14 images. It was trained on none of these patients." in text
    assert "`calibration.json` turns zero-shot scores into calibrated probabilities" in text
    pointing = results(evaluated, "alignment")
    rates = {row["model"]: row["hit_rate"] for row in pointing["rows"]}
    hits, brightest = rates["trained"], rates["brightest patch"]["value"]
    assert (
        f"{hits['value']:.3f} [{hits['low']:.3f}, {hits['high']:.3f}] of {pointing['findings']} findings of "
        f"{pointing['patients']} patients (of a random patch of tissue {pointing['chance']:.3f}; of the brightest "
        f"patch {brightest:.3f})."
    ) in text
    for row in trained_rows(evaluated, "density"):
        if row["unit"] in ("image", "exam"):
            auc = row["metrics"]["auc"]
            shown = f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"
            assert f"| density | {row['protocol']} | {row['unit']} | {shown} |" in text


def test_the_digests_do_not_cover_what_an_evaluation_writes(evaluated: Config) -> None:
    model = model_of(evaluated)
    check_digests(model, "never")
    assert not set(BESIDE) & json.loads((model / DIGESTS).read_text()).keys()
    assert all((model / name).is_file() for name in BESIDE)


def test_the_calibration_is_that_of_the_evaluation(evaluated: Config) -> None:
    found = read_calibration(model_of(evaluated))
    assert found
    assert found.model == weights_digest(model_of(evaluated))
    fitted = False
    for task in evaluated.eval.tasks:
        document, own = results(evaluated, task), found.tasks[task]
        assert own.prompts == document["prompts_digest"]
        assert list(own.classes) == [one["name"] for one in document["classes"]]
        rows = [row for row in trained_rows(evaluated, task) if row["protocol"] == "zero-shot"]
        assert own.units.keys() == {row["unit"] for row in rows}
        for row in rows:
            unit, calibration = own.units[row["unit"]], row["calibration"]
            assert unit.temperature == calibration["temperature"]["temperature"]
            assert list(unit.isotonic or []) == calibration["isotonic"].get("steps", [])
            assert (unit.reason, unit.pool) == (calibration["isotonic"]["reason"], row["pool"])
            assert unit.n == {"image": 40, "breast": 40, "exam": 20, "patient": 20}[row["unit"]]
            fitted |= unit.isotonic is not None
    assert fitted, "at least one of them has steps"


def test_nothing_names_a_person_or_a_place(evaluated: Config) -> None:
    """In no file of the folder, nor in the headers of those with tensors."""
    manifest = load_manifest(Path(evaluated.data.shards[0]))
    secrets = [evaluated.runs, "jane-roe", "/tmp", "/home", "/root", "~/", manifest.shards[0].patients[0], "hash.key"]
    secrets += [rf"\b{word}\b" for word in (socket.gethostname(), getpass.getuser())]
    for name, content in contents(model_of(evaluated)).items():
        text = content.partition(b"}}")[0] if name.endswith(".safetensors") else content
        for secret in secrets:
            assert not re.search(secret.encode(), text), (name, secret)


def require_same_by_code_of_the_card(config: Config, model: Path, base: str | None = None) -> None:
    """What plain transformers make of the folder is what the model makes of it."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", (model / CARD).read_text(), re.S) if "transformers" in c)
    pixels = torch.rand(3, 1, *config.data.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[0, ..., 13:] = pixels[1] = -1  # one image has background, one is nothing else
    names: dict[str, Any] = {"pixels": pixels}
    exec(code.replace("path/to/this/folder", str(model)).replace('"base"', f'"{base}"'), names)
    loaded, tokenizer = load_model(model, torch.device("cpu"), base)
    texts = [["Findings: irregular mass, spiculated margin.", "Impression: BI-RADS 5."], ["Impression: BI-RADS 2."]]
    with torch.no_grad():
        images, _ = loaded.embed_images(pixels)
        embedded = loaded.embed_texts(tokenise(tokenizer, texts, config.data.max_tokens))
    torch.testing.assert_close(names["embed_images"](pixels), images, atol=1e-5, rtol=0)
    alone = torch.cat([names["embed_text"](sentences) for sentences in texts])
    torch.testing.assert_close(alone, embedded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("vision", "text", "tokens"),
    [
        (None, None, "all"),
        ("vit", "llama", "all"),
        ("dinov3_vit", "bert", "all"),
        ("dinov2_with_registers", "llama", "tissue"),
        ("vit", "llama", "tissue"),
        ("dinov3_vit", "bert", "tissue"),
    ],
)
def test_the_code_of_the_card_runs(
    evaluated: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vision: str | None,
    text: str | None,
    tokens: Tokens,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = evaluated
    if vision and text:
        longer = {"bert": "max_position_embeddings", "llama": "max_position_embeddings"}[text]
        config = replace(
            evaluated,
            runs=str(tmp_path / "runs"),
            vision=replace(evaluated.vision, config=VISION[vision], tokens=tokens),
            text=replace(evaluated.text, config=TEXT[text] | {"vocab_size": 300, longer: 256}),
        )
        save_run(config)
        consolidate(config)
    require_same_by_code_of_the_card(config, model_of(config))


def test_the_code_of_a_card_with_an_adapter_runs(evaluated: Config, tmp_path: Path) -> None:
    """Also where the language model lost some of its blocks."""
    shape = AutoConfig.for_model(**TEXT["gpt2"] | {"vocab_size": 300, "n_positions": 256})
    AutoModel.from_config(shape).save_pretrained(tmp_path / "base")
    load_tokenizer(evaluated.run_folder).save(tmp_path / "base")
    text = replace(evaluated.text, model=str(tmp_path / "base"), config={}, layers=2)
    config = replace(evaluated, runs=str(tmp_path / "runs"), text=text)
    save_run(config)
    model = consolidate(config, Export(lora="adapter", out=tmp_path / "out"))
    assert 'AutoModel.from_pretrained("base"' in (model / CARD).read_text()
    require_same_by_code_of_the_card(config, model, str(tmp_path / "base"))


def test_figures_stay_with_their_checkpoint(own: Config, tmp_path: Path) -> None:
    model = model_of(own)
    before = {name: (model / name).read_bytes() for name in BESIDE}
    consolidate(own)
    assert {name: (model / name).read_bytes() for name in BESIDE} == before
    consolidate(own, Export(dtype="bf16", out=tmp_path / "elsewhere"))
    assert {name: (tmp_path / "elsewhere" / name).read_bytes() for name in BESIDE[1:]} == dict(list(before.items())[1:])
    stale = figures(model / METRICS)
    del stale["tasks"]["cancer"]
    write_with_digest(tmp_path / "elsewhere" / METRICS, stale)
    consolidate(own, Export(out=tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / METRICS).read_bytes() == before[METRICS], "those of the run's own folder are newer"
    consolidate(own, Export(dtype="bf16"))
    text = (model / CARD).read_text()
    assert {name: (model / name).read_bytes() for name in BESIDE[1:]} == {name: before[name] for name in BESIDE[1:]}
    assert "measured with other weights of the same checkpoint: fp32, LoRA merged. These here are bf16" in text
    assert read_calibration(model), "the scores of both differ in the last digits alone"
    save_run(own, step=5)
    consolidate(own)
    assert not (model / METRICS).exists()
    assert "It has not been evaluated yet" in (model / CARD).read_text()
    assert ModelCard.load(model / CARD).data.eval_results is None


def test_figures_of_another_export_are_said_to_be_its(own: Config) -> None:
    model = model_of(own)
    for name in (METRICS, CALIBRATION):
        write_with_digest(model / name, figures(model / name) | {"model": "of an earlier export"})
    before = {name: (model / name).read_bytes() for name in (METRICS, CALIBRATION)}
    consolidate(own)
    assert {name: (model / name).read_bytes() for name in before} == before
    assert "They were measured with an earlier export of this checkpoint: " in (model / CARD).read_text()


def test_figures_of_another_checkpoint_are_refused(own: Config) -> None:
    model = model_of(own)
    kept = {name: (model / name).read_bytes() for name in (METRICS, CALIBRATION)}
    save_run(own, step=5)
    consolidate(own)
    for name, content in kept.items():
        (model / name).write_bytes(content)
    for read in (read_metrics, read_calibration):
        with pytest.raises(
            ConfigError, match="was measured with the weights of another checkpoint; run `mama eval` again"
        ):
            read(model)


def test_damaged_figures_are_refused_and_left_behind(own: Config, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(own)
    document = figures(model / CALIBRATION)
    document["tasks"]["cancer"]["units"]["image"]["temperature"] = -1
    write_with_digest(model / CALIBRATION, document)
    with pytest.raises(ConfigError, match=r"json: was edited or damaged \(temperature: -1 .*; run `mama eval` again"):
        read_calibration(model)
    consolidate(own)
    assert "figures of an evaluation are left behind" in caplog.text
    assert not (model / CALIBRATION).exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"x": [0.2, 0.1], "y": [0.0, 1.0]},
        {"x": [0.1], "y": [0.0, 1.0]},
        {"x": ["a"], "y": [1.0]},
        {"class": 2},
        {"class": "cancer"},
    ],
)
def test_steps_that_are_none_are_refused(own: Config, damage: dict[str, Any]) -> None:
    document = figures(model_of(own) / CALIBRATION)
    document["tasks"]["cancer"]["units"]["image"]["isotonic"] = [
        {"class": 1, "x": [0.1, 0.2], "y": [0.0, 1.0]} | damage
    ]
    write_with_digest(model_of(own) / CALIBRATION, document)
    with pytest.raises(ConfigError, match=r"calibration.json: was edited or damaged \(isotonic: "):
        read_calibration(model_of(own))


@pytest.mark.parametrize("seed", [None, 5])
def test_a_part_of_the_tasks_leaves_the_others(own: Config, seed: int | None) -> None:
    """Those of the same weights, images and settings, also where they are no more among the results of the run."""
    shutil.rmtree(own.run_folder / "eval")
    before = read_metrics(model_of(own)), read_calibration(model_of(own))
    some = replace(own, seed=own.seed if seed is None else seed, eval=replace(own.eval, tasks=["density"]))
    evaluate(some, own.run_folder)
    after = read_metrics(model_of(own)), read_calibration(model_of(own))
    assert all(before)
    if seed is None:
        assert after == before
    else:
        assert after != before
        assert [list(one.tasks) for one in after if one] == [["density"], ["density"]]


@pytest.mark.parametrize("name", [METRICS, CALIBRATION])
def test_a_digit_that_was_changed_is_noticed(own: Config, name: str) -> None:
    path = model_of(own) / name
    text = path.read_text()
    first = re.search(r"0\.\d+", text)
    assert first
    path.write_text(text.replace(first[0], f"{first[0][:-1]}{9 - int(first[0][-1])}", 1))
    with pytest.raises(ConfigError, match=rf"^{path}: was edited or damaged \(its own digest\); run `mama eval` again"):
        (read_metrics if name == METRICS else read_calibration)(model_of(own))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"on": ["elsewhere"]}, ""),
        ({"on": ["shards"]}, ""),
        ({"split": "val"}, "it shows the test split of the shards that the run was trained on"),
        ({"protocol": "paper"}, "its figures are those of eval.protocol=standard, and this is paper"),
    ],
)
def test_other_evaluations_leave_the_model_folder_alone(
    own: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str
) -> None:
    write_shards(tmp_path / "elsewhere", {"train": 2, "test": 3})
    places = {"elsewhere": str(tmp_path / "elsewhere"), "shards": own.data.shards[0]}
    config = quick(own, **settings | ({"on": [places[name] for name in settings["on"]]} if "on" in settings else {}))
    caplog.set_level(logging.INFO)
    before = contents(model_of(own))
    evaluate_sets(config, own.run_folder)
    assert contents(model_of(own)) == before
    lines = [line for line in caplog.messages if "model card" in line]
    assert lines == ([f"the model card is left as it is: {told}"] if told else [])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"style": "caption"}, "data.style is caption, and the model was trained with report"),
        ({"fit": "stretch"}, "data.fit is stretch, and the model was trained with letterbox"),
        ({"image_size": (32, 24)}, "data.image_size is (32, 24), and the model was trained with (64, 48)"),
    ],
)
def test_other_settings_are_not_those_of_the_card(
    own: Config, caplog: pytest.LogCaptureFixture, data: dict[str, Any], told: str
) -> None:
    caplog.set_level(logging.INFO)
    before = contents(model_of(own))
    own_figures.record(replace(own, data=replace(own.data, **data)), own, own.run_folder, own.run_folder / "eval")
    assert contents(model_of(own)) == before
    assert caplog.messages == [f"the model card is left as it is: {told}"]


def test_a_folder_that_cannot_be_written_ends_no_evaluation(
    own: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mama.evaluate.own_figures.write_figures", full)
    assert evaluate(quick(own), own.run_folder)["cancer"]["rows"]
    assert "the model card is left as it is: [Errno 28] No space left on device" in caplog.text


def test_weights_that_were_replaced_meanwhile_get_no_figures(
    own: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = result_folders.finish

    def finish(*arguments: Any) -> None:
        real(*arguments)
        save_run(own, step=5)
        consolidate(own)

    monkeypatch.setattr(result_folders, "finish", finish)
    evaluate(quick(own), own.run_folder)
    assert "holds other weights than those that were measured" in caplog.text
    assert not (model_of(own) / METRICS).exists()


def test_a_model_of_data_that_forbid_it_says_so_at_the_top(own: Config) -> None:
    shards = Path(own.data.shards[0])
    manifest = load_manifest(shards)
    save_manifest(replace(manifest, source="embed"), shards)
    try:
        consolidate(own)
    finally:
        save_manifest(manifest, shards)
    card = ModelCard.load(model_of(own) / CARD)
    assert card.data.license_name == "not-to-be-released"
    assert card.text.strip().startswith("> **Do not release this model.** It was trained on EMBED")


def test_every_archive_has_its_terms() -> None:
    assert TERMS.keys() == SOURCES.keys()
    assert licence_of(["phantom"], []) == ("apache-2.0", None)
    assert licence_of(["cdd_cesm"], []) == ("cc-by-4.0", None)
    assert licence_of(["cdd_cesm", "cbis_ddsm"], []) == ("other", "terms-of-training-data")
    assert licence_of(["cdd_cesm"], ["facebook/dinov2-base"]) == ("other", "terms-of-training-data-and-base-models")
    assert licence_of(["cdd_cesm", "embed"], ["x"]) == ("other", "not-to-be-released")


def test_words_of_the_user_do_not_break_the_card(own: Config) -> None:
    """Titles, names of classes and folders are theirs."""
    model = model_of(own)
    document = figures(model / METRICS)
    document["tasks"]["cancer"]["title"] = "a | b\n<script>"
    document["data"]["names"] = ["x: {y}\n---"]
    write_with_digest(model / METRICS, document)
    write_card(model)
    card = ModelCard.load(model / CARD)
    assert card.data.eval_results[0].dataset_name == "x: {y}\n---, 7 patients"
    assert "* `cancer`: a \\| b &lt;script>" in card.text
