"""The loop on a device that is not there. Its tensors have a shape and no values, so that a tensor on another device is
noticed on any machine, and a step that waits for the device to read a number from it.

The device is "meta". A fake tensor of "cuda" cannot take a gradient where there is no GPU: autograd asks for the
device's guard as it records the first operation, and the error that it gets ends the process (seen with PyTorch 2.13
without CUDA, and with 2.6 with CUDA and no driver). In our code "meta" goes the ways of a GPU, except where the
fixtures below say so. PyTorch's process group "fake" lets this process be one of 8 that share a model: what it receives
from the others has a shape and no values, too."""
import contextlib
import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

import checkpoint
import distill
import model as models
import prune
import schedule
import shard
import train
from methods import two_four

FIRST_CUT, LAST_CUT, SLICE, STEPS = 1, 2, 3, 5
WORLD, LOCAL_WORLD = 8, 4
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
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    with FakeTensorMode():
        yield "meta"


def replace_parameters(module, function, recurse=True):
    """In the place of Module._apply, which cannot exchange parameters that are fake (PyTorch 2.13)."""
    for child in module.children():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
    return module


@pytest.fixture
def mesh_of(monkeypatch):
    """A function from kind and rank to the mesh in which this process is one of 8 that share a model."""
    monkeypatch.setitem(dist.Backend.backend_capability, "fake", ["cpu", "cuda", "meta"])
    # FSDP takes streams and events from the device's module. These order nothing.
    streams = mock.MagicMock()
    streams.current_device.return_value = None
    streams.device_count.return_value = LOCAL_WORLD
    monkeypatch.setattr(torch, "meta", streams, raising=False)
    monkeypatch.setattr(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
    monkeypatch.setattr(torch.nn.Module, "_apply", replace_parameters)
    # Under autocast, see `device`, only the head's products are cast; a block's parameters are by policy.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    # All processes choose the same units: this one's.
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, group: None)

    def make(kind, rank):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        return shard.make_mesh(kind, "meta", WORLD, LOCAL_WORLD)

    yield make
    dist.destroy_process_group()


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
    assert state.window["taught"] == (1 if teacher else 0)             # since the record of step 4


def test_a_model_of_two_in_four_stays_on_its_device(device):
    setup, state = setup_and_state(device, teacher=False)
    state.masks = two_four.masks(state.model)
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


def shared(setup, kind, mesh):
    """The same run in bfloat16, in which the processes of the mesh share the model."""
    config = dataclasses.replace(setup.config, shard=kind, recompute=True, dtype="bfloat16",
                                 batch_tokens=WORLD * setup.config.batch_tokens)
    return dataclasses.replace(setup, config=config, mesh=mesh, rank=dist.get_rank(), world=WORLD)


def share(setup, teacher):
    """The state of such a run, with weights that are never filled."""
    model = setup.build(ENLARGED)
    teacher = distill.freeze(setup.build(ENLARGED, halve=True)) if teacher else None
    optimizer = train.make_optimizer(model, setup.config)
    return checkpoint.State(model, optimizer, prune.everything(ENLARGED), teacher=teacher)


def held_rows(size, processes, number):
    """How many of so many rows the process `number` holds: PyTorch's own chunks."""
    chunks = torch.empty(size, device="meta").chunk(processes)
    return len(chunks[number]) if number < len(chunks) else 0


@pytest.mark.parametrize("kind, rank, processes, teacher", [("fsdp", 6, 8, False), ("hsdp", 5, 4, True)])
def test_a_run_that_shares_its_model_stays_on_its_device(mesh_of, device, kind, rank, processes, teacher):
    with unset_fake_temporarily():
        mesh = mesh_of(kind, rank)
    setup = shared(setup_and_state(device, teacher)[0], kind, mesh)
    state = share(setup, teacher)
    train.train(setup, state, STEPS)
    assert state.model.config == TARGET and on_device(state, device)
    assert state.window["taught"] == (1 if teacher else 0)
    shapes = {name: p.shape for name, p in models.GPT(TARGET).named_parameters()}
    for name, p in state.model.named_parameters():
        start, stop = shard.rows(p)
        rows = held_rows(len(p), processes, rank % processes)
        assert p.shape == shapes[name] and stop - start == rows
        for tensor in (p, *state.optimizer.state[p].values()):
            is_count = tensor.dim() == 0
            assert is_count or shard.local(tensor).shape == (rows, *p.shape[1:])
            assert tensor.dtype == torch.float32
    if teacher:
        assert state.teacher.embed.weight.dtype == torch.float32
        assert {p.dtype for p in state.teacher.blocks.parameters()} == {torch.bfloat16}


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
