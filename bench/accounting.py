"""What a process of a sharded run holds and exchanges: bytes by accounting, without running anything.

    python -m bench fit                              # 2.8B and 8B on 1, 8 and 64 GPUs
    python -m pytest tests/bench/test_memory.py      # against counted collectives and held tensors

shard.py makes one *group* of each block, and one of embedding, last norm and head, the *root*. A
group is gathered, used and reduced together. `memory` counts a process's bytes part by part, and
`fullest` says which parts are held at the same time. `collectives` lists what a micro-batch
exchanges. Which buffers PyTorch's fully_shard holds was read in its source (2.13,
torch/distributed/fsdp/_fully_shard). Not here: measurements (bench/memory.py), and the buffers of
the communication library, the memory of kernels and fragmentation, which nothing here counts.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from bench.system import kept_bytes
from distill import CHUNK_VALUES
from model import GPT, GPTConfig

WEIGHT_BYTES = 4             # of a weight, its gradient, each of its moments, and what is reduced
TEACHER_BYTES = 2            # of a value of a teacher's block, on a GPU
# The device of the tables. NVIDIA's data sheet of the H100 SXM has 80 GB, 989e12 FLOP/s in bfloat16
# without sparsity, and 900 GB/s of NVLink, half of it in each direction. DGX H100's user guide has 8
# network cards of 400 Gb/s, one for each GPU.
DEVICE_BYTES = 80e9
PEAK_FLOPS = 989e12
LINK_BYTES = 450e9           # a second, one direction, between two GPUs of a machine
CARD_BYTES = 50e9            # a second, one direction, through one network card
# What training reaches of the peak: 38 to 43 % in Llama 3's (arXiv 2407.21783, table 4).
UTILISATION = 0.4


@dataclass(frozen=True)
class Job:
    """What the bytes of a process depend on."""
    config: GPTConfig
    shard: str = "none"                # as in train.py: none, fsdp, hsdp
    world: int = 1                     # processes, one for each device
    machines: int = 1                  # that they are on, equally many on each
    micro_batch: int = 1               # sequences of config.block_size tokens
    block_bytes: int = 2               # of a value that blocks compute with: 2 bfloat16, 4 float32
    recompute: bool = False
    teacher: GPTConfig | None = None
    device: str = "gpu"                # or cpu

    @property
    def tokens(self):
        """Tokens of a process's micro-batch."""
        return self.micro_batch * self.config.block_size

    @property
    def sharers(self):
        """Processes that share one copy of the model."""
        return {"none": 1, "fsdp": self.world, "hsdp": self.world // self.machines}[self.shard]


# -- groups of parameters

@dataclass(frozen=True)
class Group:
    """The parameters that are gathered and reduced together."""
    shapes: tuple[torch.Size, ...]

    @property
    def values(self):
        return sum(shape.numel() for shape in self.shapes)

    def held(self, sharers):
        """Values that the fullest process holds: as torch.chunk deals out rows, all processes have
        equally many, but the last ones fewer or none."""
        return sum(math.ceil(shape[0] / sharers) * shape[1:].numel() for shape in self.shapes)

    def gathered(self, sharers):
        """Values of the gathered group. The rows that the last processes lack are sent as zeros."""
        return self.held(sharers) * sharers


@functools.cache
def groups(config):
    """The root and the blocks of a model: -> Group, [Group]. A block without parameters is none."""
    with torch.device("meta"):
        model = GPT(config)
    inside = []
    for block in model.blocks:
        inside.append(Group(tuple(p.shape for p in block.parameters())))
    names = [(name, p.shape) for name, p in model.named_parameters()]
    root = Group(tuple(shape for name, shape in names if not name.startswith("blocks.")))
    return root, [group for group in inside if group.shapes]


# -- memory

def activations(job):
    """Bytes that are kept for the backward pass, and those of the one block that is computed again
    with --recompute.

    Without it every step keeps what its gradient reads (bench.system.kept_bytes). With it: the input of
    each block, the input of the last norm and one number per token of it, and the loss's gradient in
    the hidden states."""
    config = job.config
    if not job.recompute:
        return job.tokens * kept_per_token(job, config), 0
    ends = 2 * config.d_model * job.block_bytes + 4
    kept = config.n_layer * config.d_model * job.block_bytes + ends
    inside = []
    for heads, kv_heads, d_ff in set(zip(config.n_head, config.n_kv_head, config.d_ff)):
        alone = dataclasses.replace(config, n_head=(heads,), n_kv_head=(kv_heads,), d_ff=(d_ff,))
        inside.append(kept_per_token(job, alone) - ends)
    return job.tokens * kept, job.tokens * max(inside)


def kept_per_token(job, config):
    """Bytes that a token leaves for the backward pass without --recompute."""
    kept = kept_bytes(config, job.block_bytes)
    if job.device == "cpu":
        # A CPU's kernel takes keys and values once for all query heads of a group.
        kept -= 2 * config.head_dim * (sum(config.n_head) - sum(config.n_kv_head)) * job.block_bytes
    return kept


def loss_bytes(job):
    """Bytes of the loss besides the gradient of the head: its matrix cast to the dtype of the blocks,
    and four float32 arrays of a chunk's logits (with a teacher; fewer without)."""
    config = job.config
    cast = 0
    if job.block_bytes != WEIGHT_BYTES:
        cast = config.vocab_size * config.d_model * job.block_bytes
    return cast + 4 * 4 * min(CHUNK_VALUES[job.device], job.tokens * config.vocab_size)


def teacher_bytes(job):
    """Bytes of a frozen teacher and of its hidden states: its blocks in bfloat16 on a GPU, its root in
    float32. A sharded teacher's root stays gathered from its first use on. The head of one that is not
    sharded is bfloat16, unless it is the embedding."""
    if job.teacher is None:
        return 0
    root, blocks = groups(job.teacher)
    sharers = job.sharers
    size = min(TEACHER_BYTES, job.block_bytes)
    held = size * sum(block.held(sharers) for block in blocks) + WEIGHT_BYTES * root.held(sharers)
    if job.shard != "none":
        held += WEIGHT_BYTES * root.gathered(sharers)
    elif not job.teacher.tie_embeddings:
        held -= (WEIGHT_BYTES - size) * job.teacher.vocab_size * job.teacher.d_model
    return held + job.tokens * job.teacher.d_model * job.block_bytes


def memory(job):
    """{part: bytes} of the fullest process."""
    root, blocks = groups(job.config)
    sharers = job.sharers
    held = WEIGHT_BYTES * sum(group.held(sharers) for group in (root, *blocks))
    head_gradient = WEIGHT_BYTES * job.config.vocab_size * job.config.d_model
    kept, one_block = activations(job)
    parts = {"weights": held, "gradients": held, "moments": 2 * held, "teacher": teacher_bytes(job),
             "activations": kept, "a block's activations": one_block, "loss": loss_bytes(job),
             "head's gradient": head_gradient, "whole root": 0, "whole blocks": 0, "cast blocks": 0,
             "a block's gradients": 0, "root's gradients": 0}
    if job.shard != "none":
        largest = max(blocks, key=lambda block: block.values)
        parts["whole root"] = WEIGHT_BYTES * root.gathered(sharers)
        # The block at work, and the next one, which is gathered meanwhile.
        parts["whole blocks"] = 2 * job.block_bytes * largest.gathered(sharers)
        # As the backward pass made them, and in float32, as they are reduced.
        parts["a block's gradients"] = job.block_bytes * largest.values + WEIGHT_BYTES * largest.gathered(sharers)
        parts["root's gradients"] = WEIGHT_BYTES * (root.values + root.gathered(sharers))
    elif job.block_bytes != WEIGHT_BYTES:
        # Autocast keeps the cast matrices of all blocks until the step ends.
        params = job.config.num_params()
        parts["cast blocks"] = job.block_bytes * (params["attention"] + params["ffn"])
    if job.config.tie_embeddings:
        # The matrix's gradients as head and as embedding, and the sum of the two.
        parts["root's gradients"] = max(3 * head_gradient, parts["root's gradients"])
    return parts


STANDING = ("weights", "gradients", "moments", "teacher", "whole root")
# The parts that come and go, by the moment of a micro-batch at which they are held together.
MOMENTS = {
    "the loss": ("activations", "head's gradient", "loss", "cast blocks"),
    "the first blocks of the backward pass": ("activations", "a block's activations", "head's gradient",
                                              "cast blocks", "whole blocks", "a block's gradients"),
    "the end of the backward pass": ("cast blocks", "root's gradients"),
}


def fullest(parts):
    """The parts that are held at the fullest moment of a step: -> its name, {part: bytes}. Gradients
    count as held at every moment, as they are from a step's second micro-batch on."""
    held = {}
    for moment, names in MOMENTS.items():
        held[moment] = {name: parts[name] for name in (*STANDING, *names)}
    moment = max(held, key=lambda name: sum(held[name].values()))
    return moment, held[moment]


def peak_bytes(job):
    """Bytes of the fullest process at the fullest moment of a step."""
    return sum(fullest(memory(job))[1].values())


# -- communication

@dataclass(frozen=True)
class Collective:
    """A communication of several processes, which all call it with arrays of one size."""
    kind: str                    # all-gather, reduce-scatter, all-reduce
    bytes: int                   # of the whole array
    processes: int

    @property
    def sent(self):
        """Bytes that each process sends, and receives, in a ring: all but its own part of the array;
        an all-reduce goes round twice."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.processes - 1) / self.processes


def collectives(job):
    """What a micro-batch exchanges, apart from numbers: [Collective]. Blocks are gathered for the
    forward pass and again for the backward pass, also with --recompute, and the root once. Each
    micro-batch's gradients are reduced at once, so that none is ever kept whole (our choice). A
    teacher's root is gathered once in a run, and not counted."""
    root, blocks = groups(job.config)
    sharers = job.sharers
    copies = job.world // sharers if job.shard == "hsdp" else 1
    calls = []
    if sharers > 1:
        calls.append(Collective("all-gather", WEIGHT_BYTES * root.gathered(sharers), sharers))
        for block in blocks:
            gather = Collective("all-gather", job.block_bytes * block.gathered(sharers), sharers)
            calls += [gather, gather]
        for group in (root, *blocks):
            calls.append(Collective("reduce-scatter", WEIGHT_BYTES * group.gathered(sharers), sharers))
    if copies > 1:
        # Each process adds its rows up with those of the other machines.
        for group in (root, *blocks):
            calls.append(Collective("all-reduce", WEIGHT_BYTES * group.held(sharers), copies))
    if job.teacher is not None and sharers > 1:
        size = min(TEACHER_BYTES, job.block_bytes)
        for block in groups(job.teacher)[1]:
            calls.append(Collective("all-gather", size * block.gathered(sharers), sharers))
    return calls


def spans_machines(job, call):
    return call.processes > job.world // job.machines


def bandwidth(job, call):
    """Bytes a second that a process sends at most in this communication, by assumption. A ring over
    whole machines passes all devices of a machine before it leaves it, and there are as many rings as
    network cards, so that all cards send at once. An all-reduce over machines has one device of each,
    and its card."""
    if call.kind == "all-reduce":
        return CARD_BYTES
    if spans_machines(job, call):
        return min(LINK_BYTES, CARD_BYTES * job.world / job.machines)
    return LINK_BYTES


def exchange_seconds(job):
    """Seconds of a micro-batch's communication at the assumed bandwidths, if nothing else happened."""
    return sum(call.sent / bandwidth(job, call) for call in collectives(job))


def slowest_seconds(job):
    """The same if no ring helped: each process takes all that other machines hold through its own
    network card."""
    seconds = 0.0
    for call in collectives(job):
        if spans_machines(job, call) and call.kind != "all-reduce":
            seconds += call.bytes * (job.machines - 1) / job.machines / CARD_BYTES
        else:
            seconds += call.sent / bandwidth(job, call)
    return seconds


def compute_seconds(job):
    """Seconds of a micro-batch's arithmetic at the assumed speed."""
    T = job.config.block_size
    flops = job.config.flops_per_token(T, recompute=job.recompute)
    if job.teacher is not None:
        flops += job.teacher.flops_per_token(T, backward=False)
    return job.tokens * flops / (PEAK_FLOPS * UTILISATION)


# -- tables

# Devices, machines and --shard.
PLACES = ((1, 1, "none"), (8, 1, "fsdp"), (64, 8, "fsdp"), (64, 8, "hsdp"))
# The columns of a table of memory: which parts each has.
COLUMNS = {
    "weights, gradients, moments": ("weights", "gradients", "moments"),
    "gathered or cast": ("whole root", "whole blocks", "cast blocks"),
    "whole gradients": ("a block's gradients", "head's gradient", "root's gradients"),
    "activations": ("activations", "a block's activations"),
    "loss": ("loss",),
}


def jobs(config, micro_batch=1):
    """The Jobs of the tables for a model: with and without --recompute."""
    planned = []
    for world, machines, shard in PLACES:
        for recompute in (False, True):
            planned.append(Job(config, shard, world, machines, micro_batch, recompute=recompute))
    return planned


def memory_row(job):
    """A row of the table of memory, in GB: what is held at the fullest moment of a step. The last
    columns add a teacher of the same size."""
    _, held = fullest(memory(job))
    row = {"GPUs": job.world, "--shard": job.shard, "--recompute": job.recompute}
    for column, names in COLUMNS.items():
        row[column] = sum(held.get(name, 0) for name in names) / 1e9
    taught = peak_bytes(dataclasses.replace(job, teacher=job.config))
    row |= {"sum": peak_bytes(job) / 1e9, "fits": peak_bytes(job) <= DEVICE_BYTES,
            "with a teacher": taught / 1e9, "fits with it": taught <= DEVICE_BYTES}
    return row


def exchange_row(job):
    """A row of the table of communication, per GPU and micro-batch, in GB and seconds."""
    row = {"GPUs": job.world, "--shard": job.shard, "--recompute": job.recompute}
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        row[f"{kind}, GB"] = sum(call.sent for call in collectives(job) if call.kind == kind) / 1e9
    row |= {"exchange, s": exchange_seconds(job), "without rings, s": slowest_seconds(job),
            "compute, s": compute_seconds(job)}
    row["exchange ÷ compute"] = row["exchange, s"] / row["compute, s"]
    return row
