"""Files of others: types that we lack, small tensors that are not float32, marks called text, and no models at all."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fuzz.seeds import TOKENS, TYPES
from fuzz.seeds import model as write_model
from gguf import GGMLQuantizationType as Type
from support.checkpoints import write_safetensors
from support.commands import Inside

import dgemma
from dgemma.cli.info import main as info_main
from dgemma.cli.inspect import facts
from dgemma.cli.run import main as run_main
from dgemma.convert import convert
from dgemma.files.gguf_file import File
from dgemma.native import formats

info, run = Inside(info_main, "dg-info"), Inside(run_main, "dg-run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, all of it float32."""
    path = tmp_path_factory.mktemp("foreign") / "plain.gguf"
    write_model(path, Type.F32, layers=2)
    return path


def rewritten(source: Path, out: Path, tensors: Mapping[str, tuple[np.ndarray, Type]], **strings: str) -> Path:
    """The same file with other tensors in some places, and other texts for some keys of general."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, strings.pop("architecture", "diffusion-gemma"))
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), *field.types[:1], sub_type=field.types[-1])
    for key, text in strings.items():
        writer.add_string(f"general.{key}", text)
    for tensor in reader.tensors:
        data, kind = tensors.get(tensor.name, (np.array(tensor.data), tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def of_type(plain: Path, out: Path, name: str, kind: Type) -> Path:
    """The model with one tensor in a type that need not be one of ours; its values are whatever zeros mean."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    (tensor,) = (t for t in gguf.GGUFReader(plain).tensors if t.name == name)
    shape = [*map(int, tensor.shape[::-1])]
    if shape[-1] % block:
        pytest.skip(f"{kind.name} has blocks of {block}")
    data = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
    return rewritten(plain, out, {name: (data, kind)})


# ---- Types that we lack ----


def test_every_type_of_ggml_has_a_name_and_a_size() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        of = formats.type_of(int(kind))
        assert (of.name, of.id, (of.block, of.bytes)) == (kind.name, int(kind), sizes)
        assert of.decodes == (of.name in {f.name for f in formats.all_formats()})
    nobody = formats.type_of(9999)
    assert (nobody.name, nobody.decodes, nobody.encodes) == ("type 9999", False, False)
    with pytest.raises(dgemma.FormatError, match="9999"):
        nobody.decode(b"")


LACKED = [kind for kind in Type if not formats.type_of(int(kind)).decodes and gguf.GGML_QUANT_SIZES[kind][0] <= 32]
WEIGHT = "blk.1.ffn_gate.weight"


@pytest.mark.parametrize("kind", [kind for kind in Type if not formats.type_of(int(kind)).decodes])
def test_every_type_that_we_lack_is_told_by_name_and_size(kind: Type, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "diffusion-gemma")
    writer.add_tensor("a", np.zeros((3, 2 * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = facts(tmp_path / "other.gguf")
    assert told["tensors"] == [{"name": "a", "format": kind.name, "dims": [2 * block, 3], "bytes": 6 * size}]


@pytest.mark.parametrize("kind", LACKED, ids=[kind.name for kind in LACKED])
def test_a_file_with_a_type_that_we_lack_is_told_but_for_its_values(
    kind: Type, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = of_type(plain, tmp_path / "other.gguf", WEIGHT, kind)
    whole, told = facts(plain), facts(other)
    refusal = f"{other}: tensor '{WEIGHT}' is {kind.name}, which this build does not read"
    assert not told["runs"] and told["refusal"].startswith(refusal) and "needs a file of other types" in told["refusal"]
    for part in ("config", "tokenizer", "chat_template", "metadata"):
        assert told[part] == whole[part], part
    assert {t["name"]: t["format"] for t in told["tensors"]}[WEIGHT] == kind.name
    assert told["formats"][kind.name]["tensors"] == 1
    code, out, err = info.run(capsys, other)
    assert (code, err) == (0, "") and kind.name in out and "Model" in out and "Tokenizer" in out
    assert refusal in run.refused(capsys, 1, other, "-p", "a")
    with pytest.raises(dgemma.FormatError, match=kind.name):
        convert(other, tmp_path / "out.gguf", "q8_0")
    assert dgemma.Tokenizer.from_gguf(other).encode("ab") == dgemma.Tokenizer.from_gguf(plain).encode("ab")


def test_a_type_that_nobody_knows_is_told_by_its_number(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = plain.read_bytes()
    at = data.index(WEIGHT.encode()) + len(WEIGHT) + 4 + 2 * 8  # behind n_dims and the dims
    (tmp_path / "other.gguf").write_bytes(data[:at] + struct.pack("<I", 777) + data[at + 4 :])
    told = facts(tmp_path / "other.gguf")
    assert told["config"] == facts(plain)["config"] and "type 777" in told["formats"]
    assert "type 777" in info.run(capsys, tmp_path / "other.gguf")[1]
    assert f"tensor '{WEIGHT}' is of type number 777" in run.refused(capsys, 1, tmp_path / "other.gguf", "-p", "a")


WIDE = [kind for kind in Type if gguf.GGML_QUANT_SIZES[kind][0] > 32]


@pytest.mark.parametrize("kind", WIDE, ids=[kind.name for kind in WIDE])
def test_rows_that_are_no_whole_number_of_blocks_are_told_as_any_other_type(
    kind: Type, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows have 32 values."""
    data = plain.read_bytes()
    at = data.index(WEIGHT.encode()) + len(WEIGHT) + 4 + 2 * 8  # behind n_dims and the dims
    (other := tmp_path / "other.gguf").write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
    whole, told = facts(plain), facts(other)
    for part in ("config", "tokenizer", "chat_template", "metadata"):
        assert told[part] == whole[part], part
    (tensor,) = (t for t in told["tensors"] if t["name"] == WEIGHT)
    assert (tensor["format"], tensor["bytes"]) == (kind.name, 0) and not told["runs"]
    ours = formats.type_of(int(kind)).decodes
    block = gguf.GGML_QUANT_SIZES[kind][0]
    why = f": rows of 32 values are no whole number of {kind.name} blocks of {block}" if ours else f" is {kind.name}, "
    refusal = f"{other}: tensor '{WEIGHT}'{why}"
    assert refusal in told["refusal"] and refusal in run.refused(capsys, 1, other, "-p", "a")
    assert kind.name in info.run(capsys, other)[1]
    with pytest.raises(dgemma.FormatError, match=kind.name):
        convert(other, tmp_path / "out.gguf", "q8_0")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_big_endian_file_is_told_as_one(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "diffusion-gemma", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "big.gguf").read_bytes()
    (tmp_path / "big.gguf").write_bytes(data[:4] + struct.pack(">I", version) + data[8:])
    for command, more in ((info, ()), (run, ("-p", "a"))):
        err = command.refused(capsys, 1, tmp_path / "big.gguf", *more)
        assert "big.gguf: a big-endian GGUF file; this build reads little-endian ones" in err


# ---- Norms, scales and the router in any format ----

SMALL = [f for f in formats.all_formats() if f.encodes and f.block <= 32 and f.name != "F32"]


def logits_of(path: Path, **options: Any) -> list[np.ndarray]:
    with dgemma.Model(path, threads=1, **options) as model, model.session() as session:
        prompt = session.encode([2, 7, 8, 9], logits="all")
        assert prompt is not None
        return [prompt, session.denoise([7, 8, 9, 4]), session.denoise([1, 2, 3], np.eye(3, len(TOKENS)))]


def in_format(plain: Path, folder: Path, f: formats.Format) -> tuple[Path, Path]:
    """The model with norms, scales and router in a format, as far as their rows are whole blocks, and the model with
    the same values in float32.
    """
    there, same = {}, {}
    kind = Type[f.name]
    for tensor in gguf.GGUFReader(plain).tensors:
        if any(part in tensor.name for part in ("norm", "scale", "_inp", "freqs")) and tensor.shape[0] % f.block == 0:
            blocks = f.encode(np.array(tensor.data))
            there[tensor.name] = (blocks, kind)
            same[tensor.name] = (gguf.quants.dequantize(blocks, kind).astype(np.float32), Type.F32)
    assert there
    return rewritten(plain, folder / "there.gguf", there), rewritten(plain, folder / "same.gguf", same)


@pytest.mark.parametrize("f", SMALL, ids=[f.name for f in SMALL])
def test_small_tensors_of_any_format_compute_as_their_values_in_float32(
    f: formats.Format, plain: Path, tmp_path: Path
) -> None:
    there, same = in_format(plain, tmp_path, f)
    for ours, theirs in zip(logits_of(there), logits_of(same), strict=True):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip(logits_of(there, ram="1G"), logits_of(same, ram="1G"), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("f", SMALL, ids=[f.name for f in SMALL])
def test_small_tensors_of_any_format_convert_to_float32(f: formats.Format, plain: Path, tmp_path: Path) -> None:
    there, same = in_format(plain, tmp_path, f)
    convert(there, tmp_path / "a.gguf", "f32")
    convert(same, tmp_path / "b.gguf", "f32")
    with File(tmp_path / "a.gguf") as a, File(tmp_path / "b.gguf") as b:
        assert [(t.name, bytes(t.data)) for t in a.tensors] == [(t.name, bytes(t.data)) for t in b.tensors]


# ---- What is no model ----


def a_file(out: Path, architecture: str, **values: str) -> Path:
    writer = gguf.GGUFWriter(out, architecture)
    for key, value in values.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("blk.0.attn_q.weight.lora_a" if values.get("adapter__type") else "v.a", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("architecture", "values", "what"),
    [
        ("diffusion-gemma", {"general__type": "adapter", "adapter__type": "lora"}, "a LoRA adapter, not a model"),
        ("diffusion-gemma", {"adapter__type": "lora"}, "a LoRA adapter, not a model"),
        ("gemma4", {"general__type": "adapter"}, "a LoRA adapter, not a model"),
        ("clip", {"general__type": "mmproj"}, "a projector of images or sound (mmproj)"),
        ("clip", {}, "a projector of images or sound (mmproj)"),
        ("imatrix", {"general__type": "imatrix"}, "an importance matrix, not a model"),
        ("llama", {"general__type": "model"}, "a model of architecture 'llama'"),
        ("diffusion-gemma", {"general__type": "dataset"}, "'general.type': expected 'model', found 'dataset'"),
    ],
)
def test_a_gguf_file_that_is_no_model_is_told_for_what_it_is(
    architecture: str, values: dict[str, str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_file(tmp_path / "other.gguf", architecture, **values)
    code, out, err = info.run(capsys, path)
    assert (code, err) == (0, "") and what in out and "Metadata" in out and "Types" in out
    told = json.loads(info.run(capsys, path, "--json")[1])
    assert not told["runs"] and what in told["refusal"] and len(told["tensors"]) == 1
    assert what in run.refused(capsys, 1, path, "-p", "a")


def test_what_is_no_gguf_file_is_told_for_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", (1,), bytes(4))})
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html><html></html>")
    words = {
        "model.safetensors": "safetensors, a part of a checkpoint: dg-convert",
        "pytorch_model.bin": "a zip archive, as PyTorch",
        "old.pt": "a Python pickle, as PyTorch",
        "pointer.gguf": "a Git LFS pointer",
        "page.gguf": "a web page",
    }
    for name, what in words.items():
        for command, more in ((info, ()), (run, ("-p", "a"))):
            err = command.refused(capsys, 1, tmp_path / name, *more)
            assert f"{name}: not a GGUF file but {what}" in err


# ---- Pairs that do not turn ----


@pytest.mark.parametrize(("kind", "off"), [(Type.F16, np.inf), (Type.BF16, 1e30), (Type.F32, np.inf)])
def test_what_switches_a_pair_off_is_1e30_or_infinity(kind: Type, off: float, plain: Path, tmp_path: Path) -> None:
    """1e30 stored as F16 is infinity."""
    name, factors = "rope_freqs.weight", np.where(np.arange(16) % 2, np.float32(1), np.float32(1e30))
    usual = rewritten(plain, tmp_path / "usual.gguf", {name: (factors, Type.F32)})
    stored = gguf.quants.quantize(np.where(factors > 1, np.float32(off), factors), kind)
    other = rewritten(plain, tmp_path / "other.gguf", {name: (stored, kind)})
    expected = logits_of(usual)
    assert not np.array_equal(expected[0], logits_of(plain)[0])
    for path in (other, tmp_path / "out.gguf"):
        for ours, theirs in zip(logits_of(path), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        if path == other:
            convert(other, tmp_path / "out.gguf", "f32", verify=True)
    with File(tmp_path / "out.gguf") as file:
        (tensor,) = (t for t in file.tensors if t.name == name)
        np.testing.assert_allclose(tensor.format.decode(tensor.data), factors, rtol=0.01)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_other_factors_that_are_not_finite_are_refused(value: float, plain: Path, tmp_path: Path) -> None:
    factors = np.full(16, value, np.float32)
    other = rewritten(plain, tmp_path / "other.gguf", {"rope_freqs.weight": (factors, Type.F32)})
    with pytest.raises(dgemma.FormatError, match=r"rope_freqs.weight holds -?(nan|inf) at .* not finite"):
        convert(other, tmp_path / "out.gguf", "f32")


# ---- Marks that a file calls text, and ends ----

TURN = TOKENS.index("<turn|>")


def with_ends(folder: Path, kind: int, ends: Sequence[int] | None, written: bool = False) -> Path:
    """A model of random weights; `kind` is what its file calls <turn|>. written: by its chat template."""
    path = folder / f"ends-{kind}-{'none' if ends is None else len(ends)}.gguf"
    types = [kind if token == "<turn|>" else t for token, t in zip(TOKENS, TYPES, strict=True)]
    write_model(path, Type.F32, layers=1, types=types)
    data, key = path.read_bytes(), b"diffusion-gemma.end_token_ids"
    at = data.index(key) + len(key) + 16
    if ends is None:
        data = data.replace(key, key[:-1] + b"z")
    else:
        data = data[:at] + struct.pack("<2i", *(2 * list(ends))[:2]) + data[at + 8 :]
    if written:
        template = b"{{ messages[0].content }}"
        assert data.count(template) == 1
        data = data.replace(template, b"{{ messages }}<turn|>".ljust(len(template)))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("written", [True, False], ids=["in the template", "not there"])
@pytest.mark.parametrize("kind", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("ends", [None, (1, TURN), (1,)], ids=["no list", "listed", "a list that lacks it"])
def test_an_answer_ends_at_the_mark_whatever_its_file_calls_it(
    kind: int, ends: tuple[int, ...] | None, written: bool, tmp_path: Path
) -> None:
    """A list without it is taken at its word only where the file knows the mark, and has no template that writes it."""
    with dgemma.Model(with_ends(tmp_path, kind, ends, written), threads=1) as model:
        assert 1 in model.config.end_ids
        assert (TURN in model.config.end_ids) == (kind not in (3, 4) or ends != (1,) or written)
        ours = [model.generate("ab", seed=seed, max_tokens=24, steps=4) for seed in range(20)]
    with dgemma.Model(with_ends(tmp_path, 3, (1, TURN) if TURN in model.config.end_ids else (1,)), threads=1) as right:
        assert [a.ids for a in ours] == [right.generate("ab", seed=s, max_tokens=24, steps=4).ids for s in range(20)]
    assert any(TURN in answer.ids for answer in ours) == (TURN not in model.config.end_ids)


@pytest.mark.parametrize("ends", [(1,), (1, TURN), None])
@pytest.mark.parametrize("written", [True, False])
def test_dg_info_tells_of_a_turns_end_that_the_list_lacks(
    ends: tuple[int, ...] | None, written: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = info.run(capsys, with_ends(tmp_path, 3, ends, written))[1]
    key = "diffusion-gemma.end_token_ids"
    assert (f"an answer ends at {TURN} too, by name: {key} lacks it" in out) is (ends == (1,) and written)
    assert (f"an answer goes on behind <turn|>, {TURN}: {key} lacks it" in out) is (ends == (1,) and not written)


def test_dg_info_tells_which_bos_it_takes(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, data = b"tokenizer.ggml.bos_token_id", plain.read_bytes()
    at = data.index(key) + len(key) + 4
    without = tmp_path / "without.gguf"
    without.write_bytes(data.replace(key, key[:-1] + b"z"))
    assert f"bos is 2, the id of <bos>: the file has no {key.decode()}" in info.run(capsys, without)[1]
    with dgemma.Model(without, threads=1) as model:
        assert model.prompt_ids("ab") == [2, *model.tokenizer.encode("ab")]
    other = tmp_path / "other.gguf"
    other.write_bytes(data[:at] + struct.pack("<I", 1) + data[at + 4 :])
    out = info.run(capsys, other)[1]
    assert f"bos is 1, <eos>, by {key.decode()}, though <bos>, 2, is in the vocabulary" in out
    assert "bos is" not in info.run(capsys, plain)[1]


def test_dg_info_tells_which_tokens_it_takes_as_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = with_ends(tmp_path, 1, None)
    out = info.run(capsys, wrong)[1]
    assert "1 token that looks like a control mark is taken as such: <turn|>" in out
    assert json.loads(info.run(capsys, wrong, "--json")[1])["tokenizer"]["marks"] == {"<turn|>": TURN}
    assert f"an answer ends at 1, {TURN}" in out
    assert "control mark" not in info.run(capsys, with_ends(tmp_path, 3, None))[1]


@pytest.mark.parametrize("asked", [False, None])
def test_dg_info_tells_where_prompts_begin_otherwise_than_the_file_says(
    asked: bool | None, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = b"tokenizer.ggml.add_bos_token"
    data = plain.read_bytes()
    at = data.index(key) + len(key)
    without, no = data[: at - 1] + b"x" + data[at:], data[: at + 4] + b"\0" + data[at + 5 :]
    (tmp_path / "other.gguf").write_bytes(without if asked is None else no)
    out = info.run(capsys, tmp_path / "other.gguf")[1]
    said = "the file does not have" if asked is None else "the file says no by"
    assert f"prompts begin with <bos>, though {said} {key.decode()}" in out
    assert "though" not in info.run(capsys, plain)[1]
    with dgemma.Model(tmp_path / "other.gguf", threads=1) as model:
        whole = [2, *model.tokenizer.encode("ab")]
        assert model.prompt_ids("ab") == model.prompt_ids("<bos>ab") == whole
        with model.session() as session:
            for prompt in ("ab", "<bos>ab"):
                session.prompt(prompt)
                assert session.ids == whole
