"""Read config.json and generation_config.json into values for the fields of the runtime's configuration."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma._native import ffi, lib
from dgemma.convert.safetensors import read_json
from dgemma.errors import FormatError
from dgemma.files.output import readable
from dgemma.native.metadata import keys, limits

MODEL_TYPE = "diffusion_gemma"

# Options of config.json's text_config that the runtime assumes, with the values that they may have.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "attention_k_eq_v": (True,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": ("vision", None),
    "enable_moe_block": (True,),
    "use_double_wide_mlp": (False, None),
    "num_kv_shared_layers": (0, None),
    "hidden_size_per_layer_input": (0, None),
}

# The other keys that text_config may have: those that are read below, and those that do not change any number.
READ = {"num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads"}
READ |= {"rms_norm_eps", "num_experts", "top_k_experts", "final_logit_softcapping", "sliding_window", "vocab_size"}
READ |= {"moe_intermediate_size", "layer_types", "head_dim", "num_key_value_heads", "global_head_dim"}
READ |= {"num_global_key_value_heads", "per_layer_config", "rope_parameters"}
WITHOUT_EFFECT = {
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "auto_map",
    "name_or_path",
}
WITHOUT_EFFECT |= {"attention_dropout", "initializer_range", "use_cache", "cache_implementation", "output_attentions"}
WITHOUT_EFFECT |= {
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
}
WITHOUT_EFFECT |= {"experts_implementation", "attn_implementation", "router_aux_loss_coef", "output_router_logits"}
WITHOUT_EFFECT |= {"vocab_size_per_layer_input"}  # its matrix has 0 columns here
WITHOUT_EFFECT |= {"sliding_window_pattern"}  # layer_types has the same information
EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})

# Keys of generation_config.json for the sampler's settings. The library has default values for missing ones.
SAMPLING = {
    "steps": "max_denoising_steps",
    "stability": "stability_threshold",
    "t_min": "t_min",
    "t_max": "t_max",
    "confidence": "confidence_threshold",
}

# Defaults for a config.json without rope_parameters, and without global_head_dim (head_dim of full layers).
ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
GLOBAL_HEAD_DIM = 512


@dataclass(frozen=True)
class Config:
    """The configuration of a checkpoint."""

    values: dict[str, Any]  # by field of dg_config; a list for one value per layer
    rotary_factor: float  # the share of pairs that are rotated in full layers
    end_ids: list[int]  # [] where neither file names one
    special_ids: dict[str, int]  # "bos", "eos", "pad" -> id, those that config.json names
    name: str  # the model's name

    def native(self) -> Any:
        """Return a `dg_config *` with these values."""
        config = ffi.new("dg_config *")
        for field, value in self.values.items():
            if isinstance(value, list):
                getattr(config, field)[0 : len(value)] = value
            else:
                setattr(config, field, value)
        return config


class Section:
    """An object of a JSON file, with methods that check a value and return it."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise FormatError(f"{where}: expected an object, found {values!r}")
        self.where, self.values = where, values

    def section(self, key: str) -> Section:
        return Section(f"{self.where}: {key}", self.values.get(key))

    def whole(self, key: str, absent: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        value = absent if value is None else value
        if type(value) is not int or not least <= value < 2**31:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, absent: float | None = None, above: float = 0.0, or_equal: bool = False) -> float:
        value = self.values.get(key)
        value = absent if value is None else value
        # The file has float32 values, whose largest is 3.4e38; comparisons with NaN are false.
        if type(value) not in (int, float) or not (above < value < 3.4e38 or (or_equal and value == above)):
            raise self.wrong(key, f"a number {'of at least' if or_equal else 'above'} {above:g}")
        return float(value)

    def fixed(self, key: str, allowed: Sequence[Any]) -> None:
        if key in self.values and self.values[key] not in allowed:
            expected = " or ".join(repr(value) for value in allowed if value is not None)
            raise FormatError(f"{self.where}: {key} is {self.values[key]!r}; the runtime knows only {expected}")

    def known(self, keys: Collection[str]) -> None:
        """Raise FormatError for any other key: it may change the model in a way that the runtime does not support."""
        for key, value in self.values.items():
            aside = key in keys or key.startswith(("_", "unsloth")) or key.endswith("_token_id")
            if not aside and value not in EMPTY:
                raise FormatError(f"{self.where}: {key} is {value!r}, and the converter does not know what it does")

    def wrong(self, key: str, expected: str) -> FormatError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return FormatError(f"{self.where}: {key}: expected {expected}, found {found}")


def read_config(folder: Path) -> Config:
    """Return the configuration of a checkpoint. Raises FormatError for options that the runtime does not support."""
    file = folder / "config.json"
    top = Section(str(file), read_json(file))
    if (found := top.values.get("model_type")) != MODEL_TYPE:
        raise FormatError(f"{file}: a model of another architecture: model_type is {found!r}, expected {MODEL_TYPE!r}")
    for key in ("quantization_config", "quantization", "compression_config"):
        if top.values.get(key):
            raise FormatError(f"{file}: {key}: only checkpoints in bf16, f16 or f32 can be converted")
    top.fixed("tie_word_embeddings", FIXED["tie_word_embeddings"])
    text = top.section("text_config")
    for key, allowed in FIXED.items():
        text.fixed(key, allowed)
    text.known(FIXED.keys() | READ | WITHOUT_EFFECT)
    values, rotary_factor = _text_values(text)
    values["canvas_length"] = top.whole("canvas_length", int(keys()["canvas_length"].absent))
    _check_limits(str(file), values)

    generation_file = folder / "generation_config.json"
    there = os.path.lexists(generation_file)
    generation = Section(str(generation_file), read_json(generation_file) if there else {})
    sampling = _sampling(generation)
    _check_limits(str(generation_file), sampling)
    values |= sampling
    special = {name: text.values.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    end_ids: list[int] = []
    for section in (generation, text, top):
        end_ids = end_ids or _end_ids(section, values["n_vocab"])
    return Config(
        values,
        rotary_factor,
        end_ids,
        {name: value for name, value in special.items() if type(value) is int and 0 <= value < values["n_vocab"]},
        _name(folder, top.values.get("_name_or_path")),
    )


def _check_limits(file: str, values: dict[str, Any]) -> None:
    """Raise FormatError for a size that the runtime would refuse."""
    for field, limit in limits().items():
        if field in values and not limit.least <= values[field] <= limit.most:
            raise FormatError(
                f"{file}: {limit.key.key} would be {values[field]}; the runtime takes {limit.least} to {limit.most}"
            )


def _text_values(text: Section) -> tuple[dict[str, Any], float]:
    n_layer = text.whole("num_hidden_layers")
    if n_layer > lib.DG_MAX_LAYERS:
        raise text.wrong("num_hidden_layers", f"at most {lib.DG_MAX_LAYERS}")
    sliding = _sliding(text, n_layer)
    head_dim, head_dim_swa, n_head_kv = _heads(text, sliding)
    base, rotary_factor = _rope(text, "full_attention")
    base_swa, rotary_factor_swa = _rope(text, "sliding_attention")
    if rotary_factor_swa != 1.0:
        raise FormatError(
            f"{text.where}: rope_parameters.sliding_attention: partial_rotary_factor is {rotary_factor_swa};"
            " the runtime turns all pairs of sliding layers"
        )
    n_expert = text.whole("num_experts")
    n_expert_used = text.whole("top_k_experts")
    if n_expert_used > n_expert:
        raise text.wrong("top_k_experts", f"at most num_experts, {n_expert}")
    values = {
        "n_layer": n_layer,
        "context_length": text.whole("max_position_embeddings"),
        "d_model": text.whole("hidden_size"),
        "d_ffn": text.whole("intermediate_size"),
        "n_head": text.whole("num_attention_heads"),
        "n_head_kv": n_head_kv,
        "rope_base": base,
        "rope_base_swa": base_swa,
        "rms_eps": text.number("rms_norm_eps", 1e-6),
        "n_expert": n_expert,
        "n_expert_used": n_expert_used,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "softcap": text.number("final_logit_softcapping"),
        "sliding_window": text.whole("sliding_window"),
        "shared_kv_layers": 0,
        "d_per_layer_input": 0,
        "sliding": [int(s) for s in sliding],
        "head_dim_swa": head_dim_swa,
        "value_dim_swa": head_dim_swa,
        "d_expert": text.whole("moe_intermediate_size"),
        "rope_dim": head_dim,
        "rope_dim_swa": head_dim_swa,
        "causal": 0,
        "n_vocab": text.whole("vocab_size"),
    }
    for layer, heads in enumerate(n_head_kv):
        if values["n_head"] % heads:
            raise FormatError(
                f"{text.where}: layer {layer}: {values['n_head']} heads do not share {heads} KV heads evenly"
            )
    return values, rotary_factor


def _sliding(text: Section, n_layer: int) -> list[bool]:
    types = text.values.get("layer_types")
    if types is None:
        types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(n_layer)]
        types[-1] = "full_attention"
    if not isinstance(types, list) or len(types) != n_layer:
        raise text.wrong("layer_types", f"a list of {n_layer}, one per layer")
    for layer, kind in enumerate(types):
        if kind not in ("sliding_attention", "full_attention"):
            raise FormatError(
                f"{text.where}: layer_types: layer {layer} is {kind!r}; the runtime knows only"
                " 'sliding_attention' and 'full_attention'"
            )
    if types[-1] != "full_attention":
        raise FormatError(f"{text.where}: layer_types: the last layer is {types[-1]!r}; transformers makes it full")
    return [kind == "sliding_attention" for kind in types]


def _heads(text: Section, sliding: list[bool]) -> tuple[int, int, list[int]]:
    """Return head_dim of full and of sliding layers, and KV heads per layer, from either form of config.json."""
    base = {"head_dim": text.whole("head_dim", 256), "num_key_value_heads": text.whole("num_key_value_heads")}
    layers = [dict(base) for _ in sliding]
    if text.values.get("per_layer_config") is not None:
        _apply_per_layer(text, layers)
    else:
        full = {
            "head_dim": text.whole("global_head_dim", GLOBAL_HEAD_DIM),
            "num_key_value_heads": text.whole("num_global_key_value_heads", base["num_key_value_heads"]),
        }
        layers = [dict(base if s else full) for s in sliding]
    dims: dict[bool, int] = {}
    for i, (is_sliding, layer) in enumerate(zip(sliding, layers, strict=True)):
        kind = "sliding" if is_sliding else "full"
        if layer["head_dim"] % 2:
            raise FormatError(f"{text.where}: layer {i}: head_dim {layer['head_dim']} is odd")
        if dims.setdefault(is_sliding, layer["head_dim"]) != layer["head_dim"]:
            raise FormatError(
                f"{text.where}: per_layer_config: layer {i} has head_dim {layer['head_dim']}, {kind} layers before it"
                f" {dims[is_sliding]}; the runtime knows one for all {kind} layers"
            )
    head_dim_swa = dims.get(True, base["head_dim"])
    return dims.get(False, head_dim_swa), head_dim_swa, [layer["num_key_value_heads"] for layer in layers]


def _apply_per_layer(text: Section, layers: list[dict[str, int]]) -> None:
    overrides = text.section("per_layer_config")
    for key in overrides.values:
        if not key.isdecimal() or int(key) >= len(layers):
            raise FormatError(f"{overrides.where}: {key!r} is not the number of one of {len(layers)} layers")
        layer = overrides.section(key)
        for option, value in layer.values.items():
            if option in layers[int(key)]:
                layers[int(key)][option] = layer.whole(option)
            elif value != text.values.get(option):
                raise FormatError(f"{layer.where}: {option} is another for this layer, which the runtime does not know")


def _rope(text: Section, kind: str) -> tuple[float, float]:
    """Return rope_theta and the share of pairs that are rotated."""
    parameters = text.values.get("rope_parameters")
    everything = text.section("rope_parameters") if parameters is not None else Section(text.where, ROPE)
    rope = everything.section(kind)
    rope_type = rope.values.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise FormatError(f"{rope.where}: rope_type is {rope_type!r}; the runtime knows only 'default', 'proportional'")
    factor = rope.number("partial_rotary_factor", 1.0, or_equal=True)
    if factor > 1.0 or (rope_type == "default" and factor != 1.0):
        raise FormatError(
            f"{rope.where}: partial_rotary_factor is {factor:g} with rope_type {rope_type!r}; the runtime knows"
            " parts of 1 of 'proportional' alone"
        )
    rope.fixed("factor", (1, None))
    rope.known(("rope_type", "rope_theta", "partial_rotary_factor", "factor"))
    return rope.number("rope_theta"), factor


def _sampling(generation: Section) -> dict[str, int | float]:
    values: dict[str, int | float] = {}
    for field, key in SAMPLING.items():
        absent = keys()[field].absent
        if keys()[field].kind == "U32":
            values[field] = generation.whole(key, int(absent), least=1 if field == "steps" else 0)
        else:
            values[field] = generation.number(key, absent, or_equal=True)
    values["entropy_bound"] = keys()["entropy_bound"].absent
    if generation.values.get("sampler_config") is not None:
        sampler = generation.section("sampler_config")
        sampler.fixed("_cls_name", ("EntropyBoundSamplerConfig", None))
        values["entropy_bound"] = sampler.number("entropy_bound", values["entropy_bound"], or_equal=True)
    return values


def _end_ids(section: Section, n_vocab: int) -> list[int]:
    ids = section.values.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < n_vocab for i in ids):
        raise section.wrong("eos_token_id", f"ids below the vocabulary's size, {n_vocab}")
    ids = list(dict.fromkeys(ids))
    if len(ids) > lib.DG_MAX_END_IDS:
        raise section.wrong("eos_token_id", f"at most {lib.DG_MAX_END_IDS} ids")
    return ids


def _name(folder: Path, recorded: Any) -> str:
    """Return the model's name: from config.json, or else the folder's (in the Hub's cache the repository's)."""
    if isinstance(recorded, str) and recorded.strip("/ "):
        return recorded.strip("/ ").split("/")[-1]
    folder = Path(os.path.realpath(folder))  # resolve() raises at a link to itself
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return readable(folder.parents[1].name.split("--")[-1])
    return readable(folder.name) or "model"
