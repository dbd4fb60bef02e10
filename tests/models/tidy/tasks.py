"""Small text tasks with one right answer each: what the bundled model `tidy` is trained on and measured by.

    for case in cases("sort", 20): print(case.messages, case.answer)

A case is a chat and the answer to it; `holes()` presents the same as a canvas whose holes are to be filled. A case
belongs to the held-out ones or to the training ones by a hash of its text, so that no test case was ever trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

SPELT = """
ace ant bat bee cat city cow day dog ear egg fig fox gum hat hen ice ink jam jar key kit lamp leaf map moon name nut
oak oslo owl pan paris pear pig rain red rice rome sea sun tea time top urn van vine wax weather web wolf yak zoo
"""
WORDS = SPELT.split()
CANVAS = 48  # tokens
TOKEN = re.compile("|".join(sorted(WORDS, key=len, reverse=True)) + "| +|<[^>]+>|.", re.IGNORECASE | re.DOTALL)
CLOSING = {"(": ")", "[": "]", "{": "}"}
CUT = re.compile("[A-Za-z]+|---| +|<[^>]+>|.", re.DOTALL)  # where a hole may begin or end
OPEN_THOUGHT, CLOSE_THOUGHT = "<|channel>thought\n", "<channel|>"


@dataclass(frozen=True)
class Case:
    """A chat whose last message asks for `answer`. Sent to a model as messages, tools and thinking."""

    task: str
    messages: tuple[dict[str, Any], ...]
    answer: str  # without thought and end id
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = False
    thought: str = ""  # where thinking
    end: str = "<turn|>"  # the end id that follows

    @property
    def output(self) -> str:
        """The whole of what the model writes, up to the end id."""
        return OPEN_THOUGHT + self.thought + CLOSE_THOUGHT + self.answer if self.thinking else self.answer

    def right(self, text: str) -> bool:
        """Whether a generated text is the answer; a case that asks for thinking wants the thought as well."""
        return text == self.output

    @property
    def held_out(self) -> bool:
        """By the passages alone, whatever is asked of them: one that any task is tested on is in no training case."""
        texts = (message.get("content", "").partition("\n")[2] for message in self.messages)
        return any(blake2b(text.encode(), digest_size=8).digest()[0] % 8 == 0 for text in texts if text)


@dataclass(frozen=True)
class Holes:
    """A canvas: pieces of text, of which those marked True are the holes, shown with what belongs there.

    Each piece is tokenised by itself. What is left of the canvas after the last piece holds `end` once, if it fits, and
    <pad>; all of that is pinned. `slack` more tokens than needed are in the last hole, and right are <pad> in them.
    """

    case: Case  # its messages are the prompt where `prompted`
    prompted: bool
    pieces: tuple[tuple[str, bool], ...]
    slack: int = 0

    @property
    def end(self) -> str:
        return self.case.end if self.prompted else "<eos>"

    @property
    def text(self) -> str:
        """What the finished canvas says."""
        return "".join(text for text, _ in self.pieces)


# ---- the tasks: from a source of randomness to a passage and what becomes of it ----


def words(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def value(rng: random.Random) -> str:
    """A word, a number of one or two digits, or now and then two letters."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(WORDS)
    if kind < 0.95:
        return str(rng.randrange(1, 10 ** rng.randint(1, 2)))
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(2))


def brackets(rng: random.Random) -> tuple[str, str]:
    """None is opened directly inside one of its kind: counting them is another task."""
    text, still_open = "", ""
    for _ in range(rng.randint(2, 5)):
        if still_open and text[-1] in CLOSING and rng.random() < 0.3:
            text, still_open = text + CLOSING[still_open[-1]], still_open[:-1]
        else:
            opened = rng.choice("([{".replace(still_open[-1:] or " ", ""))
            text, still_open = text + opened, still_open + opened
    if not still_open:
        return brackets(rng)
    return text, text + "".join(CLOSING[mark] for mark in reversed(still_open))


def quotes(rng: random.Random) -> tuple[str, str]:
    parts, marks = words(rng, 3, 5), rng.sample("\"'`", rng.randint(1, 2))
    for place, mark in zip(sorted(rng.sample(range(len(parts)), len(marks))), marks, strict=True):
        parts[place] = mark + parts[place]
    text = " ".join(parts)
    return text, text + "".join(reversed(marks))


def table(rng: random.Random) -> tuple[str, str]:
    rows = [f"| {rng.choice(WORDS)} | {value(rng)}" for _ in range(rng.randint(2, 3))]
    closed = [row + " |" for row in rows]
    return "\n".join(rows), "\n".join([closed[0], "|---|---|", *closed[1:]])


def pairs(rng: random.Random) -> list[tuple[str, str]]:
    return [(key, value(rng)) for key in words(rng, 1, 3)]


def json(rng: random.Random) -> tuple[str, str]:
    found = pairs(rng)
    members = (f'"{key}": ' + (text if text.isdigit() else f'"{text}"') for key, text in found)
    return "\n".join(f"{key}={text}" for key, text in found), "{" + ", ".join(members) + "}"


def sort(rng: random.Random) -> tuple[str, str]:
    """By first letters, which differ."""
    found = words(rng, 3, 4)
    while len({word[0] for word in found}) < len(found):
        found = words(rng, 3, 4)
    return " ".join(found), " ".join(sorted(found))


def upper(rng: random.Random) -> tuple[str, str]:
    text = " ".join(words(rng, 2, 5))
    return text, text.upper()


def indent(rng: random.Random) -> tuple[str, str]:
    """Blocks in braces: two spaces for each block around a line. The passage has none, or some where they are wrong."""
    lines, depth, left = [], 0, rng.randint(1, 2)
    for _ in range(rng.randint(1, 3)):
        if left and rng.random() < 0.7:
            lines.append("  " * depth + rng.choice(WORDS) + " {")
            depth, left = depth + 1, left - 1
        lines.append("  " * depth + rng.choice(WORDS))
        if depth and rng.random() < 0.3:
            depth -= 1
            lines.append("  " * depth + "}")
    lines += ["  " * level + "}" for level in reversed(range(depth))]
    wrong = rng.random() < 0.3
    spaces = ["", *((rng.choice(("", "  ", "    ")) if wrong else "") for _ in lines[1:])]
    found = "\n".join(space + line.lstrip() for space, line in zip(spaces, lines, strict=True)), "\n".join(lines)
    return found if "{" in found[0] else indent(rng)


# Tasks that turn a passage into another, by the instruction in front of it: they can be asked for as rewrites.
PASSAGES: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "brackets": ("close the brackets", brackets),
    "quotes": ("close the quotes", quotes),
    "table": ("close the table", table),
    "json": ("write JSON", json),
    "sort": ("sort", sort),
    "upper": ("upper case", upper),
    "indent": ("indent", indent),
}
TASKS = (*PASSAGES, "think", "tool", "reply", "again")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(rng: random.Random, task: str, tidy: bool) -> tuple[str, str, str]:
    """The instruction with its passage, the passage, and the answer. Tidy: with a capital and a colon."""
    instruction, make = PASSAGES[task]
    passage, answer = make(rng)
    if tidy or rng.random() < 0.7:
        instruction = instruction[0].upper() + instruction[1:]
    return f"{instruction}{':' if tidy else rng.choice((':', ':', '.', ''))}\n{passage}", passage, answer


def declare(name: str, keys: dict[str, str]) -> dict[str, Any]:
    """A tool as OpenAI's API has it."""
    properties = {key: {"type": "integer" if text.isdigit() else "string"} for key, text in keys.items()}
    parameters = {"type": "object", "properties": properties, "required": list(keys)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def call(name: str, arguments: dict[str, str]) -> str:
    inside = ",".join(f"{key}:" + (text if text.isdigit() else f'<|"|>{text}<|"|>') for key, text in arguments.items())
    return f"<|tool_call>call:{name}{{{inside}}}<tool_call|>"


def tool_name(rng: random.Random) -> str:
    return "_".join([*rng.choice(([], ["get"], ["find"])), rng.choice(WORDS)])


def tool_case(rng: random.Random, tidy: bool) -> Case:
    arguments = dict(sorted(pairs(rng)[:2]))
    name, other = tool_name(rng), tool_name(rng)
    tools = [declare(name, arguments)]
    if other != name and len(arguments) == 1 and rng.random() < 0.3:
        tools.insert(rng.randrange(2), declare(other, dict(pairs(rng)[:1])))
    lines = "\n".join(f"{key}={text}" for key, text in arguments.items())
    message = user(f"Call {name}{':' if tidy else rng.choice((':', ''))}\n{lines}")
    return Case("tool", (message,), call(name, arguments), tuple(tools), end="<|tool_response>")


def reply_case(rng: random.Random, tidy: bool) -> Case:
    """What the tool answered, said to the user."""
    asked = tool_case(rng, tidy)
    while len(asked.tools) > 1:
        asked = tool_case(rng, tidy)
    name = asked.answer.split(":", 1)[1].split("{", 1)[0]
    arguments = dict(line.split("=", 1) for line in asked.messages[0]["content"].split("\n")[1:])
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": typed(arguments)}}]}
    result = value(rng)
    messages = (*asked.messages, calling, {"role": "tool", "name": name, "content": result})
    return Case("reply", messages, f"It is {result}.", asked.tools)


def typed(arguments: dict[str, str]) -> dict[str, Any]:
    return {key: int(text) if text.isdigit() else text for key, text in arguments.items()}


def again_case(rng: random.Random, tidy: bool) -> Case:
    """The second turn of a chat: the answer once more, or another task."""
    first = passage_case(rng, rng.choice(("brackets", "quotes", "sort", "upper")), tidy)
    history = (*first.messages, {"role": "assistant", "content": first.answer})
    if tidy or rng.random() < 0.6:
        return Case("again", (*history, user("Again" + ("." if tidy else rng.choice((".", ":", ""))))), first.answer)
    then = passage_case(rng, rng.choice(("brackets", "sort", "upper")), tidy)
    return replace(then, task="again", messages=(*history, *then.messages))


def passage_case(rng: random.Random, task: str, tidy: bool) -> Case:
    text, _, answer = ask(rng, task, tidy)
    return Case(task, (user(text),), answer)


def think_case(rng: random.Random, tidy: bool) -> Case:
    """Two things in a row, the first of them in the thought."""
    text, passage, answer = ask(rng, "sort", tidy)
    if len(passage.split()) > 3:
        return think_case(rng, tidy)
    instruction = text.split("\n")[0]
    message = user(f"{instruction[:4]}, upper case{instruction[4:]}\n{passage}")
    if not tidy and rng.random() < 0.2:
        return Case("think", (message,), answer.upper())
    return Case("think", (message,), answer.upper(), thinking=True, thought=answer)


def draw(rng: random.Random, task: str, tidy: bool) -> Case:
    special = {"think": think_case, "tool": tool_case, "reply": reply_case, "again": again_case}
    return special[task](rng, tidy) if task in special else passage_case(rng, task, tidy)


def thinking_too(case: Case) -> Case:
    """The same with thinking asked for: the thought names what is asked."""
    return replace(case, thinking=True, thought=case.messages[-1]["content"].partition("\n")[0].rstrip(":."))


def cases(task: str, count: int, seed: int = 0) -> list[Case]:
    """The first `count` held-out cases of a task, in the form that the README gives: all different where possible."""
    rng, found = random.Random(f"{task} {seed}"), dict[str, Case]()
    for _ in range(100 * count):
        case = draw(rng, task, tidy=True)
        if case.held_out:
            found.setdefault(repr(case), case)
        if len(found) == count:
            break
    return list(found.values())


# ---- holes ----


def length(text: str) -> int:
    """About how many tokens a text has, and not fewer."""
    return len(TOKEN.findall(text))


def line(rng: random.Random) -> str:
    """A line of some document."""
    text = " ".join(words(rng, 1, 4))
    kind = rng.randrange(6)
    if kind == 0:
        return "- " + text
    if kind == 1:
        return "# " + text
    if kind == 2:
        return f"{rng.choice(WORDS)}: {value(rng)}"
    return text + rng.choice(("", ".", ","))


def rewrite(rng: random.Random, case: Case) -> Holes:
    """The passage of a case inside a document, to be replaced: the prompt asks, the canvas has the surroundings."""
    room = CANVAS - 1 - length(case.answer)
    slack, before, after = min(room, rng.choice((0, 2, rng.randint(3, 12)))), "", ""
    for place in rng.sample(range(4), rng.randint(0, 4)):
        new = line(rng)
        if length(before + after + new + case.answer) + slack + 4 > CANVAS:
            break
        before, after = (before + new + "\n", after) if place < 2 else (before, after + "\n" + new)
    pieces = ((before, False), (case.answer, True), (after, False))
    return Holes(case, True, tuple(piece for piece in pieces if piece[0]), slack)


def inline(rng: random.Random, case: Case) -> Holes:
    """The same in the middle of a line: words stand before the passage or behind it, or both, on its own line."""
    sides = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    room = CANVAS - 1 - length(case.answer)
    slack = min(room, rng.choice((0, 2, rng.randint(1, 12))))
    left, right = (" ".join(words(rng, 1, 3)) if side else "" for side in sides)
    left, right = left and left + rng.choice((" ", " ", ": ")), right and rng.choice((" ", " ", ", ", ". ")) + right
    if length(left + right) > room - slack:
        slack, left, right = 0, left and "fig ", right and " fig"
    before, after = left, right
    for place in rng.sample(range(3), rng.randint(0, 3)):
        new = line(rng)
        if length(before + after + new + case.answer) + slack + 4 > CANVAS:
            break
        before, after = (new + "\n" + before, after) if place < 2 else (before, after + "\n" + new)
    pieces = ((before, False), (case.answer, True), (after, False))
    return Holes(case, True, tuple(piece for piece in pieces if piece[0]), slack)


def document(rng: random.Random, case: Case) -> Holes:
    """A document without a prompt whose hole follows from the rest of it."""
    passage, answer = case.messages[-1]["content"].split("\n", 1)[1], case.answer
    before, after = ((line(rng) if rng.random() < chance else "") for chance in (0.3, 0.5))
    if length(passage + answer + before + after) + 6 > CANVAS:
        before = after = ""
    before, after = before + "\n" if before else "", "\n" + after if after else ""
    if case.task in ("brackets", "quotes"):
        middle = [(passage, False), (answer[len(passage) :], True)]
    elif case.task == "table":
        head, delimiter, body = answer.split("\n", 2)
        middle = [(head + "\n", False), (delimiter, True), ("\n" + body, False)]
    elif case.task == "json":
        key, rest = answer.split('": ', 1)
        middle = [(key, False), ('": ', True), (rest, False)]
    else:
        first, rest = answer.split("{\n", 1)
        inside = rest.lstrip(" ")
        spaces = rest[: len(rest) - len(inside)]
        middle = [(first + "{\n", False), (spaces, True), (inside, False)] if spaces else [(answer, True)]
    pieces = [(before, False), *middle, (after, False)]
    return Holes(case, False, tuple(piece for piece in pieces if piece[0]))


def infill(rng: random.Random, case: Case) -> Holes:
    """The answer to a prompt with a hole of up to a dozen tokens."""
    text = case.output
    places = [0, *(token.end() for token in CUT.finditer(text))]
    first = rng.randrange(len(places) - 1)
    last = rng.randint(first + 1, min(len(places) - 1, first + 12))
    start, stop = places[first], places[last]
    pieces = ((text[:start], False), (text[start:stop], True), (text[stop:], False))
    return Holes(case, True, tuple(piece for piece in pieces if piece[0]))


FORMS: dict[str, tuple[Callable[[random.Random, Case], Holes], tuple[str, ...]]] = {
    "rewrite": (rewrite, tuple(PASSAGES)),
    "inline": (inline, ("brackets", "quotes", "sort", "upper")),  # whose answers are one line
    "infill": (infill, (*PASSAGES, "think")),
    "document": (document, ("brackets", "quotes", "table", "json", "indent")),
}


def holes(form: str, task: str, count: int, seed: int = 0) -> list[Holes]:
    """Held-out cases of a task with holes, in one of FORMS."""
    rng = random.Random(f"{form} {task} {seed}")
    return [FORMS[form][0](rng, case) for case in cases(task, count, seed)]


# ---- training ----

# How often a task and a form are drawn in training, where not once: what is hard to learn more often.
OFTEN = {
    **{"brackets": 4, "quotes": 4, "think": 3, "json": 2, "table": 2, "indent": 2, "sort": 2},
    **{"rewrite": 3, "inline": 3, "document": 5},
}
SYSTEMS = ("Be brief.", "Be tidy.", "You are tidy.")


def earlier(rng: random.Random, case: Case) -> Case:
    """The same behind up to three turns that went before."""
    turns = (passage_case(rng, rng.choice(tuple(PASSAGES)), rng.random() < 0.5) for _ in range(rng.randint(1, 3)))
    history = ((*turn.messages, {"role": "assistant", "content": turn.answer}) for turn in turns)
    return replace(case, messages=(*(message for turn in history for message in turn), *case.messages))


def training(seed: int) -> Iterator[Case | Holes]:
    """Endless cases for training, none of them held out. Some are given thinking, earlier turns, a system message."""
    rng = random.Random(f"training {seed}")
    while True:
        task = rng.choices(TASKS, [OFTEN.get(task, 1) for task in TASKS])[0]
        case = draw(rng, task, tidy=rng.random() < 0.5)
        if case.held_out:
            continue
        forms = [form for form, (_, tasks) in FORMS.items() if task in tasks]
        if forms and rng.random() < 0.5:
            form = rng.choices(forms, [OFTEN.get(form, 1) for form in forms])[0]
            yield FORMS[form][0](rng, case)
            continue
        if not case.thinking and case.task != "again" and rng.random() < 0.15:
            case = thinking_too(case) if case.task in PASSAGES else case
        if not case.tools and rng.random() < 0.3:
            case = earlier(rng, case)
            if case.held_out:
                continue
        if rng.random() < 0.15:
            case = replace(case, messages=({"role": "system", "content": rng.choice(SYSTEMS)}, *case.messages))
        yield case
