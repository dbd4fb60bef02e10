"""A model that is loaded from a GGUF file, and what it can do."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from dgemma._native import ffi, lib
from dgemma.aio import in_threads, last_of
from dgemma.chat.messages import is_message
from dgemma.config import Config
from dgemma.errors import Error, UsageError, check, new_error
from dgemma.events import Result
from dgemma.files.bundled import bundled as bundled
from dgemma.files.routing import prefer_routed, save_routing
from dgemma.hub.models import local_model
from dgemma.native.handle import Handle, give_lock
from dgemma.options import sampling_for, settings_of
from dgemma.session import (
    Accept,
    Event,
    Floats,
    Ids,
    Mask,
    OnEncode,
    OnStep,
    Session,
    Start,
    denoise_together,
    id_array,
    last,
)
from dgemma.session import Messages as Messages
from dgemma.session import Prompt as Prompt
from dgemma.tokenizer import Tokenizer
from dgemma.units import size

if TYPE_CHECKING:
    from dgemma.infill.edit import Edited
    from dgemma.infill.fill import Filled, Pieces

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes that a model under a memory budget has moved since it was opened."""

    passes: int  # passes through the layers, for steps and for parts of prompts
    read: int  # from the file
    copied: int  # of these, bytes read through the page cache, where the file system has no direct reads
    resident: int  # weights that are in memory now, to stay
    ring: int  # bytes of the buffers that the other weights come through
    experts: int  # bytes of all experts in the file
    streamed: int  # bytes of the experts that do not stay: what a pass that uses them all reads
    reading: float  # seconds that reads took
    waited: float  # seconds that passes waited for them


class Model:
    """A model from a GGUF file, mapped and checked; a context manager.

    Threads may share it, each with its own session. After close() its methods raise Error. A forked process may go on
    with it, on threads of its own; where it is on a GPU it cannot, and is told so in a BackendError.
    hf:owner/name[:TYPE] stands for a file of the Hugging Face Hub, fetched once: see dgemma.hub.models.

    path: the file, or "tidy" or "sudoku", which come with dgemma (a file of such a name is "./tidy"); None is "sudoku".
    backend: "auto", or a name of backends(). threads: None is one per processor that this process may use.
    exact: float32 throughout; otherwise activations are rounded to 8 or 13 bits before they meet quantised weights,
    which is several times faster. repack: memory to spend, in bytes or as "4G", on copies of experts that are faster to
    read; the tokens stay the same.
    tolerance: how far what conditions the next step may be off, as a part of its length (0.001 unless given): where a
    bound is within it, likely tokens alone are summed.
    ram: the most memory that the process may hold, in bytes or as "8G"; experts that it does not hold are read again at
    every step, and the tokens stay the same. None: the file is mapped, and the system keeps what it can. What the
    process holds already counts; arrays that you make later (the logits that a session returns) do not. Where
    FILE.routing.json is (see save_routing), the experts that were used most stay first. layers: for measuring, run
    through the first so many alone.
    vram: on a GPU (backend="cuda") the most of its memory to hold, in bytes or as "8G", driver and kernels included;
    experts that do not fit are copied there at every step or computed by the CPU meanwhile, always the same ones: by
    FILE.routing.json, or by number. None: what is free, less a margin.
    Raises FormatError for a file that is not understood, SystemFailure for one that cannot be read, BackendError,
    MemoryBudgetError, with the least that would do, for a budget that cannot be kept.
    """

    _lock: threading.RLock  # held where _handle or _sessions is changed
    _head_copy = False  # whether a file may hold its embedding as an output head too, which the caller compares

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        threads: int | None = None,
        exact: bool = False,
        repack: int | str | None = None,
        ram: int | str | None = None,
        layers: int | None = None,
        tolerance: float | None = None,
        vram: int | str | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads < 2**31:
            raise UsageError(f"threads must be at least 1, not {threads}")
        self._path: str = bundled() if path is None else local_model(path)
        name = os.fsencode(self._path)
        if b"\0" in name or "\0" in backend:
            raise UsageError(f"a path or backend cannot hold a null character: {self._path!r}, {backend!r}")
        options, out, error = ffi.new("dg_model_options *"), ffi.new("dg_model **"), new_error()
        text = ffi.new("char[]", backend.encode())
        options.backend, options.threads, options.exact = text, threads or 0, exact
        options.repack = 0 if repack is None else size(repack, "repack")
        options.ram, options.layers = 0 if ram is None else size(ram, "ram"), layers or 0
        if ram is not None and options.ram == 0:
            raise UsageError("ram must be more than nothing; None is no budget")
        options.vram = 0 if vram is None else size(vram, "vram")
        if vram is not None and options.vram == 0:
            raise UsageError("vram must be more than nothing; None is what is free, less a margin")
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise UsageError(f"tolerance must be a number from 0 on, not {tolerance}")
        options.tolerance = 0 if tolerance is None else tolerance or -1
        options.head_copy = self._head_copy
        check(lib.dg_model_open(name, options, out, error), error)
        self._handle: Handle | None = Handle(out[0], lib.dg_model_free)
        self._sessions: WeakSet[Session] = WeakSet()
        give_lock(self)
        self._config = Config(lib.dg_model_config(out[0]))
        self._tokenizer: Tokenizer | None = Tokenizer._borrow(lib.dg_model_tokenizer(out[0]), self._handle)
        self._backend: str = ffi.string(lib.dg_model_backend(out[0])).decode()
        self._threads = int(lib.dg_model_threads(out[0]))
        self._ram = int(options.ram) or None
        self._vram = int(options.vram) or None
        if self._ram is not None or backend == "cuda":
            prefer_routed(self)

    def close(self) -> None:
        """Close its sessions and let go of the file, once its tokenizer is forgotten too. A second call does nothing.

        Any thread may call it: what others are doing with the model ends first, and all that they begin after it raises
        Error.
        """
        with self._lock:
            self._handle = self._tokenizer = None
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<dgemma.Model {self._path!r}, {self._backend}{'' if self._handle else ', closed'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a dgemma.Model cannot be pickled or copied: open its path again, or share it between threads")

    def _open_handle(self) -> Handle:
        return self._unless_closed(self._handle)

    def _unless_closed(self, kept: Kept | None) -> Kept:
        if kept is None:
            raise Error(f"this model is closed: {self._path}")
        return kept

    def _adopt(self, session: Session) -> None:
        """Remember a session, which close() closes too.

        It is closed at once, and with an Error, where the model was closed meanwhile.
        """
        with self._lock:
            self._sessions.add(session)
            closed = self._handle is None
        if closed:
            session.close()
            self._open_handle()

    @property
    def path(self) -> str:
        return self._path

    @property
    def config(self) -> Config:
        """Sizes, per-layer values, end ids and the file's sampling settings; it outlives the model."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._unless_closed(self._tokenizer)

    @property
    def backend(self) -> str:
        """The name of the backend, such as "cpu (avx2)"."""
        return self._backend

    @property
    def threads(self) -> int:
        """How many threads it runs on."""
        return self._threads

    @property
    def ram(self) -> int | None:
        """The budget of memory in bytes, or None."""
        return self._ram

    @property
    def vram(self) -> int | None:
        """The budget of a GPU's memory that was given, in bytes, or None."""
        return self._vram

    @property
    def routing(self) -> npt.NDArray[np.int64]:
        """How many tokens met each expert since the model was opened: int64 [n_layer, n_expert], a copy."""
        counts = np.zeros((self._config.n_layer, self._config.n_expert), np.int64)
        lib.dg_model_routing(self._open_handle().pointer, ffi.cast("int64_t *", counts.ctypes.data))
        return counts

    def save_routing(self, path: str | os.PathLike[str] | None = None) -> str:
        """Add `routing` to a JSON file, beside the model unless it is said otherwise; return its path.

        The next model that is opened from this file under a budget keeps the experts that were used most. A file that
        is there must be of a model of this shape, else Error. It is replaced at once or not at all.
        """
        return save_routing(self, path)

    @property
    def traffic(self) -> Traffic | None:
        """What a model under a budget has read since it was opened; None without one."""
        out = ffi.new("dg_traffic *")
        if not lib.dg_model_traffic(self._open_handle().pointer, out):
            return None
        return Traffic(**{field.name: getattr(out, field.name) for field in fields(Traffic)})

    def settings(self, **options: Any) -> dict[str, int | float]:
        """Return what generate(**options) uses: every option, those not given with the file's values."""
        return settings_of(sampling_for(self._open_handle().pointer, options))

    def session(self, context: int | None = None) -> Session:
        """Return a new session: what it encodes, and canvases behind that.

        context: most tokens that it can hold; None: the model's own, at most 8192 and what there is memory for. Memory
        is taken as it is used; raises MemoryBudgetError where all of it is more than the model's budget, or than is
        free now.
        """
        return Session(self, context)

    def session_bytes(self, tokens: int) -> int:
        """Return the bytes that a session takes by the time it holds so many tokens."""
        return int(lib.dg_session_bytes(self._open_handle().pointer, tokens))

    def denoise(self, canvases: Sequence[tuple[Session, Ids, npt.ArrayLike | None]]) -> list[Floats]:
        """Do one denoising step for canvases of several sessions at once.

        canvases: (session, canvas, condition) each, all sessions of this model and different. Returns what each
        session.denoise(canvas, condition) would have, to the bit, in less time: experts see all rows together.
        """
        self._open_handle()
        for session, _, _ in canvases:
            if session.model is not self:
                raise UsageError("these sessions are not all of this model")
        return denoise_together(canvases)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids that a prompt stands for.

        str: the text exactly as it is, with <bos> in front where it is missing (see Tokenizer.add_bos); messages
        ({"role": ..., "content": ...}): through the file's chat template, or in a file without one the last user
        message's text; ids: themselves. Raises UsageError for an empty prompt or an id outside the vocabulary.
        """
        if isinstance(prompt, (bytes, bytearray, Mapping)) or not hasattr(prompt, "__len__"):
            raise TypeError(f"a prompt is text, a list of messages or a list of ids, not {type(prompt).__name__}")
        if len(prompt) == 0:
            raise UsageError("empty prompt")
        if isinstance(prompt, str):
            return self.tokenizer.prompt(prompt)
        if is_message(prompt[0]):
            return self.tokenizer.chat(cast(Messages, prompt))
        ids: list[int] = id_array(cast(Ids, prompt), self._config.n_vocab, "prompt").tolist()
        return ids

    def generate(self, prompt: Prompt, *, on_step: OnStep | None = None, **given: Any) -> Result:
        r"""Answer a prompt (see prompt_ids).

        The options are options.def's:

        max_tokens steps entropy_bound t_min t_max stability confidence seed plateau settled short_canvas retries
        commit, and effort, a name for several ("low", "medium", "high", "reference": see dgemma.efforts()); None stands
        for the file's value.

        canvas, pinned: ids [n] and bool [n], n of any length, for a text that is given in part. Pinned ids stay what
        they are at every step; the others are not read, and denoised around the pins. Each run of them is a hole: it
        ends before its first end id, and pad ids in it are filler; neither these nor what stands behind the end reaches
        Result.ids, whose Result.places are the positions in canvas. The cuts between canvases are at multiples of
        config.canvas_length. With all positions free: the same tokens as without.

        accept: a rule in place of the entropy bound, accept(entropy, step) -> bool [n]. entropy: float32 [n], nats, 0
        where pinned. It says which positions keep their sample; the others are drawn anew.

        on_step is called with every Step. Raises TypeError for an unknown option, UsageError for a value out of range
        or a prompt that is empty or longer than the model's context. Ctrl-C is heard between two steps.

        >>> import dgemma
        >>> with dgemma.Model() as model:
        ...     ids = model.tokenizer.encode("534678912\n")
        ...     result = model.generate("5346789.2\n" * 9, canvas=ids, pinned=[i != 7 for i in range(10)])
        >>> result.text[:7], len(result.ids), result.places == list(range(10))
        ('5346789', 10, True)
        """
        return last(self.stream(prompt, on_step=on_step, **given))

    def stream(
        self,
        prompt: Prompt,
        *,
        on_step: OnStep | None = None,
        on_encode: OnEncode | None = None,
        canvas: Ids | None = None,
        pinned: Mask | None = None,
        accept: Accept | None = None,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Generate as generate() does: yield a Step per denoising step, a Block per canvas, then the Result.

        on_encode(done, total) is called while the prompt is encoded. The stream can be left at any event and frees
        what it holds.
        """
        sampling = sampling_for(self._open_handle().pointer, options)
        start = Start.of(canvas, pinned, options, self._config.n_vocab)
        ids = self.prompt_ids(prompt)
        limit = self._config.context_length
        if len(ids) > limit:
            raise UsageError(f"the prompt has {len(ids)} tokens, more than the model's context of {limit}")
        tokens = len(start.ids) if start is not None else sampling.max_tokens
        canvases = -(-tokens // self._config.canvas_length)
        context = len(ids) + (canvases - 1) * self._config.canvas_length  # the last canvas is not encoded
        if context > limit:
            raise UsageError(
                f"{'a canvas of' if start is not None else 'max_tokens'} {tokens} behind the prompt's {len(ids)} tokens"
                f" needs a context of {context}, more than the model's {limit}"
            )
        return self._stream(context, ids, sampling, start, on_step, on_encode, accept)

    def _stream(self, context: int, *given: Any) -> Generator[Event, None, None]:
        with self.session(context) as session:
            yield from session._stream(*given)

    def fill(self, text: str | Pieces, prompt: Prompt | None = None, **given: Any) -> Filled:
        r"""Write what is missing in a text: [[...]] is a hole, [[n]] one of n tokens. Returns a Filled.

        text: may also be given as pieces, str and Hole. prompt: what it is about (see prompt_ids); None: nothing but
        the text. lengths: those tried for a hole of unknown length, one after the other (of several holes the first
        first, the others meanwhile as long as the middle one); the one with the most evidence wins
        (dgemma.infill.scoring: how likely the text is, by next-token logits, and how free its choice was). Filler (pad
        ids) and what stands behind an end id is left out of a hole. special: texts of control tokens in the text are
        those tokens. on_step, on_encode and the options are those of generate().

        A text that fits on a canvas stands on it, with an end id and pad ids behind it. Of a longer one, what stands
        before the canvases goes before them, encoded (its beginning is left out where the context is too short); what
        follows behind the last is kept but not seen. Holes longer than a canvas go on on the next.
        Raises UsageError for a text without holes, or holes that do not fit the context.

        >>> import dgemma
        >>> with dgemma.Model() as model:
        ...     filled = model.fill("12345678[[1]]\n", "12345678.\n" * 9)
        >>> filled.text[:8], len(filled.holes), len(filled.trials)
        ('12345678', 1, 1)
        """
        from dgemma.infill.fill import fill

        return fill(self, text, prompt, **given)

    def edit(self, text: str, span: tuple[int, int], instruction: str, **given: Any) -> Edited:
        """Rewrite the passage text[span[0]:span[1]], as the instruction says. Returns an Edited, with a diff().

        The prompt is one user message: the instruction, a newline, the passage. The canvas has the surroundings,
        pinned, and a hole for the passage; the lengths tried for it are a little to half as much longer than it, or
        `lengths`. Surroundings that do not fit go into the prompt: what stands before the canvas as the beginning of
        the answer, what stands behind it into the message. on_step, on_encode and the options are those of generate().
        Raises UsageError for a span outside the text or an empty instruction.
        """
        from dgemma.infill.edit import edit

        return edit(self, text, span, instruction, **given)

    def astream(self, prompt: Prompt, **given: Any) -> AsyncGenerator[Event, None]:
        """Generate as stream() does, for `async for`: each step runs in a thread while other tasks go on.

        Cancelled, or left, it stops within one step. Callbacks (on_step, accept) are called in that thread.
        """
        return in_threads(self.stream, prompt, given)

    async def agenerate(self, prompt: Prompt, **given: Any) -> Result:
        """Generate as generate() does, for `await`; cancelled, it stops within one step."""
        return await last_of(self.astream(prompt, **given))


def backends() -> list[str]:
    """Return the backends of this build, best first."""
    names: list[str] = []
    while name := lib.dg_backend_name(len(names)):
        names.append(ffi.string(name).decode())
    return names
