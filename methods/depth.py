"""Whole layers and sub-blocks: what they are worth, and which of them go under a budget.

    python prune.py --init runs/scratch-laptop-0 --keep 0.75 --structure layer --score influence
    python prune.py --init runs/scratch-laptop-0 --keep 0.75 --structure sublayer --score perplexity
    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --structure layer,ffn,kv --layer-share 0.5

Two criteria belong to whole layers only. ShortGPT's block influence reads the residual stream in
front of a layer and behind it. Shortened LLaMA's perplexity leaves the layer out and runs the model
again from there on. Every other score of score.py is summed over the units of the layer. A *part*
is what goes whole: a "layer", or one sub-block of it, "kv" (the attention) or "ffn". In a
recipe of layers and widths, parts make up a share of what is to go (`budget_of_share`). Not here:
the cut itself, which prune.py makes as any other, with no unit left in the part.
"""
import contextlib
import itertools
import math

import torch

import allocate
from common import UserError, progress
from distill import chunked_loss
from model import rotary
from score import SCORES

# --structure: the parts that it may remove.
PARTS = {"layer": ("layer",), "sublayer": ("kv", "ffn")}


def units_of(config, layer, part):
    """The units that a part consists of: {(layer, kind): number}. An absent sub-block is left
    out."""
    kinds = ("kv", "ffn") if part == "layer" else (part,)
    widths = config.widths()
    return {(layer, kind): widths[layer, kind] for kind in kinds if widths[layer, kind] > 0}


# -- what a part is worth

def influence(stats, layer, part="layer"):
    """1 - cos(residual stream in front of the part, residual stream behind it), mean over tokens.
    This is the block influence of ShortGPT (arXiv 2403.03853, eq. 1)."""
    return 1 - stats.cosine[layer, part]


def without(model, batches, parts=("layer",)):
    """By how many nats per token the loss rises without a part: {(layer, part): nats}. This is the
    perplexity criterion of Shortened LLaMA (arXiv 2402.02834, section 3.2). `batches` is a list of
    token ids (x, y)."""
    rises = dict.fromkeys(itertools.product(range(model.config.n_layer), parts), 0.0)
    for x, y in batches:
        run = reruns(model, x, y)
        dense, _ = run(model.config.n_layer - 1, model.blocks[-1])
        for layer, part in progress(rises, "measure"):
            block = model.blocks[layer]
            with absent(block, part):
                loss, _ = run(layer, block)
            rises[layer, part] += (loss - dense) / len(batches)
    return rises


@contextlib.contextmanager
def absent(block, part):
    """Switch a block's attention, its FFN or both off inside of a `with`."""
    attention = block.attn
    ffn = block.ffn
    if part != "ffn":
        block.attn = None
    if part != "kv":
        block.ffn = None
    try:
        yield
    finally:
        block.attn = attention
        block.ffn = ffn


@torch.no_grad()
def reruns(model, x, y, every=1):
    """Run the model on token ids x, y (B, T) once and keep the residual stream in front of each
    layer. Returns a function run(layer, block) -> (loss, KL(dense ‖ changed)) in nats per token: of
    the model with `block` as it is now in the place of that layer, run from that layer on. `every`:
    losses are of every so many tokens, as logits are half of the work."""
    device = model.embed.weight.device
    x = x.to(device)
    cos, sin = rotary(model.config, 0, x.size(1), device, model.embed.weight.dtype)
    streams = [model.embed(x)]
    for block in model.blocks:
        streams.append(block(streams[-1], cos, sin))
    dense = model.norm(streams[-1])[:, ::every]
    targets = y.to(device)[:, ::every]

    def run(layer, block):
        stream = block(streams[layer], cos, sin)
        for later in model.blocks[layer + 1:]:
            stream = later(stream, cos, sin)
        hidden = model.norm(stream)[:, ::every]
        _, parts = chunked_loss(hidden, model.head_weight, targets, dense, model.head_weight)
        loss, divergence, _ = parts.tolist()
        return loss, divergence
    return run


def part_scores(model, stats, rises, structure, score):
    """What each part that --structure may remove is worth: {(layer, part): number}. `score` is a
    name in SCORES, "influence", or "perplexity", whose numbers are `rises` (see `without`)."""
    config = model.config
    units = SCORES[score].function(model, stats) if score in SCORES else None
    scores = {}
    for layer in range(config.n_layer):
        for part in PARTS[structure]:
            widths = units_of(config, layer, part)
            if score == "influence":
                worth = influence(stats, layer, part)
            elif score == "perplexity":
                worth = rises[layer, part]
            else:
                # Scores of units are means over their parameters. This is the sum over all of them.
                worth = sum(units[key].sum().item() * config.unit_params(*key) for key in widths)
            # Sub-blocks differ in size, so they compete per parameter (our choice). Whole layers
            # compete as published.
            params = sum(n * config.unit_params(*key) for key, n in widths.items())
            scores[layer, part] = worth if structure == "layer" else worth / max(1, params)
    return scores


# -- which parts go

def price(config, layer, part, resource="params"):
    """What a part costs."""
    widths = units_of(config, layer, part)
    units = sum(n * allocate.unit_cost(config, *key, resource) for key, n in widths.items())
    return units + (allocate.layer_cost(config, layer, resource) if part == "layer" else 0)


def budget_of_share(config, keep, share, structure, resource="params"):
    """The budget for parts of `config` that are to make up `share` (0 … 1) of what must go until a
    fraction `keep` of the cost of all layers stays: a whole number. It is rounded to the nearest
    number of parts, but so that parts never make up more than all that must go."""
    total = allocate.total(config, resource)
    prices = [price(config, *place, resource)
              for place in itertools.product(range(config.n_layer), PARTS[structure])]
    present = [cost for cost in prices if cost > 0]
    mean = sum(present) / max(1, len(present))
    # `widths_for` lets parts go until the rest is at most the budget.
    nearest = total * (1 - (1 - keep) * share) + mean / 2
    enough = total * keep + mean - 1
    return math.floor(max(nearest, enough) + 1e-6)


def share_gone(before, after, keep, resource="params"):
    """What has gone from config `before` to config `after`, as a share of what must go until a
    fraction `keep` of the cost stays."""
    total = allocate.total(before, resource)
    return (total - allocate.total(after, resource)) / (total * (1 - keep))


def names_gone(before, after):
    """The layers and sub-blocks that config `after` lacks, as a text: "3, 7, 8.kv"."""
    left = after.widths()
    names = []
    for layer in range(before.n_layer):
        gone = [kind for _, kind in units_of(before, layer, "layer") if left[layer, kind] == 0]
        if len(gone) == len(units_of(before, layer, "layer")) > 0:
            names.append(str(layer))
        else:
            names += [f"{layer}.{kind}" for kind in gone]
    return ", ".join(names)


def widths_for(config, budget, how, scores, structure, resource="params"):
    """How many units each layer of `config` keeps when whole parts go, the lowest score first,
    until all units cost at most `budget` of `resource`: {(layer, kind): units}. `how` is "global",
    or "middle", which keeps the first and last layers whole. Raises UserError for another `how`,
    and if the layers that `middle` keeps cost more than the budget."""
    if how not in ("global", "middle"):
        raise UserError(f"whole layers and sub-blocks go by --allocate global or middle, not {how}")
    costs, left, widths = allocate.split_budget(config, budget, (*PARTS[structure], "ffn", "kv"), resource)
    if how == "middle":
        allocate.refuse_small_budget_of_middle(config, ("ffn", "kv"), costs, left, resource)
    blocks = []
    for layer in range(config.n_layer):
        for part in PARTS[structure]:
            stays = how == "middle" and allocate.protected(layer, config.n_layer)
            order = -math.inf if stays else -float(scores[layer, part])
            units = units_of(config, layer, part)
            if units:
                blocks.append((order, price(config, layer, part, resource), units))
    return allocate.fill(blocks, left, widths)
