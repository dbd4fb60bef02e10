"""Values that a format cannot hold, and values that are none: refused by tensor, place and value, and never written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import read_safetensors_header, write_checkpoint, write_raw_safetensors
from support.converting import leftovers, refused, run

import dgemma
from dgemma.convert import convert, plan
from dgemma.convert.imatrix import Sums, write_imatrix
from dgemma.convert.source import open_source
from dgemma.convert.verify import verify
from dgemma.files.gguf_file import File
from dgemma.native import formats

WRITTEN = [f.name for f in formats.all_formats() if f.encodes]
NARROW = [name for name in WRITTEN if name not in ("F32", "BF16")]
QUERY, HF_QUERY = "blk.0.attn_q.weight", "model.decoder.layers.0.self_attn.q_proj.weight"
AT = [7, 33]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in f32 with rows that every format's blocks divide."""
    write_checkpoint(tmp_path / "in", layers=2, hidden=256, dtype="f32")
    return tmp_path / "in"


def plant(folder: Path, value: float, name: str = HF_QUERY, at: list[int] = AT) -> None:
    header, data = read_safetensors_header(folder / "model.safetensors")
    start, end = header[name]["data_offsets"]
    values = np.frombuffer(data[start:end], np.float32).copy().reshape(header[name]["shape"])
    values[tuple(at)] = value
    write_raw_safetensors(folder / "model.safetensors", header, data[:start] + values.tobytes() + data[end:])


def imatrix(folder: Path, to: Path, means: bool) -> Path:
    """What columns are used, very unevenly; with means of the inputs too, or without."""
    found: dict[str, Sums] = {}
    random = np.random.default_rng(1)
    for tensor in plan(folder, "q8_0").tensors:
        if not tensor.want.is_float:
            shape = (tensor.want.dims[2] if len(tensor.want.dims) > 2 else 1, tensor.want.dims[0])
            inputs = random.standard_normal(shape).astype(np.float32) * 900
            squares = (inputs**2 / 900 + np.exp(random.standard_normal(shape)) * 900).astype(np.float32)
            found[tensor.want.gguf] = Sums(squares, np.full(shape[0], 900, np.float32), inputs if means else None)
    write_imatrix(to, found, "text", 1, 1, force=True)
    return to


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weighed", ["", "importance", "means"])
def test_a_value_beyond_a_formats_range_is_refused_by_tensor_place_and_value(
    name: str, sign: int, weighed: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--set", f"{QUERY}={name.lower()}", "--type", "bf16"]
    if weighed:
        flags += ["--imatrix", imatrix(folder, tmp_path / "i.dat", means=weighed == "means")]
    value = sign * min(3.4e38, 1.5 * abs(formats.by_name(name).most(sign)))
    plant(folder, value)
    if name == "F32":
        assert run(capsys, folder, "-o", tmp_path / "out.gguf", *flags)[0] == 0
        return
    err = refused(capsys, 1, folder, "-o", tmp_path / "out.gguf", *flags)
    other = "F32" if name == "BF16" else "BF16"
    assert f"tensor {HF_QUERY} holds {value:g} at {AT}, which {name} cannot: it ends near" in err, err
    assert err.endswith(f"; {other} can\n") and leftovers(tmp_path) == [], err


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_source_that_holds_no_number_is_refused_whatever_it_becomes(
    name: str, value: float, folder: Path, tmp_path: Path
) -> None:
    plant(folder, value)
    with pytest.raises(dgemma.FormatError, match=rf"{HF_QUERY} holds {value:g} at \[7, 33\], which is not finite"):
        convert(folder, tmp_path / "out.gguf", "bf16", overrides=[(QUERY, name)])


def test_the_place_is_right_in_a_late_slice_and_in_a_tensor_of_experts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.convert.encode.SLICE_VALUES", 700)
    name = "model.decoder.layers.1.experts.gate_up_proj"
    plant(folder, 1e7, name, [5, 63, 255])
    with pytest.raises(dgemma.FormatError, match=rf"{name} holds 1e\+07 at \[5, 63, 255\], which Q8_0 cannot"):
        convert(folder, tmp_path / "out.gguf", "q8_0")


@pytest.mark.parametrize("name", NARROW)
def test_the_largest_value_of_a_format_is_written_and_comes_back(name: str, folder: Path, tmp_path: Path) -> None:
    for sign in (1, -1):
        plant(folder, 0.99 * formats.by_name(name).most(sign))
        convert(folder, tmp_path / "out.gguf", "bf16", overrides=[(QUERY, name)], verify=True, force=True)
        [query] = [t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == QUERY]
        back = gguf.quants.dequantize(query.data, query.tensor_type)
        assert np.isfinite(back).all() and back.shape == (128, 256)
        assert back[tuple(AT)] == pytest.approx(0.99 * formats.by_name(name).most(sign), rel=0.2)


def damage(file: Path, name: str, offset: int, data: bytes) -> None:
    with File(file) as found:
        [tensor] = [t for t in found.tensors if t.name == name]
        at = file.read_bytes().find(bytes(tensor.data[:64])) + offset
    with file.open("r+b") as out:
        out.seek(at)
        out.write(data)


INFINITE_SCALES = {"Q8_0": 0, "Q4_0": 36, "Q5_0": 0, "Q5_1": 2, "Q4_K": 0, "Q5_K": 2, "Q6_K": 208, "IQ4_NL": 0}
INFINITE_SCALES |= {"F16": 6, "BF16": 4}


@pytest.mark.parametrize("name", INFINITE_SCALES)
@pytest.mark.parametrize("scale", [b"\x00\x7c", b"\x80\xff"], ids=["infinity", "NaN"])
def test_a_source_file_that_has_such_scales_already_is_refused_and_verify_calls_it_a_failure(
    name: str, scale: bytes, folder: Path, tmp_path: Path
) -> None:
    made = tmp_path / "in.gguf"
    convert(folder, made, "bf16", overrides=[(QUERY, name)])
    todo = plan(folder, "bf16", [(QUERY, name)])
    damage(made, QUERY, INFINITE_SCALES[name], scale if name != "BF16" else b"\x80\x7f")
    with (
        open_source(folder) as source,
        pytest.raises(dgemma.FormatError, match=rf"in.gguf: tensor {QUERY} holds .* at"),
    ):
        verify(source, todo, made, 1, lambda n: None)
    for to in (name, "F32"):
        with pytest.raises(dgemma.FormatError, match=rf"{QUERY} holds (nan|-?inf) at \[0, \d+\], which is not finite"):
            convert(made, tmp_path / "out.gguf", "bf16", overrides=[(QUERY, to)])
    assert leftovers(tmp_path) == ["in.gguf"]
