"""Self-contained HTML pages from Jinja templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def page_template(path: Path, **filters: Callable[[Any], str | None]) -> jinja2.Template:
    """The Jinja template in a file. Values are HTML-escaped; an undefined name raises `jinja2.UndefinedError`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)
