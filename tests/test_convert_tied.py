"""Weights that a checkpoint may hold twice or under another name: equal copies are taken as one, others refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import stored, write_checkpoint, write_safetensors
from support.converting import add_tensor, edit_json, leftovers, refused, rename_tensor, run, tensor_of

import dgemma
from dgemma.convert import convert, plan
from dgemma.convert import tied as tied_module
from dgemma.convert.safetensors import Checkpoint
from dgemma.convert.tied import compare_copies

EMBED, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
ENCODER = "model.encoder.language_model."
COPIES = {
    EMBED: [HEAD, ENCODER + "embed_tokens.weight"],
    "model.decoder.norm.weight": [ENCODER + "norm.weight"],
    "model.decoder.layers.0.self_attn.q_proj.weight": [ENCODER + "layers.0.self_attn.q_proj.weight"],
    "model.decoder.layers.1.input_layernorm.weight": [ENCODER + "layers.1.input_layernorm.weight"],
    "model.decoder.layers.1.experts.down_proj": [ENCODER + "layers.1.experts.down_proj"],
    "model.decoder.layers.0.router.per_expert_scale": [ENCODER + "layers.0.router.per_expert_scale"],
}
PAIRS = [(name, copy) for name, copies in COPIES.items() for copy in copies]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", layers=2)
    return tmp_path / "in"


def weights(file: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def changed(data: bytes) -> bytes:
    """The same bf16 values but the last one, which doubles."""
    values = np.frombuffer(data, np.uint16).copy()
    values[-1] += 0x80
    return values.tobytes()


@pytest.mark.parametrize(("name", "copy"), PAIRS)
def test_a_copy_that_differs_in_one_value_is_refused_and_both_are_named(
    name: str, copy: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    file = folder / "model.safetensors"
    dtype, shape, data = tensor_of(file, name)
    add_tensor(file, copy, dtype, shape, changed(data))
    err = refused(capsys, 1, folder, "-o", tmp_path / "out.gguf", "--type", "bf16", "--verify")
    assert f"tensor {copy} must equal {name}" in err and f"at {[n - 1 for n in shape]} it is" in err, err
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("name", "copy"), PAIRS)
def test_an_equal_copy_changes_nothing_and_is_told(
    name: str, copy: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    convert(folder, tmp_path / "without.gguf", "q8_0")
    file = folder / "model.safetensors"
    add_tensor(file, copy, *tensor_of(file, name))
    status, _, err = run(capsys, folder, "-o", tmp_path / "with.gguf", "--type", "q8_0")
    assert status == 0 and "1 tied copies, all equal" in err, err
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()
    _, out, _ = run(capsys, folder, "--dry-run")
    assert "tied copies                1  (compared before anything is written)" in out, out


@pytest.mark.parametrize(("name", "copy"), PAIRS)
def test_a_weight_that_is_there_under_its_other_name_alone_is_taken(
    name: str, copy: str, folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "one.gguf", "bf16")
    rename_tensor(folder / "model.safetensors", name, copy)
    convert(folder, tmp_path / "other.gguf", "bf16", verify=True)
    assert weights(tmp_path / "other.gguf") == weights(tmp_path / "one.gguf")


def test_all_copies_are_compared_with_what_is_written(folder: Path, tmp_path: Path) -> None:
    """Where two other names are all there is, one is taken, and must equal the other."""
    file = folder / "model.safetensors"
    dtype, shape, data = tensor_of(file, EMBED)
    rename_tensor(file, EMBED, HEAD)
    add_tensor(file, ENCODER + "embed_tokens.weight", dtype, shape, changed(data))
    with pytest.raises(dgemma.FormatError, match=f"{ENCODER}embed_tokens.weight must equal {HEAD}"):
        convert(folder, tmp_path / "out.gguf", "bf16")


def test_the_encoders_own_scalars_are_no_copies(folder: Path, tmp_path: Path) -> None:
    assert plan(folder, "bf16").copies == []
    rename_tensor(folder / "model.safetensors", "model.decoder.layers.0.layer_scalar", "lm_head.scalar")
    with pytest.raises(dgemma.FormatError, match=r"model\.decoder\.layers\.0\.layer_scalar is missing"):
        convert(folder, tmp_path / "out.gguf", "bf16")


@pytest.mark.parametrize("name", [ENCODER + "self_conditioning.pre_norm.weight", "lm_head.bias", ENCODER + "extra"])
def test_what_is_a_copy_of_nothing_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    add_tensor(folder / "model.safetensors", name, "BF16", [128], bytes(256))
    with pytest.raises(dgemma.FormatError, match=f"unknown tensor {name}"):
        convert(folder, tmp_path / "out.gguf", "bf16")


def test_a_copy_of_another_shape_or_of_a_type_without_values_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    add_tensor(file, HEAD, "BF16", [2, 128], bytes(512))
    with pytest.raises(dgemma.FormatError, match=rf"{HEAD}: expected shape \[512, 128\] from config.json, found"):
        convert(folder, tmp_path / "out.gguf", "bf16")
    write_checkpoint(folder, layers=2)
    add_tensor(file, HEAD, "F8_E4M3", [512, 128], bytes(512 * 128))
    with pytest.raises(dgemma.FormatError, match=f"{HEAD} is F8_E4M3"):
        convert(folder, tmp_path / "out.gguf", "bf16")


def test_a_checkpoint_that_says_it_is_untied_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    add_tensor(file, HEAD, *tensor_of(file, EMBED))
    edit_json(folder / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False))
    with pytest.raises(dgemma.FormatError, match="tie_word_embeddings is False"):
        convert(folder, tmp_path / "out.gguf", "bf16")


Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


def gguf_with(folder: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """A GGUF file of a checkpoint, with other tensors."""
    convert(folder, out.with_suffix(".in.gguf"), "bf16")
    source = gguf.GGUFReader(out.with_suffix(".in.gguf"))
    writer = gguf.GGUFWriter(out, "diffusion-gemma")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    tensors: Tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in source.tensors}
    change(tensors)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


OWN_HEAD, TABLE = "output.weight", "token_embd.weight"
Kind = gguf.GGMLQuantizationType


def as_kind(kind: gguf.GGMLQuantizationType, tensors: Tensors) -> np.ndarray:
    """The embedding in another type."""
    return gguf.quants.quantize(gguf.quants.dequantize(*tensors[TABLE]), kind)


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.F32])
def test_a_gguf_file_with_its_embedding_as_a_head_too_converts(
    kind: gguf.GGMLQuantizationType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = gguf_with(folder, tmp_path / "m.gguf", lambda t: t.update({OWN_HEAD: (as_kind(kind, t), kind)}))
    convert(tmp_path / "m.in.gguf", tmp_path / "expected.gguf", "q8_0")
    done = convert(source, tmp_path / "out.gguf", "q8_0", verify=True)
    assert len(done.plan.copies) == 1
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    with pytest.raises(dgemma.FormatError, match=f"'{OWN_HEAD}' beside '{TABLE}': .* dg-convert compares them"):
        dgemma.Model(source)


def test_a_gguf_file_with_quantised_copies_is_compared_by_values(folder: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        data = as_kind(Kind.Q8_0, tensors)
        tensors[TABLE] = (data, Kind.Q8_0)
        tensors[OWN_HEAD] = (gguf.quants.dequantize(data, Kind.Q8_0), Kind.F32)

    source = gguf_with(folder, tmp_path / "m.gguf", change)
    convert(source, tmp_path / "out.gguf", "q8_0")
    with dgemma.Model(tmp_path / "out.gguf", threads=1) as model:
        assert model.config.n_layer > 0


def test_a_gguf_file_with_a_head_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    def differ(tensors: Tensors) -> None:
        data = as_kind(Kind.F32, tensors)
        data[3, 5] += 1
        tensors[OWN_HEAD] = (data, Kind.F32)

    def shorter(tensors: Tensors) -> None:
        tensors[OWN_HEAD] = (as_kind(Kind.F32, tensors)[1:], Kind.F32)

    def unread(tensors: Tensors) -> None:
        rows, columns = as_kind(Kind.F32, tensors).shape
        tensors[OWN_HEAD] = (np.zeros((rows, columns // 32 * 17), np.uint8), Kind.MXFP4)

    for change, why in ((differ, r"at \[3, 5\] it is "), (shorter, "found F32 "), (unread, "found MXFP4 ")):
        source = gguf_with(folder, tmp_path / "m.gguf", change)
        with pytest.raises(dgemma.FormatError, match=rf"tensor output\.weight must equal token_embd\.weight, .*{why}"):
            convert(source, tmp_path / "out.gguf", "q8_0")
        assert not (tmp_path / "out.gguf").exists()
        (tmp_path / "m.in.gguf").unlink()


def test_a_gguf_file_with_the_head_alone_runs_and_converts(folder: Path, tmp_path: Path) -> None:
    source = gguf_with(folder, tmp_path / "m.gguf", lambda t: t.update({OWN_HEAD: t.pop(TABLE)}))
    convert(tmp_path / "m.in.gguf", tmp_path / "expected.gguf", "q8_0")
    convert(source, tmp_path / "out.gguf", "q8_0", verify=True)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    answers = []
    for path in (source, tmp_path / "m.in.gguf"):
        with dgemma.Model(path, threads=1) as model:
            answers.append(model.generate("Hi", steps=3, max_tokens=32).ids)
    assert answers[0] == answers[1]


def test_a_gguf_file_without_either_lacks_the_embedding(folder: Path, tmp_path: Path) -> None:
    source = gguf_with(folder, tmp_path / "m.gguf", lambda t: t.pop(TABLE))
    with pytest.raises(dgemma.FormatError, match=f"tensor '{TABLE}' is missing"):
        dgemma.Model(source)


FLOATS = ["bf16", "f16", "f32"]


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 59), st.integers(1, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_copies_of_any_types_are_equal_if_each_value_is(kept: str, copied: str, at: int, step: int, same: bool) -> None:
    """Values are told by where they are, whatever the slices that are read."""
    values = np.random.default_rng(at).integers(-100, 100, (5, 12)).astype(np.float32)
    others = values.copy()
    others.flat[at] += not same
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tied_module, "SLICE_VALUES", step)
        tensors = {"a": (kept, values), "b": (copied, others)}
        raw = {n: (dtype.upper(), (5, 12), stored(v, dtype)[0]) for n, (dtype, v) in tensors.items()}
        write_safetensors(Path(name) / "model.safetensors", raw)
        with Checkpoint(Path(name)) as found:
            done: list[int] = []
            pair = found.tensors["a"], found.tensors["b"]
            if same:
                compare_copies(found, [pair], done.append)
                assert sum(done) == pair[0].bytes + pair[1].bytes
            else:
                place = rf"\[{at // 12}, {at % 12}\]"
                with pytest.raises(dgemma.FormatError, match=f"tensor b must equal a, .* at {place}"):
                    compare_copies(found, [pair], done.append)
