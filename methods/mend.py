"""Mending without training: what is left of a sub-block makes up for the units that went.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --mend least-squares      # or bias
    python -m pytest tests/methods/test_mend.py                # against numpy's least squares

Both ways change only the matrix that reads a sub-block's units, `o` or `down`. Its columns are the
units' *channels*. Least squares solves for the columns that are left, so that they give what all
columns gave over the calibration text. FLAP's bias adds the mean output of the columns that went. A
GPTConfig has no such bias, so that model is a class of its own and for evaluation only.
"""
import torch
import torch.nn as nn

from model import GPT, reader_of


def channels_of(units, each):
    """Indices of the channels of these units, `each` of them side by side: (units,) -> (units ·
    each,)."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def kept_channels(model, layer, kind, kept):
    """The channels of the units `kept` (units,), on the device of the matrix that reads them."""
    w = model.get_parameter(reader_of(model.config, layer, kind))
    return channels_of(kept.to(w.device), w.size(1) // model.config.widths()[layer, kind])


# -- least squares

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
    g_ss.diagonal().add_(damping * g.diagonal().mean())
    change = torch.linalg.solve(g_ss, g[kept][:, gone] @ w[:, gone].double().T)       # (kept, C)
    return w[:, kept] + change.T.to(w.dtype)


@torch.no_grad()
def mend_by_least_squares_(small, model, alive, gram):
    """Change, in place, the matrices of `small` that read units, where only some of the units of
    `model` are alive. `gram`: {name of the matrix: (n, n)}."""
    for (layer, kind), kept in alive.items():
        if 0 < len(kept) < model.config.widths()[layer, kind]:
            name = reader_of(model.config, layer, kind)
            channels = kept_channels(model, layer, kind, kept)
            small.get_parameter(name).copy_(mended(model.get_parameter(name), gram[name], channels))


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
