"""Shipped tasks that are generated from lists of words with a fixed seed, so that they are always the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.eval.checks import Check

COUNT = 60  # items of each kind
NAMES = ["Ada", "Bruno", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca", "Mira"]
PLACES = ["Oslo", "Lisbon", "Riga", "Turin", "Cork", "Graz", "Ghent", "Lyon", "Porto", "Bergen"]
THINGS = ["lamp", "kettle", "notebook", "bicycle", "ladder", "tent", "compass", "blanket", "radio", "basket"]
OPENING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Item:
    """A generated task: the text of the prompt, and the check of the answer."""

    ask: str
    check: Check
    level: str
    tools: tuple[Mapping[str, Any], ...] = ()


def brackets(random: random.Random, level: int) -> Item:
    """Return a task to close a line with `level` open brackets."""
    text, still_open = random.choice(THINGS), ""
    while len(still_open) < level:
        if still_open and random.random() < 0.25:
            text, still_open = text + OPENING[still_open[-1]], still_open[:-1]
        else:
            mark = random.choice("([{")
            text, still_open = f"{text} {mark}{random.choice(THINGS)}", still_open + mark
    closed = text + "".join(OPENING[mark] for mark in reversed(still_open))
    ask = "Close the brackets that are open at the end of this line, in the right order, and change nothing else."
    check = {"kind": "exact", "text": closed, "strip": True}
    return Item(f"{ask} Answer with the whole line alone.\n\n{text}", check, f"{level} open")


def table(random: random.Random, level: int) -> Item:
    """Return a task to repair a Markdown table of `level` rows without its rule and closing bars."""
    rows = [[random.choice(NAMES), random.choice(PLACES), str(random.randint(18, 79))] for _ in range(level)]
    head = ["Name", "Place", "Age"]
    raw = "\n".join("| " + " | ".join(row) for row in (head, *rows))
    whole = r"\s*".join(r"\|\s*" + r"\s*\|\s*".join(row) + r"\s*\|" for row in rows)
    heading = r"\|\s*" + r"\s*\|\s*".join(head) + r"\s*\|"
    check = [{"kind": "markdown-balanced"}, {"kind": "regex", "pattern": rf"^\s*{heading}\s*[|:\s-]+\s*{whole}\s*$"}]
    ask = "Repair this Markdown table: it lacks the rule under its head and the bars at the ends of its rows."
    return Item(f"{ask} Answer with the table alone.\n\n{raw}", check, f"{level} rows")


def json_object(random: random.Random, level: int) -> Item:
    """Return a task to write `level` properties of something as a JSON object."""
    drawn: dict[str, Callable[[], Any]] = {
        "name": lambda: random.choice(NAMES),
        "city": lambda: random.choice(PLACES),
        "age": lambda: random.randint(18, 79),
        "member": lambda: random.random() < 0.5,
        "items": lambda: random.sample(THINGS, 2),
        "balance": lambda: random.randint(-9999, 9999) / 4,
    }
    value = {key: drawn[key]() for key in random.sample(list(drawn), level)}
    lines = "\n".join(f"{key}: {said(each)}" for key, each in value.items())
    ask = "Write this as one JSON object with these keys: numbers as numbers, yes and no as true and false, several"
    ask += " things as a list of strings. Answer with the JSON alone."
    return Item(f"{ask}\n\n{lines}", {"kind": "json", "equals": value}, f"{level} keys")


def said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " and ".join(value) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)


# Tools by name: (description, arguments, a sentence that asks for a call).
TOOLS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "get_weather": ("Tells the weather of a day", ("city", "days"), "What is the weather in {city} in {days} days?"),
    "add_contact": ("Adds a person to a list", ("name", "city"), "Put {name} from {city} on my list."),
    "order_thing": ("Orders something", ("thing", "number"), "Please order {number} of these: {thing}."),
    "book_train": ("Books a train ride", ("origin", "city", "hour"), "A train from {origin} to {city} at {hour}."),
    "set_timer": ("Sets a timer", ("minutes",), "Wake me in {minutes} minutes."),
    "find_recipe": ("Finds recipes", ("guests",), "What could I cook for {guests} guests?"),
}
ARGUMENTS: dict[str, Callable[[random.Random], Any]] = {
    **dict.fromkeys(("city", "origin"), lambda random: random.choice(PLACES)),
    **dict.fromkeys(("days", "number", "hour", "minutes", "guests"), lambda random: random.randint(2, 20)),
    "name": lambda random: random.choice(NAMES),
    "thing": lambda random: random.choice(THINGS),
}


def tools(random: random.Random, level: int) -> Item:
    """Return a task to call one of `level` tools, for which a sentence asks."""
    names = random.sample(list(TOOLS), level)
    chosen = random.choice(names)
    arguments = {each: ARGUMENTS[each](random) for each in TOOLS[chosen][1]}
    check = {"kind": "call", "name": chosen, "arguments": arguments}
    ask = f"{TOOLS[chosen][2].format(**arguments)} Call the tool for it, and say nothing else."
    return Item(ask, check, f"{level} {'tool' if level == 1 else 'tools'}", tuple(map(declared, names)))


def declared(name: str) -> dict[str, Any]:
    """Return a tool's declaration in the form of OpenAI's API."""
    what, arguments, _ = TOOLS[name]
    source = random.Random(0)
    kinds = {each: "string" if isinstance(ARGUMENTS[each](source), str) else "integer" for each in arguments}
    properties = {each: {"type": kind, "description": each} for each, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": what + ".", "parameters": parameters}}


def drawn(name: str, draw: Callable[[random.Random, int], Item], levels: tuple[int, ...]) -> Callable[[], list[Item]]:
    """Return a function that makes COUNT items, with the levels in turn."""

    def items() -> list[Item]:
        source = random.Random(name)
        return [draw(source, levels[i % len(levels)]) for i in range(COUNT)]

    return items


MADE: dict[str, Callable[[], list[Item]]] = {
    "brackets": drawn("brackets", brackets, (1, 2, 4)),
    "table": drawn("table", table, (1, 3, 6)),
    "json": drawn("json", json_object, (2, 4, 6)),
    "tools": drawn("tools", tools, (1, 3, 6)),
}
