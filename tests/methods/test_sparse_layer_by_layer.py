"""Sparse weights, calibrated layer by layer: each layer becomes what the one-pass cut makes of it in a model whose
earlier layers are sparse already."""
import copy

import pytest
import torch
from helpers import SHAPE, new, text

import prune
from common import UserError
from methods import offload, sparse
from methods.sparse import Pattern, cut_layer_by_layer_
from model import GPTConfig
from score import collect

# A whole layer, one without attention, one without anything, one without FFN.
LAYERS = GPTConfig(**SHAPE, n_head=(2, 0, 0, 3), n_kv_head=(1, 0, 0, 3), d_ff=(20, 8, 0, 0), qkv_bias=True)
BLOCK = GPTConfig(**SHAPE, n_head=(2,), n_kv_head=(1,), d_ff=(20,), qkv_bias=True)
WAYS = [("wanda", "none"), ("wanda", "dsnot"), ("sparsegpt", "none"), ("mrp", "least-squares"),
        ("magnitude", "least-squares")]
TWO_FOUR = Pattern(2, 4)


def one_pass(model, batches, pattern, score, mend):
    """(a copy of the model, cut by one pass over the model as it is, the Stats of the pass)"""
    stats = collect(model, batches, sparse.needs(score, mend) | {"cosine"}, sparse.READERS)
    model = copy.deepcopy(model)
    sparse.cut_(model, stats, pattern, score, mend)
    return model, stats


def layer_by_layer(config, pattern, score, mend, dtype=torch.float64, products=None):
    """(the dense model, its sparse copy, the Stats that were returned)"""
    dense, _ = new(config, dtype)
    model = copy.deepcopy(dense)
    stats = cut_layer_by_layer_(model, text(config), pattern, score, mend, products)
    return dense, model, stats


def differing(a, b):
    """The names of the parameters that are not the same bit for bit."""
    return {name for name, p in a.named_parameters() if not torch.equal(p, b.get_parameter(name))}


@pytest.mark.parametrize("score, mend", WAYS)
def test_a_single_layer_is_cut_as_by_one_pass(score, mend):
    dense, model, stats = layer_by_layer(BLOCK, TWO_FOUR, score, mend)
    expected, one = one_pass(dense, text(BLOCK), TWO_FOUR, score, mend)
    assert not differing(model, expected)
    assert stats.cosine[0, "layer"] == pytest.approx(one.cosine[0, "layer"], abs=1e-6)


@pytest.mark.parametrize("score, mend, pattern", [*((*way, TWO_FOUR) for way in WAYS),
                                                  ("sparsegpt", "none", Pattern(.5)), ("wanda", "dsnot", Pattern(.5))])
def test_each_layer_is_cut_as_by_one_pass_behind_sparse_layers(score, mend, pattern):
    dense, model, stats = layer_by_layer(LAYERS, pattern, score, mend)
    hybrid = copy.deepcopy(dense)
    for layer, block in enumerate(model.blocks):
        expected, one = one_pass(hybrid, text(LAYERS), pattern, score, mend)
        hybrid.blocks[layer] = expected.blocks[layer]
        assert not differing(block, expected.blocks[layer]), layer
        assert stats.cosine[layer, "layer"] == pytest.approx(one.cosine[layer, "layer"], abs=1e-6)
    assert differing(model, dense) == {name for name, _ in sparse.matrices(dense)}
    # The first layer alone has dense inputs in one pass, too.
    expected, _ = one_pass(dense, text(LAYERS), pattern, score, mend)
    others = differing(model, expected)
    assert others and not any(name.startswith("blocks.0.") for name in others)


def test_bfloat16_products_cut_almost_as_one_pass_under_autocast():
    # The mask does not depend on the inputs, as near ties would fall the other way.
    how = LAYERS, TWO_FOUR, "magnitude", "least-squares", torch.float32
    dense, exact, _ = layer_by_layer(*how)
    _, by_dtype, _ = layer_by_layer(*how, products=torch.bfloat16)
    hybrid = copy.deepcopy(dense)
    with torch.autocast("cpu", torch.bfloat16):
        _, by_autocast, _ = layer_by_layer(*how)
        for layer in range(LAYERS.n_layer):
            expected, _ = one_pass(hybrid, text(LAYERS), *how[1:4])
            hybrid.blocks[layer] = expected.blocks[layer]
    assert not differing(by_dtype, by_autocast) and differing(by_dtype, exact)
    # Streams are in float32 here, and in bfloat16 there.
    errors = []
    for name, p in sparse.matrices(by_dtype):
        errors.append((p - hybrid.get_parameter(name)).norm() / p.norm())
    assert max(errors) < .02


def test_autocast_does_not_round_what_is_solved():
    dense, _ = new(LAYERS, torch.float32)
    stats = collect(dense, text(LAYERS), {"gram"}, sparse.READERS)
    plain, under_autocast = copy.deepcopy(dense), copy.deepcopy(dense)
    sparse.cut_(plain, stats, TWO_FOUR, "mrp", "least-squares")
    with torch.autocast("cpu", torch.bfloat16):
        sparse.cut_(under_autocast, stats, TWO_FOUR, "mrp", "least-squares")
    assert not differing(plain, under_autocast)


def test_layers_in_main_memory_are_cut_alike(monkeypatch):
    """The CPU is a second device: "cpu:0" is another name of it, so that layers are copied there and back."""
    how = LAYERS, TWO_FOUR, "wanda", "dsnot"
    _, expected, _ = layer_by_layer(*how)
    real = offload.on_device
    visits = []

    def on_device(module, device, changes=False):
        visits.append(changes)
        return real(module, torch.device("cpu", 0), changes)

    monkeypatch.setattr(sparse, "on_device", on_device)
    _, model, _ = layer_by_layer(*how)
    assert visits == [True] * LAYERS.n_layer and not differing(model, expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_recipe_is_cut_layer_by_layer_and_takes_no_other_statistics(weights):
    recipe = prune.Prune(structure="weights", keep=.5, score="sparsegpt", layer_by_layer=True, block_size=8)
    prune.check(recipe)
    _, expected, _ = layer_by_layer(LAYERS, Pattern(.5), "sparsegpt", "none", weights, torch.bfloat16)
    model, _ = new(LAYERS, weights)
    cut, stats = prune.cut_in_stages(model, text(LAYERS), recipe, torch.bfloat16, collect=None)
    assert not differing(cut, expected)
    assert prune.table(LAYERS, cut.config, stats).count("\n") == LAYERS.n_layer
    assert all((p != 0).sum() <= (p.numel() + 1) // 2 for _, p in sparse.matrices(cut))


def test_widths_that_do_not_fit_are_refused_before_anything_runs():
    model, _ = new(LAYERS)
    with pytest.raises(UserError, match="12 inputs, and 2:5 needs a multiple of 5"):
        cut_layer_by_layer_(model, [], Pattern(2, 5), "wanda")
