"""The events of a generation: a Step per denoising step, a Block per finished canvas, and a Result at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One denoising step. The arrays are copies of the canvas's length."""

    block: int  # canvases finished before this one
    index: int  # counted from 0 within the canvas
    place: int  # the canvas's first position in the `canvas` that the caller gave; 0 without one
    temperature: float
    canvas: npt.NDArray[np.int32]  # the most likely id at each position
    entropy: npt.NDArray[np.float32]  # of each position's prediction, in nats; 0 where pinned
    accepted: npt.NDArray[np.bool_]  # positions that the entropy bound (or `accept`) keeps; pinned ones too
    mean_entropy: float  # nats, over positions that are not pinned
    converged: bool  # the canvas is finished: its ids no longer change, and the mean entropy is low enough
    next: npt.NDArray[np.int32]  # the next step's input: sampled ids where accepted, random ids elsewhere
    final: list[int] = field(default_factory=list)  # ids at the canvas's beginning that will not change: see `commit`


@dataclass(frozen=True, slots=True)
class Block:
    """One finished canvas."""

    index: int
    steps: int  # denoising steps, including those of attempts that were drawn again (see `retries`)
    tokens: int  # tokens of the answer: an end id, and all that follows it, is not counted
    converged: bool
    ids: list[int] = field(repr=False)  # the ids of these tokens
    fault: str | None = None  # "empty": nothing but end and pad ids; "loop": its last half repeats a few tokens


@dataclass(frozen=True, slots=True)
class Result:
    """An answer. str(result) is its text."""

    text: str
    ids: list[int] = field(repr=False)  # the answer's ids, up to the first end id
    blocks: list[Block]
    steps: int  # steps of all canvases
    converged: bool  # whether all canvases converged
    finish_reason: str  # "stop": the model wrote an end id; "length": max_tokens, or the last hole's end, was reached
    prompt_tokens: int
    encoded_tokens: int  # tokens of the prompt that the session did not hold yet
    seed: int  # the last seed that was used: the given seed plus `retries`
    retries: int  # how often a canvas was drawn again because it was empty or a loop
    places: list[int] | None = field(repr=False)  # each id's position in the caller's `canvas`; None without one
    seconds: float  # time of encoding and denoising; what the caller does between events is not counted
    tokens_per_second: float  # answer tokens alone, over `seconds`

    @property
    def fault(self) -> str | None:
        """The fault of the first canvas that has one (see Block), or None."""
        return next((block.fault for block in self.blocks if block.fault), None)

    def __str__(self) -> str:
        return self.text
