"""Records a base model: the canvases of its denoising, its distributions on them, and its answers.

A pass over the base makes a Base, and files are compared with that: so the base and a file are never in memory at the
same time. A Base can be saved and used again. Its trajectories are in a temporary file, and only one of them is in
memory at a time.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dgemma._native import ffi, lib
from dgemma.errors import FormatError, MemoryBudgetError, SystemFailure
from dgemma.eval import distributions
from dgemma.eval.distributions import Rows, State
from dgemma.events import Result, Step
from dgemma.files.output import Kind, whole_file
from dgemma.files.regular import opener
from dgemma.model import Model
from dgemma.session import Session
from dgemma.units import size, size_text

SCHEMA = 1  # version of a saved base
POSITIONS = 32  # positions of a canvas whose hidden states are kept
ROOM = 64 << 20  # bytes: an estimate for the likely ids of a trajectory, and for Python itself

Say = Callable[[str], None]
Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass(slots=True)
class Answer:
    """A model's own answer to a prompt: one canvas."""

    canvas: Ids  # [n] its final ids
    steps: int
    converged: bool
    tokens: int
    seconds: float


@dataclass(slots=True)
class Trajectory:
    """A prompt, the base's canvases at all steps of its denoising, and the base's distributions on each.

    There are S steps, and a canvas has n positions.
    """

    prompt: Ids
    canvases: Ids  # [S][n] the decoder's input at each step
    temperature: npt.NDArray[np.float64]  # [S]
    noise: npt.NDArray[np.float64]  # [S] share of the positions with a random id
    answer: Answer
    rows: Rows  # [S * n] the base's distributions
    hidden: Logits  # [looked][n_layer + 1][POSITIONS][d_model] hidden states, or empty

    @property
    def looked(self) -> list[int]:
        """The steps whose hidden states are kept: the first one, without self-conditioning, and the middle one."""
        return sorted({0, len(self.canvases) // 2})


class Kept(Sequence[Trajectory]):
    """A sequence of trajectories in a temporary file; each is read when it is accessed.

    All trajectories of a real model may take a GiB.
    """

    def __init__(self, those: Iterable[Trajectory] = ()) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: list[int] = []
        for each in those:
            self._places.append(self._file.seek(0, os.SEEK_END))
            pickle.dump(each, self._file, pickle.HIGHEST_PROTOCOL)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> Trajectory: ...
    @overload
    def __getitem__(self, i: slice) -> list[Trajectory]: ...
    def __getitem__(self, i: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(i, slice):
            return [self[each] for each in range(*i.indices(len(self)))]
        self._file.seek(self._places[i])
        found: Trajectory = pickle.load(self._file)
        return found


@dataclass(slots=True)
class Base:
    """The results of a pass over a base model."""

    about: dict[str, Any]  # identity, prompt set and settings, for reports and comparisons
    trajectories: Sequence[Trajectory] = field(default_factory=list, repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, complete or not at all."""
        arrays: dict[str, Any] = {"about": np.array(json.dumps({"schema": SCHEMA, **self.about}))}
        for i, t in enumerate(self.trajectories):
            answer = {name: getattr(t.answer, name) for name in ("steps", "converged", "tokens", "seconds")}
            arrays |= {f"{i}/{name}": getattr(t, name) for name in ARRAYS}
            arrays |= {f"{i}/rows/{name}": getattr(t.rows, name) for name in ROWS}
            arrays |= {f"{i}/state/{name}": getattr(t.rows.state, name) for name in State.__slots__}
            arrays |= {f"{i}/answer": np.array(json.dumps(answer)), f"{i}/committed": t.answer.canvas}
        with whole_file(path, BASE) as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Base:
        """Read a file that save() wrote. Raises FormatError for another one."""
        try:
            with open(path, "rb", opener=opener) as opened, np.load(opened, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about.pop("schema") != SCHEMA:
                    raise FormatError(f"{os.fspath(path)}: a saved base of another version; make it again")
                count = sum(name.endswith("/prompt") for name in file.files)
                return cls(about, Kept(_trajectory(file, i) for i in range(count)))
        except OSError as problem:
            raise SystemFailure(f"{os.fspath(path)}: {(problem.strerror or str(problem)).lower()}") from None
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as problem:
            raise FormatError(f"{os.fspath(path)}: not a saved base: {problem}") from None


def is_base(path: Path) -> bool:
    """Return whether save() of any version made the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "schema" in json.loads(str(file["about"]))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError):
        return False


BASE = Kind("a base that --save-base kept", is_base)
ARRAYS = ("prompt", "canvases", "temperature", "noise", "hidden")
ROWS = ("temperature", "ends", "ids", "logits")


def _trajectory(file: Any, i: int) -> Trajectory:
    answer = Answer(canvas=file[f"{i}/committed"], **json.loads(str(file[f"{i}/answer"])))
    state = State(**{name: file[f"{i}/state/{name}"] for name in State.__slots__})
    its_rows = Rows(state=state, **{name: file[f"{i}/rows/{name}"] for name in ROWS})
    return Trajectory(**{name: file[f"{i}/{name}"] for name in ARRAYS}, answer=answer, rows=its_rows)


def opened(path: str | os.PathLike[str], arguments: Mapping[str, Any] | None, layers: bool) -> Model:
    """Open a model for a comparison; its memory budget is reduced by what the comparison takes."""
    given = dict(arguments or {})
    if given.get("ram") == "auto":
        with Model(path, **given) as model:
            given["ram"] = model.ram
    if given.get("ram") in (None, "off"):
        return Model(path, **given)
    taken = looking(path, layers)
    left = size(given["ram"], "ram") - taken
    try:
        return Model(path, **{**given, "ram": max(left, 1 << 20)})
    except MemoryBudgetError as problem:
        raise MemoryBudgetError(f"{problem} (comparing takes {size_text(taken)} of it)") from None


def looking(path: str | os.PathLike[str], layers: bool) -> int:
    """Return an estimate of the bytes that a comparison takes besides the model.

    These are three arrays of logits (of this step, of the last one, and its condition), float64 temporaries for a chunk
    of them, one trajectory, and hidden states.
    """
    with Model(path) as model:
        c = model.config
        logits = int(c.canvas_length * c.n_vocab)
        hidden = 2 * int((c.n_layer + 1) * c.canvas_length * c.d_model) * 4 if layers else 0
    return 3 * logits * 4 + 6 * min(distributions.CHUNK, logits) * 8 + ROOM + hidden


def record(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    layers: bool = False,
    options: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Iterator[Trajectory]:
    """Yield a Trajectory for each prompt (ids): prompt i is answered with seed + i, one canvas."""
    for i, prompt in enumerate(prompts):
        say(f"base: prompt {i + 1} of {len(prompts)}, generating")
        with model.session(len(prompt)) as session:
            session.encode(list(prompt))
            canvases, temperatures, noise, answer = follow(session, seed + i, options or {})
            kept: list[Rows] = []
            hidden: list[Logits] = []
            looked = {0, len(canvases) // 2} if layers else set()
            n_vocab = int(model.config.n_vocab)

            def before(step: int, kept: list[Rows] = kept, n_vocab: int = n_vocab) -> Logits:
                return distributions.condition(kept[step], 0, len(kept[step]), n_vocab)

            for step, logits in replay(session, canvases, before, looked, hidden):
                say(f"base: prompt {i + 1} of {len(prompts)}, step {step + 1} of {len(canvases)}")
                kept.append(distributions.keep(logits, temperatures[step]))
        yield Trajectory(
            prompt=np.asarray(prompt, np.int32),
            canvases=np.stack(canvases),
            temperature=np.array(temperatures),
            noise=np.array(noise),
            answer=answer,
            rows=distributions.joined(kept),
            hidden=np.stack(hidden) if hidden else np.empty(0, np.float32),
        )


def follow(
    session: Session, seed: int, options: Mapping[str, Any]
) -> tuple[list[Ids], list[float], list[float], Answer]:
    """Generate a canvas.

    Returns the decoder's input at each step, the steps' temperatures and noise, and the answer.
    """
    n = int(session.model.config.canvas_length)
    canvases, temperatures, noise = [first_canvas(session.model, seed)], [], [1.0]
    last: Step | None = None
    answer = None
    with closing(session.stream(**{**options, "seed": seed, "max_tokens": n})) as events:
        for event in events:
            if isinstance(event, Step):
                last = event
                temperatures.append(event.temperature)
                canvases.append(event.next)
                noise.append(float(1 - event.accepted.mean()))
            elif isinstance(event, Result):
                answer = event
    assert last is not None and answer is not None
    made = Answer(last.canvas, answer.steps, answer.converged, len(answer.ids), answer.seconds)
    return canvases[:-1], temperatures, noise[:-1], made


def first_canvas(model: Model, seed: int) -> Ids:
    """Return the random ids that a generation with this seed starts from."""
    n, n_vocab = int(model.config.canvas_length), int(model.config.n_vocab)
    u, ids = ffi.new("double[]", n), ffi.new("int32_t[]", n)
    lib.dg_draw(seed, 0, 0, n, n_vocab, u, ids)
    return np.array(ffi.unpack(ids, n), np.int32)


def replay(
    session: Session, canvases: Sequence[Ids], before: Callable[[int], Logits], looked: set[int], hidden: list[Logits]
) -> Iterator[tuple[int, Logits]]:
    """Yield (step, logits [n, n_vocab]): a model's logits for given canvases.

    before(step): returns the self-conditioning that follows from the base's distributions at this step. The hidden
    states of POSITIONS positions, at the steps in `looked`, are appended to `hidden`.
    """
    for step, canvas in enumerate(canvases):
        condition = before(step - 1) if step else None
        if step in looked:
            places = np.linspace(0, len(canvas) - 1, min(POSITIONS, len(canvas))).round().astype(int)
            hidden.append(np.ascontiguousarray(session.hidden(canvas, condition)[:, places]))
        logits = session.denoise(canvas, condition)
        yield step, logits
