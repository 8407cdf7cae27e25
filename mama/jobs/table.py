"""`mama jobs` as a table: coloured and folded on a terminal, plain and of any width in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mama.jobs.rows import Listing, Row
from mama.jobs.run_jobs import UNKNOWN
from mama.sweep.progress import duration
from shards.files import legible

ANY_WIDTH = 100_000  # columns
INTERVAL = 5.0  # seconds between two looks of --watch
COLOURS = {"running": "green", "failed": "red", "lost": "red", "stopped": "yellow", UNKNOWN: "yellow", "queued": "cyan"}
COLUMNS = ("point", "stage", "state", "step", "loss", "pairs/s", "left", "restarts", "node", "job")
RIGHT = ("step", "loss", "pairs/s", "left", "restarts")
# On a narrow terminal these stand below another column's text.
BELOW = {"job": "point", "node": "state", "restarts": "stage"}
ORDER = ("failed", "lost", "stopped", UNKNOWN, "running", "queued", "missing", "done")  # the first is a point's state


def show(listings: list[Listing], console: Console) -> None:
    """Print the tables."""
    if console.is_terminal:
        console.print(_page(listings, console))
        return
    for line in plain_lines(listings, console):
        click.echo(line)


def plain_lines(listings: list[Listing], console: Console) -> list[str]:
    """The tables as wide as they are, without the blanks at the ends of their lines."""
    console.width = ANY_WIDTH
    with console.capture() as capture:
        console.print(_page(listings, console))
    return [line.rstrip() for line in capture.get().splitlines()]


def watch(look: Callable[[], list[Listing]], console: Console) -> None:
    """Print the tables again every few seconds, in place on a terminal, until Ctrl-C."""
    try:
        if not console.is_terminal:
            while True:
                show(look(), console)
                sys.stdout.flush()
                time.sleep(INTERVAL)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_page(look(), console), refresh=True)
                time.sleep(INTERVAL)
    except KeyboardInterrupt:
        return


def _page(listings: list[Listing], console: Console) -> RenderableType:
    return Group(*(part for listing in listings for part in _parts(listing, console)))


def _parts(listing: Listing, console: Console) -> Iterator[RenderableType]:
    """A line that counts, the table, and below it why what stands there failed, waits or stands still."""
    yield _text(f"{listing.name}: {_count(listing.rows)}" if listing.rows else listing.name, "bold")
    if listing.problem:
        yield _text(listing.problem, "yellow")
    if not listing.rows:
        return
    whole = _table(listing.rows, narrow=False)
    fits = Measurement.get(console, console.options.update(max_width=ANY_WIDTH), whole).maximum <= console.width
    yield whole if fits else _table(listing.rows, narrow=True)
    yield from _reasons(listing.rows)
    yield Text()


def _count(rows: list[Row]) -> str:
    """How many points are in which state."""
    states: dict[str, list[str]] = {}
    for row in rows:
        states.setdefault(row.point, []).append(row.state.state)
    counted = Counter(min(words, key=ORDER.index) for words in states.values())
    points = f"{len(states)} point{'' if len(states) == 1 else 's'}"
    return f"{points}, {', '.join(f'{counted[word]} {word}' for word in reversed(ORDER) if counted[word])}"


def _table(rows: list[Row], narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2 if not narrow else 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        if not (narrow and name in BELOW):
            side: Literal["left", "right"] = "right" if name in RIGHT else "left"
            table.add_column(name, justify=side, overflow="fold", no_wrap=name != "point")
    for row in rows:
        cells = _cells(row)
        if narrow:
            cells["restarts"] = Text("restarts ") + cells["restarts"] if cells["restarts"] else Text()
            for name, above in BELOW.items():
                cells[above] = Text("\n").join(filter(None, (cells[above], cells.pop(name))))
        table.add_row(*cells.values())
    return table


def _cells(row: Row) -> dict[str, Text]:
    """Column -> text."""
    state, progress = row.state, row.progress
    goes_on = progress if state.state == "running" and state.step == "train" else None
    cells = {
        "point": row.point,
        "stage": state.step,
        "state": state.state,
        "step": f"{progress.taken}/{progress.steps}" if progress else "",
        "loss": "" if progress is None or progress.loss is None else f"{progress.loss:.4g}",
        "pairs/s": "" if goes_on is None or goes_on.pairs_per_second is None else f"{goes_on.pairs_per_second:.3g}",
        "left": "" if goes_on is None or goes_on.seconds_left is None else duration(goes_on.seconds_left),
        "restarts": str(state.starts - 1) if state.starts > 1 else "",
        "node": state.node or "",
        "job": state.job or "",
    }
    return {name: _text(text, COLOURS.get(text, "") if name == "state" else "") for name, text in cells.items()}


def _reasons(rows: list[Row]) -> Iterator[Text]:
    """A line for each row that has a reason; one for all that wait for the same."""
    waiting = Counter((row.state.step, row.why) for row in rows if row.why and row.state.state == "queued")
    for row in rows:
        if row.why and row.state.state != "queued":
            yield _text(f"{row.point}: {row.state.step} {row.state.state}: {row.why}", COLOURS.get(row.state.state, ""))
    for (step, why), number in waiting.items():
        yield _text(f"{number} x {step} queued: {why}", COLOURS["queued"])


def _text(text: str, style: str = "") -> Text:
    """A text without markup, and without control characters for the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in legible(text)), style)
