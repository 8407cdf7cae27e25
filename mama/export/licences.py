"""The terms of the data sets that have a reader: what they say about models that were trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OTHER = "other"  # Hugging Face's word for a licence that its list does not have


@dataclass(frozen=True)
class Terms:
    """The title of a data set, its licence as Hugging Face spells it (or `OTHER`), and a sentence about it."""

    title: str
    licence: str
    sentence: str
    release: bool = True  # False: no model that was trained on it may be released


# By `pack.source`. Where no licence was found the sentence sends the reader to the data set's own terms.
TERMS = {
    "embed": Terms(
        "EMBED",
        OTHER,
        "its agreement forbids to release models, weights or embeddings that were trained on it",
        release=False,
    ),
    "rsna": Terms(
        "RSNA Screening Mammography Breast Cancer Detection",
        OTHER,
        "non-commercial use only, and no attempt to identify anybody",
    ),
    "vindr": Terms("VinDr-Mammo", OTHER, "restricted access, under the data use agreement of PhysioNet"),
    "cbis_ddsm": Terms("CBIS-DDSM", "cc-by-3.0", "CC BY 3.0, The Cancer Imaging Archive"),
    "cdd_cesm": Terms("CDD-CESM", "cc-by-4.0", "CC BY 4.0, The Cancer Imaging Archive, doi:10.7937/29kw-ae92"),
    "cmmd": Terms("CMMD", OTHER, "see its page in The Cancer Imaging Archive"),
    "inbreast": Terms("INbreast", OTHER, "see what its authors ask of those who have a copy"),
    "phantom": Terms(
        "the synthetic cohort of `mama quickstart`",
        "apache-2.0",
        "drawn by mama itself, of no patient: figures on it say nothing about real images",
    ),
    "table": Terms("an archive of its owner's", OTHER, "its owner decides"),
}


def terms_of(source: str) -> Terms:
    """The terms of an archive, by its `pack.source`."""
    return TERMS.get(source) or Terms(source, OTHER, "not known here; ask those whom it is from")


def slug_of(source: str) -> str:
    """The name of an archive among the data sets of a model card's head."""
    return {"table": "own-archive", "phantom": "mama-phantom"}.get(source, source.replace("_", "-"))


def licence_of(sources: Iterable[str], bases: Iterable[str]) -> tuple[str, str | None]:
    """Licence, and its name if it is `OTHER`, of a model of these archives that began with the weights of `bases`."""
    terms = [terms_of(source) for source in sources]
    licences = {one.licence for one in terms}
    if not all(one.release for one in terms):
        return OTHER, "not-to-be-released"
    if list(bases):
        return OTHER, "terms-of-training-data-and-base-models"
    if len(licences) != 1 or OTHER in licences:
        return OTHER, "terms-of-training-data"
    return licences.pop(), None
