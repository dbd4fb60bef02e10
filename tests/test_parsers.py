"""The Python parsers of strangers' bytes (tests/fuzz/parsers.py): their corpora, and what hypothesis makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzz import parser_seeds, parsers
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(parsers.__file__).parent / "corpus"
FILES = [(name, file) for name in parsers.TARGETS for file in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize(("name", "file"), FILES, ids=[f"{name}/{file.name}" for name, file in FILES])
def test_the_corpus(name: str, file: Path) -> None:
    parsers.TARGETS[name](file.read_bytes())


def test_the_corpus_begins_with_the_seeds() -> None:
    for name, files in parser_seeds.seeds().items():
        for file, data in files.items():
            assert (CORPUS / name / file).read_bytes() == data


numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**400, 1.5, True, None, "1"])
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "X9", "", 5, None, []]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    },
)
header = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entry | numbers, max_size=4)


@settings(max_examples=300, deadline=None)
@given(header.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=64), st.binary(max_size=40))
def test_any_safetensors_header(head: bytes, body: bytes) -> None:
    parsers.safetensors(head + body)


MARKS = ["<|tool_call>", "<tool_call|>", "call:", "call:f{", "{", "}", "[", "]", ":", ",", '<|"|>', "a", "-1", "1e400"]
MARKS += ["<|channel>", "<channel|>", "thought\n", " ", "\n", "null", "true", "<|", "|>", "\udc80"]
pieces = st.sampled_from(MARKS)


@settings(max_examples=500, deadline=None)
@given(st.lists(pieces | st.text(max_size=3), max_size=40).map("".join))
def test_any_answer(text: str) -> None:
    parsers.calls(text.encode("utf-8", "surrogatepass"))


def test_depth_and_length() -> None:
    for text in ("[" * 100_000, "{a:" * 100_000, '<|"|>' * 50_000, "1" * 100_000, "call:" * 50_000):
        parsers.calls(b"<|tool_call>call:f{a:" + text.encode() + b"}<tool_call|>")
    parsers.safetensors(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)
