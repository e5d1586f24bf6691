"""What test_memory.py starts in processes of their own: a step of a sharded model whose communications are counted."""
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import shard
from bench import memory
from distill import Objective

KINDS = {"c10d::_allgather_base_": "all-gather", "c10d::_reduce_scatter_base_": "reduce-scatter",
         "c10d::allreduce_": "all-reduce"}


class Count(TorchDispatchMode):
    """Notes all communications: [(kind, bytes of the whole array)]."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = KINDS.get(function.name())
        assert kind or not function.name().startswith("c10d::"), function.name()
        if kind:
            # An all-gather writes the whole array, and the others read it.
            array = args[1] if kind == "reduce-scatter" else args[0]
            for tensor in array if isinstance(array, list) else [array]:
                self.calls.append((kind, tensor.nbytes))
        return function(*args, **(kwargs or {}))


def counted_step(job):
    """A step of two micro-batches: the communications of its second one, and what is held behind it."""
    mesh = shard.make_mesh(job.shard, "cpu", job.world, job.world // job.machines)
    block_dtype = torch.bfloat16 if job.block_bytes == 2 else None
    model = shard.build(job.config, mesh, "cpu", torch.float32, block_dtype)
    memory.draw_(model)
    for block in model.blocks:
        block.recompute = job.recompute
    teacher = None
    if job.teacher is not None:
        teacher = shard.build(job.teacher, mesh, "cpu", torch.float32, block_dtype, halve=block_dtype is not None)
        memory.draw_(teacher.requires_grad_(False))
    objective = Objective(model, 0.5, 1.0)
    x = torch.randint(job.config.vocab_size, (job.micro_batch, job.config.block_size))
    optimizer = memory.train.make_optimizer(model, memory.train.Train(lr=1e-4))
    for _ in range(2):
        with Count() as count, torch.autocast("cpu", torch.bfloat16, enabled=job.block_bytes == 2):
            taught = ()
            if teacher is not None:
                with torch.no_grad():
                    taught = (teacher.hidden(x), teacher.head_weight)
            loss, _ = objective(x, x, *taught)
            loss.backward()
    memory.update(model, optimizer)
    # Arrays, with the rows that only fill them up.
    stored = {"weights": 0, "gradients": 0, "teacher": 0}
    if teacher is not None:
        # Rows of its blocks. Its root is whole.
        stored["teacher"] = sum(shard.local(p).untyped_storage().nbytes() for p in teacher.parameters())
    for p in model.parameters():
        stored["weights"] += shard.local(p).untyped_storage().nbytes()
    gradients = {shard.local(p.grad).untyped_storage() for p in model.parameters()}
    for storage in {storage.data_ptr(): storage for storage in gradients}.values():
        stored["gradients"] += storage.nbytes()
    return {"calls": count.calls, "held": memory.held_bytes(model, optimizer), "stored": stored}


def worker(rank, jobs, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    counted = [counted_step(job) for job in jobs]
    Path(folder, f"{rank}.json").write_text(json.dumps(counted))
    dist.barrier()
    os._exit(0)
