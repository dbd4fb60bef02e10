"""Watch a canvas, and stop as soon as its first row is certain: stream.py [MODEL.gguf [PROMPT]]."""

import sys
from pathlib import Path

import dgemma

GRID = Path(__file__).with_name("puzzle.txt").read_text()

FIRST = 10  # tokens

with dgemma.Model(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    prompt = sys.argv[2] if len(sys.argv) > 2 else GRID
    for event in model.stream([{"role": "user", "content": prompt}]):
        if not isinstance(event, dgemma.Step):
            continue
        text = model.tokenizer.decode(event.canvas[:FIRST]).rstrip()
        print(f"step {event.index}: {text} (entropy {event.entropy[:FIRST].mean():.4f} nats per token)")
        if event.entropy[:FIRST].mean() < 0.001:
            break  # the stream is closed, and its memory is freed
