"""Least squares for sparse weights: what stays of a matrix is fitted to what all of it put out.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score wanda --mend least-squares
    python -m pytest tests/methods/test_sparse.py      # torch's least squares, the formula of MRP

Let G be the mean of x xᵀ over the inputs x, and of one row w of the matrix let S be what stays and M what
goes. The best weights on S, and the same as a change of w, are

    w_S + w_M G_MS (G_SS + λ I)^-1               δw = -w_M ([H^-1]_MM)^-1 [H^-1]_M,:,   H = G + λ I

The left one is mend.mended for units. The right one is that of "Pruning Foundation Models for High
Accuracy without Retraining" (arXiv 2410.15567). Units go from all rows alike. Here each row has a mask
of its own and so equations of its own, and an exact solution would factor a matrix for each row.
Conjugate gradients solve all rows at once by products of whole matrices (our choice). Any mask will do.
Not here: what chooses it (methods/sparse.py).
"""
import torch

from methods.mend import damped


def refit(w, mask, gram, damping=0.01, steps=40):
    """The weights (out, in) on the mask that come nearest to what w puts out over the calibration text:
    the least tr((v - w) G (v - w)ᵀ) + λ |v - w·mask|², λ = damping · mean of the diagonal of G.

    So many `steps` of conjugate gradients are taken, with every input scaled to the same size."""
    h = damped(gram.to(w.dtype), damping)
    scale = h.diagonal().sqrt()
    h = h / scale / scale[:, None]
    tiny = torch.finfo(w.dtype).tiny
    kept = mask.to(w.dtype)
    dense = w * scale
    fitted = dense * kept
    residual = ((dense - fitted) @ h).mul_(kept)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        product = (direction @ h).mul_(kept)
        length = energy / (direction * product).sum(1, keepdim=True).clamp(min=tiny)
        fitted.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        before = energy
        energy = residual.square().sum(1, keepdim=True)
        direction.mul_(energy / before.clamp(min=tiny)).add_(residual)
    return fitted / scale
