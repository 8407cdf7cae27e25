"""Does the chest wall lie where the side of an image says? If it never does, the sides of an archive are swapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shards.schema import Study

FEW = 10  # images of each side: of fewer nothing is said
MOST = 0.9  # of the images
NAMED = 5  # studies


@dataclass
class Sides:
    """Counts images by their side and by where their chest wall was found before they were mirrored."""

    counts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # (laterality, chest wall on the right)
    apart: list[str] = field(default_factory=list)  # studies in which the two disagree

    def counted(self, studies: Iterable[Study]) -> Iterator[Study]:
        for study in studies:
            for view in study.views:
                self.counts[view.laterality, view.flipped] += 1
                if view.flipped != (view.laterality == "R") and study.key not in self.apart[-1:]:
                    self.apart.append(study.key)
            yield study

    @property
    def named(self) -> str:
        """The first of the studies in which the two disagree."""
        return ", ".join(self.apart[:NAMED]) + (" and others" if len(self.apart) > NAMED else "")

    @property
    def images(self) -> int:
        return self.counts.total()

    @property
    def agree(self) -> int:
        """Images whose chest wall is on the left in a left breast, on the right in a right one."""
        return self.counts["L", False] + self.counts["R", True]

    @property
    def finding(self) -> str:
        """none (nothing can be said), swapped, one-way (all chest walls on one side), mixed, or good."""
        left, right = (sum(self.counts[side, where] for where in (False, True)) for side in "LR")
        if min(left, right) < FEW:
            return "none"
        agree = [self.counts["L", False] / left, self.counts["R", True] / right]
        if max(agree) <= 1 - MOST:
            return "swapped"
        if min(agree) >= MOST:
            return "good"
        return "one-way" if max(agree) >= MOST and min(agree) <= 1 - MOST else "mixed"
