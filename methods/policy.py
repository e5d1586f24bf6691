"""Which units stay, learned from losses alone: a policy gradient over masks, without a backward pass.

    python prune.py --init runs/scratch-laptop-0 --keep 0.8 --score policy --policy-steps 300
    python -m pytest tests/methods/test_policy.py      # the gradient by all masks, the projection by a solver

Bypass Back-propagation (arXiv 2406.10576, ACL 2025). Unit i stays with probability s_i. Masks m of 0 and
1 are drawn by s, and the expected loss is to be least under a budget:

    min E[L(m)]  over 0 ≤ s ≤ 1, Σ c_i s_i ≤ budget           c_i: what unit i costs
    ∂E/∂s_i = E[L(m) (m_i - s_i) / (s_i (1 - s_i))]           the score function (REINFORCE)

Each step runs the model forward under K = 2 masks, takes a step of gradient descent and projects s onto
the budget. Two updates:

    unbiased    Σ_k (L_k - mean) (m_k - s) / (s (1 - s)) / (K - 1). The mean is that of the K losses, so each
                mask is compared with the others: a leave-one-out baseline.
    released    As in the authors' code: the root of s (1 - s) in the place of s (1 - s), and a moving
                average of losses in the place of the mean. In expectation this is 1.8 √(s (1 - s)) times the
                gradient at K = 2: units that are nearly decided move less.

s begins with Wanda-sp's score, standardised in each layer. In the end the units with the highest s stay;
prune.py takes s as their score. Differences from the release (our choices): one budget in what
--budget counts for KV groups and neurons together, instead of one for each; s begins inside of (0, 1), as
a unit at 0 or 1 never moves. The paper takes 15,000 steps at a rate of 0.002, each on new text. By default
the command has the same rate and only 300 steps; larger rates do worse in so few (docs/pruning.md). Not
here: the penalty term, which is off in the release.
"""
import contextlib
import math

import torch

from common import progress
from model import reader_of
from score import cross_entropy

MASKS = 2                 # K
# Of the moving average of losses: the share of the newest.
NEWEST = 1 / 5
EDGE = 1e-7
HALVINGS = 100
FAR = 1000.0


# -- one step

def gradient(losses, masks, s, baseline=None, root=False):
    """The estimate of ∂E/∂s (n,) from the losses (K,) of masks (K, n) that were drawn by s (n,): see above.
    `baseline` None is the mean of the losses. `root` divides by √(s (1 - s))."""
    if baseline is None:
        baseline = losses.mean()
    variance = (s + EDGE) * (1 - s + EDGE)
    scale = variance.sqrt() if root else variance
    return (losses - baseline) @ (masks - s) / scale / (len(losses) - 1)


def root_of(excess, low=0.0):
    """The v ≥ low at which a function that falls becomes 0, by bisection; `low` if it is not above 0
    there."""
    if excess(low) <= 0:
        return low
    span = 1.0
    while excess(low + span) > 0:
        span *= 2
    high = low + span
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high


def project(s, cost, budget):
    """The nearest point (n,) to s with 0 ≤ s ≤ 1 and Σ cost · s ≤ budget: clamp(s - v · cost) with the
    least v ≥ 0 that meets the budget."""
    unit = cost / cost.max()
    v = root_of(lambda v: ((s - v * unit).clamp(0, 1) @ cost).item() - budget)
    return (s - v * unit).clamp(0, 1)


def starting_point(scores, cost, budget):
    """Probabilities (n,) that spend the budget: sigmoid(z - v), where z are the scores, a list of (units,)
    for each layer and kind, standardised one by one."""
    parts = [(part - part.mean()) / part.std(correction=0).clamp(min=1e-30) for part in scores]
    z = torch.cat(parts).double()
    # At FAR below all scores every unit stays, which is more than the budget.
    v = root_of(lambda v: (torch.sigmoid(z - v) @ cost).item() - budget, low=-FAR)
    return torch.sigmoid(z - v)


# -- the whole run

@contextlib.contextmanager
def only(model, masks):
    """Inside of a `with` the units whose entry in `masks`, {(layer, kind): (units,)}, is 0 put out
    nothing."""
    whole = {}
    try:
        for (layer, kind), mask in masks.items():
            w = model.get_parameter(reader_of(model.config, layer, kind))
            whole[w] = w.data
            w.data = w.data * mask.to(w).repeat_interleave(w.size(1) // len(mask))
        yield
    finally:
        for w, values in whole.items():
            w.data = values


@torch.no_grad()
def learn(model, batches, scores, cost_of, budget, steps, lr, seed=0, update="released"):
    """The probability that each unit stays: {(layer, kind): (units,)}, 1 where the kind has no costs.

    `batches` are token ids (x, y), taken in turn. `scores` {(layer, kind): (units,)} are what s begins
    with, `cost_of` {(layer, kind): cost of a unit} of the units that may go, which may cost `budget`
    together. Units that cost nothing stay. The rate falls from `lr` to 0 along a cosine."""
    keys = [key for key, cost in cost_of.items() if cost > 0 and len(scores[key]) > 0]
    sizes = [len(scores[key]) for key in keys]
    cost = torch.tensor([float(cost_of[key]) for key in keys]).double().repeat_interleave(torch.tensor(sizes))
    s = starting_point([scores[key].cpu() for key in keys], cost, budget)
    generator = torch.Generator().manual_seed(seed)
    average = None
    for step in progress(range(steps), "policy"):
        x, y = batches[step % len(batches)]
        masks = torch.bernoulli(s.expand(MASKS, -1), generator=generator)
        losses = []
        for mask in masks:
            with only(model, dict(zip(keys, mask.split(sizes)))):
                losses.append(cross_entropy(model, x.to(model.embed.weight.device), y).item())
        losses = torch.tensor(losses, dtype=torch.float64)
        if update == "unbiased":
            step_by = gradient(losses, masks, s)
        else:
            average = losses.mean() if average is None else average + NEWEST * (losses.mean() - average)
            step_by = gradient(losses, masks, s, average, root=True)
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        s = project(s - rate * step_by, cost, budget)
    learned = dict(zip(keys, s.split(sizes)))
    return {key: learned.get(key, torch.ones(len(values), dtype=torch.float64)) for key, values in scores.items()}
