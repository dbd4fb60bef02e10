"""One run of dg-eval: what was measured, of what, when and where."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from dgemma.bench.machine import processor
from dgemma.eval.approximations import Trial
from dgemma.eval.fidelity import Fidelity
from dgemma.eval.results import Score
from dgemma.eval.sweep import Point
from dgemma.model import Model


@dataclass(slots=True)
class Files:
    """One file."""

    identity: dict[str, Any]
    fidelity: Fidelity | None = None
    scores: list[Score] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Evaluation:
    about: dict[str, Any]  # date, version, commit, machine, settings
    files: list[Files] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


def about(model: Model, exact: bool, **settings: Any) -> dict[str, Any]:
    """What all figures of a run belong to."""
    import dgemma

    return {
        "date": date.today().isoformat(),
        "version": dgemma.__version__,
        "commit": commit(),
        "processor": processor(),
        "backend": model.backend,
        "threads": model.threads,
        "ram": model.ram,
        "exact": exact,
        **settings,
    }


def commit() -> str | None:
    """The commit that this package's source stands at, with a + where it was changed; None for an installed one."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        told = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=10)
        return told.stdout.strip()

    try:
        if not git("ls-files", "--", __file__):
            return None  # a repository that this is not part of
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
