"""What `ptxas -v` said of every kernel: registers, spills and shared memory, the most over all targets.

    python report.py FOLDER SOURCE.cu ...

FOLDER has a log per source and target, NAME.sm_80.log. Fails where a kernel that its source marks DG_HOT spills
registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
HOT = re.compile(r"DG_HOT\([^)]*\)\s+(\w+)\s*\(")


def kernels(log: str) -> dict[str, list[int]]:
    """Of each mangled name: registers, bytes of stack, spill stores and loads together, static shared memory."""
    found: dict[str, list[int]] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            name, stack, spills = entry[1], 0, 0
        elif frame := SPILLS.search(line):
            stack, spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif (used := USED.search(line)) and name:
            found[name] = [int(used[1]), stack, spills, int(used[2] or 0)]
            name = ""
    return found


def readable(names: list[str]) -> list[str]:
    said = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    noise = re.compile(r"^void |\((bool|int|anonymous namespace)\)(::)?")
    return [noise.sub("", name).split("(")[0] for name in said.splitlines()]


def main(folder: Path, sources: list[Path]) -> int:
    hot: set[str] = set()
    worst: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    targets = set()
    for source in sources:
        hot |= set(HOT.findall(source.read_text()))
        for log in sorted(folder.glob(f"{source.stem}.sm_*.log")):
            targets.add(log.stem.rsplit("_", 1)[1])
            found = kernels(log.read_text())
            for name, numbers in zip(readable(list(found)) if found else [], found.values(), strict=True):
                key = source.stem, name
                worst[key] = [max(a, b) for a, b in zip(worst[key], numbers, strict=True)]
    print(f"{'kernel':<64} registers  stack  spills  shared   (sm_{', sm_'.join(sorted(targets, key=int))}: the most)")
    bad = []
    for (stem, name), (registers, stack, spills, shared) in sorted(worst.items()):
        is_hot = re.split(r"[<:]", name)[0] in hot
        print(f"{stem + ': ' + name:<64} {registers:9} {stack:6} {spills:7} {shared:7}{'   hot' if is_hot else ''}")
        if is_hot and spills:
            bad.append(name)
    for name in bad:
        print(f"{name} is hot and spills registers", file=sys.stderr)
    print(f"{len(worst)} kernels, {len(bad)} failed")
    return 1 if bad or not worst else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]))
