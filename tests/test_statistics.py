"""Invariants of score.collect: statistics are the plain formulas', and collecting them leaves no trace.

Oracles: autograd on the whole text; inputs caught in a plain forward pass.
"""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FIELDS, WITH_HOLES, close, gradients, inputs, loss_of, new, text

import score
from common import UserError
from methods import depth
from model import coupled


@pytest.mark.parametrize("name", WITH_HOLES)
@pytest.mark.parametrize("n", [1, 3])
def test_statistics_are_the_plain_formulas(name, n):
    model, _ = new(WITH_HOLES[name])
    batches, config = text(model.config, n), model.config
    stats, seen = score.collect(model, batches, FIELDS), inputs(model, batches)
    whole = gradients(model, *(torch.cat(parts) for parts in zip(*batches)))
    each = [gradients(model, x, y) for x, y in batches]
    units = {name for key, units in config.widths().items() if units for name, _ in coupled(config, *key)}
    assert stats.grad.keys() == stats.grad_sq.keys() == units
    assert stats.tokens == n * 32
    for key in units:
        assert (stats.grad[key] - whole[key]).abs().max() <= 1e-12                    # the whole text's, in batches
        assert (stats.grad_sq[key] - 4 * sum(g[key]**2 for g in each) / n).abs().max() <= 1e-12    # one window's
    readers = {coupled(config, *key)[-1][0] for key, units in config.widths().items() if units}
    for field in (stats.mean, stats.square, stats.position, stats.size, stats.gram):
        assert field.keys() == readers
    for key in readers:
        x = seen[key].flatten(0, 1)
        close(stats.mean[key], x.mean(0), 1e-4, 1e-6 * x.abs().max().item())      # float32 sums that may cancel
        close(stats.square[key], (x * x).mean(0), 1e-4)
        close(stats.position[key], seen[key].square().sum(0), 1e-4)
        close(stats.size[key], seen[key].abs().mean(1).square().sum(0), 1e-4)
        gram = x.T @ x / len(x)
        close(stats.gram[key], gram, 1e-4, 1e-6 * gram.abs().max().item())
    norms = [out for key, out in seen.items() if key.endswith("norm.weight") and not key.endswith(("q_norm.weight",
                                                                                                 "k_norm.weight"))]
    assert len(norms) == len(stats.channel) == 1 + sum(map(bool, config.n_head + config.d_ff))
    norms = [seen[f"{key}.weight"] for key in stats.channel]
    for square, out in zip(stats.channel.values(), norms):
        close(square, out.square().sum(0), 1e-4)


@pytest.mark.parametrize("name", WITH_HOLES)
def test_cosines_are_those_of_the_stream(name):
    model, _ = new(WITH_HOLES[name])
    batches, streams = text(model.config), {}
    stats = score.collect(model, batches, {"cosine"})
    for part in ("attn", "ffn"):                     # the stream in front of each part: a hook on the norm before it
        for layer, block in enumerate(model.blocks):
            if getattr(block, part) is not None:
                getattr(block, f"{part}_norm").register_forward_pre_hook(
                    lambda _, args, key=(layer, part): streams.setdefault(key, []).append(args[0]))
    model.norm.register_forward_pre_hook(lambda _, args: streams.setdefault("end", []).append(args[0]))
    for x, _ in batches:
        model(x)
    behind = "end"
    cosine = lambda a, b: F.cosine_similarity(torch.cat(streams[a]), torch.cat(streams[b]), dim=-1).mean().item()
    for layer in reversed(range(model.config.n_layer)):
        end = behind
        for part, kind in (("ffn", "ffn"), ("attn", "kv")):
            if (layer, part) in streams:
                assert stats.cosine[layer, kind] == pytest.approx(cosine((layer, part), behind), abs=1e-6)
                assert stats.cosine[layer, kind] < 1 - 1e-5
                behind = layer, part
            else:
                assert stats.cosine[layer, kind] == pytest.approx(1, abs=1e-6)
        assert stats.cosine[layer, "layer"] == pytest.approx(cosine(behind, end), abs=1e-6)
        assert depth.influence(stats, layer, "kv") == 1 - stats.cosine[layer, "kv"]


def test_importance_is_centred_and_scaled():
    stats = score.Stats(cosine={(0, "layer"): .5, (1, "layer"): .9, (2, "layer"): .7, (2, "kv"): 0.})
    assert score.importance(stats, 3) == pytest.approx([1, -1, 0])          # -.5, -.9, -.7; mean -.7; largest .2
    assert score.importance(stats, 1) == [0]
    assert depth.influence(stats, 1) == pytest.approx(.1)


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_only_what_was_asked_for_is_kept(field):
    model, _ = new(WITH_HOLES["gqa"])
    stats = score.collect(model, text(model.config), {field})
    filled = {f for f in FIELDS if isinstance(value := getattr(stats, f), torch.Tensor) or value}
    assert filled == {field}


def test_two_four_reads_every_matrix():
    model, _ = new(WITH_HOLES["gqa"])
    stats = score.collect(model, batches := text(model.config), {"square"}, (".q", ".down"))
    seen = inputs(model, batches)
    assert stats.square.keys() == {key for key in seen if key.endswith((".q.weight", ".down.weight"))}
    for key, square in stats.square.items():
        close(square, seen[key].square().mean((0, 1)), 1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_collecting_leaves_the_model_as_it_was(fails):
    model, _ = new(WITH_HOLES["all"])
    batches = text(model.config)
    loss_of(model, *batches[2]).backward()
    model.embed.requires_grad_(False), model.blocks[0].attn.v.requires_grad_(False)    # frozen ones are scored as well
    model.blocks[1].ffn.up.weight.grad = None
    state = lambda: [(name, p, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    before, values = state(), copy.deepcopy([(p.data, p.grad) for p in model.parameters()])
    logits = model(batches[0][0])
    if fails:
        with pytest.raises(IndexError):
            score.collect(model, [*batches, (batches[0][0] + 100, batches[0][1])], FIELDS)
    else:
        stats = score.collect(model, batches, FIELDS)
        assert "blocks.0.attn.v.weight" in stats.grad
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] and a[3] is b[3] for a, b in zip(before, state()))
    for p, (value, grad) in zip(model.parameters(), values):
        assert torch.equal(p, value) and (p.grad is grad is None or torch.equal(p.grad, grad))
        assert not p._post_accumulate_grad_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(batches[0][0]), logits)


def test_calibration_windows_are_a_function_of_the_seed():
    tokens = np.arange(82, dtype=np.uint16)                                            # 10 windows of 8 and a rest
    found = score.batches(tokens, 8, 10, 2, seed=0)
    assert [x.shape for x, _ in found] == [(2, 8)] * 5 and all(torch.equal(y, x + 1) for x, y in found)
    firsts = [int(row[0]) for x, _ in found for row in x]
    assert sorted(firsts) == list(range(0, 80, 8))                                     # each once
    again, other = (score.batches(tokens, 8, 10, 2, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, again))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(found, other))
    for (windows, micro), sentence in {(12, 2): "has 82 tokens, 12 windows of 8 need 97: give more text, or fewer",
                                       (9, 4): "--windows 9 is no multiple of --micro-batch 4; try 12"}.items():
        with pytest.raises(UserError, match=sentence):
            score.batches(tokens, 8, windows, micro, 0)
