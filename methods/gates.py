"""Gates: numbers by which units, layers and channels of a model are multiplied, 1 for open and 0 for closed.

    python -m pytest tests/methods/test_sheared.py

What a unit puts out is read by columns of one matrix, `o` or `down` (model.reader_of). To scale the
unit's output is to scale these columns, so a gated model is the same GPT with other weights, and
autograd brings the gates their gradients:

    torch.func.functional_call(model, gated(model, gates), tokens)

While it is learned (methods/sheared.py), a gate z has one parameter, log_alpha, and is drawn from the
hard concrete distribution (arXiv 1712.01312), with u uniform in (0, 1):

    z        = clamp(sigmoid((log(u / (1 - u)) + log_alpha) / T) · 1.2 - 0.1, 0, 1)         T = 2/3
    P(z > 0) = sigmoid(log_alpha - T · log(1/11))
"""
import math

import numpy as np
import torch
import torch.nn as nn

import prune
from methods.channels import slice_channels
from methods.target_shape import with_layers
from model import by_unit, from_weights, reader_of

# The hard concrete distribution: where a gate is stretched to, its temperature, the nearest that a
# probability comes to 0 or 1.
LOW = -0.1
HIGH = 1.1
TEMPERATURE = 2 / 3
EDGE = 1e-6
SHARPNESS = 0.8              # of a settled gate
# log_alpha stays within ±LIMIT: P(z > 0) between 0.047 and 0.998. The release draws it around 5 and
# cuts it to LIMIT before its first use, so all gates begin there.
LIMIT = math.log(100)


# -- a gated model

def gated(model, gates):
    """The weights that gates change: {parameter name: tensor}, differentiable in weights and gates.

    `gates`: {(layer, "ffn" | "kv"): (units,), "layers": (L,), "channels": (C,)}; whatever is left out
    stays as it is. With gates of 1 the weights are the model's, bit for bit. A layer's gate scales what
    both of its sub-blocks write. A channel's gate scales the channel wherever the residual stream is
    written or read, and once in front of the logits: a tied head has the embedding's gates, so the
    last norm has none. A norm then takes its mean of squares over the open channels only."""
    weights = dict(model.named_parameters())
    changed = {}

    def scale(name, factor):
        # An absent sub-block has no such weight.
        if name in weights:
            changed[name] = changed.get(name, weights[name]) * factor

    units_of = model.config.widths()
    for layer in range(model.config.n_layer):
        for kind in ("kv", "ffn"):
            name = reader_of(model.config, layer, kind)
            if (layer, kind) in gates:
                units = units_of[layer, kind]
                columns = by_unit(weights[name], 1, units)                    # (C, units, channels of a unit)
                changed[name] = (columns * gates[layer, kind].view(1, units, 1)).flatten(1)
            if "layers" in gates:
                scale(name, gates["layers"][layer])
    if "channels" not in gates:
        return changed

    channels = gates["channels"]
    open_share = torch.count_nonzero(channels).to(channels.dtype) / len(channels)
    scale("embed.weight", channels)
    for layer in range(model.config.n_layer):
        for kind, norm in (("kv", "attn_norm"), ("ffn", "ffn_norm")):
            scale(reader_of(model.config, layer, kind), channels[:, None])
            scale(f"blocks.{layer}.{norm}.weight", channels * open_share.sqrt())
    last = open_share.sqrt() if model.head is None else channels * open_share.sqrt()
    scale("norm.weight", last)
    return changed


@torch.no_grad()
def with_gates(model, gates):
    """The GPT of the same shape whose weights have the gates in them; it shares the other weights."""
    return from_weights(model.config, {**dict(model.named_parameters()), **gated(model, gates)})


@torch.no_grad()
def fold(model, gates):
    """The plain GPT without what is closed, gates multiplied into its weights. Its logits are those of
    the gated model, as the norms of a narrower stream take gains and eps for it (slice_channels)."""
    still_open = {key: gate.nonzero().flatten().cpu() for key, gate in gates.items()}
    units = {key: indices for key, indices in still_open.items() if not isinstance(key, str)}
    small, _ = prune.slice(with_gates(model, gates), None, units)
    # A layer with nothing in it would be one that stock classes do not know, so it goes as a whole.
    if "layers" in gates:
        layers = still_open["layers"].tolist()
        small.blocks = nn.ModuleList(small.blocks[layer] for layer in layers)
        small.config = with_layers(small.config, layers)
    if "channels" in gates:
        small = slice_channels(small, still_open["channels"].to(model.embed.weight.device))
    return small


# -- the hard concrete distribution

def open_probability(log_alpha):
    """P(z > 0) of each gate."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).clamp(EDGE, 1 - EDGE)


def sample(log_alpha, u):
    """Gates in [0, 1], drawn by the uniform numbers `u` in (0, 1); differentiable in log_alpha."""
    stretched = torch.sigmoid((u.logit() + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def new_gates(sizes, kept, device):
    """Gates of the keys in `kept`, all open: log_alphas {key: (sizes[key],)}."""
    return {key: torch.full((sizes[key],), LIMIT, device=device).requires_grad_() for key in kept}


def draw(log_alphas, seed, step, micro):
    """Gates of a micro-batch, a pure function of its arguments: {key: (n,)}."""
    rng = np.random.default_rng((seed, step, micro))
    gates = {}
    for key, log_alpha in log_alphas.items():
        u = torch.from_numpy(rng.uniform(EDGE, 1 - EDGE, log_alpha.shape)).to(log_alpha)
        gates[key] = sample(log_alpha, u)
    return gates


def settled(log_alphas, kept):
    """The gates of the end: {key: (n,)}. Of each key the kept[key] largest log_alpha are open by
    sigmoid(0.8 · log_alpha / T), at most 0.996, and all others 0. Ties go to the lower index."""
    gates = {}
    for key, alive in prune.choose(log_alphas, kept).items():
        log_alpha = log_alphas[key].detach()
        alive = alive.to(log_alpha.device)
        gates[key] = torch.zeros_like(log_alpha)
        gates[key][alive] = torch.sigmoid(SHARPNESS / TEMPERATURE * log_alpha[alive])
    return gates


def closed_shares(log_alphas):
    """The expected share of closed gates of each key: {key: ()}."""
    return {key: 1 - open_probability(log_alpha).mean() for key, log_alpha in log_alphas.items()}


def undecided(log_alphas):
    """The share of all gates that are neither open nor closed with nine chances of ten."""
    chances = open_probability(torch.cat([*log_alphas.values()]).detach())
    return ((chances > 0.1) & (chances < 0.9)).float().mean().item()
