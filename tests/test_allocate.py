"""Invariants of allocate.py: budgets are met under every allocation, structure and currency; each order is what its
name says. Whole layers: tests/methods/test_depth.py.

The oracle of costs is `price`: the whole configuration's own accounting, not a unit's.
"""
import copy
import math
import random

import pytest
import torch
from helpers import CONFIGS, EQUAL, SHAPE, STRUCTURES, price, random_config, random_scores

import allocate
import prune
from common import UserError
from model import GPTConfig


@pytest.mark.parametrize("how, structure, resource", [
    (how, structure, resource) for how in allocate.ALLOCATIONS for structure in STRUCTURES
    for resource in allocate.RESOURCES if (structure, resource) != (("ffn",), "kv_bytes")])
def test_budgets_are_met_to_the_last_block(how, structure, resource):
    met = 0
    for seed in range(40):
        rng = random.Random(seed)
        config, multiple = random_config(rng, how == "uniform-strict"), rng.choice([1, 2, 4])
        start, total = config.widths(), price(config, resource)
        fixed = price(config.resized({key: 0 for key in start if key[1] in structure}), resource)
        budget = math.floor(fixed + rng.uniform(.3, 1) * (total - fixed))
        scores = random_scores(config, seed, seed % 2)
        call = lambda scores: allocate.widths_for(
            config, budget, how, scores, structure, multiple_of=multiple, resource=resource,
            importance=[rng.uniform(-1, 1)] * config.n_layer, amplitude=.1)
        try:
            before, widths = copy.deepcopy(scores), call(scores)
        except UserError as refusal:                                           # few large units can't have the share
            assert "less than one of" in str(refusal) or "that middle keeps whole" in str(refusal)
            continue
        met += total > budget
        assert price(config.resized(widths), resource) <= budget
        assert widths == call(dict(reversed(scores.items()))) == call(before)
        assert all(widths[key] == n for key, n in start.items() if key[1] not in structure)
        for (layer, kind), n in start.items():
            step = multiple if kind == "ffn" else 1
            assert widths[layer, kind] == n or widths[layer, kind] % step == 0
            if widths[layer, kind] < n:
                back = {(l, k): w for (l, k), w in start.items() if w and k == kind
                        and (l == layer or how == "uniform-strict")}
                more = {key: widths[key] + min(step, w - widths[key]) for key, w in back.items()}
                assert price(config.resized(widths | more), resource) > budget     # the next block is too much
    assert met >= 5                                                            # the others were refused


@pytest.mark.parametrize("budget", allocate.RESOURCES)
def test_units_cost_what_the_model_says_they_do(budget):
    for seed in range(20):
        config, rng = random_config(random.Random(seed)), random.Random(seed)
        assert allocate.total(config, budget) == price(config, budget)
        small = config.resized({key: rng.randint(0, n) for key, n in config.widths().items()})
        saved = sum((n - small.widths()[key]) * allocate.unit_cost(config, *key, budget)
                    for key, n in config.widths().items())
        assert saved == price(config, budget) - price(small, budget)
        assert all(allocate.unit_cost(config, *key, budget) == 0 for key, n in config.widths().items() if not n)


@pytest.mark.parametrize("seed", range(20))
def test_global_keeps_the_best_of_all_layers_and_kinds(seed):
    rng = random.Random(seed)
    config = CONFIGS[rng.choice(list(CONFIGS))]
    scores = random_scores(config, seed, ties=True)
    widths = allocate.widths_for(config, math.floor(rng.random() * config.removable_params()), "global", scores)
    alive = prune.choose({key: scores[key] for key in widths}, widths)
    for key in (key for key, n in config.widths().items() if widths[key] < n):
        best = max(s for i, s in enumerate(scores[key].tolist()) if i not in alive[key].tolist())
        for other, kept in alive.items():     # nothing kept that is as large as a unit that went scores below it
            if config.unit_params(*other) >= config.unit_params(*key) and len(kept):
                assert scores[other][kept].min() >= best


# -- what each order promises



def shared(how, keep, config=EQUAL, structure=("ffn", "kv"), scores=None, **more):
    most = math.floor(keep * config.removable_params())
    return allocate.widths_for(config, most, how, scores or random_scores(config, 0), structure, **more)


@pytest.mark.parametrize("structure", STRUCTURES, ids=",".join)
@pytest.mark.parametrize("m", [1, 4, 7])
def test_uniform_layers_differ_by_at_most_one_block(structure, m):
    seen = set()
    for keep in (.3, .45, .55, .66, .8, .93) if len(structure) == 2 else (.7, .8, .9):
        for how, most in (("uniform", 1), ("uniform-strict", 0)):
            widths = shared(how, keep, structure=structure, multiple_of=m)
            for kind, block in (("ffn", m), ("kv", 1)):
                units = [widths[layer, kind] for layer in range(8)]
                assert max(units) - min(units) <= most * block
                seen.add((how, kind, len({*units})))
    assert ("uniform", structure[0], 2) in seen                                # the budget does need the block


def test_uniform_keeps_the_share_in_uneven_layers():
    config = GPTConfig(**SHAPE, n_head=(4, 6, 0, 2), n_kv_head=(4, 6, 0, 2), d_ff=(40, 17, 80, 0))
    for keep in (.4, .6, .8):
        for key, n in shared("uniform", keep, config).items():
            assert abs(n - keep * config.widths()[key]) <= 1 + .03 * n         # FFNs take what is less than a KV group


def test_middle_keeps_the_outer_layers_whole():
    assert [l for l in range(32) if allocate.protected(l, 32)] == [0, 1, 2, 3, 30, 31]
    for structure in STRUCTURES:
        widths, start = shared("middle", .75, structure=structure), EQUAL.widths()
        assert all(widths[key] == n for key, n in start.items() if key[0] in (0, 7) or key[1] not in structure)
        for kind in structure:
            units = [widths[layer, kind] for layer in range(1, 7)]
            assert max(units) - min(units) <= 1 and max(units) < start[1, kind]


def test_middle_counts_only_what_may_go():
    """The attention of protected layers stays anyway: it does not count against what the FFNs may keep."""
    fixed = price(EQUAL.resized({(l, "ffn"): 0 for l in range(8)}), "params")
    whole = 40 * EQUAL.unit_params(0, "ffn")
    widths = allocate.widths_for(EQUAL, fixed + 3 * whole, "middle", random_scores(EQUAL, 0), ("ffn",))
    assert sum(widths[layer, "ffn"] for layer in range(8)) == 120 and widths[0, "ffn"] == widths[7, "ffn"] == 40
    with pytest.raises(UserError, match=f"middle keeps whole cost {2 * whole:,} params, {2 * whole - 1:,} may stay"):
        allocate.widths_for(EQUAL, fixed + 2 * whole - 1, "middle", random_scores(EQUAL, 0), ("ffn",))


IMPORTANCE = [1, .5, .25, 0, 0, -.25, -.5, -1]                                 # mean 0, as score.importance gives them


@pytest.mark.parametrize("keep, amplitude", [(.5, .3), (.7, .3), (.7, 1.), (.9, .3), (.9, 1.)])
def test_adaptive_shares_are_the_papers_line(keep, amplitude):
    widths = shared("adaptive", keep, importance=IMPORTANCE, amplitude=amplitude)
    kept, gone = {key: n / EQUAL.widths()[key] for key, n in widths.items()}, 1 - keep
    for layer, important in enumerate(IMPORTANCE):
        line = min(1, 1 - gone + amplitude * gone * important)
        assert abs(kept[layer, "ffn"] - line) <= 1.5 / 40 and abs(kept[layer, "kv"] - line) <= 1.01 / 4
    neurons = [kept[layer, "ffn"] for layer in range(8)]
    assert all(a >= b - 1.01 / 40 for a, b in zip(neurons, neurons[1:])) and neurons[0] > neurons[3] > neurons[7]


def test_adaptive_of_amplitude_0_is_uniform():
    for keep in (.3, .5, .77):
        assert shared("adaptive", keep, importance=IMPORTANCE, amplitude=0.) == shared("uniform", keep)


@pytest.mark.parametrize("how", ["uniform", "middle", "adaptive"])
@pytest.mark.parametrize("cuts", [2, 5, 16])
def test_several_cuts_end_where_one_does(how, cuts):
    """Shares are of the widths before the first cut: what was rounded off does not add up, 4 KV groups or not."""
    config = EQUAL
    for i in range(1, cuts + 1):
        most = math.floor(EQUAL.removable_params() * (1 - .4 * i / cuts))
        widths = allocate.widths_for(config, most, how, random_scores(config, i), importance=IMPORTANCE, amplitude=.4,
                               original=EQUAL.widths())
        config = config.resized(widths)
    one = shared(how, .6, importance=IMPORTANCE, amplitude=.4)
    for kind in ("ffn", "kv"):
        assert all(abs(widths[layer, kind] - one[layer, kind]) <= 1 for layer in range(8))
        assert len({*(one[layer, kind] for layer in range(8))}) >= (3 if how == "adaptive" else 2)


def test_adaptive_leaves_at_least_one_percent():
    config = GPTConfig(**SHAPE, n_head=(0,) * 4, n_kv_head=(0,) * 4, d_ff=(200,) * 4)
    widths = shared("adaptive", .3, config, importance=[1, 1, -1, -1], amplitude=3.)
    assert 1 <= widths[2, "ffn"] <= 2 and 1 <= widths[3, "ffn"] <= 2 and widths[0, "ffn"] > 100


@pytest.mark.parametrize("seed", range(10))
def test_standardised_ignores_a_layers_scale_and_offset(seed):
    config = EQUAL if seed % 2 else CONFIGS["all"]
    scores = random_scores(config, seed)
    other = scores | {(1, "ffn"): scores[1, "ffn"] * 7 + 3, (0, "kv"): scores[0, "kv"] / 9 - 5}
    pairs = {how: [shared(how, .5, config, scores=s) for s in (scores, other)] for how in ("standardised", "global")}
    assert pairs["standardised"][0] == pairs["standardised"][1] and pairs["global"][0] != pairs["global"][1]


def test_global_may_drop_sub_blocks_and_go_on():
    scores = random_scores(EQUAL, 0)
    scores |= {(3, "kv"): torch.zeros(4), (5, "ffn"): torch.zeros(40)}
    widths = shared("global", .8, scores=scores)
    assert widths[3, "kv"] == widths[5, "ffn"] == 0
    less = EQUAL.resized(widths)
    for budget in allocate.RESOURCES:
        most = price(EQUAL, budget) // 2
        again = allocate.widths_for(less, most, "global", random_scores(less, 1), resource=budget,
                                    original=EQUAL.widths())
        assert again[3, "kv"] == again[5, "ffn"] == 0 < most - price(less.resized(again), budget) + 1


def test_what_cannot_be_is_refused_with_the_numbers():
    config, scores = CONFIGS["plain"], random_scores(CONFIGS["plain"], 0)
    removable = config.removable_params()                                      # FFNs: 5 and 7 neurons of 36: 432
    for most, how, structure, more, sentence in (
            (400, "uniform", ("kv",), {}, "budget of 400 params is 32 less than what stays anyway, as only kv may go"),
            (300, "uniform", ("ffn", "kv"), {}, "less than one of its 2 KV groups under a budget of 300 params; keep"),
            (removable - 99, "uniform", ("ffn",), dict(multiple_of=9), "less than one of its 5 neurons.*--multiple"),
            (removable - 9, "uniform-strict", ("ffn",), {}, "keeps layers equal, and these differ"),
            (20, "global", ("ffn",), dict(resource="kv_bytes"), "budget of 20 kv_bytes is 60 less than .* only ffn")):
        with pytest.raises(UserError, match=sentence) as refusal:
            allocate.widths_for(config, most, how, scores, structure, **more)
        assert "\n" not in str(refusal.value)


def test_strict_needs_equal_widths_only_of_what_goes():
    config = EQUAL.resized({(0, "kv"): 2})
    widths = shared("uniform-strict", .8, config, ("ffn",))
    assert len({widths[layer, "ffn"] for layer in range(8)}) == 1 and widths[0, "kv"] == 2 and widths[1, "kv"] == 4


# -- on the way to a target, while a model trains

def random_start_and_target(rng):
    """A config with uneven layers, some of them without attention or FFN, and a smaller one: kv, ffn or both shrink."""
    layers, shrinking = range(rng.randint(1, 5)), rng.choice([("ffn",), ("kv",), ("ffn", "kv")])
    kv = [rng.randint(0, 6) for _ in layers]
    start = GPTConfig(**SHAPE, n_head=[k * rng.randint(1, 3) for k in kv], n_kv_head=kv, qkv_bias=rng.random() < .5,
                      d_ff=[rng.randint(l == 0, 40) for l in layers])
    return start, start.resized({key: rng.randint(0, n) for key, n in start.widths().items() if key[1] in shrinking})


@pytest.mark.parametrize("seed", range(100))
def test_widths_on_the_way_meet_every_budget(seed):
    rng = random.Random(seed)
    start, target = random_start_and_target(rng)
    whole, least, first, last = start.removable_params(), target.removable_params(), start.widths(), target.widths()
    assert allocate.widths_on_the_way(start, target, 1.0, first) == first
    at_most = first
    for size in [*sorted((rng.uniform(least / whole, 1) for _ in range(6)), reverse=True), least / whole]:
        widths = allocate.widths_on_the_way(start, target, size, at_most)
        assert widths == allocate.widths_on_the_way(start, target, size, dict(reversed(at_most.items())))
        assert widths.keys() == first.keys() and all(widths[key] <= at_most[key] for key in first)
        budget = math.floor(size * whole + 1e-6)                               # least / whole · whole may round down
        missing = budget - start.resized(widths).removable_params()
        assert 0 <= missing < min((start.unit_params(*k) for k in first if widths[k] < at_most[k]), default=math.inf)
        share = (budget - least) / max(1, whole - least)                       # nobody goes ahead of the straight way
        assert all(widths[k] >= math.floor(last[k] + share * (first[k] - last[k])) for k in first)
        at_most = widths
    assert widths == last


def test_equal_layers_shrink_together():
    start = GPTConfig(**SHAPE, n_head=(4,) * 4, n_kv_head=(2,) * 4, d_ff=(40,) * 4)
    target = start.resized({(l, "ffn"): 16 for l in range(4)})
    for budget in range(target.removable_params(), start.removable_params(), 11):
        size = budget / start.removable_params()
        d_ff = start.resized(allocate.widths_on_the_way(start, target, size, start.widths())).d_ff
        assert max(d_ff) - min(d_ff) <= 1 and list(d_ff) == sorted(d_ff, reverse=True)     # ties: the first layers
