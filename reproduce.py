"""The papers' claims at small scale, by one command: paired runs, tuned rates, counted FLOPs, intervals over seeds.

    python reproduce.py --quick                    # a few minutes: everything once at toy size; proves nothing
    python reproduce.py                            # all claims on a CPU, hours; --minutes 20 is a piece of it
    python reproduce.py report                     # the README's part, from the committed records
    python reproduce.py power                      # how many seeds would see how small an effect

`--preset gpu` does the same with tens of millions of parameters, several runs side by side on one card. A run that has
its records in --results is not made again, one that was killed goes on; whatever the claims need of one another, the
learning rates tuned once for each plan first, is made before them. Not here: what is compared (claims.py), what it says
(evidence.py).
"""
import dataclasses
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import claims
import evidence
import folder
import report
import sweep
from claims import CLAIMS, SCALES
from common import UserError, parse, run, write_atomic

BEGIN, END = "<!-- reproduce.py report -->", "<!-- end -->"          # around the part of the README that report writes
MOST_EVALS = 15                                                      # that are kept of a run


@dataclass(frozen=True)
class Reproduce:
    preset: str = "cpu"               # sizes, tokens, seeds (claims.SCALES): cpu, gpu
    quick: bool = False               # instead: toy size, one seed, a few minutes; it proves nothing
    claims: str | None = None         # 1,3,4 for example, in this order; default: the preset's order of all
    seeds: int | None = None          # 0, 1, ... of every claim; default: the preset's
    minutes: float | None = None      # stop then, and save; the same command goes on
    jobs: int | None = None           # runs side by side; default: one a core, 3 on a GPU
    device: str | None = None         # cpu, cuda, mps; default: the preset's
    small: str | None = None          # the size (model.PRESETS) of all claims; default: the preset's, as all below
    middle: str | None = None         # the size of claim 5 besides, and of the tuning
    ratio: float | None = None        # tokens per parameter of the target, at the small size
    long: float | None = None         # the same for claim 9
    ratios: tuple[float, ...] = ()    # the same for claim 5 at the middle size
    tuning: float | None = None       # the same for the runs that choose a learning rate
    rates: tuple[float, ...] = ()     # the learning rates that are tried
    batch_tokens: int | None = None   # per step
    micro_batch: int | None = None    # sequences per forward pass
    eval_windows: int | None = None   # of the hold-out
    data: str | None = None           # the text, as in data.py; no run reads it more than 4 times
    again: bool = False               # make runs of another code anew: their records and folders are deleted
    results: str | None = None        # records, a file each run; default results/claims, -gpu, runs/quick/records
    runs: str | None = None           # where the run folders go; default runs/claims, -gpu, runs/quick
    readme: str = "README.md"         # report writes into it, between its markers (preset cpu)


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
    given = {f.name: getattr(c, f.name) for f in dataclasses.fields(scale) if f.name not in ("claims", "only")}
    scale = dataclasses.replace(scale, claims=numbers, **{k: v for k, v in given.items() if v not in (None, ())})
    place = "claims-gpu" if on_gpu else "claims"
    c = dataclasses.replace(
        c, jobs=(3 if on_gpu else os.cpu_count() or 1) if c.jobs is None else c.jobs,
        device=c.device or ("cuda" if on_gpu else "cpu"), runs=c.runs or ("runs/quick" if c.quick else f"runs/{place}"),
        results=c.results or ("runs/quick/records" if c.quick else f"results/{place}"))
    for name, value in (("jobs", c.jobs), ("seeds", scale.seeds), ("minutes", c.minutes), ("ratio", scale.ratio),
                        ("long", scale.long), ("tuning", scale.tuning), ("ratios", min(scale.ratios)),
                        ("rates", min(scale.rates, default=1)), ("batch-tokens", scale.batch_tokens)):
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value} must be positive")
    if scale.seeds > claims.TUNING_SEED:
        raise UserError(f"--seeds {scale.seeds} must be at most {claims.TUNING_SEED}, the seed of the tuning")
    return c, scale


# -- one run

def keep(c, name):
    """Write what the report needs of a finished run, about 3 kB: its config, MOST_EVALS evaluations, when its teacher
    was dropped, its summary; one that ends with a stage gets its summary here. Paths are relative to the runs."""
    path = f"{c.runs}/{name}"
    r = report.records(path)
    config, last = r["config"][0], r["eval"][-1]
    if "summary" not in r:
        state = checkpoint.load(path, "meta")[1]
        r["summary"] = [{k: last[k] for k in ("step", "tokens", "val_loss", "bits_per_byte", "params")} | dict(
            tag="summary", flops_executed=state["flops"][0], flops_credited=state["flops"][1],
            epochs=last["tokens"] / config["corpus_tokens"][0], seconds=state["seconds"])]
    every = -(-len(r["eval"]) // MOST_EVALS)
    evals = [e for i, e in enumerate(r["eval"]) if i % every == 0 and e is not last] + [last]
    kept = [{k: v for k, v in config.items() if v is not None},
            *({k: e[k] for k in ("tag", "step", "tokens", "val_loss", "params", "flops_executed")} for e in evals),
            *({k: v for k, v in t.items() if k != "file"} for t in r.get("teacher", ())), *r["summary"]]
    text = "".join(json.dumps(record) + "\n" for record in kept).replace(f'"{c.runs}/', '"')
    write_atomic(f"{c.results}/{name}.jsonl", lambda file: file.write(text.encode()))


def job(c, name, settings, cut):
    sweep.one(f"{c.runs}/{name}", settings, c.device, cut)
    keep(c, name)


def is_there(c, run, settings):
    """Whether the records of a run are. UserError: they are of another one."""
    told = {k: v.removeprefix(f"{c.runs}/") if isinstance(v, str) else v for k, v in settings.items()
            if k not in folder.NOT_IDENTITY}
    return sweep.finished(f"{c.results}/{run.name}.jsonl", told, "--results")


def ready(c, scale, wanted, runs):
    """Of the runs that are wanted, and of all they require, those that are not there and can be made now -> [(c, name,
    settings, cut)], the longest first. A teacher, or a model to cut, whose folder is gone is made again."""
    found, seen = {}, set()

    def visit(run, again=False):
        """-> whether its records are there."""
        if (run, again) in seen:
            return run.name in runs
        seen.add((run, again))
        records = [other for other in claims.requires(run, scale) if other not in run.needs()]
        if not all([visit(other) for other in records]):
            return False
        settings, cut = claims.settings(run, scale, runs, c.runs)
        if is_there(c, run, settings) and not again:
            return True
        gone = [not checkpoint.checkpoints(f"{c.runs}/{other.name}") for other in run.needs()]
        there = [visit(other, again=none) for other, none in zip(run.needs(), gone)]
        if all(there) and not any(gone):
            found[run] = c, run.name, settings, cut
        return run.name in runs

    for one in wanted:
        visit(one)
    return [found[one] for one in sorted(found, key=lambda one: -claims.expected(one, scale)[1]["flops_executed"])]


# -- all runs

class Clock:
    """How long what is missing will take: its FLOPs by the FLOPs per second of the runs that ended in this session, or
    before, of those whose records are there."""
    def __init__(self, c, missing, runs):
        self.c, self.left, self.jobs = c, dict(missing), c.jobs
        self.here, self.before = [], [r["summary"][0] for r in runs.values()]

    def told(self, arguments):
        """After the run with these arguments."""
        self.left.pop(arguments[1], None)
        self.here += report.records(f"{self.c.results}/{arguments[1]}.jsonl")["summary"]
        return str(self)

    def __str__(self):
        known, left = self.here or self.before, sum(self.left.values())
        if not known:
            return f"{left:.3g} FLOPs left"
        speed = sum(s["flops_executed"] for s in known) / sum(sum(s["seconds"].values()) for s in known)
        return f"{left:.3g} FLOPs left, about {left / speed / self.jobs / 60:.0f} min"


def forget_another_code(c, names):
    """--again: delete records and folders of those of these runs that another code made."""
    runs = evidence.read(c.results)
    old = [name for name in names if name in runs and runs[name]["config"][0].get("code") != folder.code()]
    for name in old:
        Path(c.results, f"{name}.jsonl").unlink()
        for path in (Path(c.runs, name), Path(c.runs, f"from-{name}")):
            shutil.rmtree(path, ignore_errors=True)
    print(f"{len(old)} runs of another code are made again")


def run_all(c):
    """Make what is missing, claim by claim."""
    c, scale = resolve(c)
    until = None if c.minutes is None else time.time() + 60 * c.minutes
    wanted = {n: claims.runs_of(CLAIMS[n], scale, scale.seeds) for n in scale.claims}
    everything = claims.everything([run for runs in wanted.values() for run in runs], scale)
    claims.refuse_too_many_epochs(everything, scale)
    if c.again:
        forget_another_code(c, [run.name for run in everything])
    runs = evidence.read(c.results)
    missing = {run.name: claims.expected(run, scale)[1]["flops_executed"] for run in everything if run.name not in runs}
    clock = Clock(c, missing, runs)
    print(f"{len(missing)} of {len(everything)} runs are missing: {clock}")
    for number, compared in wanted.items():
        while todo := ready(c, scale, compared, runs):
            print(f"claim {number}: {len(todo)} runs", flush=True)
            done = sweep.side_by_side(job, todo, c.jobs, until, clock.told)
            runs = evidence.read(c.results)
            if done < len(todo):
                left = sum(run.name not in runs for run in everything)
                return print(f"{left} runs are left; the same command goes on")
    if not c.quick:
        return print(f"all runs are there; python reproduce.py report says what {c.results} holds")
    print_report(c, scale, runs)
    print("\nOne seed proves nothing: seeds differ by as much as plans do. python reproduce.py runs several.")


# -- the report

def print_report(c, scale, runs):
    """Print the tables, draw the figure -> the text."""
    drawn = evidence.picture(runs, scale, f"{c.results}/figure.png")
    text = evidence.text(runs, scale, f"{c.results}/figure.png" if drawn else None)
    print(text)
    return text


def replaced(page, text):
    """A page with `text` between the markers instead of what stood there; None where it has no markers."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}" if found and closed else None


def main_report(c):
    c, scale = resolve(c)
    runs = evidence.read(c.results)
    text, page = print_report(c, scale, runs), Path(c.readme)
    old = sum(r["config"][0].get("code") != folder.code() for r in runs.values())
    if old:
        print(f"{old} of {len(runs)} records are of another code than this; --again makes them anew", file=sys.stderr)
    if c.quick or c.preset != "cpu" or not page.exists():
        return
    new = replaced(page.read_text(), text)
    if new is None:
        return print(f"{page} was left as it is: it has no {BEGIN} … {END}", file=sys.stderr)
    write_atomic(page, lambda file: file.write(new.encode()))
    print(f"written into {page}", file=sys.stderr)


def main_power(c):
    c, scale = resolve(c)
    print(evidence.power(evidence.read(c.results), scale))


COMMANDS = {"run": run_all, "report": main_report, "power": main_power}


def main(argv):
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    COMMANDS[name](parse(Reproduce, rest))


if __name__ == "__main__":
    run(main, sys.argv[1:])
