"""The configuration that a model's file gives; the fields have the names of metadata.def."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dgemma.native.metadata import keys


def shortest(value: float) -> float:
    """Return the double with the fewest digits that rounds to the float32 `value`: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


_AS_PYTHON: dict[str, Callable[[Any], Any]] = {"F32": shortest, "BOOL": bool, "BOOLS": bool}


class Config:
    """A read-only view of a model's configuration: `config.d_model`, `config.sliding[layer]`, `config.end_ids`, ...

    Values per layer are tuples of length `n_layer`. `dict(config)` has all of them.
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, pointer: Any) -> None:
        """Copy the `dg_config *` pointer."""
        values: dict[str, Any] = {}
        for key in keys().values():
            if key.in_config:
                convert = _AS_PYTHON.get(key.kind, int)
                value = getattr(pointer, key.field)
                values[key.field] = tuple(map(convert, value[0 : pointer.n_layer])) if key.per_layer else convert(value)
        values["n_vocab"] = int(pointer.n_vocab)
        values["end_ids"] = tuple(pointer.end_ids[0 : pointer.n_end_ids])
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"a model's config has no {name!r}; it has {', '.join(self._values)}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a model's config is read-only: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a model's config is read-only: cannot delete {name!r}")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._values.items())

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._values,)


def _rebuilt(values: dict[str, Any]) -> Config:
    config = object.__new__(Config)
    object.__setattr__(config, "_values", dict(values))
    return config
