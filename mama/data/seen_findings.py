"""Which findings a random crop shows, and the report text of what is left: `data.findings=crop`.

A finding is seen if at least half of its box lies in the view that `mama.data.augment` makes, that is in the whole
window, with what stands beside a letterboxed crop. A finding without a box counts as seen, as nobody knows better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from mama.data import report_text
from mama.data.images import fit_box
from mama.settings.schema import DataConfig
from shards.schema import Box, Study, View

LEAST = 0.5  # of the area of a box that a view must hold
GRID = 64  # that share is counted at GRID x GRID positions of the box


def text(
    study: Study, view: View, seen: Sequence[bool], config: DataConfig, hidden: frozenset[str] = frozenset()
) -> list[str]:
    """The report text of an image of which the findings flagged in `seen` are told, as sentences.

    Whether a pathology is told is decided by all findings: that of an image with findings never is, as without crops.
    """
    tell = config.tell_pathology and not view.findings
    return report_text.text(study, as_seen(view, seen), config.style, hidden, tell)


def as_seen(view: View, seen: Sequence[bool]) -> View:
    """The facts of an image reduced to the findings that are flagged in `seen`.

    Where some are left, so are the labels, which these may explain; unless those left are all known to be benign and
    the labels or a finding that is cut away are malignant: then nobody can see what the labels are of, and BI-RADS,
    cancer and pathology become unknown. Where none is left they become unknown too, and the view looks normal: it shows
    neither mass nor calcification. A radiologist's own words are of no box in particular: an image that has them stays
    as it is.
    """
    kept, cut = (tuple(compress(view.findings, flags)) for flags in (seen, [not flag for flag in seen]))
    if not cut or report_text.own_words(view):
        return view
    unknown = replace(view.labels, birads=None, cancer=None, pathology=None)
    if not kept:
        labels = replace(unknown, pathology="normal")
    elif all(one.pathology == "benign" for one in kept) and (
        view.labels.cancer or "malignant" in (view.labels.pathology, *(one.pathology for one in cut))
    ):
        labels = unknown
    else:
        labels = view.labels
    return replace(view, findings=kept, labels=labels)


def in_view(view: View, change: np.ndarray, config: DataConfig) -> list[bool]:
    """Whether each finding of an image is seen after the augmentation `change` [10]; with `findings=image` all are."""
    if config.findings == "image":
        return [True] * len(view.findings)
    size, how = config.image_size, config.fit
    boxes = [finding.box and fit_box(finding.box, view.size, size, how) for finding in view.findings]
    return [box is None or share_in_view(box, change, size) >= LEAST for box in boxes]


def in_other_view(view: View, other: View, change: np.ndarray, config: DataConfig) -> list[bool]:
    """Whether each finding of `view` is seen in another view of the breast, after the augmentation `change` of that.

    A finding is there where one of the same number is, in one of its boxes. One that has no box there counts as seen.
    """
    seen: dict[int, bool] = {}
    for finding, flag in zip(other.findings, in_view(other, change, config), strict=True):
        if finding.box:
            seen[finding.number] = flag or seen.get(finding.number, False)
    return [seen.get(finding.number, True) for finding in view.findings]


def share_in_view(box: Box, change: np.ndarray, size: tuple[int, int]) -> float:
    """The share of a box, in pixels of the canvas `size` (H, W), that the view after `change` [10] holds."""
    x0, y0, x1, y1 = box
    steps = (np.arange(GRID) + 0.5) / GRID
    x, y = (2 * (low + steps * (high - low)) / side - 1 for low, high, side in ((x0, x1, size[1]), (y0, y1, size[0])))
    affine = change[:6].astype(np.float64).reshape(2, 3)  # of positions in the view to those on the canvas
    inverse = np.linalg.inv(affine[:, :2])[:, :, None, None]
    shown = inverse[:, 0] * (x - affine[0, 2]) + inverse[:, 1] * (y - affine[1, 2])[:, None]  # [2, GRID, GRID]
    return float((np.abs(shown) <= 1).all(axis=0).mean())
