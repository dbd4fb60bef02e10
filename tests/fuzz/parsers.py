"""What Python parses of strangers' bytes: targets for atheris, which `make fuzz-python MINUTES=1` installs and runs.

    python tests/fuzz/parsers.py TARGET [libFuzzer's flags] [CORPUS ...]
    python tests/fuzz/parsers.py --replay TARGET FILE ...
    python tests/fuzz/parsers.py --mutate RUNS SEED FOUND TARGET FILE ...

The last makes so many mutations of files, the same ones each time; needs no atheris, and writes what fails to FOUND.

tests/test_parsers.py runs the same targets on the corpus and on what hypothesis makes. An input is the bytes of one
file; or, where a target reads a folder, [[name, content], ...] as JSON, where content is what the file has as JSON, or
its text. A .safetensors file has its header there, and zeros behind it.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_BYTES = 1 << 16  # of zeros
_tokenizer: Any = None
_folder: tempfile.TemporaryDirectory[str] | None = None


def _clean() -> Path:
    """A folder that is empty again."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = Path(_folder.name)
    for file in path.iterdir():
        file.unlink()
    return path


def _file(name: str, data: bytes) -> Path:
    path = _clean() / name
    path.write_bytes(data)
    return path


def _zeros(header: Any) -> bytes:
    """As many as a header's tensors ask for."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        ends += [n for n in offsets if type(n) is int] if isinstance(offsets, list) else []
    return bytes(min(max(ends), MOST_BYTES))


def _folder_of(data: bytes, name: str) -> Path:
    """The folder that an input stands for; `name`: of the file, where it is one."""
    try:
        files = json.loads(data.decode("utf-8"))
        assert data[:1] == b"[" and all(isinstance(file, str) for file, _ in files)
    except (ValueError, TypeError, AssertionError, RecursionError):
        return _file(name, data).parent
    folder = _clean()
    for file, content in files[:8]:
        if not 0 < len(file) < 64 or file in (".", "..") or not set(file) <= _LETTERS:
            continue
        written = content if isinstance(content, str) else json.dumps(content)
        raw = written.encode("utf-8", "surrogatepass")
        if file.endswith(".safetensors"):
            raw = struct.pack("<Q", len(raw)) + raw + _zeros(content)
        (folder / file).write_bytes(raw)
    return folder


_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789._-")


def _told(failure: Exception, folder: Path) -> None:
    assert str(folder) in str(failure) and "\n" not in str(failure), failure


# ---- Targets ----


def safetensors(data: bytes) -> None:
    """Files are refused, or every tensor of them can be read. With a header that is JSON, its length is set right."""
    from dgemma.convert.safetensors import Checkpoint
    from dgemma.errors import FormatError

    if data[:1] == b"{":  # the header alone, so that a fuzzer need not guess lengths
        end = data.rfind(b"}") + 1
        data = struct.pack("<Q", end) + data
    folder = _folder_of(data, "model.safetensors")
    try:
        with Checkpoint(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                size = tensor.file.stat().st_size
                assert 0 <= tensor.offset <= tensor.offset + tensor.bytes <= size
                assert tensor.count * 8 >= tensor.bytes >= tensor.count
                assert len(checkpoint.read(tensor, 0, min(tensor.bytes, 64))) == min(tensor.bytes, 64)
    except FormatError as failure:
        _told(failure, folder)


def calls(data: bytes) -> None:
    """Whatever a model writes is read without an error, in any pieces; arguments are what JSON can hold."""
    from dgemma.chat.answer_parser import Reader, read_text

    text = data.decode("utf-8", "surrogateescape")
    for thinking in False, True:
        answer = read_text(text, thinking)
        for call in answer.calls:
            json.dumps(call.arguments, allow_nan=False)
            assert call.name and call.text in text
        reader = Reader(thinking=thinking)
        for i in range(0, len(text), 7):
            reader.feed_text(text[i : i + 7])
        reader.finish()
        assert reader.answer == answer
        json.dumps(answer.message())
    _read_ids(text[:200])


def _read_ids(text: str) -> None:
    """The same text as ids, which may be other ones: nothing of it is lost, and peeking tells what will be."""
    import dgemma
    from dgemma.chat.answer_parser import Reader, opens_thought, read

    global _tokenizer
    if _tokenizer is None:
        _tokenizer = dgemma.Tokenizer.from_gguf(HERE.parent / "models" / "tiny-bpe" / "tiny-bpe.gguf")
    ids = _tokenizer.encode(text.encode("utf-8", "replace").decode())
    opens_thought(_tokenizer, ids)
    reader = Reader(_tokenizer)
    whole = reader.peek(ids)
    for at in range(0, len(ids), 5):
        reader.feed(ids[at : at + 5])
    reader.finish()
    assert reader.answer == whole == read(_tokenizer, ids)
    plain = Reader(_tokenizer, marks=False)
    plain.feed(ids)
    plain.finish()
    assert plain.answer.text == _tokenizer.decode(ids) and not plain.answer.calls


def config(data: bytes) -> None:
    """config.json and generation_config.json are refused, or make numbers that the library's structure takes."""
    from dgemma.convert.config import read_config
    from dgemma.errors import FormatError

    folder = _folder_of(data, "config.json")
    try:
        found = read_config(folder)
    except FormatError as failure:
        return _told(failure, folder)
    native = found.native()
    for field, value in found.values.items():
        numbers = value if isinstance(value, list) else [value]
        assert all(math.isfinite(number) for number in numbers), field
    assert native.n_layer == len(found.values["n_head_kv"]) and 0 <= found.rotary_factor <= 1
    assert all(0 <= i < native.n_vocab for i in [*found.end_ids, *found.special_ids.values()])


def vocabulary(data: bytes) -> None:
    """The files of a tokenizer are refused, or make what a GGUF file can say."""
    from dgemma.convert.gguf_header import header
    from dgemma.convert.metadata import Pair
    from dgemma.convert.tokenizer import read_vocabulary
    from dgemma.errors import Error, FormatError

    n_vocab = 16
    folder = _folder_of(data, "tokenizer.json")
    try:
        found = read_vocabulary(folder, n_vocab, {"bos": 2})
    except FormatError as failure:
        return _told(failure, folder)
    assert len(found.tokens) == len(found.types) == n_vocab and all(found.tokens)
    assert all(0 <= i < n_vocab for i in found.ids.values())
    pairs = [Pair("tokens", "STRINGS", found.tokens), Pair("types", "I32S", found.types)]
    pairs += [Pair("merges", "STRINGS", found.merges), Pair("template", "STRING", found.chat_template or "")]
    try:
        assert header(pairs, [])
    except Error as failure:
        assert "is no Unicode text" in str(failure)


def imatrix(data: bytes) -> None:
    """A file is refused, or has a weight for every column, around 1."""
    import numpy as np

    from dgemma.convert.imatrix import read_imatrix
    from dgemma.errors import FormatError

    path = _file("imatrix.gguf", data)
    try:
        with np.errstate(all="ignore"):
            found = read_imatrix(path, 2)
    except FormatError as failure:
        return _told(failure, path)
    for columns in found._columns.values():
        assert columns.weights.ndim == 2 and columns.weights.size
        assert np.isfinite(columns.weights).all() and (columns.weights > 0).all()
        for known in (columns.mean, columns.pull):
            assert known is None or (known.shape == columns.weights.shape and np.isfinite(known).all())
    assert all(rows >= 0 for _, _, rows in found.few)


def requests(data: bytes) -> None:
    """Lines are read or refused, and so are the messages and tools in them; what was read is read as itself."""
    from dgemma.chat import messages
    from dgemma.errors import FormatError, UsageError
    from dgemma.files import json_lines

    try:
        for _, line in json_lines.split(io.BytesIO(data), "requests.jsonl"):
            given = json_lines.value(line)
            json.dumps(given, allow_nan=False)
            asked = given if isinstance(given, dict) else {"messages": given}
            tools = messages.read_tools(asked.get("tools"))
            assert tools == messages.read_tools(tools)
            fields = asked.get("template")  # what it reads of messages
            known = frozenset(fields.split()) if isinstance(fields, str) else None
            found = messages.read(asked.get("messages"), known)
            assert found == messages.read(found, known)
            assert all(isinstance(message["content"], str) for message in found)
    except (FormatError, UsageError) as failure:
        assert str(failure) and "\n" not in str(failure), failure


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors,
    "calls": calls,
    "config": config,
    "vocabulary": vocabulary,
    "requests": requests,
    "imatrix": imatrix,
}


def _mutate(runs: int, seed: int, found: Path, name: str, files: list[str]) -> None:
    from mutate import mutate_bytes, mutator

    dice = random.Random(seed)
    mutate = mutator(name, lambda data, room: mutate_bytes(data, dice)[:room])
    corpus = [Path(file).read_bytes() for file in files]
    for _ in range(runs):
        data = dice.choice(corpus)
        for _ in range(1 + dice.randrange(3)):
            data = mutate(data, 4096, dice.randrange(2**32))
        try:
            TARGETS[name](data)
        except BaseException:
            found.write_bytes(data)
            raise
    print(f"stat::number_of_executed_units: {runs}")


def main() -> None:
    if sys.argv[1] == "--replay":
        for file in sys.argv[3:]:
            TARGETS[sys.argv[2]](Path(file).read_bytes())
        return
    if sys.argv[1] == "--mutate":
        runs, seed, found, name, *files = sys.argv[2:]
        return _mutate(int(runs), int(seed), Path(found), name, files)
    import atheris
    import numpy  # noqa: F401  (not instrumented: it is not what is fuzzed)
    from mutate import mutator

    name, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=["dgemma"]):
        import dgemma.chat.answer_parser
        import dgemma.chat.messages
        import dgemma.convert.config
        import dgemma.convert.imatrix
        import dgemma.convert.safetensors
        import dgemma.convert.tokenizer
        import dgemma.files.json_lines  # noqa: F401
    mutate = mutator(name, lambda data, room: bytes(atheris.Mutate(data, room)))
    atheris.Setup([sys.argv[0], *flags], TARGETS[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
