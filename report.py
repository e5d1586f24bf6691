"""What runs recorded, as a table and a picture. Reads metrics.jsonl only (train.py lists its records).

    python report.py runs/idea-laptop-0            # one run: sizes, losses, FLOPs, samples; draws run.png beside it
    python report.py runs/*-laptop-*              # several: mean ± spread by plan, and paired differences by seed
    python report.py results/smollm2.jsonl        # the same for a file of several runs, whose records name their run

"±" is half the distance between the largest and the smallest seed: with few seeds it says more than a standard error.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import UserError, parse, read_records, refuse_idle, run


@dataclass(frozen=True)
class Report:
    runs: tuple[str, ...]     # folders of runs, metrics.jsonl files, or files of several runs
    against: str = "scratch"  # the plan that paired differences are taken to, where it is among the runs


def read_runs(path):
    """Read a run folder, its metrics.jsonl, or a file of several runs, whose records name their run.

    Returns {name of the run: {tag: [records]}}, sorted by name. Raises UserError if there is no run."""
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
    """Read the records of one run: {tag: [records]}. Raises UserError if `path` holds no run, or several."""
    runs = read_runs(path)
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs; give a run folder or its metrics.jsonl")
    return runs.popitem()[1]


def finished(path, remedy=""):
    """Read the finished runs of an experiment's file: {name: {tag: [records]}}, or {} if there is no such file.

    Raises UserError if the runs do not compare: they read different texts, or differ in a setting that all share."""
    if not Path(path).exists():
        return {}
    runs = read_runs(path)
    for key in ("fingerprint", "tokenizer", "block_size", "batch_tokens", "micro_batch", "eval_windows", "dtype"):
        values = {run["config"][0].get(key) for run in runs.values()}
        if len(values) > 1:
            raise UserError(f"the runs in {path} do not compare: {key} is one of {', '.join(map(str, values))}{remedy}")
    return {name: run for name, run in runs.items() if "summary" in run}


def summary(path):
    """One finished run in a few lines; draws run.png. -> text"""
    r = records(path)
    if "summary" not in r:
        raise UserError(f"{path} is not finished; run the same train.py command again to go on")
    s = r["summary"][0]
    lines = [f"{s['plan']} / {s['preset']} / seed {s['seed']}: {s['params']:,} parameters, {s['tokens']:,} tokens "
             f"({s['tokens'] / s['params']:.0f} per parameter, {s['epochs']:.2f} epochs), "
             f"{s['flops_executed']:.3g} FLOPs executed, {s['flops_credited']:.3g} credited",
             "",
             "                        step     parameters   val loss (nats/token)   bits per byte"]
    moments = [(e, e["stage"] + (" begins" if e["step"] < s["step"] else " ends")) for i, e in enumerate(r["eval"])
               if e["step"] == s["step"] or i == 0 or e["stage"] != r["eval"][i - 1]["stage"]]
    moments += [(p, "after the last cut") for p in r.get("prune", [])[-1:]]
    for e, what in sorted(moments, key=lambda m: m[0]["step"]):
        lines.append(f"  {what:20} {e['step']:6}   {e['params']:12,}   {e['val_loss']:21.4f}   "
                     f"{e['bits_per_byte']:13.4f}")
    seconds = "   ".join(f"{part} {value:.1f}" for part, value in s["seconds"].items())
    lines += ["", f"seconds: {seconds};  score + cut + slice = {100 * s['pruning_share']:.2f} % of the run",
              f"peak memory {s['peak_bytes'] / 2**30:.2f} GiB; {picture(path)}", ""]
    for e in r.get("sample", []):
        lines += [f"-- {e['when']} (step {e['step']}): {e['prompt'][-40:]!r} goes on", e["text"], ""]
    return "\n".join(lines)


def picture(path):
    """Loss, learning rate and live parameters over tokens, with the cuts marked -> what was done, as a sentence."""
    try:
        import matplotlib
    except ImportError:
        return "no run.png: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    r, out = records(path), (Path(path) if Path(path).is_dir() else Path(path).parent) / "run.png"
    figure, (loss, rate, size) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1),
                                              layout="constrained")
    millions = lambda tag: [e["tokens"] / 1e6 for e in r.get(tag, [])]
    value = lambda tag, key: [e[key] for e in r.get(tag, [])]
    held_out = sorted(((e["tokens"] / 1e6, e["val_loss"]) for tag in ("eval", "prune") for e in r.get(tag, [])),
                      key=lambda point: point[0])                                           # a cut comes after its eval
    loss.plot(millions("step"), value("step", "ce"), lw=.7, color="0.7", label="training batches")
    loss.plot(*zip(*held_out), color="C0", label="hold-out (also right after each cut)")
    losses = sorted(value("step", "ce"))
    if losses:
        top = max([losses[int(len(losses) * .9)], *value("prune", "val_loss")])             # the first steps may leave
        loss.set_ylim(losses[0] - .05, top + .1)
    for e in r.get("slice", [])[-1:]:                                                       # adapt slices at every cut
        loss.axvline(e["tokens"] / 1e6, color="C3", lw=1, label="sliced to the target size")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(millions("step"), value("step", "lr"), color="C1")
    rate.set_ylabel("learning rate")
    size.step(millions("step"), [p / 1e6 for p in value("step", "params")], color="C2", where="post")
    size.set_ylabel("live parameters (M)")
    size.set_xlabel("tokens (M)")
    for axis in (loss, rate, size):
        for t in millions("prune"):
            axis.axvline(t, color="0.8", lw=.5, zorder=0)
    c = r["config"][0]
    loss.set_title(f"{c['plan']}, {c.get('init') or c['preset']}, seed {c['seed']}: grey lines are cuts")
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return f"picture in {out}"


def markdown(head, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def table(paths, against="scratch"):
    """Finished runs, grouped by plan and learning rate -> Markdown table: final loss, tokens, FLOPs, and the difference
    by seed to the best row of plan `against`."""
    rows, common = {}, None
    runs = []
    for path in paths:
        in_file = read_runs(path)
        for name, run in in_file.items():
            runs.append((path if len(in_file) == 1 else f"{name} in {path}", run))
    for path, r in runs:
        if "summary" in r:
            c = r["config"][0]
            common = common or c
            for key in ("preset", "init", "block_size", "tokenizer", "steps", "batch_tokens", "fingerprint", "dtype",
                        "eval_windows"):
                if c.get(key) != common.get(key):
                    raise UserError(f"{path} has {key} {c.get(key)!r}, others {common.get(key)!r}: give runs that "
                                    "compare")
            plan = c["plan"] if c["plan"] != "adapt" else f"adapt, {c['cuts']} cut{'s' * (c['cuts'] > 1)}" \
                + ", moments forgotten" * c["forget_moments"]
            if c["seed"] in rows.setdefault((plan, c["lr"]), {}):
                raise UserError(f"{path} is a second run of plan {plan!r}, lr {c['lr']:g}, seed {c['seed']}: "
                                "give one of them")
            rows[plan, c["lr"]][c["seed"]] = r["summary"][0]
    if not rows:
        raise UserError("none of these runs is finished; run the same train.py commands again to go on")

    def losses(row):
        return [s["val_loss"] for s in rows[row].values()]

    ranked = sorted(rows, key=lambda row: statistics.mean(losses(row)))
    base = next((row for row in ranked if row[0] == against), None)
    if not base and against != Report.against:
        raise UserError(f"--against {against!r} is none of these plans: {', '.join(sorted({row[0] for row in rows}))}")
    lines = ["| plan | peak lr | seeds | parameters | tokens | FLOPs executed | FLOPs credited | val loss "
             f"(nats/token) | minus `{against}`, by seed |", "|---|---|---|---|---|---|---|---|---|"]
    for row in ranked:
        seeds, first = rows[row], next(iter(rows[row].values()))
        executed, credited = (statistics.mean(s[key] for s in seeds.values())
                              for key in ("flops_executed", "flops_credited"))
        paired = ", ".join(f"{seeds[k]['val_loss'] - rows[base][k]['val_loss']:+.4f}"
                           for k in sorted(seeds) if base and row != base and k in rows[base])
        spread = f" ± {(max(losses(row)) - min(losses(row))) / 2:.4f}" if len(seeds) > 1 else ""
        lines.append(f"| `{row[0]}` | {row[1]:g} | {', '.join(map(str, sorted(seeds)))} | {first['params']:,} | "
                     f"{first['tokens']:,} | {executed:.3g} | {credited:.3g} | "
                     f"{statistics.mean(losses(row)):.4f}{spread} | {paired} |")
    return "\n".join(lines)


def main(config):
    if len(config.runs) == 1 and len(read_runs(config.runs[0])) == 1:
        refuse_idle(config, ["against"], "on one run")
        print(summary(config.runs[0]))
    else:
        print(table(config.runs, config.against))


if __name__ == "__main__":
    run(lambda: main(parse(Report)))
