"""Tasks: prompts whose answers can be checked, from a file of JSON lines, or those that come with dgemma.

    {"id": "7", "prompt": "2 + 2 =", "check": {"kind": "numeric", "value": 4}}
    {"id": "8", "messages": [{"role": "user", "content": "..."}], "check": [...], "level": "hard", "max_tokens": 64}

    {"id": "9", "fill": "Half of ten is [[...]].", "check": {"kind": "exact", "text": "five", "strip": true}}

`prompt` is a text that is used unchanged; `messages` go through the file's chat template, with `thinking` and `tools`.
`fill` is a text with holes to fill, [[...]], or [[n]] for one of n tokens; a prompt may come before it. The check is
applied to the texts of the holes, one line for each.
Tasks of one `level` are counted together. The kinds of checks are in dgemma.eval.checks.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.chat import messages
from dgemma.errors import UsageError
from dgemma.eval import word_tasks
from dgemma.eval.checks import Check, refuse
from dgemma.eval.prompts import contents, data, puzzles, reads
from dgemma.files import json_lines
from dgemma.infill.fill import Hole, pieces_of
from dgemma.model import Model
from dgemma.session import Messages

FIELDS = {"id", "prompt", "messages", "fill", "check", "level", "thinking", "tools", "max_tokens"}


@dataclass(frozen=True)
class Task:
    """One prompt and the checks of its answer."""

    name: str  # the name of the file or of the shipped tasks
    id: str
    prompt: str | Messages | None  # None: a fill without one
    check: Check
    level: str = ""
    fill: str = ""
    thinking: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None = None  # None: one canvas

    @property
    def asked(self) -> str:
        """A digest of the prompt, its options and the check: different tasks have different ones, even with one id."""
        all_of_it = [self.prompt, self.fill, self.check, self.thinking, self.tools, self.max_tokens]
        return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:16]

    def ids(self, model: Model) -> list[int]:
        """Return the ids of the prompt for a model."""
        assert self.prompt is not None
        if isinstance(self.prompt, str):
            return model.prompt_ids(self.prompt)
        return model.tokenizer.chat(self.prompt, tools=list(self.tools) or None, thinking=self.thinking)


def load(path: str | os.PathLike[str]) -> list[Task]:
    """Read the tasks of a file. Raises UsageError, with file and line, for a line that is no task or repeats an id."""
    name = os.fsdecode(path)
    return _parsed(name, Path(name).stem, json_lines.lines(name))


def parse(where: str, name: str, text: str) -> list[Task]:
    """Read the tasks of a text. where: the text's name in errors. name: the name of the tasks."""
    return _parsed(where, name, json_lines.split(io.BytesIO(text.encode()), where))


def _parsed(where: str, name: str, lines: Iterable[tuple[int, bytes]]) -> list[Task]:
    found: dict[str, Task] = {}
    for number, line in lines:
        try:
            task = read(name, line)
            if task.id in found:
                raise UsageError(f"id {task.id!r} was used before")
        except UsageError as problem:
            raise UsageError(f"{where}, line {number}: {problem}") from None
        found[task.id] = task
    if not found:
        raise UsageError(f"{where}: no tasks in it")
    return list(found.values())


def read(name: str, line: str | bytes) -> Task:
    """Read one task from a line. Raises UsageError."""
    given = json_lines.value(line)
    if not isinstance(given, dict):
        raise UsageError("not a JSON object")
    if strange := sorted(given.keys() - FIELDS):
        raise UsageError(f"unknown field {strange[0]!r}; the fields are {', '.join(sorted(FIELDS))}")
    if "id" not in given or "check" not in given:
        raise UsageError(f"{'id' if 'id' not in given else 'check'} is missing")
    asked = [field for field in ("prompt", "messages") if field in given]
    if len(asked) > 1 or not (asked or "fill" in given):
        raise UsageError("a task has either a prompt or messages, or holes to fill")
    fill = given.get("fill", "")
    if "fill" in given and not (isinstance(fill, str) and any(isinstance(piece, Hole) for piece in pieces_of(fill))):
        raise UsageError("fill must be text with a hole in it: [[...]] or [[n]]")
    if "fill" in given and "max_tokens" in given:
        raise UsageError("fill says itself how long the answer is: no max_tokens")
    prompt = given.get("prompt", given.get("messages"))
    if "prompt" in given:
        if not isinstance(prompt, str) or not prompt:
            raise UsageError("prompt must be text")
    elif asked:
        if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
            raise UsageError('messages must be a list of {"role": ..., "content": ...}')
        messages.read(prompt)  # raises UsageError for messages that are not understood
    for field, kind in (("thinking", bool), ("tools", list), ("max_tokens", int)):
        if field in given and type(given[field]) is not kind:
            raise UsageError(f"{field} must be of type {kind.__name__}, not {given[field]!r}")
    messages.read_tools(given.get("tools"))
    refuse(given["check"])
    return Task(
        name,
        str(given["id"]),
        prompt,
        given["check"],
        str(given.get("level", "")),
        fill,
        given.get("thinking", False),
        tuple(given.get("tools", ())),
        given.get("max_tokens"),
    )


def sudoku(chat: bool) -> list[Task]:
    """Return the Sudokus that the bundled model was not trained on; the level is the number of blanks."""
    ask = "Solve this Sudoku. Answer with the nine finished rows and nothing else.\n\n"
    tasks = []
    for number, puzzle in enumerate(puzzles()):
        prompt: str | Messages = [{"role": "user", "content": ask + puzzle.prompt}] if chat else puzzle.prompt
        check = {"kind": "exact", "text": puzzle.solution, "strip": chat}
        tasks.append(Task("sudoku", str(number), prompt, check, f"{puzzle.blanks} blanks"))
    return tasks


def sudoku_rows(chat: bool) -> list[Task]:
    """Return solutions of Sudokus with 48 or more blanks, with three rows missing, which the model has to fill."""
    tasks = []
    for number, puzzle in enumerate(puzzles()):
        rows = puzzle.solution.splitlines()
        missing = [(number + turn) % 9 for turn in (0, 3, 6)]
        shown = "".join("[[9]]\n" if at in missing else row + "\n" for at, row in enumerate(rows))
        check = {"kind": "exact", "text": "\n".join(rows[at] for at in sorted(missing))}
        if puzzle.blanks >= 48 and not chat:
            tasks.append(Task("sudoku-rows", str(number), puzzle.prompt, check, f"{puzzle.blanks} blanks", shown))
    return tasks


def infill(chat: bool) -> list[Task]:
    """Return sentences and code with a hole that has only one right text."""
    tasks = []
    for number, (level, text, answer) in enumerate(json.loads(data("infill.json"))):
        tasks.append(Task("infill", str(number), None, {"kind": "exact", "text": answer, "strip": True}, level, text))
    return tasks


def _written(name: str, make: Callable[[], list[word_tasks.Item]]) -> Callable[[bool], list[Task]]:
    def tasks(chat: bool) -> list[Task]:
        return [
            Task(name, str(i), [{"role": "user", "content": item.ask}], item.check, item.level, tools=item.tools)
            for i, item in enumerate(make())
            if chat or not item.tools
        ]

    return tasks


def _tidy(name: str) -> Callable[[bool], list[Task]]:
    """Return a maker of tasks that the bundled model `tidy` was not trained on: see tests/models/tidy/shipped.py."""

    def tasks(chat: bool) -> list[Task]:
        file = f"tidy-{name}.jsonl"
        return parse(file, name, data(file)) if chat else []

    return tasks


@dataclass(frozen=True)
class Shipped:
    """Shipped tasks of one name, in several versions for different vocabularies.

    A version is a function of a bool, whether the model has a chat template.
    """

    what: str  # a description, for --help
    wordings: tuple[Callable[[bool], list[Task]], ...]

    def of(self, model: Model) -> list[Task]:
        """Return the tasks of the first version that the model's vocabulary is made for; [] if there is none."""
        chat = model.tokenizer.chat_template is not None
        return next((tasks for wording in self.wordings if fits(model, tasks := wording(chat))), [])


# The list of shipped tasks, by name.
SHIPPED: dict[str, Shipped] = {
    "sudoku": Shipped("Sudokus, by number of blanks", (sudoku,)),
    "sudoku-rows": Shipped("finished Sudokus with three rows missing", (sudoku_rows,)),
    "infill": Shipped("what is missing in sentences, documents and code", (infill, _tidy("infill"))),
    **{
        name: Shipped(what, (_written(name, word_tasks.MADE[name]), _tidy(name)))
        for name, what in (
            ("brackets", "a line whose brackets are to be closed"),
            ("table", "a Markdown table whose rule and bars are to be closed"),
            ("json", "properties to write as a JSON object"),
            ("tools", "calls of tools that are declared"),
        )
    },
}


def shipped(model: Model, name: str) -> list[Task]:
    """Return the shipped tasks of this name for a model.

    Raises UsageError where its vocabulary is made for none of their versions.
    """
    tasks = SHIPPED[name].of(model)
    if not tasks:
        raise UsageError(f"--task {name}: the vocabulary of {model.path} cannot read it, or it knows no chats")
    return tasks


def suitable(model: Model) -> list[str]:
    """Return the names of the shipped tasks that a model's vocabulary is made for."""
    return [name for name, tasks in SHIPPED.items() if tasks.of(model)]


def fits(model: Model, tasks: list[Task]) -> bool:
    """Return whether the list is not empty, and a model's vocabulary is made for the tasks."""
    return bool(tasks) and reads(
        model, [text for task in tasks[:20] for text in [*contents(task.prompt or ""), *texts_of(task.fill)]]
    )


def texts_of(fill: str) -> list[str]:
    """Return the texts around the holes."""
    return [piece for piece in pieces_of(fill) if isinstance(piece, str)]
