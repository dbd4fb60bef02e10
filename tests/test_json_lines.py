"""JSON lines: one reader for requests, tasks and prompts, which ends a line where JSON does."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dgemma
from dgemma.batch import Batch
from dgemma.convert.calibrate import read_prompts
from dgemma.eval import tasks
from dgemma.files import json_lines
from dgemma.files.json_lines import lines as requests
from dgemma.serve.app import _event

BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # what str.splitlines() breaks at, and JSON lines do not
CHECK = {"kind": "json"}
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(BREAKS + "\r\n\ufeff"), max_size=20)


def written(path: Path, *lines: object, start: bytes = b"", end: str = "\n") -> Path:
    path.write_bytes(start + "".join(json.dumps(line, ensure_ascii=False) + end for line in lines).encode())
    return path


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \t\n\n"], ids=["lf", "crlf", "blank-lines"])
def test_all_readers_read_the_same_lines(start: bytes, end: str, tmp_path: Path) -> None:
    asked = [f"one{BREAKS}two", "Hello\x85x\u2028"]
    prompts = written(tmp_path / "p.jsonl", *({"prompt": text} for text in asked), start=start, end=end)
    mine = written(
        tmp_path / "t.jsonl",
        *({"id": i, "prompt": text, "check": CHECK} for i, text in enumerate(asked)),
        start=start,
        end=end,
    )
    assert read_prompts(prompts) == asked
    assert [task.prompt for task in tasks.load(mine)] == asked
    assert [json_lines.value(line)["prompt"] for _, line in requests(prompts)] == asked
    assert [number for number, _ in requests(prompts)] == [1, 1 + end.count("\n")]


@given(st.lists(texts | st.none(), max_size=5), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans())
def test_any_text_comes_back_with_the_number_of_its_line(found: list[str | None], start: bytes, last: bool) -> None:
    ends = "\n" if last else ""
    data = start + ("\n".join("" if text is None else json.dumps(text, ensure_ascii=False) for text in found)).encode()
    got = list(json_lines.split(io.BytesIO(data + ends.encode()), "f"))
    assert [(n, json_lines.value(line)) for n, line in got] == [(n, t) for n, t in enumerate(found, 1) if t is not None]


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for number, line in json_lines.split(io.BytesIO(data), "f"):
        assert number >= 1 and b"\n" not in line
        try:
            json.dumps(json_lines.value(line), allow_nan=False)
        except dgemma.UsageError as refusal:
            assert "the line" in str(refusal)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{", "no JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 text: byte 12"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "no JSON|not UTF-8"),
        (b'{"prompt": "x", "seed": NaN}', "it has NaN"),
        (b'{"prompt": "x", "seed": -Infinity}', "it has -Infinity"),
        (b'{"prompt": "x", "seed": 1e400}', "1e400, which no float64 holds"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"prompt": "x", "prompt": "y"}', "'prompt' twice"),
        (b'{"prompt": "x", "stop": [{"a": 1, "a": 2}]}', "'a' twice"),
        (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 levels"),
        (b'{"prompt": ' + b"[" * 300_000 + b"]" * 300_000 + b"}", "more than 100 levels"),
        (b'{"prompt": "x"} {"prompt": "y"}', "no JSON: Extra data, character 16"),
    ],
)
def test_what_is_no_line_is_refused_by_file_and_line(
    line: bytes, named: str, tidy: dgemma.Model, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"id": 0, "prompt": "x", "check": {"kind": "json"}}\r\n' + line + b"\n")
    for read in (read_prompts, tasks.load, lambda path: list(json_lines.values(path))):
        with pytest.raises(dgemma.Error, match=f", line 3: .*({named})") as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
    with Batch(tidy) as batch:
        assert batch.answer(line)["error"]["message"].startswith("the line")


@given(texts | st.text(st.sampled_from(BREAKS + '\n\r"\\u'), max_size=9))
def test_a_line_that_is_written_is_one_to_every_reader(text: str) -> None:
    for compact in (False, True):
        written = json_lines.as_line({text: [text]}, compact)
        assert len(written.splitlines()) == 1 and json.loads(written) == {text: [text]}
    assert len(_event({"text": text}).decode().splitlines()) == 2  # the data, and the blank line behind it


def test_a_line_is_held_not_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(json_lines, "MOST_BYTES", 64)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' * 9 + b'"' + b"x" * 1000)
    read = json_lines.lines(path)
    assert [number for number, _ in (next(read) for _ in range(9))] == list(range(1, 10))
    with pytest.raises(dgemma.FormatError, match=r"x\.jsonl, line 10: it is longer than"):
        next(read)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        for read in (json_lines.lines, read_prompts, tasks.load):
            with pytest.raises(dgemma.Error, match=str(path)):
                list(read(path))


def test_a_name_that_is_no_unicode_text_is_itself_again() -> None:
    name = os.fsdecode(b"a\xff")
    for indent in (None, 1):
        written = json_lines.as_bytes({"path": name, "text": "ü\u2028"}, indent)
        assert json.loads(written) == {"path": name, "text": "ü\u2028"} and "ü".encode() in written
