"""dg-convert from GGUF files, into several files, and what --verify tells. gguf-py is the other writer and reader."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import write_checkpoint
from support.converting import leftovers, refused, run

import dgemma
from dgemma.convert import convert, plan
from dgemma.convert import writer as writer_module
from dgemma.convert.recipe import RECIPES
from dgemma.files.gguf_file import File
from dgemma.native import formats

FUSED = "ffn_gate_up_exps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for K-quants."""
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    write_checkpoint(folder, layers=3, hidden=256)
    return folder


@pytest.fixture(scope="module")
def lossless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossless") / "bf16.gguf"
    convert(folder, out, "bf16")
    return out


def rewritten(
    source: Path,
    out: Path,
    *,
    architecture: str = "diffusion-gemma",
    without: tuple[str, ...] = (),
    more: Callable[[gguf.GGUFWriter], object] = lambda _: None,
    change: Callable[[str, np.ndarray], dict[str, np.ndarray]] = lambda name, data: {name: data},
) -> Path:
    """The same model by another writer, without some keys; `change` turns a tensor into those to be written."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", *without)):
            writer.add_key_value(name, field.contents(), *field.types[:1], sub_type=field.types[-1])
    more(writer)
    for tensor in reader.tensors:
        for name, data in change(tensor.name, np.array(tensor.data)).items():
            writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def halves(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    """Older files' form of the experts."""
    if FUSED not in name:
        return {name: data}
    gate, up = np.split(data, 2, axis=1)
    return {name.replace(FUSED, "ffn_gate_exps"): gate.copy(), name.replace(FUSED, "ffn_up_exps"): up.copy()}


# ---- from one GGUF file to another ----


@pytest.mark.parametrize("type_", RECIPES)
def test_a_lossless_file_gives_what_its_source_gives(type_: str, folder: Path, lossless: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "direct.gguf", type_)
    convert(lossless, tmp_path / "again.gguf", type_)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


@pytest.mark.parametrize("type_", ["f32", "bf16", "f16", "q4_k_m"])
def test_the_same_type_again_is_the_same_file(type_: str, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "one.gguf", type_)
    convert(tmp_path / "one.gguf", tmp_path / "two.gguf", type_)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_bf16_survives_f32(lossless: Path, tmp_path: Path) -> None:
    convert(lossless, tmp_path / "f32.gguf", "f32")
    convert(tmp_path / "f32.gguf", tmp_path / "bf16.gguf", "bf16")
    assert (tmp_path / "bf16.gguf").read_bytes() == lossless.read_bytes()


def test_quantised_tensors_are_decoded_and_encoded(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "q6.gguf", "q6_k")
    convert(tmp_path / "q6.gguf", tmp_path / "q4.gguf", "q4_k_m")
    with File(tmp_path / "q6.gguf") as before, File(tmp_path / "q4.gguf") as after:
        for old, new in zip(before.tensors, after.tensors, strict=True):
            expected = old.data if old.format is new.format else new.format.encode(old.format.decode(old.data))
            assert (old.name, old.dims) == (new.name, new.dims) and bytes(expected) == bytes(new.data), old.name


def test_metadata_is_kept_but_for_what_tells_of_the_file(lossless: Path, tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("other.small", 200)
        writer.add_float64("other.double", 0.1)
        writer.add_array("other.texts", ["a", "\u4f60", ""])
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64
        writer.add_key_value("other.longs", [1 << 40, 2], kinds[0], sub_type=kinds[1])
        writer.add_string("quantize.imatrix.file", "of another quantisation")
        writer.add_custom_alignment(128)

    other = rewritten(lossless, tmp_path / "other.gguf", more=more)
    convert(other, tmp_path / "out.gguf", "q8_0")
    old, new = (gguf.GGUFReader(path).fields for path in (other, tmp_path / "out.gguf"))
    dropped = {"general.alignment", "quantize.imatrix.file"}
    assert [name for name in new if "GGUF." not in name] == [n for n in old if "GGUF." not in n and n not in dropped]
    for name in set(new) - {"general.file_type", "GGUF.kv_count"}:
        assert (new[name].types, new[name].contents()) == (old[name].types, old[name].contents()), name
    assert new["general.file_type"].contents() == 7


@pytest.mark.parametrize("threads", [1, 3])
def test_older_files_of_another_writer_become_the_same_file(
    threads: int, folder: Path, lossless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rewritten(lossless, tmp_path / "old.gguf", change=halves)
    assert any("ffn_gate_exps" in tensor.name for tensor in gguf.GGUFReader(old).tensors)
    convert(folder, tmp_path / "direct.gguf", "q4_k_m")
    for values in (1000, 1 << 20):
        monkeypatch.setattr("dgemma.convert.encode.SLICE_VALUES", values)
        convert(old, tmp_path / "out.gguf", "q4_k_m", threads=threads, force=True)
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


def test_a_file_of_another_writer_lacks_what_ours_says(lossless: Path, tmp_path: Path) -> None:
    without = ("diffusion.eb_", "diffusion-gemma.end_token_ids", "general.file_type")
    published = rewritten(lossless, tmp_path / "published.gguf", without=without)
    convert(published, tmp_path / "out.gguf", "q4_k_m")
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["general.file_type"].contents() == 15
    with dgemma.Model(tmp_path / "out.gguf") as model:
        assert (model.config.steps, model.config.end_ids[0]) == (48, 1)


# ---- what is refused ----


def not_finite(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    if name == "blk.1.attn_q.weight":
        data = data.copy()
        data.view(np.uint16).flat[7] = 0x7F80
    return {name: data}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"architecture": "gemma4"}, "'gemma4'"),
        ({"change": not_finite}, "tensor blk.1.attn_q.weight holds inf at [0, 7], which is not finite"),
        ({"change": lambda n, d: {} if "blk.2.ffn_up." in n else {n: d}}, "'blk.2.ffn_up.weight' is missing"),
        ({"change": lambda n, d: {n: d[:64] if "blk.0.ffn_up." in n else d}}, "'blk.0.ffn_up.weight' has shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    options: dict[str, Any], complaint: str, lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = rewritten(lossless, tmp_path / "bad.gguf", **options)
    err = refused(capsys, 1, bad, "-o", tmp_path / "out.gguf")
    assert "bad.gguf" in err and complaint in err
    assert leftovers(tmp_path) == ["bad.gguf"]


def test_cut_and_unknown_files_and_the_source_itself_are_refused(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, text = tmp_path / "cut.gguf", tmp_path / "text"
    cut.write_bytes(lossless.read_bytes()[:-100])
    text.write_text("no model")
    assert "cut.gguf: truncated" in refused(capsys, 1, cut, "-o", tmp_path / "out.gguf")
    assert "text: expected the folder" in refused(capsys, 1, text, "-o", tmp_path / "out.gguf")
    copy = tmp_path / "copy.gguf"
    shutil.copy(lossless, copy)
    assert "this is SOURCE" in refused(capsys, 2, copy, "-o", copy, "--force")
    assert copy.read_bytes() == lossless.read_bytes()


# ---- several files ----


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("out-*-of-*.gguf"))


def test_parts_hold_together_what_one_file_holds(folder: Path, tmp_path: Path) -> None:
    whole = convert(folder, tmp_path / "whole.gguf", "q8_0")
    limit = whole.plan.file_bytes // 4
    done = convert(folder, tmp_path / "out.gguf", "q8_0", split_max_size=limit)
    parts = parts_of(tmp_path)
    assert done.paths == parts and 5 <= len(parts) <= 9 and not (tmp_path / "out.gguf").exists()
    assert all(p.stat().st_size == planned.file_bytes for p, planned in zip(parts, done.plan.parts, strict=True))
    assert all(path.stat().st_size <= limit for path in parts)
    one = gguf.GGUFReader(tmp_path / "whole.gguf")
    expected = [(t.name, t.data.tobytes()) for t in one.tensors]
    readers = [gguf.GGUFReader(path) for path in parts]
    assert [(t.name, t.data.tobytes()) for r in readers for t in r.tensors] == expected
    for i, reader in enumerate(readers):
        fields = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        keys = list(fields)[-3:] if i == 0 else list(fields)
        assert keys == ["split.no", "split.count", "split.tensors.count"]
        assert [fields[k].types[0].name for k in keys] == ["UINT16", "UINT16", "INT32"]
        assert [fields[k].contents() for k in keys] == [i, len(parts), len(expected)]
    assert list(one.fields)[3:] == list(readers[0].fields)[3:-3]


def test_the_runtime_and_the_converter_read_parts(folder: Path, tmp_path: Path) -> None:
    size = convert(folder, tmp_path / "whole.gguf", "bf16").plan.file_bytes
    first = convert(folder, tmp_path / "out.gguf", "bf16", split_max_size=size // 3).path
    convert(first, tmp_path / "joined.gguf", "bf16")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    answers = []
    for path in (first, tmp_path / "whole.gguf"):
        with dgemma.Model(path, threads=1) as model:
            answers.append(model.generate("Hi", steps=2, max_tokens=8).ids)
    assert answers[0] == answers[1]
    second = parts_of(tmp_path)[1]
    for target, limit in ((second, None), (tmp_path / "out.gguf", size // 3)):
        with pytest.raises(dgemma.UsageError, match=r"this is (the )?source"):
            convert(first, target, "bf16", split_max_size=limit, force=True)
    with pytest.raises(dgemma.FormatError, match="open the first"):
        dgemma.Model(second)
    second.unlink()
    with pytest.raises(dgemma.SystemFailure, match="out-00002-of-"):
        dgemma.Model(first)


def test_what_fits_one_file_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "whole.gguf", "q8_0")
    done = convert(folder, tmp_path / "out.gguf", "q8_0", split_max_size=1 << 30)
    assert done.paths == [tmp_path / "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("limit", range(200_000, 200_064, 7))
def test_no_part_is_larger_than_was_asked(limit: int, folder: Path) -> None:
    assert all(part.file_bytes <= limit for part in plan(folder, "q4_0", split_max_size=limit).parts)


@pytest.mark.parametrize(
    ("size", "code", "complaint"),
    [("1K", 2, "and the header of its part need"), ("0", 2, "no size"), ("-1G", 2, "no size"), ("4X", 2, "no size")],
)
def test_sizes_that_cannot_be(
    size: str, code: int, complaint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, code, folder, "-o", tmp_path / "out.gguf", f"--split-max-size={size}")
    assert "--split-max-size" in err and complaint in err and leftovers(tmp_path) == []


def test_an_existing_part_is_replaced_by_force_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [folder, "-o", tmp_path / "out.gguf", "--type", "q8_0", "--split-max-size", "300K"]
    assert run(capsys, *arguments)[0] == 0
    before = {path: path.read_bytes() for path in parts_of(tmp_path)}
    second = parts_of(tmp_path)[1]
    for path in parts_of(tmp_path):
        if path != second:
            path.unlink()
    assert f"{second.name}: this file exists" in refused(capsys, 1, *arguments)
    assert parts_of(tmp_path) == [second]
    code, out, err = run(capsys, *arguments, "--force")
    assert (code, out) == (0, "") and f"in {len(before)} files" in err
    assert {path: path.read_bytes() for path in parts_of(tmp_path)} == before


def test_a_commit_that_fails_leaves_no_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, 0

    def third_fails(*names: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(5, "Input/output error")
        replace(*names)

    def no_links(*names: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(writer_module.os, "replace", third_fails)
    monkeypatch.setattr(writer_module.os, "link", no_links)
    err = refused(capsys, 1, folder, "-o", tmp_path / "out.gguf", "--split-max-size", "300K", "--type", "q8_0")
    assert "input/output error" in err and leftovers(tmp_path) == []


# ---- --verify ----


def test_verify_tells_each_tensors_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    code, text, err = run(capsys, folder, "-o", out, "--type", "q4_k_m", "--verify")
    assert code == 0 and err.count("\n") == 1
    convert(folder, tmp_path / "exact.gguf", "f32")
    code, printed, _ = run(capsys, folder, "-o", out, "--type", "q4_k_m", "--verify", "--json", "--force")
    told = json.loads(printed)
    found = {entry["name"]: entry for entry in told["tensors"]}
    errors = {}
    with File(out) as ours, File(tmp_path / "exact.gguf") as exact:
        for got, wanted in zip(ours.tensors, exact.tensors, strict=True):
            values = wanted.format.decode(wanted.data).astype(np.float64)
            error = got.format.decode(got.data) - values
            errors[got.name] = np.sqrt((error**2).mean() / (values**2).mean())
            assert found[got.name]["relative_rmse"] == pytest.approx(errors[got.name], rel=1e-6, abs=1e-12)
            assert found[got.name]["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-6)
            assert (found[got.name]["format"], found[got.name]["bytes"]) == (got.format.name, got.bytes)
    worst = sorted(errors, key=lambda name: -errors[name])[:10]
    assert [line.split()[0] for line in text.splitlines()[1:11]] == worst
    exactly = sum(error == 0 for error in errors.values())
    assert f"{exactly} of {len(errors)} tensors hold exactly the source's values" in text
    assert (told["type"], told["files"], told["bytes"]) == ("q4_k_m", [str(out)], out.stat().st_size)


def test_verify_reads_the_file_and_not_what_was_meant(
    folder: Path, lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = writer_module.NewFiles.commit

    def commit_and_damage(self: Any, force: bool) -> None:
        commit(self, force)
        with self.files[0].target.open("r+b") as file:
            file.seek(-40, os.SEEK_END)
            file.write(b"\x12")

    monkeypatch.setattr(writer_module.NewFiles, "commit", commit_and_damage)
    err = refused(capsys, 1, lossless, "-o", tmp_path / "out.gguf", "--type", "bf16", "--verify")
    assert "out.gguf: tensor blk.2." in err and "is not what was written" in err
    assert leftovers(tmp_path) == []


def test_a_failed_verify_leaves_what_another_conversion_put_there(
    lossless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def replaced(*_: Any) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"GGUF of another conversion")
        os.replace(other, out)
        raise dgemma.FormatError("out.gguf: is not what was written")

    monkeypatch.setattr("dgemma.convert._verify", replaced)
    with pytest.raises(dgemma.FormatError):
        convert(lossless, out, "q8_0", verify=True)
    assert out.read_bytes() == b"GGUF of another conversion"


def test_verify_works_for_parts_and_its_json_needs_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", tmp_path / "out.gguf", "--type", "bf16"]
    code, text, _ = run(capsys, folder, *out, "--split-max-size", "500K", "--verify")
    assert code == 0 and "exactly the source's values" in text.splitlines()[0]
    assert "--verify" in refused(capsys, 2, folder, *out, "--json")


# ---- reading ----


def test_a_file_is_read_as_gguf_py_reads_it(lossless: Path) -> None:
    reader = gguf.GGUFReader(lossless)
    with File(lossless) as file:
        assert (file.bytes, file.parts) == (lossless.stat().st_size, 1)
        expected = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(file.values) == list(expected)
        assert all(value.value == expected[name].contents() for name, value in file.values.items())
        for ours, theirs in zip(file.tensors, reader.tensors, strict=True):
            assert (ours.name, list(ours.dims)) == (theirs.name, list(theirs.shape))
            assert ours.format is formats.by_id(theirs.tensor_type)
            assert bytes(ours.data) == theirs.data.tobytes() and ours.bytes == theirs.n_bytes
