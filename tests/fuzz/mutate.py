"""Mutations that know what an input is made of: JSON, an answer with its marks, or numbers and floats in a row."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, int], bytes]  # what libFuzzer brings with it

NUMBERS = [0, 1, -1, 2, 3, 7, 15, 16, 17, 31, 64, 255, 256, 257, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64]
NUMBERS += [10**400]
FLOATS = [0.0, -0.0, 0.25, 0.5, 1.0, 1.5, 1e-9, 1e38, 1e39, 1e308, -1.0]
TEXTS = ["", " ", "a", "\n", "\0", "\ud800", "\u2581", "<0x41>", "a b", "default", "full_attention", "F32", "BF16"]
TEXTS += ["../x", "x" * 300]
VALUES = [None, True, False, [], {}, [[]], {"": {}}]
MARKS = ["<|tool_call>", "<tool_call|>", "call:", "call:f{", "{", "}", "[", "]", ":", ",", '<|"|>', '"', "\\", "a"]
MARKS += ["-1", "1e400", "<|channel>", "<channel|>", "thought\n", " ", "\n", "null", "true", "None", "<|", "|>"]
MARKS += ["\udc80", "0.5", "[[[[[[[["]


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (holder, key) below a value."""
    if len(found) < 2000:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            found.append((value, key))
            _places(value[key], found)
    return found


def _odd(old: Any, dice: random.Random) -> Any:
    kind = dice.randrange(8)
    if kind == 0:
        return dice.choice(VALUES)
    if kind == 1:
        return dice.choice(TEXTS)
    if kind == 2:
        return dice.choice(FLOATS)
    if kind == 3 and type(old) is int:
        return old + dice.choice((-1, 1, 8, -8))
    if kind == 4 and isinstance(old, list):
        return (old * 2)[: dice.randrange(2 * len(old) + 1)]
    if kind == 5 and isinstance(old, str):
        at = dice.randrange(len(old) + 1)
        return old[:at] + dice.choice(TEXTS) + old[at:]
    return dice.choice(NUMBERS)


def mutate_json(data: bytes, dice: random.Random) -> bytes | None:
    """As _mutate_json; None where the data is no JSON, or too deep."""
    try:
        return _mutate_json(data, dice)
    except (ValueError, RecursionError):
        return None


def _mutate_json(data: bytes, dice: random.Random) -> bytes:
    """A value or a key changed, gone, there twice, or moved."""
    top = json.loads(data.decode("utf-8", "surrogatepass"))
    for _ in range(1 + dice.randrange(3)):
        places = _places(top, [])
        if not places:
            break
        holder, key = dice.choice(places)
        what = dice.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[dice.choice(TEXTS) if dice.random() < 0.5 else key + "x"] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.insert(dice.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif what == 3:
            other, name = dice.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = _odd(holder[key], dice)
    return json.dumps(top).encode()


def mutate_answer(data: bytes, dice: random.Random) -> bytes:
    """A mark put in, or a stretch taken out or copied."""
    text = data.decode("utf-8", "surrogateescape")
    at = dice.randrange(len(text) + 1)
    end = min(len(text), at + dice.randrange(1, 12))
    what = dice.randrange(4)
    if what == 0:
        text = text[:at] + text[end:]
    elif what == 1:
        to = dice.randrange(len(text) + 1)
        text = text[:to] + text[at:end] + text[to:]
    else:
        text = text[:at] + dice.choice(MARKS) + text[at:]
    return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")


def mutate_numbers(data: bytes, dice: random.Random) -> bytes:
    """A number of 4 or 8 bytes, or a float, in others' place."""
    if len(data) < 8:
        return data
    at = dice.randrange(len(data) - 7)
    if dice.random() < 0.5:
        at = at // 4 * 4
    number = struct.unpack_from("<I", data, at)[0]
    whole = [number + 1, number - 1, number * 2, dice.choice(NUMBERS[:-4])]
    odd = [struct.pack("<I", n % 2**32) for n in whole]
    odd += [struct.pack("<f", x) for x in (0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-40)]
    odd.append(struct.pack("<Q", dice.choice(NUMBERS[:-1]) % 2**64))
    new = dice.choice(odd)
    return data[:at] + new + data[at + len(new) :]


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """A byte changed, put in or taken out: in the place of what libFuzzer brings with it."""
    at = dice.randrange(len(data) + 1)
    return data[:at] + bytes(dice.randrange(256) for _ in range(dice.randrange(2))) + data[at + dice.randrange(2) :]


def mutator(target: str, plain: Mutate) -> Callable[[bytes, int, int], bytes]:
    """atheris' custom mutator for a target."""
    of: Callable[[bytes, random.Random], bytes | None] = {"calls": mutate_answer, "imatrix": mutate_numbers}.get(
        target, mutate_json
    )

    def mutate(data: bytes, room: int, seed: int) -> bytes:
        dice = random.Random(seed)
        made = of(data, dice) if dice.random() < 0.9 else None
        return plain(data, room) if made is None or len(made) > room else made

    return mutate
