"""Invariants of prune.py: a dead unit stays dead, slicing is exact, the score is the formula's, budgets are met.

`entries` says, by explicit indices and without prune.coupled, which parameter entries belong to a unit; it is the oracle here.
"""
import copy
import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import prune
from model import GPT, GPTConfig

torch.set_num_threads(1)
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


def new(config, dtype=torch.float64, seed=0, gain=5.0):
    """A model and its AdamW as train.make_optimizer builds it. Weights `gain` x larger than at init, and none at 0 or 1."""
    torch.manual_seed(seed)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * gain if p.dim() == 2 else p + 0.2 * torch.randn_like(p))
    matrices, vectors = [[p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False)]
    return model, torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                    lr=5e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batch(config, step, rank=0):
    tokens = torch.randint(config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1000 * rank + step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, optimizer, steps, first=0, module=None, rank=0, autocast=False):
    """So many AdamW steps on random tokens, gradients clipped. Returns the smallest gradient norm before clipping."""
    least, loss = math.inf, torch.no_grad()
    for step in range(first, first + steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (module or loss_of)(model, *batch(model.config, step, rank))
        optimizer.zero_grad()
        loss.backward()
        least = min(least, torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return least


def some(config, kind, seed=0):
    """A keep that drops one or more scattered units of one kind in each layer, and a different number in each."""
    rng = random.Random(seed)
    keep = prune.everything(config)
    for layer in range(config.n_layer):
        n = config.widths()[layer, kind]
        keep[layer, kind] = torch.tensor(sorted(rng.sample(range(n), max(1, n - 1 - layer))))
    return keep


def entries(config, layer, kind, unit):
    """[(parameter name, index of the unit's entries)]: rows lists, or (slice, columns)."""
    if kind == "ffn":
        rows, ffn = [unit], f"blocks.{layer}.ffn."
        return [(ffn + "gate.weight", rows), (ffn + "up.weight", rows), (ffn + "down.weight", (slice(None), rows))]
    D, H, K = config.head_dim, config.n_head[layer], config.n_kv_head[layer]
    own = [unit * D + d for d in range(D)]
    served = [h * D + d for h in range(H) if h // (H // K) == unit for d in range(D)]    # Hugging Face's convention
    attn = f"blocks.{layer}.attn."
    found = [(attn + "q.weight", served), (attn + "k.weight", own), (attn + "v.weight", own),
             (attn + "o.weight", (slice(None), served))]
    return found + [(attn + f"{x}.bias", rows) for x, rows in zip("qkv", (served, own, own)) if config.qkv_bias]


def dead_entries(model, keep):
    """{parameter name: bool tensor, true at the entries of units that are not kept}"""
    dead = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for (layer, kind), n in model.config.widths().items():
        for unit in set(range(n)) - set(keep[layer, kind].tolist()):
            for name, index in entries(model.config, layer, kind, unit):
                dead[name][index] = True
    return dead


def dead_values(model, keep):
    """All weights of dead units, as one vector."""
    dead = dead_entries(model, keep)
    return torch.cat([p.detach()[dead[name]] for name, p in model.named_parameters()])


def assert_same_where_alive(model, optimizer, small, small_optimizer, keep, tolerance):
    """Weights, exp_avg, exp_avg_sq and step counts of the small model are the large one's kept entries."""
    dead, large = dead_entries(model, keep), dict(model.named_parameters())
    for name, p in small.named_parameters():
        alive, q = ~dead[name], large[name]
        assert (p.flatten() - q[alive]).abs().max() <= tolerance, name
        mine, theirs = small_optimizer.state[p], optimizer.state[q]
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert mine["step"] == theirs["step"], name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert mine[moment].shape == p.shape
            assert (mine[moment].flatten() - theirs[moment][alive]).abs().max() <= tolerance, (name, moment)


# -- fact 2: slicing is exact

@every_config
@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_slicing_keeps_the_logits_and_the_next_step(name, kind, dtype, tolerance):
    model, optimizer = new(CONFIGS[name], dtype)
    train(model, optimizer, 20)
    keep = some(model.config, kind)
    before = model(batch(model.config, 0)[0])
    prune.zero_(model, optimizer, keep)
    train(model, optimizer, 7, first=20)
    small, small_optimizer = prune.slice(model, optimizer, keep)
    assert small.config.widths() == {key: len(indices) for key, indices in keep.items()}
    x, _ = batch(model.config, 0)
    assert (small(x) - model(x)).abs().max() <= tolerance
    assert (small(x) - before).abs().max() > 1e-2                              # something was cut
    assert_same_where_alive(model, optimizer, small, small_optimizer, keep, 0)
    norms = [train(*pair, 1, first=27) for pair in ((model, optimizer), (small, small_optimizer))]
    assert min(norms) > 2 * CLIP                                               # the clipping binds, so all gradients matter
    if dtype == torch.float64:                         # in float32, m / sqrt(v) makes much of the rounding of small gradients
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
    gone = {name for name, _ in model.named_parameters()} - {name for name, _ in small.named_parameters()}
    parts = {"ffn": "ffn", "kv": "attn"}
    assert gone == {name for name, _ in model.named_parameters() for kind in kinds
                    if name.startswith((f"blocks.{layer}.{parts[kind]}.", f"blocks.{layer}.{parts[kind]}_norm."))}
    for pair in ((model, optimizer), (small, small_optimizer)):
        train(*pair, 1, first=23)
    assert_same_where_alive(model, optimizer, small, small_optimizer, keep, 1e-12)


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
    large = dict(model.named_parameters())
    for key, p in small.named_parameters():
        q = large[key]
        assert (p.dtype, p.device, p.requires_grad, p.is_leaf) == (q.dtype, q.device, q.requires_grad, True), key
    assert type(small_optimizer) is type(optimizer)
    names = [{p: key for key, p in m.named_parameters()} for m in (model, small)]
    for mine, theirs in zip(small_optimizer.param_groups, optimizer.param_groups, strict=True):
        assert [names[1][p] for p in mine["params"]] == [names[0][p] for p in theirs["params"]]
        assert {**mine, "params": 0} == {**theirs, "params": 0}                # lr, betas, eps, weight_decay, fused, …
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    train(small, small_optimizer, 2)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert all(torch.equal(v, after[1][i][key]) for i, state in before[1].items() for key, v in state.items())
    alone, none = prune.slice(model, None, keep)
    assert none is None and alone.config == small.config


# -- fact 1: a dead unit stays dead

def life_after_death(config, kind, moments=True, steps=100, **how):
    """Train, cut, train on; -> weights of the dead units at the end."""
    model, optimizer = new(config, torch.float32)
    train(model, optimizer, 20, **how)
    keep = some(config, kind)
    alive = dead_values(model, keep)
    assert alive.numel() and (alive != 0).all()
    prune.zero_(model, optimizer if moments else None, keep)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, steps, first=20, **how)
    return dead_values(model, keep)


@every_config
@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_a_dead_unit_stays_dead(name, kind, autocast):
    assert (life_after_death(CONFIGS[name], kind, autocast=autocast) == 0).all()


@every_config
@every_kind
def test_a_unit_whose_moments_live_comes_back(name, kind):
    """The control of the test above: what keeps units dead is that zero_ zeroes the moments too."""
    assert (life_after_death(CONFIGS[name], kind, moments=False, steps=1) != 0).any()
    assert (life_after_death(CONFIGS[name], kind, moments=False) != 0).any()


@every_config
@every_kind
def test_compiled_training_keeps_units_dead_and_never_recompiles(name, kind):
    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", dynamic=False)
    assert (life_after_death(CONFIGS[name], kind, module=compiled) == 0).all()


@pytest.mark.parametrize("kind", ["kv"])
def test_inductor_keeps_units_dead(kind):
    torch.compiler.reset()
    config = GPTConfig(**SHAPE, n_head=(4,), n_kv_head=(2,), d_ff=(6,), qkv_bias=True, qk_norm=True)
    assert (life_after_death(config, kind, module=torch.compile(loss_of, dynamic=False)) == 0).all()


def ddp_worker(rank, folder):
    """One of two processes: both kinds, all configs, each process on data of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for config in CONFIGS.values():
        model, optimizer = new(config, torch.float32, seed=rank)               # DDP makes the weights equal
        wrapped = DistributedDataParallel(model)
        how = dict(rank=rank, module=lambda model, x, y, wrapped=wrapped: loss_of(wrapped, x, y))
        train(model, optimizer, 20, **how)
        keep = {key: some(config, key[1])[key] for key in config.widths()}
        prune.zero_(model, optimizer, keep)
        train(model, optimizer, 100, first=20, **how)
        dead = dead_values(model, keep)
        assert dead.numel() and (dead == 0).all()
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both)
    dist.destroy_process_group()


def test_ddp_keeps_units_dead(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)


# -- units and scores

@every_config
def test_units_partition_the_removable_parameters(name):
    config = CONFIGS[name]
    model, _ = new(config)
    times = {key: torch.zeros_like(p, dtype=torch.long) for key, p in model.named_parameters()}
    for (layer, kind), n in config.widths().items():
        for unit in range(n):
            size = 0
            for key, index in entries(config, layer, kind, unit):
                times[key][index] += 1
                size += times[key][index].numel()
            assert size == config.unit_params(layer, kind)
    for key, t in times.items():
        removable = ".ffn." in key or ".attn." in key and "_norm" not in key
        assert (t == removable).all(), key


@every_config
def test_sensitivity_is_the_mean_of_w_times_g_over_a_units_entries(name):
    model, _ = new(CONFIGS[name])
    loss_of(model, *batch(model.config, 0)).backward()
    scores, parameters = prune.sensitivity(model), dict(model.named_parameters())
    assert scores.keys() == model.config.widths().keys()
    for (layer, kind), n in model.config.widths().items():
        expected = torch.zeros(n, dtype=torch.float64)
        for unit in range(n):
            found = [(key, index) for key, index in entries(model.config, layer, kind, unit)]
            w = torch.cat([parameters[key].detach()[index].flatten() for key, index in found])
            g = torch.cat([parameters[key].grad[index].flatten() for key, index in found])
            expected[unit] = (w * g).abs().mean()
        assert scores[layer, kind].dtype == torch.float32 and expected.min() > 0
        torch.testing.assert_close(scores[layer, kind].double(), expected, rtol=1e-6, atol=0)


@every_config
def test_killing_a_kv_group_removes_exactly_its_query_heads(name):
    config = CONFIGS[name]
    x, _ = batch(config, 0)
    for layer, (H, K) in enumerate(zip(config.n_head, config.n_kv_head)):
        for j in range(K):
            killed, muted, silent = (new(config)[0] for _ in range(3))
            before = killed(x)
            prune.zero_(killed, None, {(layer, "kv"): torch.tensor([i for i in range(K) if i != j])})
            g, D = H // K, config.head_dim
            with torch.no_grad():
                muted.blocks[layer].attn.o.weight[:, j * g * D:(j + 1) * g * D] = 0      # query heads j·g … (j+1)·g-1 unheard
                v = silent.blocks[layer].attn.v                                          # KV head j says nothing
                for p in v.parameters():
                    p[j * D:(j + 1) * D] = 0
            assert (killed(x) - muted(x)).abs().max() <= 1e-12
            assert (killed(x) - silent(x)).abs().max() <= 1e-12
            assert (killed(x) - before).abs().max() > 1e-4
            spared = ~torch.cat([d.flatten() for d in dead_entries(killed, prune.everything(config) | {
                (layer, "kv"): torch.tensor([i for i in range(K) if i != j], dtype=torch.long)}).values()])
            flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (killed, new(config)[0])]
            assert torch.equal(*(f[spared] for f in flat)) and (flat[0][~spared] == 0).all()


def test_moving_averages_against_written_out_numbers():
    key = (0, "ffn")
    first, second, third = (torch.tensor(i, dtype=torch.float64) for i in ([1., 4.], [2., 2.], [3., 1.]))
    one = prune.average(None, {key: first})
    two = prune.average(one, {key: second})
    three = prune.average(two, {key: third})
    assert one[key].tolist() == [[1, 4], [0, 0]]                               # and was not changed by the second call
    # mean 0.85·1 + 0.15·2, 0.85·4 + 0.15·2; change 0.05·|2 - 1.15|, 0.05·|2 - 3.7|: the mean is the new one
    torch.testing.assert_close(two[key], torch.tensor([[1.15, 3.7], [.0425, .085]], dtype=torch.float64))
    # mean 0.85·1.15 + 0.15·3, 0.85·3.7 + 0.15; change 0.95·0.0425 + 0.05·|3 - 1.4275|, 0.95·0.085 + 0.05·|1 - 3.295|
    torch.testing.assert_close(three[key], torch.tensor([[1.4275, 3.295], [.119, .1955]], dtype=torch.float64))


def test_ranking_puts_dead_units_last_and_uncertainty_can_turn_the_order():
    key, averages = (0, "kv"), {(0, "kv"): torch.tensor([[3., 2., 9., 1.], [.1, 1., 5., .5]])}
    keep = {key: torch.tensor([0, 1, 3])}
    assert prune.ranking(averages, keep)[key].tolist() == [3, 2, -math.inf, 1]
    torch.testing.assert_close(prune.ranking(averages, keep, uncertainty=True)[key], torch.tensor([.3, 2., -math.inf, .5]))
    assert prune.choose(prune.ranking(averages, keep), {key: 2})[key].tolist() == [0, 1]
    assert prune.choose(prune.ranking(averages, keep, uncertainty=True), {key: 2})[key].tolist() == [1, 3]


# -- budgets and choice

def random_start_and_target(rng):
    """A config with uneven layers, some of them without attention or FFN, and a smaller one."""
    layers, bias, flags = rng.randint(1, 5), rng.random() < .5, [rng.choice(["ffn", "kv", "both"]) for _ in range(5)]
    group = [rng.randint(1, 3) for _ in range(layers)]
    kv, ff = ([rng.randint(0, high) for _ in range(layers)] for high in (6, 40))
    start = GPTConfig(**SHAPE, n_head=[k * g for k, g in zip(kv, group)], n_kv_head=kv, d_ff=ff, qkv_bias=bias)
    shrinks = {"ffn": flags[0] != "kv", "kv": flags[0] != "ffn"}
    return start, start.resized({(l, kind): rng.randint(0, n) if shrinks[kind] else n
                                 for (l, kind), n in start.widths().items()})


@pytest.mark.parametrize("seed", range(200))
def test_allocations_meet_every_budget_on_the_way_to_the_target(seed):
    rng = random.Random(seed)
    start, target = random_start_and_target(rng)
    whole, least = start.removable_params(), target.removable_params()
    if whole == 0:
        return
    at_most, first, last = start.widths(), start.widths(), target.widths()
    assert prune.allocate(start, target, 1.0, at_most) == first
    for size in [*sorted((rng.uniform(least / whole, 1) for _ in range(6)), reverse=True), least / whole]:
        widths = prune.allocate(start, target, size, at_most)
        assert widths == prune.allocate(start, target, size, dict(reversed(at_most.items())))
        assert widths.keys() == first.keys() and all(widths[key] <= at_most[key] for key in first)
        budget = math.floor(size * whole + 1e-6)
        missing = budget - start.resized(widths).removable_params()
        assert 0 <= missing < min((start.unit_params(*k) for k in first if widths[k] < at_most[k]), default=math.inf)
        share = (budget - least) / max(1, whole - least)                       # every layer is at least so far from its target
        assert all(widths[k] >= math.floor(last[k] + share * (first[k] - last[k])) for k in first)
        at_most = widths
    assert widths == last


def test_equal_layers_shrink_together():
    start = GPTConfig(**SHAPE, n_head=(4,) * 4, n_kv_head=(2,) * 4, d_ff=(40,) * 4)
    target = start.resized({(l, "ffn"): 16 for l in range(4)})
    for budget in range(target.removable_params(), start.removable_params(), 11):
        d_ff = start.resized(prune.allocate(start, target, budget / start.removable_params(), start.widths())).d_ff
        assert max(d_ff) - min(d_ff) <= 1 and list(d_ff) == sorted(d_ff, reverse=True)   # the first layers keep the rest


@pytest.mark.parametrize("seed", range(50))
def test_choose_takes_the_best_ties_by_index_dead_ones_never(seed):
    rng = random.Random(seed)
    scores, widths = {}, {}
    for key in [(0, "ffn"), (0, "kv"), (3, "ffn")]:
        values = [rng.choice([-math.inf, 0., 1., 2., rng.random()]) for _ in range(rng.randint(1, 12))]
        scores[key], widths[key] = torch.tensor(values), rng.randint(0, sum(v > -math.inf for v in values))
    copies = {key: score.clone() for key, score in scores.items()}
    chosen = prune.choose(scores, widths)
    for key, score in scores.items():
        best = sorted(range(len(score)), key=lambda i: (-score[i].item(), i))[:widths[key]]
        assert chosen[key].tolist() == sorted(best)
        assert (score[chosen[key]] > -math.inf).all()
        assert torch.equal(score, copies[key])                                 # pure


# -- does the score mean anything?

def learned(steps=150):
    """A model trained on "the next token is the sum of the last two, mod 11"; -> model, loss of a fixed batch."""
    config = GPTConfig(vocab_size=11, block_size=16, d_model=24, head_dim=12, n_head=(2,), n_kv_head=(2,), d_ff=(32,))
    model, optimizer = new(config, torch.float32, gain=2.0)
    tokens = torch.randint(11, (256, 17), generator=torch.Generator().manual_seed(1))
    for i in range(2, 17):
        tokens[:, i] = (tokens[:, i - 1] + tokens[:, i - 2]) % 11
    for step in range(steps):
        optimizer.zero_grad()
        rows = tokens[step % 8 * 32:][:32]
        loss_of(model, rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, lambda m=model: loss_of(m, tokens[:, :-1], tokens[:, 1:])


def test_useless_neurons_rank_last():
    model, loss = learned()
    ffn = model.blocks[0].ffn
    with torch.no_grad():
        for unit in (3, 17):
            ffn.down.weight[:, unit] *= 1e-4                                   # says next to nothing
        for unit in (8, 30):
            ffn.gate.weight[unit] = -30 * model.blocks[0].ffn_norm(model.embed.weight).mean(0)   # gate mostly shut
    loss().backward()
    order = prune.sensitivity(model)[0, "ffn"].argsort().tolist()
    print(order)


def test_score_agrees_with_leaving_one_out():
    model, loss = learned()
    loss().backward()
    score, base = prune.sensitivity(model)[0, "ffn"], loss().item()
    change = []
    for unit in range(32):
        without = copy.deepcopy(model)
        prune.zero_(without, None, {(0, "ffn"): torch.tensor([i for i in range(32) if i != unit])})
        change.append(loss(without).item() - base)
    ranks = torch.stack([values.argsort().argsort().double() for values in (score, torch.tensor(change))])
    spearman = torch.corrcoef(ranks)[0, 1].item()
    print(f"loss {base:.3f}, Spearman of score and leave-one-out loss change {spearman:.2f}")
    assert spearman >= 0.5
