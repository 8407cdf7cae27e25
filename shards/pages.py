"""HTML pages of one file, filled in by Jinja."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def page_template(path: Path, **filters: Callable[[Any], str | None]) -> jinja2.Template:
    """The template in a file: what is filled in is escaped, and a name that nobody filled in is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)
