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
from dgemma.options import Setting, sampling_for, settings_of
from dgemma.session import (
    USUAL_CONTEXT,
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
    needed_context,
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

    passes: int  # passes through the layers, for steps and for chunks of prompts
    read: int  # bytes read from the file
    copied: int  # bytes of `read` that went through the page cache: the file system has no direct reads
    resident: int  # bytes of weights that stay in memory
    ring: int  # bytes of the ring of buffers into which the other weights are read
    experts: int  # bytes of all experts in the file
    streamed: int  # bytes of the experts that are not resident: a pass that uses all of them reads so many
    reading: float  # seconds that reads took
    waited: float  # seconds that passes waited for reads


@dataclass(frozen=True, slots=True)
class Memory:
    """A model's budget of main memory, and what there was to decide by when it was opened. Bytes; 0 on a GPU."""

    ram: int | None  # the budget
    needs: int  # the weights and a session of 1024 tokens: what the mapped file takes
    free: int  # the memory that was free; 0 where the system does not tell
    least: int  # the smallest budget


class Model:
    """A model from a GGUF file, mapped and checked; a context manager.

    Threads may share a model, each with its own session. After close() its methods raise Error. A forked process may
    use a model on the CPU, with threads of its own; a model on a GPU raises BackendError there.

    path: the GGUF file, or "tidy" or "sudoku", which come with dgemma (a file of such a name is "./tidy"); None is
    "sudoku". hf:owner/name[:TYPE] is a file of the Hugging Face Hub, which is downloaded once: see dgemma.hub.models.
    backend: "auto", or a name of backends().
    threads: the number of threads; None is one per processor that this process may use.
    exact: compute in float32 throughout. Otherwise activations are rounded to 8 or 13 bits before they are multiplied
    by quantised weights, which is several times faster.
    repack: memory for copies of experts in a layout that is faster to read, in bytes or as "4G"; the tokens stay the
    same.
    tolerance: the largest relative error of the self-conditioning vectors (their error over their length; 0.001 unless
    given). Where a bound of the error is within it, only the likely tokens are summed.
    ram: the most memory that the process may hold, in bytes or as "8G". Experts that do not fit are read from the file
    at every step, and the tokens stay the same. What the process holds already counts; arrays that are made later (such
    as the logits that a session returns) do not. If there is a FILE.routing.json (see save_routing), the experts that
    were used most are kept. None, the default, or "off": the file is mapped, and the system keeps in memory what it
    can. "auto", the default of the commands: a file that is larger than the memory that is free, with a session of 1024
    tokens, gets a budget of what is free less a margin for others; any other file is mapped, and a model on a GPU has
    no budget. The property ram tells what was chosen.
    layers: run only the first so many layers, for measurements.
    vram: the most memory of a GPU (backend="cuda") to hold, in bytes or as "8G", driver and kernels included. Experts
    that do not fit are copied to the GPU at every step or computed by the CPU. Which ones these are is decided once, by
    FILE.routing.json or else by their numbers. None: all memory that is free, less a margin.

    Raises FormatError for a file that is not understood, SystemFailure for one that cannot be read, BackendError for a
    backend that is not there or fails, and MemoryBudgetError for a budget that is too small, or larger than the memory
    that is free; its message has what would do.
    """

    _lock: threading.RLock  # held where _handle or _sessions is changed
    _head_copy = False  # whether to open a file with an output head, which the caller compares with the embedding

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
        options.ram, options.layers = _ram(ram), layers or 0
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
        found = ffi.new("dg_ram *")
        lib.dg_model_ram(out[0], found)
        self._memory = Memory(found.budget or None, found.needs, found.free, found.least)
        self._vram = int(options.vram) or None
        if self.ram is not None or has_vram(backend):
            prefer_routed(self)

    def close(self) -> None:
        """Close the model's sessions and free the model. A second call does nothing.

        Any thread may call it: calls of other threads that are running end first, and later ones raise Error. The file
        stays mapped as long as the model's tokenizer is held.
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
        """Remember a session, so that close() closes it too.

        Where the model was closed meanwhile, close the session at once and raise Error.
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
        """The number of threads that the model runs on."""
        return self._threads

    @property
    def ram(self) -> int | None:
        """The budget of main memory in bytes: what was given, or what "auto" chose. None: the file is mapped."""
        return self._memory.ram

    @property
    def memory(self) -> Memory:
        """The budget of main memory, and what there was to decide by when the model was opened."""
        return self._memory

    @property
    def vram(self) -> int | None:
        """The budget of a GPU's memory in bytes, or None."""
        return self._vram

    @property
    def routing(self) -> npt.NDArray[np.int64]:
        """How many tokens were routed to each expert since the model was opened: int64 [n_layer, n_expert], a copy."""
        counts = np.zeros((self._config.n_layer, self._config.n_expert), np.int64)
        lib.dg_model_routing(self._open_handle().pointer, ffi.cast("int64_t *", counts.ctypes.data))
        return counts

    def save_routing(self, path: str | os.PathLike[str] | None = None) -> str:
        """Add `routing` to the counts in a JSON file, and return its path; None: FILE.routing.json beside the model.

        The next model that is opened from this file under a budget keeps the experts that were used most. Raises Error
        where the JSON file is of a model with other layers or experts. It is replaced as a whole or not at all.
        """
        return save_routing(self, path)

    @property
    def traffic(self) -> Traffic | None:
        """The bytes that a model under a budget has read since it was opened; None without a budget."""
        out = ffi.new("dg_traffic *")
        if not lib.dg_model_traffic(self._open_handle().pointer, out):
            return None
        return Traffic(**{field.name: getattr(out, field.name) for field in fields(Traffic)})

    def settings(self, **options: Any) -> dict[str, Setting]:
        """Return all options as generate(**options) uses them: those that are not given have the file's values."""
        return settings_of(sampling_for(self._open_handle().pointer, options))

    def session(self, context: int | None = None) -> Session:
        """Return a new session, which holds encoded tokens and denoises canvases behind them.

        context: the most tokens that it can hold; None: the model's own context, but at most 8192 tokens and what fits
        into memory. Memory is taken as it is used. Raises MemoryBudgetError where a full session needs more than the
        model's budget, or more than is free now.
        """
        return Session(self, context)

    def session_room(self) -> int | None:
        """Return the bytes that further sessions can take; None where the system does not tell.

        Under a budget they are what weights that must stay leave of it; without one, what is free.
        """
        return int(lib.dg_session_room(self._open_handle().pointer)) or None

    def session_bytes(self, tokens: int) -> int:
        """Return the bytes of memory that a session with a context of `tokens` takes once it is full."""
        return int(lib.dg_session_bytes(self._open_handle().pointer, tokens))

    def denoise(self, canvases: Sequence[tuple[Session, Ids, npt.ArrayLike | None]]) -> list[Floats]:
        """Do one denoising step for canvases of several sessions at once.

        canvases: a (session, canvas, condition) for each; the sessions are of this model and all different. Returns for
        each the same bits as session.denoise(canvas, condition), in less time: an expert reads its weights once for the
        rows of all canvases.
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

        max_tokens sampler steps entropy_bound t_min t_max stability confidence seed plateau settled short_canvas
        pins_conditioned retries commit, and effort, a name for several ("low", "medium", "high", "reference": see
        dgemma.efforts()); None stands for the file's value.

        canvas, pinned: ids [n] and bool [n], n of any length, for a text that is given in part. Pinned ids stay what
        they are at every step; the ids at the other positions are ignored, and these positions are denoised. A run of
        neighbouring positions that are not pinned is a hole. What is written in a hole ends before its first end id,
        and pad ids in it are filler: neither is in Result.ids. Result.places are the positions of Result.ids in canvas.
        A canvas longer than config.canvas_length is cut at multiples of it. Without pinned positions the tokens are the
        same as without a canvas.

        accept: a rule in place of the entropy bound, accept(entropy, step) -> bool [n]. entropy: float32 [n], nats, 0
        where pinned. Positions where it is True keep their sampled id; the others get random ids.

        on_step is called with every Step. Raises TypeError for an unknown option, UsageError for a value out of range
        or a prompt that is empty or longer than the model's context. Ctrl-C ends it within a layer.

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

        on_encode(done, total) is called while the prompt is encoded. The caller may stop at any event; closing the
        stream frees its memory.
        """
        sampling = sampling_for(self._open_handle().pointer, options)
        start = Start.of(canvas, pinned, options, self._config.n_vocab)
        ids = self.prompt_ids(prompt)
        context = self._context_for(ids, start, sampling)
        return self._stream(context, ids, sampling, start, on_step, on_encode, accept)

    def session_for(self, prompt: Prompt, **options: Any) -> Session:
        """Return a new session with room for a prompt and an answer with these options.

        Without max_tokens it is the usual one (see session()). Raises as session() and generate() do.
        """
        ids = self.prompt_ids(prompt)
        context = self._context_for(ids, None, sampling_for(self._open_handle().pointer, options))
        return self._session_for(context, len(ids))

    def _session_for(self, context: int | None, prompt: int) -> Session:
        session = self.session(context)
        if session.context >= prompt:
            return session
        session.close()  # there is no memory for the usual one
        return self.session(prompt)

    def _context_for(self, ids: list[int], start: Start | None, sampling: Any) -> int | None:
        limit: int = self._config.context_length
        if len(ids) > limit:
            raise UsageError(f"the prompt has {len(ids)} tokens, more than the model's context of {limit}")
        tokens = len(start.ids) if start is not None else int(sampling.max_tokens)
        context = needed_context(self._config, len(ids), tokens)
        if context > limit:
            raise UsageError(
                f"{'a canvas of' if start is not None else 'max_tokens'} {tokens} behind the prompt's {len(ids)} tokens"
                f" needs a context of {context}, more than the model's {limit}"
            )
        return None if tokens == 0 and context <= USUAL_CONTEXT else context

    def _stream(self, context: int | None, ids: list[int], *given: Any) -> Generator[Event, None, None]:
        with self._session_for(context, len(ids)) as session:
            yield from session._stream(ids, *given)

    def fill(self, text: str | Pieces, prompt: Prompt | None = None, **given: Any) -> Filled:
        r"""Write what is missing in a text: [[...]] is a hole, [[n]] one of n tokens. Returns a Filled.

        text: the text; it may also be given as a sequence of str and Hole.
        prompt: goes before the text (see prompt_ids); None: nothing does.
        lengths: the lengths to try for a hole without one. The holes are tried one after the other; holes that were not
        tried yet have the middle length meanwhile. The length with the most evidence wins: see dgemma.infill.scoring.
        special: control tokens that are written out in the text, such as <bos>, are those tokens.
        on_step, on_encode and the options are those of generate().

        The text of a hole ends before its first end id, and pad ids in it are left out. A text that fits on one canvas
        is put on it, with an end id and pad ids behind it. Of a longer text, the part before the canvases is encoded
        (without its beginning, where the context is too short), and the model does not see the part behind them. A hole
        may be longer than one canvas. Raises UsageError for a text without holes, or holes that do not fit the context.

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

        The prompt is one user message: the instruction, a newline, the passage. The canvas has the text around the
        passage, pinned, and a hole in the passage's place. `lengths` are the lengths to try for the hole; without them,
        three from slightly to half as much longer than the passage are tried. Text around the passage that does not fit
        on the canvas goes into the prompt: what comes before the canvas is the beginning of the answer, what comes
        behind it is in the message. on_step, on_encode and the options are those of generate().
        Raises UsageError for a span outside the text or an empty instruction.
        """
        from dgemma.infill.edit import edit

        return edit(self, text, span, instruction, **given)

    def astream(self, prompt: Prompt, **given: Any) -> AsyncGenerator[Event, None]:
        """Generate as stream() does, for `async for`: each step runs in a thread while other tasks go on.

        When the task is cancelled or leaves the loop, it stops within one step. Callbacks (on_step, accept) are called
        in that thread.
        """
        return in_threads(self.stream, prompt, given)

    async def agenerate(self, prompt: Prompt, **given: Any) -> Result:
        """Generate as generate() does, for `await`; cancelled, it stops within one step."""
        return await last_of(self.astream(prompt, **given))


def _ram(given: int | str | None) -> int:
    """Return dg_model_options.ram for the argument of that name."""
    if given is None or given == "off":
        return 0
    if given == "auto":
        return int(lib.DG_RAM_AUTO)
    amount = size(given, "ram")
    if amount == 0:
        raise UsageError("ram must be more than nothing; None is no budget")
    return amount


def backends() -> list[str]:
    """Return the backends of this build, best first."""
    names: list[str] = []
    while name := lib.dg_backend_name(len(names)):
        names.append(ffi.string(name).decode())
    return names


def has_vram(backend: str) -> bool:
    """Return whether a backend works in memory of its own, which `vram` bounds; False for one that backends() lacks."""
    names = backends()
    at = 0 if backend == "auto" else names.index(backend) if backend in names else -1
    return bool(lib.dg_backend_has_vram(at))
