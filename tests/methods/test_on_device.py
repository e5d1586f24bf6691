"""Every step of prune.py and of the comparison on a device that is not there: a tensor on another device is noticed
(see tests/test_device.py)."""
import contextlib

import pytest
import torch
from helpers import EQUAL, FIELDS, WITH_HOLES, text
from torch._subclasses import FakeTensorMode

import prune
import score
from methods import depth, mend
from model import GPT

CONFIG = WITH_HOLES["all"]
ADAM = torch.optim.Adam


@pytest.fixture
def device(monkeypatch):
    """The name of the device. What needs values gets others."""
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: -1.0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [0.0] * tensor.numel())
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    # How many units or channels go is not known: say one.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor: tensor.new_zeros((1, 1), dtype=torch.long))
    # There is no autocast on "meta".
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    # Adam has no kernel of its own for it.
    monkeypatch.setattr(torch.optim, "Adam", lambda params, *args, fused, **options: ADAM(params, *args, **options))
    with FakeTensorMode():
        yield "meta"


def model_on(device, config=CONFIG):
    with torch.device(device):
        return GPT(config)


def lies_on(model, device):
    return {p.device.type for p in model.parameters()} == {device}


def narrower(scores):
    return prune.choose(scores, {key: max(1, n - 1) for key, n in CONFIG.widths().items()})


def test_scores_and_measured_damage(device):
    model = model_on(device)
    batches = text(CONFIG)
    for needs in ({"gram", "cosine"}, FIELDS):
        stats = score.collect(model, batches, needs)
        assert all(value.device.type == device for value in (*stats.grad.values(), *stats.gram.values()))
    for row in score.SCORES.values():
        scores = row.function(model, stats)
        assert lies_on(prune.cut(model, narrower(scores)), device)
    prune.measure(model, stats, batches, prune.Prune(allocate="measured", mend="least-squares", micro_batch=4))
    depth.without(model, batches)
    assert lies_on(model, device)


@pytest.mark.parametrize("by", ["none", "least-squares", "bias", "sequential", "local"])
def test_cuts_and_mending(device, by):
    model = model_on(device)
    batches = text(CONFIG)
    recipe = prune.Prune(mend=by, score="wanda", micro_batch=2, local_steps=2)
    stats = prune.collect(model, batches, recipe)
    small = prune.cut(model, narrower(score.wanda(model, stats)), by, stats)
    if by in prune.SIDE_BY_SIDE:
        prune.mend_side_by_side_(recipe, small, model, batches, torch.float32, is_last=True)
    assert lies_on(small, device) and small.hidden(batches[0][0].to(device)).device.type == device


@pytest.mark.parametrize("structure, name", [("channel", "activation"), ("channel", "taylor"), ("2:4", "wanda")])
def test_channels_and_2_in_4(device, structure, name):
    model = model_on(device, EQUAL)
    recipe = prune.Prune(structure=structure, score=name)
    stats = prune.collect(model, text(EQUAL), recipe)
    assert lies_on(prune.cut_once(model, stats, recipe, EQUAL.removable_params() // 2), device)


def test_a_mistake_is_noticed(device, monkeypatch):
    real = mend.rotary
    monkeypatch.setattr(mend, "rotary", lambda config, start, T, _, dtype: real(config, start, T, torch.device("cpu"),
                                                                                dtype))
    model = model_on(device)
    small = prune.cut(model, {key: torch.arange(1) for key in CONFIG.widths()})
    with pytest.raises(RuntimeError, match="two( different)? devices|device"):
        mend.mend_sequentially_(small, model, torch.cat([x for x, _ in text(CONFIG)]))
