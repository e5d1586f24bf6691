"""The accounting of a cut's memory counts what tensors hold."""
import pytest
import torch
from helpers import CONFIGS, new, text

import checkpoint
import score
from bench import cut_memory
from bench.cut_memory import CutMemory, accounting, activations_bytes, measured, sums_bytes
from common import UserError
from model import GPT, GPTConfig, rotary

WIDE = GPTConfig(64, 64, 128, 64, n_head=(4, 4), n_kv_head=(2, 2), d_ff=(384, 384))


@pytest.mark.parametrize("name", ["gqa", "gqa+bias"])
@pytest.mark.parametrize("needs", [{"grad"}, {"grad", "grad_sq", "gram"}, {"gram", "cosine"}])
def test_sums_are_those_of_a_pass(name, needs):
    model, _ = new(CONFIGS[name], torch.float32)
    stats = score.collect(model, text(model.config), needs)
    tensors = [*stats.grad.values(), *stats.grad_sq.values(), *stats.gram.values()]
    assert sum(tensor.nbytes for tensor in tensors) == sums_bytes(model.config, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_layer_saves_for_its_backward_pass(dtype):
    block = GPT(WIDE).to(dtype).blocks[0]
    x = torch.randn(2, 64, 128, dtype=dtype).requires_grad_()
    angles = rotary(WIDE, 0, 64, x.device, dtype)
    others = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *angles)}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = block(x, *angles)
    expected = x.shape[:2].numel() * activations_bytes(WIDE, 0, dtype.itemsize)
    assert sum(saved.values()) == pytest.approx(expected, rel=.02) and out.shape == x.shape


def test_8_billion_parameters_in_bfloat16_are_cut_on_80_gb():
    config = cut_memory.SHAPES["8b"]
    small = config.resized({key: n // 2 for key, n in config.widths().items()})
    with torch.device("meta"):
        model = GPT(config)
    params = sum(p.numel() for p in model.parameters())
    most = {}
    for weights in ("float32", "bfloat16"):
        phases = accounting(config, small, CutMemory("8b", weights))
        most[weights] = max(memory.device for memory in phases.values())
        assert phases["load"].device == model.to(getattr(torch, weights)).embed.weight.itemsize * params
    assert most["bfloat16"] < 60e9 < 80e9 < most["float32"]
    offloaded = accounting(config, small, CutMemory("8b", "bfloat16", offload=True))
    assert max(memory.device for memory in offloaded.values()) < 8e9


@pytest.mark.parametrize("offload", [False, True])
def test_every_phase_is_measured(tmp_path, monkeypatch, offload):
    monkeypatch.setitem(cut_memory.SHAPES, "100m", WIDE)
    settings = CutMemory(weights="bfloat16", offload=offload, windows=4, block_size=32, micro_batch=2)
    checkpoint.save(tmp_path / "model.pt", GPT(WIDE))
    peaks, small = measured(settings, str(tmp_path / "model.pt"), "cpu")
    assert peaks.keys() == accounting(WIDE, small, settings).keys()
    assert small.removable_params() <= WIDE.removable_params() / 2


@pytest.mark.parametrize("flags, words", [
    (dict(keep=3.), "--keep 3.0 must be between 0 and 1"), (dict(score="perplexity"), "--score 'perplexity' with"),
    (dict(device="cuda"), "--device has no effect without --measure"),
    (dict(weights="bfloat16", dtype="float32"), "--weights bfloat16 are not measured in --dtype float32")])
def test_settings_that_mean_nothing_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        cut_memory.main(CutMemory(**flags))
