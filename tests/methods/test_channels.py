"""Channels of the residual stream: sliced channels are zeroed channels, and budgets are met.

The oracle zeroes what would write a channel, and reads the rows and columns by explicit indices.
"""
import copy
import dataclasses

import pytest
import torch
from helpers import SHAPE, WITH_HOLES, close, inputs, new, text

import prune
import score
from common import UserError
from methods import channels
from model import GPTConfig


@pytest.mark.parametrize("name", WITH_HOLES)
@pytest.mark.parametrize("tied", [True, False])
def test_sliced_channels_are_zeroed_channels(name, tied):
    model, _ = new(dataclasses.replace(WITH_HOLES[name], tie_embeddings=tied))
    kept, idx = torch.tensor([0, 1, 4, 5, 6, 9, 11]), text(model.config)[0][0]
    small, zeroed = channels.slice_channels(model, kept), copy.deepcopy(model)
    gone = [c for c in range(12) if c not in kept.tolist()]
    with torch.no_grad():                      # a channel that nobody writes is 0 everywhere, whatever would read it
        zeroed.embed.weight[:, gone] = 0
        for key, w in zeroed.named_parameters():
            if key.endswith(("attn.o.weight", "ffn.down.weight")):
                w[gone] = 0
    assert small.config == dataclasses.replace(model.config, d_model=7, norm_eps=small.config.norm_eps)
    assert small.config.num_params()["total"] == sum(p.numel() for p in small.parameters())
    assert (small(idx) - zeroed(idx)).abs().max() <= 1e-10 < 1e-3 < (small(idx) - model(idx)).abs().max()
    same = channels.slice_channels(model, torch.arange(12))
    assert same.config == model.config and torch.equal(same(idx), model(idx))
    small.embed.weight.data.zero_()                                            # nothing shared
    assert (model.embed.weight != 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiple", [1, 4])
def test_channels_meet_the_budget_biases_or_not(bias, multiple):
    config = GPTConfig(**SHAPE | dict(d_model=24), n_head=(4, 6), n_kv_head=(2, 3), d_ff=(5, 7), qkv_bias=bias)
    model, c = new(config)[0], prune.Prune(structure="channel", score="magnitude", multiple_of=multiple)
    whole = config.removable_params()
    for most in range(whole // 3, whole, 97):
        small = prune.cut_once(model, score.Stats(), c, most).config
        assert small.d_model % multiple == 0 and small.removable_params() <= most
        assert dataclasses.replace(small, d_model=small.d_model + multiple).removable_params() > most
        assert small.widths() == config.widths()
    with pytest.raises(UserError, match=f"a budget of 9 parameters is less than {multiple} of the 24 channels"):
        prune.cut_once(model, score.Stats(), c, 9)


def test_the_channels_that_stay_are_the_best():
    model, _ = new(WITH_HOLES["gqa"])
    with torch.no_grad():
        for key, w in model.named_parameters():
            if key.startswith("blocks.") and w.dim() == 2:
                (w if key.endswith(("o.weight", "down.weight")) else w.T)[[2, 3, 7]] *= .01
    c = prune.Prune(structure="channel", score="magnitude")
    nine = dataclasses.replace(model.config, d_model=9).removable_params()
    small = prune.cut_once(model, score.Stats(), c, nine)
    assert torch.equal(small.embed.weight, model.embed.weight[:, [0, 1, 4, 5, 6, 8, 9, 10, 11]])


@pytest.mark.parametrize("name", ["magnitude", "taylor", "activation"])
def test_a_channel_is_worth_what_reads_and_writes_it(name):
    model, _ = new(WITH_HOLES["all"])
    stats = score.collect(model, text(model.config), {"grad", "channel"})
    found = channels.channel_scores(model, stats, name)
    for c in range(model.config.d_model) if name != "activation" else ():
        total = 0
        for block, matrix in ((b, m) for b in range(3) for m in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate",
                                                               "ffn.up", "ffn.down")):
            key, index = f"blocks.{block}.{matrix}.weight", c if matrix in ("attn.o", "ffn.down") else (slice(None), c)
            w = model.get_parameter(key).detach()
            total += ((w * stats.grad[key] if name == "taylor" else w)[index]).abs().sum().item()
        assert found[c].item() == pytest.approx(total, rel=1e-5)
    norms = {n: v for n, v in inputs(model, text(model.config)).items() if n.endswith("norm.weight") and "k_n" not in n
             and "q_n" not in n}
    assert norms.keys() == {f"{n}.weight" for n in stats.channel}
    if name == "activation":
        close(found, sum(out.square().sum(0).sqrt().mean(0) for out in norms.values()), 1e-4)
