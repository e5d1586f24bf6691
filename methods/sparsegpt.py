"""Which weights go, and how the others make up for them, by the inverse Hessian: SparseGPT and MRP.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score sparsegpt      # or mrp
    python -m pytest tests/methods/test_sparse.py      # brute force over masks, the formula of MRP

Both begin from Optimal Brain Surgeon. A matrix W (out, in) reads inputs x, and H = E[x xᵀ] + λ I is the
Hessian of half of its squared output error, the same for all rows. If the weights M of one row w have to
go, the best change of all its weights, and the error that remains, are

    δw = -w_M ([H^-1]_MM)^-1 [H^-1]_M,:          loss = ½ w_M ([H^-1]_MM)^-1 w_Mᵀ

- MRP (arXiv 2410.15567) computes this loss for every set M of one group, such as the six pairs of 2:4,
  and takes the set with the least. The change follows for all groups at once: methods/refit.py.
- SparseGPT (arXiv 2301.00774, algorithm 1) takes single weights, M = {j}, column by column from left to
  right, and only columns to the right of j change. Then [H^-1]_jj is that of the inverse of H without
  the columns before j. All of these inverses are in one Cholesky factor, H^-1 = Uᵀ U with U upper
  triangular: loss_j = ½ (w_j / U_jj)², δw = -(w_j / U_jj) U_j,:.

Both are rows of SCORES in methods/sparse.py and have its form: (w, inputs, pattern) -> (new weights,
mask). Not here: the other scores and the loop over matrices (methods/sparse.py).
"""
import itertools
import math

import torch

from methods.mend import damped

# MRP tries every set of weights that could go from a group. 8 choose 4 is 70.
MOST_SETS = 100


def inverse(gram, damping):
    """H^-1 = (G + λ I)^-1 in float64, λ = damping · mean of the diagonal of G."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(gram.double(), damping)))


def mrp(w, inputs, pattern, damping=0.01):
    """Of each group that set of weights goes whose loss is the least (arXiv 2410.15567). That is exact for
    one group alone. The weights that stay keep their values."""
    size = pattern.group
    h = inverse(inputs.gram, damping)
    blocks = torch.stack([h[i:i + size, i:i + size] for i in range(0, len(h), size)])    # (groups, m, m)
    sets = list(itertools.combinations(range(size), size - pattern.kept))
    losses = []
    for gone in map(list, sets):
        metric = torch.linalg.inv(blocks[:, gone][:, :, gone]).to(w.dtype)
        values = pattern.grouped(w)[..., gone]                                           # (out, groups, m - n)
        losses.append(torch.einsum("ogi,gij,ogj->og", values, metric, values))
    stays = torch.ones(len(sets), size, dtype=torch.bool, device=w.device)
    for row, gone in zip(stays, map(list, sets)):
        row[gone] = False
    mask = stays[torch.stack(losses).argmin(0)].flatten(1)
    return w * mask, mask


def sparsegpt(w, inputs, pattern, damping=0.01, block=128):
    """SparseGPT (arXiv 2301.00774, algorithm 1). Weights with the least (w_j / U_jj)² go, as they are by
    then: of each group when its first column's turn comes, or of each `block` of columns over all rows.
    The updates of columns behind a block wait until its end."""
    w = w.clone()
    w[:, inputs.gram.diagonal() == 0] = 0
    factor = torch.linalg.cholesky(inverse(inputs.gram, damping), upper=True)
    # If all inputs are 0, it would be infinite in float32, and 0 times infinity is no number.
    factor = factor.clamp(max=torch.finfo(w.dtype).max).to(w.dtype)
    if pattern.group:
        block = math.ceil(block / pattern.group) * pattern.group
    mask = torch.ones_like(w, dtype=torch.bool)
    for begin in range(0, w.size(1), block):
        part = slice(begin, begin + block)
        errors = sparsegpt_block_(w[:, part], mask[:, part], factor[part, part], pattern)
        w[:, begin + block:] -= errors @ factor[part, begin + block:]
    return w * mask, mask


def sparsegpt_block_(w, mask, factor, pattern):
    """Prune, in place, a block of columns and fill in its mask. Returns the errors (out, block) that the
    columns behind the block make up for."""
    scale = factor.diagonal()
    errors = torch.zeros_like(w)
    # Without groups all weights of the block compete.
    if pattern.group is None:
        scores = (w / scale).square()
        mask.copy_(pattern.best(scores.reshape(1, -1)).view_as(mask))
    for j in range(w.size(1)):
        if pattern.group and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            mask[:, group] = pattern.best((w[:, group] / scale[group]).square())
        errors[:, j] = torch.where(mask[:, j], 0, w[:, j] / scale[j])
        w[:, j:] -= errors[:, j:j + 1] * factor[j, j:]
    return errors
