"""DiffusionGemma in transformers, float32, as the other side of the comparisons. Needs the `oracle` extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion

torch.set_num_threads(2)


def load(folder: Path) -> DiffusionGemmaForBlockDiffusion:
    settings = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder, **settings).eval()


class Theirs:
    """One timeline; nothing is cached, so that the cache is tested too."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model
        self.ids = torch.empty((1, 0), dtype=torch.int64)

    @torch.no_grad()
    def encode(self, ids: np.ndarray) -> np.ndarray:
        self.ids = torch.cat([self.ids, torch.tensor(ids[None], dtype=torch.int64)], -1)
        hidden = self.model.model.encoder(input_ids=self.ids).last_hidden_state
        cap = self.model.final_logit_softcapping
        return (torch.tanh(self.model.lm_head(hidden) / cap) * cap)[0, -len(ids) :].numpy()

    @torch.no_grad()
    def denoise(self, canvas: np.ndarray, condition: np.ndarray | None) -> np.ndarray:
        more = {} if condition is None else {"self_conditioning_logits": torch.tensor(condition[None])}
        canvas = torch.tensor(canvas[None], dtype=torch.int64)
        return self.model(input_ids=self.ids, decoder_input_ids=canvas, **more).logits[0].numpy()
