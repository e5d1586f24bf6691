"""Local distillation: a block that lost nothing stays as it is, the others come nearer, and one step is Adam's."""
import copy

import pytest
import torch
from helpers import WITH_HOLES, batch, new

import prune
from methods import local, mend

WINDOWS = torch.cat([batch(WITH_HOLES["all"], step)[0] for step in range(4)])          # (16, 8)


def cut(config, share=.5, dtype=torch.float64):
    """A model and one of half its units, chosen by chance."""
    model, _ = new(config, dtype)
    g = torch.Generator().manual_seed(3)
    alive = {key: torch.randperm(n, generator=g)[:round(share * n)].sort().values for key, n in config.widths().items()}
    return model, prune.cut(model, alive)


def error(model, small, windows=WINDOWS):
    """Mean squared difference of the residual streams behind the last block."""
    streams = []
    for gpt in (model, small):
        hook = gpt.blocks[-1].register_forward_hook(lambda _, args, out: streams.append(out))
        gpt(windows)
        hook.remove()
    return (streams[0] - streams[1]).square().mean().item()


@pytest.mark.parametrize("name", ["gqa+bias", "all", "holes"])
def test_what_lost_nothing_stays_and_what_lost_comes_nearer(name):
    model, small = cut(WITH_HOLES[name])
    whole = copy.deepcopy(model)
    local.distil_(whole, model, WINDOWS, steps=3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters()))
    before = error(model, small)
    local.distil_(small, model, WINDOWS, steps=30, lr=3e-3)
    assert error(model, small) < .8 * before
    assert all(p.grad is None for p in (*small.parameters(), *model.parameters()))


def test_a_step_is_adams_on_the_blocks_own_error():
    """By autograd through the block on streams that whole forward passes give; embedding, head and norm stay."""
    model, small = cut(WITH_HOLES["all"])
    expected = copy.deepcopy(small)
    for layer, block in enumerate(expected.blocks):
        streams = {}
        for name, gpt in (("dense", model), ("cut", expected)):
            hook = gpt.blocks[layer].register_forward_hook(
                lambda _, args, out, name=name: streams.update({name: (args[0].detach(), args[1], args[2], out)}))
            gpt(WINDOWS)
            hook.remove()
        before, cos, sin, target = streams["dense"]
        square = lambda a, b: ((a - b).square().sum(-1) / target.detach().square().sum(-1)).sum()
        loss = square(streams["cut"][3], target.detach()) / square(target.detach(), before)
        names, parameters = zip(*block.named_parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.data -= 1e-2 * g / (g.abs() + 1e-8)                    # Adam's first step
    local.distil_(small, model, WINDOWS, steps=1, lr=1e-2, micro_batch=len(WINDOWS))
    for (name, p), q in zip(small.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)


def test_the_seed_is_all_the_chance_and_bfloat16_comes_near_as_well():
    results = []
    for seed, dtype in ((0, None), (0, None), (1, None), (0, torch.bfloat16)):
        model, small = cut(WITH_HOLES["gqa"], dtype=torch.float32)
        local.distil_(small, model, WINDOWS, steps=10, lr=3e-3, seed=seed, dtype=dtype)
        results.append((torch.cat([p.detach().flatten() for p in small.parameters()]), error(model, small)))
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], results[2][0])
    assert results[3][1] < 1.1 * results[0][1]


def test_a_layer_that_went_leaves_the_work_to_the_next():
    model, _ = new(WITH_HOLES["all"])
    alive = prune.everything(model.config) | {(1, kind): torch.tensor([]).long() for kind in ("kv", "ffn")}
    small = prune.cut(model, alive)
    before = error(model, small)
    mend.mend_sequentially_(small, model, WINDOWS)
    mended = error(model, small)
    local.distil_(small, model, WINDOWS, steps=20, lr=3e-3)
    assert error(model, small) < mended < before
