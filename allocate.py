"""How a budget is shared: how many units each layer keeps.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --allocate adaptive
    python -m pytest tests/test_allocate.py

Every way of sharing a budget gives each block of units a *sort key*. The blocks with the smallest
keys stay, until the budget is spent (`fill`). **A new way is one function and one row of
ALLOCATIONS.** Every allocation is deterministic and keeps at most the budget. It misses the budget
by less than the cheapest block that had to go. While a model trains, all layers move on a straight
line from the first widths to the target's (`widths_on_the_way`). Not here: which units stay
(prune.py), whole layers (methods/depth.py), the exact knapsack (methods/measured.py).
"""
import math
from dataclasses import dataclass

from common import UserError

# What a budget may be counted in, besides measured decode time (methods/latency.py).
RESOURCES = ("params", "flops", "kv_bytes")
# Multiples of the golden ratio modulo 1 are spread evenly over [0, 1).
GOLDEN_RATIO = 0.6180339887498949


# -- what units cost

def unit_cost(config, layer, kind, resource):
    """What one unit costs, a whole number: parameters; FLOPs per token of a forward pass at the
    config's context; or bytes of KV cache per token in bfloat16. Or `resource` is a
    latency.DecodeTime, and the cost is in nanoseconds. 0 if the sub-block is absent."""
    widths = config.widths()
    if widths[layer, kind] == 0:
        return 0
    if not isinstance(resource, str):
        return resource.unit(kind)
    if resource == "params":
        return config.unit_params(layer, kind)
    nothing = dict.fromkeys(widths, 0)
    without_units = config.resized(nothing)
    with_one = config.resized({**nothing, (layer, kind): 1})
    if resource == "kv_bytes":
        return with_one.kv_bytes_per_token()
    T = config.block_size
    flops = with_one.flops_per_token(T, backward=False)
    return flops - without_units.flops_per_token(T, backward=False)


def layer_cost(config, layer, resource):
    """What a layer costs besides its units: decode time, if it has a unit. It is saved only by
    dropping the whole layer. Counted resources have no such cost."""
    widths = config.widths()
    is_absent = widths[layer, "ffn"] == 0 and widths[layer, "kv"] == 0
    return 0 if is_absent or isinstance(resource, str) else resource.layer


def total(config, resource="params"):
    """What all layers of the model cost together."""
    units = sum(n * unit_cost(config, *key, resource) for key, n in config.widths().items())
    return units + sum(layer_cost(config, layer, resource) for layer in range(config.n_layer))


def split_budget(config, budget, structure, resource="params"):
    """Split a budget into what stays anyway and what the kinds in `structure` may use. Returns
    (costs of one unit by (layer, kind), what is left for the kinds in `structure`, the widths with
    0 for these kinds). "layer" in `structure`: whole layers may go, with what they cost besides
    their units. Raises UserError if what stays anyway costs more than the budget."""
    costs = {key: unit_cost(config, *key, resource) for key in config.widths()}
    widths = {key: 0 if key[1] in structure else n for key, n in config.widths().items()}
    fixed = sum(n * costs[key] for key, n in widths.items())
    if "layer" not in structure:
        fixed += sum(layer_cost(config, layer, resource) for layer in range(config.n_layer))
    if budget < fixed:
        raise UserError(f"the budget of {budget:,} {resource} is {fixed - budget:,} less than what stays "
                        f"anyway, as only {', '.join(structure)} may go; keep more, or cut more by "
                        "--structure")
    return costs, budget - fixed, widths


# -- sort keys: the blocks with the lowest ones stay

@dataclass(frozen=True)
class Block:
    """Units of one layer and kind that stay or go together. Blocks are numbered from the best unit
    on."""
    layer: int
    kind: str
    units: int
    # Position in the layer's ranking, from 0 (best unit) to 1. A block of several units, or one KV
    # group, covers a range of it. The position is one point of that range, another one in each
    # layer. With the same point everywhere all layers would round alike, and the mean share of what
    # they keep would be off.
    depth: float
    score: float          # mean over its units
    standardised: float   # that score, standardised over all units of the layer and kind
    is_first: bool        # whether it holds the best units of its layer and kind


@dataclass(frozen=True)
class Context:
    """What a sort key may depend on besides the block."""
    n_layer: int
    # Share of the original cost of all units that is removed after this cut.
    gone: float
    # For "adaptive": the importance of each layer, in [-1, 1] (score.importance), and how far the
    # layers' shares differ by it.
    importance: list | None
    amplitude: float


def uniform(block, context):
    """Every layer keeps the same share of its units."""
    return block.depth


def protected(layer, n_layer):
    """Whether `middle` keeps the layer whole."""
    return layer < math.ceil(n_layer / 8) or layer >= n_layer - math.ceil(n_layer / 16)


def middle(block, context):
    """The first 1/8 of the layers and the last 1/16 stay whole, all others keep the same share:
    LLM-Pruner (arXiv 2305.11627, section 4.1: 4 and 2 of 32 layers) and Shortened LLaMA."""
    return -math.inf if protected(block.layer, context.n_layer) else uniform(block, context)


def adaptive(block, context):
    """The less a layer l changes the residual stream, the fewer of its units stay: Adapt-Pruner
    (arXiv 2502.03460). It keeps the share base + amplitude · (share removed) · I_l, with amplitude
    1 in their code (0.02 · I_l for each 0.02 removed). Here `fill` stops at some sort key t, and
    what stays of layer l are the blocks with depth < t + amplitude · gone · I_l. So t is the
    paper's base, and the budget sets it. A layer keeps at least 1 % (their choice) and at least one
    block (our choice, as 1 % of few KV groups is none).

    In several cuts, each one computes the shares from the original widths and the newest I_l. Their
    code adds a small step per cut to the last widths. With few units in a layer, the rounding
    errors of the steps would add up."""
    if block.is_first or block.depth <= 0.01:
        return -math.inf
    importance = context.importance[block.layer]
    return uniform(block, context) - context.amplitude * context.gone * importance


def best_scores(block, context):
    """Blocks of all layers and kinds compete by score."""
    return -block.score


def standardised_scores(block, context):
    """Blocks compete by score, and each layer's scores are standardised first: FLAP (arXiv
    2312.11983, eq. 6)."""
    return -block.standardised


ALLOCATIONS = {
    "global": best_scores,
    "standardised": standardised_scores,
    "uniform": uniform,
    "uniform-strict": uniform,        # one block of each layer at a time, so that layers stay equal
    "middle": middle,
    "adaptive": adaptive,
}
MAY_EMPTY_A_LAYER = ("global", "standardised")


def blocks_of(config, scores, structure, multiple_of=1, original=None, spread=True):
    """All units of the kinds in `structure` as a list of Blocks: FFN neurons in blocks of
    `multiple_of` (the last block of a layer may be smaller), KV groups one by one. `original`: the
    widths that depths are fractions of; default: the widths as they are. Without `spread`, a block
    is placed at its end in every layer."""
    start = config.widths()
    original = original or start
    blocks = []
    for (layer, kind), width in start.items():
        if kind not in structure or width == 0:
            continue
        ranked = scores[layer, kind].cpu().double().sort(descending=True).values
        z = (ranked - ranked.mean()) / ranked.std(correction=0).clamp(min=1e-300)
        step = multiple_of if kind == "ffn" else 1
        place = ((layer + 1) * GOLDEN_RATIO) % 1 if spread else 1.0
        for a in range(0, width, step):
            b = min(a + step, width)
            depth = (a + place * (b - a)) / original[layer, kind]
            mean_score = ranked[a:b].mean().item()
            mean_z = z[a:b].mean().item()
            blocks.append(Block(layer, kind, b - a, depth, mean_score, mean_z, is_first=a == 0))
    return blocks


def fill(offers, budget, widths):
    """Take offers [(sort key, price, {(layer, kind): units})] from the lowest key on, on top of
    `widths`, as long as their prices fit into the budget. Ties go to the offer that comes first in
    the list. If an offer does not fit, no later one of its layer and kind is taken. Returns the new
    widths."""
    widths = dict(widths)
    closed = set()
    for _, price, units in sorted(offers, key=lambda offer: offer[0]):
        if price > budget or closed.intersection(units):
            closed.update(units)
            continue
        for key, n in units.items():
            widths[key] += n
        budget -= price
    return widths


def widths_for(config, budget, how, scores, structure=("ffn", "kv"), *, multiple_of=1,
               resource="params", importance=None, amplitude=1.0, original=None):
    """How many units each layer of `config` keeps, so that all units cost at most `budget` of
    `resource` and only the kinds in `structure` go: {(layer, kind): units}.

    `how` is a name in ALLOCATIONS. `scores` are {(layer, kind): (units,)}. `importance` of the
    layers and `amplitude` are for "adaptive". `original`: the widths before earlier cuts, which
    shares are of. Raises UserError if the budget cannot be met, or if a layer would keep less than
    one unit."""
    costs, left, widths = split_budget(config, budget, structure, resource)
    start = config.widths()
    strict = how == "uniform-strict"
    if strict:
        refuse_uneven_layers(start, structure)
    if how == "middle":
        refuse_small_budget_of_middle(config, structure, costs, left, resource)
    before = sum(n * costs[key] for key, n in (original or start).items())
    context = Context(config.n_layer, 1 - budget / max(1, before), importance, amplitude)

    offers = []
    for block in blocks_of(config, scores, structure, multiple_of, original, spread=not strict):
        layers = [block.layer]
        # With "uniform-strict" a block of the first layer stands for the same block of all layers.
        if strict:
            layers = [layer for layer in range(config.n_layer) if start[layer, block.kind] > 0]
            if block.layer != layers[0]:
                continue
        price = sum(block.units * costs[layer, block.kind] for layer in layers)
        units = {(layer, block.kind): block.units for layer in layers}
        offers.append((ALLOCATIONS[how](block, context), price, units))
    widths = fill(offers, left, widths)
    if how not in MAY_EMPTY_A_LAYER:
        refuse_empty_layers(start, widths, budget, resource)
    return widths


def refuse_uneven_layers(start, structure):
    """Raise UserError if the layers differ in a kind that "uniform-strict" is to cut. Layers that
    lack it do not count."""
    for kind in structure:
        widths = {n for (_, other), n in start.items() if other == kind and n > 0}
        if len(widths) > 1:
            raise UserError("uniform-strict keeps layers equal, and these differ already; give "
                            "--allocate uniform")


def refuse_small_budget_of_middle(config, structure, costs, left, resource):
    """Raise UserError if the layers that "middle" keeps whole cost more than what is left of the
    budget."""
    kept = 0
    for (layer, kind), n in config.widths().items():
        if kind in structure and protected(layer, config.n_layer):
            kept += n * costs[layer, kind]
    if kept > left:
        raise UserError(f"the layers that middle keeps whole cost {kept:,} {resource}, {left:,} may "
                        "stay; keep more, or give another --allocate")


def refuse_empty_layers(start, widths, budget, resource):
    """Raise UserError if a layer would lose its last neuron or KV group."""
    for (layer, kind), n in widths.items():
        if n == 0 and start[layer, kind] > 0:
            units = "neurons" if kind == "ffn" else "KV groups"
            raise UserError(f"layer {layer} would keep less than one of its {start[layer, kind]} {units} "
                            f"under a budget of {budget:,} {resource}; keep more, give a smaller "
                            "--multiple-of, or --allocate global, which may drop whole sub-blocks")


# -- on the way to a target, while a model trains

def widths_on_the_way(start, target, size, at_most):
    """How many units each layer keeps when `size` of the removable parameters of config `start` may
    stay, on the straight line to config `target`: {(layer, kind): units}, none above at_most[layer,
    kind]. The sum is at most the budget and misses it by less than the cheapest unit that could
    still have stayed. At the target's own size the widths are exactly the target's."""
    start_params = start.removable_params()
    target_params = target.removable_params()
    # (target_params / start_params) · start_params may round down to less than `target_params`.
    budget = math.floor(size * start_params + 1e-6)
    # The share of the units to remove that is still there: 1 at the start, 0 at the target.
    share = 0.0
    if start_params > target_params:
        share = (budget - target_params) / (start_params - target_params)
    start_widths = start.widths()
    target_widths = target.widths()
    exact = {key: end + share * (start_widths[key] - end) for key, end in target_widths.items()}
    widths = {key: min(at_most[key], math.floor(exact[key] + 1e-9)) for key in start_widths}
    left = budget - start.resized(widths).removable_params()

    # Rounding down left some budget over: add units one by one where the width is furthest below
    # the line.
    while True:
        allowed = [key for key in start_widths if widths[key] < at_most[key]]
        allowed = [key for key in allowed if start.unit_params(*key) <= left]
        if not allowed:
            return widths
        # Ties go to the first layer.
        key = max(allowed, key=lambda key: exact[key] - widths[key])
        widths[key] += 1
        left -= start.unit_params(*key)
