"""Mending without training: what is left of a sub-block makes up for the units that went.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --mend sequential    # least-squares, bias
    python -m pytest tests/methods/test_mend.py                # against numpy's least squares

All ways change only the matrix that reads a sub-block's units, `o` or `down`. Its columns are the
units' *channels*. Least squares solves for the columns that are left, so that they give what all
columns gave over the calibration text. In one pass all sub-blocks are mended by what the dense
model's units put out. Sequentially, each one is mended by what its units put out behind the cut
sub-blocks in front of it, and so also makes up for what these could not. FLAP's bias adds the mean
output of the columns that went. A GPTConfig has no such bias, so that model is a class of its own
and for evaluation only. Not here: training the other matrices of a block (methods/local.py), weights
that are sparse (methods/sparse.py).
"""
import itertools

import torch
import torch.nn as nn

from common import UserError, progress
from methods.offload import on_device
from model import GPT, reader_of, rotary

# Of sequential least squares: one batch in so many is held out, and chooses one of these dampings.
HOLD_OUT = 4
DAMPINGS = (0.01, 0.1, 1, 10, 100)
# The sub-blocks of a layer, in the order of the forward pass.
KINDS = ("kv", "ffn")


def channels_of(units, each):
    """Indices of the channels of these units, `each` of them side by side: (units,) -> (units ·
    each,)."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def kept_channels(model, layer, kind, kept):
    """The channels of the units `kept` (units,), on the device of the matrix that reads them."""
    w = model.get_parameter(reader_of(model.config, layer, kind))
    return channels_of(kept.to(w.device), w.size(1) // model.config.widths()[layer, kind])


def ridge_size(gram, damping):
    """λ = damping · mean of the diagonal of a Gram matrix in float64, and above 0 if no unit put out
    anything."""
    return (damping * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)


def damped(gram, damping):
    """G + λ I, λ = damping · mean of the diagonal of G."""
    return gram + torch.diag(ridge_size(gram, damping).expand(len(gram)))


# -- least squares, all sub-blocks in one pass

def mended(w, gram, kept, damping=0.01):
    """The columns `kept` of the matrix w (C, n), changed so that over the calibration text they
    give what all of w gave: W_S + W_D G_DS (G_SS + λ I)^-1 -> (C, kept). S is what stays and D what
    goes, G = gram (n, n) is the mean of x xᵀ over the inputs x, and λ = damping · mean of G's
    diagonal. This is the closed form of channel pruning (arXiv 1707.06168, eq. 3)."""
    g = gram.double()
    is_gone = torch.ones(w.size(1), dtype=torch.bool, device=w.device)
    is_gone[kept] = False
    gone = is_gone.nonzero().flatten()
    g_ss = g[kept][:, kept]
    g_ss.diagonal().add_(ridge_size(g, damping))
    change = torch.linalg.solve(g_ss, g[kept][:, gone] @ w[:, gone].double().T)       # (kept, C)
    return w[:, kept] + change.T.to(w.dtype)


@torch.no_grad()
def mend_by_least_squares_(small, model, alive, gram):
    """Change, in place, the matrices of `small` that read units, where only some of the units of
    `model` are alive. `gram`: {name of the matrix: (n, n)}."""
    device = model.embed.weight.device
    for (layer, kind), kept in alive.items():
        if 0 < len(kept) < model.config.widths()[layer, kind]:
            name = reader_of(model.config, layer, kind)
            with on_device(model.blocks[layer], device):
                channels = kept_channels(model, layer, kind, kept)
                columns = mended(model.get_parameter(name), gram[name].to(device), channels)
            small.get_parameter(name).copy_(columns)


# -- least squares, one sub-block after the other

class Walk:
    """Brings residual streams (B, T, C) of windows of T tokens forward through a model, sub-block by
    sub-block. Matrices are multiplied in `dtype`. Streams stay in the dtype of the weights, but in
    float32 at least: what is fitted is the small difference of two streams."""
    def __init__(self, model, T, dtype=None):
        weight = model.embed.weight
        self.dtype = dtype or weight.dtype
        self.stream_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.is_cast = self.dtype != self.stream_dtype
        self.cos, self.sin = rotary(model.config, 0, T, weight.device, self.stream_dtype)

    def start(self, model, idx):
        """The residual stream (B, T, C) in front of the first layer for token ids (B, T)."""
        return model.embed(idx).to(self.stream_dtype)

    def behind(self, block, stream, kinds=KINDS):
        """The residual stream behind the sub-blocks of these kinds. An absent one leaves the stream
        as it is."""
        # Weights change between two calls, so that no cast of them may be kept.
        with torch.autocast(stream.device.type, self.dtype, enabled=self.is_cast, cache_enabled=False):
            if "kv" in kinds and block.attn is not None:
                stream = stream + block.attn(block.attn_norm(stream), self.cos, self.sin)
            if "ffn" in kinds and block.ffn is not None:
                stream = stream + block.ffn(block.ffn_norm(stream))
        return stream


@torch.no_grad()
def mend_sequentially_(small, model, windows, dtype=None, micro_batch=4):
    """Refit, in place, each matrix of `small` that reads units, so that behind its sub-block the
    residual stream comes as near as it can to the one in `model`. `small` is cut from `model`;
    whole sub-blocks may be gone. `windows` (N, T) are token ids; `dtype` is that of the products.

    The first sub-block comes first, so that the next one sees the stream as it really arrives: X
    of the cut model, Y of the dense one (the refit of Putri and of Týr-the-Pruner). Memory: the two
    models' streams of all windows in front of a sub-block and those of one of them behind it, N · T · C
    values each, and a few Gram matrices of one sub-block."""
    if len(windows) < HOLD_OUT:
        raise UserError(f"sequential mending fits to some windows and tries on others, and {len(windows)} are too "
                        f"few; give --windows {HOLD_OUT} or, better, many more")
    device = model.embed.weight.device
    texts = windows.to(device).split(min(micro_batch, len(windows) // HOLD_OUT))
    walk = Walk(model, windows.size(1), dtype)
    dense = [walk.start(model, text) for text in texts]
    streams = [walk.start(small, text) for text in texts]
    places = list(itertools.product(range(model.config.n_layer), KINDS))
    for layer, kind in progress(places, "mend"):
        # Run the dense part: where its streams arrive, those of the cut model should.
        with on_device(model.blocks[layer], device):
            dense = [walk.behind(model.blocks[layer], stream, (kind,)) for stream in dense]
        with on_device(small.blocks[layer], device, changes=True):
            if small.config.widths()[layer, kind] > 0:
                refit_(walk, small, layer, kind, streams, dense)
            # Run the cut part, mended.
            streams = [walk.behind(small.blocks[layer], stream, (kind,)) for stream in streams]


def token_weights(stream):
    """1 / mean square of each token's stream: (B, T, C) -> (B, T, 1)."""
    return 1 / stream.square().mean(-1, keepdim=True).clamp(min=torch.finfo(stream.dtype).tiny)


def refit_(walk, small, layer, kind, streams, targets):
    """Change, in place, the matrix of one sub-block that reads its units' outputs x, by the Δ with the
    least Σ |e - Δ x|² / |target|² + λ |Δ|². e = target - stream is what is missing behind the
    sub-block. A token counts by the size of its stream, as the norms behind it see it: the first
    token's is a hundred times as large as the others, and would be all that counts."""
    reader = small.get_submodule(reader_of(small.config, layer, kind).removesuffix(".weight"))
    inputs = []
    hook = reader.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    sums = {"fit": [0, 0], "held out": [0, 0]}
    for i, (stream, target) in enumerate(zip(streams, targets)):
        error = (target - walk.behind(small.blocks[layer], stream, (kind,))).flatten(0, 1)
        x = inputs.pop().to(error.dtype).flatten(0, 1)
        weight = token_weights(target).flatten(0, 1)
        part = sums["held out" if i % HOLD_OUT == HOLD_OUT - 1 else "fit"]
        part[0] = part[0] + x.T @ (weight * x)                # (n, n)
        part[1] = part[1] + x.T @ (weight * error)            # (n, C)
    hook.remove()
    reader.weight.add_(ridge(*sums["fit"], *sums["held out"]).T)


def ridge(gram, cross, held_gram, held_cross):
    """The change Δᵀ (n, C) by all tokens, with the λ of DAMPINGS · mean diagonal of the Gram matrix
    (n, n) that does best when it is fitted to one part and tried on the other. 0 if none does better
    than no change."""
    best = None
    least = 0
    for damping in DAMPINGS:
        change = solved(gram, cross, damping)
        # Σ |e - Δ x|² - Σ |e|² over the tokens held out.
        error = (change * (held_gram.double() @ change - 2 * held_cross.double())).sum().item()
        if error < least:
            best = damping
            least = error
    if best is None:
        return torch.zeros_like(cross)
    return solved(gram + held_gram, cross + held_cross, best)


def solved(gram, cross, damping):
    """(gram + λ I)^-1 cross, in float64."""
    gram = gram.to(torch.float64, copy=True)
    gram.diagonal().add_(ridge_size(gram, damping))
    return torch.linalg.solve(gram, cross.double())


# -- FLAP's bias

class Constant(nn.Module):
    """An absent sub-block whose mean output stays: whatever comes in, (C,) comes out."""
    def __init__(self, bias):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x, *_):
        return self.bias


class BiasedGPT(GPT):
    """A GPT with biases behind some `o` and `down`, and constants in the place of some absent
    sub-blocks."""
    evaluation_only = "it has FLAP's biases behind o and down"

    def add_bias(self, layer, kind, bias):
        """Add `bias` (C,) to what the attention (kind "kv") or the FFN of a layer writes into the
        residual stream."""
        block = self.blocks[layer]
        name = "attn" if kind == "kv" else "ffn"
        sub_block = getattr(block, name)
        if sub_block is None:
            setattr(block, name, Constant(bias))
            setattr(block, f"{name}_norm", nn.Identity())
        else:
            linear = sub_block.o if kind == "kv" else sub_block.down
            linear.bias = nn.Parameter(bias)


@torch.no_grad()
def with_biases(small, model, alive, mean):
    """The model `small`, cut from `model`, with FLAP's compensation (arXiv 2312.11983, section
    3.3): the mean output of the units that went as an explicit bias. `mean`: {name of the matrix:
    (n,)}, the means of its inputs."""
    biased = None
    for (layer, kind), kept in alive.items():
        if len(kept) == model.config.widths()[layer, kind]:
            continue
        if biased is None:
            with torch.device("meta"):
                biased = BiasedGPT(small.config)
            biased.load_state_dict(small.state_dict(), assign=True)
        name = reader_of(model.config, layer, kind)
        w = model.get_parameter(name)
        gone = mean[name].index_fill(0, kept_channels(model, layer, kind, kept), 0)
        biased.add_bias(layer, kind, w @ gone.to(w.dtype))
    return small if biased is None else biased
