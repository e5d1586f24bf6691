"""Invariants of distill.py: the oracles are torch.distributions, F.cross_entropy and autograd on the full logits."""
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import distill
from distill import Objective, chunked_loss, freeze, kd_loss, overtaken, smooth, token_losses

B, T, C, V = 3, 7, 5, 13                                 # 21 tokens


def draw(*shape, scale=2.0, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def batch(dtype=torch.float64, teacher_width=4):
    """hidden, weight, targets, teacher_hidden, teacher_weight; the teacher has a width of its own."""
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    hidden, weight = draw(B, T, C, dtype=dtype).requires_grad_(), draw(V, C, seed=1, dtype=dtype).requires_grad_()
    return hidden, weight, targets, *(draw(*n, teacher_width, seed=2, dtype=dtype) for n in ((B, T), (V,)))


def plain(hidden, weight, targets, teacher_hidden=None, teacher_weight=None, kd_weight=0.5, temperature=1.0):
    """The reference on whole logits: cross-entropy without a teacher, `kd_loss` with one."""
    logits, y = (hidden @ weight.T).flatten(0, 1), targets.flatten()
    if teacher_hidden is None:
        return F.cross_entropy(logits, y)
    return kd_loss(logits, (teacher_hidden @ teacher_weight.T).flatten(0, 1), y, kd_weight, temperature)


@torch.no_grad()
def plain_parts(hidden, weight, targets, teacher_hidden=None, teacher_weight=None, kd_weight=0.5, temperature=1.0):
    """(3,): cross-entropy, KL, the teacher's cross-entropy."""
    ce = plain(hidden, weight, targets)
    if teacher_hidden is None:
        return torch.stack((ce, ce * 0, ce * 0))
    divergence = plain(hidden, weight, targets, teacher_hidden, teacher_weight, 1.0, temperature)
    return torch.stack((ce, divergence, plain(teacher_hidden, teacher_weight, targets)))


def kl(student, teacher, temperature=1.0):
    """Per token, and its gradient in the student's logits."""
    _, divergence, _, gradient = token_losses(student, torch.zeros(len(student), dtype=torch.int64), teacher, 1.0,
                                              temperature)
    return divergence, gradient


def near(found, expected, relative=1e-10):
    """Relative to the largest entry, and the shapes are the same."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_torch_distributions(temperature):
    s, t = draw(6, V).requires_grad_(), draw(6, V, seed=1)
    expected = kl_divergence(Categorical(logits=t / temperature), Categorical(logits=s / temperature)) * temperature**2
    value, gradient = kl(s.detach(), t, temperature)
    near(value, expected.detach())
    near(gradient, torch.autograd.grad(expected.sum(), s)[0])
    for a, b in ((3.0, 0.0), (0.0, -40.0), (1000.0, 1000.0)):                       # a constant added to logits
        moved, moved_gradient = kl(s.detach() + a, t + b, temperature)
        near(moved, value, 1e-9), near(moved_gradient, gradient, 1e-9)


def test_cross_entropy_is_that_of_torch():
    s, y = draw(6, V).requires_grad_(), torch.tensor([0, 12, 3, 3, 7, 1])
    expected = F.cross_entropy(s, y, reduction="none")
    value, *none, gradient = token_losses(s.detach(), y)
    assert not torch.stack(none).any()
    near(value, expected.detach())
    near(gradient, torch.autograd.grad(expected.sum(), s)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_vanishes_only_where_student_equals_teacher(dtype):
    p = draw(50, V, dtype=dtype)
    for temperature in (0.5, 1.0, 3.0):
        value, gradient = kl(p, p.clone(), temperature)
        assert (value == 0).all() and (gradient == 0).all()
        for scale in (2.0, 1e-2) if dtype == torch.float64 else (2.0,):               # near to it, too
            value, gradient = kl(p, p + draw(50, V, seed=4, dtype=dtype, scale=scale), temperature)
            assert (value > 0).all() and (gradient.norm(dim=1) > 0).all()
    hidden, weight, targets = batch(dtype)[:3]
    loss, stats = chunked_loss(hidden, weight, targets, hidden.detach().clone(), weight.detach().clone(), kd_weight=1.0)
    loss.backward()
    assert loss == 0 and stats[1] == 0 and stats[0] > 1 and not hidden.grad.any() and not weight.grad.any()
    near(stats[2], stats[0], 1e-6)


@pytest.mark.parametrize("tile, chunk_values", [(1, V * 21), (1, V * 7), (4, V * 7),          # one chunk, three
                                                (1, V * 8 + 5), (8, V * 8 + 5), (1, 1)])      # ragged; never 0 tokens
@pytest.mark.parametrize("kd_weight, temperature", [(0.0, 1.0), (0.5, 1.0), (0.5, 2.5), (1.0, 2.5), (None, 1.0)])
def test_chunked_loss_is_the_plain_one_in_value_and_gradients(monkeypatch, tile, chunk_values, kd_weight, temperature):
    monkeypatch.setattr(distill, "CHUNK_VALUES", {"cpu": chunk_values})
    monkeypatch.setattr(distill, "TILE", {"cpu": tile})
    assert distill.operand(torch.zeros(V, C)).shape == (-(-V // tile) * tile, C)
    inputs = batch() if kd_weight is not None else batch()[:3]
    options = dict(kd_weight=kd_weight, temperature=temperature) if kd_weight is not None else {}
    expected, parts = plain(*inputs, **options), plain_parts(*inputs, **options)
    expected_gradients = torch.autograd.grad(expected, inputs[:2])
    loss, stats = chunked_loss(*inputs, **options)
    near(loss.detach(), expected.detach()), near(stats, parts.detach())
    for found, gradient in zip(torch.autograd.grad(loss / 3, inputs[:2]), expected_gradients):   # the factor upstream
        near(found, gradient / 3)
    assert not stats.requires_grad
    with torch.no_grad():
        same, same_stats = chunked_loss(*inputs, **options)
    assert not same.requires_grad and same == loss and torch.equal(same_stats, stats)


@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize("autocast, tolerance", [(False, 1e-5), (True, 0.03)])
def test_chunked_loss_in_float32_and_under_bfloat16_autocast(monkeypatch, autocast, tolerance, tile):
    monkeypatch.setattr(distill, "CHUNK_VALUES", {"cpu": V * 8})
    monkeypatch.setattr(distill, "TILE", {"cpu": tile})
    inputs = [x.detach().float().requires_grad_(i < 2) if x.is_floating_point() else x for i, x in enumerate(batch())]
    wide = [x.detach().double().requires_grad_(i < 2) if x.is_floating_point() else x for i, x in enumerate(inputs)]
    expected, parts = plain(*wide), plain_parts(*wide)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, stats = chunked_loss(*inputs)
    assert loss.dtype == stats.dtype == torch.float32                              # logits and sums are never narrower
    near(loss.detach().double(), expected.detach(), tolerance), near(stats.double(), parts.detach(), tolerance)
    for found, gradient in zip(torch.autograd.grad(loss, inputs[:2]), torch.autograd.grad(expected, wide[:2])):
        assert found.dtype == torch.float32
        near(found.double(), gradient, tolerance)


def test_bfloat16_logits_are_widened_before_anything_is_formed_from_them():
    hidden, weight, targets, *teacher = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in batch())
    logits, taught = ((h.flatten(0, 1) @ w.T).detach().double() for h, w in ((hidden, weight), teacher))
    _, stats = chunked_loss(hidden, weight, targets, *teacher)
    divergence = kl_divergence(Categorical(logits=taught), Categorical(logits=logits)).mean()
    y = targets.flatten()
    near(stats.double(), torch.stack((F.cross_entropy(logits, y), divergence, F.cross_entropy(taught, y))), 1e-6)


def test_loss_is_a_mean_over_tokens():
    hidden, weight, targets, teacher_hidden, teacher_weight = batch()
    whole = chunked_loss(hidden, weight, targets, teacher_hidden, teacher_weight)[0]
    rows = [chunked_loss(hidden[i:i + 1], weight, targets[i:i + 1], teacher_hidden[i:i + 1], teacher_weight)[0]
            for i in range(B)]
    near(sum(rows).detach() / B, whole.detach())
    for n in (2, 13, 5000):   # an even student: log V nats; a teacher sure of one token: log V nats away from it
        even, sure = torch.zeros(n, C), torch.cat((torch.full((1, C), 100.0), torch.zeros(n - 1, C)))
        hidden = torch.ones(2, 4, C)
        _, stats = chunked_loss(hidden, even, torch.zeros(2, 4, dtype=torch.long), hidden, sure)
        near(stats, torch.tensor([n, n, 1.0]).log(), 1e-5)


def test_the_teacher_takes_no_gradient():
    hidden, weight, targets, teacher_hidden, teacher_weight = batch()
    teacher_hidden.requires_grad_(), teacher_weight.requires_grad_()
    chunked_loss(hidden, weight, targets, teacher_hidden, teacher_weight)[0].backward()
    assert teacher_hidden.grad is None and teacher_weight.grad is None and hidden.grad.any() and weight.grad.any()
    teacher = freeze(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher[1].training


class Scaled(torch.nn.Module):
    """The smallest model that Objective takes: hidden states that are a parameter."""
    def __init__(self, states, weight):
        super().__init__()
        self.states, self.head_weight = (torch.nn.Parameter(x.detach().clone()) for x in (states, weight))

    def hidden(self, x):
        return self.states * x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_loss_is_one_graph_with_the_same_gradients(monkeypatch, backend):
    monkeypatch.setattr(distill, "CHUNK_VALUES", {"cpu": V * 8})
    hidden, weight, *rest = batch()
    for taught in (rest, rest[:1]):
        eager, traced = (Objective(Scaled(hidden, weight), 0.7, 1.5) for _ in range(2))
        compiled = torch.compile(traced, fullgraph=True, backend=backend, dynamic=False)
        (loss, stats), (found, found_stats) = eager(2, *taught), compiled(2, *taught)
        (loss / 2).backward(), (found / 2).backward()
        near(found.detach(), loss.detach()), near(found_stats, stats)
        for ours, plain_eager in zip(traced.parameters(), eager.parameters(), strict=True):
            near(ours.grad, plain_eager.grad)


def test_a_gpu_s_chunks_are_whole_tiles_of_64_tokens():
    tokens = [distill.chunk_tokens(torch.empty(vocabulary, 1, device="meta")) for vocabulary in (50257, 2**19, 2**26)]
    assert tokens == [320, 32, 1] and distill.chunk_tokens(torch.empty(49152, 1)) == 42


@pytest.mark.parametrize("student_rows, teacher_rows", [(13, 11), (11, 11)])
def test_both_distributions_are_over_the_rows_of_a_teacher_with_fewer(student_rows, teacher_rows):
    torch.manual_seed(0)
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(student_rows, 5, dtype=torch.float64, requires_grad=True)
    teacher_h = torch.randn(2, 3, 7, dtype=torch.float64)
    teacher_w = torch.randn(teacher_rows, 7, dtype=torch.float64)
    targets = torch.randint(teacher_rows, (2, 3))
    loss, _ = distill.chunked_loss(h, w, targets, teacher_h, teacher_w, .3, 2.)
    logits = (h @ w.T).flatten(0, 1)[:, :teacher_rows]
    expected = distill.kd_loss(logits, (teacher_h @ teacher_w.T).flatten(0, 1), targets.flatten(), .3, 2.)
    assert abs(loss - expected) < 1e-12
    for ours, plain in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w))):
        assert (ours - plain).abs().max() < 1e-12


def test_a_teacher_that_is_overtaken_is_dropped():
    average = None
    for value, expected in ((4.0, 4.0), (2.0, 3.0), (7.0, 5.0), (5.0, 5.0)):
        average = smooth(average, value, beta=0.5)
        assert average == expected
    assert smooth(1.0, 2.0) == pytest.approx(1.02)
    assert [overtaken(3.0, teacher_ce, 50) for teacher_ce in (2.9, 3.0, 3.1)] == [False, True, True]
    assert not overtaken(3.0, 3.1, 49)                                   # not by one batch's luck


def peak_bytes():
    """Peak memory of this very process: VmHWM, as ru_maxrss starts at the parent's where a process is spawned."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_memory(kind, tokens, vocabulary=49152, width=64):
    """Print by how many bytes one loss and its backward pass raise the peak."""
    torch.set_num_threads(2)
    draw_ = partial(draw, scale=0.5, dtype=torch.float32)    # likely logits: probabilities of 1e-40 make a CPU crawl
    hidden, weight = draw_(1, tokens, width), draw_(vocabulary, width, seed=1)
    taught = (hidden.clone(), weight.clone())
    targets = torch.arange(tokens)[None]
    loss_of = {"plain": plain, "ours": lambda *inputs: chunked_loss(*inputs)[0]}
    for loss in loss_of.values():                            # libraries and threads are up before the baseline is taken
        loss(hidden[:, :8].clone().requires_grad_(), weight[:9].clone().requires_grad_(), targets[:, :8],
             taught[0][:, :8], taught[1][:9]).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    before = peak_bytes()
    loss_of[kind](hidden, weight, targets, *taught).backward()
    print(peak_bytes() - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_at_most_a_third_of_plain(tokens=2048):
    """The plain one's grows with the tokens: at 8,192 of them it was 12,291 MB and ours 118 MB, a ratio of 0.01."""
    peak = {}
    for kind in ("plain", "ours"):
        command = [sys.executable, __file__, kind, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
                              env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"})
        peak[kind] = int(done.stdout)
    ratio = peak["ours"] / peak["plain"]
    print(f"{tokens} tokens: plain {peak['plain'] >> 20} MB, ours {peak['ours'] >> 20} MB, ratio {ratio:.3f}")
    assert peak["ours"] > 2**25 and ratio <= 0.35           # above 32 MB: the measurement sees one chunk at least


if __name__ == "__main__":
    measure_memory(sys.argv[1], int(sys.argv[2]))
