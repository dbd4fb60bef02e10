"""Times the same layers in llama.cpp, through llama-cpp-python, which the extra `bench` installs.

llama.cpp has no block diffusion, but it has the autoregressive model with the same layers, as `gemma4`. So the speed of
tokens through these layers can be compared: in our encoder and decoder, and in llama.cpp's processing of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dgemma.bench.measure import Times
from dgemma.bench.profile import Profile
from dgemma.errors import Error
from dgemma.model import Model

SHORT, LONG = 256, 1024
PACKAGE = "llama-cpp-python"
BACKBONE = ("projections", "attention", "dense", "experts", "router", "elementwise")


def refuse_llama() -> None:
    """Raise Error where the package is missing; called before anything is measured."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        raise Error(f"--against llama-cpp needs {PACKAGE}: pip install 'dgemma[bench]'") from None
    except Exception as problem:
        raise Error(f"--against llama-cpp: {PACKAGE} does not load: {problem}") from None


class Theirs:
    """A model that llama.cpp runs on the CPU; a context manager."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.engine = f"llama.cpp ({PACKAGE} {llama_cpp.__version__})"
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # held: the library calls it later
        llama_cpp.llama_log_set(self._silent, None)
        try:
            self._llama = llama_cpp.Llama(
                str(path), n_ctx=LONG + SHORT, n_batch=LONG, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=0, verbose=False,
            )  # fmt: skip
        except ValueError as problem:
            raise Error(f"{self.engine} does not open {path}: {problem}") from None
        self._wait: Callable[[], Any] = lambda: llama_cpp.llama_synchronize(self._llama.ctx)

    def __enter__(self) -> Theirs:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    @property
    def model(self) -> Any:
        """The model, as llama.cpp's own handle."""
        return self._llama.model

    def encode(self, ids: np.ndarray) -> None:
        """Encode ids, from an empty cache to the next-token logits of the last one."""
        self._llama.reset()
        self._llama.eval(ids.tolist())
        self._wait()


def compare(model: Model, theirs: Theirs, runs: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Time both engines alternately: prompts of SHORT and LONG tokens with the logits of the last token.

    Our decoder's layers over a canvas are timed too.
    """
    random = np.random.default_rng(seed)
    ids = random.integers(5, model.config.n_vocab, LONG, dtype=np.int32)
    canvas = ids[: model.config.canvas_length]
    keys = ("ours short", "theirs short", "ours long", "theirs long", "decoder")
    times: dict[str, list[float]] = {key: [] for key in keys}

    with model.session(LONG + SHORT) as session, Profile(model) as profile:

        def ours(n: int) -> float:
            session.rewind(0)
            started = perf_counter()
            session.encode(ids[:n], logits="last")
            return perf_counter() - started

        def other(n: int) -> float:
            started = perf_counter()
            theirs.encode(ids[:n])
            return perf_counter() - started

        def decoder() -> float:
            session.rewind(0)
            profile.lap()
            session.denoise(canvas)
            return sum(seconds for part, seconds in profile.lap().items() if part in BACKBONE)

        for run in range(runs + 1):
            say(f"against {theirs.engine}, {'warm-up' if run == 0 else f'run {run} of {runs}'}")
            took = (ours(SHORT), other(SHORT), ours(LONG), other(LONG), decoder())
            if run:
                for key, seconds in zip(keys, took, strict=True):
                    times[key].append(seconds)
    rows = []
    for what, mine, n_mine, yours, n_yours in (
        (f"a prompt of {SHORT} tokens", "ours short", SHORT, "theirs short", SHORT),
        (f"a prompt of {LONG} tokens", "ours long", LONG, "theirs long", LONG),
        (f"our decoder's layers over a canvas of {len(canvas)}", "decoder", len(canvas), "theirs short", SHORT),
    ):
        a, b = Times(times[mine]), Times(times[yours])
        row = {"what": what, "tokens": [n_mine, n_yours], "ours": a.told(), "theirs": b.told()}
        rows.append({**row, "ratio": (n_mine / a.median) / (n_yours / b.median)})
    note = (
        "Interleaved runs, the same shapes and formats, the same number of threads. A prompt ends with the logits of"
        f" its last token; the decoder's row has no head and stands beside their prompt of {SHORT}."
    )
    return {"engine": theirs.engine, "runs": runs, "rows": rows, "note": note}
