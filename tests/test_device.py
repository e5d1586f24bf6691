"""The loop on a device that is not there. Its tensors have a shape and no values, so that a tensor on another device is
noticed on any machine, and a step that waits for the device to read a number from it.

The device is "meta", as a backward pass on fake tensors of "cuda" ends a process that has no GPU. In our code "meta"
goes the ways of a GPU, except where the fixture below says so."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import checkpoint
import distill
import model as models
import prune
import schedule
import train
from methods import sparse

FIRST_CUT, LAST_CUT, SLICE, STEPS = 4, 6, 8, 12
ENLARGED = models.GPTConfig(130, 16, 16, 8, n_head=(4, 2), n_kv_head=(2, 1), d_ff=(24, 16), qkv_bias=True, qk_norm=True)
TARGET = ENLARGED.resized({**ENLARGED.widths(), (0, "ffn"): 12, (0, "kv"): 1})


def number_of(tensor):
    """In the place of Tensor.item. AdamW that is not fused reads its count of steps, on the CPU."""
    assert tensor.device.type == "cpu", "a number was read from the device"
    return 1.0


@pytest.fixture
def device(monkeypatch):
    """The name of the device. What needs values gets others."""
    monkeypatch.setattr(torch.Tensor, "item", number_of)
    # How many units a cut kills is not known: say one.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor: tensor.new_zeros((1, 1), dtype=torch.long))
    monkeypatch.setattr(train.UnreadStep, "read", lambda step: ([2.0, 2.0, 0.1, 1.0], 1.0, False))
    # There is no autocast on "meta".
    monkeypatch.setattr(train.Setup, "autocast", lambda setup: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setitem(train.STAY_UNREAD, "meta", 1)
    with FakeTensorMode():
        yield "meta"


def setup_and_state(device, teacher):
    """A run with a cut, a second cut, a slice and, in its last two stages, a teacher."""
    size = TARGET.removable_params() / ENLARGED.removable_params()
    stages = ((schedule.Stage("enlarge", share=1 / 3), 0, FIRST_CUT),
              (schedule.Stage("prune", share=1 / 3, kd=teacher), FIRST_CUT, SLICE),
              (schedule.Stage("recover", share=1 / 3, kd=teacher), SLICE, STEPS))
    timeline = schedule.Timeline(STEPS, stages, ((FIRST_CUT, (1 + size) / 2), (LAST_CUT, size)), ((0, STEPS),), SLICE)
    config = train.Train(steps=STEPS, micro_batch=2, batch_tokens=64, score_every=2, teacher="given", compile=False)
    corpus = SimpleNamespace(train=np.arange(641, dtype=np.uint16) % 130)
    setup = train.Setup(train.resolve(config, device), timeline, ENLARGED, TARGET, corpus, None, device)
    with torch.device(device):
        model = models.GPT(ENLARGED)
        teacher = distill.freeze(models.GPT(ENLARGED)) if teacher else None
    optimizer = train.make_optimizer(model, setup.config)
    return setup, checkpoint.State(model, optimizer, prune.everything(ENLARGED), teacher=teacher)


def on_device(state, device):
    """Whether all that a step changes lies on the device."""
    tensors = [*state.model.parameters()]
    for moments in state.optimizer.state.values():
        tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
    return len(tensors) == 3 * len(state.optimizer.state) and all(tensor.device.type == device for tensor in tensors)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_run_with_cuts_and_a_slice_stays_on_its_device(device, teacher):
    setup, state = setup_and_state(device, teacher)
    train.train(setup, state, STEPS)
    assert state.model.config == TARGET and on_device(state, device)
    assert state.window["taught"] == (2 if teacher else 0)             # since the record of step 10


def test_a_model_of_two_in_four_stays_on_its_device(device):
    setup, state = setup_and_state(device, teacher=False)
    state.masks = sparse.masks(state.model)
    train.train(setup, state, FIRST_CUT)
    assert on_device(state, device)


def test_what_a_step_leaves_stays_on_the_device_until_it_is_read(device):
    """`agree` and `skip_if_not_finite` read nothing."""
    setup, state = setup_and_state(device, teacher=False)
    numbers = train.agree(setup, setup.zeros(4), torch.zeros((), device=device))
    assert numbers.shape == (6,) and numbers.device.type == device
    state.optimizer.param_groups[0]["fused"] = True
    train.skip_if_not_finite(state.optimizer, numbers)
    assert state.optimizer.found_inf.device.type == device and state.optimizer.found_inf.dtype == torch.float32


def sums_on_the_cpu(setup, n):
    return torch.zeros(n, dtype=torch.float64)


def averages_on_the_cpu(averages, fresh):
    return {key: torch.zeros(2, len(values)) + torch.stack((values, values)) for key, values in fresh.items()}


def reads_the_norm(setup, means, norm):
    return torch.cat((means, torch.tensor([0.0, norm.item()], device=setup.device)))


def reads_the_loss(setup, means, norm):
    means.tolist()


@pytest.mark.parametrize("module, name, mistake", [
    (train.Setup, "zeros", sums_on_the_cpu), (train.score, "average", averages_on_the_cpu),
    (train, "agree", reads_the_norm), (train, "agree", reads_the_loss)])
def test_a_mistake_is_noticed(device, monkeypatch, module, name, mistake):
    monkeypatch.setattr(module, name, mistake)
    setup, state = setup_and_state(device, teacher=False)
    noticed = "two( different)? devices|_local_scalar_dense|read from the device"
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError), match=noticed):
        train.train(setup, state, STEPS)
