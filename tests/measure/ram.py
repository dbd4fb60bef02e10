"""What a RAM budget makes of a step: bytes, seconds and memory, beside a plain map of the file under the same limit.

python tests/measure ram [MODEL] [--ram 4G --ram 8G ...] [--steps N] [--cache DIR] [--json FILE]

Without MODEL it is the whole published shape with random weights, 16.8 GB, made once in DIR. Every row is a process of
its own; first a step in memory, the file mapped and in the page cache, where it fits. Per step: bytes read over those
that do not stay; seconds over the larger of what computing takes (that step in memory; without one, a step less its
waits) and what reading takes (bytes over the disk's rate meanwhile); the planner's prediction, from measurements of its
own before the run; the most that the process ever had in memory; whether every canvas is the one made in memory.

The plain map runs in a memory cgroup with that limit, where this process may make one below its own: what it reads is
what the kernel says. Where it may not, that row is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from dgemma import Model, Step
from dgemma.bench.machine import apart, measure_disk
from dgemma.bench.plan import SHARP, free_memory, placed, this_machine
from dgemma.bench.report import table
from dgemma.bench.synthetic import Synthetic, cache_folder, make
from dgemma.units import size, size_text

PROMPT = 64
WARM = 2  # steps before those that count: the first has no self-conditioning, and reads what stays


def child(path: str, ram: int, steps: int, machine: Any = None) -> dict[str, Any]:
    """Runs the model within `ram` bytes, or plainly for 0; in this process."""
    began = perf_counter()
    with Model(path, ram=ram or None) as model:
        opened = perf_counter() - began
        config = model.config
        ids = [config.end_ids[0]] * PROMPT
        seconds, moved, stats, made = [], [], [], hashlib.sha256()
        options = dict(t_min=SHARP, t_max=SHARP, confidence=0.0, stability=0, steps=WARM + steps)
        began = perf_counter()
        for event in model.stream(ids, **options):
            if isinstance(event, Step):
                seconds.append(perf_counter() - began)
                moved.append(model.traffic)
                stats.append(counter("/proc/self/io", "read_bytes"))
                made.update(event.canvas.tobytes() + event.entropy.tobytes() + event.next.tobytes())
                began = perf_counter()
        told: dict[str, Any] = {"opened": opened, "seconds": seconds, "ram": ram, "made": made.hexdigest()}
        first, last = moved[WARM - 1], moved[-1]
        if last is not None and first is not None:
            told |= {"read": (last.read - first.read) / steps, "waited": (last.waited - first.waited) / steps}
            told |= {"disk": (last.read - first.read) / (last.reading - first.reading) if last.read > first.read else 0}
            told |= {"resident": last.resident, "ring": last.ring, "streamed": last.streamed}
            told["first"] = moved[0].read
            if machine is not None:
                told["predicted"] = placed(model, machine, PROMPT).seconds
        else:
            told["read"] = (stats[-1] - stats[WARM - 1]) / steps
    told["seconds"] = seconds[WARM:]
    told["peak"] = counter("/proc/self/status", "VmHWM") * 1024
    return told


def counter(path: str, name: str) -> int:
    """A number that the kernel tells of this process."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise SystemExit(f"{path} has no {name}")


# ---- A limit from outside ----


class Limit:
    """A memory cgroup below this process's own; a context manager. `join`, if there is one, moves a child there."""

    def __init__(self, ram: int) -> None:
        self._folder: Path | None = None
        self.join: Any = None
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, own = line.split(":", 2)
            version1 = "memory" in kinds.split(",")
            base = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup") / own.lstrip("/")
            file = "memory.limit_in_bytes" if version1 else "memory.max"
            if not version1 and kinds:
                continue
            folder = base / f"dgemma-measure-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / file).write_text(str(ram))
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
                continue
            self._folder = folder
            self.join = self._join
            return

    def _join(self) -> None:
        """In the child, before it begins."""
        assert self._folder is not None
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def __enter__(self) -> Limit:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.rmdir()


def forget(path: Path) -> None:
    """Drops the file's pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def plainly(path: Path, ram: int, steps: int) -> dict[str, Any] | None:
    """The plain map under a limit, or None where there is no limit to be had or it does not survive it."""
    forget(path)
    with Limit(ram) as limit:
        if limit.join is None:
            return None
        command = [sys.executable, str(Path(__file__).parent), "ram", str(path), "--steps", str(steps), "--child"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=limit.join, check=False)
    told: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return told


# ---- The table ----


def middle(told: dict[str, Any]) -> float:
    """Seconds of the median step."""
    seconds: list[float] = sorted(told["seconds"])
    return seconds[len(seconds) // 2]


def rows_of(memory: dict[str, Any] | None, found: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for one in found:
        ram, plain = one["within"], one["plain"]
        step = middle(ram)
        compute = middle(memory) if memory else step - ram["waited"]
        reading = ram["read"] / ram["disk"] if ram["disk"] else 0.0
        rest = one["weights"] - ram["resident"]
        rows.append(
            [
                size_text(ram["ram"]),
                size_text(ram["resident"]),
                size_text(ram["ring"]),
                size_text(ram["read"]),
                f"{ram['read'] / rest:.3f}" if rest > 0 else "-",
                f"{step:.2f}",
                f"{compute:.2f}",
                f"{ram['waited']:.2f}",
                f"{reading:.2f}",
                f"{step / max(compute, reading):.2f}",
                f"{ram['predicted']:.2f}",
                f"{ram['predicted'] / step:.2f}",
                size_text(ram["peak"]),
                f"{ram['opened']:.2f}",
                "-" if memory is None else "yes" if ram["made"] == memory["made"] else "NO",
                "-" if plain is None else f"{middle(plain):.1f}",
                "-" if plain is None else size_text(plain["read"]),
            ]
        )
    return rows


HEAD = ["budget", "stays", "buffers", "read a step", "over the rest", "step, s", "computing", "waits", "reading"]
HEAD += ["over larger", "predicted", "over step", "peak", "open, s", "same canvases", "plain map, s", "it reads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--ram", action="append", type=lambda text: size(text, "--ram"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--no-plain", action="store_true", help="leave the plain map out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(str(asked.model), 0, asked.steps)))
        return
    path = asked.model or make(asked.cache, Synthetic("26b-a4b"))
    weights = os.path.getsize(path)
    found: list[dict[str, Any]] = []
    memory = apart(child, str(path), 0, asked.steps) if (free_memory() or 0) > weights + (2 << 30) else None
    for ram in asked.ram or [4 << 30, 8 << 30, 12 << 30]:
        machine = apart(this_machine, str(path))
        forget(path)
        within = apart(child, str(path), ram, asked.steps, machine)
        plain = None if asked.no_plain else plainly(path, ram, asked.steps)
        found.append({"weights": weights, "machine": machine.rates, "within": within, "plain": plain})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    disk = measure_disk(path)
    print(f"{path.name}, {size_text(weights)}; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f};", end=" ")
    print(f"the disk reads {disk / 1e9:.2f} GB/s now" if disk else "")
    print("\n".join(table(HEAD, rows_of(memory, found))))
    if asked.json:
        asked.json.write_text(json.dumps({"memory": memory, "budgets": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
