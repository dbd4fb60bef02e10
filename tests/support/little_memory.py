"""Commands on a machine with little memory: Linux tells them of it in files that only they see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20


def binary(command: str) -> str:
    return str(Path(sys.executable).with_name(command))


def meminfo(folder: Path, free: int, all: int | None = None) -> tuple[Path, str]:
    """Write what /proc/meminfo tells where `free` bytes are available; return it, and where it belongs."""
    file = folder / "meminfo"
    kib = {"MemTotal": (all or 2 * free) // 1024, "MemFree": 1, "MemAvailable": free // 1024}
    file.write_text("".join(f"{name}: {count} kB\n" for name, count in kib.items()))
    return file, "/proc/meminfo"


def control_group(folder: Path, version: int, limit: int, used: int, cached: int) -> tuple[Path, str]:
    """Write the files of a control group that every process is in; return them, and where they belong."""
    groups = folder / "cgroup"
    of = groups if version == 2 else groups / "memory"
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    of.mkdir(parents=True)
    (of / names[0]).write_text(f"{limit}\n")
    (of / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (of / "memory.stat").write_text(
        f"{prefix}inactive_file {cached // 2}\n{prefix}active_file {cached - cached // 2}\n"
    )
    return groups, "/sys/fs/cgroup"


def run_with(*told: tuple[Path, str], command: list[object]) -> subprocess.CompletedProcess[str]:
    """Run a command that finds these files in these places; without the right to do so the test is skipped."""
    mounts = "".join(f"mount --bind '{file}' {place} || exit 99; " for file, place in told)
    inside = ["unshare", "-rm", "sh", "-c", f'{mounts}exec "$0" "$@"', *map(str, command)]
    try:
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip(f"no file systems of one's own here: {done.stderr}")
    return done


def python(*told: tuple[Path, str], code: str, arguments: tuple[object, ...] = ()) -> str:
    """Run Python code there; return what it prints."""
    done = run_with(*told, command=[sys.executable, "-c", code, *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout
