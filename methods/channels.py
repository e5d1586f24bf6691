"""A narrower or wider residual stream: every matrix, norm and embedding loses the same channels, or repeats
all of its channels equally often (d_model changes).

    python prune.py --init runs/scratch-laptop-0 --keep 0.7 --structure channel --score activation
    python -m pytest tests/methods/test_channels.py            # sliced channels are zeroed channels

Minitron (arXiv 2407.14679) ranks channels by what the norms put out. LLM-Pruner (arXiv 2305.11627)
ranks them by the weights that read or write them. A dead channel is 0 everywhere in the stream, so
slicing it off keeps the logits; it does not keep the next step of AdamW, as slicing units does
(prune.py), because the norms' gains change.

Channels grow by a whole factor r (methods/grow.py): RMSNorm sees the same mean of squares only if all
channels have equally many copies. bert2BERT (arXiv 2110.07143) takes any factor, which changes what
its norms put out.
"""
import dataclasses
import math

import torch

from common import UserError
from model import by_unit, from_weights
from score import wide

# The matrices that read the residual stream have a column per channel, the others a row.
READ_THE_STREAM = ("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")


@torch.no_grad()
def channel_scores(model, stats, score):
    """What each channel of the residual stream is worth: (C,).

    "magnitude" and "taylor" are sums over the entries of the blocks' matrices that read or write
    the channel (LLM-Pruner's channel-wise cut; embeddings are left out, our choice). "activation"
    is the size of the norms' outputs: L2 over windows, mean over positions, summed over norms
    (Minitron)."""
    if score == "activation":
        return sum(square.sqrt().mean(0) for square in stats.channel.values())
    total = 0
    for name, w in model.named_parameters():
        if not name.startswith("blocks.") or w.dim() != 2:
            continue
        w = wide(w)
        entries = w.abs() if score == "magnitude" else (w * stats.grad[name]).abs()
        total = total + entries.sum(0 if name.endswith(READ_THE_STREAM) else 1).float()
    return total


@torch.no_grad()
def slice_channels(model, kept):
    """The GPT with the channels `kept` (C',) of the residual stream. The norms' mean of squares
    then runs over C' channels instead of C, so gains · √(C/C') and eps · C/C' give the same logits.
    The eps of QK norms is the same number, so the q and k before them are scaled by √(C/C')
    instead."""
    C = model.config.d_model
    n = len(kept)
    scale = math.sqrt(C / n)
    config = dataclasses.replace(model.config, d_model=n, norm_eps=model.config.norm_eps * C / n)
    weights = {}
    for name, w in model.named_parameters():
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if part in ("attn_norm", "ffn_norm", "norm"):
            w = w[kept] * scale
        elif part in ("o", "down"):
            w = w[kept]
        elif w.dim() == 2:
            w = w[:, kept]
        if config.qk_norm and (".attn.q." in name or ".attn.k." in name):
            w = w * scale
        weights[name] = w.clone()
    return from_weights(config, weights)


def narrowed(model, stats, score, budget, multiple_of):
    """The GPT with its best channels, as many as attention and FFN parameters fit into `budget`, a
    multiple of `multiple_of`. Raises UserError if not even so many channels fit."""
    C = model.config.d_model
    # Counted width by width: biases do not shrink with C.
    fitting = 0
    for n in range(multiple_of, C + 1, multiple_of):
        if dataclasses.replace(model.config, d_model=n).removable_params() <= budget:
            fitting = n
    if fitting == 0:
        raise UserError(f"a budget of {budget:,} parameters is less than {multiple_of} of the {C} "
                        "channels; keep more")
    ranked = channel_scores(model, stats, score).argsort(descending=True, stable=True)
    return slice_channels(model, ranked[:fitting].sort().values)


def more_channels(name, w, r, noise=None):
    """A parameter of a model with r times as many channels. The residual stream and the norms' outputs
    are r copies of what they were.

    A matrix that reads the stream has W / r in each copy. With `noise`, a function that draws numbers of
    a tensor's shape, numbers that sum to 0 over the copies are added to that: they read differences of
    copies, which are 0 at first, and give the copies different gradients. The head reads 1/r of the
    stream by the gain of the norm before it, as it may be the embedding."""
    if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
        return w
    if name.endswith(("o.weight", "down.weight")):
        return w.repeat(r, 1)
    if w.dim() == 1:
        return w.repeat(r) / (r if name == "norm.weight" else 1)
    tiled = w.repeat(1, r)
    if not name.endswith(READ_THE_STREAM):
        return tiled
    tiled = tiled / r
    if noise is not None:
        added = by_unit(noise(tiled), 1, r)                            # (out, r, C)
        tiled += (added - added.mean(1, keepdim=True)).flatten(1)
    return tiled
