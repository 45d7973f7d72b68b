"""Which files of the repository a file imports, read from its syntax tree (imports inside functions count too)."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r'{% include "([^"]+)" %}')
PACKAGES = ("flows", "pipeline", "models")


def sources(package: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Dotted names a file imports, `from a import b` giving both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


@cache
def templates(path: Path) -> frozenset[Path]:
    """Files of pipeline/templates that a file names in a string, and those they include."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value and "\n" not in node.value:
            template = Path("pipeline/templates") / Path(node.value).name
            if (ROOT / template).is_file():
                found |= {template, *(template.with_name(name) for name in INCLUDE.findall((ROOT / template).read_text(encoding="utf-8")))}
    return frozenset(found)


def closure(*entries: Path) -> set[Path]:
    """Every file of the repository that running these files can import, themselves included, with the templates they name."""
    found: set[Path] = set()
    waiting = list(entries)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_names(path):
            if name.split(".")[0] in PACKAGES:
                base = Path(*name.split("."))
                waiting += [c for c in (base.with_suffix(".py"), base / "__init__.py") if (ROOT / c).is_file()]
    empty = {path for path in found if path.name == "__init__.py" and not (ROOT / path).read_text(encoding="utf-8").strip()}
    return (found - empty).union(*(templates(path) for path in found))
