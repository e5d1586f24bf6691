"""Run train.py many times, several runs side by side, and keep all records in one file.

    python -m experiments.claims --quick --jobs 2

Every run has a process of its own with one thread, so that its sums do not depend on the number of
cores. A run that was killed goes on, and a finished one is not run again. experiments/claims.py and
experiments/scaling_runs.py say what to run. Not here: what a run is (train.py), several GPUs.
"""
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import checkpoint
import prune
import train
from common import UserError, read_records, run, write_atomic
from methods import grow, sheared

# The exit codes of a run that saved and ended on a signal.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


# -- one run

@contextlib.contextmanager
def locked(folder):
    """Make the folder and hold it. Raises UserError if another process holds it, which would write
    the same files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is at work in {folder}; wait for it, or give another "
                        "--runs") from None


def run_plan(folder, settings, device="cpu", cut=None, growth=None, masks=None):
    """Run one plan to its end, quietly, with these settings of train.py. Returns its setup and
    state. What the settings leave open does not depend on the machine: float32, nothing compiled.

    `cut` holds the settings of prune.py that make the model which the run begins with, `growth` those of
    methods.grow, and `masks` those of methods.sheared; it is made first."""
    with locked(folder):
        if cut:
            recipe = prune.Prune(out=settings["init"], device=device, **{"dtype": "float32", **cut})
            make_first(prune.main, recipe, "recipe", cut, folder)
        if growth:
            recipe = grow.Grow(out=settings["init"], device=device, **growth)
            make_first(grow.main, recipe, "growth", growth, folder)
        if masks:
            recipe = sheared.Shear(out=settings["init"], device=device, **{"dtype": "float32", **masks})
            make_first(sheared.main, recipe, "recipe", masks, folder)
        settings = {"dtype": "float32", "compile": False, **settings}
        return train.main(train.Train(out=str(folder), device=device, **settings), quiet=True)


def make_first(command, recipe, key, settings, folder):
    """Make the model of a recipe by a command, unless it exists at the recipe's path. A model of other
    `settings`, which its checkpoint holds under `key`, is deleted, and so is the run in `folder`, which
    began with it."""
    path = recipe.out
    if checkpoint.checkpoints(path):
        _, about = checkpoint.load(path, "meta")
        recorded = about["run"].get(key, {})
        # The model that was cut or grown may lie elsewhere now, so its path is not compared.
        if all(recorded.get(name) == value for name, value in settings.items() if name != "init"):
            return
        for file in Path(folder).iterdir():
            file.unlink()
    # The folder may also be what a killed process left behind while it saved.
    shutil.rmtree(path, ignore_errors=True)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        command(recipe)


# -- several runs

def exit_on_signal(number, _):
    sys.exit(128 + number)


def child(function, arguments, until, parent):
    """Do one job in this process. At the time `until`, or when its parent is gone, the job gets the
    signal on which train.py saves and ends."""
    def watch():
        while os.getppid() == parent and not is_late(until):
            time.sleep(.2)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, exit_on_signal)      # while train.py's own handler is not set
    threading.Thread(target=watch, daemon=True).start()
    run(function, *arguments)


def is_late(until):
    """Whether the time `until` (seconds since the epoch, or None for never) has come."""
    return until is not None and time.time() >= until


def side_by_side(function, arguments, jobs, until=None, describe=None):
    """Call function(*each of `arguments`), `jobs` calls at a time, each in its own process with its
    own peak memory. Returns how many calls came to their end.

    From the time `until` (seconds since the epoch) on no call begins, and those that run are
    stopped. The text describe(arguments) of a call that ended stands in the progress bar. Raises
    UserError if a call failed or was killed; the call has printed its own message, and the others
    are stopped and saved."""
    context = get_context("spawn")
    waiting = list(arguments)
    running = {}
    done = 0
    handler = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        with tqdm(total=len(waiting), desc="runs") as progress:
            while True:
                while waiting and len(running) < jobs and not is_late(until):
                    job = waiting.pop(0)
                    process = context.Process(target=child, args=(function, job, until, os.getpid()))
                    process.start()
                    running[process.sentinel] = process, job
                if not running:
                    return done
                for sentinel in wait(running):
                    process, job = running.pop(sentinel)
                    process.join()
                    refuse_failure(process.exitcode)
                    if process.exitcode == 0:
                        done += 1
                        if describe:
                            progress.set_postfix_str(describe(job), refresh=False)
                    progress.update()
    finally:
        signal.signal(signal.SIGTERM, handler)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def refuse_failure(code):
    """Raise UserError for the exit code of a process that neither came to its end nor was
    stopped."""
    if code not in (0, *STOPPED):
        raise UserError(f"a run ended with exit code {code}, see above (-9: the system killed it, "
                        "perhaps for memory: fewer --jobs); the same command goes on")


# -- records of finished runs

def is_finished(name, run, settings, flag, cut=None, growth=None, masks=None):
    """Whether the records of a run, {tag: [records]} or None, exist. Raises UserError if they were
    made with other settings of train.py, or of the `cut`, `growth` or `masks` before it; the message
    names the run and the flag of its file. A setting of None is not compared."""
    if run is None:
        return False
    config = run["config"][0]
    recipe = (config.get("cut") or {}).get("recipe", {})
    grown = run["summary"][0].get("growth", {})
    differ = differences("", config, settings) + differences("the cut's ", recipe, cut or masks or {})
    differ += differences("the growth's ", grown, growth or {})
    if differ:
        raise UserError(f"{name} holds another run ({'; '.join(differ)}); give another {flag}, and "
                        "another --runs")
    return True


def differences(whose, recorded, settings):
    """The settings that are recorded with other values, as phrases."""
    phrases = []
    for name, value in settings.items():
        if value is not None and recorded.get(name) != value:
            phrases.append(f"{whose}{name} is {recorded.get(name)!r} there and {value!r} here")
    return phrases


def without_steps(folder):
    """The records of a finished run, but for its training steps. Raises UserError if the run is not
    finished."""
    records = read_records(Path(folder) / "metrics.jsonl")
    if not any(record["tag"] == "summary" for record in records):
        raise UserError(f"{folder} is not finished; run the same command again to go on")
    return [record for record in records if record["tag"] != "step"]


def put_runs(path, runs):
    """Put the records of runs, {name: records}, into the experiment's file in place of older ones
    of the same runs. A run without records is deleted. Every record gets the name of its run as
    `run`.

    The file is written anew and renamed under a lock, so that runs which end at the same time do
    not lose each other's records."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        kept = [record for record in read_records(path) if record["run"] not in runs]
        for name, records in runs.items():
            kept += [{"run": name, **record} for record in records]
        write_records(path, kept)


def write_records(path, records):
    """Write a file of records, one JSON object a line, whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomic(path, lambda file: file.write(text.encode()))
