"""What a generation reports: a Step per denoising step, a Block per finished canvas, and a Result at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One denoising step. The arrays are copies of the canvas's length."""

    block: int  # canvases finished before this one
    index: int  # counted from 0 within the canvas
    temperature: float
    canvas: npt.NDArray[np.int32]  # the most likely id at each position
    entropy: npt.NDArray[np.float32]  # nats
    accepted: npt.NDArray[np.bool_]  # by the entropy bound, in this step
    mean_entropy: float
    converged: bool  # the canvas is finished: settled, and certain enough


@dataclass(frozen=True, slots=True)
class Block:
    """One finished canvas."""

    index: int
    steps: int
    tokens: int  # of the answer: end ids and what follows are not counted
    converged: bool
    ids: list[int] = field(repr=False)  # these tokens


@dataclass(frozen=True, slots=True)
class Result:
    """An answer. str(result) is its text."""

    text: str
    ids: list[int] = field(repr=False)  # without end ids and what follows
    blocks: list[Block]
    steps: int  # of all canvases
    converged: bool  # all canvases
    finish_reason: str  # "stop": it ended by itself; "length": max_tokens was reached
    prompt_tokens: int
    seconds: float  # of work; what the caller does between events is not counted
    tokens_per_second: float  # answer tokens alone, over `seconds`

    def __str__(self) -> str:
        return self.text
