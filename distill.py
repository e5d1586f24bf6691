"""Cross-entropy and distillation on logits, never holding a whole (B, T, V) array; the frozen teacher and when to
drop it.

    python -m pytest tests/test_distill.py         # against torch.distributions and the plain full-logits loss

The loss takes *hidden states* and the output projection. Logits exist for one chunk of tokens at a time, widened to
float32; each chunk's gradient is formed at once, in the forward pass, so that nothing of size V is kept for the
backward pass. IDEA Prune (arXiv 2503.05920) does not publish its distillation loss: forward KL on logits at
temperature 1 (Minitron's best, arXiv 2407.14679), mixed with cross-entropy, is our choice. Not here: losses on inner
layers, cached teachers.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK_VALUES = {"cpu": 2**21, "gpu": 2**24}     # logits per chunk; on a CPU 8 MB in float32: 42 tokens at V = 49,152
TILE = {"cpu": 1, "gpu": 64}                    # matrix units read rows whose length is a multiple of it


def kind_of(weight):
    """The key of the two tables above."""
    return "cpu" if weight.is_cpu else "gpu"


def chunk_tokens(weight):
    """Tokens of a chunk for the output projection `weight` (V, C). Small on a CPU, where a chunk's arrays should stay
    in its cache, and the C library takes those of 32 MB and more from the system anew each time, zeros and all. A
    multiple of 64 on a GPU, whose matrix units work in such tiles, where that many fit."""
    tokens, tile = max(1, CHUNK_VALUES[kind_of(weight)] // weight.size(0)), TILE[kind_of(weight)]
    return tokens if tokens < tile else tokens // tile * tile


def operand(weight):
    """The output projection (V, C) as every chunk is multiplied by it: cast once where autocast would cast it for each,
    and with rows of zeros up to a multiple of TILE, as logits (tokens, 50,257) of GPT-2's vocabulary would keep a GPU's
    matrix units from being used."""
    device, rows = weight.device.type, -weight.size(0) % TILE[kind_of(weight)]
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = weight.to(torch.get_autocast_dtype(device))
    return F.pad(weight, (0, 0, 0, rows)) if rows else weight


def soften(log_p, temperature):
    """Log-probabilities at a temperature, from those at 1: the same array there."""
    return log_p if temperature == 1 else (log_p / temperature).log_softmax(-1)


def token_losses(logits, targets, teacher_logits=None, kd_weight=0.5, temperature=1.0, needs_grad=True):
    """(N, V), (N,), (N, V) or None -> cross-entropy, KL(teacher ‖ student) times temperature² (Hinton et al., arXiv
    1503.02531, so that the gradient's scale does not depend on it), the teacher's cross-entropy, each (N,) in nats per
    token; and the gradient (N, V) of (1 - kd_weight) · cross-entropy + kd_weight · KL in the logits, None unless
    needed. Both gradients are the student's softmax minus a target, formed in place where the log-softmax was."""
    y, w = targets[:, None], 0.0 if teacher_logits is None else kd_weight
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(1, y).squeeze(1)
    divergence = teacher_ce = torch.zeros_like(ce)
    if teacher_logits is not None:
        log_q = teacher_logits.log_softmax(-1)
        teacher_ce = -log_q.gather(1, y).squeeze(1)
        soft_p, soft_q = soften(log_p, temperature), soften(log_q, temperature)
        q = soft_q.exp()
        divergence = soft_q.sub_(soft_p).mul_(q).sum(-1) * temperature**2
    if not needs_grad:
        return ce, divergence, teacher_ce, None
    gradient = log_p.exp_()
    if teacher_logits is not None and temperature == 1:
        gradient.sub_(q, alpha=w)
    elif teacher_logits is not None:
        gradient.mul_(1 - w).add_(soft_p.exp_().sub_(q), alpha=w * temperature)
    return ce, divergence, teacher_ce, gradient.scatter_add_(1, y, torch.full_like(gradient[:, :1], w - 1))


@torch.library.custom_op("nanoprune::add_product_", mutates_args={"out"})
def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """out (V, C) += alpha · aᵀ b for a (N, V), b (N, C) of one dtype. An operator of its own, as a compiler that sees
    into it adds all chunks' products in one kernel at the end and so keeps each until then."""
    out.addmm_(a.T, b, alpha=alpha) if a.dtype == out.dtype else out.add_(a.T @ b, alpha=alpha)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, teacher_h, teacher_w, kd_weight, temperature, needs_grad, needs_dw):
        N, V, chunk, full = h.size(0), w.size(0), chunk_tokens(w), operand(w)
        wide = torch.promote_types(h.dtype, torch.float32)                      # float32, or float64 for tests
        dh = torch.empty_like(h) if needs_grad else None
        dw = torch.zeros_like(full, dtype=w.dtype) if needs_dw else None
        teacher_full = None if teacher_h is None else operand(teacher_w)
        sums = h.new_zeros(3, dtype=wide)
        for a in range(0, N, chunk):
            x, taught = h[a:a + chunk], None
            if teacher_h is not None:
                taught = (teacher_h[a:a + chunk] @ teacher_full.T)[:, :V].to(wide)               # (chunk, V)
            logits = (x @ full.T)[:, :V]                                        # in bfloat16 under autocast
            *found, g = token_losses(logits.to(wide), targets[a:a + chunk], taught, kd_weight, temperature, needs_grad)
            sums += torch.stack([values.sum() for values in found])
            if needs_grad:
                g = F.pad(g.to(logits.dtype), (0, len(full) - V)) if len(full) > V else g.to(logits.dtype)
                dh[a:a + chunk] = (g @ full) / N
                if needs_dw:
                    add_product_(dw, g, x.to(g.dtype), 1 / N)
        stats = sums / N
        loss = stats[0] if teacher_h is None else (1 - kd_weight) * stats[0] + kd_weight * stats[1]
        ctx.mark_non_differentiable(stats)
        if needs_grad:
            ctx.save_for_backward(dh, None if dw is None else dw[:V])
        return loss.clone(), stats

    @staticmethod
    def backward(ctx, dloss, _):
        dh, dw = ctx.saved_tensors
        return (dh * dloss.to(dh.dtype), None if dw is None else dw * dloss.to(dw.dtype), *[None] * 7)


def chunked_loss(hidden, weight, targets, teacher_hidden=None, teacher_weight=None, kd_weight=0.5, temperature=1.0):
    """Loss of a batch from its last hidden states: cross-entropy without a teacher, with one
    (1 - kd_weight) · cross-entropy + kd_weight · temperature² · KL(teacher ‖ student), both mean nats per token.

    hidden (B, T, C), weight (V, C), targets (B, T), teacher_hidden (B, T, C'), teacher_weight (V, C'). Returns the
    loss (differentiable in hidden and weight, once) and a detached (3,): cross-entropy, KL, teacher's cross-entropy
    (the last two are 0 without a teacher)."""
    if teacher_hidden is not None:
        teacher_hidden, teacher_weight = teacher_hidden.detach().flatten(0, 1), teacher_weight.detach()
    needs_dw = torch.is_grad_enabled() and weight.requires_grad
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad or needs_dw
    return _ChunkedLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), teacher_hidden, teacher_weight,
                              kd_weight, temperature, needs_grad, needs_dw)


class Objective(nn.Module):
    """The loss of a batch in one forward pass, so that DDP and torch.compile see all of it: cross-entropy, or a mix of it
    and distillation where a teacher's hidden states are given."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model = model
        self.kd_weight = kd_weight
        self.temperature = temperature

    def forward(self, x, y, teacher_hidden=None, teacher_weight=None):
        """Token ids and targets (B, T), the teacher's hidden states (B, T, C') and output projection (V, C') ->
        what `chunked_loss` returns."""
        return chunked_loss(self.model.hidden(x), self.model.head_weight, y, teacher_hidden, teacher_weight,
                            self.kd_weight, self.temperature)


def freeze(model):
    """The model as a teacher: no parameter of it takes a gradient."""
    return model.requires_grad_(False).eval()


def smooth(average, value, beta=0.98):
    """Moving average over about 1/(1-beta) steps that starts at its first value."""
    return value if average is None else beta * average + (1 - beta) * value


def overtaken(student, teacher, steps, beta=0.98):
    """Whether to drop the teacher for good: its smoothed cross-entropy on the student's own batches is no longer
    below the student's, and that over as many steps as the average is long, not by one batch's luck. A teacher that the
    student has overtaken pulls it back (our own trials)."""
    return steps >= round(1 / (1 - beta)) and teacher >= student
