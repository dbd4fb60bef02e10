"""The network of both trained models: DiffusionGemma's text half, named as in transformers, so that its state dict is
the checkpoint.

`text` is the "text_config" of the model's config.json. Prompts of a batch may differ in length: they are padded at the
end, and `lengths` says where each one's canvas begins.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Text = dict[str, Any]


def rms(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [batch, tokens, heads, size]; turns [batch or 1, tokens, 1, size / 2, 2]: cosines and sines."""
    a, b = x.chunk(2, -1)
    cos, sin = turns.unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class Norm(nn.Module):
    def __init__(self, size: int, eps: float, value: float = 1.0):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


class Mlp(nn.Module):
    def __init__(self, text: Text):
        super().__init__()
        hidden, size = text["hidden_size"], text["intermediate_size"]
        self.gate_proj, self.up_proj = (linear(hidden, size) for _ in range(2))
        self.down_proj = linear(size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, text: Text, full: bool, positions: int):
        super().__init__()
        self.size = text["global_head_dim"] if full else text["head_dim"]
        self.eps = text["rms_norm_eps"]
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        kv_heads = text["num_global_key_value_heads" if full else "num_key_value_heads"]
        self.group = heads // kv_heads
        self.q_proj, self.k_proj = linear(hidden, heads * self.size), linear(hidden, kv_heads * self.size)
        self.v_proj = None if full else linear(hidden, kv_heads * self.size)  # full layers: values are the raw keys
        self.o_proj = linear(heads * self.size, hidden)
        self.q_norm, self.k_norm = (Norm(self.size, self.eps, self.size**-0.25) for _ in range(2))
        rope = text["rope_parameters"]["full_attention" if full else "sliding_attention"]
        turning = int(rope.get("partial_rotary_factor", 1.0) * self.size / 2)
        pairs = torch.arange(self.size // 2)
        speed = torch.where(pairs < turning, rope["rope_theta"] ** (-2.0 * pairs / self.size), 0.0)
        angle = torch.arange(positions)[:, None] * speed
        self.register_buffer("turns", torch.stack([angle.cos(), angle.sin()], -1), persistent=False)

    def keys_values(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, hidden] at positions [batch or 1, tokens]: each [batch, tokens, heads, size]."""
        k = self.k_proj(x).unflatten(-1, (-1, self.size))
        v = rms(k if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.size)), self.eps).to(x.dtype)
        return rotate(self.k_norm(k), self.turns[at][:, :, None]).to(x.dtype), v

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None):
        """x and at as in keys_values; past: keys and values in front, of which mask [batch or 1, 1, tokens, keys]
        allows some. Without a past it is causal. The sliding window covers whatever is here."""
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.size))), self.turns[at][:, :, None])
        keys_values = k, v = self.keys_values(x, at)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        k, v = (t.repeat_interleave(self.group, 2).transpose(1, 2) for t in (k, v))
        q = q.to(x.dtype).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None, scale=1.0)
        return self.o_proj(out.transpose(1, 2).flatten(2)), keys_values


class Router(nn.Module):
    def __init__(self, text: Text):
        super().__init__()
        hidden, count, self.top_k = text["hidden_size"], text["num_experts"], text["top_k_experts"]
        self.proj = linear(hidden, count)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(count))

    def forward(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the experts, zero outside the top k; and a loss that is least when all are used alike."""
        with torch.autocast("cpu", enabled=False):
            probs = self.proj(normed.float() * self.scale * normed.shape[-1] ** -0.5).softmax(-1)
        top = probs >= probs.topk(self.top_k, -1).values[..., -1:]
        weights = torch.where(top, probs, 0.0)
        balance = (top.flatten(0, 1).float().mean(0) * probs.flatten(0, 1).mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True) * self.per_expert_scale, balance


class Experts(nn.Module):
    def __init__(self, text: Text):
        super().__init__()
        hidden, count, size = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * size, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, size) * size**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """All experts as two dense products: cheaper than gathering tokens at this size."""
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (len(self.down_proj), -1)).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh") * up * weights[..., None]
        return F.linear(hidden.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, text: Text, full: bool, positions: int):
        super().__init__()
        self.eps = text["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(text, full, positions), Mlp(text)
        self.router, self.experts = Router(text), Experts(text)
        for name in (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
            "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
        ):  # fmt: skip
            self.add_module(name, Norm(text["hidden_size"], self.eps))

    def keys_values(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return self.self_attn.keys_values(self.input_layernorm(x), at)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None):
        """Encoder (no past) or decoder (reads past): hidden state, keys and values, balance loss."""
        change, keys_values = self.self_attn(self.input_layernorm(x), at, mask, past)
        x = x + self.post_attention_layernorm(change)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        weights, balance = self.router(rms(x, self.eps))
        sparse = self.post_feedforward_layernorm_2(self.experts(self.pre_feedforward_layernorm_2(x), weights))
        return x + self.post_feedforward_layernorm(dense + sparse), keys_values, balance


class Net(nn.Module):
    def __init__(self, config: dict[str, Any], positions: int, room: int = 0):
        """config: the model's config.json. positions: the most tokens of a prompt and its canvas.
        room: cached tokens to which shorter prompts are padded."""
        super().__init__()
        text = config["text_config"]
        self.canvas, self.room = config["canvas_length"], room
        self.hidden, self.eps, self.cap = text["hidden_size"], text["rms_norm_eps"], text["final_logit_softcapping"]
        self.embed_tokens = nn.Embedding(text["vocab_size"], self.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=self.hidden**-0.5)
        self.self_conditioning = Mlp(text)
        self.self_conditioning.pre_norm = Norm(self.hidden, self.eps)
        self.layers = nn.ModuleList(Layer(text, kind == "full_attention", positions) for kind in text["layer_types"])
        self.norm = Norm(self.hidden, self.eps)

    def head(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.cap * torch.tanh(F.linear(self.norm(x), self.embed_tokens.weight) / self.cap)

    def encode(self, prompt: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """The last hidden state [batch, tokens, hidden], keys and values of each layer, and the balance loss."""
        x, at, total = (
            self.embed_tokens(prompt) * self.hidden**0.5,
            torch.arange(prompt.shape[1])[None],
            torch.zeros(()),
        )
        cache = []
        for layer in self.layers:
            x, keys_values, balance = layer(x, at)
            cache.append(keys_values)
            total = total + balance
        return x, cache, total

    def keys_values(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of encode() alone: the last layer need not do more."""
        x, at, cache = self.embed_tokens(prompt) * self.hidden**0.5, torch.arange(prompt.shape[1])[None], []
        for layer in self.layers[:-1]:
            x, keys_values, _ = layer(x, at)
            cache.append(keys_values)
        return [*cache, self.layers[-1].keys_values(x, at)]

    def decode(self, canvas: Tensor, cache: list[tuple[Tensor, Tensor]], lengths: Tensor, condition: Tensor):
        """Logits [batch, canvas, vocabulary] behind the first `lengths` [batch or 1] tokens of the cache, and the
        balance loss. condition: probabilities of the step before, or zeros."""
        guess = condition @ self.embed_tokens.weight * self.hidden**0.5
        x = self.embed_tokens(canvas) * self.hidden**0.5
        x = rms(x + self.self_conditioning(self.self_conditioning.pre_norm(guess)), self.eps)
        at = lengths[:, None] + torch.arange(self.canvas)
        short = max(0, self.room - cache[0][0].shape[1])  # one length for all prompts, for the compiler
        cache = [(F.pad(k, (0, 0, 0, 0, 0, short)), F.pad(v, (0, 0, 0, 0, 0, short))) for k, v in cache]
        keys = torch.arange(cache[0][0].shape[1] + self.canvas)
        seen = (keys < lengths[:, None]) | (keys >= len(keys) - self.canvas)
        mask = seen[:, None, None].expand(-1, 1, self.canvas, -1)
        total = torch.zeros(())
        for layer, past in zip(self.layers, cache, strict=True):
            x, _, balance = layer(x, at, mask, past)
            total = total + balance
        return self.head(x), total
