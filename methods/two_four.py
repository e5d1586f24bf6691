"""2:4 sparsity: of each 4 consecutive weights along a matrix's input 2 are zero, and stay so while it trains on.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score wanda --out runs/two-four
    python train.py --init runs/two-four --plan scratch            # trains on, 2:4 after every step

The pattern that NVIDIA's sparse tensor cores read (arXiv 2104.08378). It is the exception to prune.py's first fact: a
unit that is zero as a whole gets gradients of exactly 0, a single zero inside a matrix gets one like any other weight
and would come back with the next step. So it needs a mask, applied after every optimizer step (`hold_`); which weights
stay is decided once. Half of each matrix of the blocks goes: q, k, v, o, gate, up, down; embedding and head stay dense.
Not here: the norms of the inputs that Wanda weighs with (whoever calibrates, prune.py), compressed storage, sparse
kernels (the model is stored and run dense: it costs what it cost), masks that change while the model trains.
"""
import numpy as np
import torch

from common import UserError

MATRICES = (".q", ".k", ".v", ".o", ".gate", ".up", ".down")         # ends of their modules' names


def blocks_of_4(name, matrix):
    """(out, in) -> view (out, in/4, 4). UserError: `in` is no multiple of 4."""
    if matrix.size(1) % 4:
        remedy = ("cut its FFN with --multiple-of 4" if name.endswith("down.weight") else
                  "take a model whose d_model and head_dim are multiples of 4")
        raise UserError(f"{name} has {matrix.size(1)} inputs, and 2:4 needs a multiple of 4; {remedy}")
    return matrix.unflatten(1, (-1, 4))


def matrices(model):
    """[(parameter name, parameter (out, in))] of what becomes 2:4: all matrices of the blocks."""
    return [(name, p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]


@torch.no_grad()
def masks(model, norms=None):
    """Which weights stay: {parameter name: (out, in) bool}, on the model's device; the model is left as it is. Of each
    4 the 2 largest by |w|, or with `norms` by |w| · norm (Wanda, arXiv 2306.11695, eq. 1); ties go to the lower
    index. norms: {parameter name: (in,)}, the L2 norm of each of that matrix's inputs over the calibration
    tokens. UserError: an input width that is no multiple of 4."""
    kept = {}
    for name, p in matrices(model):
        score = p.abs() if norms is None else p.abs() * norms[name].to(p.device)
        order = blocks_of_4(name, score).argsort(dim=-1, descending=True, stable=True)      # (out, in/4, 4)
        best = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], True)
        kept[name] = best.flatten(1)
    return kept


@torch.no_grad()
def hold_(model, optimizer, masks):
    """Zero in place what the masks leave out: weights, and the optimizer's moments of them (all state of the weight's
    shape), so that what moves the kept weights is theirs alone. optimizer may be None, masks empty. To be called after
    every optimizer step; the gradient norm that was clipped before it counts the zeros' gradients, too (our choice)."""
    for name, mask in masks.items():
        p = model.get_parameter(name)
        moments = optimizer.state.get(p, {}).values() if optimizer else ()
        for tensor in (p, *(m for m in moments if m.shape == p.shape)):
            tensor.masked_fill_(~mask.to(p.device), 0)


@torch.no_grad()
def share(model):
    """The fraction of the blocks of 4 that have at most 2 non-zeros: 1.0 for a 2:4 model. UserError as `masks`."""
    obey = [(blocks_of_4(name, p) != 0).sum(-1) <= 2 for name, p in matrices(model)]        # (out, in/4) each
    return sum(o.sum().item() for o in obey) / sum(o.numel() for o in obey)


def pack(masks):
    """Masks for a checkpoint, one bit a weight: {name: (in, uint8 (out, ceil(in/8)))}. checkpoint.save(…,
    masks=pack(masks)) makes a 2:4 model one: train.py --init keeps the zeros of a checkpoint that has `masks`."""
    return {name: (mask.size(1), torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1)))
            for name, mask in masks.items()}


def unpack(packed, device="cpu"):
    """The masks that `pack` was given; {} for None (a model without)."""
    return {name: torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=n)).bool().to(device)
            for name, (n, bits) in (packed or {}).items()}
