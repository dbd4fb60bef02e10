"""The package is in order: few modules at its top, no circle of imports, and no import of what stands above."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "runtime" / "dgemma"
COMMANDS = ("dgemma.bench", "dgemma.cli", "dgemma.eval", "dgemma.serve")  # what people start
LOWEST = ("dgemma.native", "dgemma.files", "dgemma.ui", "dgemma.errors", "dgemma.units")


def modules() -> dict[str, Path]:
    """Return the package's modules by name; a folder stands for its __init__.py."""
    found = {}
    for folder, prefix in ((PACKAGE, ("dgemma",)), (ROOT / "convert", ("dgemma", "convert"))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Return what a module imports when it is imported: not in functions, and not for type checkers alone."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{each.name}" for each in node.names} & known
            found |= submodules or {node.module}
        todo += ast.iter_child_nodes(node)
    return found & known


def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(ast.parse(path.read_text()), set(known)) - {name} for name, path in known.items()}


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in packages)


def test_few_modules_are_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_modules_import_each_other_in_no_circle():
    edges = imports()
    edges.pop("dgemma")  # it imports what it exports
    for name in edges:
        edges[name].discard("dgemma")
    assert len(list(TopologicalSorter(edges).static_order())) > 100


def test_no_module_of_the_library_imports_a_command():
    wrong = {
        name: sorted(each for each in used if within(each, COMMANDS))
        for name, used in imports().items()
        if not within(name, (*COMMANDS, "dgemma.convert"))
    }
    assert not {name: used for name, used in wrong.items() if used}


def test_the_lowest_modules_import_no_model():
    above = ("dgemma.model", "dgemma.session", "dgemma.chat", "dgemma.infill", "dgemma.hub")
    wrong = {name for name, used in imports().items() if within(name, LOWEST) and any(within(u, above) for u in used)}
    assert not wrong
