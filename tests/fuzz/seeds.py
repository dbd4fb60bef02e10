"""Writes the corpora that fuzzing starts from: python tests/fuzz/seeds.py. What was found since is kept beside them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import odd
import parser_seeds

CORPUS = Path(__file__).parent / "corpus"
D, FFN, EXPERT, N_EXPERT, HEAD = 32, 32, 32, 2, 32
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "\n", "\n\n", "a", "b", "ab", "aba"]
TOKENS += ["<0x0A>", '<|"|>', "<turn|>", "\u00e9", "c"]
TYPES = [3, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 6, 3, 3, 1, 1]


def vocabulary(writer: gguf.GGUFWriter, tokens: list[str] = TOKENS, types: list[int] = TYPES) -> None:
    writer.add_string("tokenizer.ggml.model", "gemma4")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [-1000.0] * len(tokens))
    writer.add_array("tokenizer.ggml.token_type", types)
    if tokens is TOKENS:
        writer.add_array("tokenizer.ggml.merges", ["a b", "ab a", "\n \n"])
    for key, token in ("bos", "<bos>"), ("eos", "<eos>"), ("unknown", "<unk>"), ("padding", "<pad>"):
        if token in tokens:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokens.index(token))
    writer.add_string("tokenizer.chat_template", "{{ messages[0].content }}")
    writer.add_bool("tokenizer.ggml.add_bos_token", True)


def model(
    path: Path,
    kind: gguf.GGMLQuantizationType,
    layers: int,
    split_experts: bool = False,
    tokens: list[str] = TOKENS,
    types: list[int] = TYPES,
    canvas: int = 8,
    alike: bool = False,
) -> None:
    """alike: every word has the same embedding, and so the same logits."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    prefix = "diffusion-gemma."
    numbers = {
        "block_count": layers, "context_length": 64, "embedding_length": D, "feed_forward_length": FFN,
        "attention.head_count": 1, "expert_count": N_EXPERT, "expert_used_count": 1, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.sliding_window": 8, "attention.key_length_swa": HEAD,
        "attention.value_length_swa": HEAD, "expert_feed_forward_length": EXPERT, "rope.dimension_count": HEAD,
        "rope.dimension_count_swa": HEAD,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(prefix + key, number)
    floats = {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.layer_norm_rms_epsilon": 1e-6}
    for key, value in {**floats, "final_logit_softcapping": 30.0}.items():
        writer.add_float32(prefix + key, value)
    writer.add_array(prefix + "attention.head_count_kv", [1] * layers)
    sliding = [layer + 1 < layers for layer in range(layers)]
    writer.add_array(prefix + "attention.sliding_window_pattern", sliding)
    if tokens is TOKENS:
        writer.add_array(prefix + "end_token_ids", [1, 13])
    writer.add_uint32("diffusion.canvas_length", canvas)
    writer.add_uint32("general.alignment", 32)
    vocabulary(writer, tokens, types)

    def floats_of(name: str, n: int) -> None:
        writer.add_tensor(name, random.uniform(0.5, 1.5, n).astype(np.float32))

    def matrix(name: str, *dims: int, raw: gguf.GGMLQuantizationType = kind) -> None:  # as numpy orders them
        values = random.standard_normal(dims).astype(np.float32) / np.float32(np.sqrt(dims[-1]))
        if alike and name == "token_embd.weight":
            values[:] = values[0]
        writer.add_tensor(name, gguf.quants.quantize(values, raw), raw_dtype=raw)

    matrix("token_embd.weight", len(tokens), D)
    floats_of("output_norm.weight", D)
    floats_of("rope_freqs.weight", HEAD // 2)
    floats_of("self_cond_pre_norm.weight", D)
    for name, dims in ("gate", (FFN, D)), ("up", (FFN, D)), ("down", (D, FFN)):
        matrix(f"self_cond_{name}.weight", *dims)
    for layer in range(layers):
        at = f"blk.{layer}."
        norms = "attn_norm post_attention_norm ffn_norm pre_ffw_norm_2 post_ffw_norm post_ffw_norm_1 post_ffw_norm_2"
        for name in norms.split():
            floats_of(f"{at}{name}.weight", D)
        heads = {"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD}
        for name, n in {**heads, "ffn_gate_inp.scale": D, "ffn_down_exps.scale": N_EXPERT}.items():
            floats_of(at + name, n)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            if name != "attn_v" or sliding[layer]:
                matrix(f"{at}{name}.weight", D, D)
        matrix(f"{at}ffn_gate_inp.weight", N_EXPERT, D, raw=gguf.GGMLQuantizationType.F32)
        if split_experts:
            matrix(f"{at}ffn_gate_exps.weight", N_EXPERT, EXPERT, D)
            matrix(f"{at}ffn_up_exps.weight", N_EXPERT, EXPERT, D)
        else:
            matrix(f"{at}ffn_gate_up_exps.weight", N_EXPERT, 2 * EXPERT, D)
        matrix(f"{at}ffn_down_exps.weight", N_EXPERT, D, EXPERT)
        floats_of(f"{at}layer_output_scale.weight", 1)
        floats_of(f"{at}enc_layer_output_scale.weight", 1)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    for room in "gguf", "model", "tokenizer", "quants":
        (CORPUS / room).mkdir(parents=True, exist_ok=True)
    model(CORPUS / "model" / "seed-q4_0", gguf.GGMLQuantizationType.Q4_0, layers=2)
    model(CORPUS / "model" / "seed-q8_0-split", gguf.GGMLQuantizationType.Q8_0, layers=1, split_experts=True)

    writer = gguf.GGUFWriter(CORPUS / "gguf" / "seed-kinds", "any")
    for name in "uint8", "int8", "uint16", "int16", "int32", "uint64", "int64", "float64":
        getattr(writer, f"add_{name}")(f"a.{name}", 1 if name.startswith("u") else -1)
    vocabulary(writer)
    for tensor, kind in enumerate(("F32", "Q8_0", "Q4_0")):
        raw = gguf.GGMLQuantizationType[kind]
        values = gguf.quants.quantize(np.arange(64, dtype=np.float32).reshape(2, 32), raw)
        writer.add_tensor(f"t{tensor}", values, raw_dtype=raw)
    finish(writer)
    parts = gguf.GGUFWriter(CORPUS / "gguf" / "seed-part", "any")
    parts.add_uint16("split.no", 0), parts.add_uint16("split.count", 2), parts.add_int32("split.tensors.count", 0)
    finish(parts)

    whole = (CORPUS / "model" / "seed-q4_0").read_bytes()
    made = {"gguf": odd.gguf(), "tokenizer": odd.tokenizer(), "model": odd.model(whole)}
    for room, files in made.items():
        for name, data in files:
            (CORPUS / room / f"odd-{name}").write_bytes(data)
    for name, of in ("strange", odd.strange), ("too-many", odd.too_many):
        (CORPUS / "model" / f"odd-{name}").write_bytes(of(whole))

    texts = ["the cat\n\nsat <bos>on\n", 'caf\u00e9 <|"|>\U0001f600 \u2581x', "<0x41><unk>  \t", "\udcff\udce2\udc96"]
    for i, text in enumerate(texts):
        for special in 0, 1:
            data = bytes([special]) + text.encode("utf-8", "surrogateescape")
            (CORPUS / "tokenizer" / f"seed-text-{i}-{special}").write_bytes(data)
    (CORPUS / "tokenizer" / "seed-ids").write_bytes(bytes([2]) + struct.pack("<12H", *range(0, 480, 40)))

    values = np.random.default_rng(0).standard_normal(256).astype("<f4").tobytes()
    for number in range(14):
        (CORPUS / "quants" / f"seed-decode-{number:02}").write_bytes(bytes([4 * number]) + values[:300])
    for number in range(11):
        what = bytes([4 * number + 1 + 2 * (number % 2)])
        (CORPUS / "quants" / f"seed-encode-{number:02}").write_bytes(what + values)
    many = np.random.default_rng(1).standard_normal(1024).astype("<f4").tobytes()
    for number in range(3, 11):  # whose blocks are of more than a value
        (CORPUS / "quants" / f"seed-rows-{number:02}").write_bytes(bytes([4 * number + 3]) + many)

    for target, made_of in parser_seeds.seeds().items():
        (CORPUS / target).mkdir(exist_ok=True)
        for name, data in made_of.items():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
