"""Local distillation: each block of the cut model is trained for a moment against the dense block in
its place.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --mend local --local-steps 100
    python -m pytest tests/methods/test_local.py

Least squares (methods/mend.py) refits one matrix of a sub-block. Here all parameters of a block take
some Adam steps, so that the residual stream behind the block comes nearer to the dense model's. This
is the blockwise distillation of NVIDIA's Puzzle (arXiv 2411.19146, section 4), which feeds each
block the dense model's stream, so that blocks train independently; here a block is fed what the cut
blocks in front of it really put out. No gradient passes more than one block: memory is that of one
block's training, and of the streams. Not here: the losses of the whole model (distill.py, train.py).
"""
import torch

from common import progress
from methods.mend import Walk, token_weights
from methods.offload import on_device


def distil_(small, model, windows, steps=100, lr=1e-3, seed=0, dtype=None, micro_batch=4):
    """Train, in place, the blocks of `small` one after the other, `steps` steps of Adam each, against
    the blocks of `model`, which it is cut from. `windows` (N, T) are token ids; a step takes
    `micro_batch` of them, in an order by `seed`. `dtype` is that of the products.

    A layer that is gone trains nothing; the next one makes up for it. Memory: the two models'
    streams of all windows in front of a layer and behind it, N · T · C values each, and one block
    with gradients and Adam's moments."""
    device = model.embed.weight.device
    windows = windows.to(device)
    walk = Walk(model, windows.size(1), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        dense = walk.start(model, windows)
        streams = walk.start(small, windows)
    for layer in progress(range(model.config.n_layer), "distil"):
        with on_device(model.blocks[layer], device):
            targets = forward(walk, model.blocks[layer], dense, micro_batch)
        block = small.blocks[layer]
        with on_device(block, device, changes=True):
            outputs = forward(walk, block, streams, micro_batch)
            is_absent = block.attn is None and block.ffn is None
            # Where nothing is missing gradients are rounding errors, which Adam would make steps of.
            if not is_absent and not torch.equal(outputs, targets):
                # Tokens count as in least squares. A block that puts out the stream as it came would have
                # a loss of 1.
                weights = token_weights(targets)
                scale = (weights * (targets - dense).square()).mean()
                weights /= scale.clamp(min=torch.finfo(dense.dtype).tiny)
                order = batches(len(windows), steps, micro_batch, generator)
                train_(walk, block, streams, targets, weights, order, lr)
                outputs = forward(walk, block, streams, micro_batch)
        dense = targets
        streams = outputs


@torch.no_grad()
def forward(walk, block, streams, micro_batch):
    """The residual streams (N, T, C) behind a block."""
    return torch.cat([walk.behind(block, part) for part in streams.split(micro_batch)])


def batches(windows, steps, micro_batch, generator):
    """The windows of each step: (steps, micro_batch). All windows come once before any comes
    again."""
    rows = steps * micro_batch
    epochs = [torch.randperm(windows, generator=generator) for _ in range(0, rows, windows)]
    return torch.cat(epochs)[:rows].view(steps, micro_batch)


def train_(walk, block, streams, targets, weights, order, lr):
    """Adam steps of a block, one for each row of `order`, at a rate that falls to 0 on a straight
    line. The loss is the mean squared error of the stream behind the block, where tokens count by
    `weights` (N, T, 1). A block of bfloat16 trains in float32, as it has no digits for small steps."""
    stored = next(block.parameters()).dtype
    block.to(walk.stream_dtype)
    optimizer = torch.optim.Adam(block.parameters(), lr, betas=(0.9, 0.95), fused=True)
    for step, rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(order))
        error = walk.behind(block, streams[rows]) - targets[rows]
        loss = (weights[rows] * error.square()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    block.to(stored)
