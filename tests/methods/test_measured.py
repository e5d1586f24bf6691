"""Measured damage: it is the whole model's, exhaustive search finds no better knapsack, and the chosen widths are never
worse than uniform ones in the sum that they minimise.
"""
import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EQUAL,
    SHAPE,
    STRUCTURES,
    WITH_HOLES,
    channels_of_unit,
    fingerprint,
    new,
    price,
    random_config,
    random_scores,
    text,
    untouched,
)

import allocate
from common import UserError
from methods import measured
from model import GPTConfig, coupled


def random_options(rng):
    """Costs whole numbers, mostly without a common divisor, some 0; few damages, so that ties are many."""
    return {key: [(rng.choice([0, 1, 2, 3, 5, 7, 11, rng.randint(0, 40)]), rng.choice([0., 1., 2., rng.random()]))
                  for _ in range(rng.randint(1, 4))] for key in range(rng.randint(1, 5))}


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_exhaustive_search(seed):
    rng = random.Random(seed)
    options = random_options(rng)
    keys = list(options)
    every = [(sum(options[k][i][0] for k, i in zip(keys, pick)), sum(options[k][i][1] for k, i in zip(keys, pick)))
             for pick in itertools.product(*(range(len(options[k])) for k in keys))]
    cheapest, dearest = min(cost for cost, _ in every), max(cost for cost, _ in every)
    for most in {cheapest, cheapest + 1, (cheapest + dearest) // 2, dearest, dearest + 5}:
        choice = measured.knapsack(options, most)
        assert choice == measured.knapsack(options, most) and list(choice) == keys
        assert sum(options[k][i][0] for k, i in choice.items()) <= most
        found = sum(options[k][i][1] for k, i in choice.items())
        assert found == pytest.approx(min(damage for cost, damage in every if cost <= most), abs=1e-12)
    with pytest.raises(UserError, match=f"cheapest widths cost {cheapest}, the budget is {cheapest - 1}; keep more"):
        measured.knapsack(options, cheapest - 1)


def test_the_knapsack_breaks_ties_and_rounds_large_costs():
    assert measured.knapsack({"a": [(3, 1.), (2, 1.), (2, 1.)], "b": [(1, 0.), (0, 0.)]}, 10) == {"a": 0, "b": 0}
    most, rng = 10**8 + 7, random.Random(0)                                    # 96 times 2^20 units of 1
    options = {key: [(rng.randint(0, most // 2), rng.random()) for _ in range(4)] + [(0, 1.)] for key in range(4)}
    choice = measured.knapsack(options, most)
    assert sum(options[k][i][0] for k, i in choice.items()) <= most
    best = min(sum(options[k][i][1] for k, i in enumerate(pick)) for pick in itertools.product(range(5), repeat=4)
               if sum(options[k][i][0] for k, i in enumerate(pick)) <= most)
    assert sum(options[k][i][1] for k, i in choice.items()) == pytest.approx(best)
    with pytest.raises(UserError, match="too near for this rounding"):
        measured.knapsack({"a": [(most, 0.)], "b": [(1, 0.)]}, most + 1)


def surrogate(damage, widths):
    """The sum that `widths_for` minimises, by numpy's interpolation over points that never rise with the width."""
    total = 0.
    for key, points in damage.items():
        units, nats = zip(*sorted(points))
        total += np.interp(widths[key], units, np.maximum.accumulate(nats[::-1])[::-1])
    return total


@pytest.mark.parametrize("structure, budget", [(structure, budget) for structure in STRUCTURES
                                               for budget in allocate.RESOURCES
                                               if (structure, budget) != (("ffn",), "kv_bytes")])
def test_measured_is_never_worse_than_uniform(structure, budget):
    compared = 0
    for seed in range(12):
        rng, m = random.Random(seed), [1, 4][seed % 2]
        config = random_config(rng, equal=seed % 3 == 0)
        start, total = config.widths(), price(config, budget)
        damage = {key: [(n, 0.), *((units, rng.random() * (1 - units / n)**2) for units in
                                  sorted({0, n // 4, n // 2, 3 * n // 4} - {n}))] for key, n in start.items() if n}
        fixed = price(config.resized({key: 0 for key in start if key[1] in structure}), budget)
        most = math.floor(fixed + rng.uniform(.2, 1) * (total - fixed))
        call = lambda: measured.widths_for(config, most, damage, structure, multiple_of=m, resource=budget)
        before, widths = copy.deepcopy(damage), call()
        left = most - price(config.resized(widths), budget)
        assert left >= 0 and widths == call() and damage == before
        for key, n in start.items():
            step = m if key[1] == "ffn" else 1
            assert widths[key] == n or key[1] in structure and widths[key] % step == 0
            more = {key: min(n, widths[key] + step)}
            assert widths[key] == n or price(config.resized(widths | more), budget) > most
        try:
            even = allocate.widths_for(config, most, "uniform", random_scores(config, 0), structure, multiple_of=m,
                                 resource=budget)
        except UserError:
            continue
        assert surrogate(damage, widths) <= surrogate(damage, even) + 1e-12
        compared += surrogate(damage, widths) < surrogate(damage, even) - 1e-6
    assert compared >= 3 or budget == "kv_bytes"


def test_measured_cuts_where_it_costs_least():
    damage = {(layer, "ffn"): [(40, 0.), (0, 1. if layer == 2 else 8.)] for layer in range(8)}
    most = EQUAL.removable_params() - 40 * EQUAL.unit_params(0, "ffn")
    widths = measured.widths_for(EQUAL, most, damage, ("ffn",))
    assert [widths[layer, "ffn"] for layer in range(8)] == [40, 40, 0, 40, 40, 40, 40, 40]
    with pytest.raises(UserError, match="budget of 100 params is .* less than what stays anyway, as only ffn may go"):
        measured.widths_for(EQUAL, 100, damage, ("ffn",))


def test_wide_layers_are_filled_up_between_grid_points():
    config = GPTConfig(**SHAPE, n_head=(0, 0), n_kv_head=(0, 0), d_ff=(1000, 1000))
    damage = {(layer, "ffn"): [(1000, 0.), (500, .1 + layer), (0, 3.)] for layer in (0, 1)}
    for keep in (.31, .5, .777):
        widths = measured.widths_for(config, math.floor(keep * config.removable_params()), damage)
        assert sum(widths.values()) == math.floor(keep * 2000)


# -- damage

def kl(dense, other):
    return F.kl_div(other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum").item() \
        / dense[..., 0].numel()


@pytest.mark.parametrize("name", ["all", "holes"])
@pytest.mark.parametrize("factor", [1, 2])
def test_damage_is_the_divergence_of_the_whole_model(name, factor):
    model, _ = new(WITH_HOLES[name])
    batches, was, config = text(model.config, 2), fingerprint(model), model.config
    scores = {key: torch.rand(n, generator=torch.Generator().manual_seed(key[0])) for key, n in config.widths().items()}
    at = {key: range(n) for key, n in config.widths().items() if key != (0, "ffn")}
    found = measured.damage(model, batches, scores, at, lambda name, w, kept: factor * w[:, kept])
    untouched(model, was)
    assert found.keys() == {key for key, n in config.widths().items() if n and key != (0, "ffn")}
    for (layer, kind), points in found.items():
        n = config.widths()[layer, kind]
        assert points[0] == (n, 0.) and [units for units, _ in points[1:]] == [*range(n)]
        for units, nats in points[1:]:
            best = sorted(range(n), key=lambda i: -scores[layer, kind][i].item())[:units]
            less, columns = copy.deepcopy(model), [c for i in best for c in channels_of_unit(config, layer, kind, i)]
            w = less.get_parameter(coupled(config, layer, kind)[-1][0]).data
            gone = [c for c in range(w.size(1)) if c not in columns]
            w[:, gone], w[:, columns] = 0, factor * w[:, columns]
            exact = sum(kl(model(x)[:, ::4], less(x)[:, ::4]) for x, _ in batches) / 2        # of every 4th token
            assert nats == pytest.approx(exact, abs=1e-12) and nats > 0


def test_damage_under_autocast_is_of_the_current_weights():
    """autocast keeps bfloat16 copies of the weights, and would go on with those from before a cut."""
    model, _ = new(WITH_HOLES["gqa"], torch.float32)
    scores = {key: torch.arange(n) for key, n in model.config.widths().items()}
    at, columns = {key: [0, n // 2] for key, n in model.config.widths().items()}, lambda name, w, kept: w[:, kept]
    exact = measured.damage(model, text(model.config, 2), scores, at, columns)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.int64))
        rounded = measured.damage(model, text(model.config, 2), scores, at, columns)
    for key, points in exact.items():
        assert [nats for _, nats in rounded[key]] == pytest.approx([nats for _, nats in points], rel=.2, abs=1e-3)
