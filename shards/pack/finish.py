"""Finish a build: sum the records up in `refused.jsonl` and the manifest, and log the result."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shards.errors import ShardError
from shards.files import atomic_write
from shards.pack.plan import Plan
from shards.pack.sample import Refusal, refusal_lines
from shards.pack.settings import PackConfig
from shards.pack.shard_record import manifest_of, records_of
from shards.read.manifest import BUILD, MANIFEST, REFUSED, Manifest, load_manifest, save_manifest
from shards.schema import CONFLICTS, FALLBACKS

log = logging.getLogger(__name__)

MOST_MESSAGES = 8  # about views and labels that were not understood


def finish(config: PackConfig, plan: Plan, out: Path) -> Manifest:
    """Write `refused.jsonl` and the manifest from the records, unless they are up to date.

    Raises `ShardError` if no image was stored, and, after writing, if more than `max_refused` were refused.
    """
    records = list(records_of(plan, out / BUILD).values())
    refusals = [refusal for record in records for refusal in record.refusals]
    lines = refusal_lines(refusals)
    manifest = manifest_of(plan, records)
    refused = out / REFUSED
    if earlier_manifest(out) == manifest and refused.exists() and refused.read_bytes() == lines:
        log.info("%s is finished: %d studies, %d images", out, manifest.studies, manifest.images)
        _limit_refused(manifest, config.max_refused, refused)
        return manifest
    atomic_write(refused, lines)
    if not manifest.images:
        causes = Counter(f"{line.reason} ({line.message})" for line in refusals).most_common(1)
        most = "".join(f", {number} of them as {cause}" for cause, number in causes)
        raise ShardError(
            f"pack.root: {config.root} holds no usable image: {len(refusals)} are left out{most}, see {refused}; "
            "fix the archive or the options and run the same `mama pack` again"
        )
    save_manifest(manifest, out)
    _log_manifest(out, manifest)
    _log_not_understood(refusals)
    _limit_refused(manifest, config.max_refused, refused)
    return manifest


def earlier_manifest(out: Path) -> Manifest | None:
    """The manifest in `out`; None if it is missing, or damaged, as it will be rewritten from the records."""
    try:
        return load_manifest(out) if (out / MANIFEST).exists() else None
    except ShardError as error:
        log.warning("%s; it is written again", error)
        return None


def _limit_refused(manifest: Manifest, max_refused: float, refused: Path) -> None:
    if manifest.refused_share > max_refused:
        raise ShardError(
            f"pack.max_refused: {manifest.refused_share:.1%} of the images were refused, {max_refused:.1%} are "
            f"allowed; see {refused}, fix the archive and run the same `mama pack` again, or raise pack.max_refused"
        )


def _log_manifest(out: Path, manifest: Manifest) -> None:
    left_out = {**manifest.images_excluded, **manifest.images_refused}
    log.info(
        "%s: %d studies; of %d images %d stored, %d left out (%s)",
        out,
        manifest.studies,
        manifest.listed,
        manifest.images,
        sum(left_out.values()),
        ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none",
    )
    if manifest.raw:
        unprocessed = "unprocessed; pack.raw=processed, in another `out`, renders them"
        how = "rendered" if manifest.settings.get("raw") == "processed" else unprocessed
        log.warning("%d images are raw (FOR PROCESSING), stored %s", manifest.raw, how)
    for word, number in manifest.conflicts.items():
        log.warning("%d images: %s", number, CONFLICTS.get(word, word))
    for word, number in manifest.fallbacks.items():
        log.warning("%d images were rendered by %s", number, FALLBACKS.get(word, word))
    if manifest.duplicates:
        log.warning("%d images are stored in two studies; `mama check %s` names them", manifest.duplicates, out)


def _log_not_understood(refusals: Iterable[Refusal]) -> None:
    """Log the messages about views and labels: a misspelt view is excluded like any other."""
    messages = Counter((line.reason, line.message) for line in refusals if line.reason in ("other-view", "label"))
    for (reason, message), number in messages.most_common(MOST_MESSAGES):
        log.info("%s, %d images: %s", reason, number, message)
    if len(messages) > MOST_MESSAGES:
        log.info("%d more messages like these, see %s", len(messages) - MOST_MESSAGES, REFUSED)
