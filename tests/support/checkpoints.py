"""Small random checkpoints as Hugging Face folders, written with numpy alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SLIDING, FULL = "sliding_attention", "full_attention"

# text_config of the published checkpoint, as far as a converter needs it.
REAL: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_experts": 128,
    "top_k_experts": 8,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ([SLIDING] * 5 + [FULL]) * 5,
}

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"]
MARKS = ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>"]
WORDS = ["the", "sky", "is", "blue", "and", "why", "a", "in", "of", "to", "it", "you", "that", "was", "for", "on"]
WORDS += ["are", "with", "he", "she", "model", "user", "thought", "Hi"]

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)

# transformers builds a vision tower whether a checkpoint has one or not: as small a one as it can be.
VISION = {
    "head_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "model_type": "gemma4_vision",
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "patch_size": 4,
    "pooling_kernel_size": 1,
    "position_embedding_size": 16,
}
# Some of its tensors; 0 is the hidden size.
VISION_SHAPES = {
    "vision_tower.patch_embedder.input_proj.weight": (32, 48),
    "embed_vision.embedding_projection.weight": (0, 32),
}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> tuple[bytes, np.ndarray]:
    """The bytes of a tensor in a file, and the float32 values that they stand for."""
    if dtype == "bf16":
        bits = bf16_bits(values)
        return bits.tobytes(), bf16_values(bits).reshape(values.shape)
    narrow = values.astype({"f16": np.float16, "f32": np.float32}[dtype])
    return narrow.tobytes(), narrow.astype(np.float32)


def write_safetensors(file: Path, tensors: dict[str, tuple[str, Sequence[int], bytes]]) -> None:
    """tensors: name -> (dtype as safetensors has it, shape, bytes)"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            out.write(data)


def read_safetensors_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and what is behind it."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw_safetensors(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shapes(text: dict[str, Any], layer_types: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Every text tensor of a checkpoint with this text_config (in its `global_` form), by name."""
    d, ffn, expert, experts = (
        text[key] for key in ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts")
    )
    found: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (text["vocab_size"], d),
        "model.decoder.norm.weight": (d,),
        "model.decoder.self_conditioning.pre_norm.weight": (d,),
        "model.decoder.self_conditioning.gate_proj.weight": (ffn, d),
        "model.decoder.self_conditioning.up_proj.weight": (ffn, d),
        "model.decoder.self_conditioning.down_proj.weight": (d, ffn),
    }
    for i, kind in enumerate(layer_types):
        prefix = "" if kind == SLIDING else "global_"
        head_dim = text[f"{prefix}head_dim"]
        kv = head_dim * text[f"num_{prefix}key_value_heads"]
        q = head_dim * text["num_attention_heads"]
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "pre_feedforward_layernorm.weight": (d,),
            "pre_feedforward_layernorm_2.weight": (d,),
            "post_feedforward_layernorm.weight": (d,),
            "post_feedforward_layernorm_1.weight": (d,),
            "post_feedforward_layernorm_2.weight": (d,),
            "mlp.gate_proj.weight": (ffn, d),
            "mlp.up_proj.weight": (ffn, d),
            "mlp.down_proj.weight": (d, ffn),
            "router.proj.weight": (experts, d),
            "router.scale": (d,),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj": (experts, 2 * expert, d),
            "experts.down_proj": (experts, d, expert),
            "layer_scalar": (1,),
        }
        if kind == SLIDING:
            layer["self_attn.v_proj.weight"] = (kv, d)
        found |= {f"model.decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
        found[f"model.encoder.language_model.layers.{i}.layer_scalar"] = (1,)
    return found


def random_values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Norms near 1, but near 0.4 for q and k: attention as soft as a trained model's. Matrices keep a vector's size."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return random.uniform(0.35, 0.45, shape).astype(np.float32)
    if len(shape) == 1:
        return random.uniform(0.8, 1.2, shape).astype(np.float32)
    return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 6,
    hidden: int = 128,
    ffn: int = 96,
    expert_ffn: int = 32,
    experts: int = 8,
    top_k: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    global_kv_heads: int = 1,
    head_dim: int = 32,
    global_head_dim: int = 64,
    window: int = 16,
    canvas: int = 32,
    context: int = 1024,
    vocab: int = 512,
    rotary_factor: float = 0.25,
    theta: float = 1e4,
    global_theta: float = 1e6,
    softcap: float = 30.0,
    layer_types: Sequence[str] | None = None,
    form: str = "global",
    shards: int = 1,
    dtype: str = "bf16",
    vision: bool = False,
    chat_template: str | None = TEMPLATE,
    eos: int | list[int] | None = None,
) -> dict[str, np.ndarray]:
    """Writes config, generation settings, tokenizer and random weights; returns the weights as float32 by name.

    layer_types: by default five sliding, one full, and so on, the last one full. form: how config.json tells the full
    layers' heads, "global" as the published file or "per_layer" as transformers saves it. vision: add tensors that a
    converter drops. eos: eos_token_id of generation_config.json, [1, 6] by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(layer_types or [FULL if i % 6 == 5 or i == layers - 1 else SLIDING for i in range(layers)])
    text: dict[str, Any] = {
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": softcap,
        "global_head_dim": global_head_dim,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "layer_types": kinds,
        "max_position_embeddings": context,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": expert_ffn,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_global_key_value_heads": global_kv_heads,
        "num_hidden_layers": len(kinds),
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": rotary_factor, "rope_theta": global_theta, "rope_type": "proportional"},
            SLIDING: {"rope_theta": theta, "rope_type": "default"},
        },
        "sliding_window": window,
        "tie_word_embeddings": True,
        "top_k_experts": top_k,
        "use_bidirectional_attention": "vision",
        "vocab_size": vocab,
    }
    random = np.random.default_rng(seed)
    data: dict[str, tuple[str, Sequence[int], bytes]] = {}
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes(text, kinds).items():
        raw, weights[name] = stored(random_values(name, shape, random), dtype)
        data[name] = (dtype.upper(), shape, raw)
    if vision:
        for name, shape in VISION_SHAPES.items():
            shape = tuple(n or hidden for n in shape)
            data[f"model.encoder.{name}"] = ("F32", shape, random.standard_normal(shape).astype(np.float32).tobytes())

    if form == "per_layer":
        overrides = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text["num_global_key_value_heads"]}
        del text["num_global_key_value_heads"]
        text["per_layer_config"] = {f"{i:02}": overrides for i, kind in enumerate(kinds) if kind == FULL}
    config = {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        **{f"{name}_token_id": vocab - 3 + i for i, name in enumerate(("boi", "eoi", "image"))},
        "canvas_length": canvas,
        "dtype": {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype],
        "model_type": "diffusion_gemma",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": VISION,
    }
    generation = {
        "bos_token_id": 2,
        "confidence_threshold": 0.005,
        "eos_token_id": [1, 6] if eos is None else eos,
        "max_denoising_steps": 48,
        "pad_token_id": 0,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, vocab, chat_template)
    _write_shards(folder, data, shards)
    return weights


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_shards(folder: Path, data: dict[str, tuple[str, Sequence[int], bytes]], shards: int) -> None:
    if shards == 1:
        write_safetensors(folder / "model.safetensors", data)
        return
    names = list(data)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        mine = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / shard, {name: data[name] for name in mine})
        weight_map |= dict.fromkeys(mine, shard)
    size = sum(len(raw) for _, _, raw in data.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def tokenizer_parts(vocab: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens by id and merges: special tokens, marks, newline runs, bytes, printable ASCII, words, `<unusedN>`."""
    tokens = [*SPECIAL, *MARKS, "\n", "\n\n", "\n\n\n", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["\u2581", *(chr(i) for i in range(33, 127)), "\u00e9", "\u4f60"]
    merges = [("\n", "\n"), ("\n\n", "\n"), ("\n", "\n\n")]
    for word in WORDS:
        pairs = [(word[:k], word[k]) for k in range(1, len(word))] + [("\u2581", word)]
        for left, right in pairs:
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append((left, right))
    if len(tokens) > vocab:
        raise ValueError(f"the vocabulary needs {len(tokens)} tokens")
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    return tokens, merges


def write_tokenizer(folder: Path, vocab: int, chat_template: str | None = TEMPLATE) -> None:
    tokens, merges = tokenizer_parts(vocab)
    added = [
        {"id": i, "content": token, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i, token in enumerate(tokens[: len(SPECIAL) + len(MARKS)])
    ]
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    write_json(folder / "tokenizer_config.json", settings)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
