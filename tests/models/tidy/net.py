"""The network: DiffusionGemma's text half, named as in transformers, so that the state dict is the checkpoint.

config.json beside this file is the architecture. Prompts of a batch may differ in length: they are padded at the end,
and `lengths` says where each one's canvas begins.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text())
TEXT = CONFIG["text_config"]
VOCAB, HIDDEN, CANVAS = TEXT["vocab_size"], TEXT["hidden_size"], CONFIG["canvas_length"]
POSITIONS = 512  # the longest prompt and its canvas


def rms(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + TEXT["rms_norm_eps"])


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
    def __init__(self, size: int, value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) * self.weight


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(HIDDEN, TEXT["intermediate_size"]) for _ in range(2))
        self.down_proj = linear(TEXT["intermediate_size"], HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, full: bool):
        super().__init__()
        self.size = TEXT["global_head_dim"] if full else TEXT["head_dim"]
        heads = TEXT["num_attention_heads"]
        kv_heads = TEXT["num_global_key_value_heads" if full else "num_key_value_heads"]
        self.group = heads // kv_heads
        self.q_proj, self.k_proj = linear(HIDDEN, heads * self.size), linear(HIDDEN, kv_heads * self.size)
        self.v_proj = None if full else linear(HIDDEN, kv_heads * self.size)  # full layers: values are the raw keys
        self.o_proj = linear(heads * self.size, HIDDEN)
        self.q_norm, self.k_norm = (Norm(self.size, self.size**-0.25) for _ in range(2))
        rope = TEXT["rope_parameters"]["full_attention" if full else "sliding_attention"]
        turning = int(rope.get("partial_rotary_factor", 1.0) * self.size / 2)
        pairs = torch.arange(self.size // 2)
        speed = torch.where(pairs < turning, rope["rope_theta"] ** (-2.0 * pairs / self.size), 0.0)
        angle = torch.arange(POSITIONS)[:, None] * speed
        self.register_buffer("turns", torch.stack([angle.cos(), angle.sin()], -1), persistent=False)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None):
        """x [batch, tokens, hidden] at positions [batch or 1, tokens]; past: keys and values in front, of which mask
        [batch, 1, 1, keys] allows some. Without a past it is causal. The sliding window covers whatever is here."""
        turns = self.turns[at][:, :, None]
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.size))), turns)
        k = self.k_proj(x).unflatten(-1, (-1, self.size))
        v = rms(k if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.size))).to(x.dtype)
        k = rotate(self.k_norm(k), turns).to(x.dtype)
        keys_values = k, v
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        k, v = (t.repeat_interleave(self.group, 2).transpose(1, 2) for t in (k, v))
        q = q.to(x.dtype).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None, scale=1.0)
        return self.o_proj(out.transpose(1, 2).flatten(2)), keys_values


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = linear(HIDDEN, TEXT["num_experts"])
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.per_expert_scale = nn.Parameter(torch.ones(TEXT["num_experts"]))

    def forward(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the experts, zero outside the top k; and a loss that is least when all are used alike."""
        with torch.autocast("cpu", enabled=False):
            probs = self.proj(normed.float() * self.scale * HIDDEN**-0.5).softmax(-1)
        top = probs >= probs.topk(TEXT["top_k_experts"], -1).values[..., -1:]
        weights = torch.where(top, probs, 0.0)
        balance = (top.flatten(0, 1).float().mean(0) * probs.flatten(0, 1).mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True) * self.per_expert_scale, balance


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        count, size = TEXT["num_experts"], TEXT["moe_intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * size, HIDDEN) * HIDDEN**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, HIDDEN, size) * size**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """All experts as two dense products: cheaper than gathering tokens at this size."""
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (len(self.down_proj), -1)).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh") * up * weights[..., None]
        return F.linear(hidden.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, full: bool):
        super().__init__()
        self.self_attn, self.mlp, self.router, self.experts = Attention(full), Mlp(), Router(), Experts()
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN), Norm(HIDDEN)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(HIDDEN), Norm(HIDDEN)
        self.pre_feedforward_layernorm_2 = Norm(HIDDEN)
        self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = Norm(HIDDEN), Norm(HIDDEN)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None):
        """Encoder (no past) or decoder (reads past): hidden state, keys and values, balance loss."""
        change, keys_values = self.self_attn(self.input_layernorm(x), at, mask, past)
        x = x + self.post_attention_layernorm(change)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        weights, balance = self.router(rms(x))
        sparse = self.post_feedforward_layernorm_2(self.experts(self.pre_feedforward_layernorm_2(x), weights))
        return x + self.post_feedforward_layernorm(dense + sparse), keys_values, balance


class Net(nn.Module):
    def __init__(self, room: int = 0):
        """room: cached tokens to which shorter prompts are padded."""
        super().__init__()
        self.room = room
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed_tokens.weight, std=HIDDEN**-0.5)
        self.self_conditioning = Mlp()
        self.self_conditioning.pre_norm = Norm(HIDDEN)
        self.layers = nn.ModuleList(Layer(kind == "full_attention") for kind in TEXT["layer_types"])
        self.norm = Norm(HIDDEN)

    def head(self, x: Tensor) -> Tensor:
        cap = TEXT["final_logit_softcapping"]
        with torch.autocast("cpu", enabled=False):
            return cap * torch.tanh(F.linear(self.norm(x), self.embed_tokens.weight) / cap)

    def encode(self, prompt: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """The last hidden state [batch, tokens, hidden], keys and values of each layer, and the balance loss."""
        x, cache, total = self.embed_tokens(prompt) * HIDDEN**0.5, [], torch.zeros(())
        at = torch.arange(prompt.shape[1])[None]
        for layer in self.layers:
            x, keys_values, balance = layer(x, at)
            cache.append(keys_values)
            total = total + balance
        return x, cache, total

    def decode(self, canvas: Tensor, cache: list[tuple[Tensor, Tensor]], lengths: Tensor, condition: Tensor):
        """Logits [batch, canvas, vocabulary] behind the first `lengths` [batch] tokens of the cache, and the balance
        loss. condition: probabilities of the step before, or zeros."""
        guess = condition @ self.embed_tokens.weight * HIDDEN**0.5
        x = self.embed_tokens(canvas) * HIDDEN**0.5
        x = rms(x + self.self_conditioning(self.self_conditioning.pre_norm(guess)))
        at = lengths[:, None] + torch.arange(CANVAS)
        short = max(0, self.room - cache[0][0].shape[1])  # one length for all prompts, for the compiler
        cache = [(F.pad(k, (0, 0, 0, 0, 0, short)), F.pad(v, (0, 0, 0, 0, 0, short))) for k, v in cache]
        keys = torch.arange(cache[0][0].shape[1] + CANVAS)
        seen = (keys < lengths[:, None]) | (keys >= len(keys) - CANVAS)
        mask = seen[:, None, None].expand(-1, 1, CANVAS, -1)
        total = torch.zeros(())
        for layer, past in zip(self.layers, cache, strict=True):
            x, _, balance = layer(x, at, mask, past)
            total = total + balance
        return self.head(x), total
