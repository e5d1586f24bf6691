"""A Llama-shaped decoder whose widths belong to the layer, and what it costs.

    python -c "import model; print(model.preset('laptop', vocab_size=256)[0].num_params())"

`GPTConfig` holds one number of query heads, KV heads and FFN neurons *per layer*, so a pruned model is the same class
with other numbers: no masks, no subclasses. Zero heads or zero neurons switch that sub-block (and the norm before it)
off. RMSNorm, rotary positions (with Llama-3 scaling), grouped-query attention, SwiGLU; optionally tied embedding, QKV
bias and QK norm: SmolLM2, MobileLLM, Llama 2/3, Qwen 2.5 and Qwen 3 are configs of it, not code paths.

Shapes: B sequences, T tokens, C d_model, D head_dim, V vocabulary; H_l query heads, K_l KV heads, F_l neurons in
layer l. Not here: dropout, sliding windows, mixture of experts, tensor parallelism.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The whole shape of a model. Raises UserError where the numbers do not fit each other."""
    vocab_size: int
    block_size: int                        # tokens of context the model is trained with
    d_model: int
    head_dim: int
    n_head: tuple[int, ...]                # query heads, layer by layer; 0 = the layer has no attention
    n_kv_head: tuple[int, ...]             # key/value heads, layer by layer; each serves n_head/n_kv_head query heads
    d_ff: tuple[int, ...]                  # SwiGLU neurons, layer by layer; 0 = the layer has no FFN
    tie_embeddings: bool = True
    qkv_bias: bool = False                 # Qwen 2.5
    qk_norm: bool = False                  # Qwen 3: RMSNorm over each head of q and k, one gain per layer
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()   # Llama 3: (factor, low_freq_factor, high_freq_factor, original context)

    def __post_init__(self):
        for name in ("n_head", "n_kv_head", "d_ff", "rope_scaling"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.n_head) == len(self.n_kv_head) == len(self.d_ff) > 0:
            raise UserError(f"n_head, n_kv_head and d_ff need one number per layer, got {len(self.n_head)}, "
                            f"{len(self.n_kv_head)} and {len(self.d_ff)}")
        for layer, (h, k, f) in enumerate(zip(self.n_head, self.n_kv_head, self.d_ff)):
            if min(h, k, f) < 0 or (h == 0) != (k == 0) or (k and h % k):
                raise UserError(f"layer {layer}: {h} query heads over {k} KV heads and {f} neurons; query heads must "
                                "be a multiple of KV heads, both zero or neither, and nothing negative")
        if self.head_dim % 2 or min(self.vocab_size, self.block_size, self.d_model, self.head_dim) < 1:
            raise UserError(f"head_dim {self.head_dim} must be even (rotary positions turn pairs), and vocab_size "
                            f"{self.vocab_size}, block_size {self.block_size}, d_model {self.d_model} positive")

    @property
    def n_layer(self):
        return len(self.d_ff)

    # -- units: what pruning removes. "ffn": one neuron (a gate row, an up row, a down column). "kv": one KV head
    #    together with the query heads it serves (k, v and q rows, o columns). Together: the *removable* parameters.
    def widths(self):
        """{(layer, kind): number of units} over the kinds "ffn" and "kv"."""
        return {(l, kind): n for kind, ns in (("ffn", self.d_ff), ("kv", self.n_kv_head)) for l, n in enumerate(ns)}

    def unit_params(self, layer, kind):
        """Parameters of one unit of that layer (norms and embeddings belong to no unit)."""
        if kind == "ffn":
            return 3 * self.d_model
        group = self.n_head[layer] // max(1, self.n_kv_head[layer])
        return self.head_dim * ((2 * group + 2) * self.d_model + (group + 2) * self.qkv_bias)

    def removable_params(self):
        return sum(n * self.unit_params(l, kind) for (l, kind), n in self.widths().items())

    def resized(self, widths):
        """The same model with other widths: {(layer, kind): units} -> GPTConfig. Layers that are not named keep
        theirs."""
        w = {**self.widths(), **widths}
        group = [h // max(1, k) for h, k in zip(self.n_head, self.n_kv_head)]
        return dataclasses.replace(self, d_ff=tuple(w[l, "ffn"] for l in range(self.n_layer)),
                                   n_kv_head=tuple(w[l, "kv"] for l in range(self.n_layer)),
                                   n_head=tuple(w[l, "kv"] * group[l] for l in range(self.n_layer)))

    # -- cost
    def num_params(self):
        """Parameters by group: {"embedding", "attention", "ffn", "norm", "head", "total"}; a tied head counts once,
        as embedding."""
        C, D = self.d_model, self.head_dim
        groups = {
            "embedding": self.vocab_size * C,
            "attention": sum(D * (2 * (h + k) * C + (h + 2 * k) * self.qkv_bias)
                             for h, k in zip(self.n_head, self.n_kv_head)),
            "ffn": sum(3 * C * f for f in self.d_ff),
            "norm": C * (1 + sum(h > 0 for h in self.n_head) + sum(f > 0 for f in self.d_ff))
                    + 2 * D * self.qk_norm * sum(h > 0 for h in self.n_head),
            "head": 0 if self.tie_embeddings else self.vocab_size * C}
        return groups | {"total": sum(groups.values())}

    def flops_per_token(self, T, backward=True):
        """FLOPs per token at context T: 2 per matrix entry and multiply-add, attention counted over the full T x T
        square as in PaLM (arXiv 2204.02311, appendix B; a causal kernel does half of it), norms and activations not
        counted; the backward pass costs twice the forward pass."""
        p = dataclasses.replace(self, qkv_bias=False).num_params()    # a bias is added, not multiplied
        matrices = p["attention"] + p["ffn"] + self.vocab_size * self.d_model
        forward = 2 * matrices + 4 * T * self.head_dim * sum(self.n_head)
        return forward * (3 if backward else 1)

    def kv_bytes_per_token(self, bytes_per_value=2):
        """Bytes that one token of context adds to the KV cache (2 bytes a value = bf16)."""
        return 2 * self.head_dim * sum(self.n_kv_head) * bytes_per_value


# -- units: which entries of which parameters belong to one
def coupled(config, layer, kind):
    """Parameters that a unit of this layer has entries in: [(name, dimension that runs over the units)]. A unit's
    entries are consecutive along it: 1 row of a neuron, D rows of a KV head, (H_l/K_l)·D rows of the query heads it
    serves. The last of the weights, `down` or `o`, reads the unit's output: its columns are the unit's channels."""
    if kind == "ffn":
        return [(f"blocks.{layer}.ffn.{name}.weight", dim) for name, dim in (("gate", 0), ("up", 0), ("down", 1))]
    bias = [("q.bias", 0), ("k.bias", 0), ("v.bias", 0)] if config.qkv_bias else []
    return [(f"blocks.{layer}.attn.{name}", dim)
            for name, dim in bias + [("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("o.weight", 1)]]


def by_unit(tensor, dim, units):
    """View with the dimension split: (…, units · r, …) -> (…, units, r, …); dimension `dim` now counts units."""
    return tensor.unflatten(dim, (units, -1))


def rotary(config, start, T, device, dtype):
    """cos, sin (T, D) of positions start … start+T-1 (RoFormer, arXiv 2104.09864), each angle twice, for both halves of
    a head, and sin negative in the first; formed in float64 and rounded once; Llama 3's frequency scaling where
    config.rope_scaling is set (as in Meta's release, smooth between the two factors)."""
    D = config.head_dim
    wide = torch.float32 if device.type == "mps" else torch.float64       # Apple's GPUs have no float64
    freq = config.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=wide) / D)
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        turns = original * freq / (2 * math.pi)                      # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)          # 0: slow, divide by factor; 1: fast, leave
        freq = freq * (smooth + (1 - smooth) / factor)
    angle = torch.outer(torch.arange(start, start + T, device=device, dtype=wide), freq)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of every head by its position's angle. x (B, H, T, D), cos and sin (T, D)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((b, a), -1) * sin).to(x.dtype)           # x.roll is as fast, but not where compiled


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467)."""
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention. (B, T, C) -> (B, T, C)"""
    def __init__(self, config, layer):
        super().__init__()
        C, self.D = config.d_model, config.head_dim
        self.H, self.K = config.n_head[layer], config.n_kv_head[layer]
        self.q = nn.Linear(C, self.H * self.D, bias=config.qkv_bias)
        self.k = nn.Linear(C, self.K * self.D, bias=config.qkv_bias)
        self.v = nn.Linear(C, self.K * self.D, bias=config.qkv_bias)
        self.o = nn.Linear(self.H * self.D, C, bias=False)
        self.q_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, mask=None):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.H, self.D).transpose(1, 2)      # (B, H_l, T, D)
        k = self.k(x).view(B, T, self.K, self.D).transpose(1, 2)      # (B, K_l, T, D)
        v = self.v(x).view(B, T, self.K, self.D).transpose(1, 2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:                                         # a list [k, v], empty before the prompt
            cache[:] = (k, v) if not cache else (torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2))
            k, v = cache
        if self.K != self.H and not x.is_cpu:                         # query head h reads KV head h // (H_l/K_l)
            k, v = (t.repeat_interleave(self.H // self.K, dim=1) for t in (k, v))
        S = k.size(2)                                                 # keys: those in the cache, then ours
        causal = mask is None and T == S
        if mask is None and 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=x.is_cpu)
        return self.o(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) · up x). (B, T, C) -> (B, T, C)"""
    def __init__(self, config, layer):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff[layer], bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff[layer], bias=False)
        self.down = nn.Linear(config.d_ff[layer], config.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))           # (B, T, F_l) inside


class Block(nn.Module):
    """Pre-norm residual layer; an absent sub-block has no parameters and leaves x as it is."""
    def __init__(self, config, layer):
        super().__init__()
        C, eps = config.d_model, config.norm_eps
        has_attn, has_ffn = config.n_head[layer] > 0, config.d_ff[layer] > 0
        self.attn_norm, self.attn = (RMSNorm(C, eps), Attention(config, layer)) if has_attn else (None, None)
        self.ffn_norm, self.ffn = (RMSNorm(C, eps), FFN(config, layer)) if has_ffn else (None, None)

    def forward(self, x, cos, sin, cache=None, mask=None):
        if self.attn is not None:
            x = x + self.attn(self.attn_norm(x), cos, sin, cache, mask)
        if self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x


class GPT(nn.Module):
    """The decoder. Initialised as GPT-2: normal(0, 0.02), projections into the residual stream divided by sqrt(2
    n_layer)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = config.vocab_size, config.d_model
        meta = torch.empty(0).is_meta          # made to be filled: normal_ there would import 800 modules, 2 seconds
        self.embed = nn.Embedding(*shape, _weight=torch.empty(shape) if meta else None)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, p in () if meta else self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn.o.weight", "ffn.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        total = sum(p.numel() for p in self.parameters())
        assert total == config.num_params()["total"], (total, config.num_params())   # the accounting is the model's

    @property
    def head_weight(self):
        """(V, C): the output projection, which is the embedding where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """Token ids (B, T) -> normed hidden states (B, T, C). The losses form logits from these in chunks (distill.py).
        `cache`: one list per layer, filled in place; positions go on where it ends. Instead of the text's order,
        `positions` (B, T), each below T, and `mask` (B, 1, T, T), true where row t sees column s (tasks/questions.py)."""
        start = 0 if cache is None else max((layer[0].size(2) for layer in cache if layer), default=0)
        x = self.embed(idx)
        cos, sin = rotary(self.config, start, idx.size(1), idx.device, x.dtype)
        if positions is not None:
            cos, sin = cos[positions][:, None], sin[positions][:, None]             # (B, 1, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if cache is None else cache[layer], mask)
        return self.norm(x)

    def forward(self, idx, cache=None):
        """Token ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(idx, cache), self.head_weight)

    @torch.no_grad()
    def generate(self, idx, tokens, temperature=1.0, top_k=None, generator=None, done=None):
        """Continue the prompt idx (B, T) by so many tokens; returns (B, T + tokens). temperature 0 = greedy. With a
        KV cache; a context that outgrows block_size starts again from its last half. `done(idx)`, true: that is all."""
        cache, filled, limit = None, 0, self.config.block_size
        for _ in range(tokens):
            if cache is None or filled == limit:
                new = idx[:, -(limit if cache is None else max(1, limit // 2)):]
                cache, filled = [[] for _ in self.blocks], 0
            filled += new.size(1)
            logits = F.linear(self.hidden(new, cache)[:, -1], self.head_weight).float()            # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            if done is not None and done(idx):
                break
        return idx


# -- sizes: the targets. The enlarged model is the same with wider FFNs (IDEA Prune widens nothing else) and, if asked,
#    more KV groups.
PRESETS = {  # name: layers, d_model, query heads, KV heads, head_dim, target d_ff, context, peak learning rate
    "toy":    (2, 32, 4, 2, 8, 64, 64, 1e-2),
    "laptop": (4, 64, 4, 2, 16, 192, 128, 1e-2),      # the rate: best for plan scratch when it was tried
    "10m":    (6, 384, 6, 6, 64, 1024, 512, 1e-3),
    "124m":   (12, 768, 12, 12, 64, 2048, 1024, 6e-4),      # this rate and the next: GPT-3's (arXiv 2005.14165)
    "4x16":   (4, 16, 2, 1, 8, 48, 128, 2e-2),        # experiments/claims.py's; claim 13 is about the rate
    **{f"8x{C}": (8, C, C // 16, C // 16, 16, 4 * C, 128, 1e-2) for C in (16, 32, 48, 64)},           # experiments/scaling.py's,
    **{f"12x{C}": (12, C, C // 64, C // 64, 64, 4 * C, 512, 1e-3) for C in (128, 192, 320, 512)},     # layers x width
    "1.3b":   (24, 2048, 16, 8, 128, 6272, 4096, 2e-4),     # the paper's scale: 2.8B -> 1.3B with gpt2's vocabulary
}


def preset(name, vocab_size, enlarge_ff=2.6, enlarge_kv=1.0):
    """(target, enlarged) configs. enlarge_ff widens every FFN (2.6: IDEA Prune's best), enlarge_kv multiplies the KV
    groups. Raises UserError for an unknown name and for a target larger than the enlarged model."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    if not (math.isfinite(enlarge_ff) and math.isfinite(enlarge_kv)):
        raise UserError(f"--enlarge-ff {enlarge_ff} and --enlarge-kv {enlarge_kv} must be finite")
    L, C, H, K, D, d_ff, T, _ = PRESETS[name]
    target = GPTConfig(vocab_size, T, C, D, (H,) * L, (K,) * L, (d_ff,) * L)
    wide_ff = d_ff if enlarge_ff == 1 else 8 * round(d_ff * enlarge_ff / 8)
    wide_k = round(K * enlarge_kv)
    if min(enlarge_ff, enlarge_kv) < 1:
        raise UserError(f"the target must not be larger than the enlarged model with {enlarge_ff} times its {d_ff} "
                        f"neurons, {enlarge_kv} times its {K} KV heads; give --enlarge-ff, --enlarge-kv of at least 1")
    for flag, factor, wide, units in (("ff", enlarge_ff, wide_ff, d_ff), ("kv", enlarge_kv, wide_k, K)):
        if factor > 1 and wide == units:
            raise UserError(f"--enlarge-{flag} {factor} of {units} units rounds to {wide}; give a larger factor, or 1")
    return target, target.resized({(l, kind): n for l in range(L) for kind, n in (("ffn", wide_ff), ("kv", wide_k))})


def shrunk(config, enlarge_ff=2.6, enlarge_kv=1.0):
    """The target of a model that is there already: each layer's FFN neurons divided by enlarge_ff (to a multiple of 8),
    its KV groups by enlarge_kv; at least one of what there is. Raises UserError as `preset` does."""
    if not (math.isfinite(enlarge_ff) and math.isfinite(enlarge_kv)) or min(enlarge_ff, enlarge_kv) < 1:
        raise UserError(f"--enlarge-ff {enlarge_ff} and --enlarge-kv {enlarge_kv} must be finite and at least 1")

    def units(n, kind):
        if kind == "kv":
            return min(n, max(1, round(n / enlarge_kv)))
        return n if enlarge_ff == 1 else min(n, max(1, 8 * round(n / enlarge_ff / 8)))

    return config.resized({key: units(n, key[1]) for key, n in config.widths().items()})


def with_context(config, block_size, path):
    """The config with `block_size` tokens of context, or as it is for None. Raises UserError for more than it was trained
    with."""
    if block_size is None:
        return config
    if block_size > config.block_size:
        raise UserError(f"{path} was trained with a context of {config.block_size} tokens, not {block_size}; ask "
                        "for at most that")
    return dataclasses.replace(config, block_size=block_size)
