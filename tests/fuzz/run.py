"""Fuzzes targets, several at a time, and tells of each: executions, corpus, the lines of its readers that it reached.

    python tests/fuzz/run.py native|python BUILD [--minutes 1 | --steady] [--seed 0] [--jobs 2] [TARGET ...]

--steady makes a fixed number of runs instead, about a minute's, that are the same ones each time: nothing that differs
between two machines or two moments (the order of a folder's files, addresses, how long a run takes) is looked at. What
crashes stays in BUILD/found, what reaches something new in BUILD/corpus. Fails where a target crashes, or reaches less
than LEAST of its readers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LEAST = 95.0  # per cent of lines
FLAGS = ["-rss_limit_mb=4096", "-print_final_stats=1"]
STEADY = ["-use_cmp=0", "-reload=0"]


@dataclass(frozen=True)
class Target:
    """What a target reads with, how many runs take about a minute (a third of one for those in Python), and functions
    of its readers that are called once all is read. A run that takes `hang` seconds has failed."""

    name: str
    readers: tuple[str, ...]
    runs: int
    behind: tuple[str, ...] = ()
    hang: int = 600


NATIVE = (
    Target("gguf", ("runtime/gguf.c",), 350_000),
    # The rest of it puts weights on a GPU, and there is none, or refuses a second head, which tests have.
    Target(
        "model",
        ("runtime/model.c", "runtime/config.c"),
        20_000,
        behind=("device_bytes", "place_weights", "place_all", "refuse_vram", "refuse_head"),
    ),
    Target("quants", ("quants/*.h", "quants/*.c"), 80_000),
    Target("tokenizer", ("runtime/tokenizer.c",), 32_000, hang=20),
)
PYTHON = (
    Target("safetensors", ("convert/safetensors.py",), 40_000),
    Target("calls", ("runtime/dgemma/chat/answer_parser.py",), 8_000),
    Target("config", ("convert/config.py",), 40_000),
    Target(
        "requests",
        ("runtime/dgemma/files/json_lines.py", "runtime/dgemma/chat/messages.py"),
        20_000,
        ("lines", "values", "as_line", "is_message", "text_of", "plain", "_plain"),
    ),
    Target("vocabulary", ("convert/tokenizer.py", "convert/vocabulary.py"), 40_000),
    Target("sentencepiece", ("convert/tokenizer_model.py",), 400, ("_check_added",)),  # which needs other files
    Target(
        "imatrix", ("convert/imatrix.py",), 40_000, ("encode", "of", "bind", "pairs", "unmeasured", "write_imatrix")
    ),
)


@dataclass(frozen=True)
class Told:
    """What came of a target: lines not reached by file, of so many lines in all."""

    target: Target
    executions: int
    files: int
    kibibytes: float
    missed: dict[str, list[int]]
    lines: int
    failed: bool

    @property
    def reached(self) -> float:
        return 100.0 * (1 - sum(map(len, self.missed.values())) / max(self.lines, 1))


class Fuzzer:
    """One way to run targets: binaries of clang, or atheris."""

    most_bytes = 65536  # of an input
    most_minutes = sys.maxsize  # of a process; the next one goes on from the corpus it leaves

    def __init__(self, build: Path, options: argparse.Namespace) -> None:
        self.build, self.options = build, options

    def command(self, name: str) -> list[str]:
        raise NotImplementedError

    def steady(self, target: Target, corpus: Path) -> list[str]:
        """What runs a target the same way each time, where that is not its command with other flags."""
        return []

    def reached(self, target: Target, corpora: Sequence[Path]) -> tuple[dict[str, list[int]], int]:
        """Lines of a target's readers that were not reached, and how many lines there are."""
        raise NotImplementedError

    def ends(self) -> list[list[str]]:
        """Flags of each process: how long it runs, and its seed, for the same one would make the same mutations."""
        minutes, seed, most = self.options.minutes, self.options.seed, self.most_minutes
        starts = range(0, minutes, most)
        return [[f"-max_total_time={60 * min(most, minutes - at)}", f"-seed={seed and seed + at}"] for at in starts]

    def run(self, target: Target) -> Told:
        options, name = self.options, target.name
        kept, own = HERE / "corpus" / name, self.build / ("steady" if options.steady else "corpus") / name
        if options.steady:
            shutil.rmtree(own, ignore_errors=True)
        for folder in (own, self.build / "found"):
            folder.mkdir(parents=True, exist_ok=True)
        seeds = self.build / f"{name}.seeds"
        seeds.write_text(",".join(str(file) for file in sorted(kept.iterdir())))
        flags = [*FLAGS, f"-timeout={target.hang}", f"-max_len={self.most_bytes}", f"-seed_inputs=@{seeds}"]
        flags.append(f"-artifact_prefix={self.build / 'found' / name}-")
        ends = [[*STEADY, f"-runs={target.runs}", f"-seed={options.seed}"]] if options.steady else self.ends()
        command = self.steady(target, kept) if options.steady else []
        profile = {"LLVM_PROFILE_FILE": str(self.build / f"{name}.profraw"), "PYTHONHASHSEED": "0"}
        log = self.build / f"{name}.log"
        with log.open("w") as to:
            codes = (
                subprocess.run(
                    command or [*self.command(name), *flags, *end, str(own)],
                    cwd=ROOT, env=os.environ | profile, stdout=to, stderr=to, check=False,
                ).returncode
                for end in ends
            )  # fmt: skip
            failed = next(filter(None, codes), 0)
        said = log.read_text(errors="replace")
        if failed:
            print(f"== {name} failed ({failed}); the end of {log}:\n{said[-3000:]}", flush=True)
            return Told(target, 0, 0, 0, {}, 0, True)
        files = [file for folder in (kept, own) for file in folder.iterdir()]
        executions = re.findall(r"stat::number_of_executed_units: *(\d+)", said)
        missed, lines = self.reached(target, (kept, own))
        size = sum(file.stat().st_size for file in files) / 1024
        return Told(target, sum(map(int, executions)), len(files), size, missed, lines, False)


class Native(Fuzzer):
    def command(self, name: str) -> list[str]:
        return [str(self.build / f"fuzz-{name}")]

    def reached(self, target: Target, corpora: Sequence[Path]) -> tuple[dict[str, list[int]], int]:
        profile = self.build / f"{target.name}.profdata"
        subprocess.run(["llvm-profdata", "merge", "-o", profile, self.build / f"{target.name}.profraw"], check=True)
        files = [str(file) for pattern in target.readers for file in sorted(ROOT.glob(pattern))]
        told = subprocess.run(
            ["llvm-cov", "export", "-format=lcov", *self.command(target.name), f"-instr-profile={profile}", *files],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        counts: dict[str, dict[int, int]] = {}
        functions: dict[int, str] = {}  # of a file, by their first line
        for line in told.splitlines():
            if line.startswith("SF:"):
                file = counts.setdefault(os.path.relpath(line[3:], ROOT), {})
                functions = {}
            elif line.startswith("FN:"):
                first, function = line[3:].split(",")
                functions[int(first)] = function.split(":")[-1]
            elif line.startswith("DA:"):
                number, count = map(int, line[3:].split(",")[:2])
                begins = max((first for first in functions if first <= number), default=0)
                if functions.get(begins) not in target.behind:
                    file[number] = max(count, file.get(number, 0))
        missed = {file: sorted(n for n, count in of.items() if count == 0) for file, of in counts.items()}
        return missed, sum(map(len, counts.values()))


class Python(Fuzzer):
    most_bytes = 4096
    most_minutes = 5  # atheris never frees what a watched comparison gives: arrays, in imatrix, some 70 MB a minute

    def command(self, name: str) -> list[str]:
        return [sys.executable, str(HERE / "parsers.py"), name]

    def steady(self, target: Target, corpus: Path) -> list[str]:
        """Without atheris: mutations of the corpus alone, since what coverage leads to differs a little each time."""
        found = str(self.build / "found" / target.name)
        how = ["--mutate", str(target.runs), str(self.options.seed), found, target.name]
        return [sys.executable, str(HERE / "parsers.py"), *how, *map(str, sorted(corpus.iterdir()))]

    def reached(self, target: Target, corpora: Sequence[Path]) -> tuple[dict[str, list[int]], int]:
        data, told = self.build / f"{target.name}.coverage", self.build / f"{target.name}.json"
        files = [str(file) for folder in corpora for file in sorted(folder.iterdir())]
        coverage = [sys.executable, "-m", "coverage"]
        only = [f"--data-file={data}", f"--include={','.join(str(ROOT / reader) for reader in target.readers)}"]
        replay = ["run", *only, str(HERE / "parsers.py"), "--replay", target.name, *files]
        for step in (replay, ["json", *only, "-q", "-o", str(told)]):
            subprocess.run([*coverage, *step], cwd=ROOT, check=True)
        found = json.loads(told.read_text())
        missed, lines = {}, 0
        for file, of in found["files"].items():
            functions = of["functions"].items()
            read = [part for name, part in functions if name.split(".")[-1] not in target.behind]
            missed[os.path.relpath(file, ROOT)] = sorted(line for part in read for line in part["missing_lines"])
            lines += sum(part["summary"]["num_statements"] for part in read)
        return missed, lines


def ranges(numbers: Sequence[int]) -> str:
    """1-3, 7"""
    told: list[list[int]] = []
    for number in numbers:
        if told and told[-1][1] == number - 1:
            told[-1][1] = number
        else:
            told.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in told)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=("native", "python"))
    parser.add_argument("build", type=Path)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--minutes", type=int, default=1)
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_intermixed_args()
    fuzzer = (Native if options.kind == "native" else Python)(options.build.resolve(), options)
    chosen = [t for t in (NATIVE if options.kind == "native" else PYTHON) if t.name in (options.targets or [t.name])]
    with ThreadPoolExecutor(options.jobs) as pool:
        all_told = list(pool.map(fuzzer.run, chosen))
    print(f"{'target':12} {'executions':>10} {'corpus':>6} {'KiB':>6} {'lines':>6} {'reached':>7}  not reached")
    for told in all_told:
        missed = "; ".join(f"{file} {ranges(lines)}" for file, lines in told.missed.items() if lines)
        print(
            f"{told.target.name:12} {told.executions:10} {told.files:6} {told.kibibytes:6.0f} {told.lines:6}"
            f" {told.reached:6.1f}%  {missed}"
        )
    for told in all_told:
        if told.failed or told.reached < LEAST:
            what = "failed" if told.failed else f"reaches {told.reached:.1f} % of its readers, not {LEAST} %"
            print(f"{told.target.name}: {what}", file=sys.stderr)
    return any(told.failed or told.reached < LEAST for told in all_told)


if __name__ == "__main__":
    sys.exit(main())
