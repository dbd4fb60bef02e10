"""Measures the load that dg-serve bears and its overhead: python tests/measure serve [--json FILE] [--seconds 60]

Three things, against a server that is a process of its own:

- overhead: the wall time of a request, as a client on a kept connection sees it, beside that of the same generation in
  a process that does nothing else: from the messages to the text by Session.generate, what dg-run does once it has
  started, in a session that is warm. (A whole dg-run would be slower by its start, a tenth of a second: it is not what
  is compared.) Both are asked by this process in turn, in changing order, for the same prompt, seed and number of
  threads; both have all processors, one after the other. No two prompts begin alike, so nothing comes from the cache.
  `added_ms` is the median of what the server takes more, `added_part` that over the median of the time alone. With
  `tidy`, whose steps take about a millisecond, over answers of several canvases and of one; and with random weights
  whose steps take about as long as a real model's on a GPU, where what is the same for each request weighs as there.
- first bytes: from a request to the first byte of a streamed answer, and to its first text. One client, `tidy`.
- load: many clients at once for a while, streaming or not, whose every answer must be what one client alone was given.
  Meanwhile other clients are killed in the midst of a stream, and the memory of the server is read every second. The
  queue is shorter than the crowd, so that some are sent away with 429, and come again when they are told to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
from models.tidy import tasks
from support.checkpoints import write_checkpoint

from dgemma.convert import convert
from dgemma.model import bundled

QUEUE, TOGETHER, CACHE = 24, 4, "32M"
CASES = [case for task in ("sort", "upper", "quotes", "table", "json", "indent") for case in tasks.cases(task, 4)]
OPTIONS = {"max_tokens": 48}
VICTIM = """
import httpx, sys, time
body = {"model": "tidy", "messages": [{"role": "user", "content": "Sort:\\nfig"}], "stream": True, "max_tokens": 960,
        "user": "victim",
        "diffusion": {"stability": 1000, "steps": 100000, "events": True}}
while True:
    with httpx.stream("POST", sys.argv[1], json=body, timeout=600) as answer:
        if answer.status_code == 200:
            for line in answer.iter_lines():
                print("streaming", flush=True)
    time.sleep(float(answer.headers.get("Retry-After", 1)) / 4)
"""


@contextmanager
def served(model: str, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "dgemma.cli.serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"http://[^ ,]+", process.stderr.readline())
    assert found, "the server did not start"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield found.group(), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def body(case: tasks.Case, seed: int, stream: bool = False, **own: Any) -> dict[str, Any]:
    asked = {"model": "tidy", "messages": list(case.messages), "seed": seed, "stream": stream, **OPTIONS}
    return {**asked, "diffusion": own} if own else asked


def streamed(client: httpx.Client, url: str, asked: dict[str, Any]) -> tuple[str, float, float]:
    """The text of a stream, and the seconds to its first byte and its first text. Raises HTTPStatusError."""
    began, first, spoke, text = time.perf_counter(), 0.0, 0.0, ""
    with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as answer:
        if answer.status_code != 200:
            answer.read()
            answer.raise_for_status()
        for line in answer.iter_lines():
            first = first or time.perf_counter() - began
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                more = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
                spoke = spoke or (time.perf_counter() - began if more else 0.0)
                text += more
    return text, first, spoke


def whole(client: httpx.Client, url: str, asked: dict[str, Any]) -> str:
    answer = client.post(f"{url}/v1/chat/completions", json=asked)
    answer.raise_for_status()
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def spread(values: Sequence[float], scale: float = 1000, digits: int = 2) -> dict[str, float]:
    ordered = sorted(values)
    at = {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "most": ordered[-1]}
    return {name: round(scale * value, digits) for name, value in at.items()}


def busy(pid: int) -> float:
    """Seconds that the threads of a process have run."""
    tasks_of = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks_of) / 1e9


ALONE = """
import json, sys, time, dgemma
with dgemma.Model(sys.argv[1]) as model, model.session(2048) as session:
    for line in sys.stdin:
        asked = json.loads(line)
        session.rewind(0)
        began = time.perf_counter()
        result = session.generate(asked.pop("messages"), **asked)
        print(json.dumps([time.perf_counter() - began, result.text, result.steps]), flush=True)
"""


class Alone:
    """A process that generates, and does nothing else."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-c", ALONE, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def ask(self, stream: bool, **asked: Any) -> tuple[float, str, int]:
        """Seconds, text, steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        seconds, text, steps = json.loads(self._process.stdout.readline())
        return seconds, text, steps

    def close(self) -> None:
        self._process.communicate()


class Asker:
    """A client that takes little time itself, on one connection."""

    def __init__(self, url: str, pid: int) -> None:
        self._connection, self.pid = HTTPConnection(url.removeprefix("http://"), timeout=600), pid

    def ask(self, stream: bool, messages: list[dict[str, Any]], **options: Any) -> tuple[float, str, int]:
        """Seconds from the first byte sent to the last byte received, text, steps."""
        text = json.dumps({"model": "it", "messages": messages, "stream": stream, "diffusion": options})
        began = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", text, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read().decode()
        seconds = time.perf_counter() - began
        assert answer.status == 200, body
        if not stream:
            (choice,) = json.loads(body)["choices"]
            return seconds, choice["message"]["content"], choice["diffusion"]["steps"]
        choices = [json.loads(line[6:])["choices"][0] for line in body.splitlines() if line.startswith("data: {")]
        return seconds, "".join(c["delta"].get("content", "") for c in choices), choices[-1]["diffusion"]["steps"]

    def close(self) -> None:
        self._connection.close()


def overhead(model: str, pairs: int, words: int, **options: Any) -> dict[str, Any]:
    """Milliseconds that the server adds to an answer, whole and streamed, and what part of the time alone they are."""
    with (
        served(model, "--name", "it", "--cache", CACHE) as (url, process),
        closing(Alone(model)) as alone,
        closing(Asker(url, process.pid)) as server,
    ):
        found: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
        for pair in range(2 * pairs + 4):
            stream = bool(pair // 2 % 2)
            listed = " ".join(random.Random(pair).choices(tasks.WORDS, k=words))
            asked = {"messages": [{"role": "user", "content": f"Sort:\n{listed}"}], "seed": pair, **options}
            times, work, said = {}, {}, {}
            for by in (alone, server) if pair % 2 else (server, alone):
                ran = busy(by.pid)
                times[by], *said[by] = by.ask(stream=stream, **asked)
                work[by] = busy(by.pid) - ran
            assert said[alone] == said[server], said
            if pair > 3:  # the first are to get warm
                steps = said[alone][1]
                found[stream].append((times[alone], times[server], work[alone], work[server], steps))
    here, _, _, _, steps = zip(*found[False], *found[True], strict=True)
    told: dict[str, Any] = {"steps": statistics.median(steps), "alone_ms": spread(here)}
    told["step_ms"] = round(1000 * statistics.median(h / s for h, s in zip(here, steps, strict=True)), 2)
    for stream, rows in found.items():
        here, there, work_here, work_there, _ = zip(*rows, strict=True)
        added = [b - a for a, b in zip(here, there, strict=True)]
        worked = [b - a for a, b in zip(work_here, work_there, strict=True)]
        told["streamed" if stream else "whole"] = {
            "added_ms": spread(added),
            "added_part": round(statistics.median(added) / statistics.median(here), 4),
            "added_part_of_pairs": round(statistics.median(b / a - 1 for a, b in zip(here, there, strict=True)), 4),
            "processor_added_part": round(statistics.median(worked) / statistics.median(work_here), 4),
        }
    return told


def slower(folder: Path) -> str:
    """Random weights whose steps take some tens of milliseconds. Without a template, whatever they say is text."""
    shape = {"layers": 6, "hidden": 512, "ffn": 1024, "expert_ffn": 256, "experts": 16, "top_k": 4, "heads": 8}
    shape |= {"kv_heads": 4, "global_kv_heads": 2, "head_dim": 64, "global_head_dim": 128, "window": 512}
    write_checkpoint(folder, **shape, canvas=256, context=2048, vocab=8192, chat_template=None)
    convert(folder, folder / "slower.gguf", type="q8_0")
    return str(folder / "slower.gguf")


class Crowd:
    """Clients in threads, and what becomes of their requests."""

    def __init__(self, url: str, wanted: dict[int, str]) -> None:
        self.url, self.wanted = url, wanted
        self.stop = threading.Event()
        self.next = itertools.count()
        self.answers = self.refused = 0
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.lock = threading.Lock()

    def client(self) -> None:
        with httpx.Client(timeout=600) as client:
            while not self.stop.is_set():
                number = next(self.next)
                index = number % len(CASES)
                began, first = time.perf_counter(), None
                try:
                    asked = body(CASES[index], index, stream=bool(number % 2))
                    if number % 2:
                        text, first, _ = streamed(client, self.url, asked)
                    else:
                        text = whole(client, self.url, asked)
                except httpx.HTTPStatusError as failure:
                    after = failure.response.headers.get("Retry-After")
                    with self.lock:
                        if failure.response.status_code == 429 and after is not None:
                            self.refused += 1
                        else:
                            self.errors.append(f"{failure.response.status_code} {failure.response.text[:200]}")
                    self.stop.wait(min(float(after or 1), 2))
                    continue
                except Exception as failure:
                    with self.lock:
                        self.errors.append(f"{type(failure).__name__}: {failure}")
                    continue
                with self.lock:
                    self.answers += 1
                    self.seconds.append(time.perf_counter() - began)
                    self.first += [first] if first is not None else []
                    if text != self.wanted[index]:
                        self.wrong.append(f"{CASES[index].messages[0]['content']!r}: {text!r}")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def figure(client: httpx.Client, url: str, name: str) -> float:
    lines = client.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Killer(threading.Thread):
    """Has clients begin long streams, one after the other, and kills them in their midst."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.killed, self.stop = url, 0, threading.Event()
        self.victim: subprocess.Popen[str] | None = None

    def run(self) -> None:
        while not self.stop.is_set():
            command = [sys.executable, "-c", VICTIM, f"{self.url}/v1/chat/completions"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as self.victim:
                assert self.victim.stdout is not None
                streaming = self.victim.stdout.readline() != ""
                self.victim.kill()
            self.killed += streaming
            self.stop.wait(1)

    def end(self) -> None:
        self.stop.set()
        if self.victim is not None:
            self.victim.kill()
        self.join()


def load(url: str, pid: int, client: httpx.Client, clients: int, seconds: float) -> dict[str, Any]:
    wanted = {index: whole(client, url, body(case, index)) for index, case in enumerate(CASES)}
    crowd = Crowd(url, wanted)
    threads = [threading.Thread(target=crowd.client) for _ in range(clients)]
    killer, memory = Killer(url), []
    left = figure(client, url, "dgemma_requests_left_total")
    began = time.perf_counter()
    for thread in [*threads, killer]:
        thread.start()
    due = began
    while (now := time.perf_counter()) - began < seconds:
        memory.append(resident(pid))
        due = max(due + 1, now)
        time.sleep(max(0.0, due - time.perf_counter()))
    killer.end()
    crowd.stop.set()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    end = time.perf_counter() + 60
    while figure(client, url, "dgemma_requests_running") and time.perf_counter() < end:
        time.sleep(0.1)
    warm = memory[len(memory) // 3 :]
    third = max(1, len(warm) // 3)
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "answers": crowd.answers,
        "answers_per_second": round(crowd.answers / took, 2),
        "sent_away_429": crowd.refused,
        "errors": crowd.errors,
        "answers_unlike_alone": crowd.wrong,
        "clients_killed_while_streaming": killer.killed,
        "left_counted": figure(client, url, "dgemma_requests_left_total") - left,
        "running_at_the_end": figure(client, url, "dgemma_requests_running"),
        "answer_ms": spread(crowd.seconds),
        "first_byte_ms": spread(crowd.first),
        "memory_MiB": {
            "after_a_third": round(statistics.median(warm[:third]) / 2**20, 1),
            "at_the_end": round(statistics.median(warm[-third:]) / 2**20, 1),
            "most": round(max(memory) / 2**20, 1),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of the load")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=24, help="of answers for the overhead")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    told: dict[str, Any] = {"model": "tidy-q8_0", "queue": QUEUE, "together": TOGETHER, "cache": CACHE}
    told["processors"] = len(os.sched_getaffinity(0))
    tidy = bundled("tidy")
    told["overhead"] = {
        "tidy, ten canvases": overhead(tidy, given.pairs, 70, max_tokens=480),
        "tidy, one canvas": overhead(tidy, 2 * given.pairs, 6, max_tokens=48),
    }
    with tempfile.TemporaryDirectory() as folder:
        slow = slower(Path(folder))
        told["overhead"]["random weights, one canvas"] = overhead(
            slow, given.pairs // 2, 6, max_tokens=256, steps=12, stability=1000
        )
    flags = ("--name", "tidy", "--queue", str(QUEUE), "--together", str(TOGETHER), "--cache", CACHE)
    with served(tidy, *flags) as (url, process), httpx.Client(timeout=600) as client:
        firsts = [streamed(client, url, body(case, 100, stream=True))[1:] for case in CASES]
        told["alone"] = {
            "first_byte_ms": spread([first for first, _ in firsts]),
            "first_text_ms": spread([spoke for _, spoke in firsts]),
        }
        told["load"] = load(url, process.pid, client, given.clients, given.seconds)
    text = json.dumps(told, indent=1, ensure_ascii=False)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    bad = told["load"]["errors"] or told["load"]["answers_unlike_alone"] or told["load"]["running_at_the_end"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
