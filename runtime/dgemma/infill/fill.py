"""Fills the holes in a text, and keeps the text around them."""

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
LENGTHS = (2, 4, 8, 16, 32)  # lengths in tokens to try for a hole without one


@dataclass(frozen=True, slots=True)
class Hole:
    """A hole of `length` tokens; None: the length is not known."""

    length: int | None = None


Pieces: TypeAlias = Sequence[str | Hole]


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempt to fill all holes, at given lengths."""

    lengths: tuple[int, ...]  # lengths of the holes, in tokens
    holes: list[str]  # the text of each hole, without filler
    mean_entropy: float  # nats per token of the holes, at the last step
    # The score in nats of the text from the first hole to half a canvas behind the last: see dgemma.infill.scoring.
    # None where only one trial was made.
    evidence: float | None
    result: Result = field(repr=False)


@dataclass(frozen=True, slots=True)
class Filled:
    """A text whose holes are filled. str() returns `text`."""

    text: str
    best: Trial  # the trial that `text` is made of
    trials: list[Trial] = field(repr=False)  # all trials in order, including `best`

    @property
    def holes(self) -> list[str]:
        """The text that was written into each hole."""
        return self.best.holes

    @property
    def converged(self) -> bool:
        return self.best.result.converged

    @property
    def steps(self) -> int:
        """The denoising steps of all trials."""
        return sum(trial.result.steps for trial in self.trials)

    @property
    def seconds(self) -> float:
        """The seconds of all trials."""
        return sum(trial.result.seconds for trial in self.trials)

    def __str__(self) -> str:
        return self.text


def pieces_of(text: str) -> list[str | Hole]:
    """Split a text at its holes, [[...]] and [[n]].

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
    """The tokens of a text with holes. The canvases hold ids[first:last].

    Each piece of text is tokenised by itself.
    """

    ids: list[int]  # 0 in holes
    owners: list[int]  # for each token the number of its hole, from 0; -1: it is in none
    first: int  # the first token on a canvas
    last: int  # one past the last token on a canvas
    begun: bool = False  # the text begins with <bos>, which is then left out of ids: see _beginning

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
        """Return the ids of all canvases, and which of them are pinned.

        Where the text ends on the last canvas, an end id and pad ids are pinned behind it.
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
        """Return where the first hole begins, and the ids from there to `most` ids behind the last hole.

        holes: the ids that were written in each hole. Where the text ends earlier, an end id follows it.
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
    """A denoising step of one trial."""

    trial: int  # counted from 0
    pinned: list[bool]  # the pins of all canvases of this trial; Step.place tells where a step's canvas begins
    step: Step


SPARE = 4  # more canvases in a context: text around the holes takes a part of the canvases
TEMPLATE = 256  # tokens that a chat template may add

# Yields a TrialStep after each denoising step, and None after each chunk of a prompt that was encoded.
TrialSteps: TypeAlias = Generator[TrialStep | None, None, "T"]
T = TypeVar("T")


def fill(
    model: Model, text: str | Pieces, prompt: Prompt | None = None, *, on_step: OnStep | None = None, **given: Any
) -> Filled:
    """Fill a text: see Model.fill."""
    with model.session(room_for(model, text, prompt, given.get("lengths", LENGTHS))) as session:
        return done(filling(session, text, prompt, **given), on_step)


def room_for(model: Model, text: str | Pieces, prompt: Prompt | None, lengths: Sequence[int]) -> int:
    """Return the context that filling needs: the tokens of the prompt and the text, and some to spare.

    The model's full context may need more memory than there is.
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
    """Return a context of `tokens` tokens and some to spare, but at most the model's."""
    most: int = model.config.context_length
    return min(most, tokens + TEMPLATE + SPARE * int(model.config.canvas_length))


def done(steps: TrialSteps[T], on_step: OnStep | None) -> T:
    """Run all steps, call on_step with each, and return the result."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if step is not None and on_step is not None:
            on_step(step.step)


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
    """Fill a text in a session. Yields after each short piece of work, so that the caller can do other work."""
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
    """Fill the holes of a layout behind a prompt.

    before: the prompt's ids, or none. several: whether other trials are made, so that the evidence is needed.
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
    text_before = layout.ids[max(0, layout.first - room) : layout.first]  # without its beginning, if it does not fit
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
    """Encode a prompt as Session.prompt does; yields after each chunk. Returns how many tokens were encoded."""
    same = session.shared(prompt)
    session.rewind(same)
    for at in range(same, len(prompt), CHUNK):
        session.encode(prompt[at : at + CHUNK])
        if on_encode is not None:
            on_encode(min(at + CHUNK, len(prompt)) - same, len(prompt) - same)
        yield None
    return len(prompt) - same


def _beginning(model: Model, layout: Layout) -> list[int]:
    """Return the ids before a text without a prompt: <bos>, or none. A canvas needs at least one token before it."""
    bos = model.tokenizer.bos_id
    if bos is not None and (model.tokenizer.add_bos or layout.begun or layout.first == 0):
        return [bos]
    if layout.first == 0:
        raise UsageError("this model's file has no <bos>: a text whose holes are on its first canvas needs a prompt")
    return []
