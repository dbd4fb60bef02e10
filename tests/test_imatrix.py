"""dg-convert --imatrix: what it reads, and what it does to errors. gguf-py writes the files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import write_checkpoint
from support.converting import leftovers, refused, run

from dgemma.convert import convert
from dgemma.convert.imatrix import FEW, Sums, importance_of, read_imatrix, write_imatrix
from dgemma.convert.names import Wanted
from dgemma.files.gguf_file import File

EXPERTS = 8
Vectors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    write_checkpoint(folder, layers=2, hidden=256, experts=EXPERTS)
    return folder


@pytest.fixture(scope="module")
def exact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact") / "f32.gguf"
    convert(folder, out, "f32")
    return out


@pytest.fixture(scope="module")
def vectors(exact: Path) -> Vectors:
    """Mean squared inputs of every matrix but the embedding, [experts, columns], very uneven."""
    random, found = np.random.default_rng(3), {}
    for tensor in gguf.GGUFReader(exact).tensors:
        columns, *rows = tensor.shape.tolist()
        if rows and "_inp." not in tensor.name and "embd" not in tensor.name:
            experts = rows[1] if len(rows) == 2 else 1
            found[tensor.name] = np.exp(1.5 * random.standard_normal((experts, columns))).astype(np.float32)
    return found


def write_gguf(
    file: Path, vectors: Vectors, counts: dict[str, np.ndarray] | None = None, more: Vectors | None = None
) -> Path:
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some text", "more"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, means in vectors.items():
        count = (counts or {}).get(name, np.full(len(means), 3584, np.float32))
        writer.add_tensor(f"{name}.in_sum2", means * count[:, None])
        writer.add_tensor(f"{name}.counts", count[:, None])
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_dat(file: Path, vectors: Vectors) -> Path:
    data = struct.pack("<i", len(vectors))
    for name, means in vectors.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 7, means.size)
        data += (7 * means).astype("<f4").tobytes()
    data += struct.pack("<ii", 7, 9) + b"some text"
    file.write_bytes(data)
    return file


def errors(path: Path, exact: Path, vectors: Vectors) -> dict[str, float]:
    """Squared errors weighted by importance, as a part of the values' own."""
    found = {}
    with File(path) as ours, File(exact) as theirs:
        for got, wanted in zip(ours.tensors, theirs.tensors, strict=True):
            if got.name in vectors and got.format.name not in ("F32", "Q8_0"):
                means = vectors[got.name]
                shape = (len(means), -1, means.shape[1])
                values = wanted.format.decode(wanted.data).reshape(shape)
                error = got.format.decode(got.data).reshape(shape) - values
                weights = means[:, None]
                found[got.name] = float((error**2 * weights).sum() / (values**2 * weights).sum())
    return found


@pytest.mark.parametrize("type_", ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl"])
def test_errors_move_to_where_they_matter_less(
    type_: str, folder: Path, exact: Path, vectors: Vectors, tmp_path: Path
) -> None:
    imatrix = write_gguf(tmp_path / "imatrix.gguf", vectors)
    convert(folder, tmp_path / "plain.gguf", type_)
    done = convert(folder, tmp_path / "weighted.gguf", type_, imatrix=imatrix)
    plain, weighted = (errors(tmp_path / f"{n}.gguf", exact, vectors) for n in ("plain", "weighted"))
    assert plain.keys() == weighted.keys() and len(plain) > 10
    assert all(weighted[name] < 0.85 * plain[name] for name in plain), {n: weighted[n] / plain[n] for n in plain}
    assert done.plan.data_bytes == (tmp_path / "plain.gguf").stat().st_size - _header(tmp_path / "plain.gguf")


def _header(path: Path) -> int:
    return min(int(t.data_offset) for t in gguf.GGUFReader(path).tensors)


def test_both_forms_any_slices_and_threads_give_the_same_file(
    folder: Path, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imatrix = write_gguf(tmp_path / "imatrix.gguf", vectors)
    convert(folder, tmp_path / "one.gguf", imatrix=imatrix)
    for values, threads in ((1, 1), (5000, 3), (1 << 20, 2)):
        monkeypatch.setattr("dgemma.convert.encode.SLICE_VALUES", values)
        convert(folder, tmp_path / "other.gguf", imatrix=imatrix, threads=threads, force=True)
        assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    convert(folder, tmp_path / "dat.gguf", imatrix=write_dat(tmp_path / "imatrix.dat", vectors))
    with File(tmp_path / "one.gguf") as one, File(tmp_path / "dat.gguf") as dat:
        assert all(bytes(a.data) == bytes(b.data) for a, b in zip(one.tensors, dat.tensors, strict=True))


def test_the_file_says_by_what_it_was_weighted(folder: Path, vectors: Vectors, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out.gguf", imatrix=write_gguf(tmp_path / "of-a-text.gguf", vectors))
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    told = {name.removeprefix("quantize.imatrix."): f for name, f in fields.items() if name.startswith("quantize.")}
    assert {name: field.contents() for name, field in told.items()} == {
        "file": "of-a-text.gguf",
        "dataset": "some text, more",
        "entries_count": len(vectors),
        "chunks_count": 7,
    }
    assert [field.types[0].name for field in told.values()] == ["STRING", "STRING", "INT32", "INT32"]
    convert(tmp_path / "out.gguf", tmp_path / "again.gguf", "q8_0")
    assert not any(name.startswith("quantize.") for name in gguf.GGUFReader(tmp_path / "again.gguf").fields)


@pytest.mark.parametrize("rows", [0, 1, 100, FEW - 1, FEW])
def test_an_expert_that_saw_few_rows_is_filled_up_with_its_layers_mean(rows: int) -> None:
    random = np.random.default_rng(rows)
    squares = random.random((4, 32)).astype(np.float32) * 1000
    counts = np.array([500, rows, 300, 4000], np.float32)
    squares[1] *= rows > 0
    read = importance_of(Path("x"), {"blk.0.ffn_down_exps.weight": Sums(squares, counts)}, "", 0)
    mean = squares.sum(axis=0, dtype=np.float64) / counts.sum()
    wanted = [squares[0] / 500, (squares[1] + (FEW - rows) * mean) / FEW, squares[2] / 300, squares[3] / 4000]
    found = read.of(Wanted("blk.0.ffn_down_exps.weight", "", "MATRIX", 0, (32, 8, 4)))
    sizes = np.sqrt(wanted)
    np.testing.assert_allclose(found.weights, sizes / sizes.mean(axis=1, keepdims=True), rtol=1e-5)
    assert found.mean is None
    assert read.few == ([] if rows == FEW else [("blk.0.ffn_down_exps.weight", 1, rows)])


def test_an_expert_that_was_never_asked_is_weighed_as_its_layer(folder: Path, vectors: Vectors, tmp_path: Path) -> None:
    name = "blk.1.ffn_gate_up_exps.weight"
    counts = np.full(EXPERTS, 3584, np.float32)
    mean = np.delete(vectors[name], 3, axis=0).mean(axis=0)
    asked = vectors | {name: np.where(np.arange(EXPERTS)[:, None] == 3, mean, vectors[name])}
    convert(folder, tmp_path / "mean.gguf", imatrix=write_gguf(tmp_path / "i.gguf", asked, {name: counts.copy()}))
    counts[3] = 0
    done = convert(folder, tmp_path / "out.gguf", imatrix=write_gguf(tmp_path / "i.gguf", vectors, {name: counts}))
    assert done.few == [(name, 3, 0)]
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "mean.gguf").read_bytes()


def test_what_was_measured_on_halves_serves_the_fused_tensor(folder: Path, vectors: Vectors, tmp_path: Path) -> None:
    older = {name.replace("gate_up_exps", "gate_exps"): means for name, means in vectors.items()}
    for name, of in (("new", vectors), ("old", older)):
        convert(folder, tmp_path / f"{name}.gguf", imatrix=write_gguf(tmp_path / "i.gguf", of))
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


@pytest.mark.parametrize("with_means", [False, True])
def test_what_is_written_is_read_by_others_and_again(with_means: bool, vectors: Vectors, tmp_path: Path) -> None:
    counts = {name: np.arange(3000, 3000 + len(means), dtype=np.float32) for name, means in vectors.items()}
    sums = {name: Sums(means * counts[name][:, None], counts[name]) for name, means in vectors.items()}
    if with_means:
        sums = {name: Sums(s.squares, s.counts, s.counts[:, None] * np.sqrt(vectors[name])) for name, s in sums.items()}
    write_imatrix(tmp_path / "ours.gguf", sums, "some text", 7, 512, force=False)
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    told = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert told == {
        "general.type": "imatrix",
        "imatrix.datasets": ["some text"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 512,
    }
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == (2 + with_means) * len(vectors) and {t.tensor_type.name for t in reader.tensors} == {"F32"}
    for name, (squares, rows, inputs) in sums.items():
        assert tensors[f"{name}.in_sum2"].shape.tolist() == list(squares.shape[::-1])
        assert tensors[f"{name}.counts"].shape.tolist() == [1, len(rows)]
        np.testing.assert_array_equal(tensors[f"{name}.in_sum2"].data, squares)
        np.testing.assert_array_equal(tensors[f"{name}.counts"].data[:, 0], rows)
        if with_means:
            np.testing.assert_array_equal(tensors[f"{name}.in_sum"].data, inputs)
    again, straight = read_imatrix(tmp_path / "ours.gguf", EXPERTS), importance_of(Path("x"), sums, "some text", 7)
    assert (again.dataset, again.chunks) == ("some text", 7)
    for name, means in vectors.items():
        want = Wanted(name, "", "MATRIX", 0, (means.shape[1], 1, len(means)))
        for one, other in zip(again.of(want), straight.of(want), strict=True):
            assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))
        assert (again.of(want).mean is not None) == with_means


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


BAD: dict[str, tuple[Any, str]] = {
    "absent": (lambda file, v: file, "no such file"),
    "another GGUF": (lambda file, v: convert_to(file), "expected an imatrix, found a GGUF file of type 'model'"),
    "no imatrix": (lambda file, v: file.write_text("some text that is long enough"), "not an imatrix, or cut off"),
    "cut .dat": (lambda file, v: cut(write_dat(file, v)), "not an imatrix, or cut off"),
    "cut GGUF": (lambda file, v: cut(write_gguf(file, v)), "truncated"),
    "another model": (lambda file, v: write_gguf(file, {"blk.9.x.weight": np.ones((1, 4), np.float32)}), "no tensor"),
    "another size": (
        lambda file, v: write_gguf(file, v | {"blk.0.attn_q.weight": np.ones((1, 64), np.float32)}),
        "blk.0.attn_q.weight: expected 1 x 256 numbers, found 1 x 64",
    ),
    "other experts": (
        lambda file, v: write_gguf(file, v | {"blk.0.ffn_down_exps.weight": np.ones((4, 32), np.float32)}),
        "blk.0.ffn_down_exps.weight: expected 8 x 32 numbers, found 4 x 32",
    ),
    "other means": (
        lambda file, v: write_gguf(file, v, more={"blk.0.attn_q.weight.in_sum": np.ones((1, 64), np.float32)}),
        "blk.0.attn_q.weight.in_sum: expected 256 numbers, found 64",
    ),
    "means not finite": (
        lambda file, v: write_gguf(file, v, more={"blk.0.attn_q.weight.in_sum": np.full((1, 256), np.nan, np.float32)}),
        "blk.0.attn_q.weight: expected finite sums",
    ),
    "not finite": (
        lambda file, v: write_gguf(file, v | {"blk.0.attn_q.weight": np.full((1, 256), np.inf, np.float32)}),
        "blk.0.attn_q.weight: expected finite sums of squares",
    ),
    "negative": (
        lambda file, v: write_gguf(file, v | {"blk.0.attn_q.weight": np.full((1, 256), -1, np.float32)}),
        "blk.0.attn_q.weight: expected finite sums of squares",
    ),
}


def convert_to(file: Path) -> None:
    write_checkpoint(file.parent / "in", layers=1)
    convert(file.parent / "in", file, "q8_0")


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_serve_is_refused(
    case: str, folder: Path, vectors: Vectors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, complaint = BAD[case]
    make(tmp_path / "imatrix", vectors)
    err = refused(capsys, 1, folder, "-o", tmp_path / "out.gguf", "--imatrix", tmp_path / "imatrix")
    assert "imatrix: " in err and complaint in err and leftovers(tmp_path) == []


def test_the_command_takes_it(folder: Path, vectors: Vectors, tmp_path: Path, capsys: Any) -> None:
    imatrix = write_gguf(tmp_path / "i.gguf", vectors)
    code, out, err = run(capsys, folder, "-o", tmp_path / "out.gguf", "--imatrix", imatrix)
    assert (code, out) == (0, "") and "out.gguf: q4_k_m" in err
    code, out, _ = run(capsys, folder, "--imatrix", imatrix, "--dry-run")
    assert code == 0 and f"{(tmp_path / 'out.gguf').stat().st_size:,}" in out
