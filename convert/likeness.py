"""How near a new file's answers are to its source's: dg-eval's fidelity on prompts that never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgemma.convert.writer import working_file
from dgemma.errors import SystemFailure, UsageError

PROMPTS = 4  # of the shipped ones: each is a denoising trajectory of the source and two of the file
BASE_TYPE = "bf16"  # of the file that a folder's checkpoint runs from

Say = Callable[[str], None]
MakeBase = Callable[[Path], object]  # writes the source as a GGUF file


def present() -> bool:
    """Whether this dgemma has dg-eval."""
    try:
        return find_spec("dgemma.eval.fidelity") is not None
    except ModuleNotFoundError:
        return False


def likeness(source: Path, out: Path, target: Path, threads: int, make_base: MakeBase | None, say: Say) -> Any:
    """A dgemma.eval.fidelity.Fidelity of the file `out`, or the reason why it could not be measured. make_base: of a
    source that does not run as it is, makes a working file beside the target.
    """
    from dgemma.eval.fidelity import fidelity

    try:
        with _base(source, target, make_base, say) as base:
            return fidelity(out, base, count=PROMPTS, model={"threads": threads}, say=say)
    except (SystemFailure, UsageError) as reason:  # no room for the base, no prompt that the vocabulary reads
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
