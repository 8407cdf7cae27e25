"""The log and the TensorBoard files, read back by their own readers and in a browser, also after a resume."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mama.data import augment
from mama.data.batches import tokenise
from mama.model.flops import pair_flops
from mama.model.mama_model import build
from mama.settings.schema import Config, TrainConfig
from mama.train import grad_cache, throughput
from mama.train.monitor import Monitor
from mama.train.step_log import sentences_of, show_pair
from mama.train.throughput import Meter
from tests.support.browser import tensorboard
from tests.support.tiny_model import PAIRS, batch_of, model_of, on_tissue, tiny
from tests.support.word_tokenizer import WORDS, tokenizer


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def board_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard")).Reload()


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board_of(run).Scalars(name)]


def pictures(run: Path, name: str) -> list[tuple[int, np.ndarray]]:
    """RGB [h, w, 3] by step."""
    found = []
    for event in board_of(run).Images(name):
        picture = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert picture is not None
        found.append((event.step, picture))
    return found


def texts(run: Path, name: str) -> list[tuple[int, str]]:
    board = plugin_event_accumulator.EventAccumulator(str(run / "tensorboard"))  # the other one purges no text
    board.Reload()
    events = board.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def settings(run: Path) -> list[HParamsPluginData]:
    """What the run's files hold for the table of settings, in the order of writing."""
    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    found.append(HParamsPluginData.FromString(value.metadata.plugin_data.content))
    return found


def start(run: Path, first: int) -> Monitor:
    """A monitor as a process makes it a minute after the last one: readers sort the files by their second."""
    for file in run.glob("tensorboard/*"):
        earlier = re.sub(r"(?<=tfevents\.)\d+", lambda second: str(int(second[0]) - 60), file.name)
        file.rename(file.with_name(earlier))
    return Monitor(run, first)


def log_steps(run: Path, first: int, steps: range, value: float) -> None:
    monitor = start(run, first)
    for step in steps:
        monitor.log(step, {"loss/total": value + step, "lr": 1e-3})
    monitor.close()


def test_values_are_read_back_from_the_log_and_from_tensorboard(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(3), 0.5)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [line["loss/total"] for line in lines(tmp_path)] == [0.5, 1.5, 2.5]
    assert set(lines(tmp_path)[0]) == {"step", "time", "loss/total", "lr"}
    assert all(abs(line["time"] - time.time()) < 600 for line in lines(tmp_path)), "when it was logged"
    assert scalars(tmp_path, "loss/total") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [value for _, value in scalars(tmp_path, "lr")] == pytest.approx([1e-3] * 3)


def test_a_value_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    """Else a run killed after a checkpoint would lack the curves before it for ever."""
    monitor = Monitor(tmp_path, 0)
    monitor.log(0, {"loss/total": 1.0})
    assert [line["loss/total"] for line in lines(tmp_path)] == [1.0]
    assert scalars(tmp_path, "loss/total") == [(0, 1.0)]
    monitor.close()


def test_a_resume_rewrites_the_later_steps_without_a_fork(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(8), 0.0)  # this process died after step 7; its checkpoint is from before step 5
    log_steps(tmp_path, 5, range(5, 10), 100.0)
    expected = [(step, float(step)) for step in range(5)] + [(step, 100.0 + step) for step in range(5, 10)]
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path, "loss/total") == expected


def test_a_run_that_starts_again_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(4), 0.0)
    log_steps(tmp_path, 0, range(2), 50.0)
    assert [line["loss/total"] for line in lines(tmp_path)] == [50.0, 51.0]
    assert scalars(tmp_path, "loss/total") == [(0, 50.0), (1, 51.0)]


@pytest.mark.parametrize("torn", ['{"step": 3, "loss/to', '{"step"', "{"])
def test_a_torn_last_line_is_dropped_on_a_resume(tmp_path: Path, torn: str) -> None:
    log_steps(tmp_path, 0, range(3), 0.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(torn)
    log_steps(tmp_path, 4, range(4, 5), 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 4]


def test_a_whole_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(3), 0.0)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(tmp_path, 3, range(3, 4), 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}


def test_a_resume_leaves_no_fork_in_pictures_words_and_settings(tmp_path: Path) -> None:
    for grey, first in ((-1.0, 0), (0.0, 4), (1.0, 4)):  # started, killed, and killed once more
        monitor = start(tmp_path, first)
        monitor.hparams(Config())
        for step in range(first + 2, 8, 4):
            monitor.log(step, {"loss/total": grey})
            picture = torch.full((1, 6, 4), grey)
            monitor.show_pair(step, picture, picture, [f"grey {grey}"])
        monitor.close()
    assert scalars(tmp_path, "loss/total") == [(2, -1.0), (6, 1.0)]
    assert [(step, picture.mean()) for step, picture in pictures(tmp_path, "pair")] == [(2, 0), (6, 255)]
    assert texts(tmp_path, "pair") == [(2, "1. grey -1.0"), (6, "1. grey 1.0")]
    assert [data.WhichOneof("data") for data in settings(tmp_path)] == ["experiment", "session_start_info"]
    assert {p.name for p in (tmp_path / "tensorboard").iterdir() if p.is_dir()} == set()


def test_every_setting_stands_in_the_table_beside_the_results(tmp_path: Path) -> None:
    config = Config(name="fine", train=TrainConfig(steps=7, activation_checkpointing=False))
    config = replace(config, vision=replace(config.vision, model=None, config={"hidden_size": 24, "qkv_bias": True}))
    monitor = Monitor(tmp_path, 0)
    monitor.hparams(config)
    monitor.close()
    experiment, start = (getattr(data, str(data.WhichOneof("data"))) for data in settings(tmp_path))
    values = {name: getattr(v, str(v.WhichOneof("kind"))) for name, v in start.hparams.items()}
    assert values.keys() == {info.name for info in experiment.hparam_infos}
    expected = {
        "name": "fine", "train.steps": 7, "train.activation_checkpointing": "false", "optim.lr": 4e-5,
        "vision.model": "null", "vision.config.hidden_size": 24, "vision.config.qkv_bias": "true",
        "data.image_size": "[518, 518]", "data.augment.blur": 0.5, "text.config": "{}", "data.shards": "[]",
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert all(any(name.startswith(f"{section}.") for name in values) for section in vars(config) if section in
               ("pack", "data", "vision", "text", "heads", "loss", "optim", "train", "eval"))  # fmt: skip
    assert {info.name.tag for info in experiment.metric_infos} >= {"loss/total", "validation/recall_at_1_i2t"}


def test_of_a_point_of_a_sweep_the_table_has_only_what_differs(tmp_path: Path) -> None:
    differs = {"recipe": "slip", "optim.lr": 1e-3, "seed": 2, "loss.local": 0, "data.pairs": ["breast"]}
    (tmp_path / "point.json").write_text(json.dumps({"sweep": "lr", "differs": differs}))
    monitor = Monitor(tmp_path, 0)
    monitor.hparams(Config())
    monitor.close()
    (written,) = settings(tmp_path)
    assert written.WhichOneof("data") == "session_start_info", "a list of columns would hide the axes of other points"
    values = {name: getattr(v, str(v.WhichOneof("kind"))) for name, v in written.session_start_info.hparams.items()}
    assert values == differs | {"data.pairs": '["breast"]'}


def test_a_pair_is_shown_side_by_side_with_its_text(tmp_path: Path) -> None:
    anchor, partner = torch.full((1, 6, 4), -1.0), torch.full((1, 6, 4), 1.0)
    anchor[0, 2, 1] = 0.0
    monitor = Monitor(tmp_path, 0)
    monitor.show_pair(3, anchor, partner, ["Procedure: mammogram.", "Findings: none."])
    monitor.close()
    ((step, picture),) = pictures(tmp_path, "pair")
    expected = np.zeros((6, 8))
    expected[2, 1], expected[:, 4:] = 127.5, 255
    np.testing.assert_allclose(picture, np.repeat(expected[..., None], 3, axis=2), atol=1)
    assert step == 3
    assert texts(tmp_path, "pair") == [(3, "1. Procedure: mammogram.\n2. Findings: none.")]


def test_the_map_of_a_sentence_is_bright_where_it_points(tmp_path: Path) -> None:
    height, width, patch = 96, 64, 16
    maps = torch.full((5, 6 * 4), -0.2)
    maps[1, 2 * 4 + 3] = 0.6  # the second sentence: row 2, column 3
    maps[4, 0] = 0.2  # the fifth, less: row 0, column 0
    image = torch.linspace(-1, 1, height * width).reshape(1, height, width)
    monitor = Monitor(tmp_path, 0)
    monitor.show_maps(4, image, [f"sentence {n}" for n in "abcde"], maps)
    monitor.close()
    ((step, picture),) = pictures(tmp_path, "alignment")
    assert (step, picture.shape) == (4, (2 * height, 4 * width, 3))  # the image and five maps, four to a row
    tiles = [picture[r * height :, c * width :][:height, :width].astype(int) for r in range(2) for c in range(4)]
    np.testing.assert_allclose(tiles[0][..., 1], ((image[0] + 1) * 127.5).numpy(), atol=1)

    def light(tile: np.ndarray, row: int, column: int) -> int:
        return int(tile[row * patch + patch // 2, column * patch + patch // 2].sum())

    assert light(tiles[2], 2, 3) > 1.5 * light(tiles[5], 0, 0) > 4 * light(tiles[5], 2, 3)
    cells = {(r, c): light(tiles[2], r, c) for r in range(5) for c in range(4)}  # the number stands in the last row
    assert max(cells, key=lambda cell: cells[cell]) == (2, 3)
    assert light(tiles[1], 2, 3) == light(tiles[5], 2, 3) == light(tiles[2], 0, 0)  # one scale for all
    assert tiles[6].max() == tiles[7].max() == 0
    ((_, said),) = texts(tmp_path, "alignment")
    assert said.splitlines()[1] == "2. sentence b (cosine -0.200 to 0.600)"
    assert [line[:13] for line in said.splitlines()] == [f"{n}. sentence {s}" for n, s in enumerate("abcde", start=1)]


def test_the_map_of_tissue_alone_lies_on_its_patches(tmp_path: Path) -> None:
    """Of the last of two joined micro-batches; a patch that was not computed is dark, and has no cosine."""
    config = on_tissue(tiny(1))
    model = model_of(config).eval()
    batch = batch_of(config, range(1, 3))
    with torch.no_grad():
        joined = grad_cache._join([model(batch_of(config, range(6, 8))), model(batch)])
        anchor = augment.apply(batch.anchors[:1], batch.anchor_changes[:1])
        patches = model.patch_embeddings(anchor)[0]
    monitor = Monitor(tmp_path, 0)
    with mock.patch.object(monitor, "show_maps", wraps=monitor.show_maps) as shown:
        show_pair(monitor, 5, batch, joined, tokenizer())
    monitor.close()
    cosines = shown.call_args.args[3]
    assert joined.sentences is not None
    expected = joined.sentences[2, : len(cosines)] @ patches.t()
    assert 0 < expected.isnan().sum() < expected.numel()
    torch.testing.assert_close(cosines, expected, equal_nan=True, atol=1e-5, rtol=0)
    ((_, said),) = texts(tmp_path, "alignment")
    assert "nan" not in said
    assert pictures(tmp_path, "alignment")


def test_sentences_are_read_back_from_tokens() -> None:
    written = [["alpha beta", "gamma"], ["delta"], [" ".join(WORDS[1:4])]]
    batch = tokenise(tokenizer(), written, 4)
    assert [sentences_of(batch, row, tokenizer()) for row in range(3)] == [
        ["alpha beta"],  # cut to four tokens: there was no room for a second sentence
        ["delta"],
        ["alpha beta gamma"],
    ]


def test_the_meter_gives_rates_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e9)
    config = tiny(1)
    model, batch = build(config, tokenizer(), "mama_sdpa"), batch_of(config, range(PAIRS))

    def loader() -> Iterator[Any]:
        while True:
            clock[0] += 0.5  # the loader takes half a second
            yield batch

    batches, device = loader(), torch.device("cpu")
    meter = Meter(model, config.data.image_size, device)
    for micro_batches, seconds in ((1, 1.5), (3, 0.5)):
        for _ in range(micro_batches):
            assert torch.equal(meter.fetch(batches).anchors, batch.anchors)
            clock[0] += seconds
        values = meter.read()
        took = micro_batches * (0.5 + seconds)
        lengths = batch.texts.lengths
        assert values.pop("memory_gb") > 0.1
        work = pair_flops(model, config.data.image_size, lengths, each=len(lengths) / PAIRS)
        assert values == pytest.approx(
            {
                "pairs_per_second": micro_batches * PAIRS / took,
                "tokens_per_second": micro_batches * sum(lengths) / took,
                "data_wait_share": 0.5 / (0.5 + seconds),
                "mfu": work * micro_batches * PAIRS / took / 1e9,
            }
        )
    monkeypatch.setattr(throughput, "peak_flops", lambda device: None)
    assert "mfu" not in Meter(model, config.data.image_size, device).read()


def test_the_meter_counts_the_patches_that_training_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the images of training, not of those of a validation between its steps."""
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e9)
    config = on_tissue(tiny(1))
    model, batch = build(config, tokenizer(), "mama_sdpa"), batch_of(config, range(PAIRS))
    meter = Meter(model, config.data.image_size, torch.device("cpu"))
    whole = prod(side // 4 for side in config.data.image_size)
    assert "tissue_share" not in meter.read(), "before the first step"
    model(batch)
    model.eval()(batch)
    images = torch.cat([batch.anchors, batch.partners])
    pixels = augment.apply(images, torch.cat([batch.anchor_changes, batch.partner_changes]))
    blocks = (pixels > 8.5 / 127.5 - 1).unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).any(5).any(3)
    counts = blocks.flatten(1).sum(1).tolist()
    assert list(model.vision.lengths) == [model.vision.prefix + count for count in counts]
    meter.fetch(iter([batch]))
    values = meter.read()
    assert values["tissue_share"] == pytest.approx(sum(counts) / len(counts) / whole)
    texts = batch.texts.lengths
    each = len(texts) / PAIRS
    of_tissue = pair_flops(model, config.data.image_size, texts, images=list(model.vision.lengths), each=each)
    assert values["mfu"] == pytest.approx(of_tissue * values["pairs_per_second"] / 1e9)
    assert of_tissue < pair_flops(model, config.data.image_size, texts, each=each)


def ask(address: str, document: dict[str, Any] | None = None) -> Any:
    data = json.dumps(document).encode() if document else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_tensorboard_reads_a_resumed_run_as_one_without_a_fork(tmp_path: Path) -> None:
    curves = ("accuracy/image_to_text", "loss/local", "loss/total", "mfu", "validation/recall_at_1_i2t")
    for first in (0, 3):  # started, and resumed from step 3
        monitor = start(tmp_path, first)
        monitor.hparams(Config(name="watched"))
        for step in range(first, 5):
            monitor.log(step, dict.fromkeys(curves, first + step / 16))
            monitor.show_pair(step, torch.zeros(1, 16, 16), torch.ones(1, 16, 16), [f"From {first}."])
        monitor.show_maps(first, torch.zeros(1, 16, 16), ["Procedure: mammogram."], torch.zeros(1, 4))
        monitor.close()
    with tensorboard(tmp_path) as address:
        deadline = time.monotonic() + 120  # it reads the files after it has started to serve
        text = f"{address}data/plugin/text/text?run=.&tag="
        while "alignment/text_summary" not in ask(f"{address}data/plugin/text/tags").get(".", []) or [
            entry["step"] for entry in ask(f"{text}alignment/text_summary")
        ] != [0, 3]:  # the last that was written
            assert time.monotonic() < deadline
            time.sleep(0.1)
        said = [(entry["step"], re.findall("From [0-9]", entry["text"])) for entry in ask(f"{text}pair/text_summary")]
        points = {name: ask(f"{address}data/plugin/scalars/scalars?run=.&tag={name}") for name in curves}
        (group,) = ask(
            f"{address}data/plugin/hparams/session_groups",
            {"startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_UNKNOWN"],
             "colParams": [{"metric": {"tag": "loss/total", "group": ""}}]},
        )["sessionGroups"]  # fmt: skip
    assert said == [(step, [f"From {3 if step >= 3 else 0}"]) for step in range(5)]
    for name in curves:
        assert [(step, value) for _, step, value in points[name]] == [
            (step, step / 16 + (3 if step >= 3 else 0)) for step in range(5)
        ]
    assert group["hparams"]["name"] == "watched"
    assert {"loss/total": 3.25}.items() <= {m["name"]["tag"]: m["value"] for m in group["metricValues"]}.items()
