"""dg-convert: what its --help and the GGUF facts promise. gguf-py is the independent reader."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import (
    MARKS,
    REAL,
    SPECIAL,
    TEMPLATE,
    read_safetensors_header,
    shapes,
    tokenizer_parts,
    write_checkpoint,
    write_json,
    write_raw_safetensors,
    write_tokenizer,
)
from support.converting import edit_json, leftovers, refused, run

import dgemma
from dgemma._native import ffi, lib
from dgemma.convert import convert, plan
from dgemma.convert import encode as encode_module
from dgemma.convert.recipe import RECIPES, more_bits
from dgemma.convert.safetensors import Checkpoint
from dgemma.units import size_text

SUDOKU = Path(__file__).parent / "models" / "sudoku"
COMMAND = [sys.executable, "-m", "dgemma.convert.cli"]

# The tensors of a layer as the GGUF facts list them: GGUF name -> checkpoint name.
LAYER = {
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "layer_output_scale.weight": "layer_scalar",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
}
TOP = {
    "output_norm.weight": "model.decoder.norm.weight",
    "rope_freqs.weight": "",
    "self_cond_down.weight": "model.decoder.self_conditioning.down_proj.weight",
    "self_cond_gate.weight": "model.decoder.self_conditioning.gate_proj.weight",
    "self_cond_pre_norm.weight": "model.decoder.self_conditioning.pre_norm.weight",
    "self_cond_up.weight": "model.decoder.self_conditioning.up_proj.weight",
    "token_embd.weight": "model.decoder.embed_tokens.weight",
}


def expected_names(layers: int) -> dict[str, str]:
    """GGUF name -> checkpoint name, in the order of the file."""
    names = dict(TOP)
    for i in range(layers):
        layer = {f"blk.{i}.{name}": f"model.decoder.layers.{i}.{hf}" for name, hf in LAYER.items()}
        layer[f"blk.{i}.enc_layer_output_scale.weight"] = f"model.encoder.language_model.layers.{i}.layer_scalar"
        names |= dict(sorted(layer.items()))
    return names


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    return folder, write_checkpoint(folder, vision=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage: one sliding and one full layer."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, layers=2)
    return folder


# ---- what the file holds ----


def test_every_metadata_key_has_its_type_and_value_in_the_order_of_the_table(source: Any, tmp_path: Path) -> None:
    folder, weights = source
    convert(folder, tmp_path / "out.gguf", "q8_0")
    experts = sum(w.size for name, w in weights.items() if ".experts." in name)
    shared = sum(w.size for w in weights.values()) - experts + 32  # the last are rope_freqs
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tokens, merges = tokenizer_parts(512)
    kinds = [3] * len(SPECIAL) + [4] * len(MARKS) + [1] * 3 + [6] * 256
    kinds += [1] * (len(tokens) - len(kinds))
    expected: list[tuple[str, str, Any]] = [
        ("general.architecture", "STRING", "diffusion-gemma"),
        ("general.type", "STRING", "model"),
        ("general.name", "STRING", "tiny-model"),
        ("general.size_label", "STRING", gguf.size_label(shared + experts, shared, experts // 8, 8)),
        ("diffusion-gemma.block_count", "UINT32", 6),
        ("diffusion-gemma.context_length", "UINT32", 1024),
        ("diffusion-gemma.embedding_length", "UINT32", 128),
        ("diffusion-gemma.feed_forward_length", "UINT32", 96),
        ("diffusion-gemma.attention.head_count", "UINT32", 4),
        ("diffusion-gemma.attention.head_count_kv", "INT32[]", [2, 2, 2, 2, 2, 1]),
        ("diffusion-gemma.rope.freq_base", "FLOAT32", 1e6),
        ("diffusion-gemma.rope.freq_base_swa", "FLOAT32", 1e4),
        ("diffusion-gemma.attention.layer_norm_rms_epsilon", "FLOAT32", 1e-6),
        ("diffusion-gemma.expert_count", "UINT32", 8),
        ("diffusion-gemma.expert_used_count", "UINT32", 2),
        ("diffusion-gemma.attention.key_length", "UINT32", 64),
        ("diffusion-gemma.attention.value_length", "UINT32", 64),
        ("diffusion-gemma.final_logit_softcapping", "FLOAT32", 30.0),
        ("diffusion-gemma.attention.sliding_window", "UINT32", 16),
        ("diffusion-gemma.attention.shared_kv_layers", "UINT32", 0),
        ("diffusion-gemma.embedding_length_per_layer_input", "UINT32", 0),
        ("diffusion-gemma.attention.sliding_window_pattern", "BOOL[]", [True] * 5 + [False]),
        ("diffusion-gemma.attention.key_length_swa", "UINT32", 32),
        ("diffusion-gemma.attention.value_length_swa", "UINT32", 32),
        ("diffusion-gemma.expert_feed_forward_length", "UINT32", 32),
        ("diffusion-gemma.rope.dimension_count", "UINT32", 64),
        ("diffusion-gemma.rope.dimension_count_swa", "UINT32", 32),
        ("diffusion-gemma.attention.causal", "BOOL", False),
        ("diffusion.canvas_length", "UINT32", 32),
        ("diffusion.eb_max_steps", "UINT32", 48),
        ("diffusion.eb_stability_threshold", "UINT32", 1),
        ("diffusion.eb_t_min", "FLOAT32", 0.4),
        ("diffusion.eb_t_max", "FLOAT32", 0.8),
        ("diffusion.eb_entropy_bound", "FLOAT32", 0.1),
        ("diffusion.eb_confidence_threshold", "FLOAT32", 0.005),
        ("diffusion-gemma.end_token_ids", "UINT32[]", [1, 6]),
        ("tokenizer.ggml.model", "STRING", "gemma4"),
        ("tokenizer.ggml.tokens", "STRING[]", tokens),
        ("tokenizer.ggml.scores", "FLOAT32[]", [-1000.0] * len(tokens)),
        ("tokenizer.ggml.token_type", "INT32[]", kinds),
        ("tokenizer.ggml.merges", "STRING[]", [f"{left} {right}" for left, right in merges]),
        ("tokenizer.ggml.bos_token_id", "UINT32", 2),
        ("tokenizer.ggml.eos_token_id", "UINT32", 1),
        ("tokenizer.ggml.unknown_token_id", "UINT32", 3),
        ("tokenizer.ggml.padding_token_id", "UINT32", 0),
        ("tokenizer.ggml.mask_token_id", "UINT32", 4),
        ("tokenizer.chat_template", "STRING", TEMPLATE),
        ("tokenizer.ggml.add_space_prefix", "BOOL", False),
        ("tokenizer.ggml.add_bos_token", "BOOL", True),
        ("general.quantization_version", "UINT32", 2),
        ("general.file_type", "UINT32", 7),
    ]
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    found = [(f.name, f.types[-1].name + "[]" * (len(f.types) - 1), f.contents()) for f in fields]
    assert [(name, kind) for name, kind, _ in found] == [(name, kind) for name, kind, _ in expected]
    for (name, kind, value), (_, _, wanted) in zip(found, expected, strict=True):
        if kind.startswith("FLOAT32"):
            assert np.array_equal(np.float32(value), np.float32(wanted)), name
        else:
            assert value == wanted, name
    table = []
    while entry := lib.dg_key_at(len(table)):
        table.append(ffi.string(entry.key).decode())
    assert [name for name, _, _ in found] == table


@pytest.mark.parametrize("type_", RECIPES)
def test_the_runtime_opens_every_type_and_the_file_says_which_it_is(type_: str, source: Any, tmp_path: Path) -> None:
    done = convert(source[0], tmp_path / "out.gguf", type_)
    assert (tmp_path / "out.gguf").stat().st_size == done.plan.file_bytes
    number = gguf.GGUFReader(tmp_path / "out.gguf").fields["general.file_type"].contents()
    numbers = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15, "q4_dense8": 15}
    numbers |= {"q5_k_m": 17, "q5_dense8": 17, "q6_k": 18, "iq4_nl": 25, "bf16": 32}
    assert number == numbers[type_]
    with dgemma.Model(tmp_path / "out.gguf") as model:
        assert (model.config.n_layer, model.config.n_vocab, model.config.end_ids) == (6, 512, (1, 6))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_f32_holds_the_checkpoints_values_exactly(dtype: str, tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "in", dtype=dtype)
    convert(tmp_path / "in", tmp_path / "out.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    names = expected_names(6)
    del names["blk.5.attn_v.weight"]  # a full layer's values are its keys
    assert [tensor.name for tensor in reader.tensors] == list(names)
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0 and tensor.tensor_type.name == "F32"
        if names[tensor.name]:
            assert np.array_equal(tensor.data, weights[names[tensor.name]]), tensor.name
            assert list(tensor.shape) == list(weights[names[tensor.name]].shape[::-1]), tensor.name


@pytest.mark.parametrize("type_", sorted(RECIPES.keys() - {"f32"}))
def test_another_reader_decodes_what_was_encoded(type_: str, tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "in", layers=2, hidden=256)
    convert(tmp_path / "in", tmp_path / "out.gguf", type_)
    worst = {"BF16": 0, "F16": 1e-3, "Q8_0": 0.008, "Q6_K": 0.025, "Q5_K": 0.05, "Q5_1": 0.05, "Q5_0": 0.06}
    names = expected_names(2)
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if names[tensor.name]:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            wanted = weights[names[tensor.name]]
            error = np.sqrt(np.mean((values - wanted) ** 2) / np.mean(wanted**2))
            most = 0 if tensor.tensor_type.name == "F32" else worst.get(tensor.tensor_type.name, 0.12)
            assert error <= most, (tensor.name, tensor.tensor_type.name, error)


def test_a_bf16_checkpoint_keeps_its_bytes_in_a_bf16_file(source: Any, tmp_path: Path) -> None:
    folder, _ = source
    convert(folder, tmp_path / "out.gguf", "bf16")
    header, data = read_safetensors_header(folder / "model.safetensors")
    names = expected_names(6)
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.tensor_type.name == "BF16":
            start, end = header[names[tensor.name]]["data_offsets"]
            assert tensor.data.tobytes() == data[start:end], tensor.name


@pytest.mark.parametrize(("factor", "turning"), [(0.25, 8), (0.5, 16), (1.0, 32), (0.0, 0)])
def test_rope_freqs_stop_the_pairs_that_do_not_turn(factor: float, turning: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", layers=1, rotary_factor=factor)
    convert(tmp_path / "in", tmp_path / "out.gguf", "bf16")
    [made] = [t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight"]
    assert made.tensor_type.name == "F32"
    assert np.array_equal(made.data, np.float32([1.0] * turning + [1e30] * (32 - turning)))


# ---- the real model's shapes ----


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published checkpoint's config.json and headers; its weights are a hole in a sparse file."""
    folder = tmp_path_factory.mktemp("real")
    write_json(folder / "config.json", {"model_type": "diffusion_gemma", "text_config": REAL})
    write_tokenizer(folder, 262144)
    header, offset = {}, 0
    for name, shape in shapes(REAL, REAL["layer_types"]).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    write_raw_safetensors(folder / "model.safetensors", header, b"")
    start = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", start + offset)
    return folder


# File sizes of the published table, less its header of 15,824,736 bytes.
@pytest.mark.parametrize(
    ("type_", "data_bytes", "histogram"),
    [
        ("bf16", 50_540_834_528 - 15_824_736, {"F32": 423, "BF16": 269}),
        ("q8_0", 26_863_006_592, {"F32": 423, "Q8_0": 269}),
        ("q6_k", 22_654_490_592 - 15_824_736, {"F32": 423, "Q6_K": 208, "Q8_0": 61}),
        ("q5_k_m", 19_145_543_392 - 15_824_736, {"F32": 423, "Q5_K": 194, "Q5_1": 33, "Q8_0": 28, "Q6_K": 14}),
        ("q4_k_m", 16_790_985_600, {"F32": 423, "Q4_K": 194, "Q5_0": 33, "Q8_0": 28, "Q6_K": 14}),
        ("q4_k_s", 15_475_619_552 - 15_824_736, {"F32": 423, "Q4_K": 203, "Q5_0": 55, "Q5_1": 6, "Q5_K": 4, "Q6_K": 1}),
        ("q4_dense8", None, {"F32": 423, "Q8_0": 209, "Q4_K": 30, "Q5_0": 30}),
        ("q5_dense8", None, {"F32": 423, "Q8_0": 209, "Q5_K": 30, "Q5_1": 30}),
    ],
)
def test_recipes_give_the_published_sizes(
    type_: str, data_bytes: int | None, histogram: dict[str, int], real: Path
) -> None:
    todo = plan(real, type_)
    assert {name: count for name, (count, _) in todo.histogram().items()} == histogram
    assert data_bytes in (None, todo.data_bytes)
    assert b"128x2.6B" in todo.parts[0].header[:400]


def test_the_table_of_types_says_how_large_files_become(real: Path) -> None:
    sizes = {name: plan(real, name).data_bytes + 15_824_736 for name in RECIPES}
    assert {name: size_text(size) for name, size in sizes.items()} == {n: r.size for n, r in RECIPES.items()}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())


def test_iq4_nl_and_q4_k_s_give_more_bits_to_the_first_layers(real: Path) -> None:
    def special(type_: str, format: str) -> list[str]:
        return [tensor.want.gguf for tensor in plan(real, type_).tensors if tensor.format.name == format]

    values = [f"blk.{i}.attn_v.weight" for i in range(4)]
    down = [f"blk.{i}.{name}.weight" for i in range(3) for name in ("ffn_down", "ffn_down_exps")]
    assert (special("q4_k_s", "Q5_K"), special("q4_k_s", "Q5_1")) == (values, down)
    assert (special("iq4_nl", "Q5_K"), special("iq4_nl", "Q5_1")) == ([], down)


def test_q4_k_m_gives_more_bits_to_the_layers_that_matter_more(real: Path) -> None:
    formats = {tensor.want.gguf: tensor.format.name for tensor in plan(real, "q4_k_m").tensors}

    def layers(name: str, format: str) -> list[int]:
        return [i for i in range(30) if formats.get(f"blk.{i}.{name}.weight") == format]

    down = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert layers("attn_v", "Q6_K") == [0, 1, 2, 6, 9, 13, 16, 20, 24, 25, 26, 27, 28]
    assert layers("ffn_down", "Q8_0") == layers("ffn_down_exps", "Q8_0") == down
    assert layers("ffn_down", "Q5_0") == [i for i in range(30) if i not in down]
    assert (formats["token_embd.weight"], formats["self_cond_down.weight"]) == ("Q6_K", "Q5_0")
    assert [i for i in range(30) if more_bits(i, 30)] == down


def test_dry_run_prints_the_plan_without_reading_weights_or_writing(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, real, "-o", tmp_path / "out.gguf", "--dry-run")
    assert (code, err, leftovers(tmp_path)) == (0, "", [])
    lines = [line.split() for line in out.splitlines()]
    assert len([line for line in lines if line and line[0].startswith("blk.")]) == 692 - 7
    assert ["blk.3.ffn_down_exps.weight", "704", "x", "2816", "x", "128", "BF16", "Q5_0", "174,456,832"] in lines
    assert ["rope_freqs.weight", "256", "made", "F32", "1,024"] in lines
    assert ["Q4_K", "194", "9,353,963,520"] in lines
    assert ["data", "bytes", "16,790,985,600"] in lines


# ---- the same file from every form of the source ----


def test_shards_config_forms_merge_forms_and_threads_change_nothing(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = source
    convert(folder, tmp_path / "plain.gguf", "q4_k_m")
    expected = (tmp_path / "plain.gguf").read_bytes()

    def same(source: Path, **options: Any) -> None:
        convert(source, tmp_path / "other.gguf", "q4_k_m", force=True, **options)
        assert (tmp_path / "other.gguf").read_bytes() == expected

    write_checkpoint(tmp_path / "a" / "tiny-model", shards=4)
    same(tmp_path / "a" / "tiny-model")
    (tmp_path / "a" / "tiny-model" / "model.safetensors.index.json").unlink()
    same(tmp_path / "a" / "tiny-model")
    write_checkpoint(tmp_path / "b" / "tiny-model", form="per_layer")
    same(tmp_path / "b" / "tiny-model")

    def merges_as_strings(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit_json(tmp_path / "b" / "tiny-model" / "tokenizer.json", merges_as_strings)
    same(tmp_path / "b" / "tiny-model")
    for values in (1, 300, 1 << 20):
        monkeypatch.setattr(encode_module, "SLICE_VALUES", values)
        for threads in (1, 2, 7):
            same(folder, threads=threads)


def test_per_layer_config_wins_and_gives_each_layer_its_own_kv_heads(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["per_layer_config"] = {
            "3": {"head_dim": 64, "num_key_value_heads": 4},
            "00": {"num_key_value_heads": 1},
        }

    write_checkpoint(tmp_path / "in", layers=4)
    edit_json(tmp_path / "in" / "config.json", change)
    with pytest.raises(dgemma.FormatError, match=r"k_proj.*expected shape \[32, 128\].*found \[64, 128\]"):
        plan(tmp_path / "in")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(1, 1, [1]), ([6, 1, 6], 1, [6, 1]), (None, [7, 1], [7, 1]), (None, None, [1])],
)
def test_end_ids_come_from_the_first_file_that_names_them(
    generation: Any, config: Any, expected: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    edit_json(checkpoint / "generation_config.json", lambda g: g.update(eos_token_id=generation))
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update(eos_token_id=config))
    convert(checkpoint, tmp_path / "out.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["diffusion-gemma.end_token_ids"].contents() == expected
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1  # the tokenizer's own


def test_sampling_settings_are_the_files_or_the_published_ones(checkpoint: Path, tmp_path: Path) -> None:
    write_json(
        checkpoint / "generation_config.json", {"max_denoising_steps": 7, "sampler_config": {"entropy_bound": 3}}
    )
    convert(checkpoint, tmp_path / "out.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    found = {name: fields[f"diffusion.eb_{name}"].contents() for name in ("max_steps", "entropy_bound", "t_min")}
    assert found == {"max_steps": 7, "entropy_bound": 3.0, "t_min": pytest.approx(0.4)}


def test_the_name_is_the_recorded_one_or_the_repositorys(tmp_path: Path) -> None:
    folder = tmp_path / "models--google--diffusiongemma" / "snapshots" / "0123abcd"
    write_checkpoint(folder, layers=1)
    assert plan(folder).config.name == "diffusiongemma"
    edit_json(folder / "config.json", lambda c: c.update(_name_or_path="google/other"))
    assert plan(folder).config.name == "other"


# ---- tokenizers ----

TEXTS = [
    "Hi",
    "the sky  is\n\nblue\n\n\n\n\u00fcber \u4f60\u597d",
    " <|turn>user\nwhy<turn|>",
    "<unused3><bos>\t",
    "a" * 40,
]


def test_the_runtime_reads_text_as_tokenizers_does(source: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder, _ = source
    convert(folder, tmp_path / "out.gguf", "q8_0")
    ours, theirs = (
        dgemma.Tokenizer.from_gguf(tmp_path / "out.gguf"),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    for text in TEXTS:
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids, text
    assert theirs.encode("Hi").ids[0] == ours.bos_id and ours.add_bos


def test_ids_without_a_token_are_filled_and_no_bos_is_believed(checkpoint: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        for name in ("the", "<unused0>", "<unused1>"):
            del tokenizer["model"]["vocab"][name]
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [
            merge for merge in merges if not {"the", "\u2581the"} & {*merge, "".join(merge)}
        ]
        tokenizer["post_processor"] = None

    edit_json(checkpoint / "tokenizer.json", change)
    edit_json(checkpoint / "tokenizer_config.json", lambda t: t.update(add_bos_token=False))
    convert(checkpoint, tmp_path / "out.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 512 and all(tokens)
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


TURN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_TOOLS = "with tools: the file's chat template knows no tools: it never asks for tools"
TEMPLATES = {
    TURN: [NO_TOOLS],
    TURN + "{{ tools or '' }}": [],
    "{% generation %}" + TURN + "{% endgeneration %}": [NO_TOOLS],
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURN: [
        "with a system message: the chat template refuses these messages: no system",
        NO_TOOLS,
    ],
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}": [
        "with a system message: messages[0]: the chat template leaves out the content of a system message here",
        NO_TOOLS,
    ],
    TURN + "{% if tools %}{{ tools[0].parameters.x }}{% endif %}": [
        "with tools: the chat template refuses these messages: 'dict object' has no attribute 'parameters'"
    ],
    "Hi": ["with a user's message: the chat template leaves out 'Why is the sky blue?'"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_tried_when_converting_and_what_it_does_not_know_is_noted(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "in", layers=1, chat_template=template)
    expected = [f"note: {note}" for note in TEMPLATES[template]]
    _, out, _ = run(capsys, tmp_path / "in", "--dry-run")
    assert [line for line in out.split("\n") if "note: " in line] == expected
    for source, out_name in (("in", "one.gguf"), ("one.gguf", "two.gguf")):
        status, _, err = run(capsys, tmp_path / source, "-o", tmp_path / out_name)
        assert status == 0 and [line for line in err.split("\n") if "note" in line] == [
            f"dg-convert: {note}" for note in expected
        ]


def test_what_is_no_template_is_refused_in_a_checkpoint_and_noted_in_a_gguf_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoint, tmp_path / "in.gguf", "q8_0")
    broken = TEMPLATE.replace("endfor", "endfir")
    (checkpoint / "chat_template.jinja").write_text(broken)
    err = refused(capsys, 1, checkpoint, "-o", tmp_path / "out.gguf")
    assert f"{checkpoint}: the file's chat template is no Jinja template: " in err and "endfir" in err, err
    data = (tmp_path / "in.gguf").read_bytes()
    (tmp_path / "in.gguf").write_bytes(data.replace(TEMPLATE.encode(), broken.encode()))
    status, _, err = run(capsys, tmp_path / "in.gguf", "-o", tmp_path / "out.gguf")
    assert status == 0 and "dg-convert: note: " in err and "endfir" in err, err


@pytest.mark.parametrize("place", ["string", "list", "chat_template.json", "processor_config.json", "nowhere"])
def test_a_chat_template_is_found_wherever_checkpoints_keep_it(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_checkpoint(folder, layers=1, chat_template=None)
    other = {"name": "tool_use", "template": "no"}
    if place == "string":
        edit_json(folder / "tokenizer_config.json", lambda t: t.update(chat_template="yes"))
    elif place == "list":
        template = [other, {"name": "default", "template": "yes"}]
        edit_json(folder / "tokenizer_config.json", lambda t: t.update(chat_template=template))
    elif place != "nowhere":
        write_json(folder / place, {"chat_template": "yes"})
    convert(folder, tmp_path / "out.gguf", "q8_0")
    field = gguf.GGUFReader(tmp_path / "out.gguf").fields.get("tokenizer.chat_template")
    assert (field and field.contents()) == (None if place == "nowhere" else "yes")


RAG, TOOL_USE = ({"name": name, "template": "no"} for name in ("rag", "tool_use"))
UNTAKEN: list[tuple[Any, str]] = [
    ([RAG, TOOL_USE], "templates by name: 'rag', 'tool_use'"),
    ({"rag": "no"}, "templates by name: 'rag'"),
    ([{"name": "default", "template": 5}], "templates by name: 'default'"),
    ([], "templates by name: "),
    (5, "5"),
    ("", "''"),
]
UNTAKEN_IN = [(n, *case) for n in ("tokenizer_config.json", "chat_template.json") for case in UNTAKEN]


@pytest.mark.parametrize(("name", "template", "found"), [*UNTAKEN_IN, ("chat_template.jinja", None, "''")])
def test_a_chat_template_that_cannot_be_taken_is_told(
    name: str, template: Any, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "in", layers=1, chat_template=None)
    if template is None:
        (tmp_path / "in" / name).touch()
    else:
        write_json(tmp_path / "in" / name, {"chat_template": template})
    status, _, err = run(capsys, tmp_path / "in", "-o", tmp_path / "out.gguf")
    told = f"{name}: no chat template is taken: expected a text, alone or named 'default', found {found}\n"
    assert status == 0 and told in err, err
    assert dgemma.Tokenizer.from_gguf(tmp_path / "out.gguf").chat_template is None


# ---- --set ----


def test_set_changes_what_its_pattern_matches_and_the_last_wins(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["*=q8_0", "blk.*.attn_q.weight=f16", "token_embd.weight=BF16", "blk.1.*=q4_0", "*.attn_norm.weight=f32"]
    options = [option for value in sets for option in ("--set", value)]
    code, out, err = run(capsys, checkpoint, "-o", tmp_path / "out.gguf", "--type", "f32", *options)
    assert (code, out) == (0, "") and err.count("\n") == 1
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    expected = {"token_embd.weight": "BF16", "blk.0.attn_q.weight": "F16", "blk.0.attn_k.weight": "Q8_0"}
    expected |= {"blk.1.attn_q.weight": "Q4_0", "blk.1.attn_norm.weight": "F32", "blk.1.ffn_gate_inp.weight": "F32"}
    assert {name: types[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("blk.0", "not PATTERN=TYPE"),
        ("=q8_0", "not PATTERN=TYPE"),
        ("blk.0.attn_q.weight=q9", "expected one of f32, f16"),
        ("blk.0.attn_q.weight=q3_k", "expected one of f32, f16"),
        ("blk.7.*=q8_0", "no tensor has a name like that"),
        ("blk.0.attn_norm.weight=q8_0", "blk.0.attn_norm.weight is always F32"),
        ("*=q6_k", "has rows of 96, no multiple of 256"),
    ],
)
def test_a_set_that_cannot_be_done_is_wrong_usage(
    value: str, complaint: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, 2, checkpoint, "-o", checkpoint / "out.gguf", "--set", value)
    assert "--set" in err and complaint in err
    assert leftovers(checkpoint) == []


# ---- the file appears when it is complete, or not at all ----


def test_an_existing_file_is_replaced_by_force_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint / "out.gguf"
    out.write_text("GGUF, precious")
    assert "out.gguf: this file exists; --force" in refused(capsys, 1, checkpoint, "-o", out)
    assert out.read_text() == "GGUF, precious"
    code, stdout, err = run(capsys, checkpoint, "-o", out, "--force", "--type", "q8_0")
    assert (code, stdout) == (0, "") and out.read_bytes()[:4] == b"GGUF"
    assert err.startswith(f"{out}: q8_0, ") and "KiB" in err and err.count("\n") == 1
    assert leftovers(checkpoint) == ["out.gguf"]


def test_a_link_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    convert(checkpoint, tmp_path / "link.gguf", "q8_0")
    assert (tmp_path / "link.gguf").is_symlink() and (tmp_path / "real.gguf").is_file()


def test_a_full_disk_is_told_and_leaves_the_old_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("GGUF, old")
    written = 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(os, "write", write)
    assert "out.gguf: no space left on device" in refused(capsys, 1, checkpoint, "-o", out, "--force")
    assert out.read_text() == "GGUF, old" and leftovers(tmp_path) == ["out.gguf"]


def test_a_disk_that_is_too_small_is_told_before_the_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = os.statvfs_result((4096, 4096, 9, 9, 9, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    err = refused(capsys, 1, checkpoint, "-o", tmp_path / "out.gguf")
    assert "no space left on device: it needs" in err and "has 36.0 KiB" in err
    assert leftovers(tmp_path) == []


def test_a_limit_of_the_system_is_told(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [*COMMAND, str(checkpoint), "-o", str(out)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"dg-convert: {out}: file too large\n")
    assert leftovers(tmp_path) == []


# ---- the command ----


def test_progress_counts_the_bytes_of_the_source(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(checkpoint, tmp_path / "out.gguf", "bf16", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    _, data = read_safetensors_header(checkpoint / "model.safetensors")
    assert calls[-1][1] == len(data)


def test_a_terminal_gets_a_progress_bar_and_a_pipe_one_line(checkpoint: Path, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    arguments = [*COMMAND, str(checkpoint), "-o", str(tmp_path / "out.gguf")]
    subprocess.run(arguments, stderr=follower, check=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    assert "left" in shown and "out.gguf: q4_k_m, " in shown
    piped = subprocess.run([*arguments, "--force"], capture_output=True, text=True, check=True)
    assert piped.stdout == "" and piped.stderr.count("\n") == 1


def test_help_is_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    flags = {word for line in out.splitlines() for word in line.split() if word.startswith("--")}
    assert {"--type", "--set", "--threads", "--dry-run", "--force"} <= flags
    assert all(f"{name} " in out and recipe.size in out and recipe.help in out for name, recipe in RECIPES.items())
    assert out.count("dg-convert ") >= 4  # the usage line and examples


def test_the_sudoku_model_converts_and_its_vision_tower_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, SUDOKU, "-o", tmp_path / "out.gguf", "--type", "bf16")
    assert code == 0 and "144 tensors (57 BF16, 87 F32); 16 tensors left out" in err
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert Counter(t.tensor_type.name for t in reader.tensors) == {"BF16": 57, "F32": 87}
