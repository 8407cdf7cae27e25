"""Compare the laterality of images with the side of the chest wall, to detect an archive with swapped sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shards.schema import Study

FEW = 10  # images of each side; no finding below
MOST = 0.9  # share of the images of a side that decides
NAMED = 5  # studies


@dataclass
class Sides:
    """Counts of images by laterality and side of the chest wall (before mirroring)."""

    counts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # (laterality, chest wall on the right)
    disagreeing: list[str] = field(default_factory=list)  # studies in which the two disagree

    def counted(self, studies: Iterable[Study]) -> Iterator[Study]:
        """Count the images of the studies and pass the studies on."""
        for study in studies:
            for view in study.views:
                self.counts[view.laterality, view.flipped] += 1
                if view.flipped != (view.laterality == "R") and study.key not in self.disagreeing[-1:]:
                    self.disagreeing.append(study.key)
            yield study

    @property
    def named(self) -> str:
        """The first studies in which laterality and chest wall disagree."""
        return ", ".join(self.disagreeing[:NAMED]) + (" and others" if len(self.disagreeing) > NAMED else "")

    @property
    def images(self) -> int:
        """Number of images."""
        return self.counts.total()

    @property
    def agree(self) -> int:
        """Number of images with the chest wall on the side of the breast: left in a left one, right in a right one."""
        return self.counts["L", False] + self.counts["R", True]

    @property
    def finding(self) -> str:
        """none (too few images), good, swapped, one-way (all chest walls on one side) or mixed."""
        left, right = (sum(self.counts[side, where] for where in (False, True)) for side in "LR")
        if min(left, right) < FEW:
            return "none"
        agree = [self.counts["L", False] / left, self.counts["R", True] / right]
        if max(agree) <= 1 - MOST:
            return "swapped"
        if min(agree) >= MOST:
            return "good"
        return "one-way" if max(agree) >= MOST and min(agree) <= 1 - MOST else "mixed"
