"""Measured damage: cut every sub-block alone to several widths, measure, and choose the widths that
do least harm.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --allocate measured --mend least-squares
    python -m pytest tests/methods/test_measured.py      # exhaustive search finds nothing better

The damage of a width is the KL divergence between the model and the model with this one sub-block
cut. The damages of all sub-blocks are added up, as if they were independent, and an exact knapsack
minimises the sum under the budget. Published methods share a budget by an order (allocate.py); this
combination is ours.
"""
import math

import torch

import allocate
from common import UserError, progress
from methods.depth import reruns
from methods.mend import channels_of
from model import reader_of

# Shares of an FFN's width at which the damage is measured.
SHARES = (0, .4, .7, .85)
# Columns of the knapsack's table. Larger budgets are counted in coarser units.
MAX_COLUMNS = 2**20


# -- measure

def widths_to_measure(config, kinds):
    """{(layer, kind): [number of units]}: SHARES of each FFN, and every number of KV groups."""
    points = {}
    for (layer, kind), width in config.widths().items():
        if kind not in kinds:
            continue
        if kind == "ffn":
            points[layer, kind] = sorted({round(share * width) for share in SHARES})
        else:
            points[layer, kind] = list(range(width))
    return points


def damage(model, batches, scores, widths, reader):
    """The damage of cutting one sub-block: {(layer, kind): [(units, nats per token)]}, for each
    number of units in widths[layer, kind], and 0 for all units. Damage is KL(model ‖ model whose
    one sub-block keeps only its best units).

    `reader(name, w, kept)` gives the columns (C, kept) of the matrix w (C, n) for the channels that
    are left. Our choice: a KL divergence needs fewer tokens than a difference of losses, so every
    4th token counts."""
    config = model.config
    curves = {key: [(n, 0.0)] for key, n in config.widths().items() if n > 0 and key in widths}
    runs = [reruns(model, x, y, every=4) for x, y in batches]
    for (layer, kind), points in progress(curves.items(), "measure"):
        name = reader_of(config, layer, kind)
        p = model.get_parameter(name)
        ranked = scores[layer, kind].argsort(descending=True, stable=True).to(p.device)
        whole = p.data
        for units in widths[layer, kind]:
            kept = channels_of(ranked[:units], p.size(1) // config.widths()[layer, kind])
            p.data = torch.zeros_like(whole).index_copy_(1, kept, reader(name, whole, kept))
            # Autocast would go on with its copy of the old matrix.
            torch.clear_autocast_cache()
            divergences = [run(layer, model.blocks[layer])[1] for run in runs]
            points.append((units, sum(divergences) / len(divergences)))
        p.data = whole
        torch.clear_autocast_cache()
    return curves


# -- choose

def widths_for(config, budget, damage, structure=("ffn", "kv"), *, multiple_of=1,
               resource="params", steps=64):
    """The widths with the least sum of damages, so that all units cost at most `budget` of
    `resource` and only the kinds in `structure` go: {(layer, kind): units}. `damage` are curves
    {(layer, kind): [(units, nats)]}.

    Between the points of a curve the damage is on a straight line, and it never rises with the
    width. Up to `steps` widths of a layer compete. What the knapsack leaves over goes where the
    next block mends most."""
    costs, left, widths = allocate.split_budget(config, budget, structure, resource)
    start = config.widths()
    blocks = {"ffn": multiple_of, "kv": 1}
    curves = {}
    sizes = {}
    options = {}
    for key, points in damage.items():
        _, kind = key
        if kind not in structure:
            continue
        step = blocks[kind] * max(1, math.ceil(start[key] / blocks[kind] / steps))
        curves[key] = never_rising(points)
        sizes[key] = sorted({*range(0, start[key], step), start[key]})
        options[key] = [(n * costs[key], interpolate(curves[key], n)) for n in sizes[key]]
    for key, i in knapsack(options, left).items():
        widths[key] = sizes[key][i]
        left -= widths[key] * costs[key]
    return fill_up(widths, start, curves, costs, left, blocks)


def never_rising(points):
    """A damage curve [(units, nats)], ascending in units, with each damage at least that of all
    larger widths."""
    points = sorted(points)
    for i in reversed(range(len(points) - 1)):
        units, nats = points[i]
        points[i] = (units, max(nats, points[i + 1][1]))
    return points


def interpolate(points, n):
    """The straight line through [(units, nats)], ascending, at n units; constant outside of the
    points."""
    for (a, low), (b, high) in zip(points, points[1:]):
        if a <= n <= b:
            return low + (high - low) * (n - a) / (b - a)
    return points[0][1] if n < points[0][0] else points[-1][1]


def knapsack(options, budget):
    """One option of each key with the least sum of damages, whose costs sum to at most the budget.
    `options` are {key: [(cost, damage)]} with whole costs; returns {key: index}. Ties go to the
    first option.

    It is exact, by dynamic programming over the cost in units of the costs' common divisor. Above
    MAX_COLUMNS such units, costs are rounded up to coarser units. Raises UserError if even the
    cheapest options cost more."""
    cheapest = 0
    costs = []
    for row in options.values():
        costs += [cost for cost, _ in row]
        cheapest += min(cost for cost, _ in row)
    if cheapest > budget:
        raise UserError(f"the cheapest widths cost {cheapest:,}, the budget is {budget:,}; "
                        "keep more")
    unit = math.gcd(*costs) or 1
    unit *= max(1, math.ceil(budget / unit / MAX_COLUMNS))
    columns = budget // unit + 1

    # least[c] is the least damage of the keys so far at a cost of at most c units.
    least = torch.zeros(columns, dtype=torch.float64)
    chosen = {}
    for key, row in options.items():
        candidates = torch.full((len(row), columns), math.inf, dtype=torch.float64)
        for i, (cost, nats) in enumerate(row):
            price = round_up(cost, unit)
            if price < columns:
                candidates[i, price:] = least[:columns - price] + nats
        least, chosen[key] = candidates.min(0)
    if least[-1] == math.inf:
        raise UserError(f"the cheapest widths cost {cheapest:,} of {budget:,}, too near for this "
                        "rounding; keep more")

    # Walk back from the last key to the first: each choice tells how much the keys before it may
    # cost.
    choice = {}
    column = columns - 1
    for key in reversed(options):
        choice[key] = chosen[key][column].item()
        cost, _ = options[key][choice[key]]
        column -= round_up(cost, unit)
    return {key: choice[key] for key in options}


def round_up(cost, unit):
    """How many units pay for the cost."""
    return -(-cost // unit)


def fill_up(widths, start, curves, costs, left, blocks):
    """Widen one sub-block after the other by a block of units, as long as `left` pays for one:
    always where it mends most for its price. Returns the new widths; ties go to the first."""
    widths = dict(widths)
    while True:
        best = None
        best_gain = -math.inf
        for key in curves:
            block = blocks[key[1]]
            wider = min(start[key], (widths[key] // block + 1) * block)
            more = wider - widths[key]
            if more == 0 or more * costs[key] > left:
                continue
            gain = interpolate(curves[key], widths[key]) - interpolate(curves[key], wider)
            gain = gain / more / max(1, costs[key])              # nats mended per unit of budget
            if gain > best_gain:
                best = (key, wider)
                best_gain = gain
        if best is None:
            return widths
        key, wider = best
        left -= (wider - widths[key]) * costs[key]
        widths[key] = wider
