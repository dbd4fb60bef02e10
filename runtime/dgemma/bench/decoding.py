"""Compares generation by denoising with autoregressive decoding of the same layers in llama.cpp, by batch size.

For n tokens, one user waits for the steps of a canvas and its encoding, or for n single tokens. A server that decodes
for many users reads the weights once for all of them: from some batch size on it generates more tokens per second in
total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from dgemma.bench.llama import Theirs
from dgemma.bench.measure import Times
from dgemma.errors import Error
from dgemma.events import Step
from dgemma.model import Model

BATCHES = (1, 4, 16, 64)  # numbers of sequences that are decoded together
STEPS = (12, 16, 20)  # steps of a canvas: the published model needs 12 to 16 for text and 20 for code
PROMPT = 64  # tokens of the prompt before each sequence and before our canvas
WARM = 2  # warm-up steps


class Decoder:
    """Sequences that llama.cpp decodes together, in one context; a context manager."""

    def __init__(self, theirs: Theirs, sequences: int, tokens: int, threads: int) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = PROMPT + sequences * tokens, sequences
        options.n_batch = options.n_ubatch = max(PROMPT, sequences)
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True  # all sequences share the prompt
        self._context = llama_cpp.llama_init_from_model(theirs.model, options)
        if not self._context:
            raise Error(f"{theirs.engine} makes no context for {sequences} sequences")
        self._batch = llama_cpp.llama_batch_init(max(PROMPT, sequences), 0, 1)
        self._sequences = sequences

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)

    def _decode(
        self, ids: Sequence[int], places: Sequence[int], owners: Sequence[int], outputs: Sequence[bool]
    ) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, (token, place, owner, output) in enumerate(zip(ids, places, owners, outputs, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
            batch.seq_id[i][0], batch.logits[i] = owner, output
        if self._c.llama_decode(self._context, batch):
            raise Error("llama.cpp failed to decode")
        self._c.llama_synchronize(self._context)

    def begin(self, prompt: Sequence[int]) -> None:
        """Clear all sequences, and let each begin with a prompt."""
        memory = self._c.llama_get_memory(self._context)
        self._c.llama_memory_clear(memory, True)
        n = len(prompt)
        self._decode(prompt, range(n), [0] * n, [i == n - 1 for i in range(n)])
        for other in range(1, self._sequences):
            self._c.llama_memory_seq_cp(memory, 0, other, -1, -1)
        self._places = [n] * self._sequences

    def step(self, ids: Sequence[int]) -> float:
        """Decode one token for each of the first len(ids) sequences, and return the seconds it took."""
        started = perf_counter()
        n = len(ids)
        self._decode(ids, self._places[:n], range(n), [True] * n)
        self._places[:n] = [place + 1 for place in self._places[:n]]
        return perf_counter() - started


def decoding(
    model: Model, theirs: Theirs, *, runs: int, temperature: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time both engines alternately.

    A run is one of our steps, the encoding of one canvas, and one token with llama.cpp for each batch size. There are
    `runs` runs after WARM others.
    """
    random = np.random.default_rng(seed)
    prompt = random.integers(5, model.config.n_vocab, PROMPT).tolist()
    options: dict[str, Any] = dict(t_min=temperature, t_max=temperature, confidence=0.0, stability=0, max_tokens=1)
    options |= dict(seed=seed)
    n = int(model.config.canvas_length)
    ours: list[float] = []
    encoded: list[float] = []
    first = 0.0
    laps: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    tokens = (runs + WARM) * len(BATCHES)
    with (
        Decoder(theirs, BATCHES[-1], tokens, model.threads) as decoder,
        model.session(PROMPT + n) as session,
        model.session(PROMPT + n) as other,
    ):
        session.encode(prompt)
        other.encode(prompt)
        decoder.begin(prompt)
        with closing(session.stream(steps=runs + WARM, **options)) as events:
            for index in range(runs + WARM):
                say(f"writing, {'warm-up' if index < WARM else f'run {index - 1} of {runs}'}")
                started = perf_counter()
                happened = next(events)
                seconds = perf_counter() - started
                assert isinstance(happened, Step)
                first = seconds if index == 0 else first
                other.rewind(PROMPT)
                started = perf_counter()
                other.encode(happened.canvas)
                if index >= WARM:
                    ours.append(seconds)
                    encoded.append(perf_counter() - started)
                for batch in BATCHES:
                    took = decoder.step(random.integers(5, model.config.n_vocab, batch).tolist())
                    if index >= WARM:
                        laps[batch].append(took)
    return told(n, first, Times(ours), Times(encoded), {batch: Times(lap) for batch, lap in laps.items()})


def told(n: int, first: float, step: Times, encoding: Times, theirs: dict[int, Times]) -> dict[str, Any]:
    """Return tokens per second of both engines in a long answer, and the batch size from which llama.cpp is faster."""
    batches: list[dict[str, Any]] = [
        {"batch": batch, "seconds": times.told(), "tokens_per_second": batch / times.median}
        for batch, times in theirs.items()
    ]
    canvases = []
    for steps in STEPS:
        speed = n / (first + (steps - 1) * step.median + encoding.median)
        more = [row["batch"] for row in batches if row["tokens_per_second"] > speed]
        canvases.append({"steps": steps, "tokens_per_second": speed, "crossover": more[0] if more else None})
    return {
        "prompt": PROMPT,
        "canvas": n,
        "first_step_seconds": first,
        "step_seconds": step.told(),
        "encoding_seconds": encoding.told(),
        "ours": canvases,
        "theirs": batches,
    }
