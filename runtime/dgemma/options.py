"""Generation options and efforts, as the library lists them (options.def, samplers.def and efforts.def)."""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from typing import Any

import numpy as np

from dgemma._native import ffi, lib
from dgemma.config import shortest
from dgemma.errors import UsageError, check, new_error

Setting = int | float | str  # the value of an option


@dataclass(frozen=True, slots=True)
class Option:
    """One generation option.

    Its value is a bool if `flag`, one of `choices` if there are any, a number if `real`, otherwise a whole number
    in least .. most.
    """

    name: str
    real: bool
    flag: bool
    least: float
    most: float
    help: str
    choices: dict[str, str] = field(default_factory=dict)  # by name, what each is

    def read(self, value: Any) -> Setting:
        """Return a checked value. Raises TypeError for another type, UsageError for a number out of range."""
        number: int | float
        if self.flag:
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{self.name} must be True or False, not {value!r}")
            return bool(value)
        if self.choices:
            if not isinstance(value, str):
                raise TypeError(f"{self.name} must be a name, {self.range}, not {value!r}")
            if value not in self.choices:
                raise UsageError(f"{self.name} must be {self.range}, not {value!r}")
            return value
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
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.most >= 1e9:
            return f"at least {self.least:g}"
        return f"{self.least:g} to {self.most:g}"

    def stored(self, value: Setting) -> int | float:
        """Return a value as dg_sampling holds it: a choice by its number."""
        return list(self.choices).index(value) if isinstance(value, str) else value

    def loaded(self, number: Any) -> Setting:
        """Return what dg_sampling holds as a value."""
        if self.choices:
            return list(self.choices)[int(number)]
        if self.real:
            return shortest(number)
        return bool(number) if self.flag else int(number)


@cache
def options() -> dict[str, Option]:
    """Return all options by name, in the library's order."""
    table: dict[str, Option] = {}
    while entry := lib.dg_option_at(len(table)):
        name, kind, text = (ffi.string(item).decode() for item in (entry.name, entry.kind, entry.help))
        # As a double, the largest number of 64 bits is rounded up by one.
        most = min(int(entry.most), 2**64 - 1) if kind == "U64" else entry.most
        choices = samplers() if kind == "SAMPLER" else {}
        table[name] = Option(name, kind == "F32", kind == "BOOL", entry.least, most, text, choices)
    return table


def samplers() -> dict[str, str]:
    """Return what each sampler does, by name, in the library's order."""
    table: dict[str, str] = {}
    while entry := lib.dg_sampler_at(len(table)):
        table[ffi.string(entry.name).decode()] = ffi.string(entry.help).decode()
    return table


@dataclass(frozen=True, slots=True)
class Effort:
    """A name for several settings; options that it does not set have the file's values."""

    name: str
    settings: dict[str, Setting]
    help: str

    def __str__(self) -> str:
        """Return its settings in words: "steps 24, settled 1"."""
        return ", ".join(
            f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in self.settings.items()
        )


SEED = "DGEMMA_SEED"  # the environment variable with the seed of generations that are given none


def new_seed() -> int:
    """Return a seed for a generation that was given none: that of SEED, else 32 random bits, which people can copy."""
    given = os.environ.get(SEED)
    if not given:
        return secrets.randbits(32)
    try:
        return int(options()["seed"].read(int(given)))
    except (ValueError, UsageError):
        raise UsageError(f"{SEED} must be a whole number, {options()['seed'].range}, not {given!r}") from None


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

    The settings of an effort replace defaults, and options replace both; None stands for the default, which for the
    seed is a new one each time.

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
    for name, value in {"seed": new_seed(), **chosen}.items():
        setattr(sampling, name, known[name].stored(value))
    error = new_error()
    check(lib.dg_sampling_check(sampling, error), error)
    return sampling


def settings_of(sampling: Any) -> dict[str, Setting]:
    """Return a `dg_sampling *` as a dict of all options."""
    return {name: option.loaded(getattr(sampling, name)) for name, option in options().items()}
