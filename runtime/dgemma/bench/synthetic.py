"""Writes model files with random weights in the shapes and formats of a real model, at the speed of the disk.

>>> path = synthetic.make(folder, Synthetic("26b-a4b", layers=6, type="q4_k_m"))

For each format, a small pool of blocks is encoded from normally distributed numbers, and every tensor is made of blocks
in random order. So all values are realistic, no two experts are equal, and little time goes into encoding. A file is
made once, and recognised later by its header.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma.convert import recipe
from dgemma.convert.config import MODEL_TYPE, ROPE, Config
from dgemma.convert.encode import rope_freqs
from dgemma.convert.gguf_header import TensorInfo, aligned, header
from dgemma.convert.metadata import Pair, metadata
from dgemma.convert.names import Wanted, wanted
from dgemma.convert.vocabulary import BYTE, CONTROL, NORMAL, SPECIAL, Vocabulary
from dgemma.convert.writer import NewFile
from dgemma.errors import Error, SystemFailure, UsageError
from dgemma.native.formats import Format
from dgemma.native.metadata import keys

VERSION = 2  # version of this code, a part of file names: files of other versions are not used
UNIT = 512  # values of a unit: blocks that are always used together
POOL = 1024  # units in the pool of a format and a standard deviation
PIECE = 1 << 22  # about how many bytes are made at a time

# The shapes. `layers` is the number of the real model; pairs are values for (sliding, full) layers.
SHAPES: dict[str, dict[str, Any]] = {
    "26b-a4b": dict(
        layers=30, d_model=2816, d_ffn=2112, d_expert=704, n_expert=128, n_expert_used=8, n_head=16, n_head_kv=(8, 2),
        head_dim=(256, 512), sliding_window=1024, n_vocab=262144, canvas_length=256, context_length=262144,
    ),
    "tiny": dict(
        layers=6, d_model=256, d_ffn=96, d_expert=32, n_expert=8, n_expert_used=2, n_head=4, n_head_kv=(2, 1),
        head_dim=(64, 128), sliding_window=16, n_vocab=512, canvas_length=32, context_length=2048,
    ),
}  # fmt: skip
PERIOD = 6  # five sliding layers, one full
TYPE = "q4_k_m"  # of a shape's weights, unless another is asked for
VOCABULARY = 512  # tokens at least, so that bytes are among them
SHAPE_NAMES = ", ".join(f"{name} of {shape['layers']} layers" for name, shape in SHAPES.items())


@dataclass(frozen=True, slots=True)
class Synthetic:
    """The description of a synthetic model.

    architecture: "gemma4" is the autoregressive model with the same layers, for llama.cpp.
    """

    shape: str
    layers: int | None = None  # None: as many as the real model has
    type: str = TYPE
    seed: int = 0
    architecture: str = MODEL_TYPE.replace("_", "-")

    @property
    def n_layer(self) -> int:
        return int(SHAPES[self.shape]["layers"]) if self.layers is None else self.layers

    @property
    def name(self) -> str:
        """The model's name; the file's name is made from it."""
        return f"{self.architecture}-{self.shape}-{self.n_layer}l-{self.type}-seed{self.seed}-v{VERSION}"


def config_of(model: Synthetic) -> Config:
    """Return the configuration, with the field names of metadata.def."""
    if model.shape not in SHAPES:
        raise UsageError(f"shape {model.shape!r}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[model.shape]
    sliding = [i % PERIOD != PERIOD - 1 for i in range(model.n_layer)]
    (kv_swa, kv), (dim_swa, dim) = shape["n_head_kv"], shape["head_dim"]
    same = ("d_model", "d_ffn", "d_expert", "n_expert", "n_expert_used", "n_head", "sliding_window", "n_vocab")
    values: dict[str, Any] = {name: shape[name] for name in (*same, "canvas_length", "context_length")}
    values |= {
        "n_layer": model.n_layer,
        "n_head_kv": [kv_swa if s else kv for s in sliding],
        "sliding": [int(s) for s in sliding],
        "rope_base": ROPE["full_attention"]["rope_theta"],
        "rope_base_swa": ROPE["sliding_attention"]["rope_theta"],
        "rms_eps": 1e-6,
        "softcap": 30.0,
        "causal": 0,
    }
    values |= {f"{what}_dim": dim for what in ("head", "value", "rope")}
    values |= {f"{what}_dim_swa": dim_swa for what in ("head", "value", "rope")}
    for key in keys().values():
        if key.in_config and not key.required:
            values.setdefault(key.field, int(key.absent) if key.kind == "U32" else key.absent)
    rotary = ROPE["full_attention"]["partial_rotary_factor"]
    return Config(values, rotary, [1], {}, model.name)


@dataclass(frozen=True)
class Blueprint:
    """A file to write: its header, and its tensors in order."""

    model: Synthetic
    config: Config
    header: bytes
    tensors: list[tuple[Wanted, Format]]

    @property
    def file_bytes(self) -> int:
        return len(self.header) + sum(int(aligned(size_of(*tensor))) for tensor in self.tensors)


def size_of(want: Wanted, to: Format) -> int:
    return int(want.count // to.block * to.bytes)


def blueprint(model: Synthetic) -> Blueprint:
    config = config_of(model)
    chosen = recipe.find(model.type)
    needed = wanted(config)
    formats = recipe.assign(needed, chosen, ())
    pairs = metadata(config, vocabulary(config.values["n_vocab"]), needed, chosen.file_type)
    if model.architecture == "gemma4":
        needed = [want for want in needed if "self_cond" not in want.gguf and "enc_layer" not in want.gguf]
        pairs = as_gemma4(pairs)
    tensors = [(want, formats[want.gguf]) for want in needed]
    infos = [TensorInfo(want.gguf, want.dims, to) for want, to in tensors]
    return Blueprint(model, config, header(pairs, infos), tensors)


def as_gemma4(pairs: list[Pair]) -> list[Pair]:
    """Return the metadata under llama.cpp's name for the architecture, without keys that only diffusion needs."""
    ours = f"{MODEL_TYPE.replace('_', '-')}."
    kept = []
    for pair in pairs:
        if pair.key == "general.architecture":
            kept.append(Pair(pair.key, pair.kind, "gemma4"))
        elif not pair.key.startswith("diffusion.") and not pair.key.endswith((".causal", ".end_token_ids")):
            kept.append(Pair(pair.key.replace(ours, "gemma4."), pair.kind, pair.value))
    return kept


def vocabulary(n_vocab: int) -> Vocabulary:
    """Return a vocabulary: special tokens, bytes at Gemma's ids, newlines, and words such as t42 that no text has."""
    tokens = [f"t{i}" for i in range(n_vocab)]
    types = [NORMAL] * n_vocab
    for i, name in enumerate(("pad", "eos", "bos", "unk", "mask")):
        tokens[i], types[i] = SPECIAL[name], CONTROL
    tokens[5], tokens[6] = "\n", "\n\n"
    for byte in range(256):
        tokens[238 + byte], types[238 + byte] = f"<0x{byte:02X}>", BYTE
    ids = {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "mask": 4}
    return Vocabulary(tokens, types, ["\n \n"], ids)


# ---- Weights ----


def spread_of(want: Wanted) -> tuple[float, float]:
    """Return the mean and the standard deviation of a tensor's values.

    They are chosen so that a matrix keeps the norm of a vector, and attention is as spread out as in a trained model.
    """
    if want.gguf.endswith("ffn_gate_inp.weight"):
        return 0.0, 1.0  # router scores of about 1
    if len(want.dims) > 1:
        return 0.0, want.dims[0] ** -0.5
    if want.gguf.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
        return 0.4, 0.03
    if want.gguf == "output_norm.weight":
        # The output is not just the input again; at a temperature of 0.05 as many tokens are likely as for real text.
        return 0.0, 0.4
    return 1.0, 0.05


class Blocks:
    """Random weights of one format and standard deviation, made of blocks that are drawn from a small pool."""

    def __init__(self, to: Format, deviation: float, random: np.random.Generator) -> None:
        self._unit = max(1, UNIT // to.block)
        values = random.standard_normal((POOL, self._unit * to.block)) * deviation
        self._pool = to.encode(values.astype(np.float32))

    def pieces(self, size: int, random: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
        width = self._pool.shape[1]
        step = max(1, PIECE // width) * width  # a multiple of a unit, so that pieces consist of complete blocks
        for start in range(0, size, step):
            want = min(step, size - start)
            drawn = random.integers(0, len(self._pool), -(-want // width), dtype=np.uint16)
            yield self._pool.take(drawn, axis=0).reshape(-1)[:want]


def weights(plan: Blueprint) -> Iterator[Any]:
    """Yield the file's data section in order.

    The bytes depend on the Synthetic only; a layer is the same for any number of layers.
    """
    pools: dict[tuple[str, float], Blocks] = {}
    for want, to in plan.tensors:
        random = np.random.default_rng([plan.model.seed, zlib.crc32(want.gguf.encode())])
        mean, deviation = spread_of(want)
        size = size_of(want, to)
        if want.kind == "MADE":
            yield rope_freqs(plan.config).tobytes()
        elif want.is_float:
            yield random.normal(mean, deviation, want.count).astype(np.float32).tobytes()
        else:
            if (to.name, deviation) not in pools:
                pools[to.name, deviation] = Blocks(to, deviation, np.random.default_rng(plan.model.seed))
            yield from pools[to.name, deviation].pieces(size, random)
        yield bytes(aligned(size) - size)


# ---- Files ----


def cache_folder() -> Path:
    """Return the default folder for synthetic files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgemma"


def make(folder: Path, model: Synthetic, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the model's file in this folder, unless it is there already; return its path.

    progress: called with the number of bytes that are written, and their total.
    """
    plan = blueprint(model)
    path = folder / f"{model.name}.gguf"
    if _is(path, plan):
        return path
    if path.exists() and not _was(path, plan):
        raise Error(f"{path}: another file than dg-bench would make here; move it, or give another --cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise SystemFailure(f"{folder}: {(problem.strerror or str(problem)).lower()}") from None
    total = plan.file_bytes
    with NewFile(path, total, kind=None) as file:
        file.write(plan.header)
        done = len(plan.header)
        for piece in weights(plan):
            file.write(piece)
            done += len(piece)
            if progress:
                progress(done, total)
        file.commit(force=True)
    return path


def make_header(folder: Path, model: Synthetic) -> Path:
    """Write the header of the model's file into one that is as long and has no weights; return its path."""
    plan = blueprint(model)
    path = folder / f"{model.name}.gguf"
    with path.open("wb") as out:
        out.write(plan.header)
        out.truncate(plan.file_bytes)
    return path


def _is(path: Path, plan: Blueprint) -> bool:
    try:
        return path.stat().st_size == plan.file_bytes and _header_of(path, plan) == plan.header
    except OSError:
        return False


def _was(path: Path, plan: Blueprint) -> bool:
    """Return whether a file was made by make() for this model, and was cut off or damaged since."""
    return path.is_file() and (path.stat().st_size == plan.file_bytes or _header_of(path, plan) == plan.header)


def _header_of(path: Path, plan: Blueprint) -> bytes:
    with path.open("rb") as file:
        return file.read(len(plan.header))
