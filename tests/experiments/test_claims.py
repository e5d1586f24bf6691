"""Claims against planted differences, settings that train.py takes, runs made once, a README that is written."""
import dataclasses
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

import checkpoint
import data
import report
import train
from common import UserError, commit, read_records
from eval import evaluate
from experiments import claims, claims_report, claims_runs, claims_statistics, sweep
from experiments.claims import Report, RunAll
from experiments.claims_runs import CLAIMS, KINDS, SCALES, Run
from methods import grow, sheared
from prune import Prune, check

ROOT = Path(__file__).parents[2]
SHRUNK = dict(size="toy", ratio=1., long=2., ratios=(1., 2.), seeds=2, batch_tokens=256, micro_batch=4, eval_windows=2,
              final_windows=9)                                         # 105 steps
TEXT = str(ROOT / "*.py")


# -- statistics

def test_intervals_cover_the_planted_difference():
    dice, held = random.Random(1), 0
    for _ in range(2000):
        found = claims_statistics.effect([dice.gauss(.01, .02) for _ in range(5)])
        held += found.low <= .01 <= found.high
    assert .935 <= held / 2000 <= .965                                          # 3 standard errors around .95


def test_least_seen_has_the_stated_power():
    dice, sd, n = random.Random(2), .02, 5
    least = claims_statistics.least_seen(sd, n)
    verdicts = [claims_statistics.effect([dice.gauss(-least, sd) for _ in range(n)]).verdict() for _ in range(2000)]
    assert .77 <= verdicts.count("reproduced") / 2000 <= .86                   # the approximation is a little careful
    needed = claims_statistics.seeds_for(sd, .01)
    assert claims_statistics.least_seen(sd, needed) <= .01 < claims_statistics.least_seen(sd, needed - 1)
    assert 30 < needed < 40


@pytest.mark.parametrize("differences, verdict", [
    ([-.03, -.031, -.029], "reproduced"), ([.03, .031, .029], "contradicted"), ([.01, -.01, .02], "not at this scale"),
    ([-.5], "not measured"), ([], "not measured"), ({0: -.03, 3: -.031, 4: -.029}, "reproduced")])
def test_verdicts(differences, verdict):
    assert claims_statistics.effect(differences).verdict() == verdict


def test_diverged_runs_are_infinitely_worse():
    found = claims_statistics.effect([-math.inf, -.1])
    assert found.verdict(.01) == "reproduced" and claims_report.interval(found) == "-inf (-inf to -inf)"
    assert claims_statistics.effect([math.inf, .1]).verdict(.01) == "contradicted"


@pytest.mark.parametrize("shift, verdict", [(-.02, "reproduced"), (.005, "reproduced"), (.01, "not at this scale"),
                                            (.02, "contradicted")])
def test_near_optimal_is_within_a_margin(shift, verdict):
    assert claims_statistics.effect([shift - .001, shift + .001, shift]).verdict(.01) == verdict
    assert {n for n, claim in CLAIMS.items() if claim.margin} == {6, 8, 13, 15, 17}


def test_bootstrap_over_seeds():
    losses = {0: 1., 1: 2., 2: 4.}
    value, low, high = claims_statistics.bootstrapped(lambda seeds: statistics.mean(losses[s] for s in seeds), losses)
    assert value == pytest.approx(7 / 3) and (low, high) == (1, 4)             # all three alike: 1 sample of 27 each
    assert math.isnan(claims_statistics.bootstrapped(lambda seeds: 1., [0])[1])


# -- settings

def records_of(scale, wanted):
    """Records of all runs that `wanted` require, as far as settings read them."""
    return {run.name: {"config": [{"seed": run.seed}], "summary": [{"step": 1, **claims_runs.expected(run, scale)[1]}]}
            for run in claims_runs.everything(wanted)}


@pytest.mark.parametrize("preset", SCALES)
def test_train_accepts_every_run(preset, monkeypatch):
    """Its settings resolve, no flag is idle, its cuts fit into its steps; the shortest training has 300 steps."""
    scale = SCALES[preset]
    numbers = scale.claims + scale.on_request
    wanted = [run for n in numbers for run in claims_runs.runs_of(CLAIMS[n], scale, scale.seeds)]
    records = records_of(scale, wanted)
    runs = claims_runs.everything(wanted)
    assert len({run.name for run in runs}) == len(runs) and all(re.fullmatch(r"[\w.-]+", run.name) for run in runs)
    for run in (r for r in runs if r.seed == 0):
        settings, cut = claims_runs.settings_of(run, scale, records)
        c, start, end, timeline = claims_runs.plan_of(settings, run.size if KINDS[run.kind].init else None,
                                                      claims_runs.grown_config(run))
        train.refuse_idle_flags(dataclasses.replace(c, preset=train.Train.preset, init=settings.get("init"),
                                                    teacher=settings.get("teacher")))
        assert c.batch_tokens == scale.batch_tokens
        assert timeline.steps >= (6 if run.kind.startswith("large-cut") else 170 if cut else 300), run.name
        if KINDS[run.kind].grow:
            grow.check(grow.Grow(**cut))
            target, enlarged = claims_runs.models.preset(run.size, claims_runs.vocabulary())
            assert start == enlarged and end == (target if run.kind == "grown-idea" else enlarged)
        elif KINDS[run.kind].shear:
            sheared.check(sheared.Shear(**cut))
        elif cut:
            check(Prune(**cut))
    assert {*KINDS} - {run.kind for run in runs} == (set() if preset != "quick" else {*KINDS} - {*claims_runs.PLAIN})


def test_what_the_scales_promise():
    """Three ratios a factor of 4 apart, several seeds; no text is read more than 4 times, a longer one is refused."""
    cpu = SCALES["cpu"]
    assert cpu.ratios == (25, 100, 400) and cpu.seeds == 5
    wanted = claims_runs.everything(claims_runs.runs_of(CLAIMS[5], cpu, 1))
    assert re.fullmatch("[0-9a-f]{16}", claims_runs.fingerprint_of(wanted, cpu))
    longer = dataclasses.replace(cpu, ratios=(8000,))
    with pytest.raises(UserError, match=r"scratch.*epochs of stdlib and more than 4; give more text by --data"):
        claims_runs.fingerprint_of([Run("scratch", "4x16", 8000, 0)], longer)


def test_epochs_of_the_gpu_scale(monkeypatch):
    gpu, text = SCALES["gpu"], claims_runs.data.Corpus([0], [0], None, "print", (1, 1), None)
    monkeypatch.setattr(claims_runs.data, "load", lambda *_: dataclasses.replace(text, train=range(80_000_000)))

    def printed(scale):
        wanted = [r for n in gpu.claims for r in claims_runs.runs_of(CLAIMS[n], scale, 1)]
        return claims_runs.fingerprint_of(claims_runs.everything(wanted), scale)

    assert printed(gpu) == "print"
    with pytest.raises(UserError, match="scratch-kd-flops.* epochs of packages and more than 4"):
        printed(dataclasses.replace(gpu, ratios=(16,)))


def test_learning_rates():
    """Claim 2 compares two models to cut, trained at one rate; those that begin with a cut follow one, too."""
    scale = SCALES["cpu"]

    def rate(kind):
        run = Run(kind, "4x16", 100, 0)
        found = claims_runs.settings_of(run, scale, records_of(scale, [run]))[0]
        assert found["min_lr"] == pytest.approx(found["lr"] * (.01 if "floor" in kind else .1))
        return found["lr"]

    assert {kind for kind in KINDS if rate(kind) != 2e-2} == {
        "scratch-wsd", "idea-wsd", *(b for a, b in CLAIMS[13].pairs if not b.endswith("wsd-lr-2x"))}
    assert rate("scratch-wsd") == rate("idea-wsd") == 1e-2
    for kind, other in CLAIMS[13].pairs:
        assert rate(other) / rate(kind) == (.5 if other.endswith("-lr-0.5x") else 2), other
    assert {KINDS[kind].plan for kind, _ in CLAIMS[13].pairs} == {"scratch", "kd", "naive", "idea", "adapt"}


def test_another_order_of_data_behind_a_cut():
    scale, run = SCALES["cpu"], Run("cut-annealed", "4x16", 100, 3)
    settings, cut = claims_runs.settings_of(run, scale, {})
    assert settings["seed"] == cut["seed"] == 103 and cut["init"].endswith("annealed-4x16-100-s3")
    assert claims_runs.settings_of(run.of("annealed"), scale, {})[0]["seed"] == 3
    large = claims_runs.models.preset("4x16", claims_runs.vocabulary(), 2.6)[1]
    assert claims_runs.calibration_flops(run, cut) == 64 * 128 * large.flops_per_token(128)          # with gradients
    assert claims_runs.calibration_flops(run, None) == 0


def test_equal_tokens_and_equal_flops():
    scale = SCALES["cpu"]
    at = {kind: Run(kind, "4x16", 100, 0) for kind in KINDS}
    records = records_of(scale, at.values())
    found = {kind: claims_runs.settings_of(run, scale, records)[0] for kind, run in at.items()}
    steps = {kind: s["steps"] for kind, s in found.items()}
    assert steps["scratch"] == round(100 * 16528 / 1024) == steps["idea"] == steps["naive"] == steps["kd"]
    assert abs(steps["large"] - 2 * steps["scratch"]) <= 1                         # it stops half way
    assert [steps[f"large-cut-1/{k}"] for k in (64, 16, 4, 1)] == [25, 101, 404, 1614]
    equal = "scratch-flops", "scratch-kd-flops", "kd-flops", "journey-5-25%"
    spent = {kind: claims_runs.predicted(found[kind]) for kind in equal}
    for kind, (other, which) in {k: KINDS[k].equal for k in equal}.items():
        wanted = records[at[other].name]["summary"][0][which]
        assert abs(spent[kind][which] / wanted - 1) < 1 / steps[kind], kind
    assert steps["scratch-kd-flops"] > steps["scratch-flops"] > 1.2 * steps["scratch"]
    assert steps["journey-5-25%"] > steps["journey"]
    kd, wanted = (records[at[kind].name]["summary"][0] for kind in ("kd", "idea-kd-annealed"))
    kd["flops_executed"] *= .8                                                     # it dropped its teacher on the way
    assert claims_runs.settings_of(at["kd-flops"], scale, records)[0]["steps"] == round(
        steps["kd"] * wanted["flops_executed"] / kd["flops_executed"]) > 1.2 * steps["kd-flops"]


def test_the_model_that_a_run_grows_from_is_paid_for():
    """Both kinds of a claim spend as much with what one of them grew from; the twin of idea spends less than idea."""
    scale, place = SCALES["cpu"], ("4x16", 100, 0)
    wanted = [Run(kind, *place) for n in (14, 15) for pair in CLAIMS[n].pairs for kind in pair]
    records = records_of(scale, wanted)
    flops = {name: run["summary"][0]["flops_executed"] for name, run in records.items()}
    spent = {kind: flops[Run(kind, *place).name] for kind in
             ("short", "scratch-grown-flops", "enlarged-scratch", "grown-idea", "grown-copy", "idea")}
    assert spent["grown-copy"] + spent["short"] == pytest.approx(spent["enlarged-scratch"], rel=1e-3)
    assert spent["grown-idea"] + spent["short"] == pytest.approx(spent["scratch-grown-flops"], rel=1e-3)
    assert spent["grown-idea"] + spent["short"] < .95 * spent["idea"]
    steps = {kind: claims_runs.settings_of(Run(kind, *place), scale, records)[0]["steps"] for kind in spent}
    assert abs(steps["grown-idea"] + steps["short"] - steps["idea"]) <= 1
    idea, twin = (claims_runs.expected(Run(kind, *place), scale)[0] for kind in ("idea", "grown-idea"))
    spans = [[end - begin for _, begin, end in claims_runs.plan_of(settings, "4x16")[3].stages]
             for settings in (idea, twin)]
    assert all(abs(a - b) <= 1 for a, b in zip(spans[0][1:], spans[1][1:]))             # the same prune and recover
    assert abs(spans[0][0] - spans[1][0] - steps["short"]) <= 1
    growth = claims_runs.settings_of(Run("grown-aki", *place), scale, records)[1]
    assert growth["how"] == "aki" and growth["seed"] == 100 and growth["init"].endswith("short-4x16-100-s0")


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """No picture of each run and cut, the code and its commit told once; tokens are cached in a folder that goes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prune.picture", lambda *_: None)
    here, about = commit(), checkpoint.provenance()
    monkeypatch.setattr(checkpoint, "provenance", lambda: about)
    monkeypatch.setattr(checkpoint, "commit", lambda: here)
    monkeypatch.setattr(report, "picture", lambda path: "")


def test_predicted_flops_are_those_that_a_run_spends(tmp_path, fast):
    """But for scoring; a teacher that is never dropped counts in full; adapt may cut KV groups besides."""
    for kind in ("scratch", "idea", "naive", "annealed", "kd-to-the-end", "adapt"):
        settings = KINDS[kind].settings | (dict(calibration_windows=2) if kind == "adapt" else {})
        settings = dict(plan=KINDS[kind].plan, preset="toy", steps=130, batch_tokens=128, micro_batch=2, eval_windows=2,
                        eval_every=130, compile=False, data=TEXT, **settings)
        _, state = train.main(train.Train(out=str(tmp_path / kind), device="cpu", **settings), quiet=True)
        predicted = claims_runs.predicted(settings)
        found = [state.flops[which] / predicted[f"flops_{which}"] for which in ("executed", "credited")]
        assert .95 < found[1] <= 1 if kind == "adapt" else found[1] == pytest.approx(1, rel=1e-9), kind
        assert .95 < found[0] < 1.2 if kind == "adapt" else 1 <= found[0] < 1.01, kind


# -- the report

PLACE = ("4x16", 100)


@pytest.fixture
def file(tmp_path):
    """A file of records; there is none yet."""
    return tmp_path / "records.jsonl"


def plant(results, losses, dropped=None, **config):
    """Records of runs, put into the file: {kind: (tokens, FLOPs, {seed: loss})} or {(kind, size, ratio): ...}. Their
    teachers are dropped at step `dropped` of 400."""
    planted = {}
    for kind, (tokens, flops, by_seed) in losses.items():
        kind, size, ratio = kind if isinstance(kind, tuple) else (kind, *PLACE)
        for seed, loss in by_seed.items():
            run = Run(kind, size, ratio, seed)
            about = dict(tag="config", step=0, tokens=0, seed=seed, code="abc", corpus_tokens=[10, 1], steps=400,
                         plan=KINDS[kind].plan, preset=size, lr=claims_runs.peak_rate(run), data="stdlib",
                         eval_windows=4) | config
            evals = [dict(tag="eval", step=int(400 * x), tokens=tokens * x, val_loss=loss + 1 - x, params=7,
                          flops_executed=flops * x) for x in (0, .25, .5, .75, 1)]
            summary = dict(evals[-1], tag="summary", epochs=.5, flops_credited=flops, seconds={"train": 2.0},
                           val_loss=9. - loss, final_loss=loss, final_windows=8)
            teacher = [dict(tag="teacher", step=dropped, dropped=True)] if dropped else []
            planted[run.name] = [{"run": run.name, **record} for record in (about, *evals, *teacher, summary)]
    others = [record for record in read_records(results) if record["run"] not in planted]
    sweep.write_records(results, others + [record for run in planted.values() for record in run])


def spread(mean, by=.001):
    return {0: mean - by, 1: mean + by / 2, 2: mean + by / 3}


def test_totals_count_what_a_run_needs(file):
    plant(file, {"annealed": (50, 800., {0: 1., 1: 1.}), "kd": (100, 500., {0: 1., 1: 1.}),
                     "idea-kd-annealed": (100, 900., {0: 1., 1: 1.})})
    plant(file, {"idea-kd-annealed": (100, 1100., {1: 1.})})       # its teacher was dropped later: the mean counts
    runs = claims_statistics.read(file)
    assert claims_statistics.cost(runs, "kd", *PLACE, [0], total=False) == claims_statistics.Cost(100, 500)
    assert claims_statistics.cost(runs, "kd", *PLACE, [0, 1]) == claims_statistics.Cost(150, 1300)
    row = next(row for row in claims_statistics.comparisons(runs, SCALES["cpu"])
               if (row.first, row.second) == ("idea-kd-annealed", "kd"))
    assert claims_report.multiples(runs, row) == "1.00, 2.00; 1.00, 1.38"
    assert math.isnan(claims_statistics.cost(runs, "cut-halfway", *PLACE, [0]).tokens)


def test_share_of_steps_with_a_teacher():
    """Plan idea-kd teaches from the first cut, half way, on; 400 steps."""
    def taught(plan, *records, end=400):
        config = dict(plan=plan, preset="4x16", steps=400, lr=.01)
        return claims_statistics.taught_share({"config": [config], "teacher": [*records], "summary": [{"step": end}]})

    captured = dict(step=200, sha256="x")
    assert taught("idea-kd", captured, dict(step=250, dropped=True)) == pytest.approx(50 / 400)
    assert taught("idea-kd", captured) == pytest.approx(.5) and taught("idea") == 0
    assert taught("idea-kd", end=200) == 0                              # --stage enlarge


def test_first_warmups_of_a_place_are_equally_long():
    """Plan naive's first cycle is half of it: with the same share it would warm up half as long, and lose by that."""
    scale = SCALES["cpu"]
    for ratio in scale.ratios:
        steps = {}
        for kind in ("scratch", "idea", "naive", "annealed", "halfway", "captured", "kd", "journey"):
            c, _, _, t = claims_runs.plan_of(claims_runs.expected(Run(kind, scale.size, ratio, 0), scale)[0])
            steps[kind] = c.warmup_share * (t.cycles[0][1] - t.cycles[0][0])
        assert max(steps.values()) - min(steps.values()) < 1 and min(steps.values()) > 69, steps


def test_runs_behind_a_cut_pair_by_the_seed_in_their_name(file):
    plant(file, {"cut-annealed": (50, 800., spread(1.))}, seed=100)
    plant(file, {"cut-halfway": (50, 800., spread(.9))}, seed=101)
    found = claims_statistics.differences(claims_statistics.read(file), "cut-halfway", "cut-annealed", *PLACE)
    assert found == pytest.approx({0: -.1, 1: -.1, 2: -.1})


def test_tables_say_what_was_planted(file):
    plant(file, {"idea": (100, 9., spread(1.)), "naive": (100, 8., {**spread(1.05), 7: 3.}),
                     "oneshot": (100, 8., {0: .9})})
    runs, scale = claims_statistics.read(file), SCALES["cpu"]
    assert claims_statistics.differences(runs, "idea", "naive", *PLACE) == pytest.approx({0: -.05, 1: -.05, 2: -.05})
    text, table = claims_report.text(runs, scale), claims_report.details(runs, scale)
    rows = {row.split("|")[2].strip(): [cell.strip() for cell in row.split("|")[4:]] for row in table.splitlines()
            if row.startswith("|")}
    assert rows["`idea` below `naive`"][:5] == [
        "3", "-0.0500 (-0.0500 to -0.0500)", "+1.00", "reproduced", "1.00, 1.12"]
    assert rows["`idea` below `oneshot`"][:4] == ["1", "+0.0990", "-", "not measured"]
    assert "0.5 times. Losses at the end are over 8 windows of the hold-out, those while training over 4." in text
    assert "not measured" in re.search(r"\| 10\. .*", text)[0] and "abc (8)" in text
    assert "| one cosine instead of two cycles | `oneshot` minus `naive` | 1 | -0.149" in text
    assert re.search(r"\| 1\. .* \| `oneshot` below `naive` \| 1 \| - \| -0.149 \| - \| not measured \|\n"
                     r"\|  \| `idea` below `naive` \| 3 \| \+1.00 \| -0.050 ± 0.000 \| \S+ \| reproduced \|", text)
    assert "| tokens that" not in text and "times fewer" not in text
    assert "Claims 12 and 13 are our own" in text and "| 12. " not in text and "| 12. " in table
    plant(file, {"journey": (100, 9., spread(1.)), "journey-5-25%": (100, 9., spread(1.002)),
                     "journey-5-75%": (100, 9., spread(.992)), "journey-50-75%": (100, 9., spread(.9))})
    runs = claims_statistics.read(file)
    text, table = claims_report.text(runs, scale), claims_report.details(runs, scale)
    assert [re.search(rf"`journey` within 0.01 of `journey-{other}%` \|.*", table)[0].split("|")[5].strip()
            for other in ("5-25", "5-75", "50-75")] == ["reproduced", "reproduced", "contradicted"]
    assert re.search(r"\| `journey` within 0.01 of `journey-50-75%` \| 3 \| \+1.00 \| \+0.100 ± 0.000 \| \S+ "
                     r"\| contradicted \|", text)


def test_holm_corrects_as_on_paper():
    """.005 × 4, .01 × 3, .03 × 2, and .04 × 1, which is raised to the one before it; a nan is no comparison."""
    corrected = claims_statistics.holm([.01, .04, math.nan, .03, .005])
    assert corrected == pytest.approx([.03, .06, math.nan, .06, .02], nan_ok=True)
    assert claims_statistics.holm([.6, .9]) == [1, 1] and claims_statistics.holm([]) == []


def test_table_corrects_for_its_pairs(file):
    """Of four pairs with records claim 1's two survive; that of claim 3 does not, though its own p is below 5 %."""
    oneshot = [1., 1.01, 1.03, 1.02, 1.]
    better = [.0004, .0012, .002, .002, .0044]
    noise = [.01, -.01, .005, -.004, 0.]
    losses = {"oneshot": oneshot, "idea": [x - y for x, y in zip(oneshot, better)],
              "naive": [x + y + .1 for x, y in zip(oneshot, better)], "adapt": oneshot,
              "adapt-1cut": [x + y for x, y in zip(oneshot, noise)]}
    plant(file, {kind: (9, 9., dict(enumerate(values))) for kind, values in losses.items()})
    rows = claims_report.short_rows(claims_statistics.read(file), SCALES["cpu"])
    text = claims_report.short_table(rows, SCALES["cpu"])
    pairs = (("oneshot", "naive"), ("idea", "naive"), ("idea", "oneshot"), ("adapt", "adapt-1cut"))
    p = {pair: stats.ttest_rel(losses[pair[0]], losses[pair[1]]).pvalue for pair in pairs}
    order = sorted(p, key=p.get)
    assert {*order[:2]} == {*pairs[:2]} and .025 < p[order[2]] < .05 < p[order[3]] and order[2] == pairs[2]
    for times, pair in zip((4, 3, 2, 1), order):
        assert re.search(rf"`{pair[0]}` below `{pair[1]}` \|.* \| {times * p[pair]:.2g} \|", text), pair
    assert claims_report.many_comparisons(rows).startswith(
        "Of these 4 pairs, 3 differ from 0 (in claims of \"within 0.01\": from 0.01) at the 5 % level. Holm's "
        "correction for 4 comparisons leaves 2 (2 of claim 1), 0 of which give no verdict.")
    assert claims_report.many_comparisons(claims_report.short_rows({}, SCALES["cpu"])) == ""


def test_p_values_and_intervals_agree(file):
    dice = random.Random(3)
    for margin in (0, .01):
        for shift in (0, .01, .02, .03):
            effect = claims_statistics.effect([dice.gauss(shift, .01) for _ in range(5)])
            assert (effect.p_value(margin) < .05) == (effect.verdict(margin) != "not at this scale")
    assert math.isnan(claims_statistics.effect([.1]).p_value())
    assert math.isnan(claims_statistics.effect([math.inf, .1]).p_value())
    assert claims_statistics.effect([0., 0.]).p_value() == 1 and claims_statistics.effect([1., 1.]).p_value() == 0


def test_losses_that_do_not_correlate_are_compared_without_pairs_too(file):
    """Paired and Welch's interval; where one says yes and the other does not, there is no decision."""
    first, second = [1., 1.01, 1.02, 1.03, 1.04], [1.08, 1.07, 1.03, 1.05, 1.04]
    plant(file, {"idea": (9, 9., dict(enumerate(first))), "scratch": (9, 9., dict(enumerate(second))),
                 "naive": (9, 9., {s: x + .1 for s, x in enumerate(first)})})
    runs, scale = claims_statistics.read(file), SCALES["cpu"]
    paired = claims_statistics.compare(runs, "idea", "naive", *PLACE)
    assert paired.correlation == pytest.approx(1) and paired.unpaired is None
    row = claims_statistics.compare(runs, "idea", "scratch", *PLACE)
    assert row.correlation == statistics.correlation(first, second) < claims_statistics.UNPAIRED
    welch = stats.ttest_ind(first, second, equal_var=False)
    low, high = welch.confidence_interval()
    assert (row.unpaired.low, row.unpaired.high) == pytest.approx((low, high))
    assert row.unpaired.p_value() == pytest.approx(welch.pvalue)
    assert row.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue) and row.p_value > welch.pvalue
    assert (row.effect.verdict(), row.unpaired.verdict(), row.verdict) == (
        "not at this scale", "reproduced", "not at this scale")
    half = (high - low) / 2
    text, details = claims_report.text(runs, scale), claims_report.claims_table(runs, scale)
    assert f"| `idea` below `scratch` | 5 | -0.76 | -0.034 ± 0.043; unpaired ± {half:.3f} |" in text
    assert f"; unpaired {low:+.4f} to {high:+.4f} | -0.76 | not at this scale" in details
    for short in ([1., 2.], [1., 1., 1.], [1., 2., math.inf]):
        assert math.isnan(claims_statistics.correlation(short, short))


def test_hardly_taught_runs_give_no_verdict(file):
    """Plan idea-kd teaches from step 200 of 400 on: up to step 279 is too short, up to step 281 is enough."""
    plant(file, {"idea": (9, 9., spread(1.)), "annealed": (9, 9., spread(1.05))})
    for dropped, words in ((279, "taught for 20 % of the steps: no verdict"),
                           (281, "reproduced (taught for 20 % of the steps; its teacher ends 0.250 nats behind)")):
        plant(file, {"idea-kd-annealed": (9, 9., spread(.8))}, dropped=dropped)
        runs = claims_statistics.read(file)
        text = claims_report.text(runs, SCALES["cpu"])
        assert re.search(rf"\| `idea-kd-annealed` below `idea` \|.*\| {re.escape(words)} \|", text)
        assert "gets no verdict if its first kind was taught for less than 20 % of its steps" in text
    assert "`idea-kd-annealed` minus `idea` (taught for 20 % of the steps; its teacher ends" in text
    plant(file, {"idea-kd": (9, 9., spread(.7)), "scratch": (9, 9., spread(1.))}, dropped=203)
    text = claims_report.text(claims_statistics.read(file), SCALES["cpu"])
    assert text.count("| taught for 0.8 % of the steps: no verdict |") == 2                # claims 4 and 5


@pytest.mark.parametrize("first, second, tests", [
    ("idea-kd", "idea", True), ("idea-kd-annealed", "kd", True), ("kd-temperature-2", "idea-kd-annealed", True),
    ("kd-floor-1%", "idea-kd-annealed", False), ("kd-linear-40%", "idea-kd-annealed", False),
    ("idea", "scratch", False), ("kd", "kd-lr-2x", False), ("kd-floor-1%", "scratch-floor-1%", True)])
def test_which_pairs_test_a_teacher(first, second, tests):
    assert claims_statistics.tests_a_teacher(first, second) == tests


def test_claim_4_is_judged_where_records_are(file):
    """At every length that has them, with the teacher's lead; no runs are made for it at other lengths."""
    scale = SCALES["cpu"]
    planned = {run.name for run in claims_runs.all_runs(scale, 1)}
    assert "kd-4x16-100-s0" in planned and "kd-4x16-25-s0" not in planned
    for ratio in (25, 100):
        place = ("4x16", ratio)
        plant(file, {("idea", *place): (9, 9., spread(1.)), ("idea-kd-annealed", *place): (9, 9., spread(1.1)),
                     ("annealed", *place): (9, 9., spread(1.02))})
    plant(file, {"kd-annealed-longer": (9, 9., spread(.9)), "annealed-longer": (9, 9., spread(.77))})
    text = claims_report.text(claims_statistics.read(file), scale)
    half = "(taught for 50 % of the steps; its teacher ends"
    for line in (r"`idea-kd-annealed` below `idea` \| 3 .* contradicted {} 0.080 nats ahead\)",
                 r"`idea-kd-annealed` below `idea`, 25 tokens per parameter \| 3 .* contradicted {} 0.080 nats ahead\)",
                 r"`kd-annealed-longer` below `idea` \| 3 .* reproduced {} 0.130 nats ahead\)"):
        assert len(re.findall(line.format(re.escape(half)), text)) == 1, line
    assert "400 tokens per parameter" not in re.search(r"\| 4\. .*?\| 5\. ", text, re.S)[0]


def test_equal_loss_and_headline(file):
    """A curve of scratch that falls by .1 for every factor of 4 in tokens; idea at D is worth a factor of 2."""
    scale, size = SCALES["cpu"], "4x16"
    loss = lambda tokens: 2 - .1 * math.log(tokens / 1000, 4)
    tokens = {25: 1000, 100: 4000, 400: 16000}
    plant(file, {("scratch", size, r): (t, 6. * t, spread(loss(t))) for r, t in tokens.items()}
          | {("scratch-kd-flops", size, 400): (32000, 192000., spread(loss(32000)))}
          | {("idea", size, r): (t, 9. * t, spread(loss(2 * t))) for r, t in tokens.items()})
    runs = claims_statistics.read(file)
    for ratio in tokens:
        equal = claims_statistics.equal_loss(runs, "idea", size, ratio, scale)
        assert equal.worth == pytest.approx((2, 2, 2), abs=.05) and equal.tokens == 1
        assert equal.flops == equal.total_flops == pytest.approx(1.5)
    assert claims_statistics.equal_loss(runs, "idea-kd", size, 100, scale) is None
    plant(file, {("annealed", size, r): (t / 2, 5. * t, spread(1.)) for r, t in tokens.items()}
          | {("idea-kd-annealed", size, r): (t, 9. * t, spread(loss(3 * t))) for r, t in tokens.items() if r < 400})
    lines = claims_report.lengths_table(claims_statistics.read(file), scale)
    assert re.search(r"\| `idea-kd-annealed` \| 100 \| 3 \| -0\.\d+ ± .* \|  \| (3\.0|2\.9).* "
                     r"\| 1.50 \(2.33 on 1.5 times the tokens\) \|", lines)
    assert re.search(r"\| `idea` \| 25 \| 3 \| -0.050 .* \| 1.50 \|", lines) and lines in claims_report.text(
        claims_statistics.read(file), scale)
    plant(file, {("idea", size, 25): (1000, 1., spread(2.1)), ("idea", size, 400): (16000, 1., spread(1.))})
    runs = claims_statistics.read(file)
    worth = [claims_statistics.equal_loss(runs, "idea", size, ratio, scale).worth for ratio in (25, 400)]
    assert [claims_report.factor(*interval) for interval in worth] == [
        "less than the shortest run", "more than the longest run"]
    at = scale.size, scale.long
    plant(file, {("scratch", *at): (6400, 6400., spread(1.7)), ("large", *at): (6400, 20000., spread(1.5))} | {
        (f"large-cut-1/{k}", *at): (6400 / k, 6400. / k, spread(1.5 + .1 * math.log(k, 4))) for k in (64, 16, 4, 1)})
    found, least = claims_statistics.headline(claims_statistics.read(file), scale)
    only, whole, flops = found.values()
    assert not least
    assert only == pytest.approx((16, 16, 16), rel=.05) and whole[0] == pytest.approx(6400 / 6800, rel=.01)
    assert flops[0] == pytest.approx(6400 / 20400, rel=.01)
    text = claims_report.text(claims_statistics.read(file), scale)
    assert re.search(r'recovery only: 1\d\.\d\d.*, reproduced \("far fewer" means more than 2 ', text)
    assert re.search(r"Tokens, counting the larger model's training: 0\.94[^:]*\.$", text, re.M)
    assert "`large-cut-1/64` below `scratch`" in text and "| `idea` | 25 | 3 | +0.100 ± 0.000 |  | less" in text
    plant(file, {("scratch-flops", size, 25): (1500, 1., {k: spread(1.9)[k] for k in (0, 1)})})
    lines = claims_report.lengths_table(claims_statistics.read(file), scale)
    assert "| `idea` | 25 | 3 | +0.100 ± 0.000 | +0.200 ± 0.000 (`scratch-flops`, 2 seeds) | less" in lines
    plant(file, {("scratch", *at): (6400, 6400., spread(1.9))})
    lines = "\n".join(claims_report.sentences(claims_statistics.read(file), scale))
    assert "recovery only: at least 64.00, reproduced" in lines
    plant(file, {("scratch", *at): (6400, 6400., spread(1.2))})
    lines = "\n".join(claims_report.sentences(claims_statistics.read(file), scale))
    assert "recovery only: not reached, contradicted" in lines


@pytest.mark.parametrize("low, high, verdict", [(2.1, 9, "reproduced"), (1.5, 9, "not at this scale"),
                                                (.1, .9, "contradicted"), (math.nan, math.nan, "not measured")])
def test_far_fewer_is_more_than_twice(low, high, verdict):
    assert claims_statistics.verdict_of_factor(5, low, high) == verdict


def test_report_writes_its_page_between_the_markers_and_nothing_else(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results" / "claims.jsonl"                               # the default; there is none yet
    scale = SCALES["cpu"]
    page = tmp_path / "docs" / "claims.md"
    page.parent.mkdir()
    page.write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    c = Report()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file nope; correct --results"):
        claims.main_report(Report(results="nope"))
    claims.main_report(c)
    empty = page.read_text()
    assert empty.startswith(f"before\n{claims.BEGIN}\nNothing has been measured yet")
    assert empty.endswith(f"{claims.END}\nafter\n")
    shown = [CLAIMS[number] for number in scale.claims]
    assert empty.count("not measured") == sum(len(claim.pairs) for claim in shown if not claim.ours)
    plant(file, {kind: (100, 9., spread(1. + i / 50)) for i, kind in enumerate(claims_report.FIGURE)})
    for strange, config, words in (("idea-4x16-1600-s0", {}, "is no run of this plan; move its"),
                                   ("naive-4x16-100-s9", dict(lr=.5), "a learning rate of 0.5, the plan one of 0.02")):
        kind, size, ratio, seed = strange.split("-")
        plant(file, {(kind, size, int(ratio)): (9, 9., {int(seed[1:]): 1.})}, **config)
        with pytest.raises(UserError, match=f"{strange} in .*{words}"):
            claims.main_report(c)
        sweep.put_runs(file, {strange: ()})
    assert page.read_text() == empty and not (tmp_path / "results" / "claims" / "report.md").exists()
    claims.main_report(c)
    text = claims_report.text(claims_statistics.read(file), scale, "../results/claims/figure.png")
    assert page.read_text() == f"before\n{claims.BEGIN}\n{text}\n{claims.END}\nafter\n"
    assert (tmp_path / "results" / "claims" / "figure.png").stat().st_size > 10_000 and "![" in text
    told = (tmp_path / "results" / "claims" / "report.md").read_text()
    with pytest.raises(UserError, match="is no run of this plan"):
        claims.main_report(dataclasses.replace(c, tokens=.5))                      # not what the README is about
    assert text in page.read_text() and (tmp_path / "results" / "claims" / "report.md").read_text() == told
    page.write_text("no markers\n")
    claims.main_report(c)
    assert page.read_text() == "no markers\n" and "it has no <!-- experiments" in capsys.readouterr().err


def test_power_says_what_is_needed_from_the_spread_that_is_there(file, tmp_path, capsys):
    with pytest.raises(UserError, match="there is no file .*records.jsonl; correct --results"):
        claims.main_power(Report(results=str(file)))
    plant(file, {"idea": (1, 1., {0: 1.})})
    with pytest.raises(UserError, match="no pair has two seeds yet"):
        claims.main_power(Report(results=str(file)))
    for key in ("fingerprint", "tokenizer", "block_size", "batch_tokens", "micro_batch", "eval_windows", "dtype"):
        plant(tmp_path / key, {"idea": (1, 1., {0: 1.})}, **{key: "a"})
        plant(tmp_path / key, {"naive": (1, 1., {0: 1.})}, **{key: "b"})
        with pytest.raises(UserError, match=f"do not compare: {key} is one of"):
            claims.main_power(Report(results=str(tmp_path / key)))
    plant(file, {"idea": (1, 1., {s: 1. + .01 * (-1) ** s for s in range(4)}),
                     "naive": (1, 1., dict.fromkeys(range(4), 1.))})
    claims.main_power(Report(results=str(file)))
    sd = .01 * math.sqrt(4 / 3)
    row = re.search(r".*`idea` minus `naive`.*", capsys.readouterr().out)[0].split("|")
    needed = [str(claims_statistics.seeds_for(sd, difference)) for difference in (.01, .005)]
    assert [cell.strip() for cell in row[4:9]] == [
        "4", f"{sd:.4f}", f"{claims_statistics.least_seen(sd, 4):.4f}", *needed]


@pytest.mark.parametrize("settings, words", [
    (dict(preset="tpu"), "--preset 'tpu' is not one of cpu, gpu"),
    (dict(preset="gpu", quick=True), "no effect with --quick"),
    (dict(claims="1,99"), "'1,99' must be numbers of 1, 2, 3"), (dict(claims="one"), "'one' must be numbers"),
    (dict(seeds=0), "--seeds 0 must be positive"), (dict(minutes=0.), "--minutes 0.0 must be positive"),
    (dict(seeds=200), "--seeds 200 must be at most 100, the first seed behind a cut"),
    (dict(quick=True, tokens=.01), "idea.*more steps come by a larger --tokens"),
    (dict(tokens=0.), "--tokens 0.0 must be positive"),
    (dict(quick=True, data="nowhere"), "no file matches 'nowhere'")])
def test_refusals_are_one_sentence(tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as refusal:
        claims.run_all(RunAll(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), **settings))
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["report --jobs 2", "report --data packages", "power --again"])
def test_flags_of_another_command_are_refused(words, capsys):
    with pytest.raises(SystemExit) as refusal:
        claims.main(words.split())
    assert refusal.value.code == 2 and words.split()[1] in capsys.readouterr().err


# -- end to end

@pytest.fixture
def shrunk(monkeypatch):
    """Both presets at toy size -> a function that changes more of preset cpu."""
    for name in ("cpu", "gpu"):
        monkeypatch.setitem(SCALES, name, dataclasses.replace(SCALES[name], **SHRUNK))
    return lambda **more: monkeypatch.setitem(SCALES, "cpu", dataclasses.replace(SCALES["cpu"], **more))


def here(function, arguments, jobs, until=None, describe=None):
    """sweep.side_by_side, but in this process, which spares the start of one for each run."""
    for given in arguments:
        function(*given)
        describe(given)
    return len(arguments)


def of_another_code(file, name):
    """Change the commit in a run's config record."""
    records = read_records(file)
    for record in records:
        if record["run"] == name and record["tag"] == "config":
            record["code"] = "another"
    sweep.write_records(file, records)


def test_all_runs_are_made_once_and_in_order(tmp_path, fast, shrunk, monkeypatch, capsys):
    """Parts of claims 2 and 4 at toy size: teachers and models to cut first, then what needs them. Nothing
    is made twice; what is needed and gone, or half made again, is made whole; records of other settings, another cut or
    another text are refused; another code is told, and what came of it deleted."""
    made, real = [], claims.job
    for number, pair in ((2, ("cut-halfway", "cut-annealed")), (4, ("idea-kd", "kd-flops"))):
        monkeypatch.setitem(CLAIMS, number, dataclasses.replace(CLAIMS[number], pairs=(pair,)))
    c = RunAll(claims="2,4", data=TEXT, runs=f"{tmp_path}/runs", results=f"{tmp_path}/results.jsonl", jobs=1)
    monkeypatch.setattr(claims.sweep, "side_by_side", here)
    monkeypatch.setattr(claims, "job", lambda *given: made.append(given[1].name) or real(*given))
    claims.run_all(c)
    scale = claims.resolve(c)[1]
    wanted = claims_runs.everything([r for n in (2, 4) for r in claims_runs.runs_of(CLAIMS[n], scale, 2)])
    assert sorted(made) == sorted(run.name for run in wanted) and "runs are missing" in capsys.readouterr().out
    place = {name: i for i, name in enumerate(made)}
    for run in wanted:
        assert all(place[other.name] < place[run.name] for other in claims_runs.requires(run)), run.name
    runs = claims_statistics.read(c.results)
    halfway, whole, cut = (checkpoint.load(f"{c.runs}/{kind}-toy-1-s0", "meta")[0].config
                           for kind in ("halfway", "idea-kd", "from-cut-halfway"))
    assert halfway.d_ff > whole.d_ff == cut.d_ff
    stopped, own = runs["annealed-toy-1-s0"]["summary"][0], runs["cut-halfway-toy-1-s0"]["summary"][0]
    assert 1 <= stopped["flops_executed"] / stopped["flops_credited"] < 1.01 and 0 < stopped["epochs"] < 1
    assert own["flops_executed"] - own["flops_credited"] == 64 * 64 * halfway.flops_per_token(64)      # of the cut
    assert runs["cut-halfway-toy-1-s0"]["config"][0]["seed"] == 100
    model = checkpoint.load(f"{c.runs}/idea-kd-toy-1-s0")[0]
    corpus = data.load(TEXT, claims_runs.open_tokenizer("bytes"))
    found = evaluate(model, corpus.val, corpus.tokenizer.byte_lengths(), 9, batch=4)["loss"]
    ended = runs["idea-kd-toy-1-s0"]["summary"][0]
    assert (ended["final_loss"], ended["final_windows"]) == (found, 9) and found != ended["val_loss"]
    assert str(tmp_path) not in Path(c.results).read_text()
    assert Path(c.results).stat().st_size < 5000 * len(runs)

    made.clear()
    claims.run_all(c)
    assert not made and "all runs are finished" in capsys.readouterr().out
    kept, begun = runs["annealed-toy-1-s1"]["summary"][0], Path(c.runs, "annealed-toy-1-s1")
    sweep.put_runs(c.results, {"kd-flops-toy-1-s1": ()})
    max(begun.glob("ckpt_*.pt")).unlink()                         # as if it were being made again, and killed
    assert checkpoint.checkpoints(begun)
    claims.run_all(c)
    assert made == ["annealed-toy-1-s1", "kd-flops-toy-1-s1"]          # finished, but for its records
    again = claims_statistics.read(c.results)
    assert again["annealed-toy-1-s1"]["summary"][0]["final_loss"] == kept["final_loss"]
    assert again.keys() == runs.keys() and len(read_records(c.results)) == sum(
        len(records) for run in runs.values() for records in run.values())
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the cut's score is .* another --results"):
        patch.setitem(KINDS, "cut-halfway", claims_runs.cut("halfway", score="taylor"))
        claims.run_all(c)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="micro_batch is 4 there and 2.* another --res"):
        patch.setitem(SCALES, "cpu", dataclasses.replace(SCALES["cpu"], micro_batch=2))
        claims.run_all(c)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cut-halfway-toy-1-s0, but not halfway"):
        patch.setattr(claims_statistics, "read", lambda folder, all=claims_statistics.read: {
            name: r for name, r in all(folder).items() if name != "halfway-toy-1-s0"})
        claims.run_all(c)
    with pytest.raises(UserError, match="runs of another text .* give another --results"):
        claims.run_all(dataclasses.replace(c, data=str(ROOT / "t*.py")))

    made.clear()
    claims.main_report(c)
    of_another_code(c.results, "idea-kd-toy-1-s0")
    begun = Path(c.runs, "kd-toy-1-s1", "metrics.jsonl")               # has no records, and is of another code
    begun.write_text(begun.read_text().replace(commit(), "another"))
    sweep.put_runs(c.results, {"kd-toy-1-s1": ()})
    claims.main_report(c)
    claims.forget_another_code(c, wanted)
    assert "3 runs are of another code, or require one that is" in capsys.readouterr().out
    forgotten = {"idea-kd-toy-1-s0", "kd-toy-1-s1", "kd-flops-toy-1-s1"}          # the last is as long as kd says
    assert {*claims_statistics.read(c.results)} == {run.name for run in wanted} - forgotten
    assert not forgotten & {p.name for p in Path(c.runs).iterdir()}
    of_another_code(c.results, "annealed-toy-1-s0")
    claims.forget_another_code(c, wanted)
    assert not any(name.endswith("annealed-toy-1-s0") for name in claims_statistics.read(c.results))
    assert not Path(c.runs, "from-cut-annealed-toy-1-s0").exists()
    assert "cut-halfway-toy-1-s0" in claims_statistics.read(c.results)


def test_runs_behind_a_growth(tmp_path, fast, shrunk, monkeypatch):
    """Two pairs of claims 14 and 15 at toy size: what they grow from is made once, and records of a kind that grows in
    another way are refused."""
    monkeypatch.setattr(claims.sweep, "side_by_side", here)
    for number, pair in ((14, ("grown-split", "grown-fresh")), (15, ("grown-idea", "grown-split"))):
        monkeypatch.setitem(CLAIMS, number, dataclasses.replace(CLAIMS[number], pairs=(pair,)))
    shrunk(seeds=1)
    c = RunAll(claims="14,15", data=TEXT, runs=f"{tmp_path}/runs", results=f"{tmp_path}/results.jsonl", jobs=1)
    claims.run_all(c)
    runs = {name.removesuffix("-toy-1-s0"): run for name, run in claims_statistics.read(c.results).items()}
    assert runs.keys() == {"short", "enlarged-scratch", "grown-fresh", "grown-split", "grown-idea"}
    ended = {kind: run["summary"][0] for kind, run in runs.items()}
    assert ended["grown-fresh"]["growth"]["how"] == "fresh" and "growth" not in ended["short"]
    total = ended["grown-fresh"]["flops_executed"] + ended["short"]["flops_executed"]
    assert total == pytest.approx(ended["enlarged-scratch"]["flops_executed"], rel=.02)
    assert claims_statistics.cost(claims_statistics.read(c.results), "grown-fresh", "toy", 1, [0]).flops == total
    assert ended["grown-idea"]["d_ff"] == ended["short"]["d_ff"] < ended["grown-fresh"]["d_ff"]
    begun = {kind: run["eval"][0]["val_loss"] for kind, run in runs.items()}
    assert begun["grown-fresh"] == pytest.approx(begun["grown-idea"], abs=1e-5)
    assert 0 < abs(begun["grown-split"] - begun["grown-fresh"]) < 1e-2 < begun["short"] - begun["grown-fresh"]
    assert str(tmp_path) not in Path(c.results).read_text()
    another = dataclasses.replace(KINDS["grown-fresh"], grow=KINDS["grown-split"].grow)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the growth's how is 'fresh' there and 'spl"):
        patch.setitem(KINDS, "grown-fresh", another)
        claims.run_all(c)
    claims.main_report(Report(results=c.results))                                       # is no stranger to it


def test_a_teacher_is_the_captured_one(tmp_path, fast, shrunk, monkeypatch):
    """Claim 4's "same teacher"."""
    monkeypatch.setattr(claims.sweep, "side_by_side", here)
    monkeypatch.setitem(CLAIMS, 4, dataclasses.replace(CLAIMS[4], pairs=(("idea-kd", "captured"),)))
    shrunk(seeds=1)
    c = RunAll(claims="4", data=TEXT, runs=f"{tmp_path}/runs", results=f"{tmp_path}/results.jsonl", jobs=1)
    claims.run_all(c)
    a, b = (checkpoint.load(f"{c.runs}/{name}")[0].state_dict()
            for name in ("idea-kd-toy-1-s0/teacher.pt", "captured-toy-1-s0"))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_a_stopped_command_goes_on(file, tmp_path, monkeypatch):
    """As a user runs it: --quick, ended by a signal while it trains, gone on with, reported."""
    flags = f"--quick --claims 3 --tokens .14 --jobs 2 --data {TEXT}"
    words = [sys.executable, "-m", "experiments.claims", *flags.split(), "--runs", "runs", "--results", "records.jsonl"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and process.poll() is None:
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert len(claims_statistics.read(file)) < 2
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "One seed proves nothing" in done.stdout and done.stdout.count("| not measured |") == 1
    assert len(claims_statistics.read(file)) == 2 and (tmp_path / "records" / "figure.png").exists()
    scale = claims.resolve(RunAll(quick=True, claims="3", tokens=.14))[1]
    assert claims_report.text(claims_statistics.read(file), scale, "records/figure.png") in done.stdout


def test_the_gpu_scale_at_toy_size(tmp_path, fast, shrunk, monkeypatch):
    """Preset gpu, its text and kinds; only the sizes are toys'."""
    for i in range(60):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.py").write_text(f"x{i} = 'some text of a package'\n" * 99)
    real = data.sysconfig.get_paths()
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {**real, "purelib": str(tmp_path / "text")})
    monkeypatch.setattr(claims.sweep, "side_by_side", here)
    c = RunAll(preset="gpu", claims="3", device="cpu", runs="runs", results="records.jsonl", jobs=1, seeds=1)
    claims.run_all(c)
    config = claims_statistics.read("records.jsonl")["idea-toy-1-s0"]["config"][0]
    assert config["data"] == "packages" and config["corpus_tokens"][0] > 100_000 and config["dtype"] == "float32"
