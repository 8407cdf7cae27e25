"""Images and facts -> training pairs: an anchor view, a partner view, and the report texts of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mama.data import augment, report_text, sample_order, seen_findings
from mama.data.images import Images
from mama.data.sample_weights import sampling_probabilities, usable_images
from mama.data.unreadable import UnreadableSamples
from mama.settings.schema import Config, DataConfig
from shards.errors import FetchError, ShardError
from shards.schema import Study, View

ATTEMPTS = 100  # draws for one sample before giving up


@dataclass
class Pair:
    """One training sample before collation."""

    key: str  # "<study key>/<member>" of the anchor
    anchor: np.ndarray  # uint8 [H, W]
    partner: np.ndarray  # uint8 [H, W]
    anchor_change: np.ndarray  # float32 [10], augmentation parameters
    partner_change: np.ndarray
    anchor_sentences: list[str]  # of the anchor's report text
    partner_sentences: list[str]
    unreadable: int = 0  # unreadable samples drawn before, which this one replaces


def partner_of(study: Study, anchor: int, config: DataConfig, rng: np.random.Generator) -> int:
    """Draw a pair policy from the mixture and a partner view by it; the anchor itself if there is no candidate."""
    ends = np.cumsum(config.pair_weights or [1.0] * len(config.pairs))
    policy = config.pairs[sample_order.pick(ends, rng.random())]
    others = candidates(study, anchor, policy)
    return others[rng.integers(len(others))] if others else anchor


def candidates(study: Study, anchor: int, policy: str) -> list[int]:
    """The views other than `anchor` that a pair policy allows; none for `augment`."""
    here = study.views[anchor].laterality
    others = [n for n in range(len(study.views)) if n != anchor]
    if policy == "breast":
        return [n for n in others if study.views[n].laterality == here]
    if policy == "contralateral":
        return [n for n in others if study.views[n].laterality != here]
    return others if policy == "study" else []


class Pairs(Dataset[Pair]):
    """Training pairs by global sample index: `pairs[g]` depends on (manifests, seed, g) alone."""

    def __init__(self, config: Config, split: str = "train") -> None:
        self.config, self.seed = config.data, config.seed
        self.images = Images(config.data, split)
        usable = usable_images(self.images, config.data)
        probabilities = sampling_probabilities(self.images, config.data)
        self.anchors = np.flatnonzero(usable) if probabilities is None else None  # drawn once an epoch each
        self.ends = np.cumsum(usable if probabilities is None else probabilities)
        self.unreadable = UnreadableSamples(config.data.max_corrupt)

    @property
    def drawable(self) -> NDArray[np.bool_]:
        """Mask [n] of the images that may be anchors."""
        return np.diff(self.ends, prepend=0) > 0

    def __getitem__(self, index: int) -> Pair:
        """An unreadable sample is replaced by another one, which depends on the index alone too.

        Raises `ShardError` for more than `data.max_corrupt` of them in this process, and after `ATTEMPTS` draws.
        """
        for attempt in range(ATTEMPTS):
            number, anchor = self.images.locate(self.image(index, attempt))
            try:
                return replace(self._pair(index, number, anchor), unreadable=attempt)
            except FetchError:
                raise  # the network or disk is at fault: other samples would fail as well
            except ShardError as error:
                self.unreadable.add(self.images.key(number), error)
        raise ShardError(f"data.shards: {ATTEMPTS} samples drawn, all unreadable; run `mama check`")

    def image(self, index: int, attempt: int = 0) -> int:
        """The anchor image of sample `index`, or after unreadable ones a replacement."""
        if self.anchors is not None and not attempt:
            return int(self.anchors[sample_order.image_at(index, len(self.anchors), self.seed)])
        return sample_order.drawn_at(index, attempt, self.ends, self.seed)

    def _pair(self, index: int, number: int, anchor: int) -> Pair:
        """The pair of sample `index` with view `anchor` of study `number`."""
        rng = sample_order.generator_at(index, self.seed)
        study = self.images.study(number)
        partner = partner_of(study, anchor, self.config, rng)
        hidden = report_text.draw_hidden(rng, self.config.mask_probability)
        size = self.config.image_size
        pixels = self.images.pixels(number, anchor, size)
        others = pixels if partner == anchor else self.images.pixels(number, partner, size)
        anchor_change = augment.draw(self.config.augment, pixels, rng)
        partner_change = augment.draw(self.config.augment, others, rng)
        v = study.views[anchor]
        seen = seen_findings.in_view(v, anchor_change, self.config)
        w, seen_in_partner = self._partner_findings(study, anchor, partner, partner_change)
        return Pair(
            key=f"{study.key}/{v.member}",
            anchor=pixels,
            partner=others,
            anchor_change=anchor_change,
            partner_change=partner_change,
            anchor_sentences=seen_findings.text(study, v, seen, self.config, hidden),
            partner_sentences=seen_findings.text(study, w, seen_in_partner, self.config, hidden),
        )

    def _partner_findings(self, study: Study, anchor: int, partner: int, change: np.ndarray) -> tuple[View, list[bool]]:
        """The view that the partner's text is of, and whether each of its findings is seen in the partner.

        The view is the partner where that shows the other breast, else the anchor.
        """
        v, w = study.views[anchor], study.views[partner]
        if anchor == partner or v.laterality != w.laterality:
            return w, seen_findings.in_view(w, change, self.config)
        return v, seen_findings.in_other_view(v, w, change, self.config)
