"""Figures of the report, each a `data:` address that a page can hold: charts as SVG, pictures as JPEG."""

from __future__ import annotations

import base64
import io
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mama.data.colour_map import inferno
from shards.schema import Box

# Told apart also by readers who do not see red and green alike (Okabe and Ito 2008).
COLOURS = {"trained": "#0072b2", "untrained": "#8c8c8c", "31 intensity percentiles": "#e69f00"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#22303c", "#d5dae0"
BOX_COLOUR = (255, 230, 40)  # BGR: cyan, a colour that the heat map does not have
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "xtick.color": "#5a6772",
    "ytick.color": "#5a6772",
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "mama",
}


def training_curves(records: list[dict[str, float]], local_start: int) -> str:
    """Loss terms, in-batch accuracies, learning rate and logit scales over the steps of log.jsonl."""
    panels = {"loss": "loss/", "in-batch accuracy": "accuracy/", "learning rate": "lr/", "logit scale": "scale/"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        for number, (title, prefix) in enumerate(panels.items()):
            axes = figure.add_subplot(2, 2, number + 1)
            told = {name for record in records for name in record if name.startswith(prefix)}
            names = sorted(told - {"scale/largest"})  # the cap would flatten the curves; the caption names it
            for colour, name in zip(SERIES, names, strict=False):
                points = [(record["step"], record[name]) for record in records if name in record]
                label = name.removeprefix(prefix).replace("_", " ")
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
            if "loss/local" in names and 0 < local_start <= records[-1]["step"]:
                axes.axvline(local_start, color=INK, linewidth=0.8, linestyle=":")
                note = " the local term enters"
                axes.annotate(note, (local_start, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
            axes.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, 1.05 * axes.dataLim.y1 if names else None))
            if len(names) > 1:
                axes.legend(fontsize=8)
        return _svg(figure)


def roc_curves(curves: list[dict[str, Any]]) -> str:
    """One panel per protocol; a curve is {protocol, model, false_positive, true_positive, label}."""
    protocols = list(dict.fromkeys(curve["protocol"] for curve in curves))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(protocols), 4.6), layout="constrained")
        for number, protocol in enumerate(protocols):
            axes = figure.add_subplot(1, len(protocols), number + 1)
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
            for curve in curves:
                if curve["protocol"] == protocol:
                    colour = COLOURS.get(curve["model"], INK)
                    axes.plot(
                        curve["false_positive"], curve["true_positive"], color=colour, linewidth=2, label=curve["label"]
                    )
            axes.set(title=protocol, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            axes.legend(loc="lower right", fontsize=8)
        return _svg(figure)


def confusion_matrix(counts: list[list[int]], classes: list[str], title: str) -> str:
    """Rows are the true class, columns the predicted one; the shade is the share of the row."""
    table = np.array(counts, dtype=float)
    totals = table.sum(1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    side = 1.5 + 0.5 * len(classes)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*table.shape):
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{int(table[row, column])}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 3 else 0, ha="center")
        axes.set_yticks(
            range(len(classes)), [f"{name} ({int(n)})" for name, n in zip(classes, totals[:, 0], strict=True)]
        )
        axes.set(title=title, xlabel="predicted", ylabel="true")
        axes.tick_params(length=0)
        return _svg(figure)


def picture(pixels: NDArray[np.uint8]) -> str:
    """A grey [h, w] or BGR [h, w, 3] image."""
    return _address("image/jpeg", cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())


def boxed(pixels: NDArray[np.uint8], boxes: list[Box]) -> NDArray[np.uint8]:
    """Grey [h, w] or BGR -> BGR with the outlines of `boxes`."""
    coloured = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR) if pixels.ndim == 2 else pixels.copy()
    for x0, y0, x1, y1 in boxes:
        cv2.rectangle(coloured, (round(x0), round(y0)), (round(x1), round(y1)), BOX_COLOUR, 2, cv2.LINE_AA)
    return np.asarray(coloured, dtype=np.uint8)


def heat(pixels: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`values` [gh, gw] laid over grey [h, w]: from nothing at their smallest to bright at their largest."""
    span = float(values.max() - values.min())
    shares = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    smooth = np.clip(cv2.resize(shares.astype(np.float32), pixels.shape[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = inferno((smooth * 255).astype(np.uint8)).astype(np.float32)
    opacity = 0.75 * smooth[..., None]
    grey = np.repeat(pixels[..., None], 3, axis=2).astype(np.float32)
    return np.asarray(np.rint(grey * (1 - opacity) + colours * opacity), dtype=np.uint8)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _address("image/svg+xml", buffer.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
