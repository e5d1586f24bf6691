"""Cross-entropy and distillation from logits, without ever holding a whole (B, T, V) array; when to
drop the teacher.

    python -m pytest tests/test_distill.py      # against torch.distributions and whole logits

`kd_loss` is the formula on whole logits, to read. `chunked_loss` is the same formula, to run: it
takes *hidden states* and the output projection, and logits exist for one chunk of tokens at a time,
widened to float32. Each chunk's gradient is formed at once, in the forward pass, so that nothing of
size V is kept for the backward pass.

IDEA Prune (arXiv 2503.05920) does not publish its distillation loss. The forward KL divergence on
logits at temperature 1 (Minitron's best, arXiv 2407.14679), mixed with cross-entropy, is our
choice. A target may be IGNORED: all means are over the targets that count, and if none does the loss
and its gradient are 0. Not here: losses on inner layers, cached teachers.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import IGNORED

# Logits per chunk, by the dtype of the product: 42, 170 and 2,688 tokens at V = 49,152. Seconds of
# the loss alone on one thread for 2^21, 2^22, 2^23 and 2^24: in bfloat16 at V = 49,152, C = 576
# without a teacher 1.8, 1.4, 1.2, 1.1, and at V = 50,257, C = 64 with one 0.31, 0.27, 0.27, 0.32; in
# float32 at V = 50,257, C = 64 with a teacher 0.51, 0.57, 0.61, 0.67. SmolLM2's whole training step
# takes equally long with 2^23 and 2^24.
CHUNK_VALUES = {"cpu": 2**21, "cpu, bfloat16": 2**23, "gpu": 2**27}
# Values that a CPU's cache should hold: 4 MB in float32.
BLOCK_VALUES = 2**20
# Matrix units read rows whose length is a multiple of this.
TILE = {"cpu": 1, "cpu, bfloat16": 1, "gpu": 64}


def kd_loss(logits, teacher_logits, targets, kd_weight=0.5, temperature=1.0):
    """(1 - kd_weight) · cross-entropy + kd_weight · temperature² · KL(teacher ‖ student), mean nats
    per target that counts, for logits (N, V), teacher_logits (N, V) and targets (N,). The factor
    temperature² keeps the size of the gradient independent of the temperature (Hinton et al., arXiv
    1503.02531)."""
    counts = targets != IGNORED
    count = counts.sum().clamp(min=1)
    ce = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED) / count
    log_p = F.log_softmax(logits / temperature, -1)
    log_q = F.log_softmax(teacher_logits / temperature, -1)
    divergences = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    divergence = (divergences * counts).sum() / count * temperature**2
    return (1 - kd_weight) * ce + kd_weight * divergence


# -- the same loss in chunks

def kind_of(weight):
    """The key of CHUNK_VALUES and TILE."""
    if not weight.is_cpu:
        return "gpu"
    return "cpu, bfloat16" if weight.dtype == torch.bfloat16 else "cpu"


def chunk_tokens(weight):
    """Tokens of a chunk for the output projection `weight` (V, C), in the dtype that it is
    multiplied in. Each chunk adds to the whole gradient of the projection, so larger chunks save
    time. On a CPU a chunk's arrays should stay in its cache. From 32 MB on, the C library would
    also take an array from the system anew each time, zeros and all. On a GPU the number is a
    multiple of 64 if that many fit, as matrix units work in such tiles."""
    tokens = max(1, CHUNK_VALUES[kind_of(weight)] // weight.size(0))
    tile = TILE[kind_of(weight)]
    return tokens if tokens < tile else tokens // tile * tile


def block_tokens(weight):
    """Tokens of a chunk that are widened to float32 at a time. On a CPU a dozen passes then find
    them in its cache. A compiler fuses these passes, and a GPU has no such cache: there a block is
    the whole chunk."""
    if weight.is_cpu and not torch.compiler.is_compiling():
        return max(1, BLOCK_VALUES // weight.size(0))
    return chunk_tokens(weight)


def operand(weight):
    """The output projection (V, C) in the form that every chunk is multiplied with. Under autocast
    it is cast once, instead of once per chunk. It gets rows of zeros up to a multiple of TILE: the
    50,257 rows of GPT-2's vocabulary would keep a GPU's matrix units from being used."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = weight.to(torch.get_autocast_dtype(device))
    rows = -weight.size(0) % TILE[kind_of(weight)]
    return F.pad(weight, (0, 0, 0, rows)) if rows else weight


def soften(log_p, temperature):
    """Log-probabilities at a temperature, from those at temperature 1, where it is the same
    array."""
    return log_p if temperature == 1 else (log_p / temperature).log_softmax(-1)


def token_losses(logits, targets, teacher_logits=None, kd_weight=0.5, temperature=1.0,
                 needs_grad=True):
    """The losses of each token and their gradient, for logits (N, V), targets (N,) and
    teacher_logits (N, V) or None. Both arrays of logits are overwritten.

    Returns cross-entropy, temperature² · KL(teacher ‖ student) and the teacher's cross-entropy,
    each (N,) in nats; and the gradient (N, V) of (1 - kd_weight) · cross-entropy + kd_weight · KL
    in the logits, or None without needs_grad. Both gradients are the student's softmax minus a
    target. They are formed where the logits were, and returned as that array."""
    y = targets[:, None]
    w = 0.0 if teacher_logits is None else kd_weight
    # p is the student's distribution, q the teacher's.
    log_p = torch.log_softmax(logits, -1, out=logits)
    ce = -log_p.gather(1, y).squeeze(1)
    divergence = teacher_ce = torch.zeros_like(ce)
    if teacher_logits is not None:
        log_q = torch.log_softmax(teacher_logits, -1, out=teacher_logits)
        teacher_ce = -log_q.gather(1, y).squeeze(1)
        soft_p = soften(log_p, temperature)
        soft_q = soften(log_q, temperature)
        q = soft_q.exp()
        divergence = soft_q.sub_(soft_p).mul_(q).sum(-1) * temperature**2
    if not needs_grad:
        return ce, divergence, teacher_ce, None

    # Cross-entropy alone has the gradient p - onehot(target). The target's part is subtracted at
    # the end.
    gradient = log_p.exp_()
    if teacher_logits is not None:
        if temperature == 1:
            # (1 - w) · p + w · (p - q) = p - w · q
            gradient.sub_(q, alpha=w)
        else:
            gradient.mul_(1 - w).add_(soft_p.exp_().sub_(q), alpha=w * temperature)
    gradient.scatter_add_(1, y, torch.full_like(gradient[:, :1], w - 1))
    return ce, divergence, teacher_ce, gradient


@torch.library.custom_op("nanoprune::add_product_", mutates_args={"out"})
def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """out (V, C) += alpha · aᵀ b for a (N, V), b (N, C) of one dtype. This is an operator of its
    own, because a compiler that sees into it adds the products of all chunks in one kernel at the
    end, and keeps each until then. A bfloat16 product is added to a float32 `out` in parts that a
    CPU's cache holds."""
    if a.dtype == out.dtype:
        out.addmm_(a.T, b, alpha=alpha)
        return
    part = max(1, BLOCK_VALUES // out.size(1)) if out.is_cpu else out.size(0)
    for start in range(0, out.size(0), part):
        rows = slice(start, start + part)
        out[rows].add_(a[:, rows].T @ b, alpha=alpha)


class ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` as one differentiable function: hidden states h (N, C), projection w (V,
    C)."""

    @staticmethod
    def forward(ctx, h, w, targets, teacher_h, teacher_w, kd_weight, temperature, needs_grad,
                needs_dw):
        N = h.size(0)
        V = w.size(0)
        padded_w = operand(w)                                                   # (at least V, C)
        padded_teacher_w = None if teacher_h is None else operand(teacher_w)
        chunk = chunk_tokens(padded_w)
        block = block_tokens(padded_w)
        # Losses are formed in float32, whatever autocast multiplies in (or in float64, in tests).
        wide = torch.promote_types(h.dtype, torch.float32)
        dh = torch.empty_like(h) if needs_grad else None
        dw = torch.zeros_like(padded_w, dtype=w.dtype) if needs_dw else None
        sums = h.new_zeros(3, dtype=wide)
        # Losses and gradients of IGNORED targets are multiplied by 0, those of the others by `scale`,
        # which is 1 if all count. Nothing here waits for a GPU to count them.
        counts = (targets != IGNORED).to(wide)                                  # (N,), 0 or 1
        scale = N / counts.sum().clamp(min=1)
        targets = targets.clamp(min=0)
        for a in range(0, N, chunk):
            x = h[a:a + chunk]
            y = targets[a:a + chunk]
            # (chunk, at least V): the only logits that exist at this moment; in bfloat16 under
            # autocast. The gradient takes their place, block by block.
            product = x @ padded_w.T
            teacher_product = None
            if teacher_h is not None:
                teacher_product = teacher_h[a:a + chunk] @ padded_teacher_w.T
            for b in range(0, len(x), block):
                rows = slice(b, b + block)
                logits = product[rows, :V]
                teacher_logits = None if teacher_h is None else teacher_product[rows, :V].to(wide)
                *losses, g = token_losses(logits.to(wide), y[rows], teacher_logits, kd_weight,
                                          temperature, needs_grad)
                sums += torch.stack([(values * counts[a:a + chunk][rows]).sum() for values in losses])
                if needs_grad and logits.dtype != wide:
                    logits.copy_(g)
            # Chain rule at once, so that the gradient g in the logits can go: dh = g w / N and
            # dw += gᵀ x / N. The logits of rows of zeros are zero: they need no gradient.
            if needs_grad:
                dh[a:a + chunk] = (product @ padded_w) / N
                if needs_dw:
                    counted_x = x * counts[a:a + chunk, None].to(x.dtype)
                    add_product_(dw, product, counted_x.to(product.dtype), 1 / N)
        parts = sums / N * scale
        loss = parts[0] if teacher_h is None else (1 - kd_weight) * parts[0] + kd_weight * parts[1]
        ctx.mark_non_differentiable(parts)
        if needs_grad:
            ctx.save_for_backward(dh, None if dw is None else dw[:V], counts, scale)
        return loss.clone(), parts

    @staticmethod
    def backward(ctx, dloss, _):
        dh, dw, counts, scale = ctx.saved_tensors
        dloss = dloss * scale
        dw = None if dw is None else dw.mul_(dloss)
        return (dh.mul_(dloss * counts[:, None]), dw, None, None, None, None, None, None, None)


def chunked_loss(hidden, weight, targets, teacher_hidden=None, teacher_weight=None, kd_weight=0.5,
                 temperature=1.0):
    """Loss of a batch from its last hidden states: cross-entropy without a teacher, `kd_loss` with
    one.

    hidden (B, T, C), weight (V, C), targets (B, T), teacher_hidden (B, T, C'), teacher_weight (V,
    C'). If the teacher has fewer rows, the student's last ones are padding, and both distributions
    are over the teacher's. Returns the loss (differentiable in hidden and weight, once) and a detached (3,):
    cross-entropy, temperature² · KL, and the teacher's cross-entropy, all mean nats per target that
    counts, or 0 if none does. The last two are 0 without a teacher."""
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.detach().flatten(0, 1)
        teacher_weight = teacher_weight.detach()
        if len(teacher_weight) < len(weight):
            weight = weight[:len(teacher_weight)]
    needs_dw = torch.is_grad_enabled() and weight.requires_grad
    needs_grad = needs_dw or (torch.is_grad_enabled() and hidden.requires_grad)
    return ChunkedLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), teacher_hidden,
                             teacher_weight, kd_weight, temperature, needs_grad, needs_dw)


class Objective(nn.Module):
    """The training loss of a model inside one forward pass, so that DDP and torch.compile see all
    of it."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model = model
        self.kd_weight = kd_weight
        self.temperature = temperature

    def forward(self, x, y, teacher_hidden=None, teacher_weight=None):
        """Token ids x and targets y (B, T); the teacher's hidden states (B, T, C') and projection
        (V, C'), or neither. Returns what `chunked_loss` returns."""
        hidden = self.model.hidden(x)
        return chunked_loss(hidden, self.model.head_weight, y, teacher_hidden, teacher_weight,
                            self.kd_weight, self.temperature)


# -- the teacher

def freeze(model):
    """The model as a teacher: none of its parameters takes a gradient."""
    return model.requires_grad_(False).eval()


def halve_matrices(model):
    """Store the model's linear layers in bfloat16. The embedding, the norms and so the residual stream stay as they
    are."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def smooth(average, value, beta=0.98):
    """Moving average over about 1/(1-beta) steps. It starts at its first value, when `average` is
    None."""
    return value if average is None else beta * average + (1 - beta) * value


def overtaken(student, teacher, steps, beta=0.98):
    """Whether to drop the teacher for good: its smoothed cross-entropy on the student's own batches
    is no longer below the student's, after at least as many steps as the average is long (one
    batch's luck does not count). In our own trials, a teacher that the student had overtaken pulled
    it back."""
    return steps >= round(1 / (1 - beta)) and teacher >= student
