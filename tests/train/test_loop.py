"""Training on two real ranks under the real DeepSpeed: interrupted and resumed, refused, consolidated."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from mama.data.batches import tokenise, training_batches
from mama.data.held_out import Split
from mama.data.pairs import Pairs
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError, RankError, TrainingError
from mama.evaluate.embeddings import embed_images
from mama.export.consolidate import consolidate
from mama.export.model_folder import load_model
from mama.model.mama_model import MamaModel, build
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker, run_digest
from mama.run.files import remove
from mama.run.run_folder import prepare
from mama.run.run_tokenizer import load_tokenizer
from mama.runtime.launch import run_on_ranks
from mama.settings.load import save
from mama.settings.schema import Config, OptimConfig
from mama.train import checkpoint
from mama.train.loop import train, train_rank
from mama.train.step_log import to_numbers
from shards.read.manifest import load_manifest, save_manifest
from tests.support.checkpoint_folder import weights_of
from tests.support.cohort import SIZE, write_shards
from tests.support.tiny_run import STEPS, config_of

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_shards(folder / "shards", {"train": 10, "val": 4, "test": 6})
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Config:
    """A run that nothing interrupts."""
    config = config_of(folder, "whole")
    train(config)
    return config


def weights(config: Config, step: int) -> dict[str, torch.Tensor]:
    """The trained weights after `step` steps, in fp32."""
    return weights_of(config.run_folder / "checkpoints" / f"step-{step:06d}")


def lines_of(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.run_folder / "log.jsonl").read_text().splitlines()]


def logged(config: Config) -> list[dict[str, float]]:
    """What the steps have logged, without the lines of validation."""
    return [line for line in lines_of(config) if "loss/total" in line]


def scores(config: Config) -> dict[int, float | None]:
    found = map(read_marker, checkpoints.checkpoints(config.run_folder))
    return {marker.step: marker.score for marker in found}


def start(folder: Path, config: Config) -> subprocess.Popen[str]:
    """`mama train` in a process group of its own."""
    save(config, folder / f"{config.name}.yaml")
    command = [sys.executable, "-m", "mama", "train", str(folder / f"{config.name}.yaml")]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], config: Config, lines: int) -> None:
    log = config.run_folder / "log.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


def test_a_run_told_to_stop_and_then_killed_resumes_to_the_same_weights(folder: Path, whole: Config) -> None:
    """Its activations are kept, as there is memory for them; those of the whole run are computed again."""
    config = config_of(folder, "killed")
    config = replace(config, train=replace(config.train, activation_checkpointing="auto"))
    process = start(folder, config)
    wait_for(process, config, 1)
    os.kill(process.pid, signal.SIGTERM)  # the launcher alone, as a cluster's step manager does
    _, said = process.communicate()
    assert process.returncode == 75, said
    stopped = read_marker(checkpoints.checkpoints(config.run_folder)[-1]).step
    assert stopped == len(logged(config)), "saved at the end of the step in which it was told"
    known = run_digest(config.run_folder)
    assert known
    assert {read_marker(path).run for path in checkpoints.checkpoints(config.run_folder)} == {known}
    assert "activations: kept (all take about 0.0 GiB, " in said
    assert f"a signal ended it after {stopped} of {STEPS} steps; run it again to continue" in said

    if stopped < STEPS - 1:
        process = start(folder, config)
        wait_for(process, config, stopped + 1)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    torn = config.run_folder / "checkpoints" / "step-000007"
    torn.mkdir(exist_ok=True)
    (torn / checkpoint.MARKER).unlink(missing_ok=True)
    train(config)

    one, two = weights(whole, STEPS), weights(config, STEPS)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert [line["step"] for line in logged(config)] == list(range(STEPS))
    for before, after in zip(logged(whole), logged(config), strict=True):
        assert before["loss/total"] == after["loss/total"], before["step"]


def test_a_finished_run_is_left_as_it_is(whole: Config) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole.run_folder / "checkpoints").rglob("*")}
    lines = logged(whole)
    train(whole)
    assert {p: p.stat().st_mtime_ns for p in (whole.run_folder / "checkpoints").rglob("*")} == before
    assert logged(whole) == lines


def test_frozen_weights_never_move_and_local_heads_wait_for_their_term(whole: Config) -> None:
    tokenizer = Tokenizer.load(whole.run_folder / "tokenizer")
    model = build(whole, tokenizer, "mama_sdpa")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    early, late = weights(whole, 2), weights(whole, STEPS)
    local = [
        name for name in start if name.startswith(("vision.norm.", "patch_head.", "sentence_head.", "local_scale."))
    ]
    assert len(local) == 19
    assert early.keys() == late.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in late:
        moved_early, moved_late = (not torch.equal(start[name], state[name]) for state in (early, late))
        if name in local:
            assert not moved_early, name
            assert moved_late, name
        elif "k_proj.bias" not in name and "attention.key.bias" not in name:  # softmax does not see these
            assert moved_early, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, r"^seed: 2, but .* was started with 1; give the run another name"),
        ({"train": {"global_batch": 16}}, r"^train\.global_batch: 16, but .* was started with 8"),
    ],
)
def test_a_run_is_not_resumed_with_another_configuration(whole: Config, change: dict[str, Any], message: str) -> None:
    if "train" in change:
        change = {"train": replace(whole.train, **change["train"])}
    with pytest.raises(ConfigError, match=message):
        prepare(replace(whole, **change))


def test_a_run_is_not_resumed_with_other_training_shards(folder: Path, whole: Config) -> None:
    """Studies that came to a set of shards would change which sample comes when."""
    place = folder / "shards" / "manifest.json"
    original = place.read_text()
    manifest = load_manifest(place.parent)
    more = replace(next(s for s in manifest.shards if s.split == "train"), name="train-000009.tar")
    save_manifest(replace(manifest, shards=(*manifest.shards, more)), place.parent)
    try:
        with pytest.raises(ConfigError, match=r"^data\.shards: .* has other training shards than when"):
            prepare(whole)
    finally:
        place.write_text(original)


def test_a_run_of_an_earlier_release_is_resumed_with_a_warning(whole: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Its crops were drawn from the canvas, and nothing in its configuration says so."""
    file = whole.run_folder / "config.yaml"
    written = file.read_text()
    assert prepare(whole)
    assert "earlier release" not in caplog.text
    try:
        file.write_text(re.sub(r"\n +(min_tissue|timeout|packing): .*", "", written))
        assert prepare(whole)
    finally:
        file.write_text(written)
    assert "an earlier release started it, without data.augment.min_tissue; its samples may" in caplog.text


def test_a_signal_before_the_ranks_listen_is_no_failure(folder: Path) -> None:
    config = config_of(folder, "early")
    process = start(folder, config)
    deadline = time.monotonic() + 120
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not [
        pid for pid in children.read_text().split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert said.strip().splitlines()[-1].startswith("mama: a signal ended it")


def test_a_first_start_that_failed_can_be_mended_under_the_same_name(folder: Path) -> None:
    config = config_of(folder, "mended", steps=1)
    config = replace(config, train=replace(config.train, ranks=1))
    with pytest.raises(ConfigError, match=r"^text\.layers: 9, but the model has 2"):
        train(replace(config, text=replace(config.text, layers=9)))
    train(config)
    assert checkpoints.checkpoints(config.run_folder)


def test_bf16_trains_on_two_ranks_and_its_losses_are_near_those_of_fp32(folder: Path, whole: Config) -> None:
    config = config_of(folder, "bf16", steps=3)
    train(replace(config, train=replace(config.train, precision="bf16")))
    first, reference = logged(config)[0], logged(whole)[0]
    for name in ("view", "anchor_text", "partner_text", "local"):
        assert first[f"loss/{name}"] == pytest.approx(reference[f"loss/{name}"], rel=0.02), name
    assert logged(config)[-1]["loss/total"] != first["loss/total"]


def test_validation_is_logged_and_scores_the_checkpoint_of_its_step(whole: Config) -> None:
    name = "validation/recall_at_5_i2t"
    validated = {line["step"] + 1: line for line in lines_of(whole) if name in line}
    assert set(validated) == {3, 6, STEPS}
    for step, score in scores(whole).items():
        both = [validated[step][name.replace("i2t", way)] for way in ("i2t", "t2i")] if step in validated else None
        assert score == (pytest.approx(sum(both) / 2) if both else None), step
    best = checkpoints.best(whole.run_folder)
    assert best is not None
    assert read_marker(best).score == max(score for score in scores(whole).values() if score is not None)


def validation_fails(config: Config) -> None:
    with patch("mama.train.pretraining.validate", side_effect=OSError(5, "the disk is gone")):
        train_rank(config)


def test_a_validation_that_fails_costs_no_step(folder: Path, whole: Config) -> None:
    """What it was to validate is saved before; the next start validates it, and goes on as if nothing had been."""
    config = config_of(folder, "unvalidated")
    config = replace(config, train=replace(config.train, zero_stage=2))
    with pytest.raises(RankError, match="the disk is gone"):
        run_on_ranks(validation_fails, config)
    assert scores(config) == {2: None, 3: None}
    assert [line["step"] for line in lines_of(config)] == [0, 1, 2]
    train(config)
    assert {step for step, score in scores(config).items() if score is not None} == {3, 6, STEPS}
    assert scores(config).keys() == scores(whole).keys()
    assert [line["step"] for line in lines_of(config)] == [line["step"] for line in lines_of(whole)]
    for before, after in zip(logged(whole), logged(config), strict=True):
        assert after["loss/total"] == pytest.approx(before["loss/total"], rel=1e-3), before["step"]


def test_a_rank_whose_samples_cannot_be_read_dies_and_does_not_wait_for_its_loader(folder: Path, whole: Config) -> None:
    """Its loader process ignores the signal with which Python ends the children of a dying process."""
    spoilt = folder / "spoilt"
    shutil.copytree(folder / "shards", spoilt)
    for tar in spoilt.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    config = replace(whole, data=replace(whole.data, shards=[str(spoilt)], max_corrupt=1))
    rank = multiprocessing.get_context("spawn").Process(target=unread, args=(config,))
    rank.start()
    rank.join(120)
    hangs = rank.is_alive()
    rank.kill()
    assert not hangs
    assert rank.exitcode == 1


def unread(config: Config) -> None:
    """A rank's loader alone."""
    with closing(training_batches(config, Tokenizer.load(config.run_folder / "tokenizer"), range(4), 0, 2)) as batches:
        list(batches)


def test_logged_values_are_those_of_their_tensors() -> None:
    values = {"a": torch.tensor(0.1), "b": torch.tensor(0.1, dtype=torch.bfloat16), "c": torch.tensor(float("inf"))}
    assert to_numbers(values) == {name: float(value) for name, value in values.items()}


def test_a_run_that_blows_up_skips_and_then_stops_with_its_samples(folder: Path) -> None:
    config = config_of(folder, "blown")
    config = replace(config, optim=OptimConfig(lr=1e30, warmup_steps=1), train=replace(config.train, max_skips=2))
    with pytest.raises(TrainingError, match=r"^step \d: loss or gradient was not finite in 2 steps in a row") as caught:
        train(config)
    named = str(caught.value).partition("of the last one: ")[2].split(", ")
    assert len(named) == config.train.global_batch, "of both ranks"
    assert [line["skipped_steps"] for line in logged(config)][-1] == 1


@pytest.fixture(scope="module")
def portable(whole: Config) -> Path:
    return consolidate(whole)


def test_the_consolidated_model_embeds_as_the_trained_one(whole: Config, portable: Path) -> None:
    tokenizer = Tokenizer.load(whole.run_folder / "tokenizer")
    trained: MamaModel = build(whole, tokenizer, "mama_sdpa")
    trained.load_state_dict(weights(whole, STEPS), strict=False)  # the rest is frozen
    trained.eval()
    loaded, its_tokenizer = load_model(portable, CPU)
    split = Split(whole, "test")
    one, two = (embed_images(m, split, whole, CPU, "x") for m in (trained, loaded))
    assert torch.allclose(torch.from_numpy(one.embeddings), torch.from_numpy(two.embeddings), atol=1e-6)
    texts = [Pairs(whole)[g].anchor_sentences for g in range(4)]
    with torch.inference_mode():
        a, b = (m.embed_texts(tokenise(t, texts, 64)) for m, t in ((trained, tokenizer), (loaded, its_tokenizer)))
    assert torch.allclose(a, b, atol=1e-5)
    assert loaded.scale().item() == pytest.approx(trained.scale().item())


def test_the_model_folder_is_portable(whole: Config, portable: Path, tmp_path: Path) -> None:
    """It loads without DeepSpeed, a network and its run, in another folder, and says what it was trained on."""
    assert {p.name for p in portable.iterdir()} == {
        "README.md",
        "config.yaml",
        "digests.json",
        "heads.safetensors",
        "model.json",
        "preprocessing.json",
        "text",
        "texts.json",
        "tokenizer",
        "trained_on.safetensors",
        "vision",
    }
    assert not [name for name in load_file(portable / "text" / "model.safetensors") if "lora" in name]
    assert re.search(r"^\| shards \| invented \| \d+ \| 10 \|", (portable / "README.md").read_text(), re.MULTILINE)
    moved, gone = tmp_path / "elsewhere", whole.run_folder.with_name("gone")
    portable.rename(moved)
    whole.run_folder.rename(gone)
    program = f"""
import sys
sys.modules["deepspeed"] = None
from pathlib import Path
import torch
from mama.export.model_folder import load_model
from transformers import AutoModel
model, _ = load_model(Path("elsewhere"), torch.device("cpu"))
assert AutoModel.from_pretrained("elsewhere/vision").config.hidden_size == model.vision.width
print(tuple(model.embed_images(torch.zeros(1, 1, {SIZE[0]}, {SIZE[1]}))[0].shape))
"""
    call = partial(subprocess.run, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    done = call([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    gone.rename(whole.run_folder)
    moved.rename(portable)
    assert done.stdout.strip() == "(1, 16)", done.stderr


def test_a_byte_that_changed_in_a_model_is_noticed(portable: Path, tmp_path: Path) -> None:
    shutil.copytree(portable, tmp_path / "model")
    for name in ("heads.safetensors", "text/model.safetensors", "config.yaml", "vision/config.json", "model.json"):
        file = tmp_path / "model" / name
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(ConfigError, match=rf"^{file}: its content has changed .*; run `mama consolidate` again$"):
            load_model(tmp_path / "model", CPU)
        file.unlink()
        with pytest.raises(ConfigError, match=rf"^{tmp_path}[^\n]*mama consolidate[^\n]*$"):
            load_model(tmp_path / "model", CPU)
        file.write_bytes(content)
    (tmp_path / "model" / "digests.json").unlink()  # as of an earlier version
    load_model(tmp_path / "model", CPU)


def test_a_killed_consolidate_leaves_a_whole_model(whole: Config, portable: Path) -> None:
    for killed_at in range(1, 4):
        calls = 0

        def killed(*arguments: Any, at: int = killed_at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return rename(*arguments)

        with patch.object(Path, "rename", killed), suppress(KeyboardInterrupt):
            consolidate(whole)
        load_model(portable, CPU)
        assert consolidate(whole) == portable
        assert not [path for path in whole.run_folder.iterdir() if path.suffix in (".old", ".partial")]


rename = Path.rename


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "tokenizer", "tokenizer/tokenizer.json"])
def test_a_run_whose_files_are_gone_or_empty_says_so_in_one_line(whole: Config, tmp_path: Path, name: str) -> None:
    moved = replace(whole, runs=str(tmp_path))
    shutil.copytree(whole.run_folder, moved.run_folder, ignore=shutil.ignore_patterns("model"))
    place = moved.run_folder / name

    def start() -> None:
        assert prepare(moved)
        load_tokenizer(moved.run_folder)

    start()
    if place.is_file():
        place.write_text("")
        with pytest.raises(ConfigError, match=rf"^{place}: [^\n]*; restore it from a copy$"):
            start()
        if name == "data.json":
            place.write_text("[]")
            with pytest.raises(ConfigError, match=rf"^{place}: holds a list, [^\n]*$"):
                start()
    remove(place)
    with pytest.raises(ConfigError, match=rf"^{place}: [^\n]+$"):
        start()


def test_a_setting_that_changes_nothing_is_named_once_at_each_start(tmp_path: Path) -> None:
    """By the first of two ranks, before the first step and when the run is resumed."""
    write_shards(tmp_path / "shards", {"train": 10}, known=("density",))
    base = config_of(tmp_path, "idle")
    config = replace(
        base,
        loss=replace(base.loss, local_start=0, local_sentences="findings"),
        train=replace(base.train, steps=2, global_batch=4, save_every=1, validate_every=0),
    )
    for before in ("/2 steps in", "resumed from"):
        process = start(tmp_path, config)
        _, said = process.communicate()
        assert process.returncode == 0, said
        (line,) = (line for line in said.splitlines() if "loss.local_sentences" in line)
        assert "none of the 20 images that the run draws has a text that tells findings" in line
        assert said.index(line) < said.index(before)
        assert {line["loss/local"] for line in logged(config)} == {0.0}
        remove(config.run_folder / "checkpoints" / "step-000002")
