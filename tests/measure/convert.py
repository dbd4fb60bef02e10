"""How fast dg-convert is and how much memory it takes, on a checkpoint in the real model's names and shapes.

python tests/measure convert [TYPE ...]      2 GiB of random bf16 weights in shards, made anew; one processor
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from support.checkpoints import REAL, SLIDING, bf16_bits, shapes, write_json, write_tokenizer

# One layer, and a quarter of the vocabulary, so that experts are most of the file.
SHAPE = REAL | {"vocab_size": 65536, "num_hidden_layers": 1, "layer_types": [SLIDING]}
SHARDS = 3
POOL = 1 << 22  # values that are drawn; tensors are stretches of them


def write(folder: Path) -> int:
    """The checkpoint; returns the bytes of its weights."""
    write_json(folder / "config.json", {"model_type": "diffusion_gemma", "text_config": SHAPE})
    write_tokenizer(folder, SHAPE["vocab_size"])
    random = np.random.default_rng(0)
    pool = bf16_bits(0.02 * random.standard_t(5, POOL)).tobytes()
    found = list(shapes(SHAPE, SHAPE["layer_types"]).items())
    total = sum(2 * int(np.prod(shape)) for _, shape in found)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(SHARDS)]
    done = 0
    for name, shape in found:
        shards[min(SHARDS - 1, done * SHARDS // total)].append((name, shape))
        done += 2 * int(np.prod(shape))
    weight_map = {}
    for i, shard in enumerate(shards):
        file = folder / f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for name, shape in shard:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for entry in header.values():
                start, end = entry["data_offsets"]
                out.writelines(_stretches(pool, end - start, random))
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return total


def _stretches(pool: bytes, size: int, random: np.random.Generator) -> Iterator[bytes]:
    while size > 0:
        at = 2 * int(random.integers(0, POOL // 2))
        yield pool[at : at + size]
        size -= len(pool[at : at + size])


def measure(source: Path, out: Path, type_: str) -> tuple[float, int]:
    """Seconds on one processor, and the most anonymous memory that was held meanwhile."""
    command = [sys.executable, "-m", "dgemma.convert.cli", source, "-o", out, "--type", type_, "--force"]
    one = {min(os.sched_getaffinity(0))}
    began, most = time.monotonic(), 0
    work = subprocess.Popen([*command, "--threads", "1"], preexec_fn=lambda: os.sched_setaffinity(0, one))
    while work.poll() is None:
        status = Path(f"/proc/{work.pid}/status").read_text()
        held = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")]
        most = max(most, *held, 0)
        time.sleep(0.02)
    if work.returncode:
        raise SystemExit(f"dg-convert ended with status {work.returncode}")
    return time.monotonic() - began, most


def main(types: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="dgemma-measure-") as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        total = write(folder)
        print(f"{total / 2**30:.2f} GiB of bf16 weights in {SHARDS} shards")
        for type_ in types or ["bf16", "q8_0", "q4_k_m"]:
            seconds, held = measure(folder, Path(name) / "out.gguf", type_)
            speed, memory = total / 1e6 / seconds, held / 2**20
            print(f"{type_:<10}{speed:>6.0f} MB/s of bf16, {memory:.0f} MiB anonymous at most", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
