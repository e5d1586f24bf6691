"""The loop on a device that is not there. Its tensors have a shape and no values, so that a tensor on another device is
noticed on any machine, and a step that waits for the device to read a number from it.

The device is "meta", and "cuda" as well where there is a GPU. In our code "meta" goes the ways of a GPU, except where
the fixtures below say so. PyTorch's process group "fake" lets this process be one of 8 that share a model: what it
receives from the others has a shape and no values, too."""
import contextlib
import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import masks_of
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import distill
import model as models
import prune
import schedule
import shard
import train
from methods import sparse

FIRST_CUT, LAST_CUT, SLICE, STEPS = 1, 2, 3, 5
WORLD, LOCAL_WORLD = 8, 4
ENLARGED = models.GPTConfig(130, 16, 16, 8, n_head=(4, 2), n_kv_head=(2, 1), d_ff=(24, 16), qkv_bias=True, qk_norm=True)
TARGET = ENLARGED.resized({**ENLARGED.widths(), (0, "ffn"): 12, (0, "kv"): 1})

# Seen with PyTorch 2.13 without CUDA, and with 2.6 with CUDA and no driver.
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason=(
    "without a GPU a fake tensor of \"cuda\" cannot take a gradient: autograd asks for the device's guard as it "
    "records an operation, and the error that it gets ends the process"))
DEVICES = pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=NEEDS_GPU)], indirect=True)


def number_of(tensor):
    """In the place of Tensor.item. AdamW that is not fused reads its count of steps, on the CPU."""
    assert tensor.device.type == "cpu", "a number was read from the device"
    return 1.0


@pytest.fixture
def device(monkeypatch, request):
    """The name of the device. What needs values gets others."""
    name = getattr(request, "param", "meta")
    monkeypatch.setattr(torch.Tensor, "item", number_of)
    # How many units a cut kills is not known: say one.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor: tensor.new_zeros((1, 1), dtype=torch.long))
    monkeypatch.setattr(train.UnreadStep, "read", lambda step: ([2.0, 2.0, 0.1, 1.0], 1.0, False))
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    if name == "meta":
        # There is no autocast on "meta".
        monkeypatch.setattr(train.Setup, "autocast", lambda setup: contextlib.nullcontext())
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        monkeypatch.setitem(train.STAY_UNREAD, "meta", 1)
    with FakeTensorMode():
        yield name


def replace_parameters(module, function, recurse=True):
    """In the place of Module._apply, which cannot exchange parameters that are fake (PyTorch 2.13)."""
    for child in module.children():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
    return module


@pytest.fixture
def mesh_of(monkeypatch, device):
    """A function from kind and rank to the mesh in which this process is one of 8 that share a model."""
    if torch.__version__ < shard.OLDEST_ON_CPU:
        pytest.skip(f"FSDP2 on a device that has no streams was tried with PyTorch {shard.OLDEST_ON_CPU} and later")
    # What is received. PyTorch 2.13 knows by itself.
    pytest.importorskip("torch.distributed._tools.fake_collectives")
    monkeypatch.setattr(torch.nn.Module, "_apply", replace_parameters)
    # All processes choose the same units: this one's.
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, group: None)
    if device == "meta":
        # FSDP takes streams and events from the device's module. These order nothing.
        streams = mock.MagicMock()
        streams.current_device.return_value = None
        streams.device_count.return_value = LOCAL_WORLD
        monkeypatch.setattr(torch, "meta", streams, raising=False)
        monkeypatch.setattr(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
        monkeypatch.setitem(dist.Backend.backend_capability, "fake", ["cpu", "cuda", "meta"])
        # Autocast would only cast the head's products. The blocks are bfloat16 by FSDP's policy.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)

    def make(kind, rank):
        with unset_fake_temporarily():                                 # a mesh is made of real numbers
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
            return shard.make_mesh(kind, device, WORLD, LOCAL_WORLD)

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


class Watch(TorchDispatchMode):
    """What passes through PyTorch inside of a `with`: the bytes of the largest tensor, and the shapes of those that go
    from the device to main memory."""
    largest = 0

    def __init__(self):
        super().__init__()
        self.copied = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented                                      # its rows come here next
        result = function(*args, **kwargs or {})
        tensors = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.largest = max([self.largest] + [tensor.untyped_storage().nbytes() for tensor in tensors])
        sources = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
        if tensors and tensors[0].is_cpu and not all(source.is_cpu for source in sources):
            self.copied.append(tuple(tensors[0].shape))
        return result


def copied_in_a_run():
    """What a run copies from the device to main memory: the six numbers of each step, and at each cut the scores of
    each layer's units."""
    scores = [(units,) for units in ENLARGED.widths().values()]
    before, between, behind = ([(6,)] * steps for steps in (FIRST_CUT, LAST_CUT - FIRST_CUT, STEPS - LAST_CUT))
    return before + scores + between + scores + behind


def on_device(state, device):
    """Whether all that a step changes lies on the device."""
    tensors = [*state.model.parameters()]
    for moments in state.optimizer.state.values():
        tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
    return len(tensors) == 3 * len(state.optimizer.state) and all(tensor.device.type == device for tensor in tensors)


@DEVICES
@pytest.mark.parametrize("teacher", [False, True])
def test_a_run_with_cuts_and_a_slice_stays_on_its_device(device, teacher):
    setup, state = setup_and_state(device, teacher)
    with Watch() as watch:
        train.train(setup, state, STEPS)
    assert watch.copied == copied_in_a_run()
    assert state.model.config == TARGET and on_device(state, device)
    assert state.window["taught"] == (1 if teacher else 0)             # since the record of step 4


def test_a_model_of_two_in_four_stays_on_its_device(device):
    setup, state = setup_and_state(device, teacher=False)
    state.masks = masks_of(state.model, sparse.Pattern(2, 4))
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


@DEVICES
@pytest.mark.parametrize("kind, rank, processes, teacher", [("fsdp", 6, 8, False), ("hsdp", 5, 4, True)])
def test_a_run_that_shares_its_model_stays_on_its_device(mesh_of, device, kind, rank, processes, teacher):
    setup = shared(setup_and_state(device, teacher)[0], kind, mesh_of(kind, rank))
    state = share(setup, teacher)
    with Watch() as watch:
        train.train(setup, state, STEPS)
    assert watch.copied == copied_in_a_run()
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


def test_a_model_of_eight_billion_parameters_is_never_whole(mesh_of, device):
    """The shapes of LLaMA-3.1-8B, but 8 of its 32 layers: all of them take 10 seconds."""
    V, C, layers = 128256, 4096, 8
    config = models.GPTConfig(V, 16, C, 128, [32] * layers, [8] * layers, [14336] * layers, tie_embeddings=False)
    small = setup_and_state(device, False)[0]
    setup = shared(dataclasses.replace(small, start=config, target=config), "fsdp", mesh_of("fsdp", 0))
    with Watch() as filling:
        model = setup.build(config)
        sizes = {name: p.shape for name, p in model.named_parameters()}
        shard.fill_(model, lambda name, start, stop: torch.empty(sizes[name], device="cpu")[start:stop])
    state = checkpoint.State(model, train.make_optimizer(model, setup.config), prune.everything(config))
    with Watch() as training:
        train.train(setup, state, 1)
    alive = {key: torch.arange(units // 2) for key, units in config.widths().items()}
    with Watch() as cutting:
        prune.zero_(model, state.optimizer, alive)
        half, _ = prune.slice(model, state.optimizer, alive)
    assert half.config == config.resized({key: len(indices) for key, indices in alive.items()})
    assert filling.largest == cutting.largest == 4 * V * C             # one tensor at a time
    assert training.largest == 4 * (2 * V * C + C)                     # embedding, head and last norm in one array


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


def test_a_copy_to_main_memory_is_noticed(device, monkeypatch):
    added_up = shard.sums_by_unit
    monkeypatch.setattr(shard, "sums_by_unit", lambda tensor, dim, units: added_up(tensor, dim, units).cpu())
    setup, state = setup_and_state(device, teacher=False)
    with Watch() as watch:
        train.train(setup, state, FIRST_CUT)
    assert len(watch.copied) > FIRST_CUT
