"""dg-convert: what it refuses, with one line that names the file, the tensor or the flag."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FULL, SLIDING, read_safetensors_header, write_checkpoint, write_raw_safetensors
from support.converting import edit_json, leftovers, refused

import dgemma
from dgemma.convert import convert
from dgemma.convert.safetensors import Checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint to damage: one sliding and one full layer."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, layers=2)
    return folder


Damage = Callable[[Path], object]


def text_config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(changes))


def top_config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def generation(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "generation_config.json", lambda c: c.update(changes))


def tokenizer(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "tokenizer.json", lambda t: t.update(changes))


def tokenizer_model(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "tokenizer.json", lambda t: t["model"].update(changes))


def header(change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Damage:
    """Changes the header of model.safetensors."""

    def damage(folder: Path) -> None:
        found, data = read_safetensors_header(folder / "model.safetensors")
        change(found)
        write_raw_safetensors(folder / "model.safetensors", found, data + more)

    return damage


def entry(name: str, **changes: Any) -> Damage:
    return header(lambda h: h[name].update(changes))


def raw(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def reshard(folder: Path, then: Callable[[Path], object]) -> None:
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, layers=2, shards=3)
    then(folder)


def lose_shard(folder: Path) -> None:
    reshard(folder, remove("model-00002-of-00003.safetensors"))


def lose_shard_and_index(folder: Path) -> None:
    reshard(folder, remove("model.safetensors.index.json"))
    (folder / "model-00003-of-00003.safetensors").unlink()


def promise_what_is_not_there(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.decoder.norm.weight"] = "model-00003-of-00003.safetensors"

    reshard(folder, lambda f: edit_json(f / "model.safetensors.index.json", change))


def point_outside(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.decoder.norm.weight"] = "../elsewhere.safetensors"

    reshard(folder, lambda f: edit_json(f / "model.safetensors.index.json", change))


def not_a_number(folder: Path) -> None:
    found, data = read_safetensors_header(folder / "model.safetensors")
    start = found["model.decoder.norm.weight"]["data_offsets"][0]
    write_raw_safetensors(folder / "model.safetensors", found, data[:start] + b"\xc0\x7f" + data[start + 2 :])


EMBED, NORM = "model.decoder.embed_tokens.weight", "model.decoder.norm.weight"
EXTRA = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def extra_tensor(name: str) -> Damage:
    def change(found: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in found.items() if n != "__metadata__")
        found[name] = EXTRA | {"data_offsets": [end, end + 4]}

    return header(change, b"\0\0\0\0")


BAD: dict[str, tuple[Damage, list[str]]] = {
    # the folder
    "no config": (remove("config.json"), ["config.json: no such file"]),
    "config no json": (raw(lambda b: b[:-9], "config.json"), ["config.json: not a JSON file"]),
    "config a list": (raw(lambda _: b"[]", "config.json"), ["config.json: expected a JSON object"]),
    "no weights": (remove("model.safetensors"), ["no model.safetensors"]),
    "no tokenizer": (remove("tokenizer.json"), ["neither tokenizer.json nor tokenizer.model"]),
    "missing shard": (lose_shard, ["model-00002-of-00003.safetensors: this shard of the checkpoint is missing"]),
    "missing shard, no index": (lose_shard_and_index, ["model-00003-of-00003.safetensors: this shard"]),
    "index promises": (promise_what_is_not_there, ["model-00003-of-00003.safetensors", NORM, "index"]),
    "index points outside": (point_outside, ["index.json", "../elsewhere.safetensors"]),
    "an adapter beside it": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ["adapter_config.json: this adapter would be left out"],
    ),
    # safetensors
    "unknown tensor": (
        extra_tensor("model.decoder.extra"),
        ["model.safetensors", "unknown tensor model.decoder.extra"],
    ),
    "missing tensor": (header(lambda h: h.update({"norm.weight": h.pop(NORM)})), [f"tensor {NORM} is missing"]),
    "missing table": (header(lambda h: h.update({"head.weight": h.pop(EMBED)})), [f"tensor {EMBED} is missing"]),
    "truncated": (raw(lambda b: b[:-100]), ["model.safetensors: expected", "found a file of"]),
    "something behind": (raw(lambda b: b + b"x"), ["model.safetensors: expected", "found a file of"]),
    "empty": (raw(lambda _: b""), ["model.safetensors: not a safetensors file"]),
    "header length lies": (raw(lambda b: b"\xff" * 8 + b[8:]), ["not a safetensors file, or cut off"]),
    "header length short": (raw(lambda b: b"\x40" + b"\0" * 7 + b[8:]), ["the safetensors header is damaged"]),
    "header no json": (raw(lambda b: b[:8] + b"\xfe" + b[9:]), ["the safetensors header is damaged"]),
    "offsets overlap": (entry(NORM, data_offsets=[0, 256]), ["tensor", "starts at byte"]),
    "offsets reversed": (entry(NORM, data_offsets=[256, 0]), [NORM, "data_offsets say -256"]),
    "offsets missing": (entry(NORM, data_offsets=None), [NORM, "data_offsets are None"]),
    "shape too big": (entry(NORM, shape=[1 << 62, 4]), [NORM, "takes"]),
    "shape negative": (entry(NORM, shape=[-128]), [NORM, "its shape is"]),
    "another shape": (entry(NORM, shape=[64, 2]), [NORM, "expected shape [128]", "found [64, 2]"]),
    "another dtype": (entry(NORM, dtype="I16"), [NORM, "is I16"]),
    "unknown dtype": (entry(NORM, dtype="Q17"), [NORM, "'Q17'"]),
    "not finite": (not_a_number, [NORM, "not finite"]),
    # config.json
    "another model": (top_config(model_type="gemma3"), ["a model of another architecture", "'gemma3'"]),
    "no text_config": (top_config(text_config=None), ["text_config"]),
    "quantized": (top_config(quantization_config={"bits": 4}), ["quantization_config"]),
    "quantized by mlx": (top_config(quantization={"bits": 4}), ["config.json: quantization: only checkpoints in"]),
    "unknown option": (text_config(attn_logit_softcapping=50.0), ["text_config: attn_logit_softcapping is 50.0"]),
    "unknown rope option": (
        text_config(rope_parameters={FULL: {"rope_theta": 1e6, "attention_factor": 0.5}, SLIDING: {"rope_theta": 1e4}}),
        ["rope_parameters: full_attention: attention_factor is 0.5"],
    ),
    "sliding at last": (text_config(layer_types=[FULL, SLIDING]), ["the last layer is 'sliding_attention'"]),
    "untied": (top_config(tie_word_embeddings=False), ["tie_word_embeddings"]),
    "bias": (text_config(attention_bias=True), ["attention_bias"]),
    "activation": (text_config(hidden_activation="silu"), ["hidden_activation", "'silu'", "'gelu_pytorch_tanh'"]),
    "canvas beyond the limit": (
        top_config(canvas_length=65536),
        ["config.json: diffusion.canvas_length would be 65536; the runtime takes 1 to 4096"],
    ),
    "experts beyond the limit": (text_config(num_experts=1 << 20), ["expert_count would be 1048576", "1 to 1024"]),
    "steps beyond the limit": (
        generation(max_denoising_steps=1 << 20),
        ["generation_config.json: diffusion.eb_max_steps would be 1048576"],
    ),
    "shared KV layers": (text_config(num_kv_shared_layers=2), ["num_kv_shared_layers"]),
    "per-layer input": (text_config(hidden_size_per_layer_input=256), ["hidden_size_per_layer_input"]),
    "bidirectional prompt": (text_config(use_bidirectional_attention="all"), ["use_bidirectional_attention"]),
    "no softcap": (text_config(final_logit_softcapping=None), ["final_logit_softcapping"]),
    "layer types": (text_config(layer_types=["linear_attention", FULL]), ["layer 0 is 'linear_attention'"]),
    "too few layer types": (text_config(layer_types=[FULL]), ["layer_types: expected a list of 2"]),
    "too many layers": (text_config(num_hidden_layers=100_000), ["num_hidden_layers", "at most 256"]),
    "no layers": (text_config(num_hidden_layers=0), ["num_hidden_layers"]),
    "a word for a number": (text_config(hidden_size="many"), ["hidden_size", "'many'"]),
    "another size": (text_config(hidden_size=256), ["expected shape", "found"]),
    "uneven heads": (text_config(num_attention_heads=3), ["heads"]),
    "layer out of range": (text_config(per_layer_config={"9": {}}), ["per_layer_config", "'9'"]),
    "per-layer option": (
        text_config(per_layer_config={"1": {"hidden_size": 5}}),
        ["per_layer_config: 1", "hidden_size"],
    ),
    "rope type": (
        text_config(rope_parameters={FULL: {"rope_type": "yarn", "rope_theta": 1.0}}),
        ["rope_parameters", "'yarn'"],
    ),
    "partial sliding rope": (
        text_config(
            rope_parameters={
                FULL: {"rope_type": "default", "rope_theta": 1e6},
                SLIDING: {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            }
        ),
        ["sliding_attention", "partial_rotary_factor"],
    ),
    # generation_config.json
    "another sampler": (
        generation(sampler_config={"_cls_name": "Other", "entropy_bound": 1}),
        ["_cls_name", "'Other'"],
    ),
    "no steps": (generation(max_denoising_steps=0), ["max_denoising_steps"]),
    "infinite temperature": (generation(t_max=float("inf")), ["t_max"]),
    "end id out of range": (generation(eos_token_id=[1, 512]), ["eos_token_id", "512"]),
    # tokenizers
    "unigram": (
        tokenizer(model={"type": "Unigram", "vocab": []}),
        ["tokenizer.json: expected a BPE model", "'Unigram'"],
    ),
    "id out of range": (tokenizer_model(vocab={"a": 512}), ["'a'", "512"]),
    "one id twice": (tokenizer_model(vocab={"a": 1, "b": 1}), ["'a'", "'b'"]),
    "half a merge": (tokenizer_model(merges=[["a", "b"], ["c"]]), ["merge 1"]),
    "a space in a merge": (tokenizer_model(merges=[["a b", "c"]]), ["merge 0", "space"]),
    "byte-level": (tokenizer(pre_tokenizer={"type": "ByteLevel"}), ["pre_tokenizer 'ByteLevel'"]),
    "lowercase": (tokenizer(normalizer={"type": "Lowercase"}), ["normalizer 'Lowercase'"]),
    "no such bos": (
        lambda folder: edit_json(folder / "tokenizer_config.json", lambda t: t.update(bos_token="<s>")),
        ["tokenizer_config.json: bos_token is '<s>'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    case: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = BAD[case]
    damage(checkpoint)
    err = refused(capsys, 1, checkpoint, "-o", tmp_path / "out.gguf")
    assert all(word in err for word in words), err
    assert leftovers(tmp_path) == []


def test_options_that_change_no_number_are_taken(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    """As transformers, and programs that train with it, write them."""
    convert(checkpoint, tmp_path / "plain.gguf", "q8_0")
    more = {
        "attention_dropout": 0.1,
        "dtype": "bfloat16",
        "initializer_range": 0.02,
        "use_cache": True,
        "unsloth_fixed": 1,
    }
    more |= {"_name_or_path": "", "eot_token_id": 6, "output_attentions": False, "unheard_of": None, "sep_token_id": 7}
    text_config(**more)(checkpoint)
    top_config(transformers_version="5.24.0", audio_token_id=3, unsloth_version="1", quantization_config=None)(
        checkpoint
    )
    convert(checkpoint, tmp_path / "more.gguf", "q8_0")
    assert (tmp_path / "more.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "SOURCE"),
        (["{in}"], 2, "-o FILE"),
        (["{in}", "-o", "{out}", "--type", "q3_k_xl"], 2, "--type"),
        (["{in}", "-o", "{out}", "--threads", "0"], 2, "--threads"),
        (["{in}", "-o", "{out}", "--calibrate", "x"], 1, "x: no such file"),
        (["{in}", "-o", "{out}", "--imatrix", "x"], 1, "x: no such file"),
        (["{in}", "{in}", "-o", "{out}"], 2, "argument"),
        (["{in}/nowhere", "-o", "{out}"], 1, "nowhere: no such folder or file"),
        (["{in}/config.json", "-o", "{out}"], 1, "config.json: expected the folder"),
        (["{in}", "-o", "{in}/no/such/out.gguf"], 1, "there is no folder"),
        (["{in}", "-o", "{in}", "--force"], 1, "this is a folder; name a file"),
        (["{in}", "-o", "{in}/config.json/out.gguf"], 1, "there is no folder"),
        (["{in}", "-o", "{in}/no/out.gguf", "--split-max-size", "1M"], 1, "there is no folder"),
        (["{in}", "-o", "/dev/full", "--force"], 1, "/dev/full: not a regular file"),
        (["{in}", "-o", "{in}/config.json", "--force"], 2, "config.json: this is SOURCE"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_failure_with_1(
    arguments: list[str], code: int, complaint: str, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.gguf"
    filled = [a.replace("{in}", str(checkpoint)).replace("{out}", str(out)) for a in arguments]
    assert complaint in refused(capsys, code, *filled)
    assert leftovers(tmp_path) == leftovers(checkpoint) == []


# Root may write anywhere, unless it gives that up; and may mount what nobody can write to.
NO_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
UNWRITABLE = {
    "no permission": [*NO_PRIVILEGE, "sh", "-c", 'chmod 555 "$0" && exec "$@"'],
    "read-only file system": [
        *("unshare", "-rm", "sh", "-c"),
        'mount -t tmpfs none "$0" && mount -o remount,ro "$0" || exit 99; exec "$@"',
    ],
}
FLAGS = [
    ["-o", "{no}/out.gguf"],
    ["-o", "{no}/out.gguf", "--split-max-size", "100K"],
    ["-o", "{yes}/out.gguf", "--calibrate", "{yes}/texts", "--save-imatrix", "{no}/i.gguf"],
]


@pytest.mark.parametrize("case", UNWRITABLE)
@pytest.mark.parametrize("flags", FLAGS)
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    case: str, flags: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    no = tmp_path / "no"
    no.mkdir()
    (tmp_path / "texts").write_text("the sky")
    command = [sys.executable, "-m", "dgemma.convert.cli", checkpoint, *(f.format(no=no, yes=tmp_path) for f in flags)]
    wrapped = [*UNWRITABLE[case], no, *command]
    if shutil.which(str(wrapped[0])) is None:
        pytest.skip(f"no {wrapped[0]} here")
    done = subprocess.run(list(map(str, wrapped)), capture_output=True, text=True)
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip(f"no file systems of one's own here: {done.stderr}")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f"no file can be made in {no}" in done.stderr, done.stderr
    no.chmod(0o755)
    assert leftovers(tmp_path) == leftovers(no) == []


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_no_safetensors_file_whatever_its_bytes_does_more_than_fail(noise: bytes, at: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": EXTRA | {"data_offsets": [8, 12]}}
        write_raw_safetensors(file, header, bytes(12))
        whole = file.read_bytes()
        for data in (noise, whole[:at] + noise + whole[at + cut :], whole[: len(whole) - cut]):
            file.write_bytes(data)
            try:
                with Checkpoint(Path(name)) as found:
                    assert all(t.offset + t.bytes <= len(data) for t in found.tensors.values())
            except dgemma.FormatError as refusal:
                assert "model.safetensors" in str(refusal)
