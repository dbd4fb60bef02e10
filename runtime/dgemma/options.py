"""Generation options and efforts, as the library lists them (options.def and efforts.def)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import numpy as np

from dgemma._native import ffi, lib
from dgemma.config import shortest
from dgemma.errors import UsageError, check, new_error


@dataclass(frozen=True, slots=True)
class Option:
    """One generation option: a bool if `flag`, a number if `real`, otherwise a whole number; in least .. most."""

    name: str
    real: bool
    flag: bool
    least: float
    most: float
    help: str

    def read(self, value: Any) -> int | float:
        """Return a checked value. Raises TypeError for another type, UsageError for a number out of range."""
        number: int | float
        if self.flag:
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{self.name} must be True or False, not {value!r}")
            return bool(value)
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value) if self.real and isinstance(value, Real) else operator.index(value)
        except TypeError:
            kind = "number" if self.real else "whole number"
            raise TypeError(f"{self.name} must be a {kind}, not {value!r}") from None
        if not self.least <= number <= self.most:  # false for NaN
            raise UsageError(f"{self.name} must be {self.range}, not {value!r}")
        return number

    @property
    def range(self) -> str:
        """The range in words: "at least 1", "0 to 1000"."""
        if self.flag:
            return "yes or no"
        if self.most >= 1e9:
            return f"at least {self.least:g}"
        return f"{self.least:g} to {self.most:g}"


@cache
def options() -> dict[str, Option]:
    """Return all options by name, in the library's order."""
    table: dict[str, Option] = {}
    while entry := lib.dg_option_at(len(table)):
        name, kind, text = (ffi.string(item).decode() for item in (entry.name, entry.kind, entry.help))
        # As a double, the largest number of 64 bits is rounded up by one.
        most = min(int(entry.most), 2**64 - 1) if kind == "U64" else entry.most
        table[name] = Option(name, kind == "F32", kind == "BOOL", entry.least, most, text)
    return table


@dataclass(frozen=True, slots=True)
class Effort:
    """A name for several settings; options that it does not set have the file's values."""

    name: str
    settings: dict[str, int | float]
    help: str

    def __str__(self) -> str:
        """Return its settings in words: "steps 24, settled 1"."""
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())


REFERENCE = "reference"  # with this effort, other values for the options that it sets are refused


@cache
def efforts() -> dict[str, Effort]:
    """Return all efforts by name, in the library's order."""
    table: dict[str, Effort] = {}
    while entry := lib.dg_effort_at(len(table)):
        sampling = ffi.new("dg_sampling *")
        lib.dg_effort_apply(len(table), sampling)
        name, text, sets = (ffi.string(item).decode() for item in (entry.name, entry.help, entry.sets))
        everything = settings_of(sampling)
        table[name] = Effort(name, {option: everything[option] for option in sets.split()}, text)
    return table


def sampling_for(model: Any, given: Mapping[str, Any]) -> Any:
    """Return a `dg_sampling *` with the model's (`dg_model *`) defaults and the options that are given.

    The settings of an effort replace defaults, and options replace both; None stands for the default.

    Raises TypeError for a name that does not exist or a value of another type, UsageError for one out of range.
    """
    known, given = options(), dict(given)
    effort = given.pop("effort", None)
    for name in given:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; the options are {', '.join(known)}, effort")
    sampling = ffi.new("dg_sampling *")
    lib.dg_sampling_default(model, sampling)
    if effort is not None:
        if not isinstance(effort, str):
            raise TypeError(f"effort must be one of {', '.join(efforts())}, not {effort!r}")
        if effort not in efforts():
            raise UsageError(f"effort must be {', '.join(efforts())}, not {effort!r}")
        lib.dg_effort_apply(list(efforts()).index(effort), sampling)
    chosen = {name: known[name].read(value) for name, value in given.items() if value is not None}
    if effort == REFERENCE:
        for name, value in efforts()[effort].settings.items():
            if chosen.get(name, value) != value:
                raise UsageError(f"{name} {given[name]!r} is not of the published sampler, the reference effort")
    for name, value in chosen.items():
        setattr(sampling, name, value)
    error = new_error()
    check(lib.dg_sampling_check(sampling, error), error)
    return sampling


def settings_of(sampling: Any) -> dict[str, int | float]:
    """Return a `dg_sampling *` as a dict of all options."""
    kinds = {o.name: shortest if o.real else bool if o.flag else int for o in options().values()}
    return {name: kind(getattr(sampling, name)) for name, kind in kinds.items()}
