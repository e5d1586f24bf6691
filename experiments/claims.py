"""The papers' claims at small scale, by one command: paired runs, counted FLOPs, intervals over seeds.

    python -m experiments.claims --quick                    # a few minutes: everything once at toy size; proves nothing
    python -m experiments.claims                            # all claims on a CPU, hours; --minutes 20 is a piece of it
    python -m experiments.claims report                     # the README's part, from the committed records
    python -m experiments.claims power                      # how many seeds would see how small an effect

`--preset gpu` does the same with a target of ten million parameters, several runs side by side on one card. A run that
has its records in --results is not made again, one that was killed goes on; what the runs of a claim need, teachers and
models to cut, is made before them. Not here: what is compared (experiments/claims_runs.py), what it says (experiments/claims_report.py).
"""
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import folder
import report
import train
from common import UserError, commit, parse, read_records, refuse_idle, run, write_atomic
from eval import evaluate
from experiments import claims_report, claims_runs, sweep
from experiments.claims_runs import SCALES

BEGIN, END = "<!-- experiments/claims.py report -->", "<!-- end -->"          # around the part of the README that report writes
MOST_EVALS = 15                                                      # that are kept of a run


@dataclass(frozen=True)
class Reproduce:
    preset: str = "cpu"               # sizes, tokens, seeds (claims.SCALES): cpu, gpu
    quick: bool = False               # instead: toy size, one seed, a few minutes; it proves nothing
    claims: str | None = None         # 1,3,4 for example, in this order at each place; default: all
    seeds: int | None = None          # 0, 1, ... of every claim; default: the preset's
    minutes: float | None = None      # stop then, and save; the same command goes on
    jobs: int | None = None           # runs side by side; default: one a core, 3 on a GPU
    device: str | None = None         # cpu, cuda, mps; default: the preset's
    tokens: float = 1.0               # of every run, times the preset's; a fraction shows that it works
    data: str | None = None           # the text, as in data.py; no run reads it more than 4 times
    again: bool = False               # make runs of another code, and what requires them, anew: the old are deleted
    results: str | None = None        # file of records; default results/claims.jsonl, -gpu, runs/quick/records.jsonl
    runs: str | None = None           # where the run folders go; default runs/claims, -gpu, runs/quick


READ = "preset", "quick", "tokens", "results"                        # the flags that report and power read


def resolve(c):
    """-> the settings with their defaults filled in, and the Scale they ask for. UserError: nonsense."""
    if c.preset not in ("cpu", "gpu"):
        raise UserError(f"--preset {c.preset!r} is not one of cpu, gpu")
    if c.quick and c.preset != "cpu":
        raise UserError(f"--preset {c.preset} has no effect with --quick; leave one of them out")
    scale, on_gpu = SCALES["quick" if c.quick else c.preset], c.preset == "gpu"
    try:
        numbers = scale.claims if c.claims is None else tuple(int(word) for word in c.claims.split(","))
    except ValueError:
        numbers = (0,)
    if not {*numbers} <= {*scale.claims}:
        raise UserError(f"--claims {c.claims!r} must be numbers of {', '.join(map(str, sorted(scale.claims)))}, "
                        "separated by commas")
    scale = dataclasses.replace(
        scale, claims=numbers, data=c.data or scale.data, seeds=scale.seeds if c.seeds is None else c.seeds,
        ratios=tuple(ratio * c.tokens for ratio in scale.ratios),
        ratio=scale.ratio * c.tokens, long=scale.long * c.tokens)
    place = "claims-gpu" if on_gpu else "claims"
    c = dataclasses.replace(
        c, jobs=(3 if on_gpu else os.cpu_count() or 1) if c.jobs is None else c.jobs,
        device=c.device or ("cuda" if on_gpu else "cpu"), runs=c.runs or ("runs/quick" if c.quick else f"runs/{place}"),
        results=c.results or ("runs/quick/records.jsonl" if c.quick else f"results/{place}.jsonl"))
    for name, value in (("jobs", c.jobs), ("seeds", scale.seeds), ("minutes", c.minutes), ("tokens", c.tokens)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be positive")
    if scale.seeds > claims_runs.RECOVERY_SEED:
        raise UserError(f"--seeds {scale.seeds} must be at most {claims_runs.RECOVERY_SEED}, the first seed behind a cut")
    return c, scale


# -- one run

def keep(c, name, **about):
    """Write what the report needs of a run, about 3 kB: its config, MOST_EVALS evaluations, when its teacher was
    dropped, its summary with what is known `about` it. Paths are relative to the runs."""
    r = report.records(f"{c.runs}/{name}")
    config, last = r["config"][0], r["eval"][-1]
    every = -(-len(r["eval"]) // MOST_EVALS)
    evals = [e for i, e in enumerate(r["eval"]) if i % every == 0 and e is not last] + [last]
    kept = [{k: v for k, v in config.items() if v is not None},
            *({k: e[k] for k in ("tag", "step", "tokens", "val_loss", "params", "flops_executed")} for e in evals),
            *({k: v for k, v in t.items() if k != "file"} for t in r.get("teacher", ())),
            r.get("summary", [last])[0] | about | {
                "tag": "summary", "epochs": last["tokens"] / config["corpus_tokens"][0]}]
    text = json.dumps(kept).replace(f'"{c.runs}/', '"')
    sweep.keep_run(c.results, name, json.loads(text))


def job(c, one, settings, cut, windows):
    """Make a run; keep its records, with the loss on so many windows of the hold-out at its end. One of claim 13's
    rates that is no longer finite is kept as infinitely bad, and stops no other."""
    try:
        r = sweep.one(f"{c.runs}/{one.name}", settings, c.device, cut)
    except train.NotFinite:
        if "-lr-" not in one.kind:
            raise
        return keep(c, one.name, val_loss=math.inf, final_loss=math.inf, flops_executed=0, flops_credited=0, seconds={})
    found = evaluate(r.state.model, r.corpus.val, r.byte_lengths, windows, batch=settings["micro_batch"])
    keep(c, one.name, final_loss=found["loss"], final_windows=found["tokens"] // r.T, seconds=r.state.seconds,
         flops_executed=r.state.flops[0] + claims_runs.calibration_flops(one, cut), flops_credited=r.state.flops[1])


def is_there(c, one, runs, settings, cut):
    """Whether the records of a run are. UserError: they are of another one."""
    told = [{k: v.removeprefix(f"{c.runs}/") if isinstance(v, str) else v for k, v in some.items()
             if k not in folder.NOT_IDENTITY} for some in (settings, cut or {})]
    return sweep.finished(f"{one.name} in {c.results}", runs.get(one.name), told[0], "--results", told[1])


def gone(c, one, runs):
    """Whether a run has records, but its folder not its last checkpoint (any more, or not yet again)."""
    step = runs[one.name]["summary"][0]["step"] if one.name in runs else None
    return step is not None and not Path(c.runs, one.name, f"ckpt_{step:08d}.pt").exists()


def ready(c, scale, wanted, runs):
    """Of the runs that are wanted, and of all they require, those that are not there and can be made now -> [arguments
    of job], the longest first. A teacher, or a model to cut, that is gone is made again, or gone on with."""
    found, seen = {}, set()

    def visit(run, again=False):
        """-> whether its records are there."""
        if (run, again) in seen:
            return run.name in runs
        seen.add((run, again))
        if not all([visit(other) for other in claims_runs.measures(run)]):
            return False
        settings, cut = claims_runs.settings(run, scale, runs, c.runs)
        kept = is_there(c, run, runs, settings, cut)
        for other in run.needs():
            if kept and other.name not in runs:
                raise UserError(f"{c.results} holds {run.name}, but not {other.name}, from which it came; remove both")
        if kept and not again:
            return True
        lost = [gone(c, other, runs) for other in run.needs()]
        there = [visit(other, again=none) for other, none in zip(run.needs(), lost)]
        if all(there) and not any(lost):
            found[run] = c, run, settings, cut, scale.final_windows
        return run.name in runs

    for one in wanted:
        visit(one)
    return [found[one] for one in sorted(found, key=lambda one: -claims_runs.expected(one, scale)[1]["flops_executed"])]


# -- all runs

class Clock:
    """How long what is missing will take: its FLOPs by the FLOPs per second of the runs that ended in this session, or
    before, of those whose records are there."""
    def __init__(self, c, missing, runs):
        self.c, self.left, self.jobs = c, dict(missing), c.jobs
        self.here, self.before = [], [r["summary"][0] for r in runs.values()]

    def told(self, arguments):
        """After the run with these arguments."""
        self.left.pop(arguments[1].name, None)
        self.here += report.read_runs(self.c.results)[arguments[1].name]["summary"]
        return str(self)

    def __str__(self):
        known, left = self.here or self.before, sum(self.left.values())
        flops, seconds = sum(s["flops_executed"] for s in known), sum(sum(s["seconds"].values()) for s in known)
        time_left = f", about {left * seconds / flops / self.jobs / 60:.0f} min" if flops else ""
        return f"{left:.3g} FLOPs left{time_left}"


def forget_another_code(c, everything):
    """--again: delete what is there, records and folders, of those of these runs that another code made or began, and
    of all that require one of them. everything: what is required first."""
    old, deleted, here = set(), set(), commit()
    runs = claims_report.read(c.results)
    for one in everything:
        own = Path(c.runs, one.name)
        folders = [path for path in (own, Path(c.runs, f"from-{one.name}")) if path.exists()]
        known = one.name in runs or bool(folders)
        first = runs[one.name]["config"] if one.name in runs else read_records(own / "metrics.jsonl")
        record = next(iter(first), {})
        if known and record.get("code") != here or not old.isdisjoint(claims_runs.requires(one)):
            old.add(one)
            if known:
                deleted.add(one.name)
            for path in folders:
                shutil.rmtree(path)
    sweep.forget_runs(c.results, deleted)
    print(f"{len(deleted)} runs are of another code, or require one that is, and are made again")


def run_all(c):
    """Make what is missing, claim by claim and place by place."""
    c, scale = resolve(c)
    until = None if c.minutes is None else time.time() + 60 * c.minutes
    wanted = claims_runs.in_order(scale, scale.seeds)
    everything = claims_runs.everything([run for _, runs in wanted for run in runs])
    fingerprint = claims_runs.corpus_of(everything, scale)
    if c.again:
        forget_another_code(c, everything)
    runs = claims_report.read(c.results)
    for theirs in {r["config"][0]["fingerprint"] for r in runs.values()} - {fingerprint}:
        raise UserError(f"{c.results} holds runs of another text (fingerprint {theirs}) than {scale.data} is here "
                        f"({fingerprint}); give another --results and --runs")
    missing = {run.name: claims_runs.expected(run, scale)[1]["flops_executed"] for run in everything if run.name not in runs}
    clock = Clock(c, missing, runs)
    print(f"{len(missing)} of {len(everything)} runs are missing: {clock}")
    for number, compared in wanted:
        while todo := ready(c, scale, compared, runs):
            print(f"claim {number}: {len(todo)} runs", flush=True)
            done = sweep.side_by_side(job, todo, c.jobs, until, clock.told)
            runs = claims_report.read(c.results)
            if done < len(todo):
                left = sum(run.name not in runs for run in everything)
                return print(f"{left} runs are left; the same command goes on")
    if not c.quick:
        return print(f"all runs are there; python -m experiments.claims report says what {c.results} holds")
    print_report(c, scale, runs)
    print("\nOne seed proves nothing: seeds differ by as much as plans do. python -m experiments.claims runs several.")


# -- the report

def page_of(c, name):
    """The path of a page beside the records: of results/claims.jsonl it is in results/claims."""
    return Path(c.results).with_suffix("") / name


def print_report(c, scale, runs):
    """Print the tables, draw the figure -> the text."""
    figure = page_of(c, "figure.png")
    drawn = claims_report.picture(runs, scale, figure)
    text = claims_report.text(runs, scale, figure if drawn else None)
    print(text)
    return text


def replaced(page, text):
    """A page with `text` between the markers instead of what stood there; None where it has no markers."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}" if found and closed else None


def refuse_strangers(c, scale, runs):
    """UserError where a record is of no run of the plan, or has another learning rate than the plan: a table would show
    it beside the others as if it had not."""
    seeds = 1 + max((int(name.rpartition("-s")[2]) for name in runs), default=0)
    planned = claims_runs.everything([run for _, compared in claims_runs.in_order(scale, seeds) for run in compared])
    wanted = {run.name: run for run in planned}
    for name, r in runs.items():
        if name not in wanted:
            raise UserError(f"{name} in {c.results} is no run of this plan; move its records elsewhere")
        there, here = r["config"][0]["lr"], claims_runs.rate(wanted[name])
        if there != here:
            raise UserError(f"{name} in {c.results} has a learning rate of {there:g}, the plan one of {here:g}; "
                            "remove its records")


def main_report(c):
    """Print it, write the details beside the records; of preset cpu, with all of its tokens, write it into the README
    here, between its markers."""
    c, scale = resolve(c)
    runs = claims_report.read(c.results)
    refuse_strangers(c, scale, runs)
    text, page = print_report(c, scale, runs), Path("README.md")
    if runs and c.tokens == 1:
        write_atomic(page_of(c, "report.md"), lambda file: file.write(f"{claims_report.details(runs, scale)}\n".encode()))
    if c.quick or c.preset != "cpu" or c.tokens != 1 or not page.exists():
        return
    new = replaced(page.read_text(), text)
    if new is None:
        return print(f"{page} was left as it is: it has no {BEGIN} … {END}", file=sys.stderr)
    write_atomic(page, lambda file: file.write(new.encode()))
    print(f"written into {page}", file=sys.stderr)


def main_power(c):
    c, scale = resolve(c)
    found = claims_report.power(claims_report.read(c.results), scale)
    if not found:
        raise UserError("no pair has two seeds yet; python -m experiments.claims --claims 1 --seeds 3 makes some")
    print(found)


COMMANDS = {"run": run_all, "report": main_report, "power": main_power}


def main(argv):
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    c = parse(Reproduce, rest)
    refuse_idle(c, [f.name for f in dataclasses.fields(c) if name != "run" and f.name not in READ], f"in {name}")
    COMMANDS[name](c)


if __name__ == "__main__":
    run(main, sys.argv[1:])
