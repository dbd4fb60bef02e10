"""Tasks: prompts whose answers can be checked. From a file of one JSON object per line, or shipped.

    {"id": "7", "prompt": "2 + 2 =", "check": {"kind": "numeric", "value": 4}}
    {"id": "8", "messages": [{"role": "user", "content": "..."}], "check": [...], "level": "hard", "max_tokens": 64}

`prompt` is text as it is, `messages` go through the file's chat template; `thinking` and `tools` are the template's.
Tasks of one `level` are counted together. checks.py has the checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.errors import SystemFailure, UsageError
from dgemma.eval import written
from dgemma.eval.checks import Check, refuse
from dgemma.eval.prompts import contents, puzzles, readable
from dgemma.model import Messages, Model

FIELDS = {"id", "prompt", "messages", "check", "level", "thinking", "tools", "max_tokens"}


@dataclass(frozen=True)
class Task:
    """One prompt and what its answer is held to."""

    name: str  # of the file or the shipped tasks
    id: str
    prompt: str | Messages
    check: Check
    level: str = ""
    thinking: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None = None  # None: one canvas

    @property
    def asked(self) -> str:
        """A digest of what is asked and how it is checked: another task has another, whatever its id."""
        all_of_it = [self.prompt, self.check, self.thinking, self.tools, self.max_tokens]
        return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:16]

    def ids(self, model: Model) -> list[int]:
        """The prompt as a model reads it."""
        if isinstance(self.prompt, str):
            return model.prompt_ids(self.prompt)
        return model.tokenizer.chat(self.prompt, tools=list(self.tools) or None, thinking=self.thinking)


def load(path: str | os.PathLike[str]) -> list[Task]:
    """The tasks of a file. Raises UsageError that names file and line for what is no task, or an id used twice."""
    name = os.fspath(path)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as problem:
        raise SystemFailure(f"{name}: {(problem.strerror or str(problem)).lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not UTF-8 text") from None
    found: dict[str, Task] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                task = read(Path(name).stem, line)
                if task.id in found:
                    raise UsageError(f"id {task.id!r} was used before")
            except UsageError as problem:
                raise UsageError(f"{name}, line {number}: {problem}") from None
            found[task.id] = task
    if not found:
        raise UsageError(f"{name}: no tasks in it")
    return list(found.values())


def read(name: str, line: str) -> Task:
    """One line. Raises UsageError."""
    try:
        given = json.loads(line)
    except ValueError as problem:
        raise UsageError(f"no JSON: {problem}") from None
    if not isinstance(given, dict):
        raise UsageError("not a JSON object")
    if strange := sorted(given.keys() - FIELDS):
        raise UsageError(f"unknown field {strange[0]!r}; the fields are {', '.join(sorted(FIELDS))}")
    if "id" not in given or "check" not in given:
        raise UsageError(f"{'id' if 'id' not in given else 'check'} is missing")
    if ("prompt" in given) == ("messages" in given):
        raise UsageError("a task has either a prompt or messages")
    prompt = given.get("prompt", given.get("messages"))
    if "prompt" in given:
        if not isinstance(prompt, str) or not prompt:
            raise UsageError("prompt must be text")
    elif not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise UsageError('messages must be a list of {"role": ..., "content": ...}')
    for field, kind in (("thinking", bool), ("tools", list), ("max_tokens", int)):
        if field in given and type(given[field]) is not kind:
            raise UsageError(f"{field} must be of type {kind.__name__}, not {given[field]!r}")
    refuse(given["check"])
    return Task(
        name,
        str(given["id"]),
        prompt,
        given["check"],
        str(given.get("level", "")),
        given.get("thinking", False),
        tuple(given.get("tools", ())),
        given.get("max_tokens"),
    )


def sudoku(chat: bool) -> list[Task]:
    """The Sudokus that the bundled model was not trained on, by number of blanks."""
    ask = "Solve this Sudoku. Answer with the nine finished rows and nothing else.\n\n"
    tasks = []
    for number, puzzle in enumerate(puzzles()):
        prompt: str | Messages = [{"role": "user", "content": ask + puzzle.prompt}] if chat else puzzle.prompt
        check = {"kind": "exact", "text": puzzle.solution, "strip": chat}
        tasks.append(Task("sudoku", str(number), prompt, check, f"{puzzle.blanks} blanks"))
    return tasks


def _written(name: str, make: Callable[[], list[written.Item]]) -> Callable[[bool], list[Task]]:
    def tasks(chat: bool) -> list[Task]:
        return [
            Task(name, str(i), [{"role": "user", "content": item.ask}], item.check, item.level)
            for i, item in enumerate(make())
        ]

    return tasks


# THE list of shipped tasks, by name. Each takes whether the model has a chat template.
SHIPPED: dict[str, Callable[[bool], list[Task]]] = {
    "sudoku": sudoku,
    **{name: _written(name, make) for name, make in written.MADE.items()},
}


def shipped(model: Model, name: str) -> list[Task]:
    """Shipped tasks for a model. Raises UsageError where its vocabulary cannot read them."""
    tasks = SHIPPED[name](model.tokenizer.chat_template is not None)
    if not fits(model, tasks):
        raise UsageError(f"--task {name}: the vocabulary of {model.path} cannot read it")
    return tasks


def suitable(model: Model) -> list[str]:
    """The names of the shipped tasks that a model can read."""
    chat = model.tokenizer.chat_template is not None
    return [name for name, tasks in SHIPPED.items() if fits(model, tasks(chat))]


def fits(model: Model, tasks: list[Task]) -> bool:
    return all(readable(model, text) for task in tasks[:20] for text in contents(task.prompt))
