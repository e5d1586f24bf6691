"""Gates: numbers by which units, layers and channels of a model are multiplied, 1 for open and 0 for closed.

    python -m pytest tests/methods/test_sheared.py

What a unit puts out is read by columns of one matrix, `o` or `down` (model.reader_of). To scale the
unit's output is to scale these columns, so a gated model is the same GPT with other weights, and
autograd brings the gates their gradients:

    torch.func.functional_call(model, gated(model, gates), tokens)

methods/sheared.py learns gates. Not here: cutting closed units off (prune.py).
"""
import math

import torch

from model import GPT, by_unit, reader_of

# The hard concrete distribution: where a gate is stretched to, its temperature, the nearest that a
# probability comes to 0 or 1.
LOW = -0.1
HIGH = 1.1
TEMPERATURE = 2 / 3
EDGE = 1e-6
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
    with torch.device("meta"):
        whole = GPT(model.config)
    whole.load_state_dict({**dict(model.named_parameters()), **gated(model, gates)}, assign=True)
    return whole


# -- the hard concrete distribution

def open_probability(log_alpha):
    """P(z > 0) of each gate."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).clamp(EDGE, 1 - EDGE)


def sample(log_alpha, u):
    """Gates in [0, 1], drawn by the uniform numbers `u` in (0, 1); differentiable in log_alpha."""
    stretched = torch.sigmoid((u.logit() + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)
