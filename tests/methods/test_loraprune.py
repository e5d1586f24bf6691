"""LoRAPrune: the estimate against true gradients and its expectation, the importance entry by entry, dead units stay
dead, the cuts end where they should."""
import math

import pytest
import torch
import torch.nn as nn
from helpers import WITH_HOLES, batch, entries, loss_of, new
from test_lora import SMALL, adapted

import prune
from common import UserError
from methods import adapters, lora, loraprune
from model import GPTConfig

CONFIG = GPTConfig(vocab_size=13, block_size=8, d_model=12, head_dim=4, n_head=(6,) * 4, n_kv_head=(3,) * 4,
                   d_ff=(10,) * 4, qkv_bias=True)


def with_gradients(config, **flags):
    model = adapted(config, **flags)
    loss_of(model, *batch(config, 0)).backward()
    return model


def adapters_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, adapters.Adapted)}


def test_the_estimate_is_a_step_of_gradient_descent_on_the_product():
    model = with_gradients(WITH_HOLES["gqa"])
    for module in adapters_of(model).values():
        A, B = module.A, module.B
        stepped = (B - B.grad) @ (A - A.grad)
        torch.testing.assert_close(loraprune.estimate(module), B @ A - stepped, rtol=1e-9, atol=1e-12)


def test_with_the_identity_for_a_the_estimate_is_the_true_gradient():
    """At B = 0 exactly; elsewhere G + B Bᵀ G - G Bᵀ G."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    module = adapters.Adapted(linear, 6, 6, torch.Generator())
    module.A.data = torch.eye(6, dtype=torch.float64)
    for B in (torch.zeros(5, 6).double(), torch.randn(5, 6).double()):
        module.B.data = B.clone()
        for p in (module.A, module.B):
            p.grad = None
        (module(x) - y).square().mean().backward()
        w = module.merged().detach().requires_grad_()
        [G] = torch.autograd.grad((x @ w.T - y).square().mean(), w)
        torch.testing.assert_close(loraprune.estimate(module), G + B @ B.T @ G - G @ B.T @ G, rtol=0, atol=1e-13)


def test_at_zero_it_is_a_projection_of_the_gradient_whose_mean_is_right():
    """E over A is r/(3n) · G, and one draw has a cosine of about √(r/n) with it."""
    r, n = 4, 64
    G = torch.randn(16, n, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(n, 16, bias=False)
    total, cosines = 0, []
    for _ in range(4000):
        module = adapters.Adapted(linear, r, r, generator)
        module.A.grad, module.B.grad = torch.zeros_like(module.A), G @ module.A.detach().T
        estimate = loraprune.estimate(module)
        total = total + estimate / 4000
        cosines.append(torch.cosine_similarity(estimate.flatten(), G.flatten(), 0))
    assert torch.cosine_similarity(total.flatten(), G.flatten(), 0) > .99
    assert abs((total * G).sum() / G.square().sum() / (r / (3 * n)) - 1) < .02
    assert abs(torch.stack(cosines).mean() / math.sqrt(r / n) - 1) < .1


@pytest.mark.parametrize("name", ["gqa+bias", "all", "holes"])
def test_importance_entry_by_entry(name):
    config = WITH_HOLES[name]
    model = with_gradients(config)
    scores = loraprune.importance(model)
    assert scores.keys() == config.widths().keys()
    for (layer, kind), units in config.widths().items():
        sums = {}
        for unit in range(units):
            for parameter, index in entries(config, layer, kind, unit):
                if parameter.endswith("bias"):
                    continue
                module = model.get_submodule(parameter.removesuffix(".weight"))
                A, B, dA, dB = module.A, module.B, module.A.grad, module.B.grad
                worth = ((dB @ A + B @ dA - dB @ dA) * (module.weight + 2 * B @ A)).abs()
                sums.setdefault(parameter, []).append(worth[index].sum())
        expected = torch.zeros(units, dtype=torch.float64)
        for values in sums.values():
            expected += torch.stack(values).detach() / torch.stack(values).detach().norm()
        torch.testing.assert_close(scores[layer, kind].double(), expected, rtol=1e-9, atol=1e-12)


def test_dead_units_stay_dead_and_slicing_is_exact():
    model = adapted(CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=.1)

    def step(number):
        loss_of(model, *batch(CONFIG, number)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    alive = prune.everything(CONFIG) | {(1, "ffn"): torch.tensor([0, 3, 8]), (2, "kv"): torch.tensor([1]),
                                        (3, "kv"): torch.tensor([]).long()}
    loraprune.zero_(model, optimizer, alive)
    for number in range(3, 8):
        step(number)
    plain = adapters.merge(model)
    for (layer, kind), units in CONFIG.widths().items():
        for unit in set(range(units)) - set(alive[layer, kind].tolist()):
            assert not any(plain.get_parameter(name)[index].any() for name, index in entries(CONFIG, layer, kind, unit))
    small, _ = prune.slice(plain, None, alive)
    x, _ = batch(CONFIG, 9)
    assert (small(x) - model(x)).abs().max() < 1e-12


@pytest.mark.parametrize("steps, keep", [(30, .5), (100, .8), (1000, .3)])
def test_cuts_lie_between_the_tenths_ten_steps_apart_and_end_at_what_was_asked(steps, keep):
    cuts = loraprune.cuts_of(steps, keep)
    at = list(cuts)
    assert at[0] == steps / 10 and at[-1] == .9 * steps - 1
    assert all(10 <= b - a < 20 for a, b in zip(at, at[1:]))
    sizes = list(cuts.values())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == keep
    assert loraprune.cuts_of(steps, 1) == {}
    with pytest.raises(UserError, match="give more --steps"):
        loraprune.cuts_of(2, keep)


def test_a_model_is_cut_to_its_budget_while_it_trains():
    config = CONFIG
    settings = lora.Lora(**SMALL | dict(steps=60, keep=.7, rank=2))
    tokens = torch.randint(13, (999,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    state = lora.begin(new(config)[0], settings)
    lora.train(state, tokens, settings)
    small, _ = prune.slice(adapters.merge(state.model), None, state.alive)
    budget = .7 * config.removable_params()
    cheapest = min(config.unit_params(*key) for key in config.widths())
    assert budget - cheapest < small.config.removable_params() <= budget
    # `middle` keeps the first and the last of four layers.
    widths, before = small.config.widths(), config.widths()
    assert all((widths[key] == before[key]) == (key[0] in (0, 3)) for key in widths)
    x, _ = batch(config, 3)
    assert (small(x) - state.model(x)).abs().max() < 1e-12


def test_a_unit_without_any_use_goes_first():
    """One neuron and one KV group whose output nobody reads, neither W nor the adapters."""
    model = adapted(CONFIG)
    with torch.no_grad():
        for name, columns in (("blocks.1.ffn.down", [4]), ("blocks.2.attn.o", list(range(8, 16)))):
            module = model.get_submodule(name)
            module.weight[:, columns] = 0
            module.A[:, columns] = 0
    loss_of(model, *batch(CONFIG, 0)).backward()
    averages = loraprune.average(None, model)
    averages = loraprune.average(averages, model)
    everything = prune.everything(CONFIG)
    keep = 1 - 1.01 * CONFIG.unit_params(1, "kv") * 4 / CONFIG.removable_params()
    alive = loraprune.living(CONFIG, keep, "uniform", averages, everything)
    assert 4 not in alive[1, "ffn"] and 1 not in alive[2, "kv"]
    # What is dead stays dead at a smaller budget.
    fewer = loraprune.living(CONFIG, keep - .1, "uniform", averages, alive)
    assert all(set(fewer[key].tolist()) <= set(alive[key].tolist()) for key in alive)
