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
    place: int  # where the canvas begins in the one that was given; 0 without one
    temperature: float
    canvas: npt.NDArray[np.int32]  # the most likely id at each position
    entropy: npt.NDArray[np.float32]  # nats; 0 where pinned
    accepted: npt.NDArray[np.bool_]  # by the entropy bound (or by `accept`), in this step; pins always
    mean_entropy: float  # over what is not pinned
    converged: bool  # the canvas is finished: settled, and certain enough
    next: npt.NDArray[np.int32]  # what the next step would see: draws where accepted, random ids elsewhere
    final: list[int] = field(default_factory=list)  # the answer's first ids of this canvas, final already: see `commit`


@dataclass(frozen=True, slots=True)
class Block:
    """One finished canvas."""

    index: int
    steps: int  # steps, with those of canvases that were given up for a retry
    tokens: int  # of the answer: end ids and what follows are not counted
    converged: bool
    ids: list[int] = field(repr=False)  # these tokens
    fault: str | None = None  # "empty": nothing but end and pad ids; "loop": its last half repeats a few tokens


@dataclass(frozen=True, slots=True)
class Result:
    """An answer. str(result) is its text."""

    text: str
    ids: list[int] = field(repr=False)  # without end ids and what follows
    blocks: list[Block]
    steps: int  # steps of all canvases
    converged: bool  # whether all canvases converged
    finish_reason: str  # "stop": it ended by itself; "length": max_tokens (or the end of a last hole) was reached;
    # "stopped": by Session.stop(), in Stopped.result
    prompt_tokens: int
    encoded_tokens: int  # tokens of the prompt that the session did not hold yet
    seed: int  # the last seed that was used: the one given, plus retries
    retries: int  # canvases drawn again because they were empty or a loop
    places: list[int] | None = field(repr=False)  # of the ids in the canvas that was given; None without one
    seconds: float  # of work; what the caller does between events is not counted
    tokens_per_second: float  # answer tokens alone, over `seconds`

    @property
    def fault(self) -> str | None:
        """What is wrong with the answer: that of its first canvas that has a fault (see Block), or None."""
        return next((block.fault for block in self.blocks if block.fault), None)

    def __str__(self) -> str:
        return self.text
