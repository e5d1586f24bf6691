"""What runs recorded, as a table and a picture. It reads metrics.jsonl only (train.py lists its
records).

    python report.py runs/idea-laptop-0            # one run: sizes, losses, FLOPs, samples; draws run.png beside it
    python report.py runs/*-laptop-*               # several: mean ± spread by plan, and paired differences by seed
    python report.py results/smollm2.jsonl         # the same for a file of several runs, whose records name their run

"±" is half the distance between the largest and the smallest seed. With few seeds this says more
than a standard error.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import UserError, parse, printable, read_records, refuse_idle, run

# Runs compare only if they agree in these settings. `table` compares plans at one size and length,
# `finished` serves experiments, whose runs differ in size and length.
SAME_IN_A_TABLE = ("preset", "init", "block_size", "tokenizer", "steps", "batch_tokens", "fingerprint", "dtype",
                   "eval_windows")
SAME_IN_AN_EXPERIMENT = ("fingerprint", "tokenizer", "block_size", "batch_tokens", "micro_batch", "eval_windows",
                         "dtype")


@dataclass(frozen=True)
class Report:
    runs: tuple[str, ...]     # folders of runs, metrics.jsonl files, or files of several runs
    against: str = "scratch"  # the plan that the others are compared with, seed by seed, if it is among the runs


# -- records

def read_runs(path):
    """Read a run folder, its metrics.jsonl, or a file of several runs, whose records name their
    run.

    Returns {name of the run: {tag: [records]}}, sorted by name. Raises UserError if there is no
    run."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    runs = {}
    try:
        for record in read_records(file):
            run = runs.setdefault(record.get("run", path.stem), {})
            run.setdefault(record["tag"], []).append(record)
            if "config" not in run:
                raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        runs = {}
    if not runs:
        raise UserError(f"{path} has no records of a run; give a run folder or its metrics.jsonl")
    return dict(sorted(runs.items()))


def records(path):
    """Read the records of one run: {tag: [records]}. Raises UserError if `path` holds no run, or
    several."""
    runs = read_runs(path)
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs; give a run folder or its metrics.jsonl")
    return runs.popitem()[1]


def finished(path, remedy=""):
    """Read the finished runs of an experiment's file: {name: {tag: [records]}}, or {} if there is
    no such file.

    Raises UserError if the runs do not compare: they read different texts, or differ in a setting
    that all share."""
    if not Path(path).exists():
        return {}
    runs = read_runs(path)
    for key in SAME_IN_AN_EXPERIMENT:
        values = {run["config"][0].get(key) for run in runs.values()}
        if len(values) > 1:
            raise UserError(f"the runs in {path} do not compare: {key} is one of "
                            f"{', '.join(map(str, values))}{remedy}")
    return {name: run for name, run in runs.items() if "summary" in run}


def column(run, tag, key, unit=1):
    """The values of `key` in all records of that tag, divided by `unit`."""
    return [record[key] / unit for record in run.get(tag, [])]


# -- one run

def summary(path):
    """One finished run in a few lines of text; draws run.png. Raises UserError if the run is not
    finished."""
    run = records(path)
    if "summary" not in run:
        raise UserError(f"{path} is not finished; run the same train.py command again to go on")
    end = run["summary"][0]
    lines = [f"{end['plan']} / {end['preset']} / seed {end['seed']}: {end['params']:,} parameters, "
             f"{end['tokens']:,} tokens ({rounded(end['tokens'] / end['params'], 0)} per parameter, "
             f"{rounded(end['epochs'], 2)} epochs), {end['flops_executed']:.3g} FLOPs executed, "
             f"{end['flops_credited']:.3g} credited",
             "",
             "                        step     parameters   val loss (nats/token)   bits per byte"]
    for name, record in moments(run):
        lines.append(f"  {name:20} {record['step']:6}   {record['params']:12,}   "
                     f"{record['val_loss']:21.4f}   {record['bits_per_byte']:13.4f}")
    seconds = "   ".join(f"{part} {value:.1f}" for part, value in end["seconds"].items())
    lines += ["",
              f"seconds: {seconds};  score + cut + slice = {100 * end['pruning_share']:.2f} % of the run",
              f"peak memory {end['peak_bytes'] / 2**30:.2f} GiB; {picture(path)}",
              ""]
    for sample in run.get("sample", []):
        lines += [f"-- {sample['when']} (step {sample['step']}): {sample['prompt'][-40:]!r} goes on",
                  sample["text"], ""]
    return "\n".join(lines)


def rounded(value, decimals):
    """The number with so many decimals; with two digits where these would be zeros, as in a short
    run of a large model."""
    text = f"{value:.{decimals}f}"
    return text if float(text) else f"{value:.2g}"


def moments(run):
    """The evaluations at which a stage began, the last cut, and the end: [(name, record)] in the
    order of steps."""
    last_step = run["summary"][0]["step"]
    rows = []
    stage_before = None
    for record in run["eval"]:
        stage = record["stage"]
        if record["step"] == last_step:
            rows.append((f"{stage} ends", record))
        elif stage != stage_before:
            rows.append((f"{stage} begins", record))
        stage_before = stage
    if run.get("prune"):
        rows.append(("after the last cut", run["prune"][-1]))
    return sorted(rows, key=lambda row: row[1]["step"])


def picture(path):
    """Draw run.png: loss, learning rate and live parameters over tokens, with the cuts marked. -> a
    sentence about it"""
    try:
        import matplotlib
    except ImportError:
        return "no run.png: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    run = records(path)
    config = run["config"][0]
    figure, (loss, rate, size) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1),
                                              layout="constrained")
    draw_losses(loss, run)
    loss.set_title(printable(f"{config['plan']}, {config.get('init') or config['preset']}, seed "
                             f"{config['seed']}: grey lines are cuts"))
    tokens = column(run, "step", "tokens", 1e6)
    rate.plot(tokens, column(run, "step", "lr"), color="C1")
    rate.set_ylabel("learning rate")
    size.step(tokens, column(run, "step", "params", 1e6), color="C2", where="post")
    size.set_ylabel("live parameters (M)")
    size.set_xlabel("tokens (M)")
    for axis in (loss, rate, size):
        for cut in column(run, "prune", "tokens", 1e6):
            axis.axvline(cut, color="0.8", lw=.5, zorder=0)

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    figure.savefig(folder / "run.png", dpi=120)
    plt.close(figure)
    return f"picture in {folder / 'run.png'}"


def draw_losses(axis, run):
    """The loss of training batches and of the hold-out over tokens, and the slice."""
    losses = column(run, "step", "ce")
    axis.plot(column(run, "step", "tokens", 1e6), losses, lw=.7, color="0.7", label="training batches")

    # A cut is measured at the step of an evaluation, so it comes behind that one.
    measured = sorted(run.get("eval", []) + run.get("prune", []), key=lambda record: record["tokens"])
    axis.plot([record["tokens"] / 1e6 for record in measured], [record["val_loss"] for record in measured],
              color="C0", label="hold-out (also right after each cut)")

    # The first steps may lie above the picture.
    if losses:
        losses = sorted(losses)
        top = max([losses[int(len(losses) * .9)], *column(run, "prune", "val_loss")])
        axis.set_ylim(losses[0] - .05, top + .1)

    # Plan adapt slices at every cut: the last one reaches the target.
    if run.get("slice"):
        axis.axvline(run["slice"][-1]["tokens"] / 1e6, color="C3", lw=1, label="sliced to the target size")
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


# -- several runs

def markdown(head, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def name_of_plan(config):
    """The plan as the table calls it. Runs of plan adapt differ in the number of cuts, too."""
    name = config["plan"]
    if name != "adapt":
        return name
    name += f", {config['cuts']} cut" if config["cuts"] == 1 else f", {config['cuts']} cuts"
    if config["forget_moments"]:
        name += ", moments forgotten"
    return name


def rows_of(paths):
    """The finished runs by row of the table: {(plan, peak learning rate): {seed: summary}}. Raises
    UserError if runs do not compare, if one is given twice, or if none is finished."""
    rows = {}
    first = None
    for path in paths:
        in_file = read_runs(path)
        for name, recorded in in_file.items():
            if "summary" not in recorded:
                continue
            where = path if len(in_file) == 1 else f"{name} in {path}"
            config = recorded["config"][0]
            first = first or config
            for key in SAME_IN_A_TABLE:
                if config.get(key) != first.get(key):
                    raise UserError(f"{where} has {key} {config.get(key)!r}, others "
                                    f"{first.get(key)!r}: give runs that compare")
            plan = name_of_plan(config)
            seeds = rows.setdefault((plan, config["lr"]), {})
            if config["seed"] in seeds:
                raise UserError(f"{where} is a second run of plan {plan!r}, lr {config['lr']:g}, "
                                f"seed {config['seed']}: give one of them")
            seeds[config["seed"]] = recorded["summary"][0]
    if not rows:
        raise UserError("none of these runs is finished; run the same train.py commands again to "
                        "go on")
    return rows


def table(paths, against="scratch"):
    """Finished runs, a row for each plan and learning rate, as a Markdown table, the best row
    first: final loss, tokens, FLOPs, and the difference seed by seed to the best row of plan
    `against`."""
    rows = rows_of(paths)
    losses = {}
    for row, seeds in rows.items():
        losses[row] = [end["val_loss"] for end in seeds.values()]
    ranked = sorted(rows, key=lambda row: statistics.mean(losses[row]))
    base = next((row for row in ranked if row[0] == against), None)
    if base is None and against != Report.against:
        plans = sorted({plan for plan, _ in rows})
        raise UserError(f"--against {against!r} is none of these plans: {', '.join(plans)}")

    lines = ["| plan | peak lr | seeds | parameters | tokens | FLOPs executed | FLOPs credited | "
             f"val loss (nats/token) | minus `{against}`, by seed "
             "|", "|---|---|---|---|---|---|---|---|---|"]
    for row in ranked:
        plan, rate = row
        seeds = rows[row]
        some = next(iter(seeds.values()))
        executed = statistics.mean(end["flops_executed"] for end in seeds.values())
        credited = statistics.mean(end["flops_credited"] for end in seeds.values())
        loss = f"{statistics.mean(losses[row]):.4f}"
        if len(seeds) > 1:
            loss += f" ± {(max(losses[row]) - min(losses[row])) / 2:.4f}"
        differences = ""
        if base is not None and row != base:
            differences = paired_differences(seeds, rows[base])
        lines.append(f"| `{plan}` | {rate:g} | {', '.join(map(str, sorted(seeds)))} | "
                     f"{some['params']:,} | {some['tokens']:,} | {executed:.3g} | {credited:.3g} | "
                     f"{loss} | {differences} |")
    return "\n".join(lines)


def paired_differences(seeds, base):
    """The final losses minus those of the row `base`, for the seeds that both have, as text."""
    common = sorted(seeds.keys() & base.keys())
    return ", ".join(f"{seeds[seed]['val_loss'] - base[seed]['val_loss']:+.4f}" for seed in common)


def main(config):
    if not config.runs:
        raise UserError("give the folder of a run, for example runs/idea-laptop-0, or several")
    if len(config.runs) == 1 and len(read_runs(config.runs[0])) == 1:
        refuse_idle(config, ["against"], "on one run")
        print(printable(summary(config.runs[0])))
    else:
        print(printable(table(config.runs, config.against)))


if __name__ == "__main__":
    run(lambda: main(parse(Report)))
