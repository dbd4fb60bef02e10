"""The header that dg-convert writes through the gguf package, whose constants agree with the library's lists."""

from __future__ import annotations

import inspect
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from dgemma.convert.gguf_header import VALUE_TYPES, TensorInfo, encode_values, header
from dgemma.convert.metadata import ENCODED, Pair
from dgemma.convert.recipe import RECIPES
from dgemma.errors import Error
from dgemma.files.gguf_file import ARRAY, KINDS, File
from dgemma.native import formats
from dgemma.native.metadata import keys

ARCHITECTURE = "diffusion-gemma"

# Keys of ours, and of DiffusionGemma, that the package does not know.
UNKNOWN = {"diffusion-gemma.end_token_ids", "diffusion.canvas_length"} | {
    f"diffusion.eb_{name}"
    for name in ("max_steps", "stability_threshold", "t_min", "t_max", "entropy_bound", "confidence_threshold")
}
NEWER = {"attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"}  # than gguf 0.18


class Recorder(gguf.GGUFWriter):
    """A writer that notes each key with the type of its value, an array's element type with an S."""

    def __init__(self) -> None:
        self.written: dict[str, set[str]] = {}
        super().__init__(None, ARCHITECTURE)

    def add_key_value(self, key: str, val: Any, vtype: Any, sub_type: Any = None) -> None:
        name = vtype.name
        if vtype is gguf.GGUFValueType.ARRAY:
            name = f"{(sub_type or gguf.GGUFValueType.get_type(val[0])).name}S"
        self.written.setdefault(key, set()).add(name)


@pytest.fixture(scope="module")
def written() -> dict[str, set[str]]:
    """Return the kinds of each key that the package's `add_` methods of one argument write."""
    recorder = Recorder()
    for name, method in inspect.getmembers(recorder, inspect.ismethod):
        parameters = list(inspect.signature(method).parameters.values())
        if name.startswith("add_") and len(parameters) == 1:
            takes = str(parameters[0].annotation).split(" | ")
            for value in (1, 0.5, True, "a"):
                if type(value).__name__ in takes:
                    method(value)
                if f"Sequence[{type(value).__name__}]" in takes:
                    method([value])
    return recorder.written


def test_the_keys_are_those_that_the_package_writes(written: dict[str, set[str]]) -> None:
    ours = {key.key: key.kind for key in keys().values()}
    assert UNKNOWN <= ours.keys() - written.keys() <= UNKNOWN | {f"{ARCHITECTURE}.{name}" for name in NEWER}
    for key, kind in ours.items():
        is_array = kind not in VALUE_TYPES
        name = VALUE_TYPES[kind.removesuffix("S") if is_array else kind].name + "S" * is_array
        assert name in written.get(key, {name}), (key, name)


def test_types_of_values_and_formats_have_the_numbers_of_the_package() -> None:
    assert {kind: number for kind, (number, _) in KINDS.items()} == VALUE_TYPES and ARRAY == gguf.GGUFValueType.ARRAY
    assert {f.name: f.id for f in formats.all_formats()} == {
        f.name: gguf.GGMLQuantizationType[f.name] for f in formats.all_formats()
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_file_type_of_its_name(name: str) -> None:
    like = {"q5_dense8": "q5_k_m", "q4_dense8": "q4_k_m"}.get(name, name).upper()
    file_types = gguf.LlamaFileType.__members__
    assert RECIPES[name].file_type == file_types.get(f"MOSTLY_{like}", file_types.get(f"ALL_{like}"))


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def test_the_header_is_this_to_the_byte() -> None:
    pairs = [
        Pair("a", "STRING", "\u00fc"),
        Pair("b", "BOOLS", [True, False]),
        Pair("c", "STRINGS", []),
        Pair("d", ENCODED, struct.pack("<II", 6, 0x7FA00001)),  # a float32 that Python's floats cannot hold
        Pair("e", "STRING", ""),
    ]
    tensors = [TensorInfo("t", (256, 3), formats.by_name("Q6_K")), TensorInfo("u", (2,), formats.by_name("F32"))]
    expected = b"GGUF" + struct.pack("<IQQ", 3, 2, 5)
    expected += string("a") + struct.pack("<I", 8) + string("\u00fc")
    expected += string("b") + struct.pack("<IIQ??", 9, 7, 2, True, False)
    expected += string("c") + struct.pack("<IIQ", 9, 8, 0)
    expected += string("d") + struct.pack("<II", 6, 0x7FA00001)
    expected += string("e") + struct.pack("<I", 8) + string("")
    expected += string("t") + struct.pack("<IQQIQ", 2, 256, 3, 14, 0)
    expected += string("u") + struct.pack("<IQIQ", 1, 2, 0, 640)  # behind 3 x 210 bytes, rounded up to 32
    assert header(pairs, tensors) == expected.ljust(-(-len(expected) // 32) * 32, b"\0")
    assert header(encode_values(pairs), tensors) == header(pairs, tensors)


def test_a_value_that_is_no_text_is_named() -> None:
    with pytest.raises(Error, match=r"^the key: '\\udc80' is no Unicode text$"):
        header([Pair("the key", "STRINGS", ["a", "\udc80"])], [])


def test_every_kind_of_value_is_read_back(tmp_path: Path) -> None:
    pairs = [Pair(kind, kind, {"STRING": "x", "BOOL": True}.get(kind, 3)) for kind in VALUE_TYPES]
    pairs += [Pair(f"{pair.key}S", f"{pair.kind}S", [pair.value] * 2) for pair in pairs]
    (tmp_path / "keys.gguf").write_bytes(header(pairs, []))
    with File(tmp_path / "keys.gguf") as file:
        assert {key: (value.kind, value.value) for key, value in file.values.items()} == {
            pair.key: (pair.kind, pair.value) for pair in pairs
        }


def test_dg_run_starts_without_the_packages_of_the_converter() -> None:
    program = "import sys, dgemma.cli.run; print({'gguf', 'sentencepiece'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
