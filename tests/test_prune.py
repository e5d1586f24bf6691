"""Invariants of prune.py: a dead unit stays dead, slicing is exact, mending is least squares. Its command:
test_prune_command.py.

The oracle is `entries`: which parameter entries belong to a unit, by explicit indices and without model.coupled.
"""
import copy
import math
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers import CONFIGS, batch, entries, loss_of, new, without
from torch.nn.parallel import DistributedDataParallel

import prune
import score
from model import GPT

CLIP = 0.1
every_config = pytest.mark.parametrize("name", CONFIGS)
every_kind = pytest.mark.parametrize("kind", ["ffn", "kv"])


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
    """All units but one or more scattered ones of these kinds in each layer, in each layer another number."""
    rng, alive = random.Random(0), prune.everything(config)
    for (layer, kind), n in config.widths().items():
        if kind in kinds:
            alive[layer, kind] = torch.tensor(sorted(rng.sample(range(n), max(1, n - 1 - layer))))
    return alive


def dead_entries(model, alive):
    """{parameter name: bool tensor, true at the entries of units that are not alive}"""
    dead = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for (layer, kind), n in model.config.widths().items():
        for unit in set(range(n)) - set(alive[layer, kind].tolist()):
            for name, index in entries(model.config, layer, kind, unit):
                dead[name][index] = True
    return dead


def split(model, alive):
    """All weights in two vectors: those of dead units, the others."""
    dead, parameters = dead_entries(model, alive), dict(model.named_parameters())
    return [torch.cat([parameters[name].detach()[d == side] for name, d in dead.items()]) for side in (True, False)]


def assert_same_where_alive(model, optimizer, small, small_optimizer, alive, tolerance):
    """Weights, exp_avg, exp_avg_sq and step counts of the small model are the large one's living entries."""
    dead, large = dead_entries(model, alive), dict(model.named_parameters())
    for name, p in small.named_parameters():
        living, q = ~dead[name], large[name]
        mine, theirs = small_optimizer.state[p], optimizer.state[q]
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"} and mine["step"] == theirs["step"]
        for a, b in ((p, q), *((mine[moment], theirs[moment]) for moment in ("exp_avg", "exp_avg_sq"))):
            assert a.shape == p.shape and (a.flatten() - b[living]).abs().max() <= tolerance, name


# -- fact 2: slicing is exact

@every_config
@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_slicing_keeps_the_logits_and_the_next_step(name, kind, dtype, tolerance):
    model, optimizer = new(CONFIGS[name], dtype)
    train(model, optimizer, 20)
    alive, (x, _) = some(model.config, kind), batch(model.config, 0)
    before = model(x)
    prune.zero_(model, optimizer, alive)
    train(model, optimizer, 7, first=20)
    small, small_optimizer = prune.slice(model, optimizer, alive)
    assert small.config.widths() == {key: len(indices) for key, indices in alive.items()}
    assert (small(x) - model(x)).abs().max() <= tolerance
    assert (small(x) - before).abs().max() > 1e-2                              # something was cut
    assert_same_where_alive(model, optimizer, small, small_optimizer, alive, 0)
    norms = [train(*pair, 1, first=27) for pair in ((model, optimizer), (small, small_optimizer))]
    assert min(norms) > 2 * CLIP                                               # clipping binds: all gradients matter
    if dtype == torch.float64:                         # in float32, m / sqrt(v) blows up the rounding of tiny gradients
        assert_same_where_alive(model, optimizer, small, small_optimizer, alive, tolerance)


@pytest.mark.parametrize("kinds", [("ffn",), ("kv",), ("ffn", "kv")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_without_units_loses_its_sub_block(kinds, layer):
    model, optimizer = new(CONFIGS["all"])
    train(model, optimizer, 20)
    alive = prune.everything(model.config) | {(layer, kind): torch.tensor([], dtype=torch.long) for kind in kinds}
    prune.zero_(model, optimizer, alive)
    train(model, optimizer, 3, first=20)
    small, small_optimizer = prune.slice(model, optimizer, alive)
    x, _ = batch(model.config, 0)
    assert (small(x) - model(x)).abs().max() <= 1e-12
    gone = tuple(f"blocks.{layer}.{part}" for kind in kinds
                 for part in {"ffn": ("ffn.", "ffn_norm."), "kv": ("attn.", "attn_norm.")}[kind])
    assert [key for key in model.state_dict() if not key.startswith(gone)] == list(small.state_dict())
    for pair in ((model, optimizer), (small, small_optimizer)):
        train(*pair, 1, first=23)
    assert_same_where_alive(model, optimizer, small, small_optimizer, alive, 1e-12)
    absent = prune.everything(small.config)                                    # what is not there is no trouble later
    prune.zero_(small, small_optimizer, absent)
    assert torch.equal(prune.slice(small, small_optimizer, absent)[0](x), small(x))
    assert {key: len(s) for key, s in score.sensitivity(small).items()} == small.config.widths()


@every_config
def test_a_sliced_model_is_a_model_of_its_own(name):
    model, optimizer = new(CONFIGS[name], torch.float32)
    train(model, optimizer, 3)
    model.blocks[0].attn_norm.weight.requires_grad_(False)
    optimizer.param_groups[0].update(lr=0.0125, initial_lr=0.5)
    alive = some(model.config, "ffn")
    prune.zero_(model, optimizer, alive)
    small, small_optimizer = prune.slice(model, optimizer, alive)
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
    alone, none = prune.slice(model, None, alive)
    assert none is None and alone.config == small.config


# -- fact 1: a dead unit stays dead

def life_after_death(model, optimizer, alive, moments=True, steps=100, **how):
    """Train, cut, train on; -> weights of the dead units at the end."""
    train(model, optimizer, 20, **how)
    assert split(model, alive)[0].numel() and (split(model, alive)[0] != 0).all()
    prune.zero_(model, optimizer if moments else None, alive)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, steps, first=20, **how)
    assert (split(model, alive)[1] != 0).all()                                  # and nobody else died
    return split(model, alive)[0]


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
    alive = some(CONFIGS[name], "ffn", "kv")
    assert (life_after_death(*new(CONFIGS[name], torch.float32), alive, autocast=True) == 0).all()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling for a CPU takes inductor a minute")


@pytest.mark.parametrize("backend, device", [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=needs_gpu)])
def test_compiled_training_keeps_units_dead_and_never_recompiles(backend, device):
    torch.compiler.reset()
    config, compiled = CONFIGS["all"], torch.compile(loss_of, backend=backend, dynamic=False)
    model, optimizer = new(config, torch.float32, device=device)
    alive = some(config, "ffn", "kv")
    assert (life_after_death(model, optimizer, alive, loss=compiled, autocast=device == "cuda") == 0).all()


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


# -- units

@every_config
def test_killing_a_kv_group_removes_exactly_its_query_heads(name):
    config, (x, _) = CONFIGS[name], batch(CONFIGS[name], 0)
    for layer, (H, K) in enumerate(zip(config.n_head, config.n_kv_head)):
        for j in range(K):
            whole, killed, unheard, silent = (new(config)[0] for _ in range(4))
            alive, g, D = without(config, layer, "kv", j), H // K, config.head_dim
            prune.zero_(killed, None, alive)
            with torch.no_grad():
                unheard.blocks[layer].attn.o.weight[:, j * g * D:(j + 1) * g * D] = 0    # query heads j·g … (j+1)·g-1
                for p in silent.blocks[layer].attn.v.parameters():                       # KV head j
                    p[j * D:(j + 1) * D] = 0
            assert (killed(x) - unheard(x)).abs().max() <= 1e-12
            assert (killed(x) - silent(x)).abs().max() <= 1e-12
            assert (killed(x) - whole(x)).abs().max() > 1e-4
            (dead, rest), (_, same) = split(killed, alive), split(whole, alive)
            assert (dead == 0).all() and torch.equal(rest, same)


# -- choice

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
