"""Generation options: the list is options.def, asked from the library."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

from dgemma._native import ffi, lib
from dgemma.config import shortest
from dgemma.errors import UsageError, check, new_error


@dataclass(frozen=True, slots=True)
class Option:
    """One generation option: a whole number, or a number where `real`, in least .. most."""

    name: str
    real: bool
    least: float
    most: float
    help: str

    def read(self, value: Any) -> int | float:
        """Checks a value. Raises TypeError for what is no such number, UsageError for one out of range."""
        number: int | float
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value) if self.real and isinstance(value, Real) else operator.index(value)
        except TypeError:
            kind = "number" if self.real else "whole number"
            raise TypeError(f"{self.name} must be a {kind}, not {value!r}") from None
        if not self.least <= number <= self.most:  # NaN is not
            raise UsageError(f"{self.name} must be {self.range}, not {value!r}")
        return number

    @property
    def range(self) -> str:
        """In words: "at least 1", "0 to 1000"."""
        if self.most >= 1e9:
            return f"at least {self.least:g}"
        return f"{self.least:g} to {self.most:g}"


@cache
def options() -> dict[str, Option]:
    """All options by name, in the library's order."""
    table: dict[str, Option] = {}
    while entry := lib.dg_option_at(len(table)):
        name, kind, text = (ffi.string(item).decode() for item in (entry.name, entry.kind, entry.help))
        # As a double, the most that 64 bits hold is one more than that.
        most = min(int(entry.most), 2**64 - 1) if kind == "U64" else entry.most
        table[name] = Option(name, kind == "F32", entry.least, most, text)
    return table


def sampling_for(model: Any, given: Mapping[str, Any]) -> Any:
    """A `dg_sampling *` of the model's (`dg_model *`) defaults and what is given; None stands for the default.

    Raises TypeError for a name that does not exist or a value of another type, UsageError for one out of range.
    """
    known = options()
    for name in given:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; the options are {', '.join(known)}")
    sampling = ffi.new("dg_sampling *")
    lib.dg_sampling_default(model, sampling)
    for name, value in given.items():
        if value is not None:
            setattr(sampling, name, known[name].read(value))
    error = new_error()
    check(lib.dg_sampling_check(sampling, error), error)
    return sampling


def settings_of(sampling: Any) -> dict[str, int | float]:
    """A `dg_sampling *` as a dict of all options."""
    return {o.name: shortest(v) if o.real else int(v) for o in options().values() for v in [getattr(sampling, o.name)]}
