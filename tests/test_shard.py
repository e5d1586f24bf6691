"""A model over 2 and 3 processes against the same model in one: losses, norms, scores, cuts, slices, next steps."""
import functools
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from helpers import FIELDS, WITH_HOLES, new

import distill
import prune
import score
import shard
import train

pytestmark = pytest.mark.skipif(torch.__version__ < shard.OLDEST_ON_CPU, reason="FSDP2 on CPUs needs a newer PyTorch")
CLOSE = 1e-12
B, T = 2, 8                                                   # windows of each process, tokens of a window


def run_in(worlds, worker, folder, *args):
    """Run worker(*args) in so many processes, one thread each."""
    torch.multiprocessing.start_processes(start, (worlds, worker, str(folder), args), nprocs=worlds,
                                          start_method="fork")            # spares the imports of torch


def start(rank, world, worker, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    worker(*args)
    dist.barrier()
    os._exit(0)                               # gloo's threads have been seen to abort a process that ended normally


def sharded_copy(model, optimizer, kind="fsdp", local_world=1, block_dtype=None):
    """The same model and AdamW, spread over the processes."""
    mesh = shard.make_mesh(kind, "cpu", dist.get_world_size(), local_world)
    weights = dict(model.named_parameters())
    copied = shard.build(model.config, mesh, "cpu", model.embed.weight.dtype, block_dtype)
    shard.fill_(copied, lambda name, start, stop: weights[name].detach()[start:stop])
    config = train.Train(lr=optimizer.param_groups[0]["lr"], weight_decay=0.1)
    return copied, train.make_optimizer(copied, config)


def text(config, step):
    """A batch for all processes, (world · B, T): inputs, targets, and the rows of this process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.randint(config.vocab_size, (world * B, T + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:], slice(rank * B, rank * B + B)


def backward(model, x, y, teacher=None):
    """-> loss, gradient norm."""
    given = () if teacher is None else (teacher.hidden(x).detach(), teacher.head_weight)
    loss, _ = distill.Objective(model, 0.5, 2.0)(x, y, *given)
    loss.backward()
    return loss.detach(), shard.whole(nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def update(model, optimizer, norm):
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    optimizer.step()
    optimizer.zero_grad()


def apart(one, many):
    """The largest difference of two numbers, tensors or models."""
    if isinstance(one, nn.Module):
        assert one.config == many.config
        shard.release(many)
        return max(apart(p, q) for p, q in zip(one.parameters(), many.parameters(), strict=True))
    one, many = torch.as_tensor(one).detach(), shard.whole(torch.as_tensor(many)).detach()
    assert one.shape == many.shape
    return (one - many).abs().max().item() if one.numel() else 0.0


def mean_of_processes(loss):
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def some_units(scores):
    return prune.choose(scores, {key: max(1, int(0.6 * len(worth))) if len(worth) else 0
                                 for key, worth in scores.items()})


def life_of(name, kind, local_world, with_teacher):
    """Three steps, a cut, two steps, the slice, two steps: one model in every process beside its sharded copy."""
    config = WITH_HOLES[name]
    one, one_optimizer = new(config)
    many, many_optimizer = sharded_copy(one, one_optimizer, kind, local_world)
    teacher, taught_optimizer = new(config, seed=5)
    sharded_teacher, _ = sharded_copy(teacher, taught_optimizer, kind, local_world)
    distill.freeze(sharded_teacher)
    alive = None
    for step in range(7):
        x, y, mine = text(config, step)
        loss, norm = backward(one, x, y, teacher if with_teacher else None)
        my_loss, my_norm = backward(many, x[mine], y[mine], sharded_teacher if with_teacher else None)
        assert apart(loss, mean_of_processes(my_loss)) < CLOSE and apart(norm, my_norm) < CLOSE
        scores, sharded_scores = score.sensitivity(one), score.sensitivity(many)
        for key, worth in scores.items():
            assert apart(worth, sharded_scores[key]) <= 1e-6 * sum(worth.abs().tolist())
        update(one, one_optimizer, norm)
        update(many, many_optimizer, my_norm)
        if step == 2:
            alive = some_units(scores)
            for key, units in some_units(sharded_scores).items():
                assert torch.equal(units, alive[key])
            prune.zero_(one, one_optimizer, alive)
            prune.zero_(many, many_optimizer, alive)
            assert apart(one, many) < CLOSE
        if step == 4:
            logits = one(x)
            one, one_optimizer = prune.slice(one, one_optimizer, alive)
            many, many_optimizer = prune.slice(many, many_optimizer, alive)
            assert one.config.removable_params() < config.removable_params()
            assert apart(logits, many(x)) < CLOSE
            for p, q in zip(one.parameters(), many.parameters()):
                shard.release(many)
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert apart(one_optimizer.state[p][moment], many_optimizer.state[q][moment]) < CLOSE
    assert apart(one, many) < CLOSE


def lives():
    for name in WITH_HOLES:
        life_of(name, "fsdp", 1, with_teacher=name in ("gqa", "all"))
    calibrations()


def calibrations():
    """All statistics and all scores of a calibration pass, its batches dealt out to the processes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for name in ("all", "holes"):
        one, optimizer = new(WITH_HOLES[name])
        many, _ = sharded_copy(one, optimizer)
        batches = [text(one.config, 10 + number)[:2] for number in range(2)]
        mine = [(x[rank * B:rank * B + B], y[rank * B:rank * B + B]) for x, y in batches]
        for needs in (FIELDS, {"square", "mean", "cosine"}):
            whole, dealt = score.collect(one, batches, needs), score.collect(many, mine, needs)
            assert (whole.tokens, whole.windows) == (dealt.tokens, dealt.windows) == (2 * world * B * T, 2 * world * B)
            for field in sorted(needs):                # in all processes in the same order
                expected, measured = getattr(whole, field), getattr(dealt, field)
                assert expected.keys() == measured.keys() and expected
                for key in expected:
                    size = torch.as_tensor(expected[key]).abs().max().item() if torch.as_tensor(
                        expected[key]).numel() else 0
                    assert apart(expected[key], measured[key]) <= 1e-6 * size, (field, key)
        whole, dealt = score.collect(one, batches, FIELDS), score.collect(many, mine, FIELDS)
        for row in score.SCORES.values():
            expected, measured = row.function(one, whole), row.function(many, dealt)
            for key, worth in expected.items():
                assert apart(worth, measured[key]) <= 1e-5 * (worth.abs().max().item() if len(worth) else 0)


def halved():
    """In bfloat16: blocks that are compiled and recomputed give the gradients of blocks that are not, and both are
    those of one process under autocast, as near as bfloat16 is. The head's and the embedding's are float32."""
    one, optimizer = new(WITH_HOLES["all"], torch.float32)
    x, y, mine = text(one.config, 0)
    with torch.autocast("cpu", torch.bfloat16):
        backward(one, x, y)
    gradients = []
    for compiled in (False, True):
        many, _ = sharded_copy(one, optimizer, block_dtype=torch.bfloat16)
        if compiled:
            torch.compile = functools.partial(torch.compile, backend="aot_eager")
            train.compile_blocks(many)
        for block in many.blocks:
            block.recompute = compiled
        with torch.autocast("cpu", torch.bfloat16):
            backward(many, x[mine], y[mine])
        gradients.append([shard.whole(p.grad) for p in many.parameters()])
    for name_and_p, plain, other in zip(one.named_parameters(), *gradients):
        name, p = name_and_p
        assert plain.dtype == torch.float32
        assert apart(p.grad, plain) < 0.05 * p.grad.abs().max().item(), name
        assert apart(plain, other) < 0.05 * p.grad.abs().max().item(), name
    assert all(block.compiled is not None for block in many.blocks)


def test_compiled_and_recomputed_blocks_in_bfloat16(tmp_path):
    run_in(2, halved, tmp_path)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_are_one_through_a_cut_a_slice_and_the_steps_behind(tmp_path, world):
    run_in(world, lives, tmp_path)


def test_two_machines_with_a_copy_each_are_one(tmp_path):
    run_in(4, life_of, tmp_path, "all", "hsdp", 2, True)
