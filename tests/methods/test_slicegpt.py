"""SliceGPT against a dense model whose stream is projected before each sub-block, and against the budget's definition.

The oracle is `projected`: model.py's own blocks in the dense basis, no rotated weight, no shortcut, damping included.
"""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
from common import UserError
from eval import evaluate
from methods import slicegpt as sliced_module
from methods.slicegpt import matrix_params, sliced_to, slicegpt, width
from model import GPT, GPTConfig, rotary
from tasks.questions import loglikelihoods

SHAPE = dict(vocab_size=29, block_size=16, d_model=24, head_dim=4)
LAYERS = dict(n_head=(4, 6), n_kv_head=(4, 6), d_ff=(20, 12))
GQA = LAYERS | dict(n_kv_head=(2, 3))
CONFIGS = {
    "plain": GPTConfig(**SHAPE, **LAYERS),
    "gqa": GPTConfig(**SHAPE, **GQA),
    "bias": GPTConfig(**SHAPE, **GQA, qkv_bias=True),
    "qk norm": GPTConfig(**SHAPE, **GQA, qk_norm=True, norm_eps=1e-2),
    "untied": GPTConfig(**SHAPE, **LAYERS, tie_embeddings=False),
    "all, absent sub-blocks": GPTConfig(**SHAPE, n_head=(0, 4, 2), n_kv_head=(0, 2, 2), d_ff=(12, 20, 0), qkv_bias=True,
                                        qk_norm=True, tie_embeddings=False)}
every_config = pytest.mark.parametrize("name", CONFIGS)


def new(config, dtype=torch.float64):
    """A model with weights far from 0 and gains and biases far from what they start as."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(8 * p if p.dim() == 2 else p + 0.3 * torch.randn_like(p))
    return model


def tokens_of(config, rows, seed):
    return torch.randint(config.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(seed))


def calibration(config):
    return [tokens_of(config, 3, 1), tokens_of(config, 2, 2)[:, :9]]                  # batches of two lengths


@torch.no_grad()
def projected(model, batches, k, idx):
    """-> logits of idx, the stream put onto the k principal directions that the batches have there, before each
    sub-block of the dense model."""
    streams = [model.embed(b) for b in (*batches, idx)]
    turns = [rotary(model.config, 0, x.size(1), x.device, x.dtype) for x in streams]
    for block in model.blocks:
        for norm, layer in ((block.attn_norm, block.attn), (block.ffn_norm, block.ffn)):
            if layer is None:
                continue
            x = torch.cat([s.flatten(0, 1) for s in streams[:-1]])
            gram = x.T @ x
            _, vectors = torch.linalg.eigh(gram + 0.01 * gram.trace() / len(gram) * torch.eye(len(gram)))
            kept = vectors[:, len(gram) - k:]
            streams = [s @ kept @ kept.T for s in streams]
            streams = [s + layer(norm(s), *(turn if layer is block.attn else ())) for s, turn in zip(streams, turns)]
    return F.linear(model.norm(streams[-1]), model.head_weight)


@every_config
def test_nothing_dropped_is_the_dense_model(name):
    model, idx = new(CONFIGS[name]), tokens_of(CONFIGS[name], 2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sliced = sliced_to(model, calibration(model.config), 24)
    assert (sliced(idx) - model(idx)).abs().max() < 1e-9
    assert (sliced.embed.weight - model.embed.weight).abs().max() > 0.1                      # another basis
    sliced.embed.weight.zero_(), sliced.head_weight.zero_(), sliced.norm.weight.zero_()      # and nothing shared
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every_config
@pytest.mark.parametrize("k", [8, 13])
def test_slicing_is_projecting_the_stream_before_each_sub_block(name, k):
    model, idx = new(CONFIGS[name]), tokens_of(CONFIGS[name], 2, 3)
    sliced = sliced_to(model, calibration(model.config), k)
    assert (sliced(idx) - projected(model, calibration(model.config), k, idx)).abs().max() < 1e-9
    assert (sliced(idx) - model(idx)).abs().max() > 0.1


@every_config
def test_a_stream_in_k_directions_is_sliced_exactly(name):
    model, idx, k = new(CONFIGS[name]), tokens_of(CONFIGS[name], 2, 3), 10
    lives = torch.linalg.qr(torch.randn(24, k, dtype=torch.float64))[0]
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight @ lives @ lives.T)
        for block in model.blocks:
            for linear in (getattr(block.attn, "o", None), getattr(block.ffn, "down", None)):
                if linear is not None:
                    linear.weight.copy_(lives @ lives.T @ linear.weight)
    assert (sliced_to(model, calibration(model.config), k)(idx) - model(idx)).abs().max() < 1e-9
    assert (sliced_to(model, calibration(model.config), k - 1)(idx) - model(idx)).abs().max() > 1e-3


@every_config
@pytest.mark.parametrize("keep", [.5, .7, .95])
def test_width_is_the_largest_multiple_of_8_in_the_budget(name, keep):
    wide = {**CONFIGS[name].__dict__, "d_model": 72, "d_ff": tuple(9 * f for f in CONFIGS[name].d_ff)}
    model = new(GPTConfig(**wide), torch.float32)
    budget, batches = keep * model.config.removable_params(), [tokens_of(model.config, 5, 1)]

    def counted(sliced):
        return sum(p.numel() for p in sliced.sub_blocks.parameters()) - \
            sum(p.numel() for key, p in sliced.sub_blocks.named_parameters() if key.endswith("norm.weight"))

    sliced, k = slicegpt(model, batches, keep), width(model.config, keep)
    larger = sliced_to(model, batches, k + 8)
    assert sliced.embed.weight.shape == (29, k) and k % 8 == 0
    assert counted(sliced) == matrix_params(model.config, k) <= budget < counted(larger)
    groups, dense = sliced.params(), model.config.num_params()
    assert sum(groups[key] for key in ("attention", "ffn", "shortcut")) == counted(sliced)
    assert groups["embedding"] == 29 * k and groups["head"] == 29 * 72 and groups["ffn"] < dense["ffn"]
    assert groups["shortcut"] == (len(sliced.sub_blocks) - 1) * k * k + k * 72
    assert groups["total"] == sum(p.numel() for p in sliced.parameters()) == sum(groups.values()) - groups["total"]


@pytest.fixture(scope="module")
def trained():
    """A model that has learned y = 3x + 1 or 5x + 2 (mod 29) by the sequence's first token; its training rows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | dict(d_model=48), n_head=(4, 4), n_kv_head=(2, 2), d_ff=(96, 96)))
    rows = torch.randint(29, (256, 1))
    for _ in range(17):
        x, even = rows[:, -1:], rows[:, :1] % 2 == 0
        rows = torch.cat((rows, torch.where(even, 3 * x + 1, 5 * x + 2) % 29), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        part = rows[step % 4 * 64:][:64]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return model.requires_grad_(False), rows


def test_principal_directions_lose_less_than_random_ones(trained, monkeypatch):
    model, rows = trained
    loss = lambda m: F.cross_entropy(m(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    batches, k = [rows[:64, :-1]], 32                                                        # of 48: a third goes
    ours, random = loss(sliced_to(model, batches, k)), []
    for seed in range(3):
        torch.manual_seed(seed)
        monkeypatch.setattr(sliced_module, "principal", lambda stream: torch.linalg.qr(
            torch.randn(48, 48, dtype=torch.float64))[0])
        random.append(loss(sliced_to(model, batches, k)))
    assert ours - loss(model) < (min(random) - loss(model)) / 2, (loss(model), ours, random)


def test_evaluate_and_loglikelihoods_agree_with_plain_logits(trained):
    sliced = slicegpt(copy.deepcopy(trained[0]).double(), [trained[1][:8, :-1]], .8)
    tokens = np.random.default_rng(0).integers(0, 29, 100).astype(np.uint16)
    rows = torch.from_numpy(np.stack([tokens[a:a + 17] for a in range(0, 96, 16)]).astype(np.int64))
    nats = F.cross_entropy(sliced(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    found = evaluate(sliced, tokens, np.ones(29, np.int64), windows=0, batch=4)
    assert found["tokens"] == 96 and found["loss"] == pytest.approx(nats.item(), rel=1e-9)
    requests = [([3, 1, 4], [1, 5]), ([3, 1, 4], [9]), ([3, 1, 4], [1, 5, 9, 2]), ([2, 7], [1, 8])]       # in trees
    masks, plain_hidden = [], sliced.hidden
    sliced.hidden = lambda idx, **where: masks.append(where) or plain_hidden(idx, **where)
    scores = loglikelihoods(sliced, requests, progress=False)
    sliced.hidden = plain_hidden
    assert any("mask" in where and "positions" in where for where in masks)
    for (context, continuation), (nats, _) in zip(requests, scores):
        log_p = sliced(torch.tensor([context + continuation]))[0].log_softmax(-1)[len(context) - 1:-1]
        assert nats == pytest.approx(sum(log_p[i, token].item() for i, token in enumerate(continuation)), rel=1e-9)


@pytest.mark.parametrize("keep, k", [(.34, 8), (.66, 8), (.67, 16), (.99, 16)])
def test_the_budget_of_the_release_is_a_share_of_the_directions(keep, k):
    model = new(CONFIGS["plain"])
    sliced = slicegpt(model, calibration(model.config), keep, counts_directions=True)
    assert sliced.embed.weight.shape == (29, k)


def test_refusals_are_one_sentence_with_the_numbers_and_the_remedy():
    config, absent = CONFIGS["plain"], GPTConfig(**SHAPE, n_head=(0,), n_kv_head=(0,), d_ff=(0,))
    model, batches = new(config, torch.float32), calibration(config)
    on_mps = SimpleNamespace(config=config, embed=SimpleNamespace(weight=SimpleNamespace(device=torch.device("mps"))))
    calls = [(lambda keep=keep: slicegpt(model, batches, keep), f"keep {keep} must be between 0 and 1")
             for keep in (0, 1, 1.2, -.5, math.nan)]
    least = matrix_params(config, 8)
    calls += [(lambda: slicegpt(model, batches, .4), f"allows 2,457 of 6,144 .* 8 of 24 .* {least:,}.*keep more"),
              (lambda: slicegpt(on_mps, batches, .8), "float64.*on the CPU"),
              (lambda: slicegpt(GPT(absent), batches, .9), "allows 0 of 0"),
              (lambda: slicegpt(model, batches, .3, counts_directions=True), "keep 0.3 of 24 directions is less than"),
              (lambda: slicegpt(model, [tokens_of(config, 1, 0)], .8), "16 calibration tokens .* 24 .*at least 24"),
              (lambda: slicegpt(model, [], .8), "0 calibration tokens"),
              (lambda: sliced_to(model, batches, 8).hidden(batches[0], cache=[[], []]), "cache None")]
    for call, says in calls:
        with pytest.raises(UserError, match=says) as problem:
            call()
        assert "\n" not in str(problem.value)
    assert least == 6144 // 3 + 4 * 8 * 8 + 16 * (12 + 8)           # a third, four shortcuts, the last output unsliced
    with pytest.raises(UserError, match="evaluation only"):
        checkpoint.refuse_evaluation_only(sliced_to(model, batches, 8))
