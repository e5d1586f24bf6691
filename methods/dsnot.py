"""DSnoT, Dynamic Sparse no Training (arXiv 2310.08915): exchange weights of a mask until the mean output is
right.

    python prune.py --init runs/scratch-laptop-0 --structure 2:4 --score wanda --mend dsnot
    python -m pytest tests/methods/test_sparse.py      # the first exchange, written out

Without the weights P a row w puts out something else: on average e = Σ_{j in P} w_j E[x_j] is missing.
After an exchange, where j in P returns and i goes, e - w_j E[x_j] + w_i E[x_i] is missing. All rows make
their exchanges side by side. No weight gets a new value. Not here: the mask to begin with
(methods/sparse.py), new values for what stays (methods/refit.py).
"""
import math

import torch

# DSnoT stops where less than this is missing of an output's mean. The released code has 0.1 for the
# sum over a window of 2,048 tokens.
MISSING = 0.1 / 2048


def refined(w, mask, inputs, pattern, cycles=50):
    """The mask (out, in) after so many `cycles`. In each one that pruned weight of a row returns whose
    w E[x] / Var[x] helps most, and the weight with the least |w| ‖x‖ goes for it: of the same group, or
    without groups of those whose removal helps, too.

    A row stops where no exchange brings the missing mean nearer to 0. That is our choice: the released
    code watches the sign of the mean for n:m, and nothing without groups."""
    mask = mask.clone()
    outputs = w * inputs.mean
    gains = outputs / (inputs.square - inputs.mean.square()).clamp(min=torch.finfo(w.dtype).tiny)
    losses = w.abs() * inputs.square.sqrt()
    missing = outputs.masked_fill(mask, 0).sum(1)
    columns = torch.arange(w.size(1), device=w.device)
    rows = (missing.abs() > MISSING).nonzero().flatten()
    for _ in range(cycles):
        sign = missing[rows].sign()[:, None]
        gain, grown = (sign * gains[rows]).masked_fill(mask[rows], -math.inf).max(1)
        if pattern.group:
            may_go = columns // pattern.group == (grown // pattern.group)[:, None]
        else:
            may_go = sign * outputs[rows] < 0
        loss, gone = losses[rows].masked_fill(~(may_go & mask[rows]), math.inf).min(1)
        after = missing[rows] - outputs[rows, grown] + outputs[rows, gone]
        is_better = (after.abs() < missing[rows].abs()) & gain.isfinite() & loss.isfinite()
        rows = rows[is_better]
        mask[rows, grown[is_better]] = True
        mask[rows, gone[is_better]] = False
        missing[rows] = after[is_better]
        rows = rows[missing[rows].abs() > MISSING]
        if rows.numel() == 0:
            break
    return mask
