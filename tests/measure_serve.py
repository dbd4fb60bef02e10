"""What dg-serve bears and costs, with the bundled `tidy`: python tests/measure_serve.py [--json FILE] [--seconds 60]

Three things, against a server that is a process of its own:

- overhead: the same prompt and seed through the server and in-process, in turn; how much longer the server takes, over
  answers that take long and short, as medians of pairs. Both have all processors, one after the other. Beside wall time
  the processors' time, which tells the same where others work on the machine.
- first bytes: from a request to the first byte, and to the first text, of a streamed answer. One client.
- load: many clients at once for a while, streaming or not, whose every answer must be what one client alone was given.
  Meanwhile other clients are killed in the midst of a stream, and the memory of the server is read every second. The
  queue is shorter than the crowd, so that some are sent away with 429, and come again when they are told to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from models.tidy import tasks

import dgemma
from dgemma.model import bundled

QUEUE, TOGETHER, CACHE = 24, 4, "32M"
CASES = [case for task in ("sort", "upper", "quotes", "table", "json", "indent") for case in tasks.cases(task, 4)]
LONG = {"stability": 1000, "steps": 96}  # every step is taken, whatever settles
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
def served(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "dgemma.cli.serve", bundled("tidy"), "--name", "tidy", "--port", "0", *flags]
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


def spread(values: list[float], scale: float = 1000, digits: int = 2) -> dict[str, float]:
    ordered = sorted(values)
    at = {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "most": ordered[-1]}
    return {name: round(scale * value, digits) for name, value in at.items()}


def busy(pid: int) -> float:
    """Seconds that the threads of a process have run."""
    tasks_of = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks_of) / 1e9


def overhead(url: str, pid: int, client: httpx.Client, pairs: int) -> dict[str, Any]:
    """Of long answers and short ones: milliseconds that the server adds, and what part of the time alone they are."""
    told: dict[str, Any] = {}
    with dgemma.Model(bundled("tidy")) as model, model.session(2048) as session:
        for name, own in (("long", LONG), ("short", {"steps": 48})):
            alone, over, parts, work, more = [], [], [], [], []
            for pair in range(pairs + 1):
                case = CASES[pair % len(CASES)]
                times, cpu = {}, {}
                for which in ("here", "there") if pair % 2 else ("there", "here"):
                    session.rewind(0)
                    of = os.getpid() if which == "here" else pid
                    began, ran = time.perf_counter(), busy(of)
                    if which == "here":
                        prompt = model.tokenizer.chat(case.messages)
                        text = session.generate(prompt, seed=pair, **OPTIONS, **own).text
                    else:
                        said = whole(client, url, body(case, pair, **own))
                    times[which], cpu[which] = time.perf_counter() - began, busy(of) - ran
                assert text == said, f"{case.messages}: {text!r} here, {said!r} there"
                if pair:  # the first is to get warm
                    alone.append(times["here"])
                    over.append(times["there"] - times["here"])
                    parts.append(times["there"] / times["here"] - 1)
                    work.append(cpu["here"])
                    more.append(cpu["there"] - cpu["here"])
            told[name] = {"alone_ms": spread(alone), "added_ms": spread(over)}
            told[name]["added_part"] = round(statistics.median(over) / statistics.median(alone), 4)
            told[name]["added_part_of_pairs"] = round(statistics.median(parts), 4)
            told[name]["processor_ms"] = {"alone": spread(work), "added": spread(more)}
            told[name]["processor_added_part"] = round(statistics.median(more) / statistics.median(work), 4)
    return told


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
    with (
        served("--queue", str(QUEUE), "--together", str(TOGETHER)) as (url, process),
        httpx.Client(timeout=600) as client,
    ):
        told["overhead"] = overhead(url, process.pid, client, given.pairs)
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
