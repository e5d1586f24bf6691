"""Who pays: how many units each layer keeps under one budget.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --allocate adaptive       # any name in ALLOCATIONS
    python -m pytest tests/test_allocate.py tests/methods/test_knapsack.py   # and nothing better by exhaustive search

Nearly every way of sharing a budget is an *order* in which blocks of units may stay, taken from the best until the
budget is spent (`fill`). **A new one is one function and one row of ALLOCATIONS.** The exception is `knapsack`, which
minimises the damage that each (layer, width) was measured to do. Every allocation is deterministic, keeps at most the
budget and is short of it by less than the cheapest block that had to go. Not here: which units stay (prune.py).
"""
import math
from dataclasses import dataclass

import torch

from common import UserError

RESOURCES = ("params", "flops", "kv_bytes")


def unit_cost(config, layer, kind, resource):
    """What one unit costs: parameters; FLOPs per token forward at the config's context; bytes of KV cache per token in
    bf16. Integers. Nothing where the sub-block is absent."""
    if not config.widths()[layer, kind]:
        return 0
    if resource == "params":
        return config.unit_params(layer, kind)
    one = config.resized({key: int(key == (layer, kind)) for key in config.widths()})
    if resource == "kv_bytes":
        return one.kv_bytes_per_token()
    none = config.resized(dict.fromkeys(config.widths(), 0))
    return one.flops_per_token(config.block_size, backward=False) \
        - none.flops_per_token(config.block_size, backward=False)


# -- orders: from the lowest on, blocks stay

@dataclass(frozen=True)
class Block:
    """Some units that stay or go together. Blocks of a layer and kind are numbered from the best unit on."""
    units: dict               # {(layer, kind): number}
    layer: int
    depth: float              # where it ends, as a fraction of the layer's whole width; within the block the place
    #                           differs from layer to layer, so that the layers' mean is right where blocks are large
    score: float              # mean of its units' scores
    z: float                  # the same, standardised over the units of the layer and kind
    first: bool = False       # the best of its layer and kind


def uniform(block, c):
    """The same share of every layer. Few large units (KV groups) can't have it in each layer: see Block.depth."""
    return block.depth


def protected(layer, layers):
    """Whether `middle` keeps the layer whole."""
    return layer < math.ceil(layers / 8) or layer >= layers - math.ceil(layers / 16)


def middle(block, c):
    """LLM-Pruner (arXiv 2305.11627, section 4.1) and Shortened LLaMA: the first 1/8 of the layers and the last 1/16
    stay whole (4 and 2 of their 32), the same share of the others goes."""
    return -math.inf if protected(block.layer, c.layers) else -block.score if c.sublayers else uniform(block, c)


def adaptive(block, c):
    """Adapt-Pruner (arXiv 2502.03460): a layer's share of what goes is larger the less it turns the residual stream:
    kept_l = base + amplitude · (share that goes) · I_l (their code: 0.02 · I_l for each 0.02 that goes), and never less
    than 1 % (theirs), nor than one block (ours: of few KV groups 1 % is none). In several cuts the latest I_l draws the
    whole line anew; their code adds up the steps, and where a layer has few units it would be their rounding that adds
    up."""
    stays = block.first or block.depth <= 0.01
    return -math.inf if stays else uniform(block, c) - c.amplitude * c.gone * c.importance[block.layer]


def best(block, c):
    """Blocks of all layers and kinds compete by score."""
    return -block.score


def standardised(block, c):
    """As `global`, each layer's scores standardised first, as FLAP does (arXiv 2312.11983, eq. 6)."""
    return -block.z


ALLOCATIONS = {"global": best, "standardised": standardised, "uniform": uniform, "uniform-strict": uniform,
               "middle": middle, "adaptive": adaptive}


@dataclass(frozen=True)
class Context:
    """What an order may look at besides the block."""
    layers: int
    gone: float               # share of the removable cost that is gone then, of what was there before the first cut
    amplitude: float
    importance: list          # of the layers, in [-1, 1] (score.importance)
    sublayers: bool           # whole layers or sub-blocks go


def blocks_of(config, scores, structure, multiple_of=1, whole=None, spread=True):
    """-> [Block] of all units of `structure`: of ffn (neurons) and kv (KV groups); or sublayer (a whole attention or
    FFN), or layer (both). FFN neurons in blocks of `multiple_of`; a layer's last block may be smaller. `whole`: the
    widths that depths are fractions of; default: as they are."""
    start, whole, found = config.widths(), whole or config.widths(), []
    if {"layer", "sublayer"} & {*structure}:
        for layer in range(config.n_layer):
            for what in [("layer",)] if "layer" in structure else [("kv",), ("ffn",)]:
                units = {(layer, kind): start[layer, kind] for kind in ("kv", "ffn")
                         if what[0] in ("layer", kind) and start[layer, kind]}
                if units:
                    score = float(scores[layer, what[0]])
                    found.append(Block(units, layer, 1.0, score, score))
        return found
    for key in (key for key in start if key[1] in structure and start[key]):
        ranked = scores[key].cpu().double().sort(descending=True).values
        z = (ranked - ranked.mean()) / ranked.std(correction=0).clamp(min=1e-300)
        step = multiple_of if key[1] == "ffn" else 1
        place = ((key[0] + 1) * 0.6180339887498949) % 1 if spread else 1.0      # the golden ratio spreads evenly
        for first in range(0, start[key], step):
            last = min(first + step, start[key])
            found.append(Block({key: last - first}, key[0], (first + place * (last - first)) / whole[key],
                               ranked[first:last].mean().item(), z[first:last].mean().item(), first == 0))
    return found


def fill(blocks, cost, most, widths):
    """Take blocks [(order, {key: units})] from the lowest order on (ties: as given) as long as their `cost(key)` fits
    into `most`, on top of `widths`, -> {key: units}. Where one did not fit, nothing behind it in its layer and kind is
    taken."""
    widths, closed = dict(widths), set()
    for _, units in sorted(blocks, key=lambda block: block[0]):
        price = sum(n * cost(key) for key, n in units.items())
        if price <= most and not closed & {*units}:
            widths |= {key: widths[key] + n for key, n in units.items()}
            most -= price
        else:
            closed |= {*units}
    return widths


def split_budget(config, budget, structure, resource="params"):
    """-> (cost(key), what is left of `budget` for the units of `structure`, widths without these)."""
    kinds = {"ffn", "kv"} if {"layer", "sublayer"} & {*structure} else {*structure}
    costs = {key: unit_cost(config, *key, resource) for key in config.widths()}
    widths = {key: 0 if key[1] in kinds else n for key, n in config.widths().items()}
    fixed = sum(n * costs[key] for key, n in widths.items())
    if budget < fixed:
        raise UserError(f"the budget of {budget:,} {resource} is {fixed - budget:,} less than what stays anyway, "
                        f"as only {', '.join(structure)} may go; keep more, or cut more by --structure")
    return costs.__getitem__, budget - fixed, widths


def total(config, resource="params"):
    """What all units of the model cost together."""
    return sum(n * unit_cost(config, *key, resource) for key, n in config.widths().items())


def widths_for(config, budget, how, scores, structure=("ffn", "kv"), *, multiple_of=1, resource="params",
         importance=None, amplitude=1.0, whole=None):
    """How many units each layer of `config` keeps so that they cost at most `budget` (of `resource`) and only those of
    `structure` go -> {(layer, kind): units}. `how` is a name in ALLOCATIONS; scores {(layer, kind): (units,)}, for
    whole layers or sub-blocks {(layer, "layer" | kind): number}; importance: of the layers, for "adaptive". `whole`:
    the widths before earlier cuts, which shares are of. UserError: impossible budgets, a layer below one unit."""
    cost, left, widths = split_budget(config, budget, structure, resource)
    sublayers = bool({"layer", "sublayer"} & {*structure})
    if sublayers and how not in ("global", "middle"):
        raise UserError(f"whole layers and sub-blocks go by --allocate global or middle, not {how}")
    start, strict = config.widths(), how == "uniform-strict"
    gone = 1 - budget / max(1, sum(n * cost(key) for key, n in (whole or start).items()))
    context = Context(config.n_layer, gone, amplitude, importance, sublayers)
    blocks = [(ALLOCATIONS[how](block, context), block.units)
              for block in blocks_of(config, scores, structure, multiple_of, whole, spread=not strict)]
    if strict:
        if any(n != start[0, kind] for (_, kind), n in start.items() if kind in structure):
            raise UserError("uniform-strict keeps layers equal, and these differ already; give --allocate uniform")
        blocks = [(order, {(layer, kind): n for layer in range(config.n_layer)})
                  for order, units in blocks for (first, kind), n in units.items() if first == 0]
    kept = sum((n - widths[key]) * cost(key) for key, n in start.items()
               if how == "middle" and protected(key[0], config.n_layer))
    if kept > left:
        raise UserError(f"the layers that middle keeps whole cost {kept:,} {resource}, {left:,} may stay; keep more, "
                        "or give another --allocate")
    widths = fill(blocks, cost, left, widths)
    below = [key for key, n in widths.items() if not n and start[key]]
    if below and not sublayers and how not in ("global", "standardised"):
        layer, kind = below[0]
        raise UserError(f"layer {layer} would keep less than one of its {start[below[0]]} "
                        f"{'neurons' if kind == 'ffn' else 'KV groups'} under a budget of {budget:,} {resource}; keep "
                        "more, give a smaller --multiple-of, or --allocate global, which may drop whole sub-blocks")
    return widths


# -- measured: the knapsack

def knapsack(options, most):
    """{key: [(cost, damage)]}, costs whole numbers -> {key: index} with the least sum of damages whose costs sum to at
    most `most`: exact, by dynamic programming over the costs in units of their common divisor. Ties: the first option.
    UserError: even the cheapest options cost more. (Above 2^20 such units costs are rounded up to coarser ones.)"""
    cheapest = sum(min(cost for cost, _ in row) for row in options.values())
    if cheapest > most:
        raise UserError(f"the cheapest widths cost {cheapest:,}, the budget is {most:,}; keep more")
    unit = math.gcd(*(cost for row in options.values() for cost, _ in row)) or 1
    unit *= max(1, math.ceil(most / unit / 2**20))
    n = most // unit + 1
    least, chosen = torch.zeros(n, dtype=torch.float64), {}       # least[c]: damage of the keys so far with at most c
    for key, row in options.items():
        candidates = torch.full((len(row), n), math.inf, dtype=torch.float64)
        for i, (cost, damage) in enumerate(row):
            c = -(-cost // unit)
            if c < n:
                candidates[i, c:] = least[:n - c] + damage
        least, chosen[key] = candidates.min(0)
    if least[-1] == math.inf:
        raise UserError(f"the cheapest widths cost {cheapest:,} of {most:,}, too near for this rounding; keep more")
    c, found = n - 1, {}
    for key in reversed(options):
        found[key] = chosen[key][c].item()
        c -= -(-options[key][found[key]][0] // unit)
    return {key: found[key] for key in options}


def measured(config, budget, damage, structure=("ffn", "kv"), *, multiple_of=1, resource="params", steps=64):
    """The widths of least damage: {(layer, kind): [(units, nats)]} as `score.damage` measured it, between those points
    interpolated on a line, never rising with the width, at up to `steps` widths a layer; what the knapsack leaves over
    goes where the next block mends most. -> {(layer, kind): units}. Our choice."""
    cost, left, widths = split_budget(config, budget, structure, resource)
    start, curves, options, sizes = config.widths(), {}, {}, {}
    for key in (key for key in damage if key[1] in structure):
        points = sorted(damage[key])
        for i in reversed(range(len(points) - 1)):
            points[i] = points[i][0], max(points[i][1], points[i + 1][1])
        block = multiple_of if key[1] == "ffn" else 1
        step = block * max(1, math.ceil(start[key] / block / steps))
        sizes[key] = sorted({*range(0, start[key], step), start[key]})
        curves[key] = lambda n, points=points: interpolate(points, n)
        options[key] = [(n * cost(key), curves[key](n)) for n in sizes[key]]
    choice = knapsack(options, left)
    widths |= {key: sizes[key][i] for key, i in choice.items()}
    left -= sum(options[key][i][0] for key, i in choice.items())
    while True:
        wider = {key: min(start[key], (widths[key] // block + 1) * block) for key in options
                 for block in [multiple_of if key[1] == "ffn" else 1]}
        fits = [key for key in options if widths[key] < start[key] and (wider[key] - widths[key]) * cost(key) <= left]
        if not fits:
            return widths
        key = max(fits, key=lambda key: (curves[key](widths[key]) - curves[key](wider[key]))
                  / (wider[key] - widths[key]) / max(1, cost(key)))
        left -= (wider[key] - widths[key]) * cost(key)
        widths[key] = wider[key]


def interpolate(points, n):
    """The line through [(units, nats)], ascending, at n; flat outside."""
    for (a, low), (b, high) in zip(points, points[1:]):
        if a <= n <= b:
            return low + (high - low) * (n - a) / (b - a)
    return points[0][1] if n < points[0][0] else points[-1][1]


# -- on the way to a target, while a model trains

def widths_on_the_way(start, target, size, at_most):
    """How many units each layer keeps when `size` of the removable parameters of config `start` may stay, on the
    straight way to config `target`: -> {(layer, kind): units}, none above at_most[key]. The sum is at most the budget
    and short of it by less than the cheapest unit that could still have stayed; at the target's own size it is
    exactly the target."""
    whole, least = start.removable_params(), target.removable_params()
    budget = math.floor(size * whole + 1e-6)                                    # (least / whole) * whole may round down
    share = (budget - least) / (whole - least) if whole > least else 0.0        # of what goes, how much is still there
    first, last = start.widths(), target.widths()
    exact = {key: last[key] + share * (first[key] - last[key]) for key in first}
    widths = {key: min(at_most[key], math.floor(exact[key] + 1e-9)) for key in first}
    left = budget - start.resized(widths).removable_params()
    while True:                                                                 # fill up, where most is missing first
        allowed = [key for key in first if widths[key] < at_most[key] and start.unit_params(*key) <= left]
        if not allowed:
            return widths
        key = max(allowed, key=lambda k: exact[k] - widths[k])                  # ties: the first layer
        widths[key], left = widths[key] + 1, left - start.unit_params(*key)
