"""Compare what a new file answers with what its source answers: dg-eval's fidelity, on prompts that never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgemma.convert.writer import working_file
from dgemma.errors import SystemFailure, UsageError

PROMPTS = 4  # of the shipped ones; each needs a denoising trajectory of the source and two of the file
BASE_TYPE = "bf16"  # the type of the working file from which a folder's checkpoint runs

Say = Callable[[str], None]
MakeBase = Callable[[Path], object]  # writes the source as a GGUF file


def present() -> bool:
    """Return whether this dgemma has dg-eval."""
    try:
        return find_spec("dgemma.eval.fidelity") is not None
    except ModuleNotFoundError:
        return False


def check_fidelity(source: Path, out: Path, target: Path, threads: int, make_base: MakeBase | None, say: Say) -> Any:
    """Return a dgemma.eval.fidelity.Fidelity of the file `out`, or the reason why it could not be measured.

    make_base: writes a working file, beside the target, of a source that does not run as it is.
    """
    from dgemma.eval.fidelity import fidelity

    try:
        with _base(source, target, make_base, say) as base:
            return fidelity(out, base, count=PROMPTS, model={"threads": threads}, say=say)
    except (SystemFailure, UsageError) as reason:
        # Such as no room for the working file, or no prompt that the vocabulary can encode.
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
