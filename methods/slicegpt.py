"""SliceGPT (arXiv 2401.15024), a baseline to evaluate against: the residual stream itself made narrower.

    python -c "import model, slicegpt; print(slicegpt.width(model.preset('laptop', vocab_size=256)[0], keep=.8))"
    python -m pytest tests/methods/test_slicegpt.py

Between two sub-blocks (attention, FFN) the stream may be turned by any orthogonal Q: where one writes xQ and the next
reads (xQ)Qᵀ, nothing changes, as RMSNorm without its gain sees only |x|, and the gain goes into the matrix behind it.
SliceGPT takes the eigenvectors of Σ xᵀx, the largest first, another Q before each sub-block, and drops all but the
first k columns from Q and so from every matrix that reads or writes. What was x + f(x) becomes x·(QᵀQ') + f(x): the
k × k *shortcut* is what the other bases cost. In the basis of the dense model all this is one sentence: before each
sub-block, the stream is projected onto its k principal directions (tests/methods/test_slicegpt.py compares with just that).

As in their code (microsoft/TransformerCompression, rotate.py): the PCA is of the stream before the norm, as the sliced
model has it there; the norm still divides by the dense width, though k summands are left; the last sub-block's output
and the head are not sliced. As turning alone changes nothing, that output goes to the dense basis at once, where final
norm and head stay as they are. Without effect and left out: damping by 1 % of the mean diagonal (it moves eigenvalues,
not eigenvectors) and a last random rotation. Not here: training, files, generation, parallel blocks, LayerNorm.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from model import Attention, rotary


def matrix_params(config, k):
    """Attention, FFN and shortcut parameters of `config` sliced to k directions; without the shortcuts it is what
    config.removable_params() counts of the dense model."""
    D, shapes = config.head_dim, []                    # per sub-block: rows that read, their biases, columns that write
    for h, g, f in zip(config.n_head, config.n_kv_head, config.d_ff):
        shapes += [((h + 2 * g) * D, (h + 2 * g) * D * config.qkv_bias, h * D)] * (h > 0) + [(2 * f, 0, f)] * (f > 0)
    last = sum((config.d_model - k) * (write + k) for _, _, write in shapes[-1:])               # it writes d_model wide
    return sum(k * (read + write + k) + bias for read, bias, write in shapes) + last


def width(config, keep):
    """The largest k, a multiple of 8 as in their code and the same everywhere, with matrix_params at most `keep` of
    config.removable_params(). UserError: keep is not between 0 and 1, or leaves too little for k = 8."""
    if not 0 < keep < 1:
        raise UserError(f"keep {keep} must be between 0 and 1, as the kept fraction of attention and FFN parameters")
    whole = config.removable_params()
    budget = math.floor(keep * whole + 1e-6)
    fits = [k for k in range(8, config.d_model, 8) if 0 < matrix_params(config, k) <= budget]
    if not fits:
        raise UserError(f"keep {keep} allows {budget:,} of {whole:,} attention and FFN parameters, and slicing to 8 of "
                        f"{config.d_model} directions leaves {matrix_params(config, 8):,} with shortcuts; keep more")
    return fits[-1]


def replace(linear, weight):
    """Give the Linear another matrix, of any shape; its bias and dtype stay."""
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype))


class SubBlock(nn.Module):
    """Attention or FFN from one basis to another, x·shortcut + layer(x / rms): (B, T, k) -> (B, T, k'). Made of the
    dense model's norm and layer and the `basis` (C, k) to read from; until `write_to`, it writes to the dense basis."""
    def __init__(self, norm, layer, basis):
        super().__init__()
        self.d_model, self.eps, layer = basis.size(0), norm.eps, copy.deepcopy(layer)
        self.attention, self.ffn = (layer, None) if isinstance(layer, Attention) else (None, layer)
        for linear in (layer.q, layer.k, layer.v) if self.attention else (layer.gate, layer.up):
            replace(linear, linear.weight.double() * norm.weight.double() @ basis)
        self.shortcut = nn.Parameter(basis.T.to(norm.weight.dtype))

    def write_to(self, basis):
        """Turn and slice the output: basis (C, k')."""
        linear = self.attention.o if self.attention else self.ffn.down
        replace(linear, basis.T @ linear.weight.double())
        self.shortcut = nn.Parameter((self.shortcut.double() @ basis).to(self.shortcut.dtype))

    def forward(self, x, cos, sin, mask=None):
        y = x * (x.square().sum(-1, keepdim=True) / self.d_model + self.eps).rsqrt()         # not k: as their code
        return x @ self.shortcut + (self.attention(y, cos, sin, mask=mask) if self.attention else self.ffn(y))


class Sliced(nn.Module):
    """What eval.evaluate and tasks.loglikelihoods need of a model. `config`: the dense one's, though the head is a
    matrix of its own here."""
    evaluation_only = "it has SliceGPT's rotations and shortcuts"

    def __init__(self, config, embedding, sub_blocks, norm, head):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(*embedding.shape, _weight=embedding)
        self.sub_blocks, self.norm, self.head_weight = nn.ModuleList(sub_blocks), norm, nn.Parameter(head)
        self.requires_grad_(False)

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """As GPT.hidden, (B, T) -> normed hidden states (B, T, C) in the dense model's basis. UserError: a cache."""
        if cache is not None:
            raise UserError("a sliced model is for evaluation and keeps no cache; call hidden with cache None")
        x = self.embed(idx)
        cos, sin = rotary(self.config, 0, idx.size(1), idx.device, x.dtype)
        if positions is not None:
            cos, sin = cos[positions][:, None], sin[positions][:, None]             # (B, 1, T, D/2)
        for sub_block in self.sub_blocks:
            x = sub_block(x, cos, sin, mask)
        return self.norm(x)

    def forward(self, idx):
        """Token ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(idx), self.head_weight)

    def params(self):
        """Parameters by group: {"norm", "shortcut", "attention", "ffn", "embedding", "head", "total"}."""
        groups = dict.fromkeys(("norm", "shortcut", "attention", "ffn", "embedding", "head"), 0)
        for name, p in self.named_parameters():
            groups[next(group for group in groups if group[:5] in name)] += p.numel()      # norm first: q_norm, k_norm
        return groups | {"total": sum(groups.values())}


def principal(stream):
    """Tensors (B, T, C) -> eigenvectors of Σ xᵀx over their rows x, the columns of (C, C), float64, largest first."""
    gram = sum(x.T @ x for x in (x.flatten(0, 1).double() for x in stream))
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


@torch.no_grad()
def sliced_to(model, batches, k):
    """The GPT `model` sliced to k of its d_model directions, any k -> Sliced; see `slicegpt`."""
    pairs = [pair for b in model.blocks for pair in ((b.attn_norm, b.attn), (b.ffn_norm, b.ffn)) if pair[1] is not None]
    turns = [rotary(model.config, 0, idx.size(1), idx.device, model.embed.weight.dtype) for idx in batches]
    stream = [model.embed(idx) for idx in batches]                                  # (B, T, C) each, in the dense basis
    sub_blocks = []
    for norm, layer in pairs:
        basis = principal(stream)[:, :k]
        if sub_blocks:
            sub_blocks[-1].write_to(basis)
        else:
            embedding = (model.embed.weight.double() @ basis).to(model.embed.weight.dtype)
        sub_blocks.append(SubBlock(norm, layer, basis))
        stream = [sub_blocks[-1](x @ basis.to(x.dtype), *turn) for x, turn in zip(stream, turns)]
    return Sliced(model.config, embedding, sub_blocks, copy.deepcopy(model.norm), model.head_weight.clone())


def slicegpt(model, batches, keep):
    """Slice a float32 GPT, which stays as it is -> Sliced, on its device, at most `keep` of its attention and FFN
    parameters, shortcuts included. batches: calibration token ids, (B, T) each; their stream (tokens · d_model values)
    stays in memory. UserError: see `width`; fewer tokens than d_model; a device without float64."""
    k, C, device = width(model.config, keep), model.config.d_model, model.embed.weight.device
    if (tokens := sum(idx.numel() for idx in batches)) < C:
        raise UserError(f"{tokens} calibration tokens do not span {C} directions; give at least {C}")
    if device.type == "mps":
        raise UserError("the rotations are made in float64, which Apple's GPUs lack; load the model on the CPU")
    return sliced_to(model, [idx.to(device) for idx in batches], k)
