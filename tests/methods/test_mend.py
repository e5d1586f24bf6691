"""Mending: least squares is numpy's, in one pass and sequentially, and FLAP's bias is the mean of what went."""
import copy

import numpy as np
import pytest
import torch
from helpers import WITH_HOLES, inputs, new, text, without

import checkpoint
import export
import prune
import score
from common import UserError
from methods import mend
from model import GPT, coupled, reader_of


def random_problem(seed, n=9, tokens=200):
    """-> inputs (tokens, n), their Gram matrix, the matrix that reads them (5, n)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    return x, x.T @ x / tokens, torch.randn(5, n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_mended_columns_are_numpys_least_squares(seed):
    x, gram, w = random_problem(seed)
    kept = torch.tensor([0, 3, 4, 8])
    best = torch.from_numpy(np.linalg.lstsq(x[:, kept].numpy(), (x @ w.T).numpy(), rcond=None)[0]).T        # (5, 4)
    found = mend.mended(w, gram, kept, damping=1e-13)
    assert found.shape == (5, 4) and (found - best).abs().max() <= 1e-8
    error = lambda columns: (x[:, kept] @ columns.T - x @ w.T).square().mean().item()
    assert error(found) < error(mend.mended(w, gram, kept)) < .9 * error(w[:, kept])     # 1 % damping costs little
    assert (mend.mended(w, gram, torch.arange(9)) - w).abs().max() == 0                  # nothing gone
    assert mend.mended(w, gram, torch.tensor([], dtype=torch.long)).shape == (5, 0)


def test_mending_redundant_channels_is_exact():
    x, _, w = random_problem(0)
    x[:, [2, 6]] = x[:, [0, 1, 3]] @ torch.tensor([[1., -2], [.5, 0], [0, 3]], dtype=torch.float64)
    kept, gram = torch.tensor([0, 1, 3, 4, 5, 7, 8]), x.T @ x / len(x)
    dense, scale = x @ w.T, (x @ w.T).abs().max()
    assert (x[:, kept] @ mend.mended(w, gram, kept, damping=1e-13).T - dense).abs().max() <= 1e-9 * scale
    assert (x[:, kept] @ w[:, kept].T - dense).abs().max() > .1 * scale


@pytest.mark.parametrize("name", ["gqa", "all"])
def test_a_mended_cut_changes_only_the_readers_and_comes_nearer(name):
    model, _ = new(WITH_HOLES[name])
    batches, alive = text(model.config), prune.everything(model.config)
    alive |= {(0, "ffn"): torch.tensor([0, 2, 3]), (1, "kv"): torch.tensor([0, 2]), (1, "ffn"): torch.tensor([]).long()}
    stats, seen = score.collect(model, batches, {"gram", "mean"}), inputs(model, batches)
    plain, mended = prune.cut(model, alive), prune.cut(model, alive, "least-squares", stats)
    assert plain.config == mended.config and type(mended) is GPT
    changed = {a for (a, p), q in zip(plain.named_parameters(), mended.parameters()) if not torch.equal(p, q)}
    assert changed == {"blocks.0.ffn.down.weight", "blocks.1.attn.o.weight"}
    for layer, kind in ((0, "ffn"), (1, "kv")):
        reader = coupled(model.config, layer, kind)[-1][0]
        x, w, units = seen[reader].flatten(0, 1), model.get_parameter(reader), model.config.widths()[layer, kind]
        channels = torch.cat([torch.arange(w.size(1)).view(units, -1)[unit] for unit in alive[layer, kind]])
        error = lambda small: (x[:, channels] @ small.get_parameter(reader).T - x @ w.T).square().mean().item()
        assert error(mended) < .99 * error(plain)


def stream_behind(model, layer, kind, windows):
    """The residual stream behind a sub-block (tokens, C), and the inputs of the matrix that reads its units (tokens,
    n) or None, by whole forward passes."""
    block, seen, hooks = model.blocks[layer], {}, []
    sub_block = block.attn if kind == "kv" else block.ffn
    hooks.append(block.register_forward_hook(lambda _, args, out: seen.update(before=args[0], after=out)))
    if block.ffn is not None:
        hooks.append(block.ffn.register_forward_hook(lambda _, args, out: seen.update(ffn=out)))
    if sub_block is not None:
        reader = sub_block.o if kind == "kv" else sub_block.down
        hooks.append(reader.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1))))
    model(windows)
    for hook in hooks:
        hook.remove()
    stream = seen["after"] if kind == "ffn" else seen["after"] - seen.get("ffn", 0)
    return stream.flatten(0, 1), seen.get("x")


def best(x, error, held):
    """The change with the ridge that errs least on the rows held out, refitted to all; 0 if none helps."""
    def fit(rows, damping):
        n = x.shape[1]
        pull = np.sqrt(damping * np.square(x[rows]).sum() / n) * np.eye(n)
        return np.linalg.lstsq(np.vstack([x[rows], pull]), np.vstack([error[rows], np.zeros((n, error.shape[1]))]))[0]
    missing = {np.inf: np.square(error[held]).sum()} | {damping: np.square(
        error[held] - x[held] @ fit(~held, damping)).sum() for damping in (.01, .1, 1, 10, 100)}
    damping = min(missing, key=missing.get)
    CHOSEN.add(damping)
    return 0 * x.T @ error if damping == np.inf else fit(held | ~held, damping)


CHOSEN = set()


@pytest.mark.parametrize("name", WITH_HOLES)
@torch.no_grad()
def test_sequential_mending_is_numpys_ridge_one_sub_block_after_the_other(name):
    """Rows of sqrt(λ) I pull the change to 0. Layer 1 loses its attention; the streams of both models are taken from
    whole forward passes with the sub-blocks mended so far."""
    model, _ = new(WITH_HOLES[name])
    config, windows = model.config, torch.cat([x for x, _ in text(model.config)])
    alive = {key: torch.arange(n)[::2] for key, n in config.widths().items()} | {(1, "kv"): torch.tensor([]).long()}
    small, expected = prune.cut(model, alive), prune.cut(model, alive)
    for layer in range(config.n_layer):
        for kind in ("kv", "ffn"):
            target, _ = stream_behind(model, layer, kind, windows)
            arrived, x = stream_behind(expected, layer, kind, windows)
            if x is None:
                continue
            size = target.square().mean(1, keepdim=True).sqrt()
            x, error = (x / size).numpy(), ((target - arrived) / size).numpy()
            held = np.arange(len(x)) // (8 * len(windows) // 4) == 3          # the last of 4 batches
            change = best(x, error, held)
            expected.get_parameter(reader_of(config, layer, kind)).data += torch.from_numpy(change).T
    mend.mend_sequentially_(small, model, windows, micro_batch=5)             # at most a fourth: 3
    assert name != "all" or len(CHOSEN) > 2
    for (parameter, p), q in zip(small.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("name", WITH_HOLES)
def test_sequential_mending_changes_nothing_where_nothing_went_and_ends_nearer_than_one_pass(name):
    model, _ = new(WITH_HOLES[name])
    batches, last = text(model.config, 8), (model.config.n_layer - 1, "ffn")
    windows = torch.cat([x for x, _ in batches])
    whole = copy.deepcopy(model)
    mend.mend_sequentially_(whole, model, windows)
    assert all((p - q).abs().max() < 1e-12 for p, q in zip(whole.parameters(), model.parameters()))
    alive = {key: torch.arange(n)[:-2] for key, n in model.config.widths().items() if n > 2}
    errors = []
    with torch.no_grad():
        dense, _ = stream_behind(model, *last, windows)
        for how in ("none", "least-squares", "sequential"):
            if how == "sequential":
                small = prune.cut(model, alive)
                mend.mend_sequentially_(small, model, windows)
            else:
                small = prune.cut(model, alive, how, score.collect(model, batches, {"gram"}))
            error = stream_behind(small, *last, windows)[0] - dense
            errors.append((error.square().sum(1) / dense.square().sum(1)).mean().item())
    none, one_pass, sequential = errors
    assert sequential < one_pass and sequential < .9 * none


@pytest.mark.parametrize("how", ["least-squares", "sequential"])
def test_a_sub_block_that_puts_out_nothing_stays_as_it_is(how):
    model, _ = new(WITH_HOLES["all"])
    with torch.no_grad():
        for name, p in model.blocks[0].ffn.named_parameters():
            if not name.startswith("down"):
                p.zero_()
    alive = {key: torch.arange(n)[::2] for key, n in model.config.widths().items()}
    small, batches = prune.cut(model, alive), text(model.config, 4)
    before = small.blocks[0].ffn.down.weight.clone()
    if how == "sequential":
        mend.mend_sequentially_(small, model, torch.cat([x for x, _ in batches]))
    else:
        mend.mend_by_least_squares_(small, model, alive, score.collect(model, batches, {"gram"}).gram)
    assert torch.equal(small.blocks[0].ffn.down.weight, before)
    assert all(p.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("kind", ["ffn", "kv"])
@pytest.mark.parametrize("kept", [[0, 2], []])
def test_bias_puts_the_mean_in_the_place_of_what_went(kind, kept):
    """Of one sub-block, exactly: the dense model, its dropped channels replaced by their means."""
    model, _ = new(WITH_HOLES["all"])
    batches, n = text(model.config), model.config.widths()[0, kind]
    stats, weights = score.collect(model, batches, {"mean"}), copy.deepcopy(model.state_dict())
    alive = without(model.config, 0, kind, *(set(range(n)) - {*kept}))
    small, idx = prune.cut(model, alive, "bias", stats), batches[0][0]
    reader = coupled(model.config, 0, kind)[-1][0]
    each = model.get_parameter(reader).size(1) // n
    gone = [c for c in range(n * each) if c // each not in kept]

    def average(_, args):
        x = args[0].clone()
        x[..., gone] = stats.mean[reader].double()[gone]
        return (x,)
    handle = model.get_submodule(reader.removesuffix(".weight")).register_forward_pre_hook(average)
    expected = model(idx)
    handle.remove()
    assert (small(idx) - expected).abs().max() <= 1e-12 and (small(idx) - model(idx)).abs().max() > 1e-3
    assert (prune.cut(model, alive)(idx) - expected).abs().max() > 1e-4          # without the bias it differs
    assert all(torch.equal(p, weights[key]) for key, p in model.state_dict().items())


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("kind", ["ffn", "kv"])
def test_bias_keeps_the_mean_of_the_output(name, kind):
    model, _ = new(WITH_HOLES[name])
    batches, part = text(model.config), "ffn" if kind == "ffn" else "attn"
    stats, alive = score.collect(model, batches, {"mean"}), without(model.config, 0, kind, 0)
    with torch.no_grad():
        outputs = []
        for changed in (model, prune.cut(model, alive), prune.cut(model, alive, "bias", stats)):
            rows = []
            handle = getattr(changed.blocks[0], part).register_forward_hook(lambda _, args, out: rows.append(out))
            for x, _ in batches:
                changed(x)
            handle.remove()
            outputs.append(torch.cat([out.flatten(0, 1) for out in rows]))
    dense, plain, biased = outputs
    error = lambda other: (other - dense).square().mean().item()
    assert (biased - dense).mean(0).abs().max() <= 1e-5 * dense.abs().max()           # means are float32
    assert (plain - dense).mean(0).abs().max() > 1e-3 * dense.abs().max() and error(biased) < .999 * error(plain)


def test_a_model_with_biases_is_neither_saved_nor_exported(tmp_path):
    model, _ = new(WITH_HOLES["gqa"])
    stats = score.collect(model, text(model.config), {"mean"})
    assert type(prune.cut(model, prune.everything(model.config), "bias", stats)) is GPT   # none went
    small = prune.cut(model, without(model.config, 0, "ffn", 1), "bias", stats)
    for write in (lambda path: checkpoint.save(path, small),
                  lambda path: export.write(export.Export("x", out="y"), small, {}, path)):
        with pytest.raises(UserError, match="for evaluation only, as it has FLAP's biases behind o and down"):
            write(tmp_path / "cut.pt")
    assert not any(tmp_path.iterdir())
