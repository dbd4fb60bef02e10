"""Generation, sessions and requests of dg-serve, for hours: make soak HOURS=2.

Each of the three is a process of its own, so that what its memory does is its own doing. Every round asks the same of
each, with the same seeds, and must get the same tokens as in the first; then, while they rest, the memory of each and
its file descriptors are read, those of the processes that it started counted in. A quarter of the time, ten minutes at
most, fills caches and is not judged. Of what follows, the last tenth must not take 1 % more than the first tenth, on
average, and no descriptor more. Ends with status 1 otherwise, or at the first round that is not like the others.

Memory is what is resident and has no file behind it: pages of a mapped model come and go as the system likes. They are
told beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

import dgemma
from dgemma.model import bundled

PUZZLE = (Path(__file__).parents[1] / "models" / "sudoku" / "puzzle.txt").read_text()
SORT, UPPER = "Sort:\nfig\nkiwi\napple", "Upper case: soak"
MOST = 0.01  # that memory may grow by
CACHE = "8M"  # of dg-serve: a few sessions, so that they give way to each other
Round = Callable[[], list[int]]


# ---- What is done, again and again ----


@contextmanager
def generation() -> Iterator[Round]:
    """A model that stays, one that is opened and closed, another within a budget."""
    with dgemma.Model(threads=1) as model:

        def again() -> list[int]:
            with dgemma.Model(threads=1) as other, dgemma.Model(threads=1, ram="2G") as within:
                ids = [each.generate(PUZZLE, seed=3, steps=3).ids for each in (model, other, within)]
            assert ids[0] == ids[1] == ids[2], "a budget changes the tokens"
            filled = model.fill("5346789[[1]]2\n", seed=3, steps=4)
            return [*model.generate(PUZZLE, seed=3).ids, *ids[0], *map(ord, filled.text)]

        yield again


@contextmanager
def sessions() -> Iterator[Round]:
    """Sessions that are left in the middle, that go on, that are denoised together; a conversation."""
    with dgemma.Model(threads=1) as model, dgemma.Model(bundled("tidy"), threads=1) as tidy:

        def again() -> list[int]:
            with model.session() as one, model.session() as other:
                for session in (one, other):
                    session.encode(model.prompt_ids(PUZZLE))
                found = one.generate(seed=4, steps=4).ids
                next(other.stream(seed=5))
                other.rewind(10)
                logits = model.denoise([(one, [5, 6, 7], None), (other, [7, 8], None)])
            with dgemma.Conversation(tidy, context=1024) as chat:
                said = [chat.ask(text, seed=4, max_tokens=48).answer.text for text in (SORT, UPPER)]
            rows = [row.argmax(-1).tolist() for row in logits]
            return [*found, *rows[0], *rows[1], *map(ord, "".join(said))]

        yield again


@contextmanager
def server() -> Iterator[tuple[int, Round]]:
    """dg-serve's process, and requests of it: several at once, answered whole and in streams, refused and left."""
    command = [sys.executable, "-m", "dgemma.cli.serve", bundled("tidy"), "--name", "tidy", "--threads", "1"]
    flags = ["--port", "0", "--context", "1024", "--cache", CACHE]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"http://[^ ,]+", process.stderr.readline())
    assert found, "dg-serve did not start"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    # No timeouts: whoever stops and continues these processes is not to end the soak.
    client = httpx.Client(base_url=found.group(), timeout=None, limits=httpx.Limits(max_keepalive_connections=0))
    try:
        with client:
            yield process.pid, lambda: requests(client)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def requests(client: httpx.Client) -> list[int]:
    said: dict[int, str] = {}
    crowd = [
        threading.Thread(target=lambda at=at, text=text: said.update({at: streamed(client, asked(text, at))}))
        for at, text in enumerate((SORT, UPPER, SORT))
    ]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    assert len(said) == len(crowd), "a request of several at once failed"
    rest(client)
    for text in (SORT, UPPER):
        left(client, asked(text, 7))
        rest(client)
    # From here on one by one, so that the same sessions are left at the end of each round.
    texts = [whole(client, asked(text, 6)) for text in (PUZZLE[:100], UPPER, SORT)]
    refused = [client.post("/v1/chat/completions", json=asked(SORT, -1)), client.get("/v1/nothing")]
    refused += [client.post("/v1/completions", json={"model": "tidy", "prompt": "x" * 100_000})]
    assert [each.status_code for each in refused] == [400, 404, 400], [each.text[:200] for each in refused]
    rest(client)
    return [ord(c) for text in [*(said[at] for at in sorted(said)), *texts] for c in text]


def asked(text: str, seed: int) -> dict[str, Any]:
    return {"model": "tidy", "messages": [{"role": "user", "content": text}], "seed": seed, "max_tokens": 48}


def whole(client: httpx.Client, body: dict[str, Any]) -> str:
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def streamed(client: httpx.Client, body: dict[str, Any]) -> str:
    text = ""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                text += (choices[0]["delta"].get("content") or "") if choices else ""
    return text


def left(client: httpx.Client, body: dict[str, Any]) -> None:
    """A stream that nobody reads to its end, with all its canvases."""
    body = {**body, "stream": True, "max_tokens": 512, "diffusion": {"events": True, "stability": 1000, "steps": 48}}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("event: canvas"))


def rest(client: httpx.Client) -> None:
    """Until nothing is at work."""
    while not re.search(r"^dgemma_requests_running 0\.0$", client.get("/metrics").text, re.MULTILINE):
        time.sleep(0.05)


# ---- Whom it is asked of ----


@dataclass
class Part:
    """A process that does a round when asked, and what was seen of it after each."""

    name: str
    pid: int
    round: Round
    memory: list[float] = field(default_factory=list)  # MiB
    mapped: list[float] = field(default_factory=list)  # MiB of files
    files: list[int] = field(default_factory=list)

    def look(self) -> None:
        family = [self.pid, *children(self.pid)]
        status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in family)
        self.memory.append(sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE))) / 1024)
        self.mapped.append(sum(map(int, re.findall(r"^RssFile:\s+(\d+)", status, re.MULTILINE))) / 1024)
        self.files.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family))

    @property
    def told(self) -> str:
        return f"{self.name} {self.memory[-1]:.1f} MiB, {self.files[-1]} descriptors"

    def judged(self, start: int) -> tuple[str, bool]:
        """Figures of the rounds from `start` on, and whether they are flat."""
        tenth = max(1, (len(self.memory) - start) // 10)
        first, last = slice(start, start + tenth), slice(-tenth, None)
        before, after = statistics.fmean(self.memory[first]), statistics.fmean(self.memory[last])
        # The least: a connection that is just closing is no descriptor that stays.
        drift, grown = after / before - 1, min(self.files[last]) - min(self.files[first])
        mapped = statistics.fmean(self.mapped[last]) - statistics.fmean(self.mapped[first])
        spread = max(self.memory[start:]) - min(self.memory[start:])
        return (
            f"{self.name}: memory {before:.2f} -> {after:.2f} MiB, drift {100 * drift:+.2f} % (least to most"
            f" {spread:.2f} MiB), {grown:+d} file descriptors; pages of files {mapped:+.2f} MiB"
        ), drift < MOST and grown <= 0


def children(pid: int) -> list[int]:
    """Those of a process's threads."""
    found = (Path(f"/proc/{pid}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{pid}/task"))
    return [int(child) for each in found for child in each.split()]


def answer(doing: Any, pipe: Connection) -> None:
    """The life of a part's process: a round per message, its tokens the reply."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with doing() as again:
        while pipe.recv():
            pipe.send(again())


@contextmanager
def apart(doing: Any) -> Iterator[tuple[int, Round]]:
    """A process that does something a round at a time."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=answer, args=(doing, other))
    process.start()
    other.close()

    def again() -> list[int]:
        mine.send(True)
        reply: list[int] = mine.recv()
        return reply

    try:
        assert process.pid is not None
        yield process.pid, again
    finally:
        if process.is_alive():
            mine.send(False)
        process.join()


# ---- How long, and what came of it ----


def soak(seconds: float, say: Callable[[str], None]) -> int:
    """The status: 0 where all is flat and the same."""
    with ExitStack() as stack:
        made = {"generation": apart(generation), "sessions": apart(sessions), "server": server()}
        parts = [Part(name, *stack.enter_context(each)) for name, each in made.items()]
        return rounds(parts, seconds, say)


def rounds(parts: list[Part], seconds: float, say: Callable[[str], None]) -> int:
    first = [part.round() for part in parts]
    began, told, start = time.monotonic(), 0.0, 0
    warm = min(seconds / 4, 600)
    for done in itertools.count(1):
        for part, expected in zip(parts, first, strict=True):
            if part.round() != expected:
                say(f"round {done}: {part.name} made other tokens than in the first")
                return 1
        for part in parts:
            part.look()
        at = time.monotonic() - began
        start = start or (done if at >= warm else 0)
        if at - told > 60:
            told = at
            say(f"{at / 60:.0f} minutes, {done} rounds: {'; '.join(part.told for part in parts)}")
        if at >= seconds and start and done >= start + 20:
            break
    say(f"{done} rounds in {at / 3600:.2f} hours, the same tokens in each; judged from round {start + 1} on")
    verdicts = [part.judged(start) for part in parts]
    for figures, _ in verdicts:
        say(figures)
    return int(not all(flat for _, flat in verdicts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    given = parser.parse_args()
    sys.exit(soak(3600 * given.hours, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
