"""Layers in main memory: what is measured and mended is what a whole model gives, and no layer is multiplied by where
it lies."""

import pytest
import torch
from helpers import EQUAL, FIELDS, WITH_HOLES, new, text
from torch.utils._python_dispatch import TorchDispatchMode

import prune
import score
from methods import local, mend, offload, sparse


def fields_of(stats):
    """{(field, key): tensor or number} of all statistics."""
    values = {}
    for name in FIELDS:
        for key, value in getattr(stats, name).items():
            values[name, key] = torch.as_tensor(value, dtype=torch.float64)
    return values


@pytest.mark.parametrize("name", ["all", "holes"])
@pytest.mark.parametrize("needs", [FIELDS, {"gram", "cosine", "channel"}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_layer_by_layer_takes_the_same_statistics(name, needs, dtype, tolerance):
    model, _ = new(WITH_HOLES[name], dtype)
    model.embed.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    batches = text(model.config)
    whole = score.collect(model, batches, needs)
    layered = offload.collect(model, iter(batches), needs)
    assert (layered.tokens, layered.windows) == (whole.tokens, whole.windows)
    expected = fields_of(whole)
    values = fields_of(layered)
    assert values.keys() == expected.keys() and {field for field, _ in values} == needs
    for key, value in expected.items():
        assert (values[key] - value).norm() <= tolerance * value.norm(), key
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


class Watch(TorchDispatchMode):
    """Notes products with tensors of the given storages."""
    def __init__(self, tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operands = [x for x in args if isinstance(x, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm") and any(x.untyped_storage().data_ptr() in self.storages for x in operands):
            self.products.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere(monkeypatch):
    """The CPU as a second device: "cpu:0" is another name of it, so that tensors are copied there and back."""
    real = offload.on_device
    for module in (offload, mend, local, sparse):
        monkeypatch.setattr(module, "on_device", lambda module, _, changes=False: real(
            module, torch.device("cpu", 0), changes))


def cut_by(flags, is_offloaded):
    """-> (the smaller model, products with layers that lie in main memory)"""
    model, _ = new(EQUAL, torch.float32)
    usual = dict(keep=.6, score="taylor", mend="none", local_steps=3, iterations=2, block_size=8, micro_batch=4)
    recipe = prune.Prune(**usual | flags, offload=is_offloaded)
    if is_offloaded:
        offload.keep_layers_off(model, torch.device("cpu"))
    with Watch(model.blocks.parameters()) as watch:
        small, _ = prune.cut_in_stages(model, text(EQUAL, 4), recipe)
    return small, watch.products


@pytest.mark.parametrize("flags", [
    dict(mend="none"), dict(mend="least-squares"), dict(mend="sequential"), dict(mend="local"),
    dict(mend="bias", iterations=1), dict(structure="channel"), dict(score="policy", policy_steps=3),
    dict(structure="weights", score="sparsegpt", layer_by_layer=True),
    dict(structure="2:4", score="magnitude", mend="least-squares", layer_by_layer=True)])
def test_a_cut_is_the_same_and_layers_are_multiplied_on_the_device(request, flags):
    expected, products = cut_by(flags, is_offloaded=False)
    assert products
    request.getfixturevalue("elsewhere")
    small, products = cut_by(flags, is_offloaded=True)
    assert not products and small.config == expected.config
    for (name, p), q in zip(small.named_parameters(), expected.parameters(), strict=True):
        assert (p - q).abs().max() <= 2e-4 * q.abs().max(), name


def test_a_model_runs_with_its_layers_in_main_memory(elsewhere):
    """Also behind a layer that failed, which is dropped from the device as well."""
    model, _ = new(EQUAL)
    (x, _), *_ = text(EQUAL)
    expected = model.hidden(x)
    offload.keep_layers_off(model, torch.device("cpu"))
    where = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        model.blocks[0](torch.zeros(1, 1, 5), None, None)
    with torch.no_grad(), Watch(model.blocks.parameters()) as watch:
        assert (model.hidden(x) - expected).abs().max() < 1e-12 and not watch.products
    assert [p.data_ptr() for p in model.parameters()] == where


def test_what_changes_on_the_device_is_kept_where_asked():
    linear = torch.nn.Linear(2, 2)
    before = linear.weight.detach().clone()
    for changes in (False, True):
        with offload.on_device(linear, torch.device("cpu", 0), changes):
            linear.weight.data.add_(1)
        assert torch.equal(linear.weight, before + changes)


@pytest.mark.parametrize("flags", [dict(data=("self",)), dict(choices="own")])
def test_what_needs_all_layers_at_once_is_refused(flags):
    with pytest.raises(prune.UserError, match="offload"):
        prune.check(prune.Prune("model", offload=True, **flags))
