"""NaN and infinity are found where they begin, and degenerate numbers do what is documented."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from fuzz.seeds import model as write_model
from support.commands import Inside

import dgemma
from dgemma.cli.run import main as run
from dgemma.model import bundled as bundled_path

NAN16, INF16, NAN32, INF32 = b"\x00\x7e", b"\x00\x7c", struct.pack("<f", np.nan), struct.pack("<f", np.inf)


@pytest.fixture(scope="module")
def offsets() -> dict[str, tuple[int, int, int]]:
    """Where each tensor of the bundled model lies: offset, bytes, bytes of a block."""
    sizes = {"F32": 4, "Q8_0": 34}
    reader = gguf.GGUFReader(bundled_path())
    return {t.name: (t.data_offset, t.n_bytes, sizes[t.tensor_type.name]) for t in reader.tensors}


def damage(path: Path, offsets: dict[str, tuple[int, int, int]], tensor: str, infinite: bool = False) -> Path:
    """The bundled model with NaN or infinity for the scale of a block in the middle of a tensor, or for a float."""
    at, size, block = offsets[tensor]
    data = bytearray(Path(bundled_path()).read_bytes())
    bad = {4: (NAN32, INF32), 34: (NAN16, INF16)}[block][infinite]
    at += size // block // 2 * block
    data[at : at + len(bad)] = bad
    path.write_bytes(data)
    return path


WHERE = [
    ("blk.3.attn_norm.weight", "layer 3: NaN or infinity in the normed input"),
    ("blk.3.attn_q.weight", "layer 3: NaN or infinity in the queries"),
    ("blk.3.attn_q_norm.weight", "layer 3: NaN or infinity in the queries"),
    ("blk.3.attn_k.weight", "layer 3: NaN or infinity in the keys"),
    ("blk.3.attn_v.weight", "layer 3: NaN or infinity in the values"),
    ("blk.5.attn_k.weight", "layer 5: NaN or infinity in the keys"),
    ("blk.3.attn_output.weight", "layer 3: NaN or infinity in the output of attention"),
    ("blk.3.ffn_gate.weight", "layer 3: NaN or infinity in the dense FFN"),
    ("blk.3.ffn_down.weight", "layer 3: NaN or infinity in the dense FFN"),
    ("blk.3.ffn_gate_inp.weight", "layer 3: NaN or infinity in the router"),
    ("blk.3.layer_output_scale.weight", "layer 3: NaN or infinity in the layer's output"),
    ("blk.0.enc_layer_output_scale.weight", "layer 0: NaN or infinity in the layer's output"),
    ("output_norm.weight", "NaN or infinity in the last norm"),
    ("self_cond_up.weight", "NaN or infinity in self-conditioning"),
    ("token_embd.weight", "NaN or infinity in the "),  # whichever meets the word first
]


@pytest.mark.parametrize(("tensor", "message"), WHERE, ids=[tensor for tensor, _ in WHERE])
def test_damaged_weights_are_named(tmp_path, offsets, tensor, message):
    for infinite, options in ((False, {}), (True, {}), (True, {"exact": True}), (False, {"backend": "reference"})):
        path = damage(tmp_path / "bad.gguf", offsets, tensor, infinite)
        with dgemma.Model(path, threads=1, **options) as model:
            with pytest.raises(dgemma.NumbersError) as raised:
                model.generate("123", steps=2, max_tokens=8, short_canvas=True)
            assert str(raised.value).startswith(f"{path}: {message}"), (infinite, options)
            assert "\n" not in str(raised.value)


def test_an_expert_that_is_damaged_is_found_once_it_is_chosen(tmp_path, offsets):
    at, size, block = offsets["blk.2.ffn_down_exps.weight"]
    data = bytearray(Path(bundled_path()).read_bytes())
    for i in range(at, at + size, block * 16):  # some of every expert
        data[i : i + 2] = NAN16
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    for options in ({}, {"exact": True}, {"backend": "reference"}, {"ram": "2G"}, {"repack": "1G"}):
        with (
            dgemma.Model(path, threads=1, **options) as model,
            pytest.raises(dgemma.NumbersError, match=r"layer 2: .* in the experts"),
        ):
            model.generate("123", steps=2)


def test_prompts_logits_and_batches_are_watched_too(tmp_path, offsets):
    last = damage(tmp_path / "last.gguf", offsets, "blk.5.attn_k.weight")
    with dgemma.Model(last) as model, model.session() as session:
        with pytest.raises(dgemma.NumbersError, match=r"layer 5: .* the keys"):
            session.encode([2, 7, 8])  # the last layer gives keys and values alone
        assert session.length == 0
    norm = damage(tmp_path / "norm.gguf", offsets, "output_norm.weight")
    with dgemma.Model(norm) as model, model.session() as one, model.session() as other:
        one.encode([2, 7, 8])
        other.encode([2, 7])
        for call in (
            lambda: one.encode([7], logits="all"),
            lambda: one.encode([7], logits="last"),
            lambda: one.denoise([5, 6, 7]),
            lambda: model.denoise([(one, [5, 6], None), (other, [5], None)]),
        ):
            with pytest.raises(dgemma.NumbersError, match="the last norm"):
                call()
        assert one.length == 3


def test_a_model_serves_others_after_it_found_nan(tmp_path, offsets):
    """What is found belongs to a pass: a session whose ids do not meet the damage works as before."""
    at, size, _ = offsets["token_embd.weight"]
    row = size // 64
    data = bytearray(Path(bundled_path()).read_bytes())
    data[at + 40 * row : at + 40 * row + 2] = NAN16
    path = tmp_path / "word.gguf"
    path.write_bytes(data)
    with dgemma.Model(path) as model, model.session() as session:
        with pytest.raises(dgemma.NumbersError, match="the embedding"):
            session.encode([2, 40, 7])
        session.encode([2, 39, 41, 7])
        assert session.length == 4
        with pytest.raises(dgemma.NumbersError, match="the logits"):  # its column is NaN for every row
            session.encode([7], logits="last")


def test_a_command_says_it_in_one_line(tmp_path, offsets, capsys):
    path = damage(tmp_path / "bad.gguf", offsets, "blk.1.attn_v.weight")
    err = Inside(run, "dg-run").refused(capsys, 1, path, "-p", "123")
    assert "layer 1: NaN or infinity in the values" in err


def test_a_condition_that_is_no_number_is_refused(bundled):
    with bundled.session() as session:
        session.encode([2, 7, 8])
        condition = np.zeros((2, 64), np.float32)
        for bad in (np.nan, np.inf):
            condition[1, 63] = bad
            with pytest.raises(dgemma.UsageError, match="condition: NaN or infinity in row 1"):
                session.denoise([5, 6], condition)
        condition[1, 63] = -np.inf  # a word without a share
        assert np.isfinite(session.denoise([5, 6], condition)).all()


# ---- Degenerate numbers ----

BACKENDS = [{}, {"exact": True}, {"backend": "reference"}]


@pytest.fixture(scope="module", params=["Q8_0", "F32"])
def small(request, tmp_path_factory):
    """Writes a small random model of this format: its path."""
    folder = tmp_path_factory.mktemp("small")

    def write(name: str, **shape) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            write_model(path, gguf.GGMLQuantizationType[request.param], layers=2, **shape)
        return path

    return write


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_all_equal_logits_have_the_entropy_of_chance_and_the_lowest_id(small, options):
    with dgemma.Model(small("alike", alike=True), **options) as model:
        with model.session() as session:
            session.encode([2, 7])
            logits = session.denoise([7, 8, 9])
        assert (logits == logits[:, :1]).all() and np.isfinite(logits).all()
        steps = [event for event in model.stream([2, 7], steps=3, confidence=0) if isinstance(event, dgemma.Step)]
        n = model.config.n_vocab
        for step in steps:
            assert (step.canvas == 0).all()
            assert step.entropy == pytest.approx(math.log(n), rel=1e-6)
            assert step.accepted.tolist() == [True, *[False] * 7]  # the lowest position of equals
        drawn = {int(step.next[0]) for seed in range(40) for step in [next(model.stream([2, 7], seed=seed))]}
        assert len(drawn) > n // 2  # the sample is not the argmax: any id may come


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_temperature_zero_takes_the_most_likely_token(small, options):
    with dgemma.Model(small("plain"), **options) as model:
        for step in model.stream([2, 7], t_min=0, t_max=0, steps=4, confidence=0, entropy_bound=1e9):
            if isinstance(step, dgemma.Step):
                assert step.temperature == pytest.approx(1e-4)
                assert step.entropy.max() < 0.01 and step.accepted.all()
                assert (step.next == step.canvas).all()
        assert model.generate([2, 7], t_min=0, t_max=0).ids == model.generate([2, 7], t_min=1e-4, t_max=1e-5).ids


def test_entropy_bound_zero_accepts_one_token_and_those_as_certain_as_can_be(small):
    with dgemma.Model(small("plain")) as model:
        for step in model.stream([2, 7], entropy_bound=0, steps=6, confidence=0):
            if isinstance(step, dgemma.Step):
                most = np.argsort(step.entropy, kind="stable").tolist()
                want = {most[0], *(i for i, at in enumerate(step.entropy) if at == 0)}
                assert set(np.flatnonzero(step.accepted)) == want


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_vocabulary_of_one_token(small, options):
    with dgemma.Model(small("one-word", tokens=["<unk>"], types=[2]), **options) as model:
        assert (model.config.n_vocab, model.config.end_ids) == (1, ())
        assert model.tokenizer.encode("any text") == [0]
        result = model.generate([0, 0], max_tokens=20)
        assert (result.ids, result.finish_reason, result.converged) == ([0] * 20, "length", True)
        with model.session() as session:
            session.encode([0])
            assert session.denoise([0, 0], np.zeros((2, 1), np.float32)).shape == (2, 1)


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_canvas_of_one_token(small, options):
    with dgemma.Model(small("narrow", canvas=1), **options) as model:
        result = model.generate([2, 7, 8], max_tokens=5, steps=3)
        assert 0 <= len(result.ids) <= 5 and all(block.tokens <= 1 for block in result.blocks)
        assert [sum(block.tokens for block in result.blocks)] == [len(result.ids)]
        assert model.generate([2, 7, 8], canvas=[9], pinned=[True]).ids == [9]
    with dgemma.Model(small("plain"), **options) as model:  # and one cut to a token
        assert len(model.generate([2, 7], max_tokens=1, short_canvas=True, steps=2).ids) <= 1


def test_a_prompt_of_nothing_is_refused(small):
    with dgemma.Model(small("plain")) as model, model.session() as session:
        for prompt in ("", [], np.array([], np.int64)):
            with pytest.raises(dgemma.UsageError, match="empty prompt"):
                model.generate(prompt)
            with pytest.raises(dgemma.UsageError, match="empty prompt"):
                session.generate(prompt)
        with pytest.raises(dgemma.UsageError, match="empty prompt: nothing is encoded"):
            session.generate()
        with pytest.raises(dgemma.UsageError, match="no ids"):
            session.encode([])
        assert session.denoise([5, 6]).shape == (2, 16)  # the mathematics alone needs no prompt
