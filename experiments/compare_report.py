"""The rows of the comparison of methods, and what its records say: tables and verdicts.

    python -m experiments.compare smollm2 --out results/smollm2.jsonl --part report

Not here: making the records (experiments/compare.py).
"""
import functools
import itertools
import math
from statistics import fmean

import pandas as pd

import allocate
import score
from common import UserError
from prune import Prune
from report import markdown

# -- what is compared

# None of them mends what it cut, FLAP apart.
Cut = functools.partial(Prune, mend="none")
FFN = functools.partial(Cut, structure="ffn")
PUBLISHED = {  # score and allocation are the method's own
    "random": Cut(score="random", allocate="uniform"),
    "magnitude": Cut(score="magnitude", allocate="uniform"),
    "Wanda-sp": Cut(score="wanda", allocate="uniform"),
    "Wanda-sp, FFN": FFN(score="wanda", allocate="uniform"),
    "FLAP": Prune(score="flap", allocate="global", mend="bias"),
    "FLAP, squared": Prune(score="flap-squared", allocate="global", mend="bias"),
    "LLM-Pruner": Cut(score="taylor", allocate="middle"),
    "LLM-Pruner, FFN": FFN(score="taylor", allocate="middle"),
    "LLM-Pruner, channels": Cut(score="taylor", structure="channel"),
    "Minitron, width": Cut(score="activation", allocate="uniform"),
    "Minitron, FFN": FFN(score="activation", allocate="uniform"),
    "Minitron, width, means": Cut(score="minitron", allocate="uniform"),
    "Minitron, FFN, means": FFN(score="minitron", allocate="uniform"),
    "Minitron, channels": Cut(score="activation", structure="channel"),
    # Adapt-Pruner's iterations are those that ADAPT_STEP gives.
    "Adapt-Pruner": Cut(score="taylor", allocate="adaptive", iterations=20),
    "Adapt-Pruner, FFN": FFN(score="taylor", allocate="adaptive", iterations=20),
    "ShortGPT": Cut(score="influence", structure="layer"),
    "Shortened LLaMA, PPL": Cut(score="perplexity", structure="layer", measured_windows=16),
    "Shortened LLaMA, PPL+": Cut(score="perplexity", structure="layer", allocate="middle", measured_windows=16),
    "Shortened LLaMA, Taylor+": Cut(score="taylor", structure="layer", allocate="middle"),
    "Bypass Back-propagation": Cut(score="policy"),
    # These three have no recipe of prune.py.
    "SliceGPT": None,
    "SliceGPT, own budget": None,
    "torch-pruning": None,
}
# A row that keeps more than the others: it is shown, and no verdict rests on it.
OWN_BUDGET = ("SliceGPT, own budget",)
# Half of the weights are zero; all widths stay.
TWO_FOUR = functools.partial(Cut, structure="2:4")
ANY_HALF = functools.partial(Cut, structure="weights", keep=0.5)
HALF = {
    "2:4, magnitude": TWO_FOUR(score="magnitude"),
    "2:4, Wanda": TWO_FOUR(score="wanda"),
    "2:4, DSnoT": TWO_FOUR(score="wanda", mend="dsnot"),
    "2:4, SparseGPT": TWO_FOUR(score="sparsegpt"),
    "2:4, MRP": TWO_FOUR(score="mrp", mend="least-squares"),
    "2:4, Wanda / mended": TWO_FOUR(score="wanda", mend="least-squares"),
    "2:4, SparseGPT / mended": TWO_FOUR(score="sparsegpt", mend="least-squares"),
    "2:4, Wanda, layer by layer": TWO_FOUR(score="wanda", layer_by_layer=True),
    "2:4, SparseGPT, layer by layer": TWO_FOUR(score="sparsegpt", layer_by_layer=True),
    "2:4, Wanda, layer by layer / mended": TWO_FOUR(score="wanda", mend="least-squares", layer_by_layer=True),
    "half, magnitude": ANY_HALF(score="magnitude"),
    "half, Wanda": ANY_HALF(score="wanda"),
    "half, DSnoT": ANY_HALF(score="wanda", mend="dsnot"),
    "half, SparseGPT": ANY_HALF(score="sparsegpt"),
    "half, Wanda, layer by layer": ANY_HALF(score="wanda", layer_by_layer=True),
    "half, SparseGPT, layer by layer": ANY_HALF(score="sparsegpt", layer_by_layer=True),
    "half, Wanda / mended": ANY_HALF(score="wanda", mend="least-squares"),
    "half, SparseGPT / mended": ANY_HALF(score="sparsegpt", mend="least-squares"),
}
# What a row does otherwise than the code that its authors released, or wrote where there is none. What all rows
# have in common stands in docs/pruning.md: the text, one calibration pass, means over entries, no training.
DIFFERS = {
    "random": "no release; a control",
    "magnitude": "no release; means of |w|, where papers have L2 norms",
    "Wanda-sp": "there each layer is calibrated behind cut ones",
    "Wanda-sp, FFN": "the same; FFNs alone",
    "FLAP": "attention's score is squared there, not in the paper; an exact variance",
    "FLAP, squared": "an exact variance",
    "LLM-Pruner": "whole KV groups; 16,384 tokens for 640",
    "LLM-Pruner, FFN": "the same; FFNs alone",
    "LLM-Pruner, channels": "embeddings and norms do not count in the score",
    "Minitron, width": "the paper's order of means; whole KV groups for query heads",
    "Minitron, FFN": "the paper's order of means; FFNs alone",
    "Minitron, channels": "the paper's order of means",
    "Minitron, width, means": "the release's order of means; whole KV groups for query heads",
    "Minitron, FFN, means": "the release's order of means; FFNs alone",
    "Adapt-Pruner": "2 % at a time as there, measured on half of the windows in turns, on new text there; shares "
                    "from the original widths; embeddings do not count in the budget",
    "Adapt-Pruner, FFN": "the same; FFNs alone",
    "ShortGPT": "no release",
    "Shortened LLaMA, PPL": "all layers compete, there the first four and last two stay; 16 of the windows",
    "Shortened LLaMA, PPL+": "the first eighth and last sixteenth of the layers stay: of 30 four and two, as there; 16 "
                             "of the windows",
    "Shortened LLaMA, Taylor+": "the same layers stay; norms do not count",
    "Bypass Back-propagation": "one budget for both kinds; begins inside of (0, 1); 300 steps for 15,000",
    "SliceGPT": "its shortcuts count in the budget, so fewer directions stay; float32",
    "SliceGPT, own budget": "as there: `keep` counts directions, shortcuts come on top, so it keeps more than the "
                            "other rows",
    "torch-pruning": "its own example and code",
    "2:4, magnitude": "as in Wanda's code",
    "2:4, Wanda": "there each layer is calibrated behind cut ones",
    "2:4, DSnoT": "the same; a row stops when no exchange helps; FFNs too",
    "2:4, SparseGPT": "there each layer is calibrated behind cut ones; float64",
    "2:4, MRP": "no release; 40 steps of conjugate gradients",
    "2:4, Wanda, layer by layer": "as released",
    "2:4, SparseGPT, layer by layer": "float64",
    "half, magnitude": "weights of a row compete, in Wanda's code those of a matrix",
    "half, Wanda": "there each layer is calibrated behind cut ones",
    "half, DSnoT": "the same; a row stops when no exchange helps; FFNs too",
    "half, SparseGPT": "there each layer is calibrated behind cut ones; float64",
    "half, Wanda, layer by layer": "as released",
    "half, SparseGPT, layer by layer": "float64",
}
DEPTH = ("ShortGPT", "Shortened LLaMA, PPL", "Shortened LLaMA, PPL+", "Shortened LLaMA, Taylor+")
# The methods that Adapt-Pruner is compared with.
RIVALS = ("LLM-Pruner", "LLM-Pruner, FFN", "FLAP", "Wanda-sp", "Wanda-sp, FFN", "SliceGPT")
# The scores that are combined with all allocations: not the variants of released code.
UNIT_SCORES = [name for name in score.SCORES if name not in ("minitron", "flap-squared")]
ALLOCATIONS = [name for name in allocate.ALLOCATIONS if name != "uniform-strict"]
ADAPT_STEP = 0.02                     # from Adapt-Pruner's scripts
WAYS = {"full": "full training", "lora": "LoRA"}


def grid():
    """The recipes of all scores with all allocations, as cut and mended; what is quick to run comes
    first."""
    recipes = []
    for allocations, mend in ((ALLOCATIONS, "none"), (ALLOCATIONS, "least-squares"),
                              (["measured"], "least-squares"), (["measured"], "none")):
        for unit_score, allocation in itertools.product(UNIT_SCORES, allocations):
            recipes.append(Prune(score=unit_score, allocate=allocation, mend=mend))
    return recipes


GRID = grid()


def name_of(recipe):
    mended = " / mended" if recipe.mend == "least-squares" else ""
    return f"{recipe.score} / {recipe.allocate}{mended}"


# -- the records as tables

def cells(records, part):
    """A table of the cells that were not refused: a row each, with the losses of the texts as
    columns."""
    rows = []
    for record in records:
        if record["tag"] == "cell" and record["part"] == part and "perplexity" in record:
            rows.append({**record, **record["losses"]})
    columns = ["name", "keep", "seed", "perplexity", "kept", "params", "python", "prose"]
    return pd.DataFrame(rows, columns=columns)


def by_method(table):
    """{(name, keep): {seed: perplexity}} of a table of cells."""
    perplexities = {}
    for row in table.itertuples():
        perplexities.setdefault((row.name, row.keep), {})[row.seed] = row.perplexity
    return perplexities


def number(x):
    return f"{x:.2f}" if x < 1000 else f"{x:.3g}"


def short(values):
    """The mean, and half of the range if there are several."""
    values = list(values)
    if len(values) == 1:
        return number(values[0])
    return f"{number(fmean(values))} ± {number((max(values) - min(values)) / 2)}"


def label(name):
    """A method in a table: ours in bold letters, and what stands for a library in words."""
    if name == "torch-pruning":
        return "torch-pruning's LLM example (weight norms, no data)"
    is_published = name in (*PUBLISHED, *HALF, "dense", "LoRAPrune") and not name.endswith("/ mended")
    return name if is_published else f"**{name}**"


def grid_table(records, keep):
    """Perplexity on the validation parts, score by allocation; the second number is with least
    squares."""
    perplexities = by_method(cells(records, "validation"))

    def cell(unit_score, allocation):
        numbers = []
        for mend in ("none", "least-squares"):
            recipe = Prune(score=unit_score, allocate=allocation, mend=mend)
            by_seed = perplexities.get((name_of(recipe), keep))
            numbers.append(number(by_seed[0]) if by_seed else "-")
        return " / ".join(numbers)

    allocations = [*ALLOCATIONS, "measured"]
    rows = []
    for unit_score in UNIT_SCORES:
        rows.append([f"`{unit_score}`", *[cell(unit_score, allocation) for allocation in allocations]])
    dense = perplexities["dense", 1.0][0]
    heads = ["score", *[f"`{allocation}`" for allocation in allocations]]
    return (f"Validation perplexity at keep {keep:g}, as cut and with least squares (the dense "
            f"model has {dense:.2f}):\n\n{markdown(heads, rows)}")


def answers(records):
    """{(name, keep): {file with its number of questions: share answered (acc_norm)}}."""
    shares = {}
    for record in records:
        if record["tag"] == "questions":
            of_method = shares.setdefault((record["name"], record["keep"]), {})
            of_method[record["file"], record["limit"]] = record["acc_norm"]
    return shares


def all_files(shares):
    """The files of questions in any of several {file: share}."""
    return sorted(set().union(*shares))


def row_tables(records):
    """One table for each kept fraction: the reported rows on the test parts, the best first."""
    table = cells(records, "test")
    shares = answers(records)
    tables = []
    for keep in sorted(table.keep[table.keep < 1].unique(), reverse=True):
        files = all_files([of_method for (_, at), of_method in shares.items() if at == keep])
        rows = []
        for (name, at), own in table[table.keep.isin([keep, 1])].groupby(["name", "keep"]):
            row = [label(name), len(own), f"{own.kept.mean():.3f}",
                   f"{own.params.mean() / 1e6:.1f}", short([math.exp(own.python.mean())]),
                   short([math.exp(own.prose.mean())]), short(own.perplexity)]
            for file in files:
                share = shares.get((name, at), {}).get(file)
                row.append("" if share is None else f"{share:.3f}")
            rows.append((own.perplexity.mean(), row))
        rows.sort(key=lambda row: row[0])
        heads = [f"{file} ({limit})" for file, limit in files]
        heads = ["method", "seeds", "kept", "params (M)", "python", "prose", "both", *heads]
        text = markdown(heads, [row for _, row in rows])
        tables.append(f"Test perplexity at keep {keep:g} (ours in bold):\n\n{text}")
    return tables


def recovery_tables(records):
    """A table for each number of tokens: perplexity before and after training, a row for each cut and a
    column for each way and peak rate. The column that most rows have ranks them, so that nobody gains from
    many rates; the dense row tells what the text alone gives."""
    tables = {}
    for record in records:
        if record["tag"] == "recovered" and "perplexity" in record:
            cuts = tables.setdefault(record["tokens"], {})
            row = cuts.setdefault((record["name"], record["keep"]), {"before": record["before"], "after": {}})
            row["after"][record["way"], record["lr"]] = record["perplexity"]
    texts = []
    for tokens, cuts in sorted(tables.items()):
        measured = list(itertools.chain.from_iterable(row["after"] for row in cuts.values()))
        ways = sorted(set(measured))
        commonest = max(ways, key=measured.count)
        rows = []
        for (name, keep), row in sorted(cuts.items(), key=lambda item: item[1]["after"].get(commonest, math.inf)):
            after = [number(row["after"][way]) if way in row["after"] else "" for way in ways]
            before = number(row["before"]) if row["before"] else ""
            rows.append([label(name), f"{keep:g}", before, *after])
        heads = ["method", "keep", "as cut", *[f"{WAYS[way]}, rate {lr:g}" for way, lr in ways]]
        texts.append(f"Test perplexity before and after training on {tokens:,} tokens, half of them Python and half "
                     f"prose:\n\n{markdown(heads, rows)}")
    return texts


def overview(records, keep):
    """Every method by kept fraction: its test perplexity, and the share of questions answered at
    `keep`, by sparse weights at a half. The best there comes first; methods that did not run at it come
    last."""
    perplexities = by_method(cells(records, "test"))
    keeps = sorted({at for _, at in perplexities if at < 1}, reverse=True)
    shares = {}
    for (name, at), of_method in answers(records).items():
        if at in (keep, 1) or name in HALF:
            shares[name] = of_method
    files = all_files(shares.values())

    def rank(name):
        at_keep = perplexities.get((name, keep), {0: math.inf})
        at_half = perplexities.get((name, .5), {0: math.inf})
        return name != "dense", fmean(at_keep.values()), fmean(at_half.values())

    rows = []
    for name in sorted({name for name, _ in perplexities}, key=rank):
        row = [label(name)]
        for at in keeps:
            by_seed = perplexities.get((name, 1.0 if name == "dense" else at))
            row.append(short(by_seed.values()) if by_seed else "")
        if files:
            of_method = shares.get(name, {})
            row.append(f"{fmean(of_method.values()):.3f}" if len(of_method) == len(files) else "")
        rows.append(row)
    heads = ["method", *[f"keep {at:g}" for at in keeps]]
    title = "Test perplexity by kept fraction"
    if files:
        heads.append(f"questions at {keep:g}, or 0.5")
        counts = ", ".join(f"{limit} of {file}" for file, limit in files)
        title += f", and mean accuracy (acc_norm) on {counts}"
    title += " (ours in bold; ± is half of the range of calibration seeds):"
    return f"{title}\n\n{markdown(heads, rows)}"


def cost_table(records):
    """What each published row does otherwise than its release, and what its cut took in a process of its
    own (`--part alone`)."""
    took = {}
    for record in records:
        if record["tag"] == "alone" and "seconds" in record:
            took[record["name"]] = [f"{record['seconds']:.0f}", f"{record['peak_bytes'] / 1e9:.1f}"]
    rows = [[name, words, *took.get(name, ["", ""])] for name, words in DIFFERS.items()]
    rows += [[label(name), "ours", *numbers] for name, numbers in took.items() if name not in DIFFERS]
    heads = ["method", "what differs from the release", "seconds", "peak memory (GB)"]
    return f"What each cut takes with its calibration, in a process of its own:\n\n{markdown(heads, rows)}"


# -- the papers' claims

def verdict(differences):
    """Whether all, none or some of the relative differences in perplexity are below 0."""
    below = sum(difference < 0 for difference in differences)
    if below == len(differences):
        return "holds"
    return "does not hold" if below == 0 else "mixed"


def percents(differences):
    return ", ".join(f"{difference:+.1%}" for difference in differences)


def against(perplexities, first, second, keep):
    """Relative differences of perplexity between two methods, by the seeds that both have."""
    of_first = perplexities.get((first, keep), {})
    of_second = perplexities.get((second, keep), {})
    return [of_first[seed] / of_second[seed] - 1 for seed in sorted(set(of_first) & set(of_second))]


def adaptive_beats_uniform(grid, keep, groups):
    """For both kinds of units together and, if it was measured, for FFN neurons alone. `groups` is
    the number of KV groups in a layer."""
    coarse = (f"FFN neurons and KV groups (a layer has {groups} groups, and an equal share of them "
              f"is {keep * groups:g})")
    lines = []
    for units, suffix in ((coarse, ""), ("FFN neurons alone", ", FFN")):
        differences = {}
        for unit_score in UNIT_SCORES:
            adaptive = grid.get((f"{unit_score} / adaptive{suffix}", keep))
            uniform = grid.get((f"{unit_score} / uniform{suffix}", keep))
            if adaptive and uniform:
                differences[unit_score] = adaptive[0] / uniform[0] - 1
        if differences:
            each = ", ".join(f"`{name}` {change:+.1%}" for name, change in differences.items())
            lines.append(f"*Adaptive beats uniform* on {units}, keep {keep:g}, validation, one "
                         f"calibration: {verdict(differences.values())}, {each}")
    return lines


def adapt_pruner_beats_others(test, keeps):
    lines = []
    for rival in RIVALS:
        mine = "Adapt-Pruner, FFN" if rival.endswith("FFN") else "Adapt-Pruner"
        differences = []
        parts = []
        for keep in keeps:
            at_keep = against(test, mine, rival, keep)
            if at_keep:
                differences += at_keep
                parts.append(f"keep {keep:g} {percents(at_keep)}")
        if parts:
            lines.append(f"*{mine} beats {rival}*: {verdict(differences)}, {'; '.join(parts)}")
    return lines


def width_and_ours(test, keep, chosen):
    """Width against depth, and the method that the grid chose against the best published one, at
    one kept fraction."""
    mean = {name: fmean(by_seed.values()) for (name, at), by_seed in test.items() if at == keep}
    published = [name for name in mean if name in PUBLISHED and name not in OWN_BUDGET]
    depth = min((name for name in published if name in DEPTH), key=mean.get, default=None)
    width = min((name for name in published if name not in DEPTH), key=mean.get, default=None)
    lines = []
    if depth and width:
        decision = verdict([mean[width] / mean[depth] - 1])
        lines.append(f"*Width beats depth*, keep {keep:g}: {decision}, best width {width} "
                     f"{mean[width]:.2f}, best depth {depth} {mean[depth]:.2f}")
    if published and chosen in mean:
        best = min(published, key=mean.get)
        differences = percents(against(test, chosen, best, keep))
        lines.append(f"*Ours* (the best of the grid on validation, {chosen}), keep {keep:g}: "
                     f"{mean[chosen]:.2f}; the best published method, {best}, has "
                     f"{mean[best]:.2f}: {differences}")
    return lines


def claims(records, keep):
    """Each claim of the papers against the records, as a list with verdicts. Ours is the grid's
    best on validation."""
    grid_cells = by_method(cells(records, "validation"))
    test = by_method(cells(records, "test"))
    keeps = sorted({at for name, at in test if at < 1 and name not in HALF}, reverse=True)
    tested = {name for name, _ in test}
    candidates = {}
    for (name, at), by_seed in grid_cells.items():
        if at == keep and name in tested and 0 in by_seed:
            candidates[name] = by_seed[0]
    chosen = min(candidates, key=candidates.get, default=None)
    dense = [record for record in records if record["tag"] == "cell" and record["name"] == "dense"]
    lines = adaptive_beats_uniform(grid_cells, keep, max(dense[0]["n_kv_head"]))
    lines += adapt_pruner_beats_others(test, keeps)
    for at in keeps:
        lines += width_and_ours(test, at, chosen)
    refused = set()
    for record in records:
        if "refused" in record and record.get("part") == "test":
            refused.add((record["name"], record["keep"]))
    if refused:
        lines.append("Refused: " + ", ".join(f"{name} at {at:g}" for name, at in sorted(refused)))
    return "\n".join(f"- {line}" for line in lines)


def report(records, keep):
    """The tables and what they say about each claim, as Markdown. Raises UserError if there are no
    records."""
    if cells(records, "validation").empty:
        raise UserError("no records there; give the --out of a comparison that ran")
    blocks = (overview(records, keep), grid_table(records, keep), claims(records, keep),
              *row_tables(records), *recovery_tables(records), cost_table(records))
    return "\n\n".join(blocks)
