"""Invariants of prune.py: a dead unit stays dead, slicing is exact, the score is the formula's, budgets are met.

The oracle is `entries`: which parameter entries belong to a unit, by explicit indices and without prune.coupled.
"""
import copy
import math
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import prune
from common import UserError
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=13, block_size=8, d_model=12, head_dim=4)
CONFIGS = {
    "plain": GPTConfig(**SHAPE, n_head=(2, 3), n_kv_head=(2, 3), d_ff=(5, 7)),
    "gqa": GPTConfig(**SHAPE, n_head=(4, 9), n_kv_head=(2, 3), d_ff=(5, 7)),
    "gqa+bias": GPTConfig(**SHAPE, n_head=(4, 9), n_kv_head=(2, 3), d_ff=(5, 7), qkv_bias=True),
    "qk norm": GPTConfig(**SHAPE, n_head=(2, 3), n_kv_head=(2, 3), d_ff=(5, 7), qk_norm=True),
    "all": GPTConfig(**SHAPE, n_head=(6, 3, 4), n_kv_head=(3, 3, 2), d_ff=(6, 3, 8), qkv_bias=True, qk_norm=True,
                     tie_embeddings=False)}
CLIP = 0.1
every_config = pytest.mark.parametrize("name", CONFIGS)
every_kind = pytest.mark.parametrize("kind", ["ffn", "kv"])


def new(config, dtype=torch.float64, seed=0, device="cpu"):
    """A model and its AdamW, built as train.make_optimizer does. Weights far from 0 and gains far from 1."""
    torch.manual_seed(seed)
    model = GPT(config).to(device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(5 * p if p.dim() == 2 else p + 0.2 * torch.randn_like(p))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    return model, torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                    lr=5e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batch(config, step, rank=0):
    tokens = torch.randint(config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1000 * rank + step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, optimizer, steps, first=0, loss=loss_of, rank=0, autocast=False):
    """So many AdamW steps on random tokens, gradients clipped. Returns the smallest gradient norm before clipping."""
    norms, device = [], model.embed.weight.device
    for step in range(first, first + steps):
        x, y = (t.to(device) for t in batch(model.config, step, rank))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            value = loss(model, x, y)
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return min(norms)


def some(config, *kinds):
    """A keep that drops one or more scattered units of these kinds in each layer, in each another number."""
    rng, keep = random.Random(0), prune.everything(config)
    for (layer, kind), n in config.widths().items():
        if kind in kinds:
            keep[layer, kind] = torch.tensor(sorted(rng.sample(range(n), max(1, n - 1 - layer))))
    return keep


def entries(config, layer, kind, unit):
    """[(parameter name, index of the unit's entries in it)]"""
    if kind == "ffn":
        ffn = f"blocks.{layer}.ffn."
        return [(ffn + "gate.weight", [unit]), (ffn + "up.weight", [unit]),
                (ffn + "down.weight", (slice(None), [unit]))]
    D, H, K, attn = config.head_dim, config.n_head[layer], config.n_kv_head[layer], f"blocks.{layer}.attn."
    own = [unit * D + d for d in range(D)]
    served = [h * D + d for h in range(H) if h // (H // K) == unit for d in range(D)]      # Hugging Face's convention
    rows = (("q", served), ("k", own), ("v", own))
    return [(attn + "o.weight", (slice(None), served))] + [
        (f"{attn}{x}.{part}", index) for x, index in rows for part in ("weight", "bias")[:1 + config.qkv_bias]]


def dead_entries(model, keep):
    """{parameter name: bool tensor, true at the entries of units that are not kept}"""
    dead = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for (layer, kind), n in model.config.widths().items():
        for unit in set(range(n)) - set(keep[layer, kind].tolist()):
            for name, index in entries(model.config, layer, kind, unit):
                dead[name][index] = True
    return dead


def split(model, keep):
    """All weights in two vectors: those of dead units, the others."""
    dead, parameters = dead_entries(model, keep), dict(model.named_parameters())
    return [torch.cat([parameters[name].detach()[d == side] for name, d in dead.items()]) for side in (True, False)]


def without(config, layer, kind, *units):
    """The keep that drops exactly these units."""
    return prune.everything(config) | {(layer, kind): torch.tensor(
        [i for i in range(config.widths()[layer, kind]) if i not in units], dtype=torch.long)}


def assert_same_where_alive(model, optimizer, small, small_optimizer, keep, tolerance):
    """Weights, exp_avg, exp_avg_sq and step counts of the small model are the large one's kept entries."""
    dead, large = dead_entries(model, keep), dict(model.named_parameters())
    for name, p in small.named_parameters():
        alive, q = ~dead[name], large[name]
        mine, theirs = small_optimizer.state[p], optimizer.state[q]
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"} and mine["step"] == theirs["step"]
        for a, b in ((p, q), *((mine[moment], theirs[moment]) for moment in ("exp_avg", "exp_avg_sq"))):
            assert a.shape == p.shape and (a.flatten() - b[alive]).abs().max() <= tolerance, name


# -- fact 2: slicing is exact

@every_config
@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_slicing_keeps_the_logits_and_the_next_step(name, kind, dtype, tolerance):
    model, optimizer = new(CONFIGS[name], dtype)
    train(model, optimizer, 20)
    keep, (x, _) = some(model.config, kind), batch(model.config, 0)
    before = model(x)
    prune.zero_(model, optimizer, keep)
    train(model, optimizer, 7, first=20)
    small, small_optimizer = prune.slice(model, optimizer, keep)
    assert small.config.widths() == {key: len(indices) for key, indices in keep.items()}
    assert (small(x) - model(x)).abs().max() <= tolerance
    assert (small(x) - before).abs().max() > 1e-2                              # something was cut
    assert_same_where_alive(model, optimizer, small, small_optimizer, keep, 0)
    norms = [train(*pair, 1, first=27) for pair in ((model, optimizer), (small, small_optimizer))]
    assert min(norms) > 2 * CLIP                                               # clipping binds: all gradients matter
    if dtype == torch.float64:                         # in float32, m / sqrt(v) blows up the rounding of tiny gradients
        assert_same_where_alive(model, optimizer, small, small_optimizer, keep, tolerance)


@pytest.mark.parametrize("kinds", [("ffn",), ("kv",), ("ffn", "kv")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_without_units_loses_the_sub_block_and_its_norm(kinds, layer):
    model, optimizer = new(CONFIGS["all"])
    train(model, optimizer, 20)
    keep = prune.everything(model.config) | {(layer, kind): torch.tensor([], dtype=torch.long) for kind in kinds}
    prune.zero_(model, optimizer, keep)
    train(model, optimizer, 3, first=20)
    small, small_optimizer = prune.slice(model, optimizer, keep)
    x, _ = batch(model.config, 0)
    assert (small(x) - model(x)).abs().max() <= 1e-12
    gone = tuple(f"blocks.{layer}.{part}" for kind in kinds
                 for part in {"ffn": ("ffn.", "ffn_norm."), "kv": ("attn.", "attn_norm.")}[kind])
    assert [key for key in model.state_dict() if not key.startswith(gone)] == list(small.state_dict())
    for pair in ((model, optimizer), (small, small_optimizer)):
        train(*pair, 1, first=23)
    assert_same_where_alive(model, optimizer, small, small_optimizer, keep, 1e-12)
    absent = prune.everything(small.config)                                    # what is not there is no trouble later
    prune.zero_(small, small_optimizer, absent)
    assert torch.equal(prune.slice(small, small_optimizer, absent)[0](x), small(x))
    assert {key: len(s) for key, s in prune.sensitivity(small).items()} == small.config.widths()


@every_config
def test_a_sliced_model_is_a_model_of_its_own(name):
    model, optimizer = new(CONFIGS[name], torch.float32)
    train(model, optimizer, 3)
    model.blocks[0].attn_norm.weight.requires_grad_(False)
    optimizer.param_groups[0].update(lr=0.0125, initial_lr=0.5)
    keep = some(model.config, "ffn")
    prune.zero_(model, optimizer, keep)
    small, small_optimizer = prune.slice(model, optimizer, keep)
    assert list(small.state_dict()) == list(GPT(small.config).state_dict())
    large, name_of = dict(model.named_parameters()), {p: key for m in (model, small) for key, p in m.named_parameters()}
    for key, p in small.named_parameters():
        q = large[key]
        assert (p.dtype, p.device, p.requires_grad, p.is_leaf) == (q.dtype, q.device, q.requires_grad, True), key
    assert type(small_optimizer) is type(optimizer)
    for mine, theirs in zip(small_optimizer.param_groups, optimizer.param_groups, strict=True):
        assert [name_of[p] for p in mine["params"]] == [name_of[p] for p in theirs["params"]]
        assert {**mine, "params": 0} == {**theirs, "params": 0}                # lr, betas, eps, weight_decay, fused, …
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    train(small, small_optimizer, 2)                                           # and leaves the large one as it is
    assert all(torch.equal(p, before[0][key]) for key, p in model.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][i][key]) for key, v in state.items())
    alone, none = prune.slice(model, None, keep)
    assert none is None and alone.config == small.config


# -- fact 1: a dead unit stays dead

def life_after_death(model, optimizer, keep, moments=True, steps=100, **how):
    """Train, cut, train on; -> weights of the dead units at the end."""
    train(model, optimizer, 20, **how)
    assert split(model, keep)[0].numel() and (split(model, keep)[0] != 0).all()
    prune.zero_(model, optimizer if moments else None, keep)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, steps, first=20, **how)
    assert (split(model, keep)[1] != 0).all()                                  # and nobody else died
    return split(model, keep)[0]


@every_config
@every_kind
def test_a_dead_unit_stays_dead(name, kind):
    assert (life_after_death(*new(CONFIGS[name], torch.float32), some(CONFIGS[name], kind)) == 0).all()


@every_config
@every_kind
def test_a_unit_whose_moments_live_comes_back(name, kind):
    """The control of the test above: units stay dead because zero_ zeroes the moments too."""
    dead = life_after_death(*new(CONFIGS[name], torch.float32), some(CONFIGS[name], kind), moments=False, steps=20)
    assert (dead != 0).any()


@every_config
def test_bfloat16_autocast_keeps_units_dead(name):
    keep = some(CONFIGS[name], "ffn", "kv")
    assert (life_after_death(*new(CONFIGS[name], torch.float32), keep, autocast=True) == 0).all()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling for a CPU takes inductor a minute")


@pytest.mark.parametrize("backend, device", [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=needs_gpu)])
def test_compiled_training_keeps_units_dead_and_never_recompiles(backend, device):
    torch.compiler.reset()
    config, compiled = CONFIGS["all"], torch.compile(loss_of, backend=backend, dynamic=False)
    model, optimizer = new(config, torch.float32, device=device)
    keep = some(config, "ffn", "kv")
    assert (life_after_death(model, optimizer, keep, loss=compiled, autocast=device == "cuda") == 0).all()


def ddp_worker(rank, folder):
    """One of two processes, each with data of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer = new(CONFIGS["all"], torch.float32, seed=rank)           # DDP makes the weights equal
    wrapped = DistributedDataParallel(model)
    dead = life_after_death(model, optimizer, some(CONFIGS["all"], "ffn", "kv"), rank=rank,
                            loss=lambda _, x, y: loss_of(wrapped, x, y))
    both = [torch.empty_like(model.embed.weight) for _ in range(2)]
    dist.all_gather(both, model.embed.weight.detach())
    assert (dead == 0).all() and torch.equal(*both)
    dist.barrier()
    os._exit(0)                                 # gloo's threads have been seen to abort a process that ended normally


def test_ddp_keeps_units_dead(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)


# -- units and scores

@every_config
def test_sensitivity_is_the_mean_of_w_times_g_over_a_units_entries(name):
    model, _ = new(CONFIGS[name])
    loss_of(model, *batch(model.config, 0)).backward()
    scores, parameters = prune.sensitivity(model), dict(model.named_parameters())
    assert scores.keys() == model.config.widths().keys()
    for (layer, kind), n in model.config.widths().items():
        for unit in range(n):
            wg = torch.cat([(parameters[key] * parameters[key].grad)[index].flatten()
                            for key, index in entries(model.config, layer, kind, unit)])
            expected = wg.abs().mean().float()
            assert len(wg) == model.config.unit_params(layer, kind)
            assert expected > 0 and scores[layer, kind].dtype == torch.float32
            torch.testing.assert_close(scores[layer, kind][unit], expected, rtol=1e-6, atol=0)


@every_config
def test_killing_a_kv_group_removes_exactly_its_query_heads(name):
    config, (x, _) = CONFIGS[name], batch(CONFIGS[name], 0)
    for layer, (H, K) in enumerate(zip(config.n_head, config.n_kv_head)):
        for j in range(K):
            whole, killed, unheard, silent = (new(config)[0] for _ in range(4))
            keep, g, D = without(config, layer, "kv", j), H // K, config.head_dim
            prune.zero_(killed, None, keep)
            with torch.no_grad():
                unheard.blocks[layer].attn.o.weight[:, j * g * D:(j + 1) * g * D] = 0    # query heads j·g … (j+1)·g-1
                for p in silent.blocks[layer].attn.v.parameters():                       # KV head j
                    p[j * D:(j + 1) * D] = 0
            assert (killed(x) - unheard(x)).abs().max() <= 1e-12
            assert (killed(x) - silent(x)).abs().max() <= 1e-12
            assert (killed(x) - whole(x)).abs().max() > 1e-4
            (dead, alive), (_, same) = split(killed, keep), split(whole, keep)
            assert (dead == 0).all() and torch.equal(alive, same)


def test_moving_averages_against_written_out_numbers():
    key, averages = (0, "ffn"), [None]
    for fresh in ([1., 4.], [2., 2.], [3., 1.]):
        averages.append(prune.average(averages[-1], {key: torch.tensor(fresh, dtype=torch.float64)}))
    expected = [[1, 4], [0, 0]], \
        [[1.15, 3.7], [.0425, .085]], \
        [[1.4275, 3.295], [.119, .1955]]
    # 0.85·1 + 0.15·2, 0.85·4 + 0.15·2; the change is from the new mean: 0.05·|2 - 1.15|, 0.05·|2 - 3.7|
    # 0.85·1.15 + 0.15·3, 0.85·3.7 + 0.15·1; 0.95·0.0425 + 0.05·|3 - 1.4275|, 0.95·0.085 + 0.05·|1 - 3.295|
    for found, numbers in zip(averages[1:], expected):                         # earlier ones were not overwritten
        torch.testing.assert_close(found[key], torch.tensor(numbers, dtype=torch.float64))


def test_ranking_puts_dead_units_last_and_uncertainty_can_turn_the_order():
    key, averages = (0, "kv"), {(0, "kv"): torch.tensor([[3., 2., 9., 1.], [.1, 1., 5., .5]])}
    keep = {key: torch.tensor([0, 1, 3])}
    plain, uncertain = prune.ranking(averages, keep), prune.ranking(averages, keep, uncertainty=True)
    assert plain[key].tolist() == [3, 2, -math.inf, 1]
    torch.testing.assert_close(uncertain[key], torch.tensor([.3, 2., -math.inf, .5]))
    assert [prune.choose(scores, {key: 2})[key].tolist() for scores in (plain, uncertain)] == [[0, 1], [1, 3]]


# -- budgets and choice

def random_start_and_target(rng):
    """A config with uneven layers, some of them without attention or FFN, and a smaller one: kv, ffn or both shrink."""
    layers, shrinking = range(rng.randint(1, 5)), rng.choice([("ffn",), ("kv",), ("ffn", "kv")])
    kv = [rng.randint(0, 6) for _ in layers]
    start = GPTConfig(**SHAPE, n_head=[k * rng.randint(1, 3) for k in kv], n_kv_head=kv, qkv_bias=rng.random() < .5,
                      d_ff=[rng.randint(l == 0, 40) for l in layers])
    return start, start.resized({key: rng.randint(0, n) for key, n in start.widths().items() if key[1] in shrinking})


@pytest.mark.parametrize("seed", range(100))
def test_allocations_meet_every_budget_on_the_way_to_the_target(seed):
    rng = random.Random(seed)
    start, target = random_start_and_target(rng)
    whole, least, first, last = start.removable_params(), target.removable_params(), start.widths(), target.widths()
    assert prune.allocate(start, target, 1.0, first) == first
    at_most = first
    for size in [*sorted((rng.uniform(least / whole, 1) for _ in range(6)), reverse=True), least / whole]:
        widths = prune.allocate(start, target, size, at_most)
        assert widths == prune.allocate(start, target, size, dict(reversed(at_most.items())))
        assert widths.keys() == first.keys() and all(widths[key] <= at_most[key] for key in first)
        budget = math.floor(size * whole + 1e-6)                               # least / whole · whole may round down
        missing = budget - start.resized(widths).removable_params()
        assert 0 <= missing < min((start.unit_params(*k) for k in first if widths[k] < at_most[k]), default=math.inf)
        share = (budget - least) / max(1, whole - least)                       # nobody goes ahead of the straight way
        assert all(widths[k] >= math.floor(last[k] + share * (first[k] - last[k])) for k in first)
        at_most = widths
    assert widths == last


def test_equal_layers_shrink_together():
    start = GPTConfig(**SHAPE, n_head=(4,) * 4, n_kv_head=(2,) * 4, d_ff=(40,) * 4)
    target = start.resized({(l, "ffn"): 16 for l in range(4)})
    for budget in range(target.removable_params(), start.removable_params(), 11):
        d_ff = start.resized(prune.allocate(start, target, budget / start.removable_params(), start.widths())).d_ff
        assert max(d_ff) - min(d_ff) <= 1 and list(d_ff) == sorted(d_ff, reverse=True)     # ties: the first layers


@pytest.mark.parametrize("seed", range(20))
def test_choose_takes_the_best_ties_by_index_dead_ones_never(seed):
    rng, scores, widths = random.Random(seed), {}, {}
    for key in [(0, "ffn"), (0, "kv"), (3, "ffn")]:
        values = [rng.choice([-math.inf, 0., 1., 2., rng.random()]) for _ in range(rng.randint(1, 40))]
        scores[key], widths[key] = torch.tensor(values), rng.randint(0, sum(v > -math.inf for v in values))
    copies = copy.deepcopy(scores)
    for key, chosen in prune.choose(scores, widths).items():
        best = sorted(range(len(scores[key])), key=lambda i: (-scores[key][i].item(), i))[:widths[key]]
        assert chosen.tolist() == sorted(best) and (scores[key][chosen] > -math.inf).all()
        assert torch.equal(scores[key], copies[key])                           # pure


# -- does the score mean anything?

@pytest.fixture(scope="module")
def learned():
    """A model after 150 steps of "the next token is the sum of the last two, mod 11"; 8 batches of the task."""
    config = GPTConfig(vocab_size=11, block_size=16, d_model=24, head_dim=12, n_head=(2,), n_kv_head=(2,), d_ff=(32,))
    tokens = torch.randint(11, (8, 32, 17), generator=torch.Generator().manual_seed(1))
    for i in range(2, 17):
        tokens[..., i] = (tokens[..., i - 1] + tokens[..., i - 2]) % 11
    model, optimizer = new(config, torch.float32)
    with torch.no_grad():
        for p in optimizer.param_groups[0]["params"]:
            p *= 0.4                                                           # large weights learn by heart
    for step in range(150):
        optimizer.zero_grad()
        loss_of(model, tokens[step % 8, :, :-1], tokens[step % 8, :, 1:]).backward()
        optimizer.step()
    return model, tokens


def score_of_neurons(model, tokens):
    """The mean of the score over the batches."""
    scores = []
    for rows in tokens:
        model.zero_grad()
        loss_of(model, rows[:, :-1], rows[:, 1:]).backward()
        scores.append(prune.sensitivity(model)[0, "ffn"])
    return torch.stack(scores).mean(0)


def test_useless_neurons_rank_last(learned):
    model, tokens = copy.deepcopy(learned[0]), learned[1]
    block, inputs = model.blocks[0], []
    with torch.no_grad():
        model.embed.weight[:, 0], block.ffn_norm.weight[0] = 5, 1              # a channel that is always positive
        block.ffn.gate.weight[[8, 30]] = torch.tensor([-100.] + [0.] * 23)     # shut gates, whatever their weights
        block.ffn.down.weight[:, [3, 17]] = 0                                  # nobody hears these
    block.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    lowest = score_of_neurons(model, tokens).argsort()[:4]
    assert torch.cat(inputs)[..., 0].min() > 1                                 # so silu(gate) <= 100·exp(-100)
    assert set(lowest.tolist()) == {3, 17, 8, 30}


def test_score_agrees_with_leaving_one_out(learned):
    model, tokens = learned
    x, y = tokens.flatten(0, 1)[:, :-1], tokens.flatten(0, 1)[:, 1:]
    score, base, change = score_of_neurons(model, tokens), loss_of(model, x, y).item(), []
    for unit in range(32):
        prune.zero_(lone := copy.deepcopy(model), None, without(model.config, 0, "ffn", unit))
        change.append(loss_of(lone, x, y).item() - base)
    spearman = torch.corrcoef(torch.stack([score, torch.tensor(change)]).argsort().argsort().double())[0, 1].item()
    print(f"loss {base:.3f} of {math.log(11):.3f} nats per token; Spearman of score and loss change {spearman:.2f}")
    assert spearman >= 0.5


# -- the command

@pytest.mark.parametrize("seed", range(20))
def test_a_global_allocation_keeps_the_best_of_all_layers_within_the_budget(seed):
    rng = random.Random(seed)
    config = CONFIGS[rng.choice(list(CONFIGS))]
    scores = {key: torch.rand(n, generator=torch.Generator().manual_seed(seed)) for key, n in config.widths().items()}
    scores = {key: (s * 8).round() for key, s in scores.items()}                       # with ties
    size = rng.random()
    widths = allocate.once(config, size, "global", scores)
    small = config.resized(widths)
    budget = math.floor(size * config.removable_params() + 1e-6)
    gone = [key for key, n in config.widths().items() if widths[key] < n]
    assert 0 <= budget - small.removable_params() < min([config.unit_params(*key) for key in gone], default=1)
    keep = prune.choose(scores, widths)
    for key in gone:                 # nothing kept that is at least as large as a unit that went scores below it
        best = max(s for i, s in enumerate(scores[key].tolist()) if i not in keep[key].tolist())
        for other, kept in keep.items():
            if config.unit_params(*other) >= config.unit_params(*key) and len(kept):
                assert scores[other][kept].min() >= best


@pytest.mark.parametrize("seed", range(60))
def test_one_cut_meets_its_budget_in_blocks_and_leaves_other_kinds_alone(seed):
    rng = random.Random(seed)
    how, kinds, m = rng.choice(prune.SHARES), rng.choice([("ffn",), ("kv",), ("ffn", "kv")]), rng.choice([1, 2, 4])
    L = rng.randint(1, 4)
    shape = lambda low: [rng.randint(low, 6) for _ in range(L)] if how != "uniform-strict" else [rng.randint(1, 6)] * L
    kv, d_ff, g = shape(0), [4 * f + rng.choice([0, 1]) * (m == 4) for f in shape(0)], rng.randint(1, 3)
    d_ff = [d_ff[0]] * L if how == "uniform-strict" else d_ff
    config = GPTConfig(**SHAPE, n_head=[g * k for k in kv], n_kv_head=kv, d_ff=d_ff)
    scores = {key: torch.rand(n, generator=torch.Generator().manual_seed(seed)) for key, n in config.widths().items()}
    fixed = config.resized({key: 0 for key in config.widths() if key[1] in kinds}).removable_params()
    whole = config.removable_params()
    size = (fixed + rng.random() * (whole - fixed)) / max(1, whole) + 1e-9
    widths = allocate.once(config, size, how, scores, kinds, m)
    left = math.floor(size * whole + 1e-6) - config.resized(widths).removable_params()
    assert left >= 0 and all(widths[key] == n for key, n in config.widths().items() if key[1] not in kinds)
    for (layer, kind), n in config.widths().items():
        step = m if kind == "ffn" else 1
        assert widths[layer, kind] % step == 0 or widths[layer, kind] == n
        if widths[layer, kind] < n:
            more = min(step, n - widths[layer, kind]) * config.unit_params(layer, kind)
            assert left < more * (L if how == "uniform-strict" else 1)
        if how == "uniform-strict":
            assert widths[layer, kind] == widths[0, kind]
    if how == "uniform":                                          # no two layers' shares are two steps apart
        for kind in kinds:
            kept = [(widths[l, kind] / n, step / n) for (l, k), n in config.widths().items() if k == kind and n
                    for step in [m if kind == "ffn" else 1]]
            assert all(a - b <= one + other + 1e-9 for a, one in kept for b, other in kept)


def test_one_cut_refuses_what_cannot_be():
    config = CONFIGS["plain"]
    with pytest.raises(UserError, match="--keep 0.1 leaves .* too few, as only kv may go"):
        allocate.once(config, .1, "uniform", kinds=("kv",))
    with pytest.raises(UserError, match="keeps layers equal, and these differ"):
        allocate.once(config, .5, "uniform-strict")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import train as train_py
    out = tmp_path_factory.mktemp("trained") / "run"
    train_py.main(train_py.Train(plan="scratch", preset="toy", steps=150, batch_tokens=512, micro_batch=8,
                                 eval_windows=8, device="cpu", out=str(out)), quiet=True)
    return out


@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_the_command_cuts_to_the_budget_and_better_than_the_opposite_order(trained, tmp_path, allocate, capsys,
                                                                          monkeypatch):
    settings = dict(init=str(trained), keep=.5, allocate=allocate, windows=16, eval_windows=64, device="cpu")
    prune.main(prune.Prune(**settings, out=str(tmp_path / "cut")))
    said = capsys.readouterr().out
    model, about = checkpoint.load(tmp_path / "cut")
    full = checkpoint.load(trained)[0].config
    left = full.removable_params() / 2 - model.config.removable_params()
    assert 0 <= left < max(full.unit_params(0, "ffn"), full.unit_params(0, "kv"))
    if allocate == "uniform":
        assert model.config.d_ff == (32, 32) and model.config.n_kv_head == (1, 1)
    before, after = (float(line.split("parameters")[1].split()[0]) for line in said.splitlines()[:2])
    opposite = prune.sensitivity
    monkeypatch.setattr(prune, "sensitivity", lambda model: {key: -s for key, s in opposite(model).items()})
    prune.main(prune.Prune(**settings, out=str(tmp_path / "worst")))
    worst = float(capsys.readouterr().out.splitlines()[1].split("parameters")[1].split()[0])
    assert before < after < worst - .1
    import eval as evaluation
    evaluation.main(evaluation.Eval(str(tmp_path / "cut"), windows=64, device="cpu"))      # the same hold-out
    assert f"{after:.4f} nats per token" in capsys.readouterr().out
    prune.main(prune.Prune(**settings, block_size=16, out=str(tmp_path / "short")))   # of the windows
    assert checkpoint.load(tmp_path / "short")[0].config.block_size == 64


def test_the_command_refuses_in_a_sentence_and_overwrites_nothing(trained, tmp_path):
    for settings, sentence in ((dict(), "say what to cut by --init"), (dict(init=str(trained), keep=1.), "--keep 1.0"),
                               (dict(init=str(trained), allocate="fair"), "--allocate 'fair' must be"),
                               (dict(init=str(trained), structure="ffn,heads"), "--structure 'ffn,heads' of ffn,kv"),
                               (dict(init=str(trained), multiple_of=0), "--multiple-of 0"),
                               (dict(init=str(trained), out=str(trained)), "is there already"),
                               (dict(init=str(trained), windows=0), "--windows 0"),
                               (dict(init=str(trained), windows=6), "--windows 6 is no multiple .* 4; try 8"),
                               (dict(init=str(trained), block_size=65), "context of 64 tokens, not 65")):
        with pytest.raises(UserError, match=sentence):
            prune.main(prune.Prune(**{"out": str(tmp_path / "cut"), "device": "cpu"} | settings))
    assert not (tmp_path / "cut").exists()
