"""Pure functions of the step: which stage, which learning rate, which size, when to score. No torch.

    python -c "from schedule import *; print(resolve('idea', steps=1000, final_size=.5).events)"

A plan is a tuple of rows (`PLANS`); `resolve` turns one into a `Timeline` of plain numbers, and everything after that
is a function of (step, timeline): nothing is remembered, so a resumed run cannot differ. The point of IDEA Prune
(arXiv 2503.05920) is visible here: `idea` has one cosine over all three stages, `naive` has `restart=True` in its
prune row. Not here: the loop (train.py) and what is cut (prune.py).
"""
import bisect
import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    name: str               # "enlarge": full size; "prune": shrinks; "recover": target size
    share: float | None     # of the run; "prune" with share 0 is a single step; None: follows from the cuts
    law: str = ""           # of the sizes in "prune": cubic, linear, geometric, oneshot
    kd: bool = False        # learn from a teacher as well
    restart: bool = False   # a new warm-up and cycle of the learning rate, Adam's moments forgotten
    adaptive: bool = False  # every cut measures anew and is sliced off at once (Timeline); train from each to the next
    of: str = "steps"       # what `share` is a share of: "steps", or the run's credited training "flops"


PLANS = {
    # the target size from the start
    "scratch": (Stage("recover", 1.0),),
    # two whole cycles: train the enlarged model to the minimum, cut once, warm up again (IDEA Prune's baseline)
    "naive":   (Stage("enlarge", .5), Stage("prune", 0., "oneshot", restart=True), Stage("recover", .5)),
    # one cosine, one cut
    "oneshot": (Stage("enlarge", .5), Stage("prune", 0., "oneshot"), Stage("recover", .5)),
    # one cosine, iterative cuts (IDEA Prune: half of the tokens enlarged, half prune + recover; 20 : 30 is our choice)
    "idea":    (Stage("enlarge", .5), Stage("prune", .2, "cubic"), Stage("recover", .3)),
    "idea-kd": (Stage("enlarge", .5), Stage("prune", .2, "cubic", kd=True), Stage("recover", .3, kd=True)),
    # The Journey Matters (arXiv 2501.12486): prune between 25 % and 75 % of the compute, geometric sizes
    "journey": (Stage("enlarge", .25, of="flops"), Stage("prune", .5, "geometric", of="flops"),
                Stage("recover", .25, of="flops")),
    # Adapt-Accel (arXiv 2502.03460): cut a little, train, cut again, each time for longer, to the run's end
    "adapt":   (Stage("enlarge", .5), Stage("prune", None, "linear", adaptive=True), Stage("recover", None)),
    # the target from scratch, taught by a given checkpoint
    "kd":      (Stage("recover", 1.0, kd=True),),
}

LAWS = {  # kept fraction after a share x in (0, 1] of the cuts, ending at f
    "cubic":     lambda x, f: f + (1 - f) * (1 - x) ** 3,     # LoSparse / PLATON, and our default
    "linear":    lambda x, f: f + (1 - f) * (1 - x),
    "geometric": lambda x, f: f ** x,                         # The Journey Matters: keep(k) = (1-S)^((k+1)/n)
    "oneshot":   lambda x, f: f,
}


@dataclass(frozen=True)
class Timeline:
    """A plan in numbers of optimizer steps. A span (a, b) holds the steps a … b-1."""
    steps: int
    stages: tuple[tuple[Stage, int, int], ...]     # stage and its span
    events: tuple[tuple[int, float], ...]          # (step, kept fraction of removable parameters from this step on)
    cycles: tuple[tuple[int, int], ...]            # spans of the learning rate, one unless a stage restarts it
    slice_at: int | None                           # the step at which dead units are physically cut off
    adaptive: bool = False                         # units and layers are measured at every cut, and sliced off there


def resolve(plan, steps, final_size, *, enlarge_share=None, prune_share=None, law=None, cuts=None, slice_at=None,
            flops_at_size=None):
    """Plan name -> Timeline. final_size: kept fraction of removable parameters at the end; shares and law None = the
    plan's own; cuts None = 20, in "adapt" one per 5 % that go; flops_at_size(size) -> credited FLOPs per token, needed
    by plans that share out FLOPs. Raises ValueError with a sentence."""
    if plan not in PLANS:
        raise ValueError(f"no plan {plan!r}; there are {', '.join(PLANS)}")
    rows, names = PLANS[plan], [s.name for s in PLANS[plan]]
    if steps < len(rows):
        raise ValueError(f"{steps} steps are fewer than the {len(rows)} stages of plan {plan!r}; give more --steps")
    row = rows[names.index("prune")] if "prune" in names else None
    why = "prunes nothing" if not row else "cuts to the end and slices at once" if row.adaptive else ""
    for flag, value in (("--enlarge-share", None if row else enlarge_share), ("--prune-share", prune_share),
                        ("--law", law), ("--slice-at", slice_at)):
        if why and value is not None:
            raise ValueError(f"{flag} has no effect in plan {plan!r}, which {why}; leave it out")
    if not row:
        return Timeline(steps, ((rows[0], 0, steps),), (), ((0, steps),), None)
    if row.adaptive:
        return interleave(rows, steps, final_size, rows[0].share if enlarge_share is None else enlarge_share, cuts)

    law = law or row.law
    if law not in LAWS:
        raise ValueError(f"no law {law!r} of sizes; there are {', '.join(LAWS)}")
    n = 1 if law == "oneshot" else 20 if cuts is None else cuts
    before = rows[0].share if enlarge_share is None else enlarge_share
    during = row.share if prune_share is None else prune_share
    if not (0 < before < 1 and 0 <= during and before + during < 1):
        raise ValueError(f"the enlarge stage has a share of {before} and the prune stage of {during}; they must be "
                         "positive and leave something to recover: a sum below 1")

    def timeline(a, b):
        """Prune in [a, b): the first cut at a, the last at b-1, so that the stage ends at the target size."""
        if not (n > 0 and 0 < a <= b - n < b < steps):
            raise ValueError(f"{n} cuts need at least {max(1, n)} steps in the prune stage and one step before and "
                             f"after it; it spans steps {a} to {b} of {steps}: give more --steps or fewer --cuts")
        at = [a + (k * (b - 1 - a)) // max(1, n - 1) for k in range(n)]
        events = tuple((s, LAWS[law]((k + 1) / n, final_size)) for k, s in enumerate(at))
        spans = {"enlarge": (0, a), "prune": (a, b), "recover": (b, steps)}
        starts = [0] + [spans[s.name][0] for s in rows if s.restart]
        return Timeline(steps, tuple((s, *spans[s.name]) for s in rows), events,
                        tuple(zip(starts, starts[1:] + [steps])), events[-1][0] if slice_at is None else slice_at)

    first, last = round(before * steps), max(round(before * steps) + 1, round((before + during) * steps))
    if row.of == "flops":
        first, last = share_out_flops(timeline, n, steps, before, before + during, flops_at_size)
    found = timeline(first, last)
    if not found.events[-1][0] <= found.slice_at < steps:
        raise ValueError(f"--slice-at {slice_at} is outside of [{found.events[-1][0]}, {steps}): units can be sliced "
                         "off from the last cut on and before the run ends")
    return found


def interleave(rows, steps, final_size, share, cuts=None):
    """Plan "adapt" -> Timeline. After `share` of the run, n cuts of the same size, stage i = 1 … n of training behind
    cut i: it has 2i/(n(n+1)) of the remaining steps. n: cuts, or as many as take 5 % each at most. Adapt-Accel
    (arXiv 2502.03460, and its released code). The last stage counts as "recover"."""
    n = math.ceil((1 - final_size) / .05 - 1e-9) if cuts is None else cuts
    if not 0 <= share < 1:
        raise ValueError(f"the enlarge stage has a share of {share}; it must be at least 0 and below 1")
    a = round(share * steps)
    at = [a + round((steps - a) * i * (i + 1) / (n * (n + 1))) for i in range(n)]
    if not n > 0 or len({*at, at[-1] + 1, steps}) < n + 2:           # two cuts at one step, or no step to recover
        raise ValueError(f"{n} cuts, with a stage of training behind each that is longer than the one before, do not "
                         f"fit into {steps - a} steps, {max(2, n * (n + 1) // 2)} are enough: give more --steps or "
                         "fewer --cuts")
    events = tuple((s, LAWS[rows[1].law]((i + 1) / n, final_size)) for i, s in enumerate(at))
    spans = (0, a), (a, at[-1] + 1), (at[-1] + 1, steps)
    return Timeline(steps, tuple((row, *span) for row, span in zip(rows, spans) if span[0] < span[1]), events,
                    ((0, steps),), None, adaptive=True)


def share_out_flops(timeline, n, steps, share_a, share_b, flops_at_size):
    """Steps (a, b) at which the shares share_a and share_b of the run's credited training FLOPs are spent, to the
    nearest step. The cost of a step depends on the sizes, the sizes on (a, b): b is bisected for every a, and a around
    that. (arXiv 2501.12486; the solution is ours.)"""
    flops_at_size = functools.cache(flops_at_size)

    def excess(a, b, at, share):
        """FLOPs spent before the step `at`, less the share of the run's."""
        spans = ((0, 1.0), *timeline(a, b).events, (steps, 0.0))
        flops = [(start, stop, flops_at_size(size)) for (start, size), (stop, _) in zip(spans, spans[1:])]
        return sum((min(at, stop) - min(at, start) - share * (stop - start)) * f for start, stop, f in flops)

    def root(low, high, excess_at):
        """The step in low … high-1 whose excess, growing with the step, is nearest to zero."""
        after = bisect.bisect_left(range(low, high), 0, key=excess_at) + low
        return min(range(max(low, after - 1), min(high, after + 1)), key=lambda s: abs(excess_at(s)), default=low)

    def end(a):
        return root(a + n, steps, lambda b: excess(a, b, b, share_b))

    a = root(1, steps - n, lambda a: excess(a, end(a), a, share_a))
    return a, end(a)


def adaptive(plan):
    """Whether the plan of this name measures anew at every cut."""
    return any(row.adaptive for row in PLANS[plan])


def stage_at(step, timeline):
    """The Stage that `step` belongs to."""
    return next(stage for stage, a, b in timeline.stages if a <= step < b)


def size_at(step, timeline):
    """Kept fraction of the removable parameters that the run started with, during `step`: 1 before the first cut and in
    plans without cuts, constant between cuts."""
    return next((size for at, size in reversed(timeline.events) if at <= step), 1.0)


def lr_at(step, timeline, lr, min_lr, warmup_share=.05, shape="cosine", decay_share=.1, rewarm=True):
    """Learning rate of `step`. Linear warm-up over warmup_share of the cycle: the first step has lr/warm-up steps,
    never 0. Without `rewarm` only the run's first cycle warms up, later ones begin at lr. Then cosine: down to min_lr,
    which the cycle's last step has exactly. wsd: constant, then over the last decay_share a line down to min_lr. (A
    warm-up as long as the cycle ends at lr.)"""
    start, stop = next((a, b) for a, b in timeline.cycles if a <= step < b)
    t, n = step - start, stop - start
    warm = min(n, max(1, round(warmup_share * n))) if rewarm or start == 0 else 1
    if t < warm:
        return lr * (t + 1) / warm
    if shape == "cosine":
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (t + 1 - warm) / (n - warm))) / 2
    decay = min(n - warm, max(1, round(decay_share * n)))
    x = max(0, t + 1 - (n - decay)) / decay
    return lr * (1 - x) + min_lr * x


def eval_at(step, every=100, growth=1.0):
    """Whether to evaluate at `step`: every so many steps; with a growth above 1 first then, and whenever the steps have
    grown by that factor (rounded), so that points are evenly spaced on a logarithmic axis."""
    if growth == 1 or step < every:
        return step % every == 0
    nearest = round(math.log(step / every, growth))
    return any(round(every * growth ** k) == step for k in range(max(0, nearest - 1), nearest + 2))


def score_at(step, timeline, every=5, window=100):
    """Whether to score units from this step's gradients: every few steps, and only within `window` steps before a
    cut; the last one is the step right before the cut. (LoSparse refreshes every 10 steps throughout; the window is
    our choice.) Never in adaptive plans, whose cuts measure for themselves."""
    next_cut = next((at for at, _ in timeline.events if at > step and not timeline.adaptive), None)
    return next_cut is not None and next_cut - step <= window and (next_cut - step - 1) % every == 0
