"""The layers of .github/CONTRIBUTING.md hold: no file includes or calls a layer above its own, nor any in a circle."""

from __future__ import annotations

import re
import shutil
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "runtime"
FOLDERS = (RUNTIME, RUNTIME / "memory", RUNTIME / "cpu", ROOT / "cuda", ROOT / "quants")
SEARCHED = (RUNTIME, ROOT / "quants", ROOT / "cuda")  # where the compiler looks for what is included
ENDINGS = (".c", ".h", ".cu", ".cuh")

Edges = dict[Path, set[Path]]


def sources() -> set[Path]:
    return {file for folder in FOLDERS for file in folder.iterdir() if file.suffix in ENDINGS}


def files_of(name: str) -> list[Path]:
    """Return the files that a name in the list of layers stands for."""
    path = (RUNTIME / name).resolve()
    if name.endswith("/"):
        return [file for file in sorted(path.iterdir()) if file.suffix in ENDINGS]
    named = [path] if path.suffix else [path.with_suffix(".c"), path.with_suffix(".h")]
    return [file for file in named if file.exists()]


def lines() -> list[list[str]]:
    """Return the lines of the list, from the highest layer down: a layer's name, then names of files."""
    block = re.search(r"^```layers\n(.*?)^```$", (ROOT / ".github/CONTRIBUTING.md").read_text(), re.M | re.S)
    assert block, "no list of layers"
    return [line.split() for line in block[1].splitlines()]


def heights() -> dict[Path, int]:
    """Return each file's height, 0 for the lowest layer."""
    return {file: i for i, (_, *names) in enumerate(reversed(lines())) for name in names for file in files_of(name)}


def includes(files: set[Path]) -> Edges:
    found: Edges = {file: set() for file in files}
    for file in files:
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.M):
            known = [path for folder in (file.parent, *SEARCHED) if (path := (folder / name).resolve()) in files]
            found[file].update(known[:1])
    return found


def built(files: set[Path]) -> dict[Path, Path]:
    """Return the objects of the last build, each with the file that it was made of."""
    objects = {}
    for folder in FOLDERS:
        for path in (ROOT / "build" / folder.relative_to(ROOT)).glob("*.o"):
            source = folder / (path.name.split(".")[0] + ".c")
            if source in files:
                objects[path] = source
    return objects


def calls(objects: dict[Path, Path]) -> Edges:
    """Return which files use what is defined in which others, by their objects' symbols."""
    defined: dict[str, Path] = {}
    wanted: list[tuple[Path, str]] = []
    for path, source in objects.items():
        symbols = subprocess.run(["nm", "-g", "-P", str(path)], capture_output=True, text=True, check=True).stdout
        for name, kind, *_ in (line.split() for line in symbols.splitlines()):
            if kind == "U":
                wanted.append((source, name))
            else:
                defined[name] = source
    found: Edges = {source: set() for source in objects.values()}
    for source, name in wanted:
        if name in defined and defined[name] != source:
            found[source].add(defined[name])
    return found


def upward(edges: Edges, height: dict[Path, int]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} -> {other.relative_to(ROOT)}"
        for file, others in edges.items()
        for other in others
        if height[other] > height[file]
    ]


def circle(edges: Edges) -> list[Path]:
    """Return the files of one circle, or nothing where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def called() -> Edges:
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    objects = built(sources())
    assert {file for file in sources() if file.suffix == ".c" and "cpu" not in file.parts} <= set(objects.values()), (
        "run make: these are objects of other sources"
    )
    return calls(objects)


def test_every_file_is_in_one_layer():
    named = [file for _, *names in lines() for name in names for file in files_of(name)]
    assert sorted(named) == sorted(sources())
    assert [name for _, *names in lines() for name in names if not files_of(name)] == []


def test_no_file_includes_a_layer_above_its_own():
    assert upward(includes(sources()), heights()) == []


def test_files_do_not_include_each_other():
    assert circle(includes(sources())) == []


def test_no_file_calls_a_layer_above_its_own(called: Edges):
    assert upward(called, heights()) == []


def test_files_call_each_other_in_no_circle(called: Edges):
    assert circle(called) == []


def test_lists_include_nothing():
    assert [file.name for folder in FOLDERS for file in folder.glob("*.def") if "#include" in file.read_text()] == []


def test_an_arrow_that_points_up_is_found():
    low, high = RUNTIME / "error.c", RUNTIME / "generate.c"
    height = heights()
    assert upward({high: {low}}, height) == []
    assert upward({low: {high}}, height) == ["runtime/error.c -> runtime/generate.c"]
    assert set(circle({low: {high}, high: {low}})) == {low, high}
