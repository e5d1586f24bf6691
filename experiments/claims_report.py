"""What the claims' runs say: paired differences with intervals, verdicts, what equal loss takes, tables, the figure.

    python -m experiments.claims report                     # from the committed records
    python -m experiments.claims power                      # how many seeds would see how small an effect

All comparisons are paired by seed: same data in the same order (but where only one of two begins with a cut), same
hold-out. Losses are those at the end, on Scale.final_windows of it. An interval is Student's, 95 %, of the mean
difference over seeds, and one seed has none, so it proves nothing. Of tokens to equal loss it is a percentile bootstrap
over seeds, which is too narrow where there are few. Neither knows that the learning rates were chosen with these seeds.
Nothing is corrected for the number of comparisons: of 20 rows without any effect one is expected to look like one. Not
here: what is compared (experiments/claims_runs.py), the runs (experiments/claims.py).
"""
import bisect
import functools
import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import report
import schedule
from experiments import claims_runs
from experiments.claims_runs import CLAIMS, Run
from experiments.scaling_curves import reach

LEVEL, POWER = .95, .8
UNDECIDED = "not at this scale"
FIGURE = ("scratch", "naive", "idea", "idea-kd")
FAR = 2                                # times fewer tokens are "far fewer" (claim 9): the number is ours
INGREDIENTS = (("one cosine, not two cycles", "oneshot", "naive"), ("iterative cuts, not one", "idea", "oneshot"),
               ("IDEA's score, not a coin", "idea", "idea-random"),
               ("the enlarged phase, not only the target", "idea", "scratch"),
               ("distillation, the enlarged model as it stood", "idea-kd", "idea"),
               ("distillation, the enlarged model at the end of its own cosine", "idea-kd-annealed", "idea"))


# -- statistics

@functools.cache
def t_quantile(p, df):
    """Quantile of Student's t with df degrees of freedom, p in (.5, 1). With t = √df · tan θ the density is c ·
    cos^(df-1) θ, integrated by Simpson's rule and inverted by bisection."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)

    def above_half(theta, n=200):
        values = [math.cos(theta * i / n) ** (df - 1) * (1 if i in (0, n) else 4 if i % 2 else 2) for i in range(n + 1)]
        return scale * theta / (3 * n) * sum(values)

    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < p - .5 else (low, middle)
    return math.sqrt(df) * math.tan(low)


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences, nats per token; negative: the first is better. nan where seeds are too few."""
    seeds: int
    mean: float = math.nan
    sd: float = math.nan               # between seeds
    low: float = math.nan
    high: float = math.nan

    def verdict(self, margin=0):
        """Of the claim that the difference is below the margin."""
        if self.seeds < 2:
            return "not measured"
        return "reproduced" if self.high < margin else "contradicted" if self.low > margin else UNDECIDED


def effect(differences):
    """{seed: difference} or a list of them -> Effect with Student's interval."""
    values = list(differences.values()) if isinstance(differences, dict) else list(differences)
    if len(values) < 2:
        return Effect(len(values), *values)
    mean = statistics.mean(values)
    if not math.isfinite(mean):                                      # a run of one of both ended so
        return Effect(len(values), mean, math.nan, mean, mean)
    sd = statistics.stdev(values)
    half = t_quantile((1 + LEVEL) / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return Effect(len(values), mean, sd, mean - half, mean + half)


def least_seen(sd, seeds):
    """The smallest true difference that so many seeds call one with probability POWER, two-sided at 5 %, where paired
    differences spread by sd: (t_.975 + t_.8) · sd / √n with Student's t, an approximation of the noncentral one."""
    return (t_quantile((1 + LEVEL) / 2, seeds - 1) + t_quantile(POWER, seeds - 1)) * sd / math.sqrt(seeds)


def seeds_for(sd, difference, most=1000):
    """How many seeds see it (least_seen)."""
    return 2 + bisect.bisect_left(range(2, most), True, key=lambda n: least_seen(sd, n) <= difference)


def bootstrapped(statistic, seeds, samples=1000):
    """statistic(list of seeds) and its 95 % percentile interval over resampled seeds -> (value, low, high); of one seed
    no interval (nan)."""
    seeds, dice = sorted(seeds), random.Random(0)
    if len(seeds) < 2:
        return statistic(seeds), math.nan, math.nan
    found = sorted(statistic(dice.choices(seeds, k=len(seeds))) for _ in range(samples))
    return statistic(seeds), found[round(.025 * (samples - 1))], found[round(.975 * (samples - 1))]


# -- records

def read(path):
    """report.finished: {name of the run: {tag: [records]}}."""
    return report.finished(path, "; give each its own --results and --runs")


def of_kind(runs, kind, size, ratio):
    """{seed: summary} of the finished runs of a kind at a place."""
    seeds = sorted({int(name.rpartition("-s")[2]) for name in runs})
    return {seed: runs[name]["summary"][0] for seed in seeds if (name := Run(kind, size, ratio, seed).name) in runs}


def differences(runs, a, b, size, ratio):
    """{seed: loss of kind a minus that of kind b}, nats per token."""
    a, b = of_kind(runs, a, size, ratio), of_kind(runs, b, size, ratio)
    return {seed: a[seed]["final_loss"] - b[seed]["final_loss"] for seed in a if seed in b}


def cost(runs, kind, size, ratio, seeds, total=True):
    """(tokens, FLOPs executed) of a kind, means over these seeds (a teacher is dropped sooner with one than with
    another), if `total` with those of the runs it needs; nan where one has no records."""
    def one(run):
        if run.name not in runs:
            return math.nan, math.nan
        summary = runs[run.name]["summary"][0]
        parts = [(summary["tokens"], summary["flops_executed"]), *(one(need) for need in run.needs() if total)]
        return tuple(map(sum, zip(*parts)))

    return tuple(map(statistics.mean, zip(*(one(Run(kind, size, ratio, seed)) for seed in seeds))))


def mean(found, key, seeds):
    """Over these seeds of {seed: summary}."""
    return statistics.fmean(found[seed][key] for seed in seeds)


def curve(kinds, seeds, spent="tokens"):
    """[(tokens or "flops_executed", loss)], means over these seeds of each {seed: summary}, ascending."""
    return sorted((mean(found, spent, seeds), mean(found, "final_loss", seeds)) for found in kinds)


def equal_loss(runs, kind, size, ratio, scale):
    """Claim 5: D tokens of this kind are worth x · D of training from scratch -> ((x, low, high), total tokens as a
    multiple of D, own FLOPs, total FLOPs as multiples of scratch's at D), or None where runs are missing. Scratch is
    measured at every length, straight lines over the logarithm of the tokens between, which lie above a
    convex curve, so that x is rather too large; it is 0 below the shortest and inf beyond the longest."""
    ours, theirs = of_kind(runs, kind, size, ratio), of_kind(runs, "scratch", size, ratio)
    seeds = [s for s in ours if s in theirs]
    if not seeds:
        return None

    lengths = [of_kind(runs, k, size, r) for k in ("scratch", "scratch-flops", "scratch-kd-flops")
               for r in {*scale.ratios, scale.ratio, scale.long}]
    lengths = [found for found in lengths if {*seeds} <= {*found}]

    def worth(seeds):
        points, loss = curve(lengths, seeds), mean(ours, "final_loss", seeds)
        return reach(points, loss) / ours[seeds[0]]["tokens"] if loss <= points[0][1] else 0

    own, whole, base = (cost(runs, k, size, ratio, seeds, total)
                        for k, total in ((kind, False), (kind, True), ("scratch", True)))
    return bootstrapped(worth, seeds), whole[0] / own[0], own[1] / base[1], whole[1] / base[1]


def headline(runs, scale):
    """Claim 9: how many times fewer tokens a cut model takes to the loss of training from scratch, and with the larger
    model's training fewer tokens and FLOPs -> {what: (times, low, high)} (0: the longest recovery is not enough), and
    whether the shortest is enough already, so that it is at least so many times; or (None, False)."""
    place, kinds = (scale.size, scale.long), [a for a, _ in CLAIMS[9].pairs]
    base, large, *others = (of_kind(runs, kind, *place) for kind in ("scratch", "large", *kinds))
    seeds = [s for s in base if all(s in found for found in (large, *others))]
    if not seeds:
        return None, False

    def times(spent, before=0):
        return bootstrapped(lambda seeds: base[seeds[0]][spent] / (before + reach(
            curve(others, seeds, spent), mean(base, "final_loss", seeds))), seeds)

    shortest = curve(others, seeds)[0]
    return {"tokens, recovery only": times("tokens"),
            "tokens, with the larger model's training": times("tokens", large[seeds[0]]["tokens"]),
            "FLOPs, with the larger model's training": times("flops_executed", large[seeds[0]]["flops_executed"]),
            }, shortest[1] <= mean(base, "final_loss", seeds)


# -- tables

def shown(found):
    """An Effect's mean and interval."""
    if not found.seeds:
        return "-"
    return f"{found.mean:+.4f}" + (f" ({found.low:+.4f} to {found.high:+.4f})" if found.seeds > 1 else "")


def brief(found):
    """The same in little space: half of Student's interval, which is symmetric."""
    if not found.seeds:
        return "-"
    return f"{found.mean:+.3f}" + (f" ± {(found.high - found.low) / 2:.3f}" if found.seeds > 1 else "")


def factor(value, low, high, below="below what was run"):
    """A bootstrapped factor; 0 and inf: outside of the lengths that were run."""
    def one(x):
        return "beyond what was run" if x == math.inf else below if x == 0 else f"{x:.2f}"
    return one(value) + ("" if math.isnan(low) or low == high == value else f" ({one(low)} to {one(high)})")


def verdict_of_factor(value, low, high):
    """Of the claim that a factor is well above 1, FAR."""
    return "not measured" if math.isnan(low) else "reproduced" if low > FAR else "contradicted" if high < 1 \
        else UNDECIDED


def places(scale):
    """[(size, ratio)] of all claims of the scale."""
    return list(dict.fromkeys(place for number in scale.claims for place in claims_runs.places(CLAIMS[number], scale)))


def claim_rows(runs, scale):
    """-> [(claim, first kind, second kind, size, ratio, Effect)] of all pairs of the scale."""
    return [(claim, *pair, effect(differences(runs, *pair))) for number in sorted(scale.claims)
            for claim in [CLAIMS[number]] for pair in claims_runs.pairs(claim, scale)]


def multiples(runs, a, b, size, ratio):
    """Tokens and FLOPs of a as multiples of b's, their own and with what they need, over the seeds that both have."""
    seeds = differences(runs, a, b, size, ratio)
    if not seeds:
        return "-"
    (t, f), (tt, ff) = (tuple(x / y for x, y in zip(*(cost(runs, kind, size, ratio, seeds, total) for kind in (a, b))))
                        for total in (False, True))
    return f"{t:.2f}, {f:.2f}" + (f"; {tt:.2f}, {ff:.2f}" if (tt, ff) != (t, f) else "")


def claims_table(runs, scale):
    """A row for every pair at every place; one for a claim without runs."""
    rows, seen, every = [], set(), claim_rows(runs, scale)
    for claim, a, b, size, ratio, found in every:
        measured = any(e.seeds for other, *_, e in every if other == claim)
        if not measured and claim in seen:
            continue
        verdict = "see below" if claim.by_factor and found.seeds else found.verdict(claim.margin)
        if verdict == UNDECIDED:
            verdict += f" ({found.seeds} seeds see {least_seen(found.sd, found.seeds):.4f})"
        how = f"within {claim.margin:g} of" if claim.margin else "below"
        rows.append((f"{claim.number}. {claim.text}" if claim not in seen else "",
                     f"`{a}` {how} `{b}`" if measured else "", f"{size}, {ratio:g}" if measured else "", found.seeds,
                     shown(found), verdict, multiples(runs, a, b, size, ratio)))
        seen.add(claim)
    return report.markdown(("claim", "compared", "size, tokens per parameter", "seeds", "difference (95 %)", "verdict",
                            "tokens, FLOPs as multiples: own; with what it needs"), rows)


def main_place(claim, scale):
    """Of a claim's places the one that short_table shows."""
    return (scale.size, scale.ratio) if claim.place == "ratios" else claims_runs.places(claim, scale)[0]


def short_table(runs, scale):
    """A row for every paper's claim, its pairs at one place in one cell. Of claim 5 the other places are
    lengths_table's."""
    rows = []
    for claim in (CLAIMS[number] for number in sorted(scale.claims) if not CLAIMS[number].ours):
        place = main_place(claim, scale)
        pairs = [(a, b, effect(differences(runs, a, b, *place))) for a, b, *at in claims_runs.pairs(claim, scale)
                 if tuple(at) == place]
        verdicts = Counter(e.verdict(claim.margin) for *_, e in pairs)
        if claim.by_factor and any(e.seeds for *_, e in pairs):
            times = (headline(runs, scale)[0] or {}).get("tokens, recovery only", (math.nan,) * 3)
            verdicts = Counter([verdict_of_factor(*times)])
        lines = [f"`{a}` minus `{b}` {brief(e)}"
                 + (f", {e.seeds} seed{'s' * (e.seeds > 1)}" if 0 < e.seeds != scale.seeds else "")
                 + (f": {v}" if len(verdicts) > 1 and (v := e.verdict(claim.margin)) != UNDECIDED else "")
                 for a, b, e in pairs if e.seeds]
        elsewhere = f" ({place[1]:g} tokens per parameter)" if place != (scale.size, scale.ratio) and lines else ""
        near = f" (up to {claim.margin:g} above)" if claim.margin else ""
        rows.append((f"{claim.number}. {claim.text}{near}{elsewhere}", "<br>".join(lines),
                     ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()) if len(verdicts) > 1
                     else next(iter(verdicts))))
    return report.markdown(("claim", "nats per token (95 %)", "verdict"), rows)


def lengths_table(runs, scale):
    """Claim 5 at every length: a row for every kind that has seeds there."""
    rows, equal_flops = [], {a: b for a, b in CLAIMS[5].pairs if b != "scratch"}
    for kind in ("idea", "idea-kd", "idea-kd-annealed") if 5 in scale.claims and len(scale.ratios) > 1 else ():
        for ratio in scale.ratios:
            found = equal_loss(runs, kind, scale.size, ratio, scale)
            if not found:
                continue
            x, more, own, whole = found
            e, other = effect(differences(runs, kind, "scratch", scale.size, ratio)), equal_flops.get(kind)
            f = effect(differences(runs, kind, other, scale.size, ratio)) if other else None
            rows.append((f"`{kind}`", f"{ratio:g}", e.seeds, brief(e), f"{brief(f)} (`{other}`"
                         + f", {f.seeds} seeds" * (f.seeds != e.seeds) + ")" if f and f.seeds else "", factor(*x),
                         f"{own:.2f}" + (f" ({whole:.2f} on {more:.2g} times the tokens)" if more > 1 else "")))
    return rows and report.markdown((
        "plan", "tokens per parameter", "seeds", "minus `scratch` at equal own tokens", "at equal FLOPs, minus",
        "tokens that `scratch` takes to its loss, as a multiple of its own",
        "FLOPs as a multiple of those of `scratch` at equal own tokens (with the teacher's training)"), rows)


def ingredients_table(runs, scale):
    """What each thing is worth: a kind with it minus one without."""
    found = [(what, a, b, effect(differences(runs, a, b, scale.size, scale.ratio))) for what, a, b in INGREDIENTS]
    rows = [(what, f"`{a}` minus `{b}`", e.seeds, brief(e)) for what, a, b, e in found if e.seeds]
    return rows and report.markdown(("ingredient", "measured as", "seeds", "nats per token (95 %)"), rows)


def taught(r):
    """The share of a run's steps that had a teacher; of a plan without one 0."""
    c, _, _, t = claims_runs.timeline(r["config"][0])
    dropped = min((record["step"] for record in r.get("teacher", ()) if record.get("dropped")), default=c.steps)
    return sum(max(0, min(end, dropped) - begin) for stage, begin, end in t.stages if stage.kd) / c.steps


def kinds_table(runs, scale):
    """Every kind at every place: its learning rate, tokens, FLOPs, steps with a teacher and loss."""
    rows = []
    for size, ratio in places(scale):
        for kind in claims_runs.KINDS:
            found = of_kind(runs, kind, size, ratio)
            if not found:
                continue
            run = Run(kind, size, ratio, min(found))
            losses = [s["final_loss"] for s in found.values()]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 and max(losses) < math.inf else ""
            (t, f), (tt, ff) = (cost(runs, kind, size, ratio, found, total) for total in (False, True))
            more = (f" ({tt / 1e6:.2f})", f" ({ff:.3g})") if tt != t else ("", "")
            rate = runs[run.name]["config"][0]["lr"]
            steps = [taught(runs[Run(kind, size, ratio, seed).name]) for seed in found] \
                if any(row.kd for row in schedule.PLANS[claims_runs.KINDS[kind].plan]) else []
            rows.append((f"`{kind}`", f"{size}, {ratio:g}", f"{rate:g}", len(found), f"{found[run.seed]['params']:,}",
                         f"{t / 1e6:.2f}{more[0]}", f"{f:.3g}{more[1]}",
                         f"{100 * statistics.mean(steps):.0f} %" if steps else "",
                         f"{statistics.mean(losses):.4f}{spread}"))
    return report.markdown(("kind", "size, tokens per parameter", "peak lr", "seeds", "parameters",
                            "tokens (M), with what it needs", "FLOPs executed, with what it needs",
                            "steps with a teacher", "val loss (nats/token) ± between seeds"), rows)


def sentences(runs, scale):
    """Claim 9 in tokens to equal loss, as Markdown lines."""
    lines = []
    if 9 in scale.claims:
        found, least = headline(runs, scale)
        for what, times in (found or {}).items():
            verdict = f": {verdict_of_factor(*times)} (\"far fewer\" is more than {FAR} times, which is ours to say)" \
                if what == "tokens, recovery only" else ""
            lines.append(f"- Cut from a larger trained model, times fewer {what}, to the loss of `scratch`: "
                         f"{'at least ' * least}{factor(*times, below='not even by the longest')}{verdict}.")
    return lines


def state(runs, scale):
    """How much has been run, on what it was judged, how often the text was read, by which code, at which rates."""
    first, summaries = next(iter(runs.values()))["config"][0], [r["summary"][0] for r in runs.values()]
    code = Counter(r["config"][0].get("code", "unknown") for r in runs.values())
    windows = ", ".join(map(str, sorted({s["final_windows"] for s in summaries if "final_windows" in s})))
    epochs, trains = max(s["epochs"] for s in summaries), first["eval_windows"]
    cosine, wsd = (claims_runs.rate(Run(kind, scale.size, scale.ratio, 0)) for kind in ("idea", "idea-wsd"))
    return (f"{len(runs)} runs of {first['data']}, read at most {epochs:.1f} times; losses of {windows} windows of "
            f"the hold-out at the end, of {trains} while training; code "
            f"{', '.join(f'{name} ({count})' for name, count in sorted(code.items()))}.\n"
            f"Peak learning rate {cosine:g}, with WSD instead of a cosine {wsd:g}; claim 13 is about them, intervals "
            "leave out that they were chosen.")


def text(runs, scale, figure=None):
    """The README's part, from the records alone. figure: the link to the picture."""
    if not runs:
        return "Not measured yet: `python -m experiments.claims` runs what is missing, `python -m experiments.claims report` writes " \
               "this.\n\n" + short_table(runs, scale)
    caption = f"*While training, mean over seeds and their range, at {scale.size}, {scale.ratio:g} per parameter.*"
    ours = [str(number) for number in sorted(scale.claims) if CLAIMS[number].ours]
    about = f"Differences at {scale.size} and {scale.ratio:g} tokens per parameter over {scale.seeds} seeds, where " \
            "nothing else is said; negative: the first is better. In a row of several verdicts a pair without a word " \
            f"is {UNDECIDED}." + f" Claims {' and '.join(ours)} are no paper's: report.md." * bool(ours)
    blocks = [state(runs, scale),
              figure and f"![loss, learning rate and size against FLOPs]({figure})\n\n{caption}", about,
              short_table(runs, scale), "\n".join(sentences(runs, scale)), lengths_table(runs, scale),
              ingredients_table(runs, scale)]
    return "\n\n".join(block for block in blocks if block)


def details(runs, scale):
    """What the README has no room for: every claim at every place, every kind, the spread of the differences."""
    return "\n\n".join(filter(None, (
        claims_table(runs, scale), "Seeds differ by more than kinds do: compare means of the same seeds only.",
        kinds_table(runs, scale), power(runs, scale))))


def power(runs, scale):
    """The spread of the paired differences that are there, and the seeds that small effects need, as Markdown; nothing
    where no pair has two seeds."""
    rows = [(claim.number, f"`{a}` minus `{b}`", f"{size}, {ratio:g}", found.seeds, f"{found.sd:.4f}",
             f"{least_seen(found.sd, found.seeds):.4f}", *(seeds_for(found.sd, d) for d in (.01, .005)))
            for claim, a, b, size, ratio, found in claim_rows(runs, scale) if found.seeds > 1]
    return rows and "Nats per token; two-sided 5 %, power 80 %, Student's t.\n\n" + report.markdown(
        ("claim", "pair", "size, tokens per parameter", "seeds", "sd of differences", "smallest effect seen",
         "seeds for 0.01", "seeds for 0.005"), rows)


# -- the figure

def picture(runs, scale, path):
    """Loss, learning rate and live parameters against executed FLOPs, over the seeds that all drawn kinds have ->
    whether it was drawn: there are such runs and a matplotlib."""
    seeds = {kind: set(of_kind(runs, kind, scale.size, scale.ratio)) for kind in FIGURE}
    common = set.intersection(*filter(None, seeds.values())) if any(seeds.values()) else set()
    drawn = {kind: [runs[Run(kind, scale.size, scale.ratio, seed).name] for seed in sorted(common & found)]
             for kind, found in seeds.items()}
    try:
        import numpy as np
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not any(drawn.values()):
        return False
    canvas = Figure(figsize=(8, 8), layout="constrained")
    loss, rate, size = canvas.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    lowest = []
    for color, (kind, found) in enumerate(item for item in drawn.items() if item[1]):
        evals = [[e for e in r["eval"] if e["step"]] for r in found]
        flops = [e["flops_executed"] for e in evals[0]]
        losses = np.array([[e["val_loss"] for e in row] for row in evals])              # (seeds, evaluations)
        lowest += [losses.min(), *losses[:, 2:].mean(0)]
        loss.plot(flops, losses.mean(0), color=f"C{color}", label=f"{kind} ({len(found)} seeds)")
        loss.fill_between(flops, losses.min(0), losses.max(0), color=f"C{color}", alpha=.2)
        c, target, start, t = claims_runs.timeline(found[0]["config"][0])
        steps = np.arange(c.steps)
        at = np.interp(steps, [0, *(e["step"] for e in evals[0])], [0, *flops])
        rate.plot(at, [schedule.lr_at(s, t, c.lr, c.min_lr, c.warmup_share, c.shape) for s in steps], color=f"C{color}")
        params = {kept: claims_runs.live(start, target, kept).num_params()["total"] for _, kept in ((0, 1.0), *t.events)}
        size.step(at, [params[schedule.size_at(s, t)] / 1e3 for s in steps], color=f"C{color}", where="post")
    loss.set(ylim=(min(lowest) - .02, max(lowest) + .02), ylabel="hold-out loss (nats per token)")
    loss.legend()
    rate.set(ylabel="learning rate")
    size.set(ylabel="live parameters (k)", xlabel="training FLOPs executed, those of the enlarged phase,\n"
             "the teacher's forward passes and scoring included")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    return True
