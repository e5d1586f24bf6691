"""SliceGPT (arXiv 2401.15024), a baseline to compare with: the residual stream itself gets
narrower.

    python -m pytest tests/methods/test_slicegpt.py
    python -m experiments.compare smollm2      # its row "SliceGPT"

Between two sub-blocks (attention, FFN) the residual stream may be turned by any orthogonal Q. If
one sub-block writes xQ and the next reads (xQ)Qᵀ, nothing changes: RMSNorm without its gain sees
only |x|, and the gain goes into the matrix behind the norm. SliceGPT takes the eigenvectors of Σ
xᵀx, the largest first, with another Q before each sub-block. It drops all but the first k columns
from Q, and so from every matrix that reads or writes the stream. What was x + f(x) becomes x·(QᵀQ')
+ f(x), and the k × k *shortcut* is what the change of basis costs. In the basis of the dense model
all this is one sentence: before each sub-block, the stream is projected onto its k principal
directions (tests/methods/test_slicegpt.py compares with exactly that).

As in the authors' code (microsoft/TransformerCompression, rotate.py), the PCA is of the stream
before the norm, as the sliced model has it there; the norm still divides by the dense width, though
k summands are left; the last sub-block's output and the head are not sliced. Turning alone changes
nothing, so the last output goes to the dense basis at once, where final norm and head stay as they
are. Two things without effect are left out: damping by 1 % of the mean diagonal (it moves
eigenvalues, not eigenvectors) and a last random rotation. Not here: training, files, generation,
parallel blocks, LayerNorm.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from model import Attention, rotary

# -- how narrow

def matrix_params(config, k):
    """Attention, FFN and shortcut parameters of `config` sliced to k directions. Without the
    shortcuts they are what config.removable_params() counts of the dense model."""
    D = config.head_dim
    # Of each sub-block: rows that read the stream, their biases, columns that write it.
    shapes = []
    for heads, kv_heads, neurons in zip(config.n_head, config.n_kv_head, config.d_ff):
        if heads > 0:
            rows = (heads + 2 * kv_heads) * D
            shapes.append((rows, rows * config.qkv_bias, heads * D))
        if neurons > 0:
            shapes.append((2 * neurons, 0, neurons))
    total = 0
    for read, bias, write in shapes:
        total += k * (read + write + k) + bias
    # The last sub-block and its shortcut write d_model wide.
    if shapes:
        _, _, write = shapes[-1]
        total += (config.d_model - k) * (write + k)
    return total


def width(config, keep):
    """The largest k, a multiple of 8 as in the authors' code and the same everywhere, with
    matrix_params at most `keep` of config.removable_params(). Raises UserError if keep is not
    between 0 and 1, or leaves too little for k = 8."""
    if not 0 < keep < 1:
        raise UserError(f"keep {keep} must be between 0 and 1, as the kept fraction of attention "
                        "and FFN parameters")
    whole = config.removable_params()
    budget = math.floor(keep * whole + 1e-6)
    widths = range(8, config.d_model, 8)
    fitting = [k for k in widths if 0 < matrix_params(config, k) <= budget]
    if not fitting:
        raise UserError(f"keep {keep} allows {budget:,} of {whole:,} attention and FFN parameters, "
                        f"and slicing to 8 of {config.d_model} directions leaves "
                        f"{matrix_params(config, 8):,} with shortcuts; keep more")
    return fitting[-1]


# -- the sliced model

def replace(linear, weight):
    """Give the Linear another matrix, of any shape. Its bias and dtype stay."""
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype))


class SubBlock(nn.Module):
    """Attention or FFN from one basis to another, x·shortcut + layer(x / rms): (B, T, k) -> (B, T,
    k'). Made of the dense model's norm and layer and the `basis` (C, k) to read from. Until
    `write_to` it writes to the dense basis."""
    def __init__(self, norm, layer, basis):
        super().__init__()
        self.d_model = basis.size(0)
        self.eps = norm.eps
        layer = copy.deepcopy(layer)
        is_attention = isinstance(layer, Attention)
        self.attention = layer if is_attention else None
        self.ffn = None if is_attention else layer
        readers = (layer.q, layer.k, layer.v) if is_attention else (layer.gate, layer.up)
        for linear in readers:
            replace(linear, linear.weight.double() * norm.weight.double() @ basis)
        self.shortcut = nn.Parameter(basis.T.to(norm.weight.dtype))

    def write_to(self, basis):
        """Turn and slice the output: basis (C, k')."""
        linear = self.attention.o if self.attention is not None else self.ffn.down
        replace(linear, basis.T @ linear.weight.double())
        self.shortcut = nn.Parameter((self.shortcut.double() @ basis).to(self.shortcut.dtype))

    def forward(self, x, cos, sin, mask=None):
        # The mean of squares is over d_model, not over k, as in the authors' code.
        mean_square = x.square().sum(-1, keepdim=True) / self.d_model
        y = x * (mean_square + self.eps).rsqrt()
        if self.attention is not None:
            return x @ self.shortcut + self.attention(y, cos, sin, mask=mask)
        return x @ self.shortcut + self.ffn(y)


class Sliced(nn.Module):
    """What eval.evaluate and tasks.questions need of a model. `config` is the dense model's, though
    the head is a matrix of its own here."""
    evaluation_only = "it has SliceGPT's rotations and shortcuts"

    def __init__(self, config, embedding, sub_blocks, norm, head):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(*embedding.shape, _weight=embedding)
        self.sub_blocks = nn.ModuleList(sub_blocks)
        self.norm = norm
        self.head_weight = nn.Parameter(head)
        self.requires_grad_(False)

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """As GPT.hidden: (B, T) -> normed hidden states (B, T, C) in the dense model's basis.
        Raises UserError if there is a cache."""
        if cache is not None:
            raise UserError("a sliced model is for evaluation and keeps no cache; call hidden with "
                            "cache None")
        x = self.embed(idx)
        cos, sin = rotary(self.config, 0, idx.size(1), idx.device, x.dtype)
        if positions is not None:
            cos = cos[positions][:, None]             # (B, 1, T, D)
            sin = sin[positions][:, None]
        for sub_block in self.sub_blocks:
            x = sub_block(x, cos, sin, mask)
        return self.norm(x)

    def forward(self, idx):
        """Token ids (B, T) -> logits (B, T, V)."""
        return F.linear(self.hidden(idx), self.head_weight)

    def params(self):
        """Parameters by group: {"norm", "shortcut", "attention", "ffn", "embedding", "head",
        "total"}."""
        groups = dict.fromkeys(("norm", "shortcut", "attention", "ffn", "embedding", "head"), 0)
        for name, p in self.named_parameters():
            # "norm" comes first: q_norm and k_norm are norms. "embed" begins as "embedding".
            group = next(group for group in groups if group[:5] in name)
            groups[group] += p.numel()
        return groups | {"total": sum(groups.values())}


# -- slice

def principal(stream):
    """Tensors (B, T, C) -> eigenvectors of Σ xᵀx over their rows x: the columns of (C, C), in
    float64, largest eigenvalue first."""
    gram = 0
    for x in stream:
        rows = x.flatten(0, 1).double()
        gram = gram + rows.T @ rows
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


@torch.no_grad()
def sliced_to(model, batches, k):
    """The GPT `model` sliced to k of its d_model directions, any k -> Sliced. See `slicegpt`."""
    pairs = []
    for block in model.blocks:
        pairs += [(block.attn_norm, block.attn), (block.ffn_norm, block.ffn)]
    dtype = model.embed.weight.dtype
    turns = [rotary(model.config, 0, idx.size(1), idx.device, dtype) for idx in batches]
    # The calibration text's stream, (B, T, C) each, in the dense basis.
    stream = [model.embed(idx) for idx in batches]
    sub_blocks = []
    for norm, layer in pairs:
        if layer is None:
            continue
        basis = principal(stream)[:, :k]
        if sub_blocks:
            sub_blocks[-1].write_to(basis)
        else:
            embedding = (model.embed.weight.double() @ basis).to(dtype)
        sub_block = SubBlock(norm, layer, basis)
        sub_blocks.append(sub_block)
        basis = basis.to(dtype)
        stream = [sub_block(x @ basis, *turn) for x, turn in zip(stream, turns)]
    norm = copy.deepcopy(model.norm)
    return Sliced(model.config, embedding, sub_blocks, norm, model.head_weight.clone())


def slicegpt(model, batches, keep, counts_directions=False):
    """Slice a float32 GPT, which stays as it is -> Sliced, on the model's device, with at most
    `keep` of its attention and FFN parameters, shortcuts included. With `counts_directions` the
    budget is that of the authors' code: `keep` of the directions, and the shortcuts come on top.

    `batches`: calibration token ids, (B, T) each. Their stream (tokens · d_model values) stays in
    memory. Raises UserError as `width` does, for fewer tokens than d_model, and on a device without
    float64."""
    C = model.config.d_model
    k = int(keep * C) // 8 * 8 if counts_directions else width(model.config, keep)
    if k < 8:
        raise UserError(f"keep {keep} of {C} directions is less than 8; keep more")
    device = model.embed.weight.device
    tokens = sum(idx.numel() for idx in batches)
    if tokens < C:
        raise UserError(f"{tokens} calibration tokens do not span {C} directions; give at least "
                        f"{C}")
    if device.type == "mps":
        raise UserError("the rotations are made in float64, which Apple's GPUs lack; load the "
                        "model on the CPU")
    return sliced_to(model, [idx.to(device) for idx in batches], k)
