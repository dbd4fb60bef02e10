"""Counts of the tokens that were routed to each expert.

They are saved beside a model's file; under a memory budget they decide which experts stay in memory.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dgemma._native import ffi, lib
from dgemma.errors import Error
from dgemma.files.json_lines import as_bytes
from dgemma.files.output import json_kind, write_whole
from dgemma.files.regular import opener

if TYPE_CHECKING:
    from dgemma.model import Model

VERSION = 1
SUFFIX = ".routing.json"
ROUTING = json_kind("counts of a model's experts", "version", "tokens")
MOST = 2**62  # the largest count of a file: the sum of two counts stays within int64


def routing_path(model: str | os.PathLike[str]) -> str:
    """Return the path of the counts for a model's file."""
    return os.fspath(model) + SUFFIX


def load_routing(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Return the counts in a file, int64 [n_layer, n_expert].

    Raises Error for a file of another kind, OSError where it cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8", opener=opener) as file:
            content: Any = json.load(file)
        if content["version"] != VERSION:
            raise Error(f"{name}: version {content['version']!r}; this reads {VERSION}")
        rows = content["tokens"]
        whole = all(type(n) is int and 0 <= n <= MOST for row in rows for n in row)
        counts = np.array(rows, np.int64) if whole else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        counts = None
    if counts is None or counts.ndim != 2:
        raise Error(f"{name}: no counts of tokens per layer and expert")
    return counts


def save_routing(model: Model, path: str | os.PathLike[str] | None = None) -> str:
    """Add the counts of a model to a file: see Model.save_routing."""
    target = routing_path(model.path) if path is None else os.fspath(path)
    counts = model.routing
    if os.path.exists(target) and os.path.getsize(target):
        before = load_routing(target)
        if before.shape != counts.shape:
            raise Error(f"{target}: counts of {shape_text(before)}; this model has {shape_text(counts)}")
        counts = counts + np.minimum(before, MOST - counts)
    write_whole(target, as_bytes({"version": VERSION, "tokens": counts.tolist()}), ROUTING)
    return target


def shape_text(counts: npt.NDArray[np.int64]) -> str:
    return f"{counts.shape[0]} layers of {counts.shape[1]} experts"


def prefer_routed(model: Model) -> None:
    """Tell a model under a budget to keep the experts with the highest counts, if its file has counts that fit it."""
    try:
        counts = load_routing(routing_path(model.path))
    except (Error, OSError):
        return
    if counts.shape == (model.config.n_layer, model.config.n_expert):
        counts = np.ascontiguousarray(counts)
        lib.dg_model_prefer(model._open_handle().pointer, ffi.cast("int64_t *", counts.ctypes.data))
