"""Writes dg-eval's tasks and prompts for tidy, from held-out cases: in tests, `python -m models.tidy.shipped`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from models.tidy import tasks
from models.tidy.tasks import Case, Holes

import dgemma
from dgemma.model import bundled

DATA = Path(dgemma.__file__).parent / "eval" / "data"
COUNT = 60  # of each task
EACH = 20  # of each kind of hole
PROMPTS = 2  # of each kind that fidelity is measured on


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def exactly(case: Case) -> dict[str, Any]:
    return {"kind": "exact", "text": case.answer}


def as_json(case: Case) -> dict[str, Any]:
    return {"kind": "json", "equals": json.loads(case.answer)}


def calling(case: Case) -> dict[str, Any]:
    name, *lines = case.messages[0]["content"].splitlines()
    arguments = tasks.typed(dict(line.split("=", 1) for line in lines))
    return {"kind": "call", "name": name.removeprefix("Call ").rstrip(":"), "arguments": arguments}


# Task of dg-eval: what its answers are held to, and its levels.
CHATS: dict[str, tuple[Callable[[Case], dict[str, Any]], Callable[[Case], str]]] = {
    "brackets": (exactly, lambda case: f"{len(case.answer) - len(passage(case))} open"),
    "table": (exactly, lambda case: f"{count(len(passage(case).splitlines()), 'row')}"),
    "json": (as_json, lambda case: count(len(passage(case).splitlines()), "key")),
    "tool": (calling, lambda case: count(len(case.tools), "tool")),
}


def passage(case: Case) -> str:
    return str(case.messages[0]["content"]).partition("\n")[2]


def chat(task: str) -> Iterator[dict[str, Any]]:
    check, level = CHATS[task]
    for i, case in sorted(enumerate(tasks.cases(task, COUNT)), key=lambda each: level(each[1])):
        told = {"id": str(i), "level": level(case), "messages": case.messages}
        if case.tools:
            told["tools"] = case.tools
        yield {**told, "check": check(case)}


def infill(tokenizer: dgemma.Tokenizer) -> Iterator[dict[str, Any]]:
    """The middle of an answer behind its question, and what is missing in a document; holes of the right length."""
    for form in ("infill", "document"):
        for task in tasks.FORMS[form][1]:
            if task != "think":  # whose marks a fill would take for text
                for i, holes in enumerate(tasks.holes(form, task, EACH)):
                    level = f"{task}, {'answer' if form == 'infill' else 'document'}"
                    yield {"id": f"{form} {task} {i}", "level": level, **filling(holes, tokenizer)}


def filling(holes: Holes, tokenizer: dgemma.Tokenizer) -> dict[str, Any]:
    text = "".join(f"[[{len(tokenizer.encode(text))}]]" if hole else text for text, hole in holes.pieces)
    wanted = "\n".join(text for text, hole in holes.pieces if hole)
    asked = {"messages": holes.case.messages} if holes.prompted else {}
    return {**asked, "fill": text, "check": {"kind": "exact", "text": wanted}}


def prompts() -> Iterator[tuple[dict[str, Any], ...]]:
    for i in range(PROMPTS):
        for task in (*tasks.PASSAGES, "again"):
            yield tasks.cases(task, PROMPTS)[i].messages


def made() -> dict[str, str]:
    """The files by name."""
    tokenizer = dgemma.Tokenizer.from_gguf(bundled("tidy"))
    names = {"tool": "tools"}
    files = {names.get(task, task): chat(task) for task in CHATS} | {"infill": infill(tokenizer)}
    lines = {f"tidy-{name}.jsonl": "".join(map(line, items)) for name, items in files.items()}
    return {**lines, "tidy-prompts.json": "[\n " + ",\n ".join(map(dumped, prompts())) + "\n]\n"}


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def line(item: dict[str, Any]) -> str:
    return dumped(item) + "\n"


if __name__ == "__main__":
    for name, text in made().items():
        (DATA / name).write_text(text, encoding="utf-8")
