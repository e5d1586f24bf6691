"""The papers' claims at small scale: paired runs, counted FLOPs, intervals over seeds.

    python -m experiments.claims --quick       # a few minutes: everything at toy size; proves nothing
    python -m experiments.claims               # all claims on a CPU, hours; --minutes 20 makes a piece
    python -m experiments.claims report        # the tables of docs/claims.md from the committed records
    python -m experiments.claims power         # how many seeds would see how small an effect

`--preset gpu` does the same with a target of ten million parameters and runs several runs side by
side on one card. A run whose records exist is not made again, and one that was killed goes on. The
teachers and the models to cut that a claim's runs need are made first. Not here: what is compared
(experiments/claims_runs.py), what it says (experiments/claims_report.py).
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
from typing import Literal

import checkpoint
import common
import report
import train
from common import (
    UserError,
    check_choices,
    check_positive,
    commit,
    parse,
    pick_device,
    printable,
    read_records,
    write_atomic,
)
from eval import evaluate
from experiments import claims_report, claims_runs, claims_statistics, sweep
from experiments.claims_runs import SCALES

# The part of the page that `report` writes stands between these lines.
PAGE = Path("docs/claims.md")
BEGIN = "<!-- experiments/claims.py report -->"
END = "<!-- end -->"
MAX_EVALS = 15             # of a run are kept


@dataclass(frozen=True)
class Report:
    preset: Literal["cpu", "gpu"] = "cpu"    # sizes, tokens and seeds (claims_runs.SCALES)
    quick: bool = False               # instead: toy size and one seed; it proves nothing
    tokens: float = 1.0               # of every run, times the preset's; a fraction is a trial
    results: str | None = None        # file of records; default: results/claims.jsonl, -gpu.jsonl


@dataclass(frozen=True)
class RunAll(Report):
    claims: str | None = None         # numbers, as in 1,3,4, in the order of work; default: all
    seeds: int | None = None          # of every claim, from 0 on; default: the preset's
    minutes: float | None = None      # stop then, and save; the same command goes on
    jobs: int | None = None           # runs side by side; default: one a core, 3 on a GPU
    device: str | None = None         # cpu, cuda, mps; default: the preset's
    data: str | None = None           # the text, as in data.py; no run reads it more than 4 times
    again: bool = False               # make the runs of another code, and what requires them, anew
    runs: str | None = None           # folder of run folders; default: runs/claims, -gpu, runs/quick


def select(config):
    """The settings with the file of records filled in, and the Scale that they choose. Raises
    UserError for settings that mean nothing."""
    check_choices(config)
    if config.quick and config.preset != "cpu":
        raise UserError(f"--preset {config.preset} has no effect with --quick; leave one of them out")
    check_positive(config, ["tokens"])
    scale = SCALES["quick" if config.quick else config.preset]
    scale = dataclasses.replace(scale, ratio=scale.ratio * config.tokens,
                                long=scale.long * config.tokens,
                                ratios=tuple(ratio * config.tokens for ratio in scale.ratios))
    if config.results is None:
        results = "runs/quick/records.jsonl" if config.quick else f"results/{name_of(config)}.jsonl"
        config = dataclasses.replace(config, results=results)
    return config, scale


def resolve(config):
    """`select` for RunAll, with all of its defaults filled in."""
    config, scale = select(config)
    check_positive(config, ("jobs", "seeds", "minutes"))
    chosen = {}
    if config.claims is not None:
        chosen["claims"] = numbers_of(config.claims, scale)
    if config.data is not None:
        chosen["data"] = config.data
    if config.seeds is not None:
        chosen["seeds"] = config.seeds
    scale = dataclasses.replace(scale, **chosen)
    limit = claims_runs.RECOVERY_SEED
    if scale.seeds > limit:
        raise UserError(f"--seeds {scale.seeds} must be at most {limit}, the first seed behind a cut")

    on_gpu = config.preset == "gpu"
    filled = {}
    if config.jobs is None:
        filled["jobs"] = 3 if on_gpu else os.cpu_count() or 1
    if config.device is None:
        filled["device"] = "cuda" if on_gpu else "cpu"
    if config.runs is None:
        filled["runs"] = "runs/quick" if config.quick else f"runs/{name_of(config)}"
    pick_device(filled.get("device", config.device))     # not first inside a run
    return dataclasses.replace(config, **filled), scale


def name_of(config):
    return "claims-gpu" if config.preset == "gpu" else "claims"


def numbers_of(text, scale):
    """The claims of "1,3,4". Raises UserError if one of them is not a claim of the scale."""
    words = text.split(",")
    known = [str(number) for number in sorted(scale.claims + scale.on_request)]
    if not set(words) <= set(known):
        raise UserError(f"--claims {text!r} must be numbers of {', '.join(known)}, separated by "
                        "commas")
    return tuple(int(word) for word in words)


# -- one run

def job(config, run, settings, recipe, windows):
    """Make a run and keep its records, with the loss on `windows` windows of the hold-out at its
    end."""
    before = beginning(run, recipe)
    try:
        setup, state = sweep.run_plan(f"{config.runs}/{run.name}", settings, config.device, **before)
    except train.NotFinite:
        if "-lr-" not in run.kind:
            raise
        # A rate of claim 13 at which training diverges is infinitely bad. It must not stop the
        # other runs.
        keep_records(config, run.name, val_loss=math.inf, final_loss=math.inf, flops_executed=0,
                     flops_credited=0, seconds={})
        return
    final = evaluate(state.model, setup.corpus.val, setup.byte_lengths, windows,
                     batch=settings["micro_batch"])
    # train.py's records hold the cut that made the model, but no growth.
    growth = {name: value for name, value in before.items() if name == "growth"}
    keep_records(config, run.name, final_loss=final["loss"],
                 final_windows=final["tokens"] // setup.block_size,
                 flops_executed=state.flops["executed"] + claims_runs.calibration_flops(run, recipe),
                 flops_credited=state.flops["credited"], seconds=state.seconds, **growth)


def beginning(run, recipe):
    """What is made before a run, by the name that sweep.py has for it: {"cut", "growth" or "masks":
    settings}."""
    kind = claims_runs.KINDS[run.kind]
    if kind.grow:
        return {"growth": recipe}
    return {"masks" if kind.shear else "cut": recipe}


def keep_records(config, name, **about):
    """Keep what the report needs of a run, about 3 kB: its config, at most MAX_EVALS evaluations,
    when its teacher was dropped, and its summary together with `about`. Paths become relative to
    the folder of runs."""
    run = report.records(f"{config.runs}/{name}")
    settings = {key: value for key, value in run["config"][0].items() if value is not None}
    last = run["eval"][-1]
    kept = [settings]

    every = math.ceil(len(run["eval"]) / MAX_EVALS)
    fields = ("tag", "step", "tokens", "val_loss", "params", "flops_executed")
    for evaluation in [*run["eval"][:-1][::every], last]:
        kept.append({key: evaluation[key] for key in fields})
    for teacher in run.get("teacher", ()):
        kept.append({key: value for key, value in teacher.items() if key != "file"})
    # A run of one stage, or one that diverged, has no summary of its own.
    summary = run.get("summary", [last])[0]
    kept.append({**summary, **about, "tag": "summary",
                 "epochs": last["tokens"] / settings["corpus_tokens"][0]})
    relative = json.dumps(kept).replace(f'"{config.runs}/', '"')
    sweep.put_runs(config.results, {name: json.loads(relative)})


def is_recorded(config, run, runs, settings, recipe):
    """Whether the records of a run exist. Raises UserError if they are of another run with the same
    name."""
    def as_recorded(settings):
        recorded = {}
        for key, value in settings.items():
            if isinstance(value, str):
                value = value.removeprefix(f"{config.runs}/")
            if key not in checkpoint.NOT_IDENTITY:
                recorded[key] = value
        return recorded

    return sweep.is_finished(f"{run.name} in {config.results}", runs.get(run.name),
                             as_recorded(settings), "--results", **beginning(run, as_recorded(recipe or {})))


def is_lost(config, run, runs):
    """Whether the records of a run exist, but its final checkpoint does not: it was deleted, or is
    being made again."""
    if run.name not in runs:
        return False
    step = runs[run.name]["summary"][0]["step"]
    return not Path(config.runs, run.name, f"ckpt_{step:08d}.pt").exists()


class Jobs:
    """The runs that can be made now, as {run: arguments of `job`}."""
    def __init__(self, config, scale, recorded):
        self.config = config
        self.scale = scale
        self.recorded = recorded             # {name: {tag: [records]}}
        self.ready = {}
        self.visited = set()

    def without_records(self, runs):
        return [run for run in runs if run.name not in self.recorded]

    def add(self, run, again=False):
        """Add a run, or instead what it still waits for. A run with records is left out, unless it
        is to be made `again`, because a run that needs its checkpoint does not find it."""
        if (run, again) in self.visited:
            return
        self.visited.add((run, again))
        measures = claims_runs.measures(run)
        for other in measures:
            self.add(other)
        if self.without_records(measures):
            return
        settings, recipe = claims_runs.settings_of(run, self.scale, self.recorded, self.config.runs)
        if is_recorded(self.config, run, self.recorded, settings, recipe):
            for other in self.without_records(run.needs()):
                raise UserError(f"{self.config.results} holds {run.name}, but not {other.name}, "
                                "from which it came; remove both")
            if not again:
                return
        lost = [other for other in run.needs() if is_lost(self.config, other, self.recorded)]
        for other in run.needs():
            self.add(other, again=other in lost)
        if not lost and not self.without_records(run.needs()):
            self.ready[run] = self.config, run, settings, recipe, self.scale.final_windows

    def longest_first(self):
        flops = {run: claims_runs.expected(run, self.scale)[1]["flops_executed"] for run in self.ready}
        return [self.ready[run] for run in sorted(self.ready, key=flops.get, reverse=True)]


def ready(config, scale, wanted, recorded):
    """What can be made now of the wanted runs and of all that they require: arguments of `job`, the
    longest run first."""
    jobs = Jobs(config, scale, recorded)
    for run in wanted:
        jobs.add(run)
    return jobs.longest_first()


# -- all runs

class Progress:
    """The FLOPs that are left, and how long they take at the rate of the runs that ended in this
    session. Before the first one has ended it is the rate of the runs whose records exist."""
    def __init__(self, config, missing, runs):
        self.config = config
        self.missing = dict(missing)             # {name: expected FLOPs}
        self.recorded = [run["summary"][0] for run in runs.values()]
        self.ended = []

    def after(self, arguments):
        """The text for the progress bar after the run with these arguments has ended."""
        name = arguments[1].name
        self.missing.pop(name, None)
        self.ended += report.read_runs(self.config.results)[name]["summary"]
        return str(self)

    def __str__(self):
        left = sum(self.missing.values())
        known = self.ended or self.recorded
        flops = sum(summary["flops_executed"] for summary in known)
        seconds = sum(sum(summary["seconds"].values()) for summary in known)
        text = f"{left:.3g} FLOPs left"
        if flops:
            text += f", about {left * seconds / flops / self.config.jobs / 60:.0f} min"
        return text


def forget_another_code(config, everything):
    """--again: delete the records and folders of the runs that another code made or began, and of
    all runs that require one of them. `everything`: the runs in an order in which what is required
    comes first."""
    runs = claims_statistics.read(config.results)
    forgotten = set()
    existing = 0
    deleted = {}
    for run in everything:
        folders = [Path(config.runs, name) for name in (run.name, f"from-{run.name}")]
        records = read_records(folders[0] / "metrics.jsonl")
        if run.name in runs:
            records = runs[run.name]["config"]
        exists = bool(records) or any(folder.exists() for folder in folders)
        another_code = exists and (not records or records[0].get("code") != commit())
        if another_code or not forgotten.isdisjoint(claims_runs.requires(run)):
            forgotten.add(run)
            deleted[run.name] = ()
            existing += exists
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
    sweep.put_runs(config.results, deleted)
    print(f"{existing} runs are of another code, or require one that is, and are made again")


def run_all(config):
    """Make what is missing, claim by claim and place by place."""
    config, scale = resolve(config)
    until = None
    if config.minutes is not None:
        until = time.time() + 60 * config.minutes
    everything = claims_runs.all_runs(scale, scale.seeds)
    fingerprint = claims_runs.fingerprint_of(everything, scale)
    if config.again:
        forget_another_code(config, everything)
    runs = claims_statistics.read(config.results)
    refuse_another_text(config, scale, runs, fingerprint)

    missing = {}
    for run in everything:
        if run.name not in runs:
            missing[run.name] = claims_runs.expected(run, scale)[1]["flops_executed"]
    progress = Progress(config, missing, runs)
    print(f"{len(missing)} of {len(everything)} runs are missing: {progress}")
    for number, group in claims_runs.in_order(scale, scale.seeds):
        while jobs := ready(config, scale, group, runs):
            print(f"claim {number}: {len(jobs)} runs", flush=True)
            done = sweep.side_by_side(job, jobs, config.jobs, until, progress.after)
            runs = claims_statistics.read(config.results)
            if done < len(jobs):
                left = sum(run.name not in runs for run in everything)
                print(f"{left} runs are left; the same command goes on")
                return
    if config.quick:
        print_report(config, scale, runs)
        print("\nOne seed proves nothing: seeds differ by as much as plans do. python -m "
              "experiments.claims runs several.")
    else:
        print("all runs are finished; python -m experiments.claims report says what "
              f"{config.results} holds")


def refuse_another_text(config, scale, runs, fingerprint):
    """Raise UserError if a run has read another text than this one is."""
    for run in runs.values():
        recorded = run["config"][0]["fingerprint"]
        if recorded != fingerprint:
            raise UserError(f"{config.results} holds runs of another text (fingerprint {recorded}) "
                            f"than {scale.data} is here ({fingerprint}); give another --results "
                            "and --runs")


# -- the report

def page_of(config, name):
    """The path of a page beside the records: those of results/claims.jsonl are in
    results/claims."""
    return Path(config.results).with_suffix("") / name


def print_report(config, scale, runs):
    """Draw the figure and print the tables. Returns the figure's path, or None if there is nothing
    to draw."""
    figure = page_of(config, "figure.png")
    if not claims_report.picture(runs, scale, figure):
        figure = None
    print(printable(claims_report.text(runs, scale, figure)))
    return figure


def replaced(page, text):
    """A page with `text` between the markers in place of what stood there, or None if it has no
    markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def refuse_strangers(config, scale, runs):
    """Raise UserError if a recorded run does not belong to the plan, or has another learning rate
    than the plan. A table would show it beside the others as if it did."""
    seeds = 1 + max((claims_statistics.seed_of(name) for name in runs), default=0)
    whole = dataclasses.replace(scale, claims=scale.claims + scale.on_request)
    planned = {run.name: run for run in claims_runs.all_runs(whole, seeds)}
    for name, recorded in runs.items():
        if name not in planned:
            raise UserError(f"{name} in {config.results} is no run of this plan; move its records "
                            "elsewhere")
        lr = recorded["config"][0]["lr"]
        peak = claims_runs.peak_rate(planned[name])
        if lr != peak:
            raise UserError(f"{name} in {config.results} has a learning rate of {lr:g}, the plan "
                            f"one of {peak:g}; remove its records")


def select_existing(config):
    """`select` for a command that only reads the records. Raises UserError if --results names no
    file."""
    if config.results is not None and not Path(config.results).exists():
        raise UserError(f"there is no file {config.results}; correct --results, or leave it out")
    return select(config)


def main_report(config):
    """Print the report and write the details beside the records. The report of preset cpu with all
    of its tokens also goes into PAGE, between its markers."""
    config, scale = select_existing(config)
    runs = claims_statistics.read(config.results)
    refuse_strangers(config, scale, runs)
    figure = print_report(config, scale, runs)
    if runs and config.tokens == 1:
        details = claims_report.details(runs, scale)
        write_atomic(page_of(config, "report.md"), lambda file: file.write(f"{details}\n".encode()))
    if config.quick or config.preset != "cpu" or config.tokens != 1 or not PAGE.exists():
        return
    link = figure and os.path.relpath(figure, PAGE.parent)
    page = replaced(PAGE.read_text(), claims_report.text(runs, scale, link))
    if page is None:
        print(f"{PAGE} was left as it is: it has no {BEGIN} … {END}", file=sys.stderr)
        return
    write_atomic(PAGE, lambda file: file.write(page.encode()))
    print(f"written into {PAGE}", file=sys.stderr)


def main_power(config):
    config, scale = select_existing(config)
    table = claims_report.power(claims_statistics.read(config.results), scale)
    if not table:
        raise UserError("no pair has two seeds yet; python -m experiments.claims --claims 1 "
                        "--seeds 3 makes some")
    print(printable(table))


COMMANDS = {"run": (RunAll, run_all), "report": (Report, main_report), "power": (Report, main_power)}


def main(argv):
    command = "run"
    if argv and argv[0] in COMMANDS:
        command, *argv = argv
    settings, function = COMMANDS[command]
    function(parse(settings, argv))


if __name__ == "__main__":
    common.run(main, sys.argv[1:])
