"""Invariants of schedule.py against numbers written out by hand; the order in which the project's files import."""
import math
from pathlib import Path

import pytest
from helpers import imports

from schedule import PLANS, SIZE_CURVES, interleave, lr_at, resolve, score_at, size_at, stage_at

ROOT = Path(__file__).parent.parent
PRUNING = [name for name, rows in PLANS.items() if any(s.name == "prune" for s in rows)]
COSTS = {"dense": lambda size: 600 + 5400 * size, "all removable": lambda size: 1e9 * size, "flat": lambda size: 7.0}


def plan(name, steps, final_size=.5, **kw):
    return resolve(name, steps, final_size, flops_at_size=kw.pop("flops_at_size", COSTS["dense"]), **kw)


HALF = [1, .86819805, .55, .23180195, .1]    # a cycle of 5 steps, one of warm-up: .1 + .45 (1 + cos(k pi/4))
LR = {  # 10 steps between 1.0 and .1: (plan, warm-up share, shape, decay share) -> the rate of every step
    ("idea", .2, "cosine", .1): [.5, 1, .96574579, .86819805, .72220754, .55, .37779246, .23180195, .13425421, .1],
    ("idea", .2, "wsd", .3): [.5, 1, 1, 1, 1, 1, 1, .7, .4, .1],
    ("naive", .2, "cosine", .1): HALF + HALF,                   # the restart
    ("oneshot", .0, "wsd", .0): [1, 1, 1, 1, 1, 1, 1, 1, 1, .1],  # at least one step of warm-up, and one of decay
    ("scratch", 1., "cosine", .1): [.1, .2, .3, .4, .5, .6, .7, .8, .9, 1],
    ("scratch", 1., "wsd", .5): [.1, .2, .3, .4, .5, .6, .7, .8, .9, 1],
    ("scratch", .8, "wsd", .5): [.125, .25, .375, .5, .625, .75, .875, 1, .55, .1]}  # decay gives way to warm-up


@pytest.mark.parametrize("case", LR)
def test_learning_rates_are_the_written_ones(case):
    name, warmup_share, shape, decay_share = case
    t = plan(name, 10, cuts=2)
    rates = [lr_at(s, t, 1.0, .1, warmup_share, shape, decay_share) for s in range(10)]
    assert rates == pytest.approx(LR[case], abs=1e-8)


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_first_rate_is_above_zero_and_the_last_of_every_cycle_is_min_lr_exactly(shape):
    for name in PLANS:
        for steps in (10, 37, 1000):
            t = plan(name, steps, cuts=2)
            for lr, min_lr in ((1.0, .1), (3e-4, 3e-5), (.7, .0), (6e-4, 7e-5)):
                rates = [lr_at(s, t, lr, min_lr, shape=shape) for s in range(steps)]
                assert max(rates) == lr and all(rates[a] > 0 for a, _ in t.cycles)
                assert [rates[b - 1] for _, b in t.cycles] == [min_lr] * len(t.cycles)
            assert len(t.cycles) == (2 if name == "naive" else 1) and t.cycles[0][0] == 0 and t.cycles[-1][1] == steps


def test_without_a_second_warm_up_the_second_cycle_begins_at_the_peak_and_ends_as_before():
    t = plan("naive", 20)
    with_, without = ([lr_at(s, t, 1.0, .1, .3, rewarm=again) for s in range(20)] for again in (True, False))
    assert with_[:10] == without[:10] and with_[10:13] == pytest.approx([1 / 3, 2 / 3, 1])
    cosine = [.55 + .45 * math.cos(math.pi * k / 9) for k in range(10)]
    assert without[10:] == pytest.approx(cosine) and without[-1] == .1


SIZES = {  # 20 steps, prune stage 10 … 13, 4 cuts: sizes of the steps 9 … 14
    ("cubic", .5): [1, .7109375, .5625, .5078125, .5, .5],
    ("linear", .5): [1, .875, .75, .625, .5, .5],
    ("geometric", .0625): [1, .5, .25, .125, .0625, .0625],
    ("oneshot", .5): [1, .5, .5, .5, .5, .5]}


@pytest.mark.parametrize("curve, final", SIZES)
def test_sizes_are_the_written_ones(curve, final):
    t = plan("idea", 20, final, size_curve=curve, cuts=4)
    assert [size_at(s, t) for s in range(9, 15)] == pytest.approx(SIZES[curve, final], abs=1e-12)
    assert [size_at(s, t) for s in (0, 8, 15, 19)] == [1, 1, final, final]
    assert set(SIZE_CURVES) == {curve for curve, _ in SIZES}


def test_cuts_stages_and_scores_are_the_written_ones():
    assert [s for s, _ in plan("idea", 40, cuts=3).events] == [20, 23, 27]     # first and last step of the stage
    t = plan("idea", 20, cuts=2)
    assert "".join(stage_at(s, t).name[0] for s in range(20)) == "eeeeeeeeeepppprrrrrr"
    assert [s for s, _ in t.events] == [10, 13] and t.slice_at == 13
    assert [s for s in range(20) if score_at(s, t, every=5, window=8)] == [4, 9, 12]    # last: right before the cut
    assert [s for s in range(20) if score_at(s, t, every=5, window=5)] == [9, 12]
    assert [s for s in range(20) if score_at(s, t, every=2, window=100)] == [1, 3, 5, 7, 9, 10, 12]
    t = plan("naive", 10)
    assert "".join(stage_at(s, t).name[0] for s in range(10)) == "eeeeeprrrr" and t.events == ((5, .5),)
    t = plan("idea", 20, cuts=2, enlarge_share=.25, prune_share=.5, slice_at=17)
    assert [(s.name, a, b) for s, a, b in t.stages] == [("enlarge", 0, 5), ("prune", 5, 15), ("recover", 15, 20)]
    assert t.slice_at == 17 and not any(score_at(s, plan("kd", 9), every=1) for s in range(9))


@pytest.mark.parametrize("name", PLANS)
def test_plans_end_at_exactly_final_size_and_only_shrink_at_events_inside_the_prune_stage(name):
    for curve in (None, *SIZE_CURVES) if name in PRUNING and name != "adapt" else (None,):
        for steps, cuts, final in ((50, 4, .3), (173, 20, .1), (400, 7, .7), (60, 2, 1 / 3), (90, 3, 0.123456789)):
            cuts = min(cuts, 12) if name == "adapt" else cuts                # its stages grow, so they take more steps
            # None: the plan's own row
            t = plan(name, steps, final, size_curve=curve, cuts=cuts, prune_share=curve and .4)
            sizes, events = [size_at(s, t) for s in range(steps)], dict(t.events)
            assert sizes[-1] == (final if name in PRUNING else 1.0) and sizes[0] == 1
            assert all(b < a if s in events else b == a for s, (a, b) in enumerate(zip(sizes, sizes[1:]), 1))
            assert all(stage_at(s, t).name == "prune" for s in events) and len(events) == len(t.events)
            assert [sum(a <= s < b for _, a, b in t.stages) for s in range(steps)] == [1] * steps


ADAPT = {  # 100 steps, final size .6: (enlarge share, cuts) -> steps of the cuts, sizes; the stages' shares
    (.5, 4): ([50, 55, 65, 80], [.9, .8, .7, .6], [.1, .2, .3, .4]),
    (.0, 4): ([0, 10, 30, 60], [.9, .8, .7, .6], [.1, .2, .3, .4]),
    (.4, 3): ([40, 50, 70], [.86666667, .73333333, .6], [1 / 6, 1 / 3, 1 / 2]),
    (.5, 1): ([50], [.6], [1.0]),                                           # the control: one cut, all else the same
    (.0, 8): ([0, 3, 8, 17, 28, 42, 58, 78], [.95, .9, .85, .8, .75, .7, .65, .6], None)}


@pytest.mark.parametrize("share, cuts", ADAPT)
def test_adapt_cuts_at_the_written_steps_and_trains_longer_behind_each_cut(share, cuts):
    steps, sizes, shares = ADAPT[share, cuts]
    t = plan("adapt", 100, .6, enlarge_share=share, cuts=cuts)
    assert [s for s, _ in t.events] == steps and [size for _, size in t.events] == pytest.approx(sizes, abs=1e-8)
    lengths = [b - a for a, b in zip(steps, steps[1:] + [100])]
    assert sum(lengths) == 100 - steps[0] and (shares is None or [n / sum(lengths) for n in lengths]
                                               == pytest.approx(shares, abs=1e-12))
    spans = {"enlarge": (0, steps[0]), "prune": (steps[0], steps[-1] + 1), "recover": (steps[-1] + 1, 100)}
    assert {s.name: (a, b) for s, a, b in t.stages} == {name: s for name, s in spans.items() if s[0] < s[1]}
    assert t.interleaved and t.slice_at is None and t.cycles == ((0, 100),)
    assert not any(score_at(s, t, every=1) for s in range(100))
    assert size_at(-1, t) == 1 and size_at(steps[0], t) == t.events[0][1]


def test_adapt_takes_about_five_percent_at_a_time_in_steps_that_are_enough():
    for final, cuts in ((.95, 1), (.7, 6), (.6, 8), (.5, 10), (.48, 11), (.05, 19)):
        events = plan("adapt", 1000, final).events
        assert len(events) == cuts and 1 - events[0][1] <= .05 + 1e-9 and events[-1][1] == final
    assert plan("adapt", 100, .6, cuts=8).events == plan("adapt", 100, .6).events
    for cuts in range(1, 30):
        for steps in range(max(2, cuts * (cuts + 1) // 2), 500):                    # what the refusal says is enough
            at = [s for s, _ in interleave(PLANS["adapt"], steps, .5, 0, cuts).events]
            assert at[0] == 0 and at[-1] < steps - 1 and all(a < b for a, b in zip(at, at[1:])), (cuts, steps)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("cuts", [1, 5, 20])
@pytest.mark.parametrize("final", [.05, .2, .5, .9])
def test_journey_prunes_between_25_and_75_percent_of_the_credited_flops_within_one_step(cost, cuts, final):
    for steps in (60, 101, 350):
        t = plan("journey", steps, final, cuts=cuts, flops_at_size=COSTS[cost])
        step_flops = [COSTS[cost](size_at(s, t)) for s in range(steps)]
        (_, a, b), total = t.stages[1], sum(step_flops)
        missed = abs(sum(step_flops[:a]) - .25 * total), abs(sum(step_flops[:b]) - .75 * total)
        if cuts < 20 or steps > 200:            # 20 cuts in some 20 steps are placed too coarsely for this
            assert max(missed) <= .75 * step_flops[0], (steps, missed, step_flops[0])
        assert max(missed) <= 1.2 * step_flops[0], (steps, missed, step_flops[0])


@pytest.mark.parametrize("call, says", [
    (dict(plan="ideal", steps=99), "no plan 'ideal'; there are scratch, naive"),
    (dict(plan="idea", steps=99, size_curve="quartic"), "no size curve 'quartic'.*cubic, linear"),
    (dict(plan="idea", steps=99, enlarge_share=.7, prune_share=.3), "share of 0.7 and the prune stage of 0.3.*below 1"),
    (dict(plan="idea", steps=99, enlarge_share=0), "share of 0 and"),
    (dict(plan="idea", steps=99, prune_share=-.1), "prune stage of -0.1"),
    (dict(plan="idea", steps=50, cuts=11), "11 cuts need at least 11 .*25 to 35 of 50: .* --steps or fewer --cuts"),
    (dict(plan="idea", steps=50, cuts=0), "0 cuts"),
    (dict(plan="idea", steps=2), "2 steps are fewer than the 3 stages.*more --steps"),
    (dict(plan="idea", steps=50, cuts=4, slice_at=33), "--slice-at 33 is outside of .34, 50"),
    (dict(plan="idea", steps=50, cuts=4, slice_at=50), "--slice-at 50 is outside of .34, 50"),
    (dict(plan="scratch", steps=50, prune_share=.1), "--prune-share has no effect in plan 'scratch'"),
    (dict(plan="scratch", steps=50, enlarge_share=0.), "--enlarge-share has no effect"),
    (dict(plan="kd", steps=50, size_curve="cubic"), "--size-curve has no effect in plan 'kd'"),
    (dict(plan="kd", steps=50, slice_at=0), "--slice-at has no effect in plan 'kd'"),
    (dict(plan="adapt", steps=50, size_curve="cubic"), "--size-curve has no effect in plan 'adapt', which cuts to"),
    (dict(plan="adapt", steps=50, prune_share=.3), "--prune-share has no effect in plan 'adapt'"),
    (dict(plan="adapt", steps=50, slice_at=49), "--slice-at has no effect in plan 'adapt'"),
    (dict(plan="adapt", steps=50, enlarge_share=1.), "share of 1.0; it must be at least 0 and below 1"),
    (dict(plan="adapt", steps=50, enlarge_share=-.1), "share of -0.1; it must"),
    (dict(plan="adapt", steps=50, cuts=0), "0 cuts"),
    (dict(plan="adapt", steps=50, enlarge_share=.98, cuts=1), "1 cuts.*do not fit into 1 steps, 2 are enough"),
    (dict(plan="adapt", steps=50, cuts=11), "11 cuts.*do not fit into 25 steps, 66 are enough: .* --steps or fewer")])
def test_refusals_are_one_sentence_with_the_numbers_and_the_remedy(call, says):
    with pytest.raises(ValueError, match=says) as problem:
        resolve(final_size=.5, **call)
    assert "\n" not in str(problem.value)
    plan("idea", 50, cuts=10), plan("idea", 50, cuts=4, slice_at=34), plan("idea", 50, cuts=4, slice_at=49)   # allowed


def test_it_imports_neither_torch_nor_anything_of_ours():
    modules = {name.split(".")[0] for name in imports(ROOT / "schedule.py")}
    assert modules == {"bisect", "dataclasses", "functools", "math"}
