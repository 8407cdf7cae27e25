"""Every code that the sources can produce is explained, and every explanation has its code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shards
from shards.schema import CONFLICTS, EXCLUDED_REASONS, FALLBACKS, REFUSED_REASONS

FILES = [path for path in sorted(Path(shards.__file__).parent.rglob("*.py")) if path.name != "schema.py"]


def codes_of(path: Path) -> set[str]:
    """Reason codes in a module: the first text of `Refused(...)`, and of pairs (code, sentence) that are returned or
    given a name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refused":
            parts = node.args
        elif isinstance(node, ast.Return | ast.Assign | ast.keyword) and isinstance(node.value, ast.Tuple):
            words = [word for part in node.value.elts[1:] for word in ast.walk(part)]
            sentence = any(isinstance(word, ast.Constant) and " " in str(word.value) for word in words)
            parts = node.value.elts if sentence and len(node.value.elts) == 2 else []
        if parts and isinstance(parts[0], ast.Constant):
            found.add(str(parts[0].value))
    return found


def words_of(path: Path) -> set[str]:
    """Fallbacks and conflicts in a module: tuples of one text (and starred ones), and the names that a loop is over."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Tuple) and all(isinstance(part, ast.Starred) for part in node.elts[1:]):
            found |= {part.value for part in node.elts[:1] if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            rows = [row.elts[0] for row in node.iter.elts if isinstance(row, ast.Tuple)]
            found |= {part.value for part in rows if isinstance(part, ast.Constant)}
    return {str(word) for word in found}


def test_every_reason_of_a_refusal_is_explained_and_every_explanation_has_one() -> None:
    found = set().union(*map(codes_of, FILES))
    assert {"path", "lesion-crop", "blank", "unreadable"} <= found
    explained = REFUSED_REASONS | EXCLUDED_REASONS
    assert len(explained) == len(REFUSED_REASONS) + len(EXCLUDED_REASONS)
    assert found <= explained.keys()
    text = "".join(path.read_text() for path in FILES)
    assert [code for code in explained if f'"{code}"' not in text] == []


@pytest.mark.parametrize(
    ("files", "explained"),
    [
        (("image/grayscale.py", "image/windows_luts.py"), FALLBACKS),
        (("pack/stored_image.py", "pack/sample.py", "pack/implants.py"), CONFLICTS),
    ],
    ids=["fallbacks", "conflicts"],
)
def test_every_fallback_and_conflict_is_explained_and_every_explanation_has_one(
    files: tuple[str, ...], explained: dict[str, str]
) -> None:
    assert set().union(*(words_of(Path(shards.__file__).parent / file) for file in files)) == set(explained)
