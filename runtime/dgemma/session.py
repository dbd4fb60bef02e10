"""A session: it holds encoded tokens, and denoises canvases behind them."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dgemma._native import ffi, lib
from dgemma.aio import in_threads, last_of
from dgemma.config import Config
from dgemma.errors import Error, Stopped, UsageError, check, new_error
from dgemma.events import Block, Result, Step
from dgemma.native.arrays import check_free, floats
from dgemma.native.handle import Handle, give_lock
from dgemma.native.interrupts import let_signals_through, raise_from_handler
from dgemma.options import sampling_for

if TYPE_CHECKING:
    from dgemma.model import Model

Ids: TypeAlias = Sequence[int] | npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = Sequence[bool] | npt.NDArray[np.bool_]
Event: TypeAlias = Step | Block | Result
OnStep: TypeAlias = Callable[[Step], object]
OnEncode: TypeAlias = Callable[[int, int], object]
Accept: TypeAlias = Callable[[Floats, Step], npt.ArrayLike]
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages | Ids

CHUNK = 256  # tokens per call of the encoder: on_encode is called between two calls
USUAL_CONTEXT = int(lib.DG_USUAL_CONTEXT)
ROOM = 2048  # tokens that an answer of no given length should have room for
FAULTS = {lib.DG_FAULT_NONE: None, lib.DG_FAULT_EMPTY: "empty", lib.DG_FAULT_LOOP: "loop"}
_LOGITS = {None: lib.DG_LOGITS_NONE, "last": lib.DG_LOGITS_LAST, "all": lib.DG_LOGITS_ALL}


@dataclass(frozen=True, slots=True)
class Start:
    """A canvas that the caller gives: int32 ids [n], ignored where bool pinned [n] is False."""

    ids: npt.NDArray[np.int32]
    pinned: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, canvas: Ids | None, pinned: Mask | None, options: Mapping[str, Any], n_vocab: int) -> Start | None:
        """Return the Start for generate()'s arguments `canvas` and `pinned`, or None without them.

        Raises UsageError where they do not fit together.
        """
        if canvas is None and pinned is None:
            return None
        if canvas is None or pinned is None:
            missing = "canvas" if canvas is None else "pinned"
            raise UsageError(f"canvas and pinned belong together; {missing} is missing")
        if options.get("max_tokens") is not None:
            raise UsageError("a canvas says itself how long the answer is: give no max_tokens with it")
        ids, mask = np.asarray(canvas), np.asarray(pinned)
        if mask.dtype != np.bool_ or mask.shape != ids.shape:
            raise UsageError(f"pinned must be bool {ids.shape}, like canvas, not {mask.dtype} {mask.shape}")
        if mask.size == 0:
            raise UsageError("an empty canvas: it needs a token at least")
        if ids.dtype.kind in "iu":
            ids = np.where(mask, ids, 0)  # the others are not read, so they may be anything
        return cls(id_array(ids, n_vocab, "canvas"), np.ascontiguousarray(mask))


class Session:
    """A session of a model, made by `model.session()`; a context manager.

    It may be used by one thread at a time. After close() (its own, or the model's), its methods raise Error. A forked
    process has a copy of it in the same state. If another thread was running a stream at the fork, the copy can only be
    closed.
    """

    _lock: threading.RLock  # re-entrant: the garbage collector may close a stream while this thread holds the lock

    def __init__(self, model: Model, context: int | None = None) -> None:
        if context is not None and not 1 <= context <= model.config.context_length:
            raise UsageError(f"context must be 1 to the model's {model.config.context_length} tokens, not {context}")
        out, error = ffi.new("dg_session **"), new_error()
        owner = model._open_handle()
        check(lib.dg_session_new(owner.pointer, context or 0, out, error), error)
        self._handle: Handle | None = Handle(out[0], lib.dg_session_free, owner)
        self._generator: Handle | None = None
        self._ids: list[int] = []  # the tokens that are encoded
        self._model = model
        self._closing = False  # close() was called
        give_lock(self)
        model._adopt(self)

    def close(self) -> None:
        """Free the session, and end a stream that runs in it. A second call does nothing."""
        self._closing = True  # set before waiting for the lock, so that calls of other threads raise the right Error
        with self._lock:
            if self._generator is not None:
                self._generator.close()
                self._generator = None
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def stop(self) -> None:
        """Stop the call that this session is in, or else its next one, which raises Stopped.

        Any thread may call it, and a signal handler. A pass ends at its next layer, and one together with other
        sessions when all are to stop; the session then holds the tokens that it held before the call, and the finished
        canvases of a stream.
        """
        handle = self._handle
        pointer = None if handle is None else handle.pointer  # which is None once the session is closed
        if pointer is not None:
            lib.dg_session_stop(pointer, True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._lock:
            if self._handle is None:
                return "<dgemma.Session, closed>"
            return f"<dgemma.Session, {self.length} of {self.context} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a dgemma.Session cannot be pickled or copied: encode its tokens again in another session")

    @contextmanager
    def _use(self, generating: bool = False) -> Iterator[Any]:
        """Yield the `dg_session *`, for one call into the library."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            self._model._open_handle()  # raises where the model is closed, which closes its sessions
            if self._closing:
                raise Error("this session is closed")
            raise Error("this session is in use by another thread; give each thread a session of its own")
        try:
            if self._handle is None:
                raise Error("this session is closed")
            if self._generator is not None and not generating:
                raise Error("this session is generating; finish its stream or close it first")
            let_signals_through(self._handle.pointer)
            yield self._handle.pointer
        except Stopped:
            if self._handle is not None:
                lib.dg_session_stop(self._handle.pointer, False)
            raise_from_handler()
            raise
        finally:
            lock.release()

    def _query(self, question: Callable[[Any], int]) -> int:
        with self._lock:
            if self._handle is None:
                raise Error("this session is closed")
            return int(question(self._handle.pointer))

    @property
    def model(self) -> Model:
        return self._model

    @property
    def length(self) -> int:
        """The number of tokens that are encoded."""
        return self._query(lib.dg_session_length)

    @property
    def context(self) -> int:
        """The number of tokens that can be encoded."""
        return self._query(lib.dg_session_context)

    @property
    def ids(self) -> list[int]:
        """The tokens that are encoded, a copy."""
        with self._lock:
            return list(self._ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises UsageError if there are not as many."""
        with self._use() as pointer:
            if not 0 <= length <= lib.dg_session_length(pointer):
                raise UsageError(f"cannot rewind to {length} of {lib.dg_session_length(pointer)} tokens")
            error = new_error()
            check(lib.dg_session_rewind(pointer, length, error), error)
            del self._ids[length:]

    def encode(self, ids: Ids, logits: str | None = None, on_encode: OnEncode | None = None) -> Floats | None:
        """Append ids through the causal encoder.

        Returns float32 next-token logits: [n_vocab] behind the last id with logits="last", [len(ids), n_vocab] with
        "all", else None. on_encode(done, total) is called as tokens are encoded.
        Raises UsageError for ids outside the vocabulary or more than the context holds, MemoryBudgetError where the
        logits need more memory than is free. Either all ids are encoded or, after an error or an interrupt, none.
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
        out = floats((rows, self._model.config.n_vocab), f"logits {logits!r} of {n} tokens")
        try:
            for at in range(0, n, CHUNK):
                part = array[at : at + CHUNK]
                wanted = which if which == lib.DG_LOGITS_ALL or at + CHUNK >= n else lib.DG_LOGITS_NONE
                with self._use() as pointer:
                    _encode(pointer, part, wanted, out[at:] if which == lib.DG_LOGITS_ALL else out)
                    self._ids += part.tolist()
                if on_encode is not None:
                    on_encode(at + len(part), n)
        except BaseException:
            with self._lock:
                if self._handle is not None and lib.dg_session_length(self._handle.pointer) > start:
                    lib.dg_session_rewind(self._handle.pointer, start, new_error())
                    del self._ids[start:]
            raise
        return None if logits is None else out[0] if logits == "last" else out

    def shared(self, ids: Ids) -> int:
        """Return the length of the longest beginning of ids that is encoded already; prompt() reuses it."""
        held = self.ids
        first = (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b)
        return next(first, min(len(held), len(ids)))

    def prompt(self, prompt: Prompt, on_encode: OnEncode | None = None) -> int:
        """Make the session hold exactly a prompt (see Model.prompt_ids); return how many tokens had to be encoded.

        The longest beginning of the prompt that is encoded already is kept; other tokens are dropped.

        Raises UsageError for a prompt that is empty or longer than the context; the session is then unchanged.
        """
        ids = self._model.prompt_ids(prompt)
        if len(ids) > self.context:
            raise UsageError(f"the prompt has {len(ids)} tokens, more than the session's context of {self.context}")
        same = self.shared(ids)
        self.rewind(same)
        if same < len(ids):
            self.encode(ids[same:], on_encode=on_encode)
        return len(ids) - same

    def denoise(self, canvas: Ids, condition: npt.ArrayLike | None = None) -> Floats:
        """Run one pass of the bidirectional decoder over a canvas behind the encoded tokens, which stay as they are.

        canvas: 1 .. canvas_length ids. condition: the previous step's logits divided by their temperature,
        [len(canvas), n_vocab], or None. Returns float32 logits of the same shape.
        Raises UsageError for other lengths, shapes or ids.
        """
        return denoise_together([(self, canvas, condition)])[0]

    def hidden(self, canvas: Ids, condition: npt.ArrayLike | None = None) -> Floats:
        """Run denoise(), and return hidden states: the first layer's input, then each layer's output.

        Returns float32 [n_layer + 1, len(canvas), d_model]. Raises as denoise() does.
        """
        config = self._model.config
        ids, scaled = canvas_arrays(config, canvas, condition)
        out = floats(
            (config.n_layer + 1, len(ids), config.d_model), f"what {config.n_layer} layers make of {len(ids)} ids"
        )
        given = ffi.NULL if scaled is None else ffi.from_buffer("float[]", scaled)
        error = new_error()
        with self._use() as pointer:
            into = ffi.from_buffer("float[]", out, require_writable=True)
            check(
                lib.dg_denoise_hidden(pointer, ffi.from_buffer("int32_t[]", ids), len(ids), given, into, error), error
            )
        return out

    def generate(self, prompt: Prompt | None = None, *, on_step: OnStep | None = None, **given: Any) -> Result:
        """Generate behind what is encoded, or behind a prompt, as Model.generate does, with the same arguments.

        A prompt (see prompt()) replaces what the session holds. To continue a conversation, give all of it each time:
        only the new tokens are encoded, and Result.encoded_tokens counts them. Without a prompt, the answer continues
        the encoded tokens. Each finished canvas is encoded, except the last one: to continue an answer without a
        prompt, encode the last block's ids and an end id.
        """
        return last(self.stream(prompt, on_step=on_step, **given))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        on_step: OnStep | None = None,
        on_encode: OnEncode | None = None,
        canvas: Ids | None = None,
        pinned: Mask | None = None,
        accept: Accept | None = None,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Generate as generate() does: yield a Step per denoising step, a Block per canvas, then the Result.

        The caller may stop at any event. Until the stream is finished or closed, other calls raise Error.
        """
        sampling = sampling_for(self._model._open_handle().pointer, options)
        start = Start.of(canvas, pinned, options, self._model.config.n_vocab)
        ids = None if prompt is None else self._model.prompt_ids(prompt)
        return self._stream(ids, sampling, start, on_step, on_encode, accept)

    def astream(self, prompt: Prompt | None = None, **given: Any) -> AsyncGenerator[Event, None]:
        """Generate as stream() does, for `async for`: see Model.astream."""
        return in_threads(self.stream, prompt, given)

    async def agenerate(self, prompt: Prompt | None = None, **given: Any) -> Result:
        """Generate as generate() does, for `await`: see Model.agenerate."""
        return await last_of(self.astream(prompt, **given))

    def _stream(
        self,
        prompt: list[int] | None,
        sampling: Any,
        start: Start | None,
        on_step: OnStep | None,
        on_encode: OnEncode | None,
        accept: Accept | None,
    ) -> Generator[Event, None, None]:
        """Generate as stream() does, with a `dg_sampling *` and checked arguments."""
        started = perf_counter()
        encoded = self.prompt(prompt, on_encode) if prompt is not None else 0
        seconds = perf_counter() - started
        event, error = ffi.new("dg_event *"), new_error()
        generator, prompt_tokens = self._begin(sampling, start)
        try:
            while True:
                with self._use(generating=True):
                    self._check_runs(generator)
                    started = perf_counter()
                    check(lib.dg_generator_next(generator.pointer, event, error), error)
                    seconds += perf_counter() - started
                    result = lib.dg_generator_result(generator.pointer)
                    happened: Event
                    if event.kind == lib.DG_EVENT_STEP:
                        happened = _step(event)
                    elif event.kind == lib.DG_EVENT_BLOCK:
                        happened = _blocks(result)[-1]
                    else:
                        happened = self._result(result, prompt_tokens, encoded, seconds)
                if isinstance(happened, Step):
                    if accept is not None:
                        mask = _mask(accept(happened.entropy, happened), len(happened.canvas))
                        with self._use(generating=True):
                            self._check_runs(generator)
                            check(lib.dg_generator_accept(generator.pointer, mask, error), error)
                            now = _step(event)
                            happened = replace(happened, accepted=now.accepted, next=now.next)
                    if on_step is not None:
                        on_step(happened)
                yield happened
                if isinstance(happened, Result):
                    return
        except Stopped as stop:
            stop.result = self._result(
                lib.dg_generator_result(generator.pointer), prompt_tokens, encoded, seconds, finished=False
            )
            raise
        finally:
            with self._lock:
                if self._generator is generator:
                    if self._handle is not None:  # the generator encoded its finished canvases: add their ids
                        more = lib.dg_session_length(self._handle.pointer) - prompt_tokens
                        result = lib.dg_generator_result(generator.pointer)
                        self._ids += ffi.unpack(result.ids, more) if more > 0 else []
                    self._generator = None
                    generator.close()

    def _begin(self, sampling: Any, start: Start | None) -> tuple[Handle, int]:
        """Return a `dg_generator *` behind what is encoded, and how many tokens that is."""
        out, error = ffi.new("dg_generator **"), new_error()
        with self._use() as pointer:
            tokens = int(lib.dg_session_length(pointer))
            if tokens == 0:
                raise UsageError("empty prompt: nothing is encoded")
            check(lib.dg_generator_fill(pointer, sampling, _start(start), out, error), error)
            self._generator = generator = Handle(out[0], lib.dg_generator_free, self._handle)
        return generator, tokens

    def _check_runs(self, generator: Handle) -> None:
        if self._generator is not generator:
            raise Error("this stream was closed")

    def _result(
        self, result: Any, prompt_tokens: int, encoded_tokens: int, seconds: float, finished: bool = True
    ) -> Result:
        """Return a `dg_result *` as a Result. finished: it is the whole answer."""
        ids = list(result.ids[0 : result.n_ids]) if result.n_ids else []
        places = None if result.places == ffi.NULL else list(result.places[0 : len(ids)]) if ids else []
        return Result(
            text=self._model.tokenizer.decode(ids),
            ids=ids,
            blocks=_blocks(result),
            steps=int(result.steps),
            converged=bool(result.converged),
            finish_reason="stop" if result.stopped else "length" if finished else "stopped",
            prompt_tokens=prompt_tokens,
            encoded_tokens=encoded_tokens,
            seed=int(result.seed),
            retries=int(result.retries),
            places=places,
            seconds=seconds,
            tokens_per_second=len(ids) / max(seconds, 1e-9),
        )


def denoise_together(canvases: Sequence[tuple[Session, Ids, npt.ArrayLike | None]]) -> list[Floats]:
    """Run Session.denoise for several sessions of one model in one pass; the results are the same as one by one."""
    native = ffi.new("dg_canvas[]", len(canvases))
    kept: list[Any] = []  # keeps the buffers alive that the native structs point into
    out: list[Floats] = []
    size = 0
    for each, (session, canvas, condition) in zip(native, canvases, strict=True):
        ids, given = canvas_arrays(session.model.config, canvas, condition)
        logits = floats((len(ids), session.model.config.n_vocab), f"logits of {len(ids)} ids")
        size += logits.nbytes
        check_free(size, f"logits of {len(out) + 1} canvases")
        each.canvas, each.n = ffi.from_buffer("int32_t[]", ids), len(ids)
        each.logits = ffi.from_buffer("float[]", logits, require_writable=True)
        if given is not None:
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


def canvas_arrays(
    config: Config, canvas: Ids, condition: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.int32], Floats | None]:
    """Return a canvas and its condition as the library takes them.

    Raises UsageError for other lengths, shapes or ids.
    """
    ids = id_array(canvas, config.n_vocab, "canvas")
    if not 1 <= len(ids) <= config.canvas_length:
        raise UsageError(f"a canvas has 1 to {config.canvas_length} ids, not {len(ids)}")
    if condition is None:
        return ids, None
    given, shape = np.asarray(condition), (len(ids), config.n_vocab)
    if given.shape != shape or given.dtype.kind != "f":
        raise UsageError(f"condition must be float32 {shape}, not {given.dtype} {given.shape}")
    return ids, np.ascontiguousarray(given, np.float32)


def id_array(ids: Ids, n_vocab: int, what: str) -> npt.NDArray[np.int32]:
    """Return ids as contiguous int32 [n].

    Raises TypeError for other than whole numbers, UsageError outside the vocabulary.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    outside = np.flatnonzero((array < 0) | (array >= n_vocab))
    if outside.size:
        at = int(outside[0])
        raise UsageError(f"{what}[{at}] is {array[at]}, outside the vocabulary of {n_vocab}")
    return np.array(array, np.int32)  # a copy for the library: the caller may change the array meanwhile


def needed_context(config: Config, prompt: int, max_tokens: int) -> int:
    """Return the context for a prompt and its answer: all canvases of an answer but the last are encoded.

    max_tokens: the option of this name; an answer of no given length (0) has room for ROOM tokens, or for what is left
    of the model's context. The context may be more than the model's where max_tokens or the prompt is too long.
    """
    n: int = config.canvas_length
    if max_tokens:
        return prompt + (-(-max_tokens // n) - 1) * n
    return max(prompt, min(prompt + ROOM, int(config.context_length)))


def last(events: Generator[Event, None, None]) -> Result:
    """Return the Result that ends a stream."""
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                return event
    raise AssertionError("a stream ends with a Result")


def _encode(pointer: Any, ids: npt.NDArray[np.int32], which: int, out: Floats) -> None:
    """Call dg_encode for one chunk; out: [at least as many rows as `which` asks for, n_vocab]."""
    error = new_error()
    logits = ffi.from_buffer("float[]", out, require_writable=True) if which != lib.DG_LOGITS_NONE else ffi.NULL
    check(lib.dg_encode(pointer, ffi.from_buffer("int32_t[]", ids), len(ids), which, logits, error), error)


def _start(start: Start | None) -> Any:
    """Return a `dg_start *`, or NULL."""
    if start is None:
        return ffi.NULL
    native = ffi.new("dg_start *", {"n": len(start.ids)})
    native.ids, native.pinned = ffi.from_buffer("int32_t[]", start.ids), ffi.from_buffer("bool[]", start.pinned)
    return native


def _mask(given: npt.ArrayLike, n: int) -> Any:
    """Return what an accept rule returned, as a `bool *`."""
    mask = np.asarray(given)
    if mask.dtype != np.bool_ or mask.shape != (n,):
        raise UsageError(f"accept must return bool ({n},), not {mask.dtype} {mask.shape}")
    return ffi.from_buffer("bool[]", np.ascontiguousarray(mask))


def _step(event: Any) -> Step:
    """Return a `dg_event *` as a Step, whose arrays are copies."""

    def copy(pointer: Any, dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.frombuffer(ffi.buffer(pointer, event.n * np.dtype(dtype).itemsize), dtype).copy()

    return Step(
        block=int(event.block),
        index=int(event.index),
        place=int(event.place),
        temperature=float(event.temperature),
        canvas=copy(event.canvas, np.int32),
        entropy=copy(event.entropy, np.float32),
        accepted=copy(event.accepted, np.bool_),
        mean_entropy=float(event.mean_entropy),
        converged=bool(event.converged),
        next=copy(event.next, np.int32),
        final=list(event.final[0 : event.n_final]) if event.n_final else [],
    )


def _blocks(result: Any) -> list[Block]:
    """Return the finished canvases of a `dg_result *`."""
    blocks: list[Block] = []
    at = 0
    for index in range(result.n_blocks):
        block = result.blocks[index]
        ids = list(result.ids[at : at + block.tokens]) if block.tokens else []
        converged, fault = bool(block.converged), FAULTS[block.fault]
        blocks.append(Block(index, int(block.steps), int(block.tokens), converged, ids, fault))
        at += block.tokens
    return blocks
