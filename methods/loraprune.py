"""LoRAPrune: units are scored and cut while adapters train, without a gradient of the weights.

    python -m methods.lora --init MODEL --keep 0.8 --data texts/brown.jsonl --steps 1000 --out runs/loraprune
    python -m pytest tests/methods/test_loraprune.py

With LoRA (methods/adapters.py) a matrix is W + s B A, s = α/r, and only A and B have gradients. LoRAPrune (arXiv
2305.18403) takes one step of gradient descent on B A for the gradient of W,

    G = ∂B · A + B · ∂A - ∂B · ∂A,

and an entry is worth |G · (W + s B A)|. At B = 0, G is s · ∂W · AᵀA, a random projection of the gradient;
its cosine with it is about √(r/n) for n inputs, 0.12 for rank 8 and 576. So it is averaged over the steps of
training. About every 10 steps some units go, by a cubic curve between the first tenth of the steps and the last.

As in the released code (aim-uofa/LoRAPrune) the absolute value is taken, where the paper squares it, and the
past counts 0.9 in the average. What is done otherwise than there:
- The last cut leaves what was asked; theirs is left out, as it needs a share below the target.
- Heads are those of the model; theirs are 32 of 128 channels, in k and v of shared KV heads, too.
- Gradients are read before they are clipped, as clipping changes the share of ∂B · ∂A in G.
- allocate.middle says which layers stay whole; theirs are the first tenth and the last one.
- Dead units are zeros, in W, A and B; theirs are masked until the end. The logits are the same.
Not here: 8 bits, dropout (methods/lora.py).
"""
import math

import torch

import allocate
import prune
import schedule
import score
import shard
from common import UserError
from model import by_unit, coupled

# Steps between two cuts, the share of the steps in front of the first cut and behind the last one, and
# the weight of the past in the moving average.
CUT_EVERY = 10
MARGIN = 0.1
BETA = 0.9


@torch.no_grad()
def estimate(module):
    """G (out, in): what stands for the gradient of an adapted matrix, from those of A and B. It is the
    step B A - (B - ∂B)(A - ∂A)."""
    A = module.A
    B = module.B
    return B.grad @ A + B @ A.grad - B.grad @ A.grad


@torch.no_grad()
def importance(model):
    """What each unit is worth by the gradients in place, {(layer, kind): (units,)}: Σ |G · (W + α/r · B A)|
    over its entries in a matrix. The scores of each matrix are divided by their L2 norm, and then those of
    all matrices that the unit has entries in are added up."""
    scores = {}
    for (layer, kind), units in model.config.widths().items():
        scores[layer, kind] = torch.zeros(units, device=model.embed.weight.device)
        if units == 0:
            continue
        for name, dim in matrices_of(model.config, layer, kind):
            module = model.get_submodule(name)
            worth = shard.sums_by_unit((estimate(module) * module.merged()).abs(), dim, units)
            scores[layer, kind] = scores[layer, kind] + worth / worth.norm().clamp(min=1e-8)
    return scores


def matrices_of(config, layer, kind):
    """`coupled` without biases: [(name of the module, dimension that runs over the units)]."""
    return [(name.removesuffix(".weight"), dim) for name, dim in coupled(config, layer, kind)
            if name.endswith(".weight")]


@torch.no_grad()
def zero_(model, optimizer, alive):
    """`prune.zero_` for an adapted model: a unit's rows of W and B, columns of W and A, and their moments
    become 0. The first fact of prune.py then holds: the unit's output and all of its gradients are 0."""
    prune.zero_(model, None, alive)
    for (layer, kind), units in model.config.widths().items():
        is_dead = torch.ones(units, dtype=torch.bool)
        is_dead[alive[layer, kind].cpu()] = False
        dead = is_dead.nonzero().flatten()
        for name, dim in matrices_of(model.config, layer, kind):
            module = model.get_submodule(name)
            p = module.B if dim == 0 else module.A
            moments = [value for value in optimizer.state.get(p, {}).values() if value.shape == p.shape]
            for tensor in (p, *moments):
                by_unit(tensor, dim, units).index_fill_(dim, dead.to(p.device), 0)


def average(averages, model):
    """The moving averages with the importance by the gradients in place, see `score.average`."""
    return score.average(averages, importance(model), BETA)


def cuts_of(steps, keep):
    """The cuts: {step: kept fraction from then on}; none at a `keep` of 1. Raises UserError if there are too
    few steps."""
    if keep == 1:
        return {}
    first = math.ceil(MARGIN * steps)
    last = math.floor((1 - MARGIN) * steps)
    cuts = (last - 1 - first) // CUT_EVERY + 1
    try:
        return dict(schedule.cut_events(first, last, cuts, schedule.SIZE_CURVES["cubic"], keep, steps))
    except ValueError:
        raise UserError(f"--keep {keep:g} is cut between the first and the last tenth of --steps {steps}, which "
                        "leaves no step to cut at; give more --steps") from None


def check_budget(config, keep, how):
    """Raise UserError if no cut can leave so little, before the work begins."""
    alive = prune.everything(config)
    even = {key: torch.zeros(2, len(indices)) for key, indices in alive.items()}
    living(config, keep, how, even, alive)


def living(config, keep, how, averages, alive):
    """The units that a cut leaves of those in `alive`, {(layer, kind): indices}. `how` is a name in
    ALLOCATIONS. Raises UserError if the budget cannot be met."""
    scores = score.mask_dead(score.ranking(averages), alive)
    budget = math.floor(keep * config.removable_params() + 1e-6)
    widths = allocate.widths_for(config, budget, how, scores)
    # A smaller budget may have room for one more of the cheaper units. What is dead stays dead.
    widths = {key: min(n, len(alive[key])) for key, n in widths.items()}
    return prune.choose(scores, widths)
