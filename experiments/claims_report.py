"""The tables, the page and the figure of the claims, from the records.

    python -m experiments.claims report             # from the committed records

Not here: what is compared (experiments/claims_runs.py), the statistics
(experiments/claims_statistics.py), the runs (experiments/claims.py).
"""
import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

import report
import schedule
from experiments import claims_runs
from experiments.claims_runs import CLAIMS, Run
from experiments.claims_statistics import (
    FAR,
    LEVEL,
    MIN_TAUGHT,
    NO_VERDICT,
    UNDECIDED,
    UNPAIRED,
    compare,
    comparisons,
    cost,
    differences,
    equal_loss,
    headline,
    holm,
    least_seen,
    of_kind,
    seeds_for,
    taught_share,
    verdict_of_factor,
)

FIGURE = ("scratch", "naive", "idea", "idea-kd")
INGREDIENTS = (                        # (what it is, a kind with it, a kind without it)
    ("one cosine instead of two cycles", "oneshot", "naive"),
    ("iterative cuts instead of one", "idea", "oneshot"),
    ("IDEA's score instead of a random one", "idea", "idea-random"),
    ("enlarging first instead of training the target only", "idea", "scratch"),
    ("distillation from the enlarged model before its first cut", "idea-kd", "idea"),
    ("distillation from the enlarged model at the end of its own cosine", "idea-kd-annealed", "idea"))


# -- cells of tables

def interval(effect):
    """An Effect's mean with its interval."""
    if not effect.seeds:
        return "-"
    if effect.seeds == 1:
        return f"{effect.mean:+.4f}"
    return f"{effect.mean:+.4f} ({effect.low:+.4f} to {effect.high:+.4f})"


def brief(effect):
    """The same with half of the interval, which is symmetric."""
    if not effect.seeds:
        return "-"
    if effect.seeds == 1:
        return f"{effect.mean:+.3f}"
    return f"{effect.mean:+.3f} ± {(effect.high - effect.low) / 2:.3f}"


def factor(value, low, high, below="less than the shortest run"):
    """A bootstrapped factor. 0 and inf lie outside of the lengths that were run."""
    def show(x):
        if x == 0:
            return below
        return "more than the longest run" if x == math.inf else f"{x:.2f}"

    if math.isnan(low) or low == high == value:
        return show(value)
    return f"{show(value)} ({show(low)} to {show(high)})"


def beside_unpaired(row):
    """`brief` of a Comparison, and half of the interval without pairs where that is given and
    differs."""
    text = brief(row.effect)
    if row.unpaired:
        half = f"{(row.unpaired.high - row.unpaired.low) / 2:.3f}"
        if not text.endswith(half):
            text += f"; unpaired ± {half}"
    return text


def number(x, form="+.2f"):
    return "-" if math.isnan(x) else f"{x:{form}}"


def taught(row):
    """How long the first kind of a Comparison had its teacher, and the teacher's lead at the end;
    "" if no teacher is under test."""
    if math.isnan(row.taught):
        return ""
    digits = 1 if row.taught < .01 else 0
    text = f"taught for {100 * row.taught:.{digits}f} % of the steps"
    if row.taught >= MIN_TAUGHT and not math.isnan(row.lead):
        place = "ahead" if row.lead > 0 else "behind"
        text += f"; its teacher ends {abs(row.lead):.3f} nats {place}"
    return text


def verdict(row):
    """The verdict on a Comparison."""
    if row.claim.by_factor and row.effect.seeds:
        return "by tokens, see below"
    if row.verdict == NO_VERDICT:
        return f"{taught(row)}: {NO_VERDICT}"
    return f"{row.verdict} ({taught(row)})" if taught(row) else row.verdict


def pair(row):
    """What a Comparison's claim says of its two kinds."""
    if row.claim.margin:
        return f"`{row.first}` within {row.claim.margin:g} of `{row.second}`"
    return f"`{row.first}` below `{row.second}`"


def titles(rows):
    """For each Comparison the text of its claim, but only in the claim's first row."""
    seen = set()
    for row in rows:
        yield "" if row.claim in seen else f"{row.claim.number}. {row.claim.text}"
        seen.add(row.claim)


def multiples(runs, row):
    """Tokens and FLOPs of the first kind as multiples of the second's, over the seeds that both
    have: their own, and if that differs with what they need."""
    place = row.size, row.ratio
    seeds = differences(runs, row.first, row.second, *place)
    if not seeds:
        return "-"

    def multiple(total):
        first = cost(runs, row.first, *place, seeds, total)
        return first.over(cost(runs, row.second, *place, seeds, total))

    own = multiple(total=False)
    total = multiple(total=True)
    text = f"{own.tokens:.2f}, {own.flops:.2f}"
    if total != own:
        text += f"; {total.tokens:.2f}, {total.flops:.2f}"
    return text


# -- tables

def claims_table(runs, scale):
    """A row for every pair of every claim at every place."""
    rows = comparisons(runs, scale)
    cells = []
    for row, title in zip(rows, titles(rows)):
        decision = verdict(row)
        if row.verdict == UNDECIDED and not row.claim.by_factor:
            smallest = least_seen(row.effect.sd, row.effect.seeds)
            decision += f" ({row.effect.seeds} seeds see {smallest:.4f})"
        difference = interval(row.effect)
        if row.unpaired:
            difference += f"; unpaired {row.unpaired.low:+.4f} to {row.unpaired.high:+.4f}"
        cells.append((title, pair(row), f"{row.size}, {row.ratio:g}", row.effect.seeds, difference,
                      number(row.correlation), decision, multiples(runs, row)))
    heads = ("claim", "compared", "size, tokens per parameter", "seeds", "difference (95 %)",
             "correlation", "verdict", "tokens, FLOPs as multiples: own; with what is needed")
    return report.markdown(heads, cells)


def short_rows(runs, scale):
    """The Comparisons of the table of claims: all pairs of the papers' claims. Claim 5 is shown at
    one place; `lengths_table` shows the others."""
    rows = []
    for row in comparisons(runs, scale):
        in_another_table = row.claim.place == "ratios" and row.ratio != scale.ratio
        if not row.claim.ours and not in_another_table:
            rows.append(row)
    return rows


def short_table(rows, scale):
    """The table of claims, from `short_rows`."""
    corrected = holm([row.p_value for row in rows])
    cells = []
    for row, title, p in zip(rows, titles(rows), corrected):
        kinds = pair(row)
        if row.ratio != scale.ratio:
            kinds += f", {row.ratio:g} tokens per parameter"
        cells.append((title, kinds, row.effect.seeds, number(row.correlation), beside_unpaired(row),
                      number(p, ".2g"), verdict(row)))
    return report.markdown(("claim", "compared", "seeds", "correlation", "nats per token (95 %)",
                            "p by Holm", "verdict"), cells)


def many_comparisons(rows):
    """What Holm's correction leaves of the table of claims, in sentences; "" if nothing was
    tested."""
    p_values = [row.p_value for row in rows]
    tested = sum(not math.isnan(p) for p in p_values)
    if not tested:
        return ""
    alone = sum(p < 1 - LEVEL for p in p_values)
    left = [row for row, p in zip(rows, holm(p_values)) if p < 1 - LEVEL]
    silent = sum(row.verdict == NO_VERDICT for row in left)
    counts = Counter(row.claim.number for row in left)
    claims = ", ".join(f"{count} of claim {number}" for number, count in counts.items())
    return (f"Of these {tested} pairs, {alone} differ from 0 (in claims of \"within 0.01\": from "
            f"0.01) at the 5 % level. Holm's correction for {tested} comparisons leaves "
            f"{len(left)} ({claims or 'none'}), {silent} of which give no verdict. Read the verdicts "
            "on all other pairs as hints.")


def lengths_table(runs, scale):
    """Claim 5 at every length: a row for every kind that has seeds there."""
    if 5 not in scale.claims or len(scale.ratios) < 2:
        return ""
    equal_flops = {first: second for first, second in CLAIMS[5].pairs if second != "scratch"}
    cells = []
    for kind in ("idea", "idea-kd", "idea-kd-annealed"):
        for ratio in scale.ratios:
            equal = equal_loss(runs, kind, scale.size, ratio, scale)
            if not equal:
                continue
            at_tokens = compare(runs, kind, "scratch", scale.size, ratio)
            at_flops = ""
            if kind in equal_flops:
                at_flops = beside_equal_flops(runs, kind, equal_flops[kind], scale.size, ratio,
                                              at_tokens.effect.seeds)
            flops = f"{equal.flops:.2f}"
            if equal.tokens > 1:
                flops += f" ({equal.total_flops:.2f} on {equal.tokens:.2g} times the tokens)"
            cells.append((f"`{kind}`", f"{ratio:g}", at_tokens.effect.seeds,
                          beside_unpaired(at_tokens), at_flops, factor(*equal.worth), flops))
    if not cells:
        return ""
    heads = ("kind", "tokens per parameter", "seeds", "minus `scratch` at equal own tokens",
             "at equal FLOPs, minus",
             "tokens that `scratch` takes to the same loss, as a multiple of the kind's",
             "FLOPs as a multiple of those of `scratch` at equal own tokens (with the teacher's "
             "training)")
    return report.markdown(heads, cells)


def beside_equal_flops(runs, kind, other, size, ratio, usual_seeds):
    """A cell: the effect against the kind that spends as many FLOPs."""
    row = compare(runs, kind, other, size, ratio)
    seeds = row.effect.seeds
    if not seeds:
        return ""
    fewer = "" if seeds == usual_seeds else f", {seeds} seeds"
    return f"{beside_unpaired(row)} (`{other}`{fewer})"


def ingredients_table(runs, scale):
    """What each ingredient is worth: a kind with it minus one without it."""
    cells = []
    for what, first, second in INGREDIENTS:
        row = compare(runs, first, second, scale.size, scale.ratio)
        if row.effect.seeds:
            kinds = f"`{first}` minus `{second}`"
            if taught(row):
                kinds += f" ({taught(row)})"
            cells.append((what, kinds, row.effect.seeds, beside_unpaired(row)))
    if not cells:
        return ""
    return report.markdown(("ingredient", "measured as", "seeds", "nats per token (95 %)"), cells)


def kinds_table(runs, scale):
    """Every kind at every place: its learning rate, tokens, FLOPs, steps with a teacher, and
    loss."""
    places = []
    for number in scale.claims:
        places += claims_runs.places(CLAIMS[number], scale)
    cells = []
    for size, ratio in dict.fromkeys(places):
        for kind in claims_runs.KINDS:
            summaries = of_kind(runs, kind, size, ratio)
            if summaries:
                cells.append(kind_cells(runs, kind, size, ratio, summaries))
    return report.markdown(("kind", "size, tokens per parameter", "peak lr", "seeds", "parameters",
                            "tokens (M), with what is needed", "FLOPs executed, with what is needed",
                            "steps with a teacher", "val loss (nats/token) ± between seeds"), cells)


def kind_cells(runs, kind, size, ratio, summaries):
    """A row of `kinds_table` from {seed: summary}."""
    own_runs = [runs[Run(kind, size, ratio, seed).name] for seed in summaries]
    own = cost(runs, kind, size, ratio, summaries, total=False)
    total = cost(runs, kind, size, ratio, summaries)
    tokens = f"{own.tokens / 1e6:.2f}"
    flops = f"{own.flops:.3g}"
    if total.tokens != own.tokens:
        tokens += f" ({total.tokens / 1e6:.2f})"
        flops += f" ({total.flops:.3g})"
    steps = ""
    if any(stage.kd for stage in schedule.PLANS[claims_runs.KINDS[kind].plan]):
        steps = f"{100 * statistics.mean(taught_share(run) for run in own_runs):.0f} %"
    losses = [summary["final_loss"] for summary in summaries.values()]
    loss = f"{statistics.mean(losses):.4f}"
    if len(losses) > 1 and max(losses) < math.inf:
        loss += f" ± {statistics.stdev(losses):.4f}"
    params = summaries[min(summaries)]["params"]
    return (f"`{kind}`", f"{size}, {ratio:g}", f"{own_runs[0]['config'][0]['lr']:g}",
            len(summaries), f"{params:,}", tokens, flops, steps, loss)


def power(runs, scale):
    """The spread of the paired differences, and how many seeds small effects need, as Markdown; ""
    if no pair has two seeds."""
    cells = []
    for row in comparisons(runs, scale):
        sd = row.effect.sd
        if row.effect.seeds > 1:
            cells.append((row.claim.number, f"`{row.first}` minus `{row.second}`",
                          f"{row.size}, {row.ratio:g}", row.effect.seeds, f"{sd:.4f}",
                          f"{least_seen(sd, row.effect.seeds):.4f}", seeds_for(sd, .01),
                          seeds_for(sd, .005)))
    if not cells:
        return ""
    heads = ("claim", "pair", "size, tokens per parameter", "seeds", "sd of differences",
             "smallest effect seen", "seeds for 0.01", "seeds for 0.005")
    table = report.markdown(heads, cells)
    return f"Nats per token, tested two-sided at 5 % with power 80 %, by Student's t.\n\n{table}"


# -- pages

def sentences(runs, scale):
    """Claim 9 in tokens to equal loss, as lines of Markdown."""
    if 9 not in scale.claims:
        return []
    counted, at_least = headline(runs, scale)
    lines = []
    for what, times in (counted or {}).items():
        limit = "at least " if at_least else ""
        line = f"- {what}: {limit}{factor(*times, below='not reached')}"
        if "recovery only" in what:
            line += (f", {verdict_of_factor(*times)} (\"far fewer\" means more than {FAR} times; the "
                     "number is ours)")
        lines.append(f"{line}.")
    if lines:
        lines.insert(0, "A model that is cut from a larger trained one reaches the loss of "
                     "`scratch` with fewer tokens or FLOPs by these factors (\"not reached\": the "
                     "longest recovery ends above that loss):\n")
    return lines


def basis(runs, scale):
    """What was run: how many runs of which text, judged on what, by which code, at which rates."""
    config = next(iter(runs.values()))["config"][0]
    summaries = [run["summary"][0] for run in runs.values()]
    epochs = max(summary["epochs"] for summary in summaries)
    windows = sorted({summary["final_windows"] for summary in summaries if "final_windows" in summary})
    codes = Counter(run["config"][0].get("code", "unknown") for run in runs.values())
    code = ", ".join(f"{name} ({count})" for name, count in sorted(codes.items()))
    final = ", ".join(map(str, windows))
    cosine = claims_runs.peak_rate(Run("idea", scale.size, scale.ratio, 0))
    wsd = claims_runs.peak_rate(Run("idea-wsd", scale.size, scale.ratio, 0))
    return (f"The tables come from {len(runs)} runs on the text {config['data']!r}, which no run "
            f"reads more than {epochs:.1f} times. Losses at the end are over {final} windows of "
            f"the hold-out, those while training over {config['eval_windows']}. The peak learning "
            f"rate is {cosine:g}, and {wsd:g} with WSD instead of a cosine; claim 13 is about "
            "these rates, and the intervals do not account for their choice. Code of the runs (a "
            f"hash of the sources in older records, the git commit in newer ones): {code}.")


def how_to_read(scale):
    """What the columns of the table of claims mean."""
    lines = [f"Each row compares two kinds of run at {scale.size} and {scale.ratio:g} tokens per "
             "parameter, unless it names another length. The numbers are differences in the final "
             f"loss: below 0 the first kind is better. A verdict of \"{UNDECIDED}\" means that the "
             "interval contains both answers.",
             f"A pair that tests a teacher gets {NO_VERDICT} if its first kind was taught for less "
             f"than {100 * MIN_TAUGHT:.0f} % of its steps (the bound is our choice): such a pair says "
             "nothing about distillation.",
             "The correlation is that of the two kinds' losses over seeds. Where it is below "
             f"{UNPAIRED:g} (our choice), pairing hardly helps: Welch's interval without pairs "
             "stands beside the paired one if it differs, a verdict needs both, and p is the larger "
             "one."]
    own_claims = [str(number) for number in sorted(scale.claims) if CLAIMS[number].ours]
    if own_claims:
        lines.append(f"Claims {' and '.join(own_claims)} are our own; report.md shows them.")
    return " ".join(lines)


def text(runs, scale, figure=None):
    """The part of docs/claims.md that follows from the records. `figure` is the link to the
    picture."""
    if not runs:
        return ("Nothing has been measured yet: `python -m experiments.claims` runs what is missing, "
                "and `python -m experiments.claims report` writes this part.\n\n"
                + short_table(short_rows(runs, scale), scale))
    picture = ""
    if figure:
        picture = (f"![loss, learning rate and size against FLOPs]({figure})\n\n"
                   f"*Losses while training, at {scale.size} and {scale.ratio:g} tokens per "
                   "parameter: mean and range over seeds.*")
    rows = short_rows(runs, scale)
    blocks = [basis(runs, scale), picture, how_to_read(scale), short_table(rows, scale),
              many_comparisons(rows), "\n".join(sentences(runs, scale)),
              lengths_table(runs, scale), ingredients_table(runs, scale)]
    return "\n\n".join(block for block in blocks if block)


def details(runs, scale):
    """What that page has no room for: every claim at every place, every kind, the spread of the
    differences."""
    blocks = [claims_table(runs, scale),
              "Seeds differ by more than kinds do, so compare only means over the same seeds.",
              kinds_table(runs, scale), power(runs, scale)]
    return "\n\n".join(block for block in blocks if block)


# -- the figure

def picture(runs, scale, path):
    """Draw loss, learning rate and live parameters against executed FLOPs, over the seeds that all
    drawn kinds have. Returns whether there is anything to draw."""
    seeds = {}
    for kind in FIGURE:
        summaries = of_kind(runs, kind, scale.size, scale.ratio)
        if summaries:
            seeds[kind] = set(summaries)
    common = set.intersection(*seeds.values()) if seeds else set()
    if not common:
        return False
    from matplotlib.figure import Figure  # slow to import, and only needed here
    canvas = Figure(figsize=(8, 8), layout="constrained")
    axes = canvas.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    lowest = []
    for i, kind in enumerate(seeds):
        drawn = [runs[Run(kind, scale.size, scale.ratio, seed).name] for seed in sorted(common)]
        lowest += draw(axes, kind, drawn, f"C{i}")
    loss, rate, size = axes
    loss.set(ylim=(min(lowest) - .02, max(lowest) + .02), ylabel="hold-out loss (nats per token)")
    loss.legend()
    rate.set(ylabel="learning rate")
    size.set(ylabel="live parameters (k)",
             xlabel="training FLOPs executed, those of the enlarged phase,\n"
                    "the teacher's forward passes and scoring included")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    return True


def draw(axes, kind, drawn, color):
    """Draw the runs of a kind. Returns the losses that must be inside of the picture."""
    loss, rate, size = axes
    evals = [record for record in drawn[0]["eval"] if record["step"]]
    flops = [record["flops_executed"] for record in evals]
    losses = []
    for run in drawn:
        losses.append([record["val_loss"] for record in run["eval"] if record["step"]])
    losses = np.array(losses)                                  # (seeds, evaluations)
    loss.plot(flops, losses.mean(0), color=color, label=f"{kind} ({len(drawn)} seeds)")
    loss.fill_between(flops, losses.min(0), losses.max(0), color=color, alpha=.2)

    config, start, target, timeline = claims_runs.plan_of(drawn[0]["config"][0])
    steps = range(config.steps)
    flops_at = np.interp(steps, [0, *(record["step"] for record in evals)], [0, *flops])
    rates = [schedule.lr_at(step, timeline, config.lr, config.min_lr, config.warmup_share,
                            config.shape) for step in steps]
    rate.plot(flops_at, rates, color=color)
    params = {}
    for kept in (1.0, *(kept for _, kept in timeline.events)):
        params[kept] = claims_runs.config_at(start, target, kept).num_params()["total"] / 1e3
    size.step(flops_at, [params[schedule.size_at(step, timeline)] for step in steps], color=color,
              where="post")
    return [losses.min(), *losses[:, 2:].mean(0)]
