"""Compare the answers and distributions of a new file and its source: dg-eval's fidelity, on fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgemma.convert.writer import working_file
from dgemma.errors import SystemFailure, UsageError

PROMPTS = 4  # the number of prompts; each needs a denoising trajectory of the source and two of the file
BASE_TYPE = "bf16"  # a folder's checkpoint runs from a temporary file of this type

Say = Callable[[str], None]
MakeBase = Callable[[Path], object]  # writes the source as a GGUF file


def present() -> bool:
    """Return whether dg-eval is installed."""
    try:
        return find_spec("dgemma.eval.fidelity") is not None
    except ModuleNotFoundError:
        return False


def check_fidelity(source: Path, out: Path, target: Path, threads: int, make_base: MakeBase | None, say: Say) -> Any:
    """Return a dgemma.eval.fidelity.Fidelity of the file `out`, or the reason why it could not be measured.

    make_base: converts the source to a temporary GGUF file, where it cannot run as it is; None where it can.
    """
    from dgemma.eval.fidelity import fidelity

    try:
        with _base(source, target, make_base, say) as base:
            return fidelity(out, base, count=PROMPTS, model={"threads": threads}, say=say)
    except (SystemFailure, UsageError) as reason:
        # For example, there is no disk space for the temporary file, or the vocabulary can encode no prompt.
        return str(reason)


@contextmanager
def _base(source: Path, target: Path, make_base: MakeBase | None, say: Say) -> Iterator[Path]:
    if make_base is None:
        yield source
        return
    with working_file(target) as path:
        say(f"{BASE_TYPE} file to compare with")
        make_base(path)
        yield path
