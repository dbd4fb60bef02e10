"""A session: one timeline of tokens behind which canvases are denoised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dgemma._native import ffi, lib
from dgemma.errors import Error, UsageError, check, new_error
from dgemma.events import Block, Result, Step
from dgemma.handle import Handle
from dgemma.options import sampling_for

if TYPE_CHECKING:
    from dgemma.model import Model

Ids: TypeAlias = Sequence[int] | npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Event: TypeAlias = Step | Block | Result
OnStep: TypeAlias = Callable[[Step], object]
OnEncode: TypeAlias = Callable[[int, int], object]

CHUNK = 256  # tokens per call of the encoder: between two, Ctrl-C is heard
_LOGITS = {None: lib.DG_LOGITS_NONE, "last": lib.DG_LOGITS_LAST, "all": lib.DG_LOGITS_ALL}


class Session:
    """Made by `model.session()`; a context manager. It may be used by one thread at a time.

    After close() (its own, or the model's), its methods raise Error.
    """

    def __init__(self, model: Model, context: int | None = None) -> None:
        if context is not None and not 1 <= context <= model.config.context_length:
            raise UsageError(f"context must be 1 to the model's {model.config.context_length} tokens, not {context}")
        out, error = ffi.new("dg_session **"), new_error()
        owner = model._open_handle()
        check(lib.dg_session_new(owner.pointer, context or 0, out, error), error)
        self._handle: Handle | None = Handle(out[0], lib.dg_session_free, owner)
        self._generator: Handle | None = None
        self._model = model
        self._lock = threading.RLock()  # re-entrant: a forgotten stream may be collected at any time
        model._sessions.add(self)

    def close(self) -> None:
        """Frees the session, and ends a stream that runs in it. Again does nothing."""
        with self._lock:
            if self._generator is not None:
                self._generator.close()
                self._generator = None
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._handle is None:
            return "<dgemma.Session, closed>"
        return f"<dgemma.Session, {self.length} of {self.context} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a dgemma.Session cannot be pickled or copied: encode its tokens again in another session")

    @contextmanager
    def _use(self, generating: bool = False) -> Iterator[Any]:
        """The `dg_session *`, for one call into the library."""
        if not self._lock.acquire(blocking=False):
            raise Error("this session is in use by another thread; give each thread a session of its own")
        try:
            if self._handle is None:
                raise Error("this session is closed")
            if self._generator is not None and not generating:
                raise Error("this session is generating; finish its stream or close it first")
            yield self._handle.pointer
        finally:
            self._lock.release()

    def _ask(self, question: Callable[[Any], int]) -> int:
        with self._lock:
            if self._handle is None:
                raise Error("this session is closed")
            return int(question(self._handle.pointer))

    @property
    def model(self) -> Model:
        return self._model

    @property
    def length(self) -> int:
        """How many tokens are encoded."""
        return self._ask(lib.dg_session_length)

    @property
    def context(self) -> int:
        """How many tokens can be encoded."""
        return self._ask(lib.dg_session_context)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Raises UsageError if there are not as many."""
        with self._use() as pointer:
            if not 0 <= length <= lib.dg_session_length(pointer):
                raise UsageError(f"cannot rewind to {length} of {lib.dg_session_length(pointer)} tokens")
            error = new_error()
            check(lib.dg_session_rewind(pointer, length, error), error)

    def encode(self, ids: Ids, logits: str | None = None, on_encode: OnEncode | None = None) -> Floats | None:
        """Appends ids through the causal encoder.

        Returns float32 next-token logits: [n_vocab] behind the last id with logits="last", [len(ids), n_vocab] with
        "all", else None. on_encode(done, total) is called as tokens are encoded.
        Raises UsageError for ids outside the vocabulary or more than the context holds. Encodes all ids or,
        when it fails or is interrupted, none.
        """
        if logits not in _LOGITS:
            raise UsageError(f"logits must be None, 'last' or 'all', not {logits!r}")
        array = id_array(ids, self._model.config.n_vocab, "ids")
        n, which = len(array), _LOGITS[logits]
        if n == 0:
            raise UsageError("no ids to encode")
        rows = {lib.DG_LOGITS_NONE: 0, lib.DG_LOGITS_LAST: 1, lib.DG_LOGITS_ALL: n}[which]
        start, context = self.length, self.context
        if start + n > context:
            behind = f" behind the {start} encoded" if start else ""
            raise UsageError(f"{n} tokens{behind} are more than the session's context of {context}")
        out = np.empty((rows, self._model.config.n_vocab), np.float32)
        try:
            for at in range(0, n, CHUNK):
                part = array[at : at + CHUNK]
                wanted = which if which == lib.DG_LOGITS_ALL or at + CHUNK >= n else lib.DG_LOGITS_NONE
                with self._use() as pointer:
                    _encode(pointer, part, wanted, out[at:] if which == lib.DG_LOGITS_ALL else out)
                if on_encode is not None:
                    on_encode(at + len(part), n)
        except BaseException:
            with self._lock:
                if self._handle is not None and lib.dg_session_length(self._handle.pointer) > start:
                    lib.dg_session_rewind(self._handle.pointer, start, new_error())
            raise
        return None if logits is None else out[0] if logits == "last" else out

    def denoise(self, canvas: Ids, condition: npt.ArrayLike | None = None) -> Floats:
        """One pass of the bidirectional decoder over a canvas behind the encoded tokens, which stay as they are.

        canvas: 1 .. canvas_length ids. condition: the previous step's logits divided by their temperature,
        [len(canvas), n_vocab], or None. Returns float32 logits of the same shape.
        Raises UsageError for other lengths, shapes or ids.
        """
        return denoise_together([(self, canvas, condition)])[0]

    def generate(self, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """Generates behind what is encoded, as Model.generate does. Between canvases the finished one is encoded, the
        last one is not: to go on from it, encode the result's ids and an end id.
        """
        return last(self.stream(on_step=on_step, **options))

    def stream(self, *, on_step: OnStep | None = None, **options: Any) -> Generator[Event, None, None]:
        """generate() as it happens: yields a Step per denoising step, a Block per canvas, then the Result.

        It can be left at any event; until it is finished or closed, the session does nothing else.
        """
        sampling = sampling_for(self._model._open_handle().pointer, options)
        return self._stream(sampling, on_step, 0.0)

    def _stream(self, sampling: Any, on_step: OnStep | None, seconds: float) -> Generator[Event, None, None]:
        """stream() with a `dg_sampling *`; `seconds` were spent on the prompt."""
        event, out = ffi.new("dg_event *"), ffi.new("dg_generator **")
        error = new_error()
        with self._use() as pointer:
            prompt_tokens = int(lib.dg_session_length(pointer))
            if prompt_tokens == 0:
                raise UsageError("empty prompt: nothing is encoded")
            check(lib.dg_generator_new(pointer, sampling, out, error), error)
            self._generator = generator = Handle(out[0], lib.dg_generator_free, self._handle)
        try:
            while True:
                with self._use(generating=True):
                    if self._generator is not generator:
                        raise Error("this stream was closed")
                    began = perf_counter()
                    check(lib.dg_generator_next(generator.pointer, event, error), error)
                    seconds += perf_counter() - began
                    happened: Event
                    if event.kind == lib.DG_EVENT_STEP:
                        happened = _step(event)
                    elif event.kind == lib.DG_EVENT_BLOCK:
                        result = lib.dg_generator_result(generator.pointer)
                        happened = _blocks(result)[-1]
                    else:
                        result = lib.dg_generator_result(generator.pointer)
                        happened = self._result(result, prompt_tokens, seconds)
                if on_step is not None and isinstance(happened, Step):
                    on_step(happened)
                yield happened
                if isinstance(happened, Result):
                    return
        finally:
            with self._lock:
                if self._generator is generator:
                    self._generator = None
                    generator.close()

    def _result(self, result: Any, prompt_tokens: int, seconds: float) -> Result:
        """A `dg_result *` as a Result."""
        ids = list(result.ids[0 : result.n_ids]) if result.n_ids else []
        return Result(
            text=self._model.tokenizer.decode(ids),
            ids=ids,
            blocks=_blocks(result),
            steps=int(result.steps),
            converged=bool(result.converged),
            finish_reason="stop" if result.stopped else "length",
            prompt_tokens=prompt_tokens,
            seconds=seconds,
            tokens_per_second=len(ids) / max(seconds, 1e-9),
        )


def denoise_together(canvases: Sequence[tuple[Session, Ids, npt.ArrayLike | None]]) -> list[Floats]:
    """Session.denoise for several sessions of one model in one pass; each gets what it would have got alone."""
    native = ffi.new("dg_canvas[]", len(canvases))
    kept: list[Any] = []  # what the native structs point into
    out: list[Floats] = []
    for each, (session, canvas, condition) in zip(native, canvases, strict=True):
        config = session.model.config
        ids = id_array(canvas, config.n_vocab, "canvas")
        if not 1 <= len(ids) <= config.canvas_length:
            raise UsageError(f"a canvas has 1 to {config.canvas_length} ids, not {len(ids)}")
        logits = np.empty((len(ids), config.n_vocab), np.float32)
        each.canvas, each.n = ffi.from_buffer("int32_t[]", ids), len(ids)
        each.logits = ffi.from_buffer("float[]", logits, require_writable=True)
        if condition is not None:
            given = np.asarray(condition)
            if given.shape != logits.shape or given.dtype.kind != "f":
                raise UsageError(f"condition must be float32 {logits.shape}, not {given.dtype} {given.shape}")
            given = np.ascontiguousarray(given, np.float32)
            each.condition = ffi.from_buffer("float[]", given)
            kept.append(given)
        kept.append(ids)
        out.append(logits)
    with ExitStack() as in_use:
        for each, (session, _, _) in zip(native, canvases, strict=True):
            each.session = in_use.enter_context(session._use())
        error = new_error()
        check(lib.dg_denoise_batch(native, len(canvases), error), error)
    return out


def id_array(ids: Ids, n_vocab: int, what: str) -> npt.NDArray[np.int32]:
    """ids as contiguous int32 [n]. Raises TypeError for other than whole numbers, UsageError outside the vocabulary."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    outside = np.flatnonzero((array < 0) | (array >= n_vocab))
    if outside.size:
        at = int(outside[0])
        raise UsageError(f"{what}[{at}] is {array[at]}, outside the vocabulary of {n_vocab}")
    return np.ascontiguousarray(array, np.int32)


def last(events: Generator[Event, None, None]) -> Result:
    """The Result that ends a stream."""
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                return event
    raise AssertionError("a stream ends with a Result")


def _encode(pointer: Any, ids: npt.NDArray[np.int32], which: int, out: Floats) -> None:
    """dg_encode of one chunk; out: [at least as many rows as `which` asks for, n_vocab]."""
    error = new_error()
    logits = ffi.from_buffer("float[]", out, require_writable=True) if which != lib.DG_LOGITS_NONE else ffi.NULL
    check(lib.dg_encode(pointer, ffi.from_buffer("int32_t[]", ids), len(ids), which, logits, error), error)


def _step(event: Any) -> Step:
    """A `dg_event *` as a Step of its own memory."""

    def copy(pointer: Any, dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.frombuffer(ffi.buffer(pointer, event.n * np.dtype(dtype).itemsize), dtype).copy()

    return Step(
        block=int(event.block),
        index=int(event.index),
        temperature=float(event.temperature),
        canvas=copy(event.canvas, np.int32),
        entropy=copy(event.entropy, np.float32),
        accepted=copy(event.accepted, np.bool_),
        mean_entropy=float(event.mean_entropy),
        converged=bool(event.converged),
    )


def _blocks(result: Any) -> list[Block]:
    """The finished canvases of a `dg_result *`."""
    blocks: list[Block] = []
    at = 0
    for index in range(result.n_blocks):
        block = result.blocks[index]
        ids = list(result.ids[at : at + block.tokens]) if block.tokens else []
        blocks.append(Block(index, int(block.steps), int(block.tokens), bool(block.converged), ids))
        at += block.tokens
    return blocks
