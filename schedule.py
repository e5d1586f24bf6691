"""Which stage, which size, which learning rate: pure functions of the step. No torch.

    python -c "from schedule import *; print(resolve('idea', steps=1000, final_size=.5).events)"

A plan is a tuple of rows (`PLANS`). `resolve` turns one into a `Timeline` of plain numbers, and
everything after that is a function of (step, timeline). Nothing is remembered, so a resumed run
cannot differ from one that was never stopped. The point of IDEA Prune (arXiv 2503.05920) is visible
here: `idea` has one cosine over all three stages, while `naive` has `restart=True` in its prune
row. Not here: the loop (train.py) and which units go (score.py, allocate.py, prune.py).
"""
import bisect
import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One row of a plan."""
    name: str                   # "enlarge": full size; "prune": it shrinks; "recover": the target
    share: float | None         # of the run; 0: a single step; None: it follows from the cuts
    size_curve: str = ""        # how the size falls in "prune": a name in SIZE_CURVES
    kd: bool = False            # learn from a teacher as well
    restart: bool = False       # a new cycle of the learning rate; Adam's moments are forgotten
    interleaved: bool = False   # cut, slice and train in turns; every cut measures anew
    share_of: str = "steps"     # what `share` is a share of: "steps", or credited training "flops"


PLANS = {
    # the target size from the start
    "scratch": (Stage("recover", 1.0),),
    # two whole cycles: train the enlarged model to the minimum, cut once, warm up again
    # (IDEA Prune's baseline)
    "naive":   (Stage("enlarge", .5), Stage("prune", 0., "oneshot", restart=True), Stage("recover", .5)),
    # one cosine, one cut
    "oneshot": (Stage("enlarge", .5), Stage("prune", 0., "oneshot"), Stage("recover", .5)),
    # one cosine, iterative cuts (IDEA Prune: half of the tokens enlarged, the other half prune and
    # recover; the split of that half, 20 % and 30 % of the run, is our choice)
    "idea":    (Stage("enlarge", .5), Stage("prune", .2, "cubic"), Stage("recover", .3)),
    "idea-kd": (Stage("enlarge", .5), Stage("prune", .2, "cubic", kd=True),
                Stage("recover", .3, kd=True)),
    # The Journey Matters (arXiv 2501.12486): prune between 25 % and 75 % of the compute
    "journey": (Stage("enlarge", .25, share_of="flops"),
                Stage("prune", .5, "geometric", share_of="flops"),
                Stage("recover", .25, share_of="flops")),
    # Adapt-Accel (arXiv 2502.03460): cut a little, train, cut again, each time for longer, to the
    # run's end
    "adapt":   (Stage("enlarge", .5), Stage("prune", None, "linear", interleaved=True),
                Stage("recover", None)),
    # the target from scratch, taught by a given checkpoint
    "kd":      (Stage("recover", 1.0, kd=True),),
    # the same for a given model that was cut; its teacher is the one that it was cut from
    "recover": (Stage("recover", 1.0, kd=True),),
}

SIZE_CURVES = {  # the kept fraction after a share x in (0, 1] of the cuts; it ends at `final`
    # LoSparse / PLATON, and our default
    "cubic":     lambda x, final: final + (1 - final) * (1 - x) ** 3,
    "linear":    lambda x, final: final + (1 - final) * (1 - x),
    # The Journey Matters: the final size to the power of the share of cuts done
    "geometric": lambda x, final: final ** x,
    "oneshot":   lambda x, final: final,
}


@dataclass(frozen=True)
class Timeline:
    """A plan in numbers of optimizer steps. A span (a, b) holds the steps a … b-1."""
    steps: int
    stages: tuple[tuple[Stage, int, int], ...]     # each stage and its span
    events: tuple[tuple[int, float], ...]          # the cuts: (step, kept fraction from then on)
    cycles: tuple[tuple[int, int], ...]            # spans of the learning rate
    slice_at: int | None                           # the step at which dead units are sliced off
    interleaved: bool = False                      # dead units are sliced off at every cut


# -- functions of the step

def stage_at(step, timeline):
    """The Stage that `step` belongs to."""
    return next(stage for stage, start, stop in timeline.stages if start <= step < stop)


def size_at(step, timeline):
    """The kept fraction of the removable parameters that the run started with. It is 1 before the
    first cut and in plans without cuts, and constant between two cuts."""
    return next((size for at, size in reversed(timeline.events) if at <= step), 1.0)


def lr_at(step, timeline, lr, min_lr, warmup_share=.05, shape="cosine", decay_share=.1,
          rewarm=True):
    """The learning rate of `step`, between `lr` at the peak and `min_lr` at the end of a cycle.

    A cycle begins with a linear warm-up over `warmup_share` of it; its first step has lr / warm-up
    steps, never 0. Without `rewarm` only the run's first cycle warms up and later ones begin at
    `lr`. Shape "cosine" then falls to `min_lr`. Shape "wsd" stays at `lr` and falls on a line over
    the last `decay_share`. The last step of a cycle has exactly `min_lr`, unless the warm-up fills
    the whole cycle; then it has `lr`."""
    start, stop = next((a, b) for a, b in timeline.cycles if a <= step < b)
    length = stop - start
    warms_up = rewarm or start == 0
    # Without warm-up the first step is at the peak at once.
    warmup = min(length, max(1, round(warmup_share * length))) if warms_up else 1

    # `done` counts this step too, so that the first step is above zero and the last one is exactly
    # at the minimum.
    done = step - start + 1
    if done <= warmup:
        return lr * done / warmup
    if shape == "cosine":
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (done - warmup) / (length - warmup))) / 2
    decay = min(length - warmup, max(1, round(decay_share * length)))
    x = max(0, done - (length - decay)) / decay
    return lr * (1 - x) + min_lr * x


def eval_at(step, every=100, growth=1.0):
    """Whether to evaluate at `step`. With a growth of 1: every so many steps. With a growth above
    1: first after `every` steps, and then whenever the steps have grown by that factor (rounded),
    so that the points are evenly spaced on a logarithmic axis."""
    if growth == 1 or step < every:
        return step % every == 0
    nearest = round(math.log(step / every, growth))
    powers = range(max(0, nearest - 1), nearest + 2)
    return any(round(every * growth ** power) == step for power in powers)


def score_at(step, timeline, every=5, window=100):
    """Whether to score units from the gradients of this step: every few steps, and only within
    `window` steps before a cut; the last score is taken at the step right before the cut. (LoSparse
    refreshes its scores every 10 steps throughout; the window is our choice.) Never in interleaved
    plans, whose cuts measure for themselves."""
    if timeline.interleaved:
        return False
    next_cut = next((at for at, _ in timeline.events if at > step), None)
    return next_cut is not None and next_cut - step <= window and (next_cut - step - 1) % every == 0


def prunes(plan):
    """Whether the plan of this name has a prune stage."""
    return any(stage.name == "prune" for stage in PLANS[plan])


def interleaved(plan):
    """Whether the plan of this name measures anew at every cut."""
    return any(stage.interleaved for stage in PLANS[plan])


# -- from a plan to its timeline

def resolve(plan, steps, final_size, *, enlarge_share=None, prune_share=None, size_curve=None,
            cuts=None, slice_at=None, flops_at_size=None):
    """The Timeline of a plan over so many steps.

    `final_size` is the kept fraction of removable parameters at the end. Shares and size curve
    default to the plan's own, cuts to 20, in an interleaved plan to one for each 5 % that go.
    `flops_at_size(size)` gives credited FLOPs per token; plans that share out FLOPs need it. Raises
    ValueError with a sentence if the numbers do not fit each other."""
    if plan not in PLANS:
        raise ValueError(f"no plan {plan!r}; there are {', '.join(PLANS)}")
    stages = PLANS[plan]
    if steps < len(stages):
        raise ValueError(f"{steps} steps are fewer than the {len(stages)} stages of plan {plan!r}; "
                         "give more --steps")
    refuse_idle_settings(plan, {"--enlarge-share": enlarge_share, "--prune-share": prune_share,
                                "--size-curve": size_curve, "--slice-at": slice_at})
    if not prunes(plan):
        whole = (0, steps)
        return Timeline(steps, stages=((stages[0], *whole),), events=(), cycles=(whole,), slice_at=None)
    if enlarge_share is None:
        enlarge_share = stages[0].share
    if interleaved(plan):
        return interleave(stages, steps, final_size, enlarge_share, cuts)
    return one_prune_stage(stages, steps, final_size, enlarge_share, prune_share, size_curve, cuts,
                           slice_at, flops_at_size)


def refuse_idle_settings(plan, settings):
    """Raise ValueError if a setting {flag: value or None} was given that the plan has no use
    for."""
    if not prunes(plan):
        idle = set(settings)
        why = "prunes nothing"
    elif interleaved(plan):
        idle = set(settings) - {"--enlarge-share"}
        why = "cuts to the end and slices at once"
    else:
        return
    for flag, value in settings.items():
        if flag in idle and value is not None:
            raise ValueError(f"{flag} has no effect in plan {plan!r}, which {why}; leave it out")


def one_prune_stage(stages, steps, final_size, enlarge_share, prune_share, size_curve, cuts,
                    slice_at, flops_at_size):
    """The Timeline of a plan enlarge, prune, recover."""
    prune = stages[1]
    prune_share = prune.share if prune_share is None else prune_share
    if not (0 < enlarge_share < 1 and 0 <= prune_share and enlarge_share + prune_share < 1):
        raise ValueError(
            f"the enlarge stage has a share of {enlarge_share} and the prune stage of "
            f"{prune_share}; they must be positive and leave something to recover: a sum below 1")
    size_curve = size_curve or prune.size_curve
    if size_curve not in SIZE_CURVES:
        raise ValueError(f"no size curve {size_curve!r}; there are {', '.join(SIZE_CURVES)}")
    if size_curve == "oneshot":
        cuts = 1
    cuts = 20 if cuts is None else cuts

    def events_in(first, last):
        return cut_events(first, last, cuts, SIZE_CURVES[size_curve], final_size, steps)

    if prune.share_of == "flops":
        first, last = share_out_flops(events_in, cuts, steps, enlarge_share,
                                      enlarge_share + prune_share, flops_at_size)
    else:
        first = round(enlarge_share * steps)
        last = max(first + 1, round((enlarge_share + prune_share) * steps))
    events = events_in(first, last)
    last_cut, _ = events[-1]
    slice_at = last_cut if slice_at is None else slice_at
    if not last_cut <= slice_at < steps:
        raise ValueError(
            f"--slice-at {slice_at} is outside of [{last_cut}, {steps}): units can be sliced off "
            "from the last cut on and before the run ends")

    # A stage that restarts the learning rate begins a new cycle.
    spans = ((0, first), (first, last), (last, steps))
    restarts = [start for stage, (start, _) in zip(stages, spans) if stage.restart]
    cycles = tuple(zip([0, *restarts], [*restarts, steps]))
    return Timeline(steps, stages=tuple((stage, *span) for stage, span in zip(stages, spans)),
                    events=events, cycles=cycles, slice_at=slice_at)


def cut_events(first, last, cuts, size_curve, final_size, steps):
    """The cuts of a prune stage that spans the steps first … last-1: ((step, kept fraction), …).
    The first cut is at `first` and the last one at `last - 1`, so that the stage ends at the target
    size. Raises ValueError if they do not fit."""
    if not (cuts > 0 and 0 < first <= last - cuts and last < steps):
        raise ValueError(
            f"{cuts} cuts need at least {max(1, cuts)} steps in the prune stage and one step before "
            f"and after it; it spans steps {first} to {last} of {steps}: give more --steps or fewer "
            "--cuts")
    events = []
    for i in range(cuts):
        at = first + i * (last - 1 - first) // max(1, cuts - 1)
        events.append((at, size_curve((i + 1) / cuts, final_size)))
    return tuple(events)


def interleave(stages, steps, final_size, enlarge_share, cuts=None):
    """The Timeline of plan "adapt". After `enlarge_share` of the run come cuts of the same size.
    After cut i = 1 … n follows training for 2i / (n (n + 1)) of the remaining steps, so that each
    piece of training is longer than the one before it. `cuts` defaults to the fewest that remove at
    most 5 % each. The rule is Adapt-Accel's (arXiv 2502.03460, and its released code). What follows
    the last cut counts as "recover"."""
    if cuts is None:
        cuts = math.ceil((1 - final_size) / .05 - 1e-9)
    if not 0 <= enlarge_share < 1:
        raise ValueError(f"the enlarge stage has a share of {enlarge_share}; it must be at least 0 "
                         "and below 1")
    first = round(enlarge_share * steps)
    at = [first + round((steps - first) * i * (i + 1) / (cuts * (cuts + 1))) for i in range(cuts)]

    # All cuts, the step after the last one and the end must differ: else two cuts fall on one
    # step, or nothing is left.
    if cuts <= 0 or len({*at, at[-1] + 1, steps}) < cuts + 2:
        raise ValueError(
            f"{cuts} cuts, each followed by a longer stretch of training than the one before, "
            f"do not fit into {steps - first} steps, {max(2, cuts * (cuts + 1) // 2)} are enough: "
            "give more --steps or fewer --cuts")
    curve = SIZE_CURVES[stages[1].size_curve]
    events = tuple((step, curve((i + 1) / cuts, final_size)) for i, step in enumerate(at))
    spans = ((0, first), (first, at[-1] + 1), (at[-1] + 1, steps))
    rows = tuple((stage, *span) for stage, span in zip(stages, spans) if span[0] < span[1])
    return Timeline(steps, rows, events, cycles=((0, steps),), slice_at=None, interleaved=True)


def share_out_flops(events_in, cuts, steps, first_share, last_share, flops_at_size):
    """The steps (first, last) at which the shares `first_share` and `last_share` of the run's
    credited training FLOPs are spent, to the nearest step. The cost of a step depends on the sizes
    and the sizes depend on (first, last), so the two are found by trial: guess `first`, bisect for
    the `last` that fits it, and bisect the guesses. (arXiv 2501.12486; the solution is ours.)"""
    flops_at_size = functools.cache(flops_at_size)

    def excess(first, last, at, share):
        """FLOPs spent before the step `at`, less this share of the run's."""
        points = [(0, 1.0), *events_in(first, last), (steps, 0.0)]
        total = 0.0
        for (start, size), (stop, _) in zip(points, points[1:]):
            steps_before = min(at, stop) - min(at, start)
            total += (steps_before - share * (stop - start)) * flops_at_size(size)
        return total

    def root(low, high, excess_at):
        """The step in low … high-1 at which the excess, which grows with the step, is nearest to
        zero."""
        after = low + bisect.bisect_left(range(low, high), 0, key=excess_at)
        candidates = range(max(low, after - 1), min(high, after + 1))
        return min(candidates, key=lambda step: abs(excess_at(step)), default=low)

    def last_for(guess):
        return root(guess + cuts, steps, lambda last: excess(guess, last, last, last_share))

    first = root(1, steps - cuts, lambda guess: excess(guess, last_for(guess), guess, first_share))
    return first, last_for(first)
