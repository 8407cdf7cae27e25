"""Images and facts -> training pairs: an anchor view, a partner view, and the words of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from mama.data import augment, report_text, sample_order
from mama.data.images import Images
from mama.data.sample_weights import allowed, chances
from mama.data.unreadable import Corrupt
from mama.settings.schema import Config, DataConfig
from shards.schema import FetchError, ShardError, Study

ATTEMPTS = 100  # draws in place of one sample


@dataclass
class Pair:
    """One training sample before collation."""

    key: str
    anchor: np.ndarray
    partner: np.ndarray
    anchor_change: np.ndarray
    partner_change: np.ndarray
    anchor_text: list[str]
    partner_text: list[str]
    skipped: int = 0  # samples that were drawn in its place before and could not be read


def partner_of(study: Study, anchor: int, config: DataConfig, rng: np.random.Generator) -> int:
    """The partner view by a policy drawn from the mixture; the anchor itself where the policy finds no other."""
    ends = np.cumsum(config.pair_weights or [1.0] * len(config.pairs))
    policy = config.pairs[sample_order.pick(ends, rng.random())]
    others = candidates(study, anchor, policy)
    return others[rng.integers(len(others))] if others else anchor


def candidates(study: Study, anchor: int, policy: str) -> list[int]:
    """The other views that a pair policy allows beside `anchor`."""
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
        chance, own = chances(self.images, config.data), allowed(self.images, config.data)
        self.anchors = np.flatnonzero(own) if chance is None else None  # each once an epoch, or all by their chance
        self.ends = np.cumsum(own if chance is None else chance)
        self.corrupt = Corrupt(config.data.max_corrupt)

    def __getitem__(self, index: int) -> Pair:
        """A sample that cannot be read is replaced by another one, a function of the index like itself.

        Raises `ShardError` for more than `data.max_corrupt` of them in this process, and where nothing is readable.
        """
        for attempt in range(ATTEMPTS):
            number, anchor = self.images.locate(self._image(index, attempt))
            try:
                return replace(self._pair(index, number, anchor), skipped=attempt)
            except FetchError:
                raise  # the network's fault: other samples would fail as well
            except ShardError as error:
                self.corrupt.add(self.images.key(number), error)
        raise ShardError(f"data.shards: none of {ATTEMPTS} samples that were drawn could be read; run `mama check`")

    def _image(self, index: int, attempt: int) -> int:
        if self.anchors is not None and not attempt:
            return int(self.anchors[sample_order.image_at(index, len(self.anchors), self.seed)])
        return sample_order.drawn_at(index, attempt, self.ends, self.seed)

    def _pair(self, index: int, number: int, anchor: int) -> Pair:
        rng = sample_order.generator_at(index, self.seed)
        study = self.images.study(number)
        partner = partner_of(study, anchor, self.config, rng)
        hidden = report_text.draw_hidden(rng, self.config.mask_probability)
        v, w = study.views[anchor], study.views[partner]
        style, tell = self.config.style, self.config.tell_pathology
        anchor_text = report_text.text(study, v, style, hidden, tell)
        other_side = v.laterality != w.laterality
        size = self.config.image_size
        pixels = self.images.pixels(number, anchor, size)
        others = pixels if partner == anchor else self.images.pixels(number, partner, size)
        return Pair(
            key=f"{study.key}/{v.member}",
            anchor=pixels,
            partner=others,
            anchor_change=augment.draw(self.config.augment, pixels, rng),
            partner_change=augment.draw(self.config.augment, others, rng),
            anchor_text=anchor_text,
            partner_text=report_text.text(study, w, style, hidden, tell) if other_side else anchor_text,
        )
