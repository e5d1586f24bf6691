"""One model over several processes: each holds some rows of every tensor, and a cut still only writes
zeros.

    torchrun --nproc-per-node 2 train.py --preset toy --shard fsdp --recompute      # large models: docs/scale.md
    python -m pytest tests/test_shard.py      # 2 and 3 processes against one: same losses, same cuts

Training in float32 takes 16 bytes a parameter: weight, gradient and Adam's two moments. PyTorch's
`fully_shard` (FSDP2) lets each of W processes hold 1 / W of the rows of every tensor, so 16 / W
bytes. A block's rows are gathered for its forward and its backward pass, and dropped again. All
arithmetic stays in model.py; a sharded model is a GPT whose parameters are `DTensor`s.

No other public tool that we know cuts *inside* such a run. Here a cut needs no communication: every
process zeroes those rows of dead units that it holds, and all columns are there anyhow. A score needs
one sum over all processes. Only a slice moves rows, one tensor at a time.

The functions below take plain tensors and models as well, and leave those alone. So score.py and
prune.py call them without asking. Not here: files (formats/dcp.py), tensor or pipeline parallelism.
"""
import gc

import torch
import torch.distributed as dist

from common import UserError
from model import GPT, by_unit

# Before, FSDP2 knew no CPUs (2.6), or added up gradients instead of averaging them (2.7).
OLDEST_ON_CPU = "2.8"


# -- a model over a mesh of processes

def make_mesh(kind, device, world, local_world):
    """The mesh of the processes that share a model, for --shard "fsdp" or "hsdp": all `world` of them,
    or the `local_world` of each machine, where every machine holds a copy (HSDP). Raises UserError on a
    CPU with a PyTorch whose FSDP2 is wrong there."""
    device_type = device.split(":")[0]
    if device_type == "cpu" and torch.__version__ < OLDEST_ON_CPU:
        raise UserError(f"--shard needs PyTorch {OLDEST_ON_CPU} or later on a CPU, and this is {torch.__version__}; "
                        "pip install --upgrade torch")
    # PyTorch's modules for this are imported where they are used: they take half a second, which no
    # other command should wait for.
    from torch.distributed.device_mesh import init_device_mesh
    if kind == "fsdp":
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))


def build(config, mesh, device, dtype, block_dtype=None, halve=False):
    """A GPT over the mesh whose weights are still to be filled (`fill_`). It is made on the meta
    device, so no process ever holds more than its rows. `halve`: what the blocks are multiplied in is
    also what they are stored in, for a model that does not train."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
        if halve:
            model.blocks.to(block_dtype)
    return spread(model, mesh, block_dtype).to_empty(device=device)


def spread(model, mesh, block_dtype=None):
    """Shard a model over the mesh, in place. `block_dtype`: what a block's parameters are gathered
    and multiplied in, such as bfloat16. Gradients are averaged in float32 then.

    Embedding, last norm and head are one group, as the first and the last may be one matrix. They
    stay in the model's dtype: their gradients are sums over many tokens. The group stays whole
    between `hidden` and the loss, which reads the head; see `release`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    policy = MixedPrecisionPolicy()
    if block_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=block_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if mesh.device_type == "cpu":
        for module in (*model.blocks, model):
            # Add up and then divide: PyTorch 2.8 takes a sum for gloo's average in float32.
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    model.mesh = mesh
    model.block_dtype = block_dtype
    return model


def spread_like(small, model):
    """Shard a model, in place, as another one is; a whole model's like stays whole."""
    if not is_sharded(model):
        return small
    return spread(small.to(model.embed.weight.dtype), model.mesh, model.block_dtype)


def is_sharded(model):
    """Whether several processes hold the model."""
    return hasattr(model, "mesh")


def release(model):
    """Drop the whole embedding, norm and head that running a model without a backward pass leaves
    behind. Until then the model's parameters are these copies, and not the rows that it holds."""
    if is_sharded(model):
        model.reshard()


def free_unused(model):
    """Free the sharded models that nothing uses any more beside `model`, such as the one that was
    sliced to it. FSDP2 makes a model and its hooks refer to each other, so Python would free their
    memory only when it next looks for cycles."""
    if is_sharded(model):
        gc.collect()


@torch.no_grad()
def fill_(model, rows_of):
    """Fill the weights. rows_of(name, start, stop) returns these rows of a parameter, on any device
    and of any dtype. It is called once for each parameter, in the same order in all processes."""
    for name, p in model.named_parameters():
        start, stop = rows(p)
        local(p).copy_(rows_of(name, start, stop))
    return model


# -- a tensor over a mesh

def is_spread(tensor):
    """Whether several processes hold the tensor: whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def rows(tensor):
    """The rows [start, stop) of the whole tensor that this process holds. They are those of
    torch.chunk: all processes have equally many, but the last ones fewer or none."""
    size = tensor.size(0)
    if not is_spread(tensor):
        return 0, size
    processes = tensor.device_mesh.size(-1)
    number = tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1)
    chunk = -(-size // processes)
    return min(size, number * chunk), min(size, (number + 1) * chunk)


def local(tensor):
    """The rows that this process holds, as a plain tensor; what is written there is written."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor):
    """The whole tensor, gathered or added up from all processes, which must all call this."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def from_rows(held, like, shape):
    """The tensor of this shape, of which each process hands in the rows that it is to hold. It is
    spread as `like` is."""
    from torch.distributed.tensor import DTensor
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape),
                              stride=stride)


def spread_rows(tensor, like):
    """A tensor that every process holds whole, spread as the parameter `like` is. No communication."""
    if not is_spread(like):
        return tensor
    part = from_rows(tensor[:0], like, tensor.shape)
    start, stop = rows(part)
    return from_rows(tensor[start:stop].clone(), like, tensor.shape)


# -- units of a tensor over a mesh

def unit_of_entry(tensor, dim, units):
    """Which unit each entry belongs to, (n,) in main memory, of those along `dim` that this process
    holds."""
    start, stop = rows(tensor) if dim == 0 else (0, tensor.size(dim))
    return torch.arange(start, stop) // (tensor.size(dim) // units)


def sums_by_unit(tensor, dim, units):
    """The sum over each unit's entries of what this process holds: (units,). See
    `add_up_units_`."""
    if not is_spread(tensor):
        return by_unit(tensor, dim, units).movedim(dim, 0).flatten(1).sum(1)
    held = tensor.to_local()
    sums = held.new_zeros(units)
    if held.numel() == 0:
        return sums
    per_entry = held.movedim(dim, 0).reshape(held.size(dim), -1).sum(1)
    return sums.index_add_(0, unit_of_entry(tensor, dim, units).to(held.device), per_entry)


def select_units(tensor, dim, units, indices):
    """The tensor with only the entries of the units `indices` along `dim`. Columns are selected where
    they lie. For rows the whole tensor is gathered, and each process keeps those that become its own."""
    def selected(part):
        kept = by_unit(part, dim, units).index_select(dim, indices.to(part.device))
        return kept.flatten(dim, dim + 1)

    if not is_spread(tensor):
        return selected(tensor)
    if dim == 0:
        return spread_rows(selected(tensor.full_tensor()), tensor)
    held = selected(tensor.to_local())
    return from_rows(held, tensor, (tensor.size(0), held.size(1)))


def add_up_units_(model, sums):
    """Add up, in place, the sums {key: (units,)} that `sums_by_unit` gave in each process: one
    communication for all of them."""
    if not is_sharded(model) or not sums:
        return
    flat = torch.cat(list(sums.values()))
    # In HSDP every machine has the same rows once.
    dist.all_reduce(flat, group=model.mesh.get_group("shard"))
    for total, added in zip(sums.values(), flat.split([len(total) for total in sums.values()])):
        total.copy_(added)


def add_up_(model, tensor):
    """Add up, in place, what each process has measured on text of its own."""
    if is_sharded(model):
        dist.all_reduce(tensor)
    return tensor
