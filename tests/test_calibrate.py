"""dg-convert --calibrate: what it measures is what the layers see, and what it does with that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from measure.weight_types import BENCHES, calibrated
from support.checkpoints import FULL, read_safetensors_header, write_checkpoint, write_raw_safetensors
from support.converting import leftovers, refused, run

import dgemma
from dgemma._native import lib
from dgemma.convert import convert, plan
from dgemma.convert.calibrate import _observed, _read, measure, read_prompts
from dgemma.convert.names import wanted
from dgemma.convert.source import open_source
from dgemma.errors import FormatError, UsageError, new_error
from dgemma.files.output import unfinished

EXPERTS, TOP, LAYER = 6, 2, "model.decoder.layers.0."
PROMPTS = [f"the sky is {word}" for word in ("blue", "high", "wide", "near", "far", "red")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    write_checkpoint(folder, layers=2, hidden=128, experts=EXPERTS, top_k=TOP, canvas=32)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(PROMPTS))
    return file


# ---- What is measured ----


def norm(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def inputs(weights: dict[str, np.ndarray], canvas: np.ndarray) -> dict[str, list[np.ndarray]]:
    """What every matrix of a model of one layer, whose attention puts out nothing, is multiplied with: per expert."""
    w = {name.removeprefix(LAYER).removesuffix(".weight"): v.astype(np.float64) for name, v in weights.items()}
    table = w["model.decoder.embed_tokens"]
    d = table.shape[1]
    x = norm(table[canvas] * np.sqrt(d))
    normed = norm(x, w["input_layernorm"])
    found = {f"blk.0.attn_{n}.weight": [normed] for n in ("q", "k")}  # a full layer has no v
    dense = norm(x, w["pre_feedforward_layernorm"])
    hidden = gelu(dense @ w["mlp.gate_proj"].T) * (dense @ w["mlp.up_proj"].T)
    found |= {"blk.0.ffn_gate.weight": [dense], "blk.0.ffn_up.weight": [dense], "blk.0.ffn_down.weight": [hidden]}
    scores = norm(x) * w["router.scale"] / np.sqrt(d) @ w["router.proj"].T
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    sparse_in = norm(x, w["pre_feedforward_layernorm_2"])
    shares = np.exp(np.take_along_axis(scores, chosen, 1))
    shares = shares / shares.sum(axis=1, keepdims=True) * w["router.per_expert_scale"][chosen]
    sparse = np.zeros_like(x)
    found["blk.0.ffn_gate_up_exps.weight"], found["blk.0.ffn_down_exps.weight"] = [], []
    for e in range(EXPERTS):
        rows, slots = np.nonzero(chosen == e)
        gate, up = np.split(sparse_in[rows] @ w["experts.gate_up_proj"][e].T, 2, axis=1)
        inner = gelu(gate) * up
        found["blk.0.ffn_gate_up_exps.weight"].append(sparse_in[rows])
        found["blk.0.ffn_down_exps.weight"].append(inner)
        sparse[rows] += shares[rows, slots][:, None] * (inner @ w["experts.down_proj"][e].T)
    both = norm(hidden @ w["mlp.down_proj"].T, w["post_feedforward_layernorm_1"])
    both = norm(both + norm(sparse, w["post_feedforward_layernorm_2"]), w["post_feedforward_layernorm"])
    found["token_embd.weight"] = [norm((x + both) * w["layer_scalar"], w["model.decoder.norm"])]
    return found


@pytest.mark.parametrize(
    ("type_", "exact", "moved", "tolerance"),
    [("f32", True, 0, 1e-5), ("f32", False, 0, 1e-5), ("q8_0", False, 4, 0.15)],
)
def test_sums_are_those_of_what_the_layers_see(
    type_: str, exact: bool, moved: int, tolerance: float, tmp_path: Path
) -> None:
    """moved: rows that rounding may send to other experts."""
    folder = tmp_path / "one-layer"
    weights = write_checkpoint(
        folder, layer_types=[FULL], hidden=128, experts=EXPERTS, top_k=TOP, canvas=64, dtype="f32"
    )
    header, data = read_safetensors_header(folder / "model.safetensors")
    start, end = header[f"{LAYER}self_attn.o_proj.weight"]["data_offsets"]
    write_raw_safetensors(folder / "model.safetensors", header, data[:start] + bytes(end - start) + data[end:])
    convert(folder, tmp_path / "m.gguf", type_, overrides=[("blk.*ffn_gate_inp*", "f32")])
    canvas = np.random.default_rng(4).integers(0, 512, 64)
    with (
        open_source(tmp_path / "m.gguf") as source,
        dgemma.Model(tmp_path / "m.gguf", exact=exact) as model,
        model.session() as session,
    ):
        session.encode([2])
        with _observed(model) as observed:
            for _ in range(2):
                session.denoise(canvas)
            names = {want.gguf: want for want in wanted(source.config) if not want.is_float}
            found = {name: _read(observed, name, want) for name, want in names.items()}
    expected = inputs(weights, canvas)
    never = {name for name, sums in found.items() if not sums.squares.any()}
    assert never == {f"self_cond_{n}.weight" for n in ("gate", "up", "down")}  # a first step has no condition
    for name, rows in expected.items():
        squares, counts, sums = found[name]
        assert np.abs(counts - [2 * len(r) for r in rows]).max() <= moved, name
        truth = np.stack([2 * (r**2).sum(axis=0) for r in rows])
        assert np.abs(squares - truth).max() <= tolerance * truth.max(), name
        largest = np.sqrt(truth.max() * counts.max())  # that sums of so many rows with such squares can be
        assert np.abs(sums - np.stack([2 * r.sum(axis=0) for r in rows])).max() <= tolerance * largest, name


def test_a_model_that_was_observed_is_as_before(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", "q8_0")
    with dgemma.Model(tmp_path / "m.gguf") as model:
        pointer, error = model._open_handle().pointer, new_error()
        before = model.generate(PROMPTS[0], seed=3, max_tokens=64)
        with _observed(model):
            during = model.generate(PROMPTS[0], seed=3, max_tokens=64)
            assert lib.dg_profile_start(pointer, error) == lib.DG_OK
            profiled = model.generate(PROMPTS[0], seed=3, max_tokens=64)
        after = model.generate(PROMPTS[0], seed=3, max_tokens=64)
        lib.dg_profile_stop(pointer)
        assert during.ids == profiled.ids == after.ids == before.ids


def test_self_conditioning_and_every_layer_are_measured_for_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", "q8_0")
    with open_source(tmp_path / "m.gguf") as source:
        needed = wanted(source.config)
    one, three = (measure(tmp_path / "m.gguf", PROMPTS, needed, None, threads) for threads in (1, 3))
    assert one.passes > len(PROMPTS) and one.tokens > one.passes * one.canvas_length
    assert all(sums.squares.any() and sums.counts.any() for sums in one.sums.values())
    for name in one.sums:
        assert one.sums[name].squares.tobytes() == three.sums[name].squares.tobytes(), name
        assert one.sums[name].inputs.tobytes() == three.sums[name].inputs.tobytes(), name
        assert one.sums[name].counts.tolist() == three.sums[name].counts.tolist()
    rows = one.sums["blk.1.ffn_gate.weight"].counts[0]
    assert one.sums["blk.1.ffn_gate_up_exps.weight"].counts.sum() == TOP * rows

    seen: list[tuple[int, int]] = []
    some = measure(tmp_path / "m.gguf", PROMPTS, needed, 100, 1, lambda done, total: seen.append((done, total)))
    assert 100 <= some.tokens < 100 + some.canvas_length and seen[-1] == (100, 100)


# ---- What is made of it ----


def test_a_calibrated_file_is_what_its_saved_imatrix_gives(folder: Path, texts: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.gguf"
    convert(folder, tmp_path / "one.gguf", "q4_0", calibrate=texts, save_imatrix=saved, threads=1)
    convert(folder, tmp_path / "three.gguf", "q4_0", calibrate=texts, threads=3)
    convert(folder, tmp_path / "read.gguf", "q4_0", imatrix=saved)
    convert(folder, tmp_path / "plain.gguf", "q4_0")
    one, read, plain = (gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in ("one", "read", "plain"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one.tensors, read.tensors, strict=True))
    assert not all(np.array_equal(a.data, b.data) for a, b in zip(one.tensors, plain.tensors, strict=True))
    told = {name: f.contents() for name, f in one.fields.items() if name.startswith("quantize.")}
    matrices = len(gguf.GGUFReader(saved).tensors) // 3
    assert told["quantize.imatrix.dataset"] == "texts.txt" and told["quantize.imatrix.entries_count"] == matrices
    assert leftovers(tmp_path) == ["one.gguf", "plain.gguf", "read.gguf", "saved.gguf", "three.gguf"]


def test_a_gguf_source_runs_as_it_is_and_gives_the_same(folder: Path, texts: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "q8.gguf", "q8_0")
    convert(folder, tmp_path / "a.gguf", "q4_0", calibrate=texts, save_imatrix=tmp_path / "a.imatrix.gguf")
    convert(
        tmp_path / "q8.gguf", tmp_path / "b.gguf", "q4_0", calibrate=texts, save_imatrix=tmp_path / "b.imatrix.gguf"
    )
    assert (tmp_path / "a.imatrix.gguf").read_bytes() == (tmp_path / "b.imatrix.gguf").read_bytes()


def test_the_command_tells_who_saw_little_and_its_plan_has_the_size(
    folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [folder, "--calibrate", texts, "--type", "q4_0"]
    code, planned, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0 and leftovers(tmp_path) == []
    code, out, err = run(capsys, *arguments, "-o", tmp_path / "out.gguf", "--calibrate-tokens", 200)
    assert (code, out) == (0, "") and f"{(tmp_path / 'out.gguf').stat().st_size:,}" in planned
    assert err.startswith("filled up with their layer's mean") and "blk.1.ffn_down_exps: 0 (" in err
    assert leftovers(tmp_path) == ["out.gguf"]


def test_a_run_that_was_killed_leaves_what_the_next_one_removes(folder: Path, texts: Path, tmp_path: Path) -> None:
    texts.write_text("\n\n".join(PROMPTS * 500))
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "dgemma.convert.cli", folder, "-o", out, "--type", "q4_0", "--calibrate", texts]
    with subprocess.Popen([*map(str, command), "--calibrate-tokens", "100000000"]) as process:
        while not list(tmp_path.glob(".out.gguf.*.part/working.gguf")):
            assert process.poll() is None
            time.sleep(0.01)
        (at_work,) = unfinished(out)
        convert(folder, out, "q4_0")
        assert unfinished(out) == [at_work], "another conversion removes what a living one works with"
        process.send_signal(signal.SIGKILL)
    assert unfinished(out) == [at_work]
    convert(folder, out, "q4_0", force=True)
    assert leftovers(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_nothing(how: int, folder: Path, texts: Path, tmp_path: Path) -> None:
    texts.write_text("\n\n".join(PROMPTS * 500))
    stranger = tmp_path / ".out.gguf.working.part"
    stranger.write_text("mine")
    command = [sys.executable, "-m", "dgemma.convert.cli", folder, "-o", tmp_path / "out.gguf", "--calibrate", texts]
    with subprocess.Popen([*map(str, command), "--calibrate-tokens", "100000000"]) as process:
        while not list(tmp_path.glob(".out.gguf.*.part/working.gguf")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
    assert process.returncode == 128 + how and leftovers(tmp_path) == [stranger.name] and stranger.read_text() == "mine"


def test_calibrated_files_are_nearer_on_puzzles_that_were_not_seen(tmp_path: Path) -> None:
    """Mean KL of the bundled Sudoku model over two orders of its hidden dimensions.

    tests/measure/weight_types.py measures over twelve: calibrated is 0.51 of plain for q4_0, 0.56 for iq4_nl, and
    less in each of the twelve.
    """
    for found in calibrated(BENCHES[0], tmp_path, count=1, n_orders=2, threads=1, tokens=20_000):
        assert sum(found.calibrated) < 0.9 * sum(found.plain), found


# ---- What is read ----


def test_prompts_are_parted_by_blank_lines_or_are_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n \nthree \n\n\n\n\u00fcber\n")
    assert read_prompts(tmp_path / "a.txt") == ["one\ntwo", "three ", "\u00fcber"]
    messages = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": "one\n"}, {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_prompts(tmp_path / "a.jsonl") == ["one\n", messages]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", b"\n \n", "no prompt in it"),
        ("a.txt", b"ok\n\n\xff\xfe", "a.txt, line 3: not UTF-8 text: byte 0xff"),
        ("a.jsonl", b"", "no prompt in it"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "line 2: .* no JSON"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: expected"),
        ("a.jsonl", b"[]", "line 1: expected"),
        ("a.jsonl", b'{"messages": "x", "prompt": ["y"]}', "line 1: expected"),
    ],
)
def test_what_holds_no_prompts_is_refused(name: str, data: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=complaint):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--calibrate", "t.txt", "--imatrix", "i"], "--imatrix and --calibrate both"),
        (["--calibrate-tokens", "5"], "--calibrate-tokens needs --calibrate"),
        (["--save-imatrix", "i"], "--save-imatrix needs --calibrate"),
    ],
)
def test_flags_that_do_not_go_together(
    more: list[str], complaint: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert complaint in refused(capsys, 2, folder, "-o", tmp_path / "out.gguf", *more)


REFUSES = "{{ messages[0].content }}{% if 'no' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}"
ROLES = "{% for m in messages %}{{ {'user': 'U'}[m.role].lower() }}{% endfor %}"
UNASKABLE: dict[str, tuple[str, str, str | None, str]] = {
    "long": ("t.txt", "Hi\n\n \nso\n" + "the sky " * 600, None, "line 4: a prompt of 12"),
    "long, Windows": ("t.txt", "Hi\r\n\r\n\r\n" + "the sky " * 600, None, "line 4: a prompt of 12"),
    "long in lines": (
        "t.jsonl",
        '{"prompt": "Hi"}\n\n{"prompt": "' + "the sky " * 600 + '"}',
        None,
        "line 3: a prompt of 12",
    ),
    "long by its template": ("t.txt", "Hi", "{{ 'the sky ' * 600 }}", "line 1: a prompt of 12"),
    "refused": ("t.txt", "yes\n\nno", REFUSES, "line 3: the chat template refuses these messages: not this"),
    "role": ("t.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', ROLES, "line 1: the chat template"),
    "empty": ("t.txt", "Hi", "{{ '' }}", "line 1: a prompt of 0 tokens; expected 1 to the model's 1024"),
    "no JSON": ("t.jsonl", '{"prompt": "Hi"}\n{"prompt": ', None, "line 2: the line is no JSON"),
    "another field": ("t.jsonl", '{"prompt": "Hi"}\n{"text": "x"}', None, "line 2: expected"),
    "no message": ("t.jsonl", '{"messages": [{"content": "x"}]}', None, "line 1: "),
}


@pytest.mark.parametrize("case", UNASKABLE)
@pytest.mark.parametrize("source", ["folder", "GGUF"])
def test_a_prompt_that_cannot_be_asked_is_told_with_file_and_line_before_the_work(
    case: str, source: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text, template, complaint = UNASKABLE[case]
    write_checkpoint(tmp_path / "in", layers=1, **({} if template is None else {"chat_template": template}))
    (tmp_path / name).write_bytes(text.encode())
    of = tmp_path / "in"
    if source == "GGUF":
        convert(of, of := tmp_path / "in.gguf", "q8_0")
    monkeypatch.setattr("dgemma.convert.measure", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr("dgemma.convert.encoded", lambda *_: pytest.fail("the work began"))
    for more in (["-o", tmp_path / "out.gguf"], ["--dry-run"]):
        err = refused(capsys, 1, of, "--calibrate", tmp_path / name, *more)
        assert f"{tmp_path / name}, {complaint}" in err, err
    assert leftovers(tmp_path) == (["in.gguf"] if source == "GGUF" else [])


def test_a_prompt_may_be_as_long_as_the_context(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path / "in", layers=1, chat_template=None, context=64)
    for words, taken in ((63, True), (64, False)):  # and <bos>
        (tmp_path / "t.txt").write_text("the" + " the" * (words - 1))
        status, _, err = run(
            capsys, tmp_path / "in", "-o", tmp_path / "o.gguf", "--force", "--calibrate", tmp_path / "t.txt"
        )
        assert (status == 0) is taken and (taken or "a prompt of 65 tokens; expected 1 to the model's 64" in err), err


def test_an_absent_text_is_told_before_the_work(folder: Path, tmp_path: Path, capsys: Any) -> None:
    err = refused(capsys, 1, folder, "-o", tmp_path / "out.gguf", "--calibrate", tmp_path / "no.txt")
    assert "no.txt: no such file" in err
    with pytest.raises(UsageError, match="calibrate_tokens"):
        convert(folder, tmp_path / "out.gguf", calibrate=tmp_path / "no.txt", calibrate_tokens=0)
    assert plan(folder).file_bytes and leftovers(tmp_path) == []
