"""2:4 sparsity: of each 4 consecutive weights along a matrix's input, 2 are zero and stay zero.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score wanda --out runs/two-four
    python train.py --init runs/two-four --plan scratch      # trains on, 2:4 after every step

NVIDIA's sparse tensor cores read this pattern (arXiv 2104.08378). It is the exception to the first
fact of prune.py. A unit that is zero as a whole gets gradients of exactly 0. A single zero inside a
matrix gets a gradient like any other weight, and would come back with the next step. So 2:4 needs a
mask, applied after every optimizer step (`hold_`). Which weights stay is decided once. Half of each
matrix of the blocks goes: q, k, v, o, gate, up, down. Embedding and head stay dense.

Not here: the norms of the inputs that Wanda weighs with (prune.py calibrates), masks that change
while the model trains, compressed storage and sparse kernels. The model is stored and run dense, so
it costs what it cost before.
"""
import numpy as np
import torch

import shard
from common import UserError

# Ends of the matrices' module names.
MATRICES = (".q", ".k", ".v", ".o", ".gate", ".up", ".down")


def blocks_of_4(name, matrix):
    """View (out, in) as (out, in/4, 4). Raises UserError if `in` is no multiple of 4."""
    if matrix.size(1) % 4:
        remedy = "take a model whose d_model and head_dim are multiples of 4"
        if name.endswith("down.weight"):
            remedy = "cut its FFN with --multiple-of 4"
        raise UserError(f"{name} has {matrix.size(1)} inputs, and 2:4 needs a multiple of 4; "
                        f"{remedy}")
    return matrix.unflatten(1, (-1, 4))


def matrices(model):
    """All matrices of the blocks, which become 2:4: [(parameter name, parameter (out, in))]."""
    parameters = model.named_parameters()
    return [(name, p) for name, p in parameters if name.startswith("blocks.") and p.dim() == 2]


@torch.no_grad()
def masks(model, norms=None):
    """Which weights stay: {parameter name: (out, in) bool}, on the model's device. The model is
    left as it is.

    Of each 4, the 2 largest by |w| stay. With `norms`, the 2 largest by |w| · norm stay (Wanda,
    arXiv 2306.11695, eq. 1); `norms` are {parameter name: (in,)}, the L2 norm over the calibration
    tokens of each input of the matrix. Ties go to the lower index. Raises UserError for an input
    width that is no multiple of 4."""
    kept = {}
    for name, p in matrices(model):
        score = p.abs() if norms is None else p.abs() * norms[name].to(p.device)
        order = blocks_of_4(name, score).argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(order, dtype=torch.bool)               # (out, in/4, 4)
        best.scatter_(-1, order[..., :2], True)
        kept[name] = best.flatten(1)
    return kept


@torch.no_grad()
def hold_(model, optimizer, masks):
    """Zero in place what the masks leave out: weights and the optimizer's moments of them (all
    state of the weight's shape), so that only the kept weights move. `optimizer` may be None,
    `masks` may be empty.

    To be called after every optimizer step. The gradient norm that was clipped before also counts
    the gradients of the zeros (our choice)."""
    for name, mask in masks.items():
        p = model.get_parameter(name)
        state = optimizer.state.get(p, {}) if optimizer else {}
        moments = [value for value in state.values() if value.shape == p.shape]
        for tensor in (p, *moments):
            shard.local(tensor).masked_fill_(~shard.local(mask).to(p.device), 0)


@torch.no_grad()
def share(model):
    """The fraction of the blocks of 4 with at most 2 non-zeros: 1.0 for a 2:4 model. Raises
    UserError as `masks` does."""
    obeying = 0
    blocks = 0
    for name, p in matrices(model):
        obeys = (blocks_of_4(name, p) != 0).sum(-1) <= 2               # (out, in/4)
        obeying += obeys.sum().item()
        blocks += obeys.numel()
    return obeying / blocks


def pack(masks):
    """Masks for a checkpoint, one bit a weight: {name: (in, uint8 (out, ceil(in/8)))}. A checkpoint
    with `masks=pack(masks)` is a 2:4 model: train.py --init keeps its zeros."""
    packed = {}
    for name, mask in masks.items():
        bits = np.packbits(shard.whole(mask).cpu().numpy(), axis=1)
        packed[name] = (mask.size(1), torch.from_numpy(bits))
    return packed


def unpack(packed, device="cpu"):
    """The masks that `pack` was given, on the device. For None, of a model without masks: {}."""
    masks = {}
    for name, (inputs, bits) in (packed or {}).items():
        mask = np.unpackbits(bits.numpy(), axis=1, count=inputs)
        masks[name] = torch.from_numpy(mask).bool().to(device)
    return masks
