"""Write docs/settings.md from the dataclasses of the settings: `python docs/generate_settings.py`."""

from __future__ import annotations

import ast
import inspect
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mama.settings.schema import Config
from slurm.profile import Profile

HEAD = """# Settings

Every setting of a recipe: its type, its default, its meaning. A recipe (a YAML file) names only what differs from the
defaults, and `key=value` behind it on the command line overrides both; the
[tutorial](tutorial.md#change-a-setting) has the rules. Generated from `mama/settings/schema.py`,
`shards/pack/settings.py` and `slurm/profile.py` by `docs/generate_settings.py`: edit those files, not this one.
"""


def document() -> str:
    """The whole of docs/settings.md."""
    sections = [section for section in fields(Config) if not is_dataclass(_hint(Config, section.name))]
    parts = [HEAD, _section("The run", Config, "", {field.name for field in sections})]
    for field in fields(Config):
        hint = _hint(Config, field.name)
        if is_dataclass(hint):
            parts += _sections(hint, f"{field.name}.")
    parts.append(_section("Job profiles", Profile, ""))
    return "\n".join(parts)


def _sections(section: Any, prefix: str) -> Iterator[str]:
    """A section and those inside of it."""
    inner = [f.name for f in fields(section) if is_dataclass(_hint(section, f.name))]
    yield _section(prefix.rstrip("."), section, prefix, {f.name for f in fields(section)} - set(inner))
    for name in inner:
        yield from _sections(_hint(section, name), f"{prefix}{name}.")


def _section(title: str, section: Any, prefix: str, names: set[str] | None = None) -> str:
    """A heading, the first paragraph of the docstring, and a table with a row for each of `names`, or for all."""
    comments = comments_of(section)
    intro = " ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split())
    lines = [f"## {title}", "", *textwrap.wrap(intro, 118, break_on_hyphens=False), ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(section):
        if names is None or field.name in names:
            cells = f"`{prefix}{field.name}`", kind(_hint(section, field.name)), _default(field), comments[field.name]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def comments_of(section: Any) -> dict[str, str]:
    """Field -> the comment lines directly above it and the comment on its own lines, as one text."""
    source = textwrap.dedent(inspect.getsource(section))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while comments.get(first - 1, ("", False))[1]:
                first -= 1
            lines = [comments[n][0] for n in range(first, (node.end_lineno or first) + 1) if n in comments]
            found[node.target.id] = " ".join(lines)
    return found


def kind(hint: Any) -> str:
    """A type in the words of YAML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        some = next(argument for argument in arguments if argument is not NoneType)
        return f"{kind(some)}, or `null`"
    if origin is Literal:
        return " or ".join(f"`{_yaml(choice)}`" for choice in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}s"
    if origin is tuple:
        return f"{len(arguments)} {kind(arguments[0])}s"
    return {dict: "mapping", str: "text", int: "integer", float: "number", bool: "`true` or `false`"}[origin or hint]


def _hint(section: Any, name: str) -> Any:
    return get_type_hints(section)[name]


def _default(field: Any) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as it is typed in YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value or '""'
    return "null" if value is None else str(value).lower()


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(document())
