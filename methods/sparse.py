"""Sparse weights: single weights of the blocks' matrices are zero and stay zero.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score wanda --mend least-squares --out runs/two-four
    python prune.py --init runs/scratch-laptop-0 --structure weights --keep 0.5 --score sparsegpt --layer-by-layer
    python train.py --init runs/two-four --plan scratch      # trains on, 2:4 after every step
    python -m pytest tests/methods/test_sparse.py            # exact least squares, brute force over masks

A pattern says how many weights stay: n of each m consecutive ones of a row ("2:4", which NVIDIA's
sparse tensor cores read, arXiv 2104.08378), or a fraction of each row ("weights"; SparseGPT takes it
of each 128 columns). SCORES choose which. Two ways mend what is lost without training: the weights
that stay are fitted anew (methods/refit.py), or the choice is corrected (methods/dsnot.py). `cut_` is
given the statistics of one pass over the dense model. `cut_layer_by_layer_` calibrates each layer behind
layers that are sparse already, as the released codes of Wanda, SparseGPT and DSnoT do.

This is the exception to the first fact of prune.py. A unit that is zero as a whole gets gradients of
exactly 0. A single zero inside a matrix gets a gradient like any other weight, and would come back
with the next step. So these zeros need a mask, applied after every optimizer step (`hold_`).
Embedding and head stay dense. The model is stored and run dense, so it costs what it cost before. Not
here: the scores by the inverse Hessian (methods/sparsegpt.py), masks that change while the model trains,
compressed storage and sparse kernels.
"""
import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import shard
from common import UserError, progress
from methods.dsnot import refined
from methods.mend import Walk
from methods.offload import on_device
from methods.refit import refit
from methods.sparsegpt import MOST_SETS, mrp, sparsegpt
from score import Stats, averaged, hook_activations

# Ends of the module names of the matrices whose inputs are measured. See `reader`.
READERS = (".q", ".o", ".gate", ".down")
MENDS = ("none", "least-squares", "dsnot")


# -- patterns

@dataclass(frozen=True)
class Pattern:
    """How many weights stay: `kept` of each `group` consecutive weights of a row, or the fraction
    `kept` of a row where there are no groups."""
    kept: float
    group: int | None = None

    def grouped(self, matrix):
        """View (out, in) as (out, groups, weights of a group)."""
        return matrix.unflatten(1, (-1, self.group or matrix.size(1)))

    def number(self, size):
        """How many weights stay of a group of this size."""
        return self.kept if self.group else math.floor(self.kept * size + 1e-6)

    def best(self, scores):
        """The mask (out, in) of the best scores (out, in) of each group. Ties go to the lower index."""
        order = self.grouped(scores).argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool)               # (out, groups, size)
        mask.scatter_(-1, order[..., :self.number(order.size(-1))], True)
        return mask.flatten(1)


def is_sparse(structure):
    """Whether a --structure is a pattern of single weights."""
    return structure == "weights" or re.fullmatch(r"\d+:\d+", structure) is not None


def pattern_of(structure, keep):
    """The Pattern of a --structure: n of each m weights stay for "n:m" (the released codes of Wanda
    and SparseGPT count those that go), the fraction `keep` for "weights"."""
    if structure == "weights":
        return Pattern(keep)
    kept, group = structure.split(":")
    return Pattern(int(kept), int(group))


def check(structure, score):
    """Raise UserError for a pattern that means nothing, or that has too many sets for score "mrp"."""
    if structure == "weights":
        return
    pattern = pattern_of(structure, None)
    if not 0 < pattern.kept < pattern.group:
        raise UserError(f"--structure {structure} keeps {pattern.kept} of each {pattern.group} weights; give n:m with "
                        "n at least 1 and less than m, such as 2:4")
    if score == "mrp" and math.comb(pattern.group, pattern.kept) > MOST_SETS:
        raise UserError(f"--score mrp would try every set of {pattern.kept} of {pattern.group} weights, which are more "
                        f"than {MOST_SETS}; give smaller groups, such as 4:8, or another score")


def check_widths(model, pattern):
    """Raise UserError if a matrix's input width is no multiple of the pattern's group, or if the pattern
    keeps no weight of a row."""
    for name, p in matrices(model):
        if pattern.number(p.size(1)) == 0:
            least = math.ceil(1000 / p.size(1)) / 1000
            raise UserError(f"--keep {pattern.kept:g} keeps no weight of a row of {name}, which has {p.size(1)} "
                            f"inputs; keep at least {least:g}")
        if pattern.group and p.size(1) % pattern.group:
            remedy = f"take a model whose d_model and head_dim are multiples of {pattern.group}"
            if name.endswith("down.weight"):
                remedy = f"cut its FFN with --multiple-of {pattern.group}"
            raise UserError(f"{name} has {p.size(1)} inputs, and {pattern.kept}:{pattern.group} needs a multiple of "
                            f"{pattern.group}; {remedy}")


# -- masks

def matrices(model, layer=None):
    """All matrices of the blocks, or of one layer's, which become sparse: [(parameter name, parameter
    (out, in))]."""
    blocks = "blocks." if layer is None else f"blocks.{layer}."
    return [(name, p) for name, p in model.named_parameters() if name.startswith(blocks) and p.dim() == 2]


@torch.no_grad()
def random_masks(model, sparsity, seed):
    """Masks that leave out the same share of each matrix at random, for sparse pretraining and dense
    fine-tuning (SPDF, arXiv 2303.10464): {parameter name: (out, in) bool}, spread as the parameters
    are. The same seed gives the same masks on any device and any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, p in matrices(model):
        order = torch.randperm(p.numel(), generator=generator)
        mask = torch.ones(p.numel(), dtype=torch.bool)
        mask[order[:round(sparsity * p.numel())]] = False
        kept[name] = shard.spread_rows(mask.view(p.shape).to(p.device), p)
    return kept


def nonzero(model):
    """The masks of a model that is sparse already: {parameter name: (out, in) bool}."""
    return {name: p != 0 for name, p in matrices(model)}


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
def share(model, pattern):
    """The fraction of the groups that have no more non-zeros than the pattern keeps: 1.0 for a model
    that obeys it. Raises UserError as `check_widths` does."""
    check_widths(model, pattern)
    obeying = 0
    groups = 0
    for _, p in matrices(model):
        nonzeros = (pattern.grouped(p) != 0).sum(-1)                   # (out, groups)
        obeying += (nonzeros <= pattern.number(p.size(1))).sum().item()
        groups += nonzeros.numel()
    return obeying / groups


def describe(model, pattern):
    """A sentence that says how far the model obeys the pattern."""
    if pattern.group:
        return (f"{pattern.group - pattern.kept} of each {pattern.group} weights are zero in "
                f"{share(model, pattern):.0%} of the groups in the blocks' matrices")
    weights = sum(p.numel() for _, p in matrices(model))
    left = sum(p.count_nonzero().item() for _, p in matrices(model))
    return f"{left:,} of the {weights:,} weights of the blocks' matrices are left: {left / weights:.4f}"


def pack(masks):
    """Masks for a checkpoint, one bit a weight: {name: (in, uint8 (out, ceil(in/8)))}. A checkpoint
    with `masks=pack(masks)` is a sparse model: train.py --init keeps its zeros."""
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


# -- scores: (w (out, in), inputs, pattern) -> (new weights, mask), both (out, in)

@dataclass
class Inputs:
    """Statistics of what comes into one matrix over the calibration text, as far as they were asked
    for: means and mean squares (in,), and the mean of x xᵀ over the inputs x (in, in)."""
    mean: torch.Tensor | None
    square: torch.Tensor | None
    gram: torch.Tensor | None


def reader(name):
    """The matrix whose inputs were measured, and are those of the matrix `name` as well: q for q, k and
    v, gate for gate and up."""
    for part, measured in ((".k.", ".q."), (".v.", ".q."), (".up.", ".gate.")):
        name = name.replace(part, measured)
    return name


def inputs_of(name, stats, device):
    """The Inputs of a matrix from score.Stats, on the device."""
    sums = []
    for field in (stats.mean, stats.square, stats.gram):
        value = field.get(reader(name))
        sums.append(None if value is None else value.to(device))
    return Inputs(*sums)


def magnitude(w, inputs, pattern):
    """|w|."""
    mask = pattern.best(w.abs())
    return w * mask, mask


def wanda(w, inputs, pattern):
    """|w| · ‖x‖, where weights of one row compete (arXiv 2306.11695, eq. 1)."""
    mask = pattern.best(w.abs() * inputs.square.sqrt())
    return w * mask, mask


@dataclass(frozen=True)
class Score:
    """A way to choose the weights that stay, and the fields of score.Stats that it reads."""
    function: Callable
    needs: frozenset = frozenset()


SCORES = {
    "magnitude": Score(magnitude),
    "wanda": Score(wanda, frozenset({"square"})),
    "sparsegpt": Score(sparsegpt, frozenset({"gram"})),
    "mrp": Score(mrp, frozenset({"gram"})),
}


# -- the cut

def needs(score, mend):
    """The fields of score.Stats, for the matrices in READERS, that `cut_` reads."""
    fields = set(SCORES[score].needs)
    if mend == "least-squares":
        fields.add("gram")
    elif mend == "dsnot":
        fields |= {"mean", "square"}
    return fields


@torch.no_grad()
def cut_(model, stats, pattern, score, mend="none", layer=None):
    """Make the model's matrices sparse, in place, or only those of one `layer`. `mend`: "least-squares"
    fits the weights that stay to the dense ones (`refit`), and "dsnot" exchanges some (`refined`); both
    forget SparseGPT's updates. Raises UserError as `check_widths` does."""
    check_widths(model, pattern)
    device = model.embed.weight.device
    for name, p in matrices(model, layer):
        # Weights may be stored in bfloat16, and layers elsewhere than the rest of the model.
        w = p.to(device, torch.promote_types(p.dtype, torch.float32))
        inputs = inputs_of(name, stats, device)
        # Autocast, if the caller has it on, would round the products of least squares.
        with torch.autocast(device.type, enabled=False):
            weights, mask = SCORES[score].function(w, inputs, pattern)
            if mend == "least-squares":
                weights = refit(w, mask, inputs.gram)
            elif mend == "dsnot":
                weights = w * refined(w, mask, inputs, pattern)
        p.copy_(weights)


@torch.no_grad()
def cut_layer_by_layer_(model, batches, pattern, score, mend="none", dtype=None):
    """Make the model's matrices sparse, in place, by statistics of the text as it arrives behind sparse
    layers. `score` and `mend` are those of `cut_`, `batches` a list of token ids (x, y), each (B, T).
    Products are in `dtype`, by default that of autocast or of the weights; streams are as in mend.Walk.
    Raises UserError as `check_widths` does.

    As in the released codes of Wanda, SparseGPT and DSnoT, a layer runs twice: dense for the statistics
    of all of its matrices, and sparse for the inputs of the next layer. Memory on the device, besides the
    weights: the residual streams of all windows in front of a layer and behind it, and the sums of one
    layer. Returns Stats with the cosine of each dense layer's input and output."""
    check_widths(model, pattern)
    device = model.embed.weight.device
    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    walk = Walk(model, batches[0][0].size(1), dtype)
    streams = [walk.start(model, x.to(device)) for x, _ in batches]
    cosine = {}
    for layer, block in enumerate(progress(model.blocks, "cut")):
        with on_device(block, device, changes=True):
            stats = layer_stats(walk, model, layer, streams, needs(score, mend))
            cut_(model, stats, pattern, score, mend, layer)
            streams = [walk.behind(block, stream) for stream in streams]
        cosine |= stats.cosine
        # Else the sums of two layers would lie in memory at once.
        del stats
    return Stats(cosine=cosine)


def layer_stats(walk, model, layer, streams, fields):
    """Stats with the `fields` of one layer's inputs and its cosine, from the streams (B, T, C) in front of
    it."""
    stats = Stats()
    cosines = []
    with contextlib.ExitStack() as hooks:
        hook_activations(model, stats, fields, READERS, hooks)
        for stream in streams:
            output = walk.behind(model.blocks[layer], stream)
            cosines.append(F.cosine_similarity(stream, output, dim=-1).sum())
            stats.tokens += stream[..., 0].numel()
            stats.windows += len(stream)
    stats.cosine[layer, "layer"] = cosines
    return averaged(stats, model, len(streams))
