"""Whether the breast in an image has an implant: by the table, else by the header or another image of the breast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pydicom.dataset import Dataset

from shards.image.header import find_implant
from shards.schema import SourceView, View


def implant_of(source: SourceView, header: Dataset) -> tuple[bool | None, tuple[str, ...]]:
    """(implant by table or header, words of CONFLICTS). The table wins."""
    found = find_implant(header)
    if source.implant is None:
        return found, ()
    return source.implant, ("implant",) * (found is not None and found != source.implant)


def in_whole_breasts(images: Iterable[tuple[SourceView, View]]) -> list[View]:
    """The views of a study, with an implant that another image of the same breast shows, where the table is silent.

    Of a breast with an implant only some views have it displaced, and the headers of the others may well say NO.
    """
    images = list(images)
    sides = {view.laterality for _, view in images if view.implant}
    return [
        replace(view, implant=True) if view.laterality in sides and source.implant is None else view
        for source, view in images
    ]
