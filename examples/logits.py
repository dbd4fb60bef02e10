"""Denoise a canvas step by step from its logits, with a sampler in a few lines of NumPy."""

from pathlib import Path

import numpy as np

import dgemma

GRID = Path(__file__).with_name("puzzle.txt").read_text()

with dgemma.Model() as model, model.session() as session:
    session.encode(model.prompt_ids(GRID))
    random = np.random.default_rng(0)
    n, n_vocab = model.config.canvas_length, model.config.n_vocab
    canvas, scaled = random.integers(0, n_vocab, n), None
    for step in range(48):
        temperature = 0.4 + 0.4 * (48 - step) / 48
        scaled = session.denoise(canvas, condition=scaled) / temperature  # float32 [n, n_vocab]
        p = np.exp(scaled - scaled.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1)  # nats
        if entropy.mean() < 0.005:
            break
        # Keep the most certain positions, up to a sum of entropies of 0.1; all others get random ids again.
        order = np.argsort(entropy, kind="stable")
        kept = order[np.cumsum(entropy[order]) - entropy[order] <= 0.1]
        canvas = random.integers(0, n_vocab, n)
        canvas[kept] = [random.choice(n_vocab, p=row / row.sum()) for row in p[kept].astype(np.float64)]
    print(model.tokenizer.decode(scaled.argmax(-1)[:90]), end="")
