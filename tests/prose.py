"""Words that readers stumble over, and where texts that users read have them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

import cadsurgery as cs

# What reads badly, and what to write instead.
INSTEAD = {
    r"\banew\b": "again",
    r"\balone\b": "only, or by itself",
    r"\b(is|are|was|were|be) (said|told)\b": "say who says it",
    r"\b(go|goes|went|going) on\b": "resume, continue",
    r"\bof (?:[\w'`.-]+ ){1,3}of (?:[\w'`.-]+ ){1,3}of\b": "two sentences, or a genitive",
}
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if not {"data", "generated"} & {*path.relative_to(ROOT / "docs").parts}
    ),
]


def faults_of(text: str) -> list[str]:
    """What of a text is on the list, each with what to write instead."""
    text = " ".join(text.split())
    return [
        f"{found[0]!r} in {text[max(0, found.start() - 40) : found.end() + 20]!r}: {instead}"
        for words, instead in INSTEAD.items()
        for found in re.finditer(words, text, re.IGNORECASE)
    ]


def prose_of(page: Path) -> str:
    """The prose of a page, without code."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "CODE", text)


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Texts that a file of the package shows: strings of several words that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        if is_text and " " in node.value:
            yield node.lineno, node.value


def public_docstrings() -> Iterator[tuple[str, str]]:
    """Docstrings of public names, and of the public methods of public classes."""
    for name in cs.__all__:
        value = getattr(cs, name)
        yield name, inspect.getdoc(value) or ""
        if inspect.isclass(value):
            for member, own in vars(value).items():
                if member[0] != "_":
                    yield f"{name}.{member}", inspect.getdoc(own) or ""
