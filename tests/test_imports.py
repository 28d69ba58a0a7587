"""Who imports whom inside the package: no circle, and nothing against the order of the rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bundle" / "zeroseg"
FORBIDDEN = {
    "attention": ("interaction", "learning", "tumor"),
    "backbones": ("attention", "interaction", "learning", "tumor", "io"),
    "interaction": ("tumor",),
    "io": ("attention", "interaction", "learning", "tumor", "backbones"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module an import statement names, at module level and inside functions, relative ones resolved."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> modules of the package it imports; what a package re-exports counts as the package."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: (imported(path) & set(files)) - {name} for name, path in files.items()}


def test_no_circle(graph):
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                # A module's own package is run before it, whatever that imports of it.
                if not name.startswith(f"{other}."):
                    walk(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


def test_nothing_against_the_order_of_the_rooms(graph):
    for name, others in graph.items():
        room = name.split(".")[1] if "." in name else ""
        wrong = {o for o in others if o.split(".")[1:2] and o.split(".")[1] in FORBIDDEN.get(room, ())}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_monailabel_stays_in_the_app():
    for path in PACKAGE.rglob("*.py"):
        assert not any(n.split(".")[0] in ("monailabel", "lib") for n in imported(path)), path.name
