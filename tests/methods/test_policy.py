"""The gradient by all masks, the projection against a solver, and masks that find what a model does not need."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import CONFIGS, WITH_HOLES, close, loss_of, new, text, untouched, without
from helpers import fingerprint as as_it_was
from scipy.optimize import minimize

import prune
import score
from allocate import split_budget
from common import UserError
from methods import policy
from methods.grow import grow

ALL = torch.tensor(list(itertools.product((0., 1.), repeat=5)), dtype=torch.float64)                # (32, 5)
LOSS = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)             # of each mask


def expected_loss(s):
    return (torch.where(ALL == 1, s, 1 - s).prod(1) * LOSS).sum()


def expectation(s, of_pair):
    """The mean of of_pair(losses (2,), masks (2, 5)) over two masks that are drawn by s, by all pairs."""
    chance = torch.where(ALL == 1, s, 1 - s).prod(1)
    total = 0
    for i, j in itertools.product(range(32), repeat=2):
        total = total + chance[i] * chance[j] * of_pair(LOSS[[i, j]], ALL[[i, j]])
    return total


@pytest.mark.parametrize("baseline, times", [(None, 1), ("constant", 2), ("average", 1.8)])
@pytest.mark.parametrize("root", [False, True])
def test_both_updates_are_the_gradient_in_expectation(root, baseline, times):
    """With a leave-one-out baseline it is unbiased. The released update is 1.8 √(s (1 - s)) times the gradient."""
    s = torch.tensor([.1, .3, .5, .8, .95], dtype=torch.float64)
    exact = torch.func.grad(expected_loss)(s)
    given = {None: lambda losses: None, "constant": lambda losses: .7,
             "average": lambda losses: .7 + policy.NEWEST * (losses.mean() - .7)}[baseline]
    mean = expectation(s, lambda losses, masks: policy.gradient(losses, masks, s, given(losses), root))
    close(mean, times * exact * ((s * (1 - s)).sqrt() if root else 1), rtol=1e-5)
    assert exact.abs().min() > 1e-3


def test_the_leave_one_out_baseline_takes_variance_away():
    s, shifted = torch.full((5,), .5, dtype=torch.float64), LOSS + 10
    pairs = itertools.product(range(32), repeat=2)
    found = [[policy.gradient(shifted[[i, j]], ALL[[i, j]], s, baseline) for baseline in (None, 0.)] for i, j in pairs]
    with_it, without_it = (torch.stack(estimates).square().mean() for estimates in zip(*found))
    assert with_it < without_it / 20


@pytest.mark.parametrize("budget", [1., 5., 11.])
def test_the_projection_is_the_nearest_point(budget):
    dice = np.random.default_rng(0)
    s, cost = dice.normal(.5, .6, 6), dice.uniform(.5, 4, 6)
    found = policy.project(torch.tensor(s), torch.tensor(cost), budget)
    solved = minimize(lambda p: ((p - s)**2).sum(), np.full(6, .1), method="SLSQP", bounds=[(0, 1)] * 6, tol=1e-14,
                      constraints=dict(type="ineq", fun=lambda p: budget - cost @ p))
    assert solved.success and abs(found.numpy() - solved.x).max() < 1e-6
    assert found @ torch.tensor(cost) <= budget + 1e-9


def test_a_point_within_the_budget_stays():
    s = torch.tensor([.2, .9, 0., 1.], dtype=torch.float64)
    assert torch.equal(policy.project(s, torch.ones(4).double(), 2.2), s)


@pytest.mark.parametrize("keep", [.01, .4, .99])
def test_the_start_spends_the_budget_in_the_order_of_the_scores(keep):
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(7, generator=generator), 100 * torch.rand(5, generator=generator), torch.ones(3)]
    cost = torch.tensor([1.] * 7 + [9.] * 5 + [2.] * 3, dtype=torch.float64)
    s = policy.starting_point(scores, cost, keep * cost.sum().item())
    assert (s @ cost).item() == pytest.approx(keep * cost.sum().item(), rel=1e-9)
    for part, own in zip(scores, s.split([7, 5, 3])):
        assert torch.equal(part.argsort(stable=True), own.argsort(stable=True)) and 0 < own.min() <= own.max() < 1


@pytest.mark.parametrize("name", WITH_HOLES)
def test_a_masked_unit_is_a_unit_cut_off(name):
    model, _ = new(WITH_HOLES[name])
    x, y = text(model.config, 1)[0]
    before = as_it_was(model)
    masks, gone = {}, {}
    for (layer, kind), units in model.config.widths().items():
        if units:
            masks[layer, kind] = torch.arange(units) != 1
            gone |= {(layer, kind): without(model.config, layer, kind, 1)[layer, kind]}
    with policy.only(model, masks):
        found = loss_of(model, x, y).item()
    assert found == pytest.approx(loss_of(prune.cut(model, prune.everything(model.config) | gone), x, y).item())
    assert abs(found - loss_of(model, x, y).item()) > 1e-4
    untouched(model, before)


@pytest.fixture(scope="module")
def planted():
    """A model that has learned a text with three units of each kind in each layer, and three more that put out nothing;
    the text."""
    config = CONFIGS["plain"].resized({key: 3 for key in CONFIGS["plain"].widths()})
    model, optimizer = new(config)
    batches = text(config, 2)
    for step in range(150):
        optimizer.zero_grad()
        loss_of(model, *batches[step % 2]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return grow(model, config.resized({key: 6 for key in config.widths()})), batches


@pytest.mark.parametrize("update, lr", [("released", .1), ("unbiased", .05)])
def test_units_that_do_nothing_go(planted, update, lr):
    """From a start that knows nothing, under a budget for half of the units."""
    model, batches = planted
    before = as_it_was(model)
    costs, left, _ = split_budget(model.config, model.config.removable_params() // 2, ("ffn", "kv"))
    nothing = {key: torch.ones(6) for key in costs}

    def learned(steps, seed=0):
        return policy.learn(model, batches, nothing, costs, left, steps, lr, seed, update)

    s = learned(300)
    assert sum(s[key].sum() * costs[key] for key in s) <= left + 1e-6
    useful, useless = (torch.cat([values[part] for values in s.values()]).mean() for part in (slice(3), slice(3, 6)))
    assert useless < .25 < .7 < useful
    untouched(model, before)
    first, again, other = learned(3), learned(3), learned(3, seed=1)
    assert all(torch.equal(first[key], again[key]) for key in s)
    assert not torch.equal(first[0, "ffn"], other[0, "ffn"])


@pytest.mark.parametrize("costs", [{"ffn": 1}, {"ffn": 1, "kv": 0}])
def test_a_kind_without_costs_stays(planted, costs):
    model, batches = planted
    keys = model.config.widths()
    cost_of = {key: costs[key[1]] for key in keys if key[1] in costs}
    s = policy.learn(model, batches, {key: torch.rand(6) for key in keys}, cost_of, 6, 5, .1)
    assert all((s[key] == 1).all() == (key[1] == "kv") for key in keys)


# -- as a score of prune.py

def test_the_end_is_better_than_a_wrong_start(planted, monkeypatch):
    """On the calibration text, from the opposite of Wanda-sp's score, which is right here."""
    model, batches = planted
    opposite = dataclasses.replace(score.SCORES["wanda"], function=lambda *given: {
        key: -values for key, values in score.wanda(*given).items()})
    monkeypatch.setitem(score.SCORES, "wanda", opposite)
    recipe = prune.Prune(score="policy", keep=.5, mend="none", policy_steps=300, policy_lr=.1)
    prune.check(recipe)
    budget = model.config.removable_params() // 2
    stats = prune.collect(model, batches, recipe)
    assert prune.needs(recipe) >= score.SCORES["wanda"].needs
    losses = {}
    for name, changes in (("start", dict(policy_steps=1, policy_lr=1e-9)), ("end", {})):
        stage = dataclasses.replace(recipe, **changes)
        worth = prune.measure(model, stats, batches, stage, torch.float64, budget)
        small = prune.cut_once(model, stats, stage, budget, damage=worth)
        assert small.config.removable_params() <= budget
        losses[name] = sum(loss_of(small, x, y).item() for x, y in batches)
    assert losses["end"] < losses["start"]
    whole, _ = prune.cut_in_stages(model, batches, recipe, torch.float64)
    assert sum(loss_of(whole, x, y).item() for x, y in batches) == pytest.approx(losses["end"])


@pytest.mark.parametrize("changes, words", [
    (dict(allocate="measured"), "--score policy learns what each unit is worth at one budget"),
    (dict(policy_lr=0.), "--policy-lr 0.0 must be positive"),
    (dict(policy_steps=0), "--policy-steps 0 must be at least"),
    (dict(policy_update="other"), "--policy-update 'other' is not one of released, unbiased"),
    (dict(measured_windows=8), "--measured-windows has no effect with --structure ffn,kv --score policy"),
    (dict(score="taylor", policy_steps=9), "--policy-steps has no effect"),
    (dict(structure="layer"), "--score 'policy' with --structure layer must be one of")])
def test_refusals(changes, words):
    with pytest.raises(UserError, match=words):
        prune.check(prune.Prune(**{"init": "x", "score": "policy", **changes}))
