"""A small model that computes as the first layer and the head of another one do, of which only the header is here.

    with sample("header.gguf") as path:  # for measure_speed()
        ...

Its weights are random, in the shapes and types of the other model. It has fewer experts, each as large and used by as
many tokens, and a smaller vocabulary. So the speed of a step stays, and the file is small: a quarter of a gigabyte for
the real model in q4_k_m.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dgemma.bench.synthetic import VOCABULARY, Blueprint, Synthetic, vocabulary, weights
from dgemma.convert.config import ROPE, Config
from dgemma.convert.gguf_header import TensorInfo, header
from dgemma.convert.metadata import metadata
from dgemma.convert.names import Wanted, wanted
from dgemma.files.gguf_file import File
from dgemma.native.formats import Format, by_name

WORDS = 1 << 16  # of the vocabulary at most
FEWER = 8  # times fewer experts at most
NEAREST = "Q4_K"  # stands for a format that only decodes


@contextmanager
def sample(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the small model of the model at `path`, whose header alone is read. It is gone when the block ends."""
    plan = _blueprint(path)
    with TemporaryDirectory(prefix="dgemma-") as room:
        file = Path(room) / "sample.gguf"
        with file.open("wb") as out:
            out.write(plan.header)
            for piece in weights(plan):
                out.write(piece)
        yield file


def _blueprint(path: str | os.PathLike[str]) -> Blueprint:
    with File(path) as file:
        values: dict[str, Any] = {k: [v[0]] if isinstance(v, tuple) else v for k, v in file.config()}
        formats = {tensor.name: tensor.format for tensor in file.tensors}
    values.pop("end_ids")
    fewer = math.gcd(values["n_expert"], values["n_expert_used"], FEWER)
    values |= {"n_layer": 1, "n_vocab": max(min(values["n_vocab"], WORDS), VOCABULARY)}
    values |= {name: values[name] // fewer for name in ("n_expert", "n_expert_used")}
    config = Config(values, ROPE["full_attention"]["partial_rotary_factor"], [1], {}, "sample")
    needed = wanted(config)
    tensors = [(want, _format(want, formats)) for want in needed]
    infos = [TensorInfo(want.gguf, want.dims, to) for want, to in tensors]
    pairs = metadata(config, vocabulary(values["n_vocab"]), needed, 0)
    return Blueprint(Synthetic("sample"), config, header(pairs, infos), tensors)


def _format(want: Wanted, formats: dict[str, Format]) -> Format:
    found = next((formats[name] for name in (want.gguf, *want.halves) if name in formats), by_name("F32"))
    if want.is_float:
        return by_name("F32")
    return found if found.encodes else by_name(NEAREST if want.dims[0] % by_name(NEAREST).block == 0 else "F32")
