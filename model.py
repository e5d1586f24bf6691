"""A Llama-shaped decoder whose widths belong to the layer, and what it costs.

    python -c "import model; print(model.preset('laptop', vocab_size=256)[0].num_params())"

`GPTConfig` holds one number of query heads, KV heads and FFN neurons *per layer*, so a pruned model
is the same class with other numbers: no masks, no subclasses. Zero heads or zero neurons switch
that sub-block off, together with the norm before it. The decoder has RMSNorm, rotary positions
(with Llama-3 scaling), grouped-query attention and SwiGLU; a tied embedding, QKV bias and QK norm
are options. SmolLM2, MobileLLM, Llama 2/3, Qwen 2.5 and Qwen 3 are configs of this decoder, not
code paths.

Shapes: B sequences, T tokens, C d_model, D head_dim, V vocabulary; H_l query heads, K_l KV heads,
F_l neurons in layer l. Not here: dropout, sliding windows, mixture of experts, tensor parallelism.
"""
import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError

# What the numbers of a config must lie between. The upper limits are far above every model of
# today. They let a damaged or hostile file end in a sentence before it takes all memory.
RANGES = {
    "vocab_size": (1, 2**24), "block_size": (1, 2**31), "d_model": (1, 2**20), "head_dim": (1, 2**16),
    # These have a number for each layer.
    "n_head": (0, 2**16), "n_kv_head": (0, 2**16), "d_ff": (0, 2**24),
    # Dead units stay dead only if eps is above 0 in float32, too.
    "norm_eps": (1e-20, 1.0), "rope_theta": (1.0, 1e20),
}
MOST_LAYERS = 2**14


@dataclass(frozen=True)
class GPTConfig:
    """The whole shape of a model. Raises UserError for a number of another type or outside of
    RANGES, and if the numbers do not fit each other."""
    vocab_size: int
    block_size: int                        # tokens of context that the model is trained with
    d_model: int
    head_dim: int
    # Layer by layer: query heads, the KV heads that they share, and SwiGLU neurons. Each KV head
    # serves n_head / n_kv_head query heads. 0 heads: the layer has no attention. 0 neurons: it has
    # no FFN.
    n_head: tuple[int, ...]
    n_kv_head: tuple[int, ...]
    d_ff: tuple[int, ...]
    tie_embeddings: bool = True
    qkv_bias: bool = False                 # Qwen 2.5
    qk_norm: bool = False                  # Qwen 3: RMSNorm over each head of q and k
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # Llama 3: (factor, low_freq_factor, high_freq_factor, original context).
    rope_scaling: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("n_head", "n_kv_head", "d_ff", "rope_scaling"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.n_head) == len(self.n_kv_head) == len(self.d_ff) > 0:
            raise UserError("n_head, n_kv_head and d_ff need one number per layer, got "
                            f"{len(self.n_head)}, {len(self.n_kv_head)} and {len(self.d_ff)}")
        if self.n_layer > MOST_LAYERS:
            raise UserError(f"{self.n_layer:,} layers are more than {MOST_LAYERS:,}")
        self.check_ranges()
        for layer in range(self.n_layer):
            self.check_layer(layer)
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even, as rotary positions turn pairs")
        if self.rope_scaling:
            self.check_rope_scaling()

    def check_ranges(self):
        """Raise UserError for a number of another type, or outside of RANGES."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            numbers = value if type(value) is tuple else (value,)
            is_size = type(least) is int
            for number in numbers:
                # By type, because True is an int for Python.
                is_number = type(number) is int or (type(number) is float and not is_size)
                if not is_number or not least <= number <= most:
                    kind = "whole number" if is_size else "number"
                    raise UserError(f"{name} is {number!r}, and must be a {kind} between {least} and {most}")
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}, and must be true or false")

    def check_rope_scaling(self):
        """Raise UserError if Llama 3's scaling would divide by zero or make no sense."""
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in self.rope_scaling)
        if numbers and len(self.rope_scaling) == 4:
            factor, low, high, original = self.rope_scaling
            if factor >= 1 and 0 < low < high and original >= 1:
                return
        raise UserError(f"rope_scaling is {self.rope_scaling}, and must be a factor of at least 1, a low and a higher "
                        "frequency factor above 0, and the original context in tokens")

    def check_layer(self, layer):
        """Raise UserError if the widths of a layer do not fit each other."""
        heads = self.n_head[layer]
        kv_heads = self.n_kv_head[layer]
        one_without_the_other = (heads == 0) != (kv_heads == 0)
        uneven = kv_heads > 0 and heads % kv_heads != 0
        if one_without_the_other or uneven:
            raise UserError(f"layer {layer}: {heads} query heads over {kv_heads} KV heads; query heads must be a "
                            "multiple of KV heads, both zero or neither")

    @property
    def n_layer(self):
        return len(self.d_ff)

    # -- units: what pruning removes. "ffn": one neuron (a gate row, an up row, a down column).
    #    "kv": one KV head together with the query heads it serves (k, v and q rows, o columns).
    #    All of them together are the *removable* parameters.
    def widths(self):
        """{(layer, kind): number of units} over the kinds "ffn" and "kv"."""
        neurons = {(layer, "ffn"): n for layer, n in enumerate(self.d_ff)}
        groups = {(layer, "kv"): n for layer, n in enumerate(self.n_kv_head)}
        return neurons | groups

    def unit_params(self, layer, kind):
        """Parameters of one unit of that layer (norms and embeddings belong to no unit)."""
        if kind == "ffn":
            return 3 * self.d_model
        # D rows of k and of v, and for each query head D rows of q and D columns of o.
        group = self.queries_per_group(layer)
        return self.head_dim * ((2 * group + 2) * self.d_model + (group + 2) * self.qkv_bias)

    def queries_per_group(self, layer):
        """Query heads that one KV head of the layer serves; 0 without attention."""
        return self.n_head[layer] // max(1, self.n_kv_head[layer])

    def removable_params(self):
        """Parameters of all units: attention and FFN without the norms."""
        return sum(n * self.unit_params(*key) for key, n in self.widths().items())

    def resized(self, widths):
        """The same model with other widths: {(layer, kind): units} -> GPTConfig. Layers that are
        not named keep their widths."""
        widths = self.widths() | widths
        layers = range(self.n_layer)
        return dataclasses.replace(
            self,
            d_ff=[widths[layer, "ffn"] for layer in layers],
            n_kv_head=[widths[layer, "kv"] for layer in layers],
            n_head=[widths[layer, "kv"] * self.queries_per_group(layer) for layer in layers])

    # -- cost
    def num_params(self):
        """Parameters by group: {"embedding", "attention", "ffn", "norm", "head", "total"}. A tied
        head counts once, as embedding."""
        C = self.d_model
        D = self.head_dim
        H = sum(self.n_head)
        K = sum(self.n_kv_head)
        with_attention = sum(h > 0 for h in self.n_head)
        with_ffn = sum(f > 0 for f in self.d_ff)
        groups = {
            "embedding": self.vocab_size * C,
            "attention": D * (2 * (H + K) * C + (H + 2 * K) * self.qkv_bias),
            "ffn": 3 * C * sum(self.d_ff),
            "norm": C * (1 + with_attention + with_ffn) + 2 * D * self.qk_norm * with_attention,
            "head": 0 if self.tie_embeddings else self.vocab_size * C,
        }
        return groups | {"total": sum(groups.values())}

    def flops_per_token(self, T, backward=True, recompute=False):
        """FLOPs per token at context T. Each matrix entry costs one multiply-add, which is 2.
        Attention is counted over the full T x T square as in PaLM (arXiv 2204.02311, appendix B),
        though a causal kernel does half of it. Norms, biases and activations are not counted. The
        backward pass costs twice the forward pass. `recompute` adds the layers' forward pass again,
        without the last product of each, whose result nobody needs twice."""
        params = dataclasses.replace(self, qkv_bias=False).num_params()
        matrices = params["attention"] + params["ffn"]
        layers = 2 * matrices + 4 * T * self.head_dim * sum(self.n_head)
        forward = layers + 2 * self.vocab_size * self.d_model
        if not backward:
            return forward
        last_products = sum(neurons or self.head_dim * heads for neurons, heads in zip(self.d_ff, self.n_head))
        again = layers - 2 * self.d_model * last_products
        return 3 * forward + recompute * again

    def kv_bytes_per_token(self, bytes_per_value=2):
        """Bytes that one token of context adds to the KV cache (2 bytes a value = bf16)."""
        return 2 * self.head_dim * sum(self.n_kv_head) * bytes_per_value


# -- units: which entries of which parameters belong to one
def coupled(config, layer, kind):
    """Parameters that a unit of this layer has entries in: [(name, dimension that runs over the
    units)].

    A unit's entries are consecutive along that dimension: 1 row of a neuron, D rows of a KV head,
    (H_l/K_l)·D rows of the query heads that the KV head serves. The last of the weights, `down` or
    `o`, reads the unit's output: its columns are the unit's channels."""
    if kind == "ffn":
        ffn = f"blocks.{layer}.ffn"
        return [(f"{ffn}.gate.weight", 0), (f"{ffn}.up.weight", 0), (f"{ffn}.down.weight", 1)]
    attn = f"blocks.{layer}.attn"
    weights = [(f"{attn}.q.weight", 0), (f"{attn}.k.weight", 0), (f"{attn}.v.weight", 0),
               (f"{attn}.o.weight", 1)]
    if not config.qkv_bias:
        return weights
    return [(f"{attn}.q.bias", 0), (f"{attn}.k.bias", 0), (f"{attn}.v.bias", 0)] + weights


def reader_of(config, layer, kind):
    """Name of the matrix that reads the units' outputs, `down` or `o`. Its columns are the units'
    channels."""
    return coupled(config, layer, kind)[-1][0]


def by_unit(tensor, dim, units):
    """View with the dimension split: (…, units · r, …) -> (…, units, r, …); dimension `dim` now
    counts units."""
    return tensor.unflatten(dim, (units, -1))


# -- the decoder

def rotary(config, start, T, device, dtype):
    """cos and sin (T, D) of the positions start … start+T-1 (RoFormer, arXiv 2104.09864). Each
    angle stands twice, for both halves of a head, and sin is negative in the first half. With
    config.rope_scaling, frequencies are scaled as in Meta's release of Llama 3. Angles are formed
    in float64 and rounded once."""
    D = config.head_dim
    # Apple's GPUs have no float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    freq = config.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=wide) / D)
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        # Full turns within the original context. Slow frequencies are divided by the factor, fast
        # ones stay, and in between the change is smooth.
        turns = original * freq / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (smooth + (1 - smooth) / factor)
    angle = torch.outer(torch.arange(start, start + T, device=device, dtype=wide), freq)
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of every head by the angle of its position. x (B, H, T, D), cos
    and sin (T, D)."""
    a, b = x.chunk(2, -1)
    # x.roll(D // 2, -1) would be as fast, but not when compiled.
    return (x * cos + torch.cat((b, a), -1) * sin).to(x.dtype)


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm with layer norm's backward pass, which is one kernel on a CPU; RMSNorm has none there.

    At mean 0, layer norm's gradient is RMSNorm's less rstd · mean(g · weight) in each row, as its
    mean depends on x, too. That number is added again."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        # What belongs to a whole row is formed in the weight's dtype, float32 at least.
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype).square_()
        rstd = (square / x.size(-1) + eps).rsqrt_()                   # 1 / root mean square
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd.to(x.dtype)).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        x, weight, rstd = ctx.saved_tensors
        n = x.size(-1)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, [n], torch.zeros_like(rstd), rstd, weight, None, [True, False, False])
        row = (g @ weight.to(g.dtype))[..., None] * rstd
        # In bfloat16 the kernel would also add up the weight's gradient in bfloat16.
        dweight = (x * rstd.to(x.dtype)).mul_(g).flatten(0, -2).sum(0, dtype=weight.dtype)
        return dx.add_(row, alpha=1 / n), dweight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467)."""
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            wide = torch.promote_types(x.dtype, torch.float32)
            return RMSNormOnCPU.apply(x, self.weight.to(wide), self.eps)
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def attend(q, k, v, mask, causal):
    """Softmax attention of q (B, H, T, D) over k and v (B, K, S, D). Query head h reads KV head
    h // (H/K). (B, H, T, D)"""
    # These kernels share KV heads among query heads by themselves.
    grouped = q.is_cpu or (q.is_cuda and mask is None and q.dtype != torch.float32)
    if k.size(1) != q.size(1) and not grouped:
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    options = dict(attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    if q.is_cpu and q.dtype == torch.bfloat16 and q.size(-1) < 64 and torch.is_grad_enabled():
        # The gradients of small heads take a CPU several times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
        return wide.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


class Attention(nn.Module):
    """Causal grouped-query attention. (B, T, C) -> (B, T, C)"""
    def __init__(self, config, layer):
        super().__init__()
        C = config.d_model
        self.D = config.head_dim
        self.H = config.n_head[layer]
        self.K = config.n_kv_head[layer]
        self.q = nn.Linear(C, self.H * self.D, bias=config.qkv_bias)
        self.k = nn.Linear(C, self.K * self.D, bias=config.qkv_bias)
        self.v = nn.Linear(C, self.K * self.D, bias=config.qkv_bias)
        self.o = nn.Linear(self.H * self.D, C, bias=False)
        self.q_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, mask=None):
        """`cache` (2, B, K_l, S, D): keys and values of S tokens. The last T of them are those of x
        and are written here. `mask`: see GPT.hidden."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.H, self.D).transpose(1, 2)      # (B, H_l, T, D)
        k = self.k(x).view(B, T, self.K, self.D).transpose(1, 2)      # (B, K_l, T, D)
        v = self.v(x).view(B, T, self.K, self.D).transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            cache[0, :, :, -T:] = k
            cache[1, :, :, -T:] = v
            k, v = cache
        if T == 1:
            # One token sees all keys. As rows of their KV head, its query heads read them once.
            q = q.view(B, self.K, self.H // self.K, self.D)
        # S keys: those in the cache, then the T new ones.
        S = k.size(2)
        causal = mask is None and 1 < T == S
        # Token t of the T new ones sees all S - T cached keys, and the new ones up to its own.
        if mask is None and 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = attend(q, k, v, mask, causal).reshape(B, self.H, T, self.D)
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
    # Activation checkpointing: keep only the layer's input for the backward pass, and compute the layer
    # again there. It saves most of the memory of activations for a third more arithmetic.
    recompute = False
    # `apply_parts`, compiled, for training steps. None: not compiled, or compiled as a part of the whole.
    compiled = None

    def __init__(self, config, layer):
        super().__init__()
        has_attention = config.n_head[layer] > 0
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps) if has_attention else None
        self.attn = Attention(config, layer) if has_attention else None
        has_ffn = config.d_ff[layer] > 0
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps) if has_ffn else None
        self.ffn = FFN(config, layer) if has_ffn else None

    def forward(self, x, cos, sin, cache=None, mask=None):
        if not torch.is_grad_enabled():
            return self.apply_parts(x, cos, sin, cache, mask)
        run = self.compiled or self.apply_parts
        if self.recompute:
            return checkpoint(run, x, cos, sin, cache, mask, use_reentrant=False, preserve_rng_state=False)
        return run(x, cos, sin, cache, mask)

    def apply_parts(self, x, cos, sin, cache=None, mask=None):
        if self.attn is not None:
            x = x + self.attn(self.attn_norm(x), cos, sin, cache, mask)
        if self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x


def init_weight_(p, name, config):
    """Draw a parameter's initial values, in place, as GPT-2: normal(0, 0.02), and matrices that write
    into the residual stream divided by sqrt(2 n_layer). Biases are 0, and gains of norms stay 1."""
    if p.dim() == 2:
        writes_the_stream = name.endswith(("attn.o.weight", "ffn.down.weight"))
        nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if writes_the_stream else 0.02)
    elif name.endswith("bias"):
        nn.init.zeros_(p)


def initial_weights(config):
    """The parameters that GPT(config) would begin with, bit for bit, one at a time: (name, float32
    tensor). Only the one that was yielded last is held."""
    with torch.device("meta"):
        model = GPT(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # PyTorch draws weights for each layer that it makes, and GPT draws them anew. The first
            # are drawn here, too, so that the second come out alike.
            copy.deepcopy(module).to_empty(device="cpu").reset_parameters()
    for name, p in model.named_parameters():
        weight = torch.ones(p.shape)
        init_weight_(weight, name, config)
        yield name, weight


class GPT(nn.Module):
    """The decoder."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.d_model)
        # A model on the meta device will be filled with weights. nn.Embedding's own initialisation
        # there would import 800 modules and take 2 seconds.
        meta = torch.empty(0).is_meta
        self.embed = nn.Embedding(*shape, _weight=torch.empty(shape) if meta else None)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not meta:
            for name, p in self.named_parameters():
                init_weight_(p, name, config)
        # The real tensors must agree with the config's accounting.
        total = sum(p.numel() for p in self.parameters())
        assert total == config.num_params()["total"], (total, config.num_params())

    @property
    def head_weight(self):
        """(V, C): the output projection, which is the embedding where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def empty_cache(self, B, S):
        """Room for the keys and values of S tokens: for each layer an array (2, B, K_l, S, D)."""
        D = self.config.head_dim
        options = dict(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return [torch.empty(2, B, K, S, D, **options) for K in self.config.n_kv_head]

    def hidden(self, idx, cache=None, positions=None, mask=None, start=0):
        """Token ids (B, T) -> normed hidden states (B, T, C). The losses form logits from these in
        chunks (distill.py).

        `cache`: see empty_cache; it holds `start` tokens before these, and these are written behind
        them. `mask` (B, 1, T, start + T), true where row t sees column s, and `positions` (B, T),
        each below T, take the place of the text's order (tasks/questions.py)."""
        end = start + idx.size(1)
        x = self.embed(idx)
        if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
            # One cast here, instead of one in front of every matrix.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = rotary(self.config, start, idx.size(1), idx.device, x.dtype)
        if positions is not None:
            cos = cos[positions][:, None]             # (B, 1, T, D)
            sin = sin[positions][:, None]
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if cache is None else cache[layer][:, :, :, :end], mask)
        return self.norm(x)

    def forward(self, idx, cache=None, start=0):
        """Token ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(idx, cache, start=start), self.head_weight)

    @torch.no_grad()
    def generate(self, idx, tokens, temperature=1.0, top_k=None, generator=None, done=None, lengths=None):
        """Continue the prompts idx (B, T) by so many tokens, with a KV cache. Returns (B, T +
        tokens). Temperature 0 is greedy. A context that outgrows block_size starts again from its
        last half. If done(idx) is true, the continuation ends there. `lengths`: the tokens of each
        prompt, where shorter ones are padded on the left; nobody looks at the padding."""
        limit = self.config.block_size
        B, T = idx.shape
        # Tokens of context of each row, up to the last column.
        context = [min(length, limit) for length in lengths or [T] * B]
        cache = None
        for made in range(tokens):
            width = max(context)
            if width > limit:
                context = [max(1, limit // 2) if length > limit else length for length in context]
                width = max(context)
                cache = None
            if cache is None:
                cache = self.empty_cache(B, min(limit, width + tokens - made - 1))
                new = idx[:, -width:]
            start = width - new.size(1)
            mask = padding_mask(context, start, idx.device) if min(context) < width else None
            last = self.hidden(new, cache, mask=mask, start=start)[:, -1]
            logits = F.linear(last, self.head_weight).float()             # (B, V)
            new = pick_tokens(logits, temperature, top_k, generator)
            idx = torch.cat((idx, new), dim=1)
            context = [length + 1 for length in context]
            if done is not None and done(idx):
                break
        return idx


def shapes_of(config):
    """The shapes of the parameters of GPT(config): {name: tuple}, in the model's order."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def from_weights(config, weights):
    """The GPT of this config around the tensors {parameter name: tensor}, which it shares."""
    # On the meta device no weights are made that would be thrown away at once.
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model


def padding_mask(lengths, start, device):
    """The causal mask (B, 1, T, S) of the columns from `start` in a batch that is padded on the
    left: true where row t sees column s. Padding sees itself, as attention must see something."""
    s = torch.arange(max(lengths), device=device)
    t = s[start:, None]
    padding = max(lengths) - torch.tensor(lengths, device=device)[:, None, None, None]
    return (s <= t) & (s >= padding.minimum(t))


def pick_tokens(logits, temperature, top_k, generator):
    """One token for each row of logits (B, V): the likeliest at temperature 0, otherwise drawn from
    the top_k likeliest (None or 0: from all). (B, 1)"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits[logits < least] = -math.inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# -- sizes: the targets. The enlarged model is the same with wider FFNs (IDEA Prune widens nothing
#    else) and, if --enlarge-kv says so, more KV groups.
class Preset(NamedTuple):
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_ff: int             # of the target
    block_size: int


PRESETS = {
    # layers, d_model, query heads, KV heads, head_dim, d_ff, context
    "toy": Preset(2, 32, 4, 2, 8, 64, 64),
    "laptop": Preset(4, 64, 4, 2, 16, 192, 128),
    "10m": Preset(6, 384, 6, 6, 64, 1024, 512),
    "124m": Preset(12, 768, 12, 12, 64, 2048, 1024),
    # The paper's scale: 2.8B -> 1.3B parameters with gpt2's vocabulary.
    "1.3b": Preset(24, 2048, 16, 8, 128, 6272, 4096),
    # The experiments' sizes, layers x d_model: experiments/claims.py trains the first,
    # experiments/scaling.py the others.
    "4x16": Preset(4, 16, 2, 1, 8, 48, 128),
    **{f"8x{C}": Preset(8, C, C // 16, C // 16, 16, 4 * C, 128) for C in (16, 32, 48, 64)},
    "4x256": Preset(4, 256, 4, 4, 64, 768, 256),       # experiments/precision.py, and the benchmarks
    **{f"12x{C}": Preset(12, C, C // 64, C // 64, 64, 4 * C, 512) for C in (128, 192, 320, 512)},
}


def preset(name, vocab_size, enlarge_ff=2.6, enlarge_kv=1.0):
    """(target, enlarged) configs. enlarge_ff widens every FFN (2.6: IDEA Prune's best), enlarge_kv
    multiplies the KV groups. Raises UserError for an unknown name, and if the target would be
    larger than the enlarged model."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    if not (math.isfinite(enlarge_ff) and math.isfinite(enlarge_kv)):
        raise UserError(f"--enlarge-ff {enlarge_ff} and --enlarge-kv {enlarge_kv} must be finite")
    size = PRESETS[name]
    if min(enlarge_ff, enlarge_kv) < 1:
        raise UserError("the target must not be larger than the enlarged model with "
                        f"{enlarge_ff} times its {size.d_ff} neurons, {enlarge_kv} times its "
                        f"{size.n_kv_head} KV heads; give --enlarge-ff, --enlarge-kv of at least 1")
    L = size.n_layer
    target = GPTConfig(vocab_size, size.block_size, size.d_model, size.head_dim,
                       n_head=(size.n_head,) * L, n_kv_head=(size.n_kv_head,) * L,
                       d_ff=(size.d_ff,) * L)
    wide_ff = times(size.d_ff, enlarge_ff, 8, "--enlarge-ff")
    wide_kv = times(size.n_kv_head, enlarge_kv, 1, "--enlarge-kv")
    widths = {}
    for layer in range(L):
        widths[layer, "ffn"] = wide_ff
        widths[layer, "kv"] = wide_kv
    return target, target.resized(widths)


def times(units, factor, multiple, flag):
    """`factor` times so many units, rounded to a multiple. Raises UserError if rounding undoes the
    factor, or if they are too many."""
    if factor == 1:
        return units
    wide = multiple * round(units * factor / multiple)
    most = RANGES["d_ff"][1]
    if wide > most:
        raise UserError(f"{flag} {factor:g} of {units} units are {wide:,}, and at most {most:,} are possible; give a "
                        "smaller factor")
    if wide == units:
        raise UserError(f"{flag} {factor} of {units} units rounds to {wide}; give a larger factor, "
                        "or 1")
    return wide


def shrunk(config, enlarge_ff=2.6, enlarge_kv=1.0):
    """The target of a model that is there already: each layer's FFN neurons divided by enlarge_ff
    (to a multiple of 8), its KV groups divided by enlarge_kv, at least one of what there is. Raises
    UserError for factors below 1."""
    if not (1 <= enlarge_ff < math.inf and 1 <= enlarge_kv < math.inf):
        raise UserError(f"--enlarge-ff {enlarge_ff} and --enlarge-kv {enlarge_kv} must be finite and "
                        "at least 1")
    widths = {}
    for (layer, kind), n in config.widths().items():
        if kind == "kv":
            fewer = round(n / enlarge_kv)
        elif enlarge_ff == 1:
            fewer = n
        else:
            fewer = 8 * round(n / enlarge_ff / 8)
        widths[layer, kind] = min(n, max(1, fewer))
    return config.resized(widths)


def config_from(path, fields):
    """The GPTConfig of what the file `path` says. Raises UserError, with the path, if that means
    nothing."""
    try:
        return GPTConfig(**fields)
    except UserError as problem:
        raise UserError(f"{path}: {problem}; use another copy, or the code that wrote it") from None


def check_values(tensor, dtype, name, path):
    """Raise UserError for a weight of the file `path` that is infinite or not a number, as all that
    is computed with it would be, and for one that is too large for `dtype`."""
    if tensor.numel() == 0:
        return
    # Not a number goes before every number: one pass, and no second array.
    lowest, highest = (bound.item() for bound in tensor.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        bad = (~torch.isfinite(tensor)).sum().item()
        raise UserError(f"{path}: {bad:,} of {tensor.numel():,} values of {name} are infinite or not a number; use an "
                        "earlier checkpoint or another copy")
    largest = max(-lowest, highest)
    if largest > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} has a value of size {largest:g}, and {kind} ends at "
                        f"{torch.finfo(dtype).max:g}; give --dtype bfloat16 or float32")


def with_context(config, block_size, path):
    """The config with `block_size` tokens of context, or as it is for None. Raises UserError for
    more than it was trained with."""
    if block_size is None:
        return config
    if block_size > config.block_size:
        raise UserError(f"{path} was trained with a context of {config.block_size} tokens, not {block_size}; ask "
                        "for at most that")
    return dataclasses.replace(config, block_size=block_size)
