"""Invariants of methods/sparse.py: the right weights stay, and stay alone while a run trains, is killed and goes on;
what stays is fitted exactly.

The oracle of the choice is `brute`, plain Python over the entries; those of mending are torch's least squares, the
paper's formula and all masks of a small matrix.
"""
import dataclasses
import itertools
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import masks_of
from test_shard import sharded_copy

import checkpoint
import common
import prune
import report
import shard
import train
from common import UserError
from methods import mend, sparse
from methods.dsnot import refined
from methods.refit import refit
from methods.sparsegpt import mrp, sparsegpt
from model import GPT, GPTConfig, preset
from score import Stats, collect

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(vocab_size=13, block_size=8, d_model=12, head_dim=4, n_head=(2, 0, 3), n_kv_head=(1, 0, 3),
                   d_ff=(20, 8, 0), qkv_bias=True, qk_norm=True)
TWO_FOUR = sparse.Pattern(2, 4)
ENDS = ".q", ".k", ".v", ".o", ".gate", ".up", ".down"
MATRICES = {f"blocks.{layer}.{name}.weight" for layer, names in (
    (0, ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")),
    (1, ("ffn.gate", "ffn.up", "ffn.down")), (2, ("attn.q", "attn.k", "attn.v", "attn.o"))) for name in names}
TOY = dict(preset="toy", plan="scratch", data=f"{ROOT}/*.py", steps=20, batch_tokens=256, micro_batch=2, eval_windows=4,
           eval_every=10, save_every=7, lr=1e-2, min_lr=1e-3, device="cpu")


def new(config=CONFIG, dtype=torch.float64):
    torch.manual_seed(0)
    return GPT(config).to(dtype)


def brute(scores):
    """(out, in) of numbers -> list of rows of booleans: of each 4 the 2 largest, ties to the first."""
    rows = []
    for row in scores.tolist():
        kept = set()
        for a in range(0, len(row), 4):
            kept |= {*sorted(range(a, a + 4), key=lambda i: (-row[i], i))[:2]}
        rows.append([i in kept for i in range(len(row))])
    return rows


@pytest.mark.parametrize("values", [2, 1000])                     # few: ties everywhere, some among zeros
@pytest.mark.parametrize("wanda", [False, True])
def test_the_two_best_of_each_four_stay(values, wanda):
    model, g = new(), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randint(-values, values + 1, p.shape, generator=g).double()
    norms = {name: torch.randint(0, values + 1, (p.size(1),), generator=g).float()
             for name, p in sparse.matrices(model)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = masks_of(model, TWO_FOUR, norms=norms if wanda else None)
    assert found.keys() == MATRICES
    for name, mask in found.items():
        score = before[name].abs() * (norms[name] if wanda else 1)
        assert mask.tolist() == brute(score) and (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    magnitude = masks_of(model, TWO_FOUR)
    assert all(torch.equal(magnitude[name], found[name]) for name in found) != wanda       # the norms decide
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_written_example():
    model = new()
    w = model.blocks[0].attn.q.weight
    w.data[0] = torch.tensor([1., -3, 2, 0, 5, 5, -5, 5, 0, 0, 0, 0])
    norms = {name: torch.ones(p.size(1)) for name, p in sparse.matrices(model)}
    norms["blocks.0.attn.q.weight"][:4] = torch.tensor([9., 1, 1, 7])
    for given, first in ((None, [0, 1, 1, 0]), (norms, [1, 1, 0, 0])):
        mask = masks_of(model, TWO_FOUR, norms=given)["blocks.0.attn.q.weight"]
        assert mask[0].int().tolist() == [*first, 1, 1, 0, 0, 1, 1, 0, 0]


def steps(model, optimizer, masks, n):
    """So many steps on random tokens, clipped as train.py does; masks None: they are forgotten."""
    for step in range(n):
        tokens = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if masks is not None:
            sparse.hold_(model, optimizer, masks)
        optimizer.zero_grad()


ADAM = "exp_avg", "exp_avg_sq"
OPTIMIZERS = {"adamw": (lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=.1, fused=True), ADAM),
              "sgd": (lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, weight_decay=.1), ("momentum_buffer",))}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("held", [True, False])
def test_2_4_holds_over_50_steps_and_not_without_hold(kind, held):
    model = new()
    assert sparse.share(model, TWO_FOUR) == 0
    masks = masks_of(model, TWO_FOUR)
    make, moments = OPTIMIZERS[kind]
    optimizer = make(model.parameters())
    sparse.hold_(model, None, masks)
    assert sparse.share(model, TWO_FOUR) == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, optimizer, masks if held else None, 50)
    for name, p in model.named_parameters():
        out = ~masks.get(name, torch.ones_like(p, dtype=torch.bool))
        for tensor in (p, *(optimizer.state[p][moment] for moment in moments)):
            if name in masks and held:
                assert (tensor[out] == 0).all(), name
            elif name in masks:
                assert (tensor[out] != 0).all(), name                # every single one came back
            assert (tensor[~out] != 0).all()
        assert (p != before[name])[~out].all()                       # all others were trained
    assert sparse.share(model, TWO_FOUR) == (1 if held else 0)


def test_hold_touches_nothing_but_what_the_masks_leave_out():
    model = new()
    optimizer = OPTIMIZERS["adamw"][0](model.parameters())
    steps(model, optimizer, None, 3)
    everything_of = lambda: {(name, key): t.clone() for name, p in model.named_parameters()
                             for key, t in (("w", p.detach()), *optimizer.state[p].items())}
    before, masks = everything_of(), masks_of(model, TWO_FOUR)
    sparse.hold_(model, optimizer, masks)
    for (name, key), t in everything_of().items():
        masked = name in masks and key != "step"
        assert torch.equal(t, before[name, key] * masks[name] if masked else before[name, key])


def test_share_counts_blocks():
    model = new()
    sparse.hold_(model, None, masks_of(model, TWO_FOUR))
    blocks = sum(p.numel() // 4 for _, p in sparse.matrices(model))
    model.blocks[0].ffn.up.weight.data[3] = 1                        # 12 inputs: 3 blocks
    assert sparse.share(model, TWO_FOUR) == 1 - 3 / blocks
    model.blocks[0].ffn.up.weight.data[3, :4] = 0                    # more zeros than 2 are 2:4 as well
    assert sparse.share(model, TWO_FOUR) == 1 - 2 / blocks


def test_packed_masks_come_back_through_a_checkpoint(tmp_path):
    model, g = new(), torch.Generator().manual_seed(0)
    masks = masks_of(model, TWO_FOUR) | {f"odd.{n}": torch.rand(5, n, generator=g) < .5 for n in (1, 7, 8, 9, 64)}
    packed = sparse.pack(masks)
    assert {name: bits.numel() for name, (_, bits) in packed.items()} == {
        name: mask.size(0) * -(-mask.size(1) // 8) for name, mask in masks.items()}
    checkpoint.save(tmp_path / "cut.pt", model, masks={name: packed[name] for name in packed if "odd" not in name})
    _, about = checkpoint.load(tmp_path / "cut.pt")
    back = sparse.unpack(about["masks"])
    assert back.keys() == masks_of(model, TWO_FOUR).keys()
    back |= sparse.unpack({name: packed[name] for name in packed if "odd" in name})      # no model has such
    for name, mask in masks.items():
        assert back[name].dtype == torch.bool and torch.equal(back[name], mask)
    assert sparse.unpack(None) == {} == sparse.unpack(sparse.pack({}))


@pytest.mark.parametrize("shape, says", [
    (dict(d_ff=(20, 10)), "blocks.1.ffn.down.weight has 10 inputs.*multiple of 4; .*--multiple-of 4"),
    (dict(d_model=14), "blocks.0.attn.q.weight has 14 inputs.*multiple of 4; .*d_model and head_dim"),
    (dict(head_dim=2), "blocks.0.attn.o.weight has 6 inputs.*multiple of 4; .*d_model and head_dim")])
def test_widths_that_are_no_multiple_of_4_are_refused(shape, says):
    model = GPT(GPTConfig(**{**dict(vocab_size=13, block_size=8, d_model=12, head_dim=4, n_head=(3, 3),
                                    n_kv_head=(3, 3), d_ff=(20, 8)), **shape}))
    for call in (sparse.share, lambda model, pattern: sparse.cut_(model, Stats(), pattern, "magnitude")):
        with pytest.raises(UserError, match=says) as refusal:
            call(model, TWO_FOUR)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("flags, setting", [(dict(score="mrp", mend="none"), "--score mrp"),
                                            (dict(score="wanda", mend="least-squares"), "--mend least-squares")])
def test_what_reads_the_stream_needs_as_many_tokens_as_channels(flags, setting):
    """Where a model has been cut, its channels outnumber its neurons."""
    model = GPT(GPTConfig(vocab_size=13, block_size=8, d_model=48, head_dim=4, n_head=(2,), n_kv_head=(1,), d_ff=(8,)))
    recipe = prune.Prune("m", structure="2:4", windows=5, micro_batch=1, block_size=8, **flags)
    with pytest.raises(UserError, match=f"{setting} fits matrices of 48 inputs to 5 .* = 40 tokens; give --windows 6"):
        prune.check_fits(recipe, model, "cpu")
    prune.check_fits(dataclasses.replace(recipe, windows=6), model, "cpu")


# -- single matrices: scores and mending, against exact solutions and brute force

OUT, IN = 6, 16


def matrix_and_inputs(seed=0, n=IN, tokens=200, out=OUT):
    """A matrix (out, in), correlated inputs (tokens, in) with means and sizes of their own, their statistics."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g).double() @ torch.randn(n, n, generator=g).double()
    x = (x + 2 * torch.randn(n, generator=g)) * torch.rand(n, generator=g) * 2
    w = torch.randn(out, n, generator=g).double()
    return w, x, sparse.Inputs(x.mean(0), x.square().mean(0), x.T @ x / tokens)


def error(w, changed, inputs, damping=.01):
    """What `refit` is the least of, by row: (out,)."""
    change = changed - w
    ridge = damping * inputs.gram.diagonal().mean()
    kept = changed != 0
    return ((change @ inputs.gram) * change).sum(1) + ridge * (change * kept).square().sum(1)


PATTERNS = [TWO_FOUR, sparse.Pattern(1, 4), sparse.Pattern(3, 8), sparse.Pattern(.5), sparse.Pattern(.3)]
SCORES = [(name, pattern) for name in sparse.SCORES for pattern in PATTERNS if name != "mrp" or pattern.group]


@pytest.mark.parametrize("score, pattern", SCORES)
def test_a_score_keeps_what_the_pattern_says_and_the_refit_beats_it(score, pattern):
    w, _, inputs = matrix_and_inputs()
    weights, mask = sparse.SCORES[score].function(w, inputs, pattern)
    assert (weights[~mask] == 0).all() and (weights[mask] != 0).all()
    counts = pattern.grouped(mask).sum(-1)
    if score == "sparsegpt" and not pattern.group:                      # all rows of a block of columns compete
        assert mask.sum() == int(pattern.kept * mask.numel() + 1e-6)
    else:
        assert (counts == pattern.number(mask.size(1))).all()
    if score != "sparsegpt":
        assert torch.equal(weights, w * mask)
    fitted = refit(w, mask, inputs.gram)
    assert (fitted[~mask] == 0).all()
    assert (error(w, fitted, inputs) <= error(w, weights, inputs) * (1 + 1e-9)).all()
    assert error(w, fitted, inputs).sum() < .95 * error(w, w * mask, inputs).sum()


def test_the_refit_is_exact_least_squares_and_mrp_s_formula():
    w, x, inputs = matrix_and_inputs()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < .5
    mask[0], mask[1] = True, False                                      # a row that stays whole, one that goes
    fitted = refit(w, mask, inputs.gram)
    ridge = .01 * inputs.gram.diagonal().mean()
    h_inverse = torch.linalg.inv(inputs.gram + ridge * torch.eye(IN).double())
    stacked = torch.cat((x / len(x) ** .5, ridge.sqrt() * torch.eye(IN).double()))
    for row, kept, dense in zip(fitted, mask, w):
        # The ridge is on the change of what stays: its target there is the dense weight.
        target = torch.cat((x / len(x) ** .5 @ dense, ridge.sqrt() * dense * kept))
        exact = torch.zeros(IN, dtype=torch.float64)
        if kept.any():
            exact[kept] = torch.linalg.lstsq(stacked[:, kept], target).solution
        torch.testing.assert_close(row, exact, rtol=0, atol=1e-10)
        gone = (~kept).nonzero().flatten()
        change = torch.linalg.solve(h_inverse[gone][:, gone], h_inverse[gone]) if len(gone) else torch.zeros(0, IN)
        torch.testing.assert_close(row, dense - dense[gone] @ change.double(), rtol=0, atol=1e-10)


def test_with_one_mask_for_all_rows_the_refit_is_that_of_units():
    w, _, inputs = matrix_and_inputs()
    kept = torch.tensor([0, 1, 5, 6, 7, 11])
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask[:, kept] = True
    torch.testing.assert_close(refit(w, mask, inputs.gram)[:, kept], mend.mended(w, inputs.gram, kept))


def test_forty_steps_of_float32_are_enough_for_inputs_of_very_different_sizes():
    w, _, inputs = matrix_and_inputs(n=96, out=24, tokens=300)
    inputs.gram[3] *= 300
    inputs.gram[:, 3] *= 300
    mask = TWO_FOUR.best(w.abs())
    exact = refit(w, mask, inputs.gram, steps=2000)
    rounded = refit(w.float(), mask, inputs.gram.float())
    assert rounded.dtype == torch.float32
    assert error(w, rounded.double(), inputs).sum() < 1.01 * error(w, exact, inputs).sum()


def test_sparsegpt_on_inputs_without_correlation_is_wanda():
    w, _, inputs = matrix_and_inputs()
    inputs.gram = torch.diag(inputs.square)
    for pattern in (TWO_FOUR, sparse.Pattern(2, 8)):
        weights, mask = sparsegpt(w, inputs, pattern, damping=0)
        assert torch.equal(mask, sparse.wanda(w, inputs, pattern)[1])
        torch.testing.assert_close(weights, w * mask)


def test_sparsegpt_s_blocks_change_nothing_and_dead_inputs_do_no_harm():
    w, x, inputs = matrix_and_inputs()
    whole = sparsegpt(w, inputs, TWO_FOUR)
    for block in (3, 4, 8):
        for a, b in zip(whole, sparsegpt(w, inputs, TWO_FOUR, block=block)):
            torch.testing.assert_close(a, b)
    # Within a mask that is given the columns' updates are those of the paper: no better than the best there.
    assert error(w, whole[0], inputs).sum() < error(w, w * whole[1], inputs).sum()
    dead = x.clone()
    dead[:, :4] = 0
    inputs = sparse.Inputs(dead.mean(0), dead.square().mean(0), dead.T @ dead / len(dead))
    for function in (sparsegpt, mrp):
        weights, mask = function(w, inputs, TWO_FOUR)
        assert weights.isfinite().all() and (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (sparsegpt(w, inputs, TWO_FOUR)[0][:, :4] == 0).all()
    assert refit(w, mask, inputs.gram).isfinite().all()


@pytest.mark.parametrize("pattern", [TWO_FOUR, sparse.Pattern(.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_whose_inputs_are_all_zero_stays_finite(pattern, dtype):
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = sparse.Inputs(torch.zeros(8).to(dtype), torch.zeros(8).to(dtype), torch.zeros(8, 8).to(dtype))
    weights, mask = sparsegpt(w, inputs, pattern)
    assert (weights == 0).all() and mask.sum() == 24
    assert refit(w, mask, inputs.gram).isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_brute_force_over_all_masks_is_no_worse_than_any_score(seed):
    """8 inputs: 6² masks of 2:4, each with its exact weights. A group alone is chosen exactly by mrp."""
    w, _, inputs = matrix_and_inputs(seed, n=8, out=3)
    pairs = [sorted(pair) for pair in itertools.combinations(range(4), 2)]
    least = torch.full((3,), math.inf, dtype=torch.float64)
    for first, second in itertools.product(pairs, pairs):
        mask = torch.zeros(3, 8, dtype=torch.bool)
        mask[:, first + [4 + i for i in second]] = True
        least = torch.minimum(least, error(w, refit(w, mask, inputs.gram), inputs))
    for row in sparse.SCORES.values():
        weights, mask = row.function(w, inputs, TWO_FOUR)
        assert (error(w, refit(w, mask, inputs.gram), inputs) >= least * (1 - 1e-9)).all()
    _, mask = mrp(w, inputs, TWO_FOUR)
    for begin in (0, 4):
        losses = []
        for pair in pairs:
            alone = torch.ones(3, 8, dtype=torch.bool)
            alone[:, begin:begin + 4] = False
            alone[:, [begin + i for i in pair]] = True
            losses.append(error(w, refit(w, alone, inputs.gram), inputs))
        for row, index in enumerate(torch.stack(losses).argmin(0).tolist()):
            assert mask[row, begin:begin + 4].nonzero().flatten().tolist() == pairs[index]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_brings_the_missing_mean_nearer_and_keeps_the_pattern(pattern):
    w, _, inputs = matrix_and_inputs(n=64, out=48)
    _, mask = sparse.wanda(w, inputs, pattern)
    missing = lambda mask: (w * ~mask * inputs.mean).sum(1).abs()
    history = [mask]
    for cycles in (1, 2, 5, 50):
        history.append(refined(w, mask, inputs, pattern, cycles))
        assert (pattern.grouped(history[-1]).sum(-1) == pattern.number(64)).all()
    for before, after in zip(history, history[1:]):
        assert (missing(after) <= missing(before) + 1e-12).all()
    assert (history[1] != mask).sum(1).max() <= 2                       # one exchange a row and cycle
    assert missing(history[-1]).sum() < (.8 if pattern.group else .2) * missing(mask).sum()
    inputs.mean = torch.zeros(64)
    assert torch.equal(refined(w, mask, inputs, pattern), mask)


def test_dsnot_s_first_exchange_is_the_paper_s():
    """One row, written out: which weight returns, and which goes for it."""
    w = torch.tensor([[-1., 1, 1, 3, -3, 2, .5, 1.5]]).double()
    mean = torch.ones(8).double()
    mean[6] = 4
    inputs = sparse.Inputs(mean, mean.square() + torch.tensor([1, 1, 1, 1, 1, 9, 1, 9]), None)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1]]).bool()              # missing: 1 + 1 + 2 + 2 = 6
    # w E[x] / Var[x] of the pruned: 1, 1, 2 / 9, 2. The last one returns (column 6).
    four = refined(w, mask, inputs, TWO_FOUR, cycles=1)
    assert four.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]            # 3 · √2 is less than 1.5 · √10 in its group
    rows = refined(w, mask, inputs, sparse.Pattern(.5), cycles=1)
    assert rows.int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]            # 1 · √2 is less than 3 · √2 of the other sign


# -- whole models

@pytest.mark.parametrize("score, mend_by", [(score, by) for score in sparse.SCORES for by in sparse.MENDS])
def test_a_model_becomes_sparse_by_the_inputs_of_its_own_matrices(score, mend_by):
    model, dense = new(), new()
    x = [torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    fields = sparse.needs(score, mend_by)
    stats = collect(model, [(tokens, tokens) for tokens in x], fields, sparse.READERS)
    every = collect(model, [(tokens, tokens) for tokens in x], {"gram", "mean", "square"}, ENDS)
    sparse.cut_(model, stats, TWO_FOUR, score, mend_by)
    assert sparse.share(model, TWO_FOUR) == 1
    for name, p in sparse.matrices(dense):
        inputs = sparse.Inputs(every.mean[name], every.square[name], every.gram[name])
        weights, mask = sparse.SCORES[score].function(p.detach(), inputs, TWO_FOUR)
        if mend_by == "least-squares":
            weights = refit(p.detach(), mask, inputs.gram)
        elif mend_by == "dsnot":
            weights = p.detach() * refined(p.detach(), mask, inputs, TWO_FOUR)
        assert torch.equal(model.get_parameter(name), weights), name
    others = {name for name, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(name))}
    assert others == MATRICES


@pytest.mark.parametrize("score, mend_by", [("sparsegpt", "none"), ("mrp", "least-squares"), ("wanda", "dsnot")])
def test_bfloat16_weights_become_sparse_as_float32_ones_do(score, mend_by):
    halves = new(dtype=torch.bfloat16)
    exact = new(dtype=torch.bfloat16).float()
    tokens = torch.randint(13, (8, 8), generator=torch.Generator().manual_seed(0))
    stats = collect(exact, [(tokens, tokens)], sparse.needs(score, mend_by), sparse.READERS)
    for model in (halves, exact):
        sparse.cut_(model, stats, TWO_FOUR, score, mend_by)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(halves.parameters(), exact.parameters()))


@pytest.mark.parametrize("sparsity", [.5, .75])
def test_random_masks_leave_out_the_same_share_of_each_matrix(sparsity):
    model = new()
    masks = sparse.random_masks(model, sparsity, seed=3)
    assert masks.keys() == MATRICES
    for name, p in sparse.matrices(model):
        assert masks[name].shape == p.shape and (~masks[name]).sum() == round(sparsity * p.numel())
    again, other = (sparse.random_masks(new(), sparsity, seed) for seed in (3, 4))
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert all(not torch.equal(masks[name], other[name]) for name in masks)


def test_sparse_pretraining_keeps_zeros_and_dense_fine_tuning_frees_them():
    model, dense = new(), new()
    masks = sparse.random_masks(model, .75, seed=0)
    optimizer = OPTIMIZERS["adamw"][0](model.parameters())
    sparse.hold_(model, None, masks)
    # The first step of the weights that stay is that of a dense optimizer with masked gradients.
    sparse.hold_(dense, None, masks)
    masked = OPTIMIZERS["adamw"][0](dense.parameters())
    for name, mask in masks.items():
        dense.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask)
    steps(model, optimizer, masks, 1)
    steps(dense, masked, None, 1)
    for name, mask in masks.items():
        torch.testing.assert_close(model.get_parameter(name)[mask], dense.get_parameter(name)[mask], rtol=0, atol=1e-5)
    steps(model, optimizer, masks, 49)
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    assert all(torch.equal(mask, sparse.nonzero(model)[name]) for name, mask in masks.items())
    steps(model, optimizer, None, 1)
    # But of a neuron whose up row was zero as a whole its gate row has no gradient yet.
    freed = torch.cat([model.get_parameter(name)[~mask] != 0 for name, mask in masks.items()])
    assert freed.float().mean() > .9


def hold_rows(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    one = new()
    many, _ = sharded_copy(one, OPTIMIZERS["adamw"][0](one.parameters()))
    masks, sharded = (sparse.random_masks(model, .75, seed=1) for model in (one, many))
    sparse.hold_(one, None, masks)
    sparse.hold_(many, None, sharded)
    nonzeros = sparse.nonzero(many)
    for name, p in one.named_parameters():
        assert torch.equal(shard.whole(many.get_parameter(name)), p)
    for name, (inputs, bits) in sparse.pack(masks).items():
        for packed in (sparse.pack(sharded), sparse.pack(nonzeros)):
            assert packed[name][0] == inputs and torch.equal(packed[name][1], bits)
    dist.barrier()
    os._exit(0)


def test_a_sharded_model_has_the_same_random_masks(tmp_path):
    torch.multiprocessing.start_processes(hold_rows, (str(tmp_path),), nprocs=2, start_method="fork")


# -- through train.main

def train_toy(out, **settings):
    return train.main(train.Train(**{**TOY, **settings}, out=str(out)), quiet=True)


def state_of(out):
    """What must be the same bit for bit: {name: tensor or number} of the last checkpoint, and all losses."""
    model, about = checkpoint.load(out)
    tensors = {("model", name): t for name, t in model.state_dict().items()}
    tensors |= {("optimizer", i, k): t for i, s in about["optimizer"]["state"].items() for k, t in s.items()}
    losses = [e.get("loss", e.get("val_loss")) for tag in ("step", "eval")
              for e in report.records(out).get(tag, ())]
    return tensors, sparse.unpack(about["masks"]), losses


def same(a, b):
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a[:2], b[:2])) \
        and a[2] == b[2]


def obeys(out, masks):
    """The last checkpoint has these masks, and zeros where they say, in weights and moments."""
    model, about = checkpoint.load(out)
    found, names = sparse.unpack(about["masks"]), [name for name, _ in model.named_parameters()]
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1]     # AdamW's order: matrices, then vectors
    states = dict(zip(matrices + [n for n in names if n not in matrices], about["optimizer"]["state"].values()))
    zeros = [t[~mask] for name, mask in masks.items()
             for t in (model.get_parameter(name).detach(), states[name]["exp_avg"], states[name]["exp_avg_sq"])]
    return sparse.share(model, TWO_FOUR) == 1 and all((z == 0).all() for z in zeros)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """-> (folder of a dense model, folder of it cut to 2:4, the masks)."""
    home, model = tmp_path_factory.mktemp("given"), new(preset("toy", 256)[0], torch.float32)
    masks, about = masks_of(model, TWO_FOUR), {"step": 0, "run": {"tokenizer": "bytes"}}
    checkpoint.save(home / "plain" / "ckpt_00000000.pt", model, **about)
    sparse.hold_(model, None, masks)
    checkpoint.save(home / "cut" / "ckpt_00000000.pt", model, masks=sparse.pack(masks), **about)
    return home / "plain", home / "cut", masks


@pytest.fixture
def init(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)                                       # the corpus' cache goes there
    monkeypatch.setattr(report, "picture", lambda *_: None)           # half of the time of so short runs
    return dict(init=str(given[1]), preset="laptop")


class Killed(BaseException):
    pass


def test_a_2_4_model_stays_2_4_killed_or_not(tmp_path, monkeypatch, given, init):
    _, state = train_toy(tmp_path / "whole", **init)
    assert obeys(tmp_path / "whole", given[2]) and state.masks.keys() == given[2].keys()
    losses = [e["val_loss"] for e in report.records(tmp_path / "whole")["eval"]]
    assert losses[-1] < losses[0] - .1
    first, last = (checkpoint.load(path)[0] for path in (given[1], tmp_path / "whole"))
    assert all((last.get_parameter(name) != first.get_parameter(name))[mask].float().mean() > .99
               for name, mask in given[2].items())
    count = train.count_flops

    def kill(setup, state, *args):
        if state.step == 10:
            raise Killed
        count(setup, state, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "count_flops", kill)
        train_toy(tmp_path / "run", **init)
    train_toy(tmp_path / "run", **init)
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    train_toy(tmp_path / "next", **{**init, "init": str(tmp_path / "run")}, steps=3)
    assert obeys(tmp_path / "next", given[2])


def test_without_hold_a_run_loses_it(tmp_path, monkeypatch, given, init):
    monkeypatch.setattr(sparse, "hold_", lambda *_: None)
    train_toy(tmp_path / "run", **init, steps=3)
    assert not obeys(tmp_path / "run", given[2])
    assert sparse.share(checkpoint.load(tmp_path / "run")[0], TWO_FOUR) < .05


def test_a_run_without_masks_is_as_it_was(tmp_path, monkeypatch, given, init):
    """Masks that keep all change no bit; and without any, no tensor is ever touched."""
    init["init"] = str(given[0])
    model, about = checkpoint.load(given[0])
    about["masks"] = sparse.pack({name: torch.ones_like(p, dtype=torch.bool)
                                    for name, p in sparse.matrices(model)})
    checkpoint.save(tmp_path / "all" / "ckpt_00000000.pt", model, **about)
    train_toy(tmp_path / "kept", **{**init, "init": str(tmp_path / "all")})
    hold, seen = sparse.hold_, []
    monkeypatch.setattr(sparse, "hold_", lambda *a: (seen.append(a[2]), hold(*a)))
    monkeypatch.setattr(torch.Tensor, "masked_fill_", None)
    train_toy(tmp_path / "none", **init)
    (weights, masks, losses), kept = state_of(tmp_path / "none"), state_of(tmp_path / "kept")
    assert seen == [{}] * 20 and masks == {} and kept[1].keys() == given[2].keys()
    assert same((weights, {}, losses), (kept[0], {}, kept[2]))


def test_one_compiled_graph_with_the_mask_outside(tmp_path, monkeypatch, given, init):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend=counter, fullgraph=True,
                                                                           **options))
    train_toy(tmp_path / "run", **init, steps=4, compile=True)
    assert counter.frame_count == 1 and obeys(tmp_path / "run", given[2])


def worker(rank, out, port, init):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    train_toy(out, **init, steps=10, dtype="float64")
    os._exit(0)                                 # gloo's threads have been seen to abort a process that ended normally


def test_two_processes_hold_the_same_masks_and_are_one(tmp_path, given, init):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    torch.multiprocessing.start_processes(worker, (str(tmp_path / "two"), port, init), nprocs=2,
                                          start_method="fork")       # spares two imports of torch
    train_toy(tmp_path / "one", **init, steps=10, dtype="float64")
    assert obeys(tmp_path / "two", given[2])
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    assert all((one[0][key] - two[0][key]).abs().max() < 1e-6 for key in one[0]) and two[2] == pytest.approx(one[2])


@pytest.mark.parametrize("plan", ["idea", "naive", "oneshot", "idea-kd", "journey"])
def test_plans_that_prune_refuse_a_2_4_model(tmp_path, init, plan):
    with pytest.raises(UserError, match=f"sparse.*cannot be cut while.* plan {plan!r} prunes.*--plan scratch") as no:
        train_toy(tmp_path / "run", **init, plan=plan, block_size=32)
    assert "\n" not in str(no.value) and not (tmp_path / "run").exists()


def test_a_given_teacher_teaches_a_2_4_model_too(tmp_path, given, init):
    train_toy(tmp_path / "run", **init, plan="kd", teacher=str(given[0]), steps=4)
    assert obeys(tmp_path / "run", given[2])


def test_a_run_checkpoint_from_before_masks_still_goes_on(tmp_path, given, init):
    init["init"] = str(given[0])
    train_toy(tmp_path / "run", **init, steps=8)
    whole, (old, last) = state_of(tmp_path / "run"), checkpoint.checkpoints(tmp_path / "run")
    last.unlink()
    model, about = checkpoint.load(old)
    del about["masks"]
    checkpoint.save(old, model, **about)
    train_toy(tmp_path / "run", **init, steps=8)
    assert same(state_of(tmp_path / "run"), whole)


# -- SPDF: sparse pretraining, dense fine-tuning, by train.py

def test_sparse_pretraining_then_dense_fine_tuning(tmp_path, init):
    """Exact shares of each matrix are zero to the end, though the run was stopped and went on; then they learn."""
    sparse_run = dict(preset="toy", plan="scratch", sparse=0.75, dtype="float64", seed=4)
    train_toy(tmp_path / "sparse", **sparse_run, steps=20)
    model, about = checkpoint.load(tmp_path / "sparse")
    masks = sparse.unpack(about["masks"])
    torch.manual_seed(4)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.random_masks(GPT(model.config), 0.75, 4).items())
    for name, mask in masks.items():
        assert int((~mask).sum()) == round(0.75 * mask.numel()) and (model.get_parameter(name)[~mask] == 0).all()
        assert (model.get_parameter(name)[mask] != 0).all()
    summary = common.read_records(tmp_path / "sparse" / "metrics.jsonl")[-1]
    assert summary["zeros"] == sum(int((~mask).sum()) for mask in masks.values())
    executed, saved = summary["flops_executed"], 6 * summary["zeros"] * summary["tokens"]
    assert summary["flops_if_sparse"] == executed - saved > 0
    fine = dict(preset="laptop", init=str(tmp_path / "sparse"), steps=5)
    for name, settings, learns in (("still", {}, False), ("free", dict(dense=True), True)):
        train_toy(tmp_path / name, **fine, **settings)
        tuned, after = checkpoint.load(tmp_path / name)
        moved = [(tuned.get_parameter(name)[~mask] != 0).all().item() for name, mask in masks.items()]
        assert moved == [learns] * len(masks) and bool(after["masks"]) != learns


@pytest.mark.parametrize("settings, says", [
    (dict(plan="idea", preset="toy", sparse=0.5), "--sparse 0.5 holds single weights .* plan 'idea' cuts units"),
    (dict(plan="scratch", preset="toy", sparse=1.0), "--sparse 1.0 must be between 0 and 1"),
    (dict(plan="scratch", preset="toy", dense=True), "--dense has no effect without --init"),
    (dict(preset="laptop", init="dense", dense=True), "--dense has no effect, as .* holds no zeros"),
    (dict(preset="laptop", init="sparse", sparse=0.5), "is sparse already, and --sparse would choose other zeros")])
def test_what_spdf_refuses(tmp_path, given, init, settings, says):
    folders = dict(dense=given[0], sparse=given[1])
    if "init" in settings:
        settings = {**settings, "init": str(folders[settings["init"]])}
    with pytest.raises(UserError, match=says):
        train_toy(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
