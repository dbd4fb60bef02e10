"""Fills the holes of a text; what stands around them stays."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from dgemma.errors import UsageError
from dgemma.events import Result, Step
from dgemma.infill.scoring import Freedom, log_likelihood
from dgemma.session import CHUNK, OnEncode, OnStep, Prompt, Session

if TYPE_CHECKING:
    from dgemma.model import Model

MARK = re.compile(r"\[\[(?:\.\.\.|([1-9][0-9]{0,5}))\]\]")
LENGTHS = (2, 4, 8, 16, 32)  # tokens, tried for a hole of unknown length


@dataclass(frozen=True, slots=True)
class Hole:
    """A hole of so many tokens; None: unknown."""

    length: int | None = None


Pieces: TypeAlias = Sequence[str | Hole]


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to fill all holes.

    evidence: see dgemma.infill.scoring; None where only one way was tried.
    """

    lengths: tuple[int, ...]  # lengths of the holes, in tokens
    holes: list[str]  # what was written, without filler
    mean_entropy: float  # nats per token of the holes, at the last step
    evidence: float | None  # nats: for the text from the first hole to half a canvas behind the last
    result: Result = field(repr=False)


@dataclass(frozen=True, slots=True)
class Filled:
    """A filled text. str() gives all of it."""

    text: str
    best: Trial
    trials: list[Trial] = field(repr=False)  # in the order they were made, the best among them

    @property
    def holes(self) -> list[str]:
        """The text that was written into each hole."""
        return self.best.holes

    @property
    def converged(self) -> bool:
        return self.best.result.converged

    @property
    def steps(self) -> int:
        """The steps of all trials."""
        return sum(trial.result.steps for trial in self.trials)

    @property
    def seconds(self) -> float:
        """The seconds of all trials."""
        return sum(trial.result.seconds for trial in self.trials)

    def __str__(self) -> str:
        return self.text


def pieces_of(text: str) -> list[str | Hole]:
    """Return the pieces of a text in which [[...]] and [[n]] are holes.

    >>> pieces_of("a[[3]] and [[...]]")
    ['a', Hole(length=3), ' and ', Hole(length=None)]
    """
    pieces: list[str | Hole] = []
    at = 0
    for found in MARK.finditer(text):
        pieces += [text[at : found.start()], Hole(int(found[1]) if found[1] else None)]
        at = found.end()
    return [piece for piece in [*pieces, text[at:]] if piece != ""]


@dataclass(frozen=True, slots=True)
class Layout:
    """The pieces of a text as tokens, and which of them the canvases show: first .. last.

    Each piece is tokenised by itself.
    """

    ids: list[int]  # 0 in holes
    owners: list[int]  # the hole that each token belongs to, in order; -1: none
    first: int
    last: int
    begun: bool = False  # the text begins with <bos>, which is not among the ids: see _beginning

    @classmethod
    def of(
        cls, model: Model, pieces: Pieces, lengths: Sequence[int], special: bool, behind_prompt: bool = True
    ) -> Layout:
        context = model.config.context_length
        if sum(lengths) > context:  # checked before lists of so many are made
            raise UsageError(f"holes of {sum(lengths)} tokens do not fit: the model's context is {context}")
        ids: list[int] = []
        owners: list[int] = []
        hole = 0
        for piece in pieces:
            if isinstance(piece, Hole):
                ids += [0] * lengths[hole]
                owners += [hole] * lengths[hole]
                hole += 1
            else:
                more = model.tokenizer.encode(piece, special=special)
                ids += more
                owners += [-1] * len(more)
        begun = not behind_prompt and ids[:1] == [model.tokenizer.bos_id] and owners[0] < 0
        if begun:
            del ids[0], owners[0]
        inside = [at for at, owner in enumerate(owners) if owner >= 0]
        n, begin, end = model.config.canvas_length, inside[0], inside[-1] + 1
        if len(ids) <= n:
            return cls(ids, owners, 0, len(ids), begun)
        if end - begin <= n:  # one canvas, the holes in its middle
            first = min(max(0, begin - (n - (end - begin)) // 2), len(ids) - n)
            return cls(ids, owners, first, first + n, begun)
        first = max(0, begin - n // 4)
        return cls(ids, owners, first, min(len(ids), first + -(-(end - first) // n) * n), begun)

    def canvas(self, model: Model, end_id: int) -> tuple[list[int], list[bool]]:
        """Return the canvas's ids, and which of them are pinned.

        Where the text ends on a canvas, an end id and pad ids are pinned behind it.
        """
        ids = self.ids[self.first : self.last]
        pinned = [owner < 0 for owner in self.owners[self.first : self.last]]
        if self.last == len(self.ids):
            room = -len(ids) % model.config.canvas_length
            pad = model.tokenizer.pad_id
            ids += [end_id, *[end_id if pad is None else pad] * room][:room]
            pinned += [True] * room
        return ids, pinned

    def written(self, holes: Sequence[Sequence[int]], most: int, end_id: int) -> tuple[int, list[int]]:
        """Return where the first hole is, and the text from there to `most` ids behind the last.

        holes: the ids in each. Where the text ends before that, an end id follows.
        """
        begin = next(at for at, owner in enumerate(self.owners) if owner >= 0)
        behind = next(at for at, owner in enumerate(reversed(self.owners)) if owner >= 0)
        text: list[int] = []
        for at in range(begin, len(self.ids) - behind + min(behind, most)):
            owner = self.owners[at]
            if owner < 0:
                text.append(self.ids[at])
            elif at == begin or owner != self.owners[at - 1]:
                text += holes[owner]
        return begin, text + [end_id] * (behind < most)


@dataclass(frozen=True, slots=True)
class TrialStep:
    """A step of one way to fill the holes."""

    trial: int  # counted from 0
    pinned: list[bool]  # the pins of all canvases of this trial; Step.place tells where a step's canvas begins
    step: Step


SPARE = 4  # canvases to spare: those that holes share with the text beside them
TEMPLATE = 256  # tokens that a chat template may add

TrialSteps: TypeAlias = Generator[TrialStep | None, None, "T"]  # None: a part of the prompt was encoded
T = TypeVar("T")


def fill(
    model: Model, text: str | Pieces, prompt: Prompt | None = None, *, on_step: OnStep | None = None, **given: Any
) -> Filled:
    """Fill a text: see Model.fill."""
    with model.session(room_for(model, text, prompt, given.get("lengths", LENGTHS))) as session:
        return done(filling(session, text, prompt, **given), on_step)


def room_for(model: Model, text: str | Pieces, prompt: Prompt | None, lengths: Sequence[int]) -> int:
    """Return the context that filling needs: of all tokens, those beside the canvases, and some to spare.

    The model's whole context may be more than there is memory for.
    """
    pieces = pieces_of(text) if isinstance(text, str) else text
    tokens = 0 if prompt is None else len(model.prompt_ids(prompt))
    for piece in pieces:
        if isinstance(piece, Hole):
            tokens += max(lengths, default=0) if piece.length is None else piece.length
        else:
            tokens += len(model.tokenizer.encode(piece))
    return within(model, tokens)


def within(model: Model, tokens: int) -> int:
    """Return a context of so many tokens and some canvases, as far as the model has it."""
    most: int = model.config.context_length
    return min(most, tokens + TEMPLATE + SPARE * int(model.config.canvas_length))


def done(turns: TrialSteps[T], on_step: OnStep | None) -> T:
    """Take all steps, and return what comes of them."""
    while True:
        try:
            tried = next(turns)
        except StopIteration as end:
            result: T = end.value
            return result
        if tried is not None and on_step is not None:
            on_step(tried.step)


def filling(
    session: Session,
    text: str | Pieces,
    prompt: Prompt | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    special: bool = False,
    on_encode: OnEncode | None = None,
    **options: Any,
) -> TrialSteps[Filled]:
    """Fill a text in a session, in turns between which others may work."""
    model = session.model
    pieces = pieces_of(text) if isinstance(text, str) else [p for p in text if p != ""]
    holes = [piece for piece in pieces if isinstance(piece, Hole)]
    if not holes:
        raise UsageError("there is no hole to fill: [[...]], or [[n]] for one of n tokens")
    tried = list(dict.fromkeys(lengths))
    if not tried or any(length < 1 for length in [*tried, *(h.length for h in holes if h.length is not None)]):
        raise UsageError("lengths of holes must be at least 1 token")
    before = [] if prompt is None else model.prompt_ids(prompt)
    middle = tried[len(tried) // 2]
    best = tuple(middle if hole.length is None else hole.length for hole in holes)
    unknown = [i for i, hole in enumerate(holes) if hole.length is None]
    several = len(tried) > 1 and bool(unknown)
    trials: dict[tuple[int, ...], Trial] = {}

    def made(lengths: tuple[int, ...]) -> TrialSteps[Trial]:
        if lengths not in trials:
            layout = Layout.of(model, pieces, lengths, special, bool(before))
            trials[lengths] = yield from _try(
                session, layout, before, lengths, several, len(trials), on_encode, options
            )
        return trials[lengths]

    for index in unknown:
        choices = []
        for length in tried:
            choices.append((yield from made((*best[:index], length, *best[index + 1 :]))))
        texts = max(choices, key=lambda trial: trial.evidence or 0.0).holes
        best = min((t for t in choices if t.holes == texts), key=lambda trial: trial.mean_entropy).lengths
    trial = yield from made(best)
    written = iter(trial.holes)
    whole = "".join(next(written) if isinstance(piece, Hole) else piece for piece in pieces)
    return Filled(whole, trial, list(trials.values()))


def _try(
    session: Session,
    layout: Layout,
    before: list[int],
    lengths: tuple[int, ...],
    several: bool,
    trial: int,
    on_encode: OnEncode | None,
    options: dict[str, Any],
) -> TrialSteps[Trial]:
    """Fill the holes of a layout behind a prompt (ids, or none).

    several: this is one of several ways to fill them.
    """
    model = session.model
    ends = model.config.end_ids
    end_id = next((token for token in before[1:] if token in ends), ends[0] if ends else 0)
    ids, pinned = layout.canvas(model, end_id)
    n = model.config.canvas_length
    room = session.context - len(before) - (-(-len(ids) // n) - 1) * n
    start = before or _beginning(model, layout)
    room -= 0 if before else len(start)
    if room < 0:
        raise UsageError(
            f"holes of {sum(lengths)} tokens do not fit behind the prompt: the context is {session.context}"
        )
    text_before = layout.ids[max(0, layout.first - room) : layout.first]  # the beginning is left out if it does not fit
    entropy: dict[int, float] = {}
    freedom = Freedom()
    encoded = yield from _encode(session, [*start, *text_before], on_encode)
    with closing(session.stream(canvas=ids, pinned=pinned, **options)) as events:
        for event in events:
            if isinstance(event, Step):
                entropy[event.block] = float(event.entropy.sum(dtype=np.float64))
                freedom.see(event)
                yield TrialStep(trial, pinned, event)
    assert isinstance(event, Result)
    result = replace(event, encoded_tokens=encoded)
    holes: list[list[int]] = [[] for _ in lengths]
    free = 0.0
    for place, token in zip(result.places or [], result.ids, strict=True):
        if not pinned[place]:
            holes[layout.owners[layout.first + place]].append(token)
            free += freedom.at(place)
    texts = [model.tokenizer.decode(hole) for hole in holes]
    evidence = None
    if several:
        begin, text = layout.written(holes, n // 2, end_id)
        room = max(0, session.context - len(start) - len(text))
        behind = [*start, *layout.ids[max(0, begin - room) : begin]]
        evidence = free + (yield from log_likelihood(session, behind, text))
    return Trial(lengths, texts, sum(entropy.values()) / (len(pinned) - sum(pinned)), evidence, result)


def _encode(session: Session, prompt: list[int], on_encode: OnEncode | None) -> TrialSteps[int]:
    """Encode a prompt as Session.prompt does, in turns. Returns how many tokens were encoded."""
    same = session.shared(prompt)
    session.rewind(same)
    for at in range(same, len(prompt), CHUNK):
        session.encode(prompt[at : at + CHUNK])
        if on_encode is not None:
            on_encode(min(at + CHUNK, len(prompt)) - same, len(prompt) - same)
        yield None
    return len(prompt) - same


def _beginning(model: Model, layout: Layout) -> list[int]:
    """Return what a text without a prompt begins with: <bos>, once. A canvas needs something before it."""
    bos = model.tokenizer.bos_id
    if bos is not None and (model.tokenizer.add_bos or layout.begun or layout.first == 0):
        return [bos]
    if layout.first == 0:
        raise UsageError("this model's file has no <bos>: a text whose holes are on its first canvas needs a prompt")
    return []
