"""What is computed to compare implementations: random checkpoints, prompts and canvases, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from support.checkpoints import FULL, SLIDING, write_checkpoint

from dgemma.convert import convert


@dataclass(frozen=True)
class Case:
    """A checkpoint's shape and a prompt's length; windows are smaller than the prompt."""

    name: str
    prompt: int = 50
    seed: int = 0
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def canvas(self) -> int:
        return self.shape.get("canvas", 32)

    @property
    def vocab(self) -> int:
        return self.shape.get("vocab", 512)

    def write(self, folder: Path) -> Path:
        """The checkpoint in a folder, in float32."""
        write_checkpoint(
            folder, seed=self.seed, **{"dtype": "f32", "vocab": self.vocab, "canvas": self.canvas, **self.shape}
        )
        return folder

    def convert(self, folder: Path, out: Path) -> Path:
        """The checkpoint as a GGUF of float32."""
        convert(self.write(folder), out, type="f32", force=True)
        return out

    def inputs(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Prompt ids, and the noisy canvases of the steps below."""
        random = np.random.default_rng(1000 + self.seed)
        prompt = random.integers(5, self.vocab, self.prompt, dtype=np.int32)
        return prompt, [random.integers(0, self.vocab, self.canvas, dtype=np.int32) for _ in range(5)]


GOLDEN = [
    Case("sliding-and-full"),
    Case(
        "two-full-wide",
        prompt=37,
        seed=1,
        shape=dict(
            layer_types=[FULL, SLIDING, FULL],
            hidden=96,
            ffn=64,
            heads=6,
            kv_heads=3,
            global_kv_heads=2,
            head_dim=16,
            global_head_dim=48,
            window=8,
            experts=5,
            top_k=3,
            expert_ffn=64,
            rotary_factor=0.5,
        ),
    ),
    Case(
        "short-prompt",
        prompt=3,
        seed=2,
        shape=dict(layers=4, canvas=20, experts=16, top_k=4, theta=500.0, softcap=15.0),
    ),
]


def drawn(seed: int) -> Case:
    """A random case: any sizes that the architecture allows."""
    r = np.random.default_rng(seed)
    heads, kv, global_kv = ((8, 4, 2), (4, 2, 1), (4, 4, 4), (6, 2, 3), (2, 1, 1))[r.integers(5)]
    layers = int(r.integers(2, 9))
    experts = int(r.integers(2, 17))
    shape = dict(
        layer_types=[SLIDING if r.random() < 0.6 else FULL for _ in range(layers - 1)] + [FULL],
        hidden=32 * int(r.integers(1, 7)), ffn=32 * int(r.integers(1, 6)), expert_ffn=32 * int(r.integers(1, 4)),
        experts=experts, top_k=int(r.integers(1, experts + 1)), heads=heads, kv_heads=kv, global_kv_heads=global_kv,
        head_dim=8 * int(r.integers(1, 6)), global_head_dim=16 * int(r.integers(1, 6)), window=int(r.integers(2, 40)),
        canvas=int(r.integers(1, 65)), rotary_factor=(0.25, 0.5, 1.0)[r.integers(3)],
        form=("global", "per_layer")[r.integers(2)], shards=int(r.integers(1, 4)),
    )  # fmt: skip
    return Case(f"drawn-{seed}", prompt=int(r.integers(1, 120)), seed=seed, shape=shape)


class Implementation(Protocol):
    """One timeline of some implementation. Logits are float32 [n, n_vocab]."""

    def encode(self, ids: np.ndarray) -> np.ndarray: ...  # next-token logits of all ids
    def denoise(self, canvas: np.ndarray, condition: np.ndarray | None) -> np.ndarray: ...


def trajectory(case: Case, model: Implementation) -> dict[str, np.ndarray]:
    """Prompt, two steps of a first canvas, its commit, and three steps of a second one, self-conditioned."""
    prompt, canvases = case.inputs()
    out = {"prompt": model.encode(prompt)}
    out["canvas 0 step 0"] = model.denoise(canvases[0], None)
    out["canvas 0 step 1"] = model.denoise(canvases[1], out["canvas 0 step 0"] / np.float32(0.8))
    out["commit"] = model.encode(out["canvas 0 step 1"].argmax(-1).astype(np.int32))
    out["canvas 1 step 0"] = model.denoise(canvases[2], None)
    out["canvas 1 step 1"] = model.denoise(canvases[3], out["canvas 1 step 0"] / np.float32(0.6))
    out["canvas 1 step 2"] = model.denoise(canvases[4], out["canvas 1 step 1"] / np.float32(0.4))
    return out


class Ours:
    """A session of this project."""

    def __init__(self, session) -> None:
        self.session = session

    def encode(self, ids: np.ndarray) -> np.ndarray:
        return self.session.encode(ids, logits="all")

    def denoise(self, canvas: np.ndarray, condition: np.ndarray | None) -> np.ndarray:
        return self.session.denoise(canvas, condition=condition)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in parts of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
