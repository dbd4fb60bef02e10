"""Generation, sessions and requests of dg-serve, for hours: make soak HOURS=2.

Every round does the same with the same seeds, and must make the same tokens as the first. Memory and file descriptors
are looked at after each: between the second tenth and the last, memory must not have grown by more than 1 %, and the
descriptors not at all. Ends with status 1 otherwise, or at the first round that is not like the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

import dgemma
from dgemma.serve.app import Limits, Server
from dgemma.serve.guard import Guard
from dgemma.serve.running import Running, listen

PUZZLE = (Path(__file__).parent / "models" / "sudoku" / "puzzle.txt").read_text()


def resident() -> float:
    """MiB of memory that the process takes, and no file behind it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def opening() -> list[int]:
    """A model opened and closed, another within a budget."""
    with dgemma.Model(threads=1) as model, dgemma.Model(threads=1, ram="2G") as within:
        first = model.generate(PUZZLE, seed=3, steps=3).ids
        assert within.generate(PUZZLE, seed=3, steps=3).ids == first, "a budget changes the tokens"
        return first


def sessions(model: dgemma.Model) -> list[int]:
    """Sessions that are left in the middle, that go on, and that are denoised together."""
    with model.session() as one, model.session() as other:
        for session in (one, other):
            session.encode(model.prompt_ids(PUZZLE))
        found = one.generate(seed=4, steps=4).ids
        next(other.stream(seed=5))
        other.rewind(10)
        logits = model.denoise([(one, [5, 6, 7], None), (other, [7, 8], None)])
        return [*found, *logits[0].argmax(-1).tolist(), *logits[1].argmax(-1).tolist()]


def request(url: str, name: str) -> list[int]:
    """A chat, streamed, and one that the client leaves."""
    body: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": PUZZLE}], "seed": 6, "stream": True}
    text = ""
    with httpx.Client(base_url=url, timeout=600) as client:
        with client.stream("POST", "/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    text += (choices[0]["delta"].get("content") or "") if choices else ""
        with client.stream("POST", "/chat/completions", json={**body, "seed": 7}) as answer:
            next(answer.iter_lines())
    return [ord(c) for c in text]


def soak(seconds: float, say: Callable[[str], None]) -> int:
    """The status: 0 where all is flat and the same."""
    sockets = listen("127.0.0.1", 0)
    with dgemma.Model(threads=1) as model, dgemma.Model(threads=1) as served:
        server = Server(served, Limits(context=1024, cache=1 << 26), Guard(None, "127.0.0.1", 1 << 20))
        running = Running(server, sockets, 5)
        thread = threading.Thread(target=running.serve_here)
        thread.start()
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1"
        try:
            work = [opening, lambda: sessions(model), lambda: request(url, server.name)]
            return rounds(work, seconds, say)
        finally:
            running.stop()
            thread.join()


def rounds(work: list[Callable[[], list[int]]], seconds: float, say: Callable[[str], None]) -> int:
    first = [each() for each in work]
    began, told = time.monotonic(), 0.0
    memory: list[tuple[float, float]] = []
    files: list[int] = []
    while (at := time.monotonic() - began) < seconds or len(memory) < 20:
        again = [each() for each in work]
        if again != first:
            say(f"round {len(memory) + 1}: other tokens than in the first")
            return 1
        memory.append((at, resident()))
        files.append(descriptors())
        if at - told > 60:
            told = at
            say(f"{at / 60:.0f} minutes, {len(memory)} rounds, {memory[-1][1]:.1f} MiB, {files[-1]} descriptors")
    tenth = max(5, len(memory) // 10)
    before = statistics.median(m for _, m in memory[tenth : 2 * tenth])
    after = statistics.median(m for _, m in memory[-tenth:])
    drift = after / before - 1
    grown = min(files[-tenth:]) - min(files[:tenth])
    say(f"{len(memory)} rounds in {at / 3600:.2f} hours, the same tokens in each")
    say(f"memory {before:.1f} -> {after:.1f} MiB")
    say(f"drift {100 * drift:+.2f} %, {grown:+d} file descriptors")
    return int(drift > 0.01 or grown > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    given = parser.parse_args()
    sys.exit(soak(3600 * given.hours, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
