"""Paired differences of the claims' runs with intervals and verdicts, what runs cost, equal loss.

    python -m experiments.claims power              # how many seeds would see how small an effect

All comparisons are paired by seed: the two runs read the same data in the same order (unless only
one of them begins with a cut) and are judged on the same hold-out, by their losses at the end. An
interval is Student's 95 % interval of the mean difference over seeds; one seed has no interval and
proves nothing. Where the losses of the two kinds hardly correlate over seeds, Welch's interval, for
samples without pairs, is given too, and a verdict needs both. For tokens to equal loss the interval
is a percentile bootstrap over seeds, which is too narrow for few seeds. No interval accounts for
the learning rates, which were chosen with these seeds, or for the number of comparisons: of 20 rows
without any effect one is expected to look like an effect. `holm` corrects for that number. Not
here: what is compared (experiments/claims_runs.py), tables (experiments/claims_report.py).
"""
import bisect
import dataclasses
import math
import random
import statistics
from dataclasses import dataclass

import numpy as np
from scipy import stats

import report
import schedule
from experiments import claims_runs
from experiments.claims_runs import CLAIMS, Claim, Run
from experiments.scaling_curves import reach

LEVEL = .95                            # of the intervals
POWER = .8
UNDECIDED = "not at this scale"
NO_VERDICT = "no verdict"
# A run that was taught for a smaller share of its steps is no test of its teacher (our choice).
MIN_TAUGHT = .2
# Pairs narrow an interval by 1 - √(1 - correlation). Below this correlation, 11 %, that hardly helps
# (our choice).
UNPAIRED = .2
FAR = 2                                # times fewer tokens are "far fewer" (claim 9; our number)


# -- statistics

@dataclass(frozen=True)
class Effect:
    """The mean of paired differences in nats per token; below 0 the first kind is better. What
    needs more seeds than there are is nan."""
    seeds: int
    mean: float = math.nan
    sd: float = math.nan               # of the differences, between seeds
    low: float = math.nan
    high: float = math.nan
    error: float = math.nan            # standard error of the mean
    freedom: float = math.nan          # degrees of freedom of Student's t

    def p_value(self, margin=0):
        """Two-sided, of the hypothesis that the difference is the margin. Below 5 % the 95 %
        interval does not hold the margin, and `verdict` decides."""
        if self.error == 0:
            return float(self.mean == margin)
        return 2 * float(stats.t.sf(abs(self.mean - margin) / self.error, self.freedom))

    def verdict(self, margin=0):
        """On the claim that the difference is below the margin."""
        if self.seeds < 2:
            return "not measured"
        if self.high < margin:
            return "reproduced"
        if self.low > margin:
            return "contradicted"
        return UNDECIDED


def effect(differences):
    """The Effect of paired differences, {seed: difference} or a list, with Student's interval."""
    values = list(differences.values()) if isinstance(differences, dict) else list(differences)
    if len(values) < 2:
        return Effect(len(values), *values)
    mean = statistics.mean(values)
    if not math.isfinite(mean):
        # One of the runs diverged.
        return Effect(len(values), mean, math.nan, mean, mean)
    sd = statistics.stdev(values)
    return with_interval(len(values), mean, sd, sd / math.sqrt(len(values)), len(values) - 1)


def with_interval(seeds, mean, sd, error, freedom):
    """The Effect with Student's interval of this standard error and degrees of freedom."""
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    return Effect(seeds, mean, sd, mean - half, mean + half, error, freedom)


def unpaired_effect(first, second):
    """The Effect of the losses of two kinds, without pairs: Welch's interval. Both are lists of one
    length, and one of them varies."""
    count = len(first)
    variances = statistics.variance(first), statistics.variance(second)
    freedom = (count - 1) * sum(variances)**2 / sum(variance**2 for variance in variances)
    return with_interval(count, statistics.mean(first) - statistics.mean(second), math.nan,
                         math.sqrt(sum(variances) / count), freedom)


def correlation(first, second):
    """Of the losses of two kinds over seeds. It is nan for fewer than 3 seeds, and for losses that
    do not vary or are infinite."""
    if len(first) < 3 or not all(map(math.isfinite, (*first, *second))):
        return math.nan
    if min(first) == max(first) or min(second) == max(second):
        return math.nan
    return statistics.correlation(first, second)


def holm(p_values):
    """p-values corrected for their number, by Holm: the smallest of n times n, the next one times n
    - 1, and so on, each at least the one before. A nan is no comparison, and stays nan."""
    order = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    order.sort(key=lambda i: p_values[i])
    corrected = [math.nan] * len(p_values)
    largest = 0.
    for rank, i in enumerate(order):
        largest = max(largest, min(1., p_values[i] * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def least_seen(sd, seeds):
    """The smallest true difference that this many seeds show with probability POWER, tested
    two-sided at 5 %, if paired differences have the standard deviation sd: (t_.975 + t_.8) · sd /
    √n. Student's t approximates the noncentral t."""
    quantiles = stats.t.ppf([(1 + LEVEL) / 2, POWER], seeds - 1)
    return quantiles.sum() * sd / math.sqrt(seeds)


def seeds_for(sd, difference, limit=1000):
    """How many seeds show this difference (`least_seen`)."""
    return 2 + bisect.bisect_left(range(2, limit), True,
                                  key=lambda seeds: least_seen(sd, seeds) <= difference)


def bootstrapped(statistic, seeds, samples=1000):
    """(value, low, high): statistic(list of seeds) with its 95 % percentile interval over resampled
    seeds. One seed has no interval (nan)."""
    seeds = sorted(seeds)
    value = statistic(seeds)
    if len(seeds) < 2:
        return value, math.nan, math.nan
    dice = random.Random(0)
    values = [statistic(dice.choices(seeds, k=len(seeds))) for _ in range(samples)]
    # Values may be infinite. So the interval ends at samples: scipy.stats.bootstrap would
    # interpolate, which gives nan.
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), method="nearest")
    return value, low, high


# -- records

def read(path):
    """The finished runs in a file: {name of the run: {tag: [records]}}."""
    runs = report.finished(path, "; give each its own --results and --runs")
    for run in runs.values():
        config = run["config"][0]
        if "law" in config:
            # This was the setting's name when the committed records were made.
            config["size_curve"] = config.pop("law")
    return runs


def seed_of(name):
    """The seed in the name of a run."""
    return int(name.rpartition("-s")[2])


def of_kind(runs, kind, size, ratio):
    """The finished runs of a kind at a place, as {seed: summary}."""
    summaries = {}
    for seed in sorted({seed_of(name) for name in runs}):
        name = Run(kind, size, ratio, seed).name
        if name in runs:
            summaries[seed] = runs[name]["summary"][0]
    return summaries


def differences(runs, first, second, size, ratio):
    """{seed: final loss of the first kind minus that of the second}, nats per token."""
    of_first = of_kind(runs, first, size, ratio)
    of_second = of_kind(runs, second, size, ratio)
    seeds = [seed for seed in of_first if seed in of_second]
    return {seed: of_first[seed]["final_loss"] - of_second[seed]["final_loss"] for seed in seeds}


@dataclass(frozen=True)
class Comparison:
    """Two kinds at a place. `claim` is None for a pair that no claim is about."""
    claim: Claim | None
    first: str
    second: str
    size: str
    ratio: float
    effect: Effect
    correlation: float                 # of the two kinds' losses over seeds
    unpaired: Effect | None            # Welch's, if the correlation is below UNPAIRED
    # Of the first kind, if its teacher is under test: the share of the steps that had the teacher,
    # and how far below the run's own loss the teacher's is at the end (nats); otherwise nan.
    taught: float
    lead: float

    @property
    def margin(self):
        return self.claim.margin if self.claim else 0

    @property
    def p_value(self):
        """The larger one, where there are two intervals."""
        p = self.effect.p_value(self.margin)
        return max(p, self.unpaired.p_value(self.margin)) if self.unpaired else p

    @property
    def verdict(self):
        """On the claim. A run that was hardly taught gives none on its teacher, and two intervals
        that disagree decide nothing."""
        decision = self.effect.verdict(self.margin)
        if self.taught < MIN_TAUGHT:
            return NO_VERDICT
        if self.unpaired and self.unpaired.verdict(self.margin) != decision:
            return UNDECIDED
        return decision


def compare(runs, first, second, size, ratio, claim=None):
    """The Comparison of two kinds, over the seeds that both have."""
    by_seed = differences(runs, first, second, size, ratio)
    losses = []
    for kind in (first, second):
        summaries = of_kind(runs, kind, size, ratio)
        losses.append([summaries[seed]["final_loss"] for seed in by_seed])
    correlated = correlation(*losses)
    unpaired = unpaired_effect(*losses) if correlated < UNPAIRED else None
    taught = math.nan
    lead = math.nan
    if by_seed and tests_a_teacher(first, second):
        own_runs = [Run(first, size, ratio, seed) for seed in by_seed]
        taught = statistics.mean(taught_share(runs[run.name]) for run in own_runs)
        teacher = claims_runs.KINDS[first].teacher
        if teacher:
            lead = effect(differences(runs, first, teacher, size, ratio)).mean
    return Comparison(claim, first, second, size, ratio, effect(by_seed), correlated, unpaired, taught,
                      lead)


def tests_a_teacher(first, second):
    """Whether a pair is about the teacher of its first kind: the second kind is not taught in the
    same way by the same plan."""
    return teaching(first) is not None and teaching(first) != teaching(second)


def teaching(kind):
    """How a kind is taught: its plan, its teacher and the settings of distillation; None without a
    teacher."""
    kind = claims_runs.KINDS[kind]
    if not any(stage.kd for stage in schedule.PLANS[kind.plan]):
        return None
    names = ("kd_weight", "kd_temperature", "drop_teacher")
    return kind.plan, kind.teacher, [kind.settings.get(name) for name in names]


def taught_share(run):
    """The share of a run's steps that had a teacher; 0 for a plan without one, and for a run that
    ended before its plan teaches."""
    config, _, _, timeline = claims_runs.plan_of(run["config"][0])
    end_of_teaching = run["summary"][0]["step"]
    for record in run.get("teacher", ()):
        if record.get("dropped"):
            end_of_teaching = record["step"]
    steps = 0
    for stage, begin, end in timeline.stages:
        if stage.kd:
            steps += max(0, min(end, end_of_teaching) - begin)
    return steps / config.steps


def comparisons(runs, scale):
    """The Comparisons of all claims of the scale, in the order of the claims' numbers."""
    rows = []
    for number in sorted(scale.claims):
        claim = CLAIMS[number]
        for pair in claims_runs.pairs(claim, scale):
            rows.append(compare(runs, *pair, claim))
        if claim.elsewhere:
            rows += elsewhere(runs, claim, scale)
    return rows


def elsewhere(runs, claim, scale):
    """The Comparisons of a claim at the lengths for which no run is made for its sake. Only pairs
    that have records there are compared."""
    rows = []
    for pair in claims_runs.pairs(dataclasses.replace(claim, place="ratios"), scale):
        if pair[-1] != scale.ratio and differences(runs, *pair):
            rows.append(compare(runs, *pair, claim))
    return rows


# -- costs

@dataclass(frozen=True)
class Cost:
    """What runs take, on average over seeds (a teacher is dropped sooner in some than in
    others)."""
    tokens: float
    flops: float                       # executed

    def over(self, other):
        """This cost as a multiple of another."""
        return Cost(self.tokens / other.tokens, self.flops / other.flops)


def cost(runs, kind, size, ratio, seeds, total=True):
    """The Cost of a kind, if `total` with the runs that it needs; nan if one of them has no
    records."""
    costs = [cost_of_run(runs, Run(kind, size, ratio, seed), total) for seed in seeds]
    return Cost(statistics.mean(own.tokens for own in costs),
                statistics.mean(own.flops for own in costs))


def cost_of_run(runs, run, total):
    if run.name not in runs:
        return Cost(math.nan, math.nan)
    summary = runs[run.name]["summary"][0]
    parts = [Cost(summary["tokens"], summary["flops_executed"])]
    if total:
        parts += [cost_of_run(runs, need, total) for need in run.needs()]
    return Cost(sum(part.tokens for part in parts), sum(part.flops for part in parts))


# -- equal loss

def mean(summaries, key, seeds):
    """The mean over these seeds of one number of {seed: summary}."""
    return statistics.fmean(summaries[seed][key] for seed in seeds)


def curve(lengths, seeds, spent="tokens"):
    """The points (tokens or "flops_executed", final loss) of several lengths of run, each {seed:
    summary}: means over these seeds, in ascending order."""
    return sorted((mean(summaries, spent, seeds), mean(summaries, "final_loss", seeds))
                  for summaries in lengths)


@dataclass(frozen=True)
class EqualLoss:
    """What a kind at a place is worth beside training from scratch (claim 5)."""
    # Scratch takes so many times the kind's tokens to its loss: the value, low, high.
    worth: tuple[float, float, float]
    # The kind's tokens with what it needs, as a multiple of its own.
    tokens: float
    # The kind's own FLOPs, and those with what it needs, as multiples of those of scratch at equal
    # own tokens.
    flops: float
    total_flops: float


def equal_loss(runs, kind, size, ratio, scale):
    """The EqualLoss of a kind at a place, or None if runs are missing.

    Scratch is measured at every length and interpolated by straight lines over the logarithm of the
    tokens. Straight lines lie above a convex curve, so `worth` is rather too large. It is 0 below
    the shortest length and inf beyond the longest."""
    own = of_kind(runs, kind, size, ratio)
    scratch = of_kind(runs, "scratch", size, ratio)
    seeds = [seed for seed in own if seed in scratch]
    if not seeds:
        return None
    lengths = []
    for longer in ("scratch", "scratch-flops", "scratch-kd-flops"):
        for other in {*scale.ratios, scale.ratio, scale.long}:
            summaries = of_kind(runs, longer, size, other)
            if set(seeds) <= set(summaries):
                lengths.append(summaries)

    def worth(seeds):
        points = curve(lengths, seeds)
        loss = mean(own, "final_loss", seeds)
        if loss > points[0][1]:
            return 0
        return reach(points, loss) / own[seeds[0]]["tokens"]

    alone = cost(runs, kind, size, ratio, seeds, total=False)
    whole = cost(runs, kind, size, ratio, seeds)
    base = cost(runs, "scratch", size, ratio, seeds)
    return EqualLoss(bootstrapped(worth, seeds), whole.tokens / alone.tokens, alone.flops / base.flops,
                     whole.flops / base.flops)


def headline(runs, scale):
    """Claim 9: how many times fewer tokens or FLOPs a cut model takes to the loss of training from
    scratch.

    Returns {what is counted: (times, low, high)} and whether the shortest recovery is enough
    already, so that it is at least so many times; (None, False) if runs are missing. 0 times: the
    longest recovery is not enough."""
    kinds = [first for first, _ in CLAIMS[9].pairs]
    scratch, large, *recoveries = [of_kind(runs, kind, scale.size, scale.long)
                                   for kind in ("scratch", "large", *kinds)]
    seeds = sorted(set(scratch).intersection(large, *recoveries))
    if not seeds:
        return None, False
    first = seeds[0]

    def times(spent, before):
        def ratio(seeds):
            needed = reach(curve(recoveries, seeds, spent), mean(scratch, "final_loss", seeds))
            return scratch[seeds[0]][spent] / (before + needed)

        return bootstrapped(ratio, seeds)

    counted = {
        "Tokens, counting the recovery only": times("tokens", 0),
        "Tokens, counting the larger model's training": times("tokens", large[first]["tokens"]),
        "FLOPs, counting the larger model's training":
            times("flops_executed", large[first]["flops_executed"])}
    _, shortest_loss = curve(recoveries, seeds)[0]
    return counted, shortest_loss <= mean(scratch, "final_loss", seeds)


def verdict_of_factor(value, low, high):
    """On the claim that a factor is well above 1, at least FAR."""
    if math.isnan(low):
        return "not measured"
    if low > FAR:
        return "reproduced"
    return "contradicted" if high < 1 else UNDECIDED
