"""Whole layers and sub-blocks: perplexity against the whole model, scores by the sum, budgets that are met.

The oracle of `without` is the whole model run again with the part missing. That of budgets is `price`.
"""
import copy
import math
import random

import pytest
from helpers import EQUAL, WITH_HOLES, fingerprint, loss_of, new, price, random_config, text, untouched

import allocate
import score
from common import UserError
from methods import depth


@pytest.mark.parametrize("name", ["all", "holes"])
def test_without_is_the_loss_of_the_whole_model(name):
    model, _ = new(WITH_HOLES[name])
    batches, was = text(model.config), fingerprint(model)
    rises = depth.without(model, batches, ("layer", "kv", "ffn"))
    untouched(model, was)
    assert rises.keys() == {(layer, kind) for layer in range(3) for kind in ("layer", "kv", "ffn")}
    losses = lambda model: sum(loss_of(model, x, y).item() for x, y in batches) / 3
    for (layer, kind), rise in rises.items():
        less = copy.deepcopy(model)
        if kind != "ffn":
            less.blocks[layer].attn = None
        if kind != "kv":
            less.blocks[layer].ffn = None
        assert rise == pytest.approx(losses(less) - losses(model), abs=1e-12)
        assert (abs(rise) > 1e-6) == (sum(p.numel() for p in less.parameters()) < sum(
            p.numel() for p in model.parameters()))                            # what is absent already is worth 0


@pytest.mark.parametrize("how", ["global", "middle"])
@pytest.mark.parametrize("structure", ["layer", "sublayer"])
@pytest.mark.parametrize("resource", allocate.RESOURCES)
def test_budgets_are_met_to_the_last_part(how, structure, resource):
    met = 0
    for seed in range(40):
        rng = random.Random(seed)
        config = random_config(rng)
        start, total = config.widths(), price(config, resource)
        budget = math.floor(rng.uniform(.3, 1) * total)
        scores = {(layer, part): rng.choice([0., 1., rng.random()]) for layer in range(config.n_layer)
                  for part in depth.PARTS[structure]}
        call = lambda scores: depth.widths_for(config, budget, how, scores, structure, resource)
        try:
            widths = call(scores)
        except UserError as refusal:
            assert "that middle keeps whole" in str(refusal)
            continue
        met += total > budget
        assert price(config.resized(widths), resource) <= budget
        assert widths == call(dict(reversed(scores.items())))
        for (layer, kind), n in start.items():
            assert widths[layer, kind] in (0, n)
            if widths[layer, kind] < n:
                back = {(l, k): w for (l, k), w in start.items() if l == layer and (k == kind or structure == "layer")}
                assert price(config.resized(widths | back), resource) > budget          # the next part is too much
    assert met >= 5                                                                     # the others were refused


def test_middle_keeps_the_outer_layers():
    scores = {(layer, "layer"): layer / 8 for layer in range(8)}
    widths = depth.widths_for(EQUAL, EQUAL.removable_params() // 2, "middle", scores, "layer")
    assert [layer for layer in range(8) if widths[layer, "ffn"]] == [0, 5, 6, 7]


def test_sub_blocks_compete_per_parameter():
    model, _ = new(WITH_HOLES["holes"])
    sums = {(layer, kind): sum(p.abs().sum().item() for p in module.parameters()) for layer, block in
            enumerate(model.blocks) for kind, module in (("kv", block.attn), ("ffn", block.ffn)) if module is not None}
    layers = depth.part_scores(model, score.Stats(), None, "layer", "magnitude")
    assert layers == pytest.approx({(layer, "layer"): sums.get((layer, "kv"), 0) + sums.get((layer, "ffn"), 0)
                                    for layer in range(3)}, rel=1e-5)
    sub_blocks = depth.part_scores(model, score.Stats(), None, "sublayer", "magnitude")
    params = {key: n * model.config.unit_params(*key) for key, n in model.config.widths().items()}
    assert sub_blocks == pytest.approx({key: sums.get(key, 0) / max(1, params[key]) for key in params}, rel=1e-5)


@pytest.mark.parametrize("how", ["uniform", "adaptive"])
@pytest.mark.parametrize("structure", ["layer", "sublayer"])
def test_other_allocations_are_refused(how, structure):
    with pytest.raises(UserError, match=f"go by --allocate global or middle, not {how}"):
        depth.widths_for(EQUAL, 1000, how, {}, structure)
