"""Calculates the work of a pass: operations (two per multiply-add) and bytes of weights of each part.

The parts have the library's names. Small ones, such as norms, are not counted.
"""

from __future__ import annotations

from dgemma._native import ffi, lib
from dgemma.config import Config
from dgemma.model import Model
from dgemma.native import formats


def pass_operations(config: Config, rows: int, before: int, causal: bool, output: bool = True) -> dict[str, int]:
    """Return the operations of the layers alone, for `rows` tokens behind `before` encoded ones.

    causal: True for the encoder, False for the decoder. output: False where the last layer only fills the cache.
    """
    d, n = config.d_model, rows
    count = dict.fromkeys(("projections", "attention", "dense", "experts", "router"), 0)
    for layer in range(config.n_layer):
        sliding = config.sliding[layer]
        dim = config.head_dim_swa if sliding else config.head_dim
        q, kv = config.n_head * dim, config.n_head_kv[layer] * dim
        count["projections"] += 2 * n * d * (2 if sliding else 1) * kv
        if layer == config.n_layer - 1 and not output:
            break
        count["projections"] += 2 * n * d * 2 * q
        count["attention"] += 4 * q * keys_seen(config, layer, rows, before, causal)
        count["dense"] += 6 * n * d * config.d_ffn
        count["experts"] += 6 * n * config.n_expert_used * d * config.d_expert
        count["router"] += 2 * n * d * config.n_expert
    return count


def keys_seen(config: Config, layer: int, rows: int, before: int, causal: bool) -> int:
    """Return the number of pairs of a query and a key that the query attends to."""
    window = config.sliding_window if config.sliding[layer] else None
    if causal:
        return sum(min(at + 1, window or at + 1) for at in range(before, before + rows))
    return rows * (rows + (before if window is None else min(before, window - 1)))


def step_operations(config: Config, before: int) -> dict[str, int]:
    """Return the operations of a denoising step.

    Self-conditioning is counted as if every row summed over the whole vocabulary: see condition_mlp().
    """
    n = config.canvas_length
    table = 2 * n * config.d_model * config.n_vocab
    return {
        **pass_operations(config, n, before, causal=False),
        "head": table,
        "condition": table + condition_mlp(config),
    }


def condition_mlp(config: Config) -> int:
    """Return the operations of self-conditioning where each row sums over a few tokens only: those of its MLP."""
    return int(6 * config.canvas_length * config.d_model * config.d_ffn)


# (text, part): a tensor belongs to the part of the first text that its name contains; "": it is not counted.
BY_NAME = (
    ("enc_layer", ""), ("token_embd", "head"), ("output_norm", "head"), ("self_cond", "condition"),
    ("ffn_gate_inp", "router"), ("ffn_down_exps.scale", "router"), ("_exps", "experts"), ("_norm", "elementwise"),
    ("post_", "elementwise"), ("pre_", "elementwise"), ("attn_", "projections"), ("ffn_", "dense"), ("", "elementwise"),
)  # fmt: skip


def step_bytes(model: Model) -> dict[str, int]:
    """Return the bytes of weights of each part that a step reads; each weight is read once.

    The number of experts that are used is estimated for uniform routing.
    """
    config, sizes = model.config, dict.fromkeys((part for _, part in BY_NAME if part), 0)
    slots = config.canvas_length * config.n_expert_used
    busy = 1 - (1 - 1 / config.n_expert) ** slots
    out, i = ffi.new("dg_weight *"), 0
    while lib.dg_weight_at(model._open_handle().pointer, i, out):
        name = ffi.string(out.name).decode()
        part = next(part for text, part in BY_NAME if text in name)
        if part:
            sizes[part] += round(out.bytes * busy) if part == "experts" else out.bytes
        i += 1
    return sizes


def file_formats(model: Model) -> dict[str, int]:
    """Return the bytes of the file's weights in each format, sorted by bytes."""
    sizes: dict[str, int] = {}
    out, i = ffi.new("dg_weight *"), 0
    while lib.dg_weight_at(model._open_handle().pointer, i, out):
        name = formats.by_id(out.type).name
        sizes[name] = sizes.get(name, 0) + out.bytes
        i += 1
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
