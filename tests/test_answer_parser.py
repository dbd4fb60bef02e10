"""Answers taken apart: thoughts, text and tool calls, whole or as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.chat.answer_parser import (
    CALL,
    CALLED,
    DEEPEST,
    MARKS,
    QUOTE,
    THINK,
    THOUGHT,
    Answer,
    Delta,
    Reader,
    opens_thought,
    parse_call,
    read,
    read_text,
)

VOCABULARY = Path(__file__).parent / "models" / "tiny-bpe" / "tiny-bpe.gguf"

# What models write, in pieces that can be put together wrongly.
PIECES = [*MARKS, "thought\n", "thought", "call:f{", "call:", "{", "}", "[", "]", "a:", ",", "1", "-2.5e3", "true"]
PIECES += ["null", '"', "\\", "<|", "|>", "<|tool_", " ", "\n", "x", "é", "你", "\ufffd", "\x00", "<turn|>", "<pad>"]
written = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> dgemma.Tokenizer:
    return dgemma.Tokenizer.from_gguf(VOCABULARY)


def added(deltas: list[Delta]) -> Answer:
    """What deltas add up to."""
    text, thinking = ("".join(d.text for d in deltas if d.kind == kind) for kind in ("text", "thinking"))
    return Answer(text, thinking, tuple(d.call for d in deltas if d.call is not None))


# ---- thoughts ----


@pytest.mark.parametrize(
    ("answer", "text", "thinking"),
    [
        ("Hello.\n", "Hello.\n", ""),
        ("<|channel>thought\nLet me see.<channel|>Hello.", "Hello.", "Let me see."),
        ("<|channel>thought\n<channel|>Hello.", "Hello.", ""),
        ("<|channel>thought<channel|>Hello.", "Hello.", ""),
        ("<|channel>thoughts matter<channel|>Hello.", "Hello.", "thoughts matter"),
        ("<|channel>thought\nHe said <|tool_call>.<channel|>Hello.", "Hello.", "He said <|tool_call>."),
        ("One <|channel>thought\na<channel|>two <|channel>thought\nb<channel|>three", "One two three", "ab"),
        ("<|channel>thought\nnever done", "", "never done"),
        ("<|channel>thou", "", "thou"),
        ("<|channel>thought", "", ""),
        ("closed<channel|> and closed", "closed and closed", ""),
        ("a <|chan b", "a <|chan b", ""),
        ("a <|chan", "a <|chan", ""),
        ("", "", ""),
    ],
)
def test_a_thought_is_apart_from_the_text(answer: str, text: str, thinking: str) -> None:
    assert read_text(answer) == Answer(text, thinking)


def test_a_thought_that_the_prompt_opened_goes_on(tokenizer: dgemma.Tokenizer) -> None:
    assert read_text("so it is.<channel|>Yes.", thinking=True) == Answer("Yes.", "so it is.")
    assert read_text("thought\nso it is.<channel|>Yes.", thinking=True) == Answer("Yes.", "so it is.")
    for prompt, opened in [
        ("<bos><|turn>model\n<|channel>thought\n", True),
        ("<bos><|turn>model\n<|channel>thought\n<channel|>", False),
        ("<bos><|turn>model\n", False),
        ("<|channel>", False),
    ]:
        assert opens_thought(tokenizer, tokenizer.encode(prompt)) is opened


def test_a_later_prompt_is_given_no_thought() -> None:
    answer = read_text("<|channel>thought\nHm.<channel|>Yes.<|tool_call>call:f{a:1}<tool_call|>")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert answer.message() == {"role": "assistant", "content": "Yes.", "tool_calls": [call]}
    assert read_text("<|channel>thought\nHm.<channel|>Yes.").message() == {"role": "assistant", "content": "Yes."}


# ---- calls ----


def test_a_call_is_read_into_json() -> None:
    arguments = '{city:<|"|>Paris, {"a"}<|"|>,n:1,x:-2.5e3,flag:true,no:false,none:null,list:[1,[<|"|>a<|"|>]],'
    arguments += 'obj:{<|"|>k<|"|>:{}},json:"a\\n"}'
    written = f"Wait. {CALL}call:get_weather{arguments}{CALLED}{CALL}call:now{{}}{CALLED}"
    answer = read_text(written)
    assert [call.name for call in answer.calls] == ["get_weather", "now"] and answer.text == "Wait. "
    assert answer.calls[0].arguments == {
        "city": 'Paris, {"a"}',
        "n": 1,
        "x": -2500.0,
        "flag": True,
        "no": False,
        "none": None,
        "list": [1, ["a"]],
        "obj": {"k": {}},
        "json": "a\n",
    }
    assert answer.calls[0].text + answer.calls[1].text == written.removeprefix("Wait. ")


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "call:",
        "call:f",
        "call:f{",
        "call:f{a:1",
        "call:f{a:1}b",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1 b:2}",
        "call:f{a:b}",
        "call:f{a:1e999}",
        "call:f{a:NaN}",
        "call:f{a:١}",
        f"call:f{{a:{QUOTE}b}}",
        'call:f{a:"b}',
        "call:f{:1}",
        "call:f{a:[1}",
        "f{a:1}",
        "call:f{a:" + "[" * DEEPEST + "]" * DEEPEST + "}",
        "call:f{a:" + "[" * 100000,
        "call:f{a:" + "9" * 5000 + "}",
    ],
)
def test_what_is_no_call_is_text(inner: str) -> None:
    assert parse_call(inner) is None
    assert read_text(f"a{CALL}{inner}{CALLED}b") == Answer(f"a{CALL}{inner}{CALLED}b")


def test_a_call_without_an_end_is_text_and_the_next_one_is_read() -> None:
    answer = read_text(f"{CALL}call:f{{a:{CALL}call:g{{b:2}}{CALLED}{CALL}call:h{{")
    assert answer.text == f"{CALL}call:f{{a:{CALL}call:h{{"
    assert [(call.name, call.arguments) for call in answer.calls] == [("g", {"b": 2})]


names = st.text("abXY_-.9é你", min_size=1, max_size=8)
strings = st.text(max_size=8).filter(lambda text: not any(mark in text for mark in MARKS))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=10,
)


def as_written(value: Any, space: str = "") -> str:
    """A value in the syntax of calls."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, list):
        return "[" + f",{space}".join(as_written(item, space) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + f",{space}".join(f"{key}:{space}{as_written(item, space)}" for key, item in value.items()) + "}"
    return json.dumps(value)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(names, st.dictionaries(names, values, max_size=4), st.sampled_from(["", " ", "\n"]))
def test_any_arguments_come_back(name: str, arguments: dict[str, Any], space: str) -> None:
    call = parse_call(f"{CALL}call:{name}{as_written(arguments, space)}{CALLED}")
    assert call is not None and (call.name, call.arguments) == (name, arguments)
    json.dumps(call.arguments, allow_nan=False)


# ---- as it comes ----


@settings(max_examples=200)
@given(written, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_any_text_in_any_pieces_is_read_as_the_whole(text: str, cuts: list[int], thinking: bool) -> None:
    whole = read_text(text, thinking)
    reader, deltas, at = Reader(thinking=thinking), [], 0
    for cut in [*sorted(cuts), len(text)]:
        deltas += reader.feed_text(text[at:cut])
        at = max(at, cut)
    deltas += reader.finish()
    assert added(deltas) == reader.answer == whole
    assert reader.finish() == []
    json.dumps([call.arguments for call in whole.calls], allow_nan=False).encode()


@settings(max_examples=150)
@given(st.data())
def test_any_ids_in_any_pieces_are_read_as_the_whole(tokenizer: dgemma.Tokenizer, data: st.DataObject) -> None:
    marks = [tokenizer.encode(mark)[0] for mark in MARKS]
    token = st.integers(0, tokenizer.n_vocab - 1) | st.sampled_from(marks)
    ids = data.draw(st.lists(token, max_size=60) | written.map(tokenizer.encode))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6).map(sorted))
    reader, deltas = Reader(tokenizer), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        peeked, before = reader.peek(ids[start:]), len(deltas)
        assert added(deltas) == reader.answer, "a peek tells nothing"
        deltas += reader.feed(ids[start:end])
    told = deltas[before:] + reader.finish()
    deltas = deltas[:before] + told
    assert added(deltas) == reader.answer == read(tokenizer, ids)
    assert added(told) == peeked


@given(written)
def test_ids_and_text_are_read_alike(tokenizer: dgemma.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    shown = "".join(tokenizer.decode([i], special=i in map(tokenizer.encode, MARKS)) for i in ids)
    if "\ufffd" not in shown and shown == tokenizer.decode(ids):
        assert read(tokenizer, ids) == read_text(shown)


@given(st.data())
def test_without_marks_ids_are_read_as_they_are_decoded(tokenizer: dgemma.Tokenizer, data: st.DataObject) -> None:
    byte = tokenizer.encode("🎉")[0]
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1) | st.integers(byte - 200, byte + 12), max_size=30))
    reader = Reader(tokenizer, marks=False)
    reader.feed(ids)
    reader.finish()
    assert reader.answer == Answer(tokenizer.decode(ids))


def test_nothing_is_lost_without_marks(tokenizer: dgemma.Tokenizer) -> None:
    text = f"a{THINK}thought\nb{THOUGHT}c 你好 🎉"
    reader = Reader(tokenizer, marks=False)
    reader.feed(tokenizer.encode(text))
    reader.finish()
    assert reader.answer == Answer(text)
    reader = Reader(marks=False)
    assert added([*reader.feed_text(text), *reader.finish()]) == Answer(text)


def test_a_character_is_told_when_all_of_its_bytes_are_there(tokenizer: dgemma.Tokenizer) -> None:
    ids = tokenizer.encode("🎉")
    assert len(ids) == 4  # bytes
    reader = Reader(tokenizer)
    assert [reader.feed([i]) for i in ids] == [[], [], [], []]
    assert reader.feed(tokenizer.encode("the")) == [Delta("text", "🎉the")]


@pytest.mark.parametrize(
    "piece", [*MARKS, "<|", "call:f{", f"{CALL}call:f{{a:{QUOTE}", f"{CALL}[", "a", THINK + "thou"]
)
def test_long_answers_take_time_in_proportion(piece: str) -> None:
    """A parser that looks back at what it has read would need hours for these."""
    text = piece * (300_000 // len(piece))
    reader = Reader()
    for at in range(0, len(text), 7):
        reader.feed_text(text[at : at + 7])
    reader.finish()
    assert reader.answer == read_text(text)
