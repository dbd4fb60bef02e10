"""What the corpora of parsers.py begin with: whole inputs, and one for each way to be refused. seeds.py writes them."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import odd

JSON = dict[str, Any]


def _files(*files: tuple[str, Any]) -> bytes:
    return json.dumps([list(file) for file in files]).encode()


def _set(top: Any, path: str, value: Any) -> Any:
    """A copy with the value at a path such as text_config/hidden_size; ... takes it away."""
    made = copy.deepcopy(top)
    *holders, last = path.split("/")
    at = made
    for name in holders:
        at = at[name]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return made


# ---- safetensors ----

SMALL: JSON = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
A: JSON = {"a": SMALL["a"]}
B: JSON = {"b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
INDEX, FIRST, SECOND = "model.safetensors.index.json", "m-1-of-2.safetensors", "m-2-of-2.safetensors"


def safetensors() -> dict[str, bytes]:
    body = json.dumps(SMALL).encode()
    both: JSON = {"weight_map": {"a": FIRST, "b": SECOND}}
    made = {
        "seed-whole": struct.pack("<Q", len(body)) + body + bytes(8),
        "seed-header": body + bytes(8),
        "seed-empty": b"{}",
        "seed-index": _files((INDEX, both), (FIRST, A), (SECOND, B)),
        "seed-shards": _files((FIRST, A), (SECOND, B)),
        "odd-none": b"[]",
        "odd-short": b"\1\0\0",
        "odd-length": struct.pack("<Q", 1 << 40) + body,
        "odd-no-json": b"{{}" + bytes(8),
        "odd-a-list": struct.pack("<Q", 2) + b"[]",
        "odd-key-twice": b'{"a":{},"a":{}}',
        "odd-longer": body + bytes(9),
        "odd-shard-missing": _files((FIRST, A)),
        "odd-name-twice": _files((FIRST, A), (SECOND, A)),
        "odd-index-of-nothing": _files((INDEX, {"weight_map": {}}), (FIRST, A)),
        "odd-index-no-json": _files((INDEX, "{")),
        "odd-index-a-list": _files((INDEX, [])),
        "odd-index-outside": _files((INDEX, {"weight_map": {"a": "../a.safetensors"}}), (FIRST, A)),
        "odd-index-no-file": _files((INDEX, both), (FIRST, A)),
        "odd-index-name-too-long": _files((INDEX, {"weight_map": {"a": "x" * 300}}), (FIRST, A)),
        "odd-index-no-name": _files((INDEX, {"weight_map": {"a": ""}}), (FIRST, A)),
        "odd-index-promises": _files((INDEX, {"weight_map": {"a": FIRST, "c": FIRST}}), (FIRST, A)),
    }
    for name, path, value in (
        ("entry", "a", 5),
        ("type", "a/dtype", "X9"),
        ("shape", "a/shape", [-1]),
        ("offsets", "a/data_offsets", [0]),
        ("bytes", "a/data_offsets", [0, 9]),
        ("gap", "a/data_offsets", [8, 16]),
    ):
        made[f"odd-{name}"] = json.dumps(_set(SMALL, path, value)).encode() + bytes(8)
    return made


# ---- config.json ----

TEXT: JSON = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
    "attention_bias": False,
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_experts": 8,
    "top_k_experts": 2,
    "max_position_embeddings": 1024,
    "sliding_window": 128,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CONFIG: JSON = {"model_type": "diffusion_gemma", "canvas_length": 96, "tie_word_embeddings": True, "text_config": TEXT}
GENERATION: JSON = {
    "eos_token_id": [1, 3],
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
}
PER_LAYER: JSON = {"2": {"head_dim": 64, "num_key_value_heads": 1, "hidden_size": 128}}


def config() -> dict[str, bytes]:
    def of(top: Any, generation: Any = GENERATION) -> bytes:
        return _files(("config.json", top), ("generation_config.json", generation))

    usual = {"rope_parameters": None, "layer_types": None, "per_layer_config": PER_LAYER}
    made = {
        "seed-whole": of(CONFIG),
        "seed-usual": of(CONFIG | {"text_config": TEXT | usual, "_name_or_path": "some/where/"}),
        "seed-alone": json.dumps(CONFIG).encode(),
        "odd-missing": _files(("x", {})),
        "odd-no-json": b"{",
        "odd-a-list": b"[]",
        "odd-generation": of(CONFIG, []),
    }
    text = "text_config"
    rope = f"{text}/rope_parameters"
    edits: dict[str, tuple[str, Any]] = {
        "model": ("model_type", "llama"),
        "quantised": ("quantization_config", {"bits": 4}),
        "untied": ("tie_word_embeddings", False),
        "no-text": (text, ...),
        "activation": (f"{text}/hidden_activation", "relu"),
        "layers-0": (f"{text}/num_hidden_layers", 0),
        "layers-300": (f"{text}/num_hidden_layers", 300),
        "rotary-sliding": (
            f"{rope}/sliding_attention",
            {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1.0},
        ),
        "top-k": (f"{text}/top_k_experts", 9),
        "kv-heads": (f"{text}/num_key_value_heads", 3),
        "types-short": (f"{text}/layer_types", []),
        "types-other": (f"{text}/layer_types", ["x", "full_attention", "x"]),
        "head-odd": (f"{text}/head_dim", 33),
        "eps-text": (f"{text}/rms_norm_eps", "1"),
        "softcap-nan": (f"{text}/final_logit_softcapping", float("nan")),
        "layer-9": (f"{text}/per_layer_config", {"9": {}}),
        "layer-other": (f"{text}/per_layer_config", {"1": {"hidden_size": 64}}),
        "layer-head": (f"{text}/per_layer_config", {"1": {"head_dim": 64}}),
        "rope-type": (f"{rope}/full_attention/rope_type", "yarn"),
        "rotary-2": (f"{rope}/full_attention/partial_rotary_factor", 2.0),
        "end-id": (f"{text}/eos_token_id", 64),
    }
    for name, (path, value) in edits.items():
        made[f"odd-{name}"] = of(_set(CONFIG, path, value), {})
    made["odd-end-ids"] = of(CONFIG, GENERATION | {"eos_token_id": list(range(20))})
    made["odd-sampler"] = of(CONFIG, _set(GENERATION, "sampler_config/_cls_name", "Other"))
    return made


# ---- tokenizer.json ----

ADDED = [{"id": i, "content": text, "special": True} for i, text in enumerate(("<pad>", "<eos>", "<bos>", "<unk>"))]
ADDED += [{"id": 13, "content": "<|tool_call>", "special": True}, {"id": 14, "content": "<x>"}]
MAP, OLD = "special_tokens_map.json", "additional_special_tokens"
TOKENIZER: JSON = {
    "added_tokens": ADDED,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
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
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
        "vocab": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "b": 5, "ab": 6, "\u2581": 7},
        "merges": [["a", "b"]],
    },
}


def _around(token: str, number: int) -> JSON:
    """A post_processor that puts this token before a text; none for an empty one."""
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, *text] if token else text
    known = {token: {"id": token, "ids": [number], "tokens": [token]}} if token else {}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *text], "special_tokens": known}


def vocabulary() -> dict[str, bytes]:
    def of(top: Any, settings: Any = None, *more: tuple[str, Any]) -> bytes:
        settings = (
            {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "add_bos_token": False}
            if settings is None
            else settings
        )
        return _files(("tokenizer.json", top), ("tokenizer_config.json", settings), *more)

    begun = _set(TOKENIZER, "post_processor", _around("<bos>", 2))
    made = {
        "seed-begun": of(begun),
        "seed-not-begun": of(_set(TOKENIZER, "post_processor", _around("", 2))),
        "odd-begun": of(_set(TOKENIZER, "post_processor", _around("<eos>", 1))),
        "seed-whole": of(TOKENIZER, None, ("chat_template.jinja", "{{ messages }}")),
        "seed-alone": json.dumps(TOKENIZER).encode(),
        "seed-template": of(TOKENIZER, {"chat_template": [{"name": "default", "template": "x"}, 5]}),
        "seed-processor": of(TOKENIZER, {}, ("processor_config.json", {"chat_template": {"default": "x"}})),
        "seed-older": of(TOKENIZER, {}, (MAP, {"sep_token": "a", OLD: ["b"], "bos_token": {"content": "<bos>"}})),
        "seed-older-added": of(TOKENIZER, {"tokenizer_class": "GemmaTokenizer"}, ("added_tokens.json", {"ab": 6})),
        "odd-older": of(TOKENIZER, {}, (MAP, {"pad_token": "<s>", "x_token": {}})),
        "odd-older-added": of(TOKENIZER, {}, ("added_tokens.json", {"ab": "6"})),
        "seed-no-template": of(TOKENIZER, {"chat_template": [{"name": "rag", "template": "x"}]}),
        "odd-unknown": of(TOKENIZER, {"unk_token": "<pad>"}),
        "odd-class": of(TOKENIZER, {"tokenizer_class": "LlamaTokenizer"}),
        "odd-nothing": _files(("x", {})),
        "odd-settings": of(TOKENIZER, []),
        "odd-no-token": of(TOKENIZER, {"bos_token": "<s>"}),
        "odd-token-of-list": of(TOKENIZER, {"bos_token": []}),
        "odd-spm": _files(("tokenizer.model", "\n\x05x")),
        "odd-half-a-character": of(_set(TOKENIZER, "model/vocab", {"\ud800": 4})),
    }
    latin = of(TOKENIZER, None, ("chat_template.jinja", "\udcff"))
    made["odd-template"] = latin
    edits: dict[str, tuple[str, Any]] = {
        "model": ("model/type", "Unigram"),
        "no-model": ("model", None),
        "suffix": ("model/end_of_word_suffix", "x"),
        "added": ("added_tokens", {"a": 1}),
        "added-number": ("added_tokens", [{"id": 4, "content": 5}]),
        "id-beyond": ("model/vocab", {"a": 16}),
        "id-twice": ("model/vocab", {"a": 4, "b": 4}),
        "id-text": ("added_tokens", [{"id": "1", "content": "a"}]),
        "normalizer": ("normalizer", {"type": "NFC"}),
        "split": ("pre_tokenizer", {"type": "Metaspace", "pattern": 1}),
        "merge-of-3": ("model/merges", [["a", "b", "c"]]),
        "merge-of-spaces": ("model/merges", [["a b", "c"]]),
        "merge-of-one": ("model/merges", ["ab"]),
        "merges-5": ("model/merges", 5),
        "one-byte": ("model/vocab/<0x41>", 8),
        "byte-added": ("added_tokens", [*ADDED, {"id": 8, "content": "<0x41>"}]),
        "normalizer-of-text": ("normalizer", "x"),
        "nested": ("normalizer/normalizers", [{"type": "Sequence", "normalizers": []}]),
        "normalizers-5": ("normalizer/normalizers", 5),
    }
    return made | {f"odd-{name}": of(_set(TOKENIZER, path, value)) for name, (path, value) in edits.items()}


# ---- tokenizer.model ----


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protocol buffer: bytes with their length, a float32, or a whole number below 128."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return _field(1, _field(1, text) + _field(2, score) + _field(3, kind))


def sentencepiece() -> dict[str, bytes]:
    control, unknown, user_defined, byte = 3, 2, 4, 6
    special = [_piece(b"<pad>", 0.0, control), _piece(b"<eos>", 0.0, control), _piece(b"<bos>", 0.0, control)]
    special += [_piece(b"<unk>", 0.0, unknown), _piece(b"<x>", 0.0, user_defined)]
    special.append(_piece(b"<|tool_call>", 0.0, user_defined))
    words = [_piece(b"ab", -0.0), _piece("\u2581".encode(), -1.0), _piece(b"a", -2.0), _piece(b"b", -3.0)]
    trainer = _field(2, _field(3, 2) + b"".join(_field(40 + i, n) for i, n in enumerate((3, 2, 1, 0))))  # BPE
    spaces = _field(3, 0) + _field(4, 0) + _field(5, 1)  # none in front, none folded, each U+2581
    whole = b"".join([*special, *words]) + trainer + _field(3, _field(1, b"identity") + spaces)
    return {
        "seed-whole": whole,
        "odd-empty": b"",
        "odd-text": b"\n\x05x",
        "odd-cut-off": whole[:-5],
        "odd-no-utf-8": whole + _piece(b"\xff\xfe", -4.0),
        "odd-no-utf-8-twice": whole + _piece(b"\xff", -4.0) * 2,
        "odd-score-nan": whole + _piece(b"c", float("nan")),
        "odd-score-infinite": whole + _piece(b"c", float("-inf")),
        "odd-unigram": whole + _piece(b"c", -0.5),
        "odd-byte": whole + _piece(b"<0x41>", 0.0, byte),
        "odd-byte-as-text": whole + _piece(b"<0x41>", -4.0),
        "odd-user-defined-of-spaces": whole + _piece("\u2581c".encode(), 0.0, user_defined),
        "odd-too-many": whole + b"".join(_piece(bytes([99 + i]), -4.0 - i) for i in range(8)),
        "seed-null": whole + _piece(b"\0", -4.0),
        "odd-folded": whole + _field(3, _field(4, 1)),
    }


# ---- imatrix ----


def _dat(entries: list[tuple[str, list[float]]], tail: bytes = b"", count: int | None = None) -> bytes:
    out = struct.pack("<i", len(entries) if count is None else count)
    for name, numbers in entries:
        raw = name.encode()
        out += (
            struct.pack("<i", len(raw))
            + raw
            + struct.pack("<ii", 1, len(numbers))
            + struct.pack(f"<{len(numbers)}f", *numbers)
        )
    return out + tail


def _gguf(tensors: dict[str, tuple[list[int], list[float]]], kind: str = "imatrix") -> bytes:
    values = [odd.value("general.type", odd.STRING, kind), odd.array("imatrix.datasets", odd.STRING, ["text.txt"])]
    values.append(odd.value("imatrix.chunk_count", odd.U32, 3))
    infos, data = [], b""
    for name, (dims, numbers) in tensors.items():
        infos.append(odd.tensor(name, dims, 0, len(data)))
        raw = struct.pack(f"<{len(numbers)}f", *numbers)
        data += raw.ljust(-(-len(raw) // 32) * 32, b"\0")
    return odd.file(values, infos) + data


def imatrix() -> dict[str, bytes]:
    squares, counts = ([4, 2], [1.0, 2, 3, 4, 5, 6, 7, 8]), ([1, 2], [300.0, 2.0])
    whole = {"blk.0.x.weight.in_sum2": squares, "blk.0.x.weight.counts": counts}
    nan = float("nan")
    return {
        "seed-dat": _dat(
            [("a.weight", [1, 2, 3, 4]), ("blk.0.ffn_up_exps.weight", [1, 2, 0, 0])],
            struct.pack("<ii4s", 2, 4, b"text"),
        ),
        "seed-gguf": _gguf(whole),
        "seed-gguf-means": _gguf(whole | {"blk.0.x.weight.in_sum": squares}),
        "seed-gguf-one": _gguf(
            {"a.in_sum2": ([4], [1.0, 2, 3, 4]), "a.counts": ([1], [3.0]), "a.in_sum": ([4], [1.0, 1, 1, 1])}
        ),
        "odd-empty": b"",
        "odd-claimed": _dat([], count=1 << 30),
        "odd-negative": _dat([("a", [-1.0, 1.0])]),
        "odd-no-numbers": _dat([("a", [])]),
        "odd-type": _gguf(whole, "model"),
        "odd-counts": _gguf(whole | {"blk.0.x.weight.counts": ([1, 3], [1.0, 2, 3])}),
        "odd-no-counts": _gguf({"a.in_sum2": squares}),
        "odd-sums": _gguf(whole | {"blk.0.x.weight.in_sum": ([4], [1.0, 2, 3, 4])}),
        "odd-sums-too-large": _gguf(whole | {"blk.0.x.weight.in_sum": ([4, 2], [1e38] * 8)}),
        "odd-counts-nan": _gguf(whole | {"blk.0.x.weight.counts": ([1, 2], [nan, 1.0])}),
        "odd-counts-0": _gguf(whole | {"blk.0.x.weight.counts": ([1, 2], [0.0, 0.0])}),
        "odd-sums-nan": _gguf(whole | {"blk.0.x.weight.in_sum": ([4, 2], [nan] * 8)}),
    }


# ---- calls ----


def calls() -> dict[str, bytes]:
    call = "<|channel>thought\nhm<channel|>It is "
    call += '<|tool_call>call:f{a:<|"|>x<|"|>,b:[1,-2.5e3,{c:true}],d:null}<tool_call|>.'

    def of(arguments: str) -> bytes:
        return f"<|tool_call>call:f{{{arguments}}}<tool_call|>".encode()

    return {
        "seed-call": call.encode(),
        "seed-open": b"<|tool_call>call:f{a:",
        "seed-text": b"plain\xff text",
        "seed-marks": b'<|"|><channel|><|channel>a<|tool_call>b<|"|><|channel>c<|tool_call>call:g{}<tool_call|>',
        "seed-header": b"<|channel>thou",
        "seed-half-a-mark": b"a<|tool_",
        "seed-json": of('"a" : "x\\u0041" , "b":"\\ud800"'),
        "seed-visible": b"<|channel>thought\n"
        + "\u00e9\U0001f600".encode()
        + b"<channel|>x<|channel>thought<channel|>",
        "odd-string-open": of('a:<|"|>x'),
        "odd-json-open": of('a:"x'),
        "odd-word": of("a:yes!"),
        "odd-number": of("a:1e999"),
        "odd-no-number": of("a:-"),
        "odd-no-colon": of("a b"),
        "odd-no-key": of(":1"),
        "odd-no-comma": of("a:[1 2]"),
        "odd-behind": b"<|tool_call>call:f{}x<tool_call|>",
        "odd-no-name": b"<|tool_call>f{}<tool_call|>",
        "odd-deep": of("a:" + "[" * 70),
    }


# ---- requests ----

CALL: JSON = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2.5, null]}'}}
FUNCTION: JSON = {"name": "f", "description": "x", "parameters": {"type": "object"}, "strict": None}
CHAT: JSON = {
    "tools": [{"type": "function", "function": FUNCTION}],
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
        {"role": "user", "content": "x", "name": "n", "audio": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "r", "diffusion": {}},
        {"role": "tool", "tool_call_id": "c", "content": "18"},
        {"role": "model", "content": "", "refusal": "no", "tool_responses": [{"name": "f", "response": 1}]},
    ],
}


def requests() -> dict[str, bytes]:
    def of(value: Any) -> bytes:
        return json.dumps(value).encode()

    bare = {"name": "f", "arguments": {}}
    made = {
        "seed-chat": of(CHAT),
        "seed-lines": b"\xef\xbb\xbf" + of(CHAT) + b"\r\n \n[]\n" + of(CHAT["messages"][:2]),
        "seed-breaks": '{"messages": [{"role": "user", "content": "a\u2028\x85b"}]}'.encode(),
        "seed-own": of({"messages": [{"role": "user", "content": "x", "mood": 1}], "template": "mood"}),
        "seed-whole": of(CHAT | {"template": "*"}),
        "seed-thought": of({"messages": [{"role": "model", "thinking": "x"}], "template": "thinking"}),
        "seed-named": of([*CHAT["messages"][2:3], {"role": "tool", "name": "f", "content": "18"}]),
        "odd-thought": of({"messages": [{"role": "model", "thinking": "x"}], "template": "content"}),
        "odd-calls-not-read": of(CHAT | {"template": "name"}),
        "odd-user-refusal": of([{"role": "user", "content": "x", "refusal": "no"}]),
        "odd-response-bare": of([{"role": "tool", "content": "18"}]),
        "odd-response-name": of([{"role": "tool", "content": "18", "name": "f"}]),
        "odd-response-names": of([*CHAT["messages"][2:3], CHAT["messages"][3] | {"name": "g"}]),
        "odd-response-other": of(
            [
                *CHAT["messages"][2:4],
                {**CHAT["messages"][2], "tool_calls": [CALL | {"id": "d", "function": {"name": "g"}}]},
                CHAT["messages"][3] | {"name": "g"},
            ]
        ),
        "seed-bare": of({"messages": [{"role": "assistant", "tool_calls": [bare]}], "tools": [FUNCTION]}),
        "odd-utf-8": b'{"messages": "\xff"}',
        "odd-json": b"{",
        "odd-twice": b'{"a": 1, "a": 2}',
        "odd-nan": b'{"a": NaN}',
        "odd-digits": b"9" * 400,
        "odd-exponent": b"1e999",
        "odd-deep": b"[" * 120 + b"]" * 120,
        "odd-deeper": b"[" * 3000,
        "odd-response": of(CHAT["messages"][3:4]),
        "odd-user-calls": of([{"role": "user", "content": "x", "tool_calls": [CALL]}]),
    }
    for name, path, value in (
        ("tools", "tools", {}),
        ("tool", "tools", [1]),
        ("tool-type", "tools", [{"type": "web_search"}]),
        ("tool-name", "tools", [{"type": "function"}]),
        ("tool-text", "tools", [FUNCTION | {"description": 1}]),
        ("tool-strict", "tools", [FUNCTION | {"strict": True}]),
        ("none", "messages", []),
        ("no-list", "messages", "x"),
        ("message", "messages", ["x"]),
        ("no-role", "messages", [{"content": "x"}]),
        ("role", "messages", [{"role": "nobody", "content": "x"}]),
        ("content", "messages", [{"role": "user", "content": 1}]),
        ("no-content", "messages", [{"role": "user"}]),
        ("field", "messages", [{"role": "user", "content": "x", "images": [1]}]),
        ("name", "messages", [{"role": "user", "content": "x", "name": 1}]),
        ("refusal", "messages", [{"role": "assistant", "refusal": 1}]),
        ("part", "messages", [{"role": "user", "content": ["x"]}]),
        ("part-type", "messages", [{"role": "user", "content": [{"type": "image"}]}]),
        ("part-text", "messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("part-more", "messages", [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]),
        ("calls", "messages", [{"role": "assistant", "tool_calls": {"a": 1}}]),
        ("call", "messages", [{"role": "assistant", "tool_calls": [1]}]),
        ("call-type", "messages", [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]),
        ("call-name", "messages", [{"role": "assistant", "tool_calls": [{"function": {}}]}]),
        ("call-none", "messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]),
        ("call-list", "messages", [{"role": "assistant", "tool_calls": [bare | {"arguments": []}]}]),
        ("call-text", "messages", [{"role": "assistant", "tool_calls": [bare | {"arguments": "{"}]}]),
        ("responses", "messages", [{"role": "tool", "content": "x", "tool_responses": [1]}]),
    ):
        made[f"odd-{name}"] = of(_set(CHAT, path, value))
    return made


def seeds() -> dict[str, dict[str, bytes]]:
    made = {"safetensors": safetensors(), "calls": calls(), "config": config(), "vocabulary": vocabulary()}
    return made | {"imatrix": imatrix(), "requests": requests(), "sentencepiece": sentencepiece()}
