"""Runs of train.py side by side: a process and one thread each, what is finished is not run again, killed ones go on.

    python -m experiments.claims --quick --jobs 2

One thread, so that a run's sums do not depend on the machine's cores. For experiments/claims.py and experiments/scaling.py, which say what
to run. Not here: what a run is (train.py), several GPUs.
"""
import contextlib
import fcntl
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

from filelock import FileLock
from tqdm import tqdm

from common import UserError, read_records, run, write_atomic

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)      # exit codes of a run that saved and ended on a signal


@contextlib.contextmanager
def locked(folder):
    """Make the folder and hold it. UserError: another process does (which would write the same files)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}; wait for it, or give another --runs") from None
    finally:
        os.close(handle)


def one(folder, settings, device="cpu", cut=None):
    """Run one plan to its end, quietly -> steps.Run; before it, with the settings `cut` of prune.py, make the model it
    begins with. A model there of another cut, and what began with that, is deleted."""
    import checkpoint
    import prune
    import train
    with locked(folder):
        made = cut and checkpoint.checkpoints(settings["init"])
        there = checkpoint.load(settings["init"], "meta")[1]["run"]["recipe"] if made else {}
        if made and any(there.get(k) != v for k, v in cut.items() if k != "init"):       # where it lay may be different
            for file in Path(folder).iterdir():
                file.unlink()
            made = []
        if cut and not made:
            shutil.rmtree(settings["init"], ignore_errors=True)      # or of one that was killed while it was saved
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prune.main(prune.Prune(out=settings["init"], device=device, **cut))
        return train.main(train.Train(out=str(folder), device=device, **settings), quiet=True)


def child(function, arguments, until, parent):
    """One job in its own process. At the time `until`, or when its parent is gone, it gets the signal on which train.py
    saves and ends."""
    def watch():
        while os.getppid() == parent and (until is None or time.time() < until):
            time.sleep(.2)
        os.kill(os.getpid(), signal.SIGTERM)

    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))      # where train.py's loop does not run
    threading.Thread(target=watch, daemon=True).start()
    run(function, *arguments)


def side_by_side(function, arguments, jobs, until=None, told=None):
    """Call function(*each of `arguments`), `jobs` at a time, each in a process of its own (and so with its own peak
    memory) -> how many came to their end. From `until` (seconds since the epoch) on none begins and those that run are
    stopped. What `told(arguments)` says of one that came to its end stands in the progress bar. UserError: one failed
    or was killed (its own message is printed); the others are stopped and saved."""
    context, waiting, running, done = get_context("spawn"), list(arguments), {}, 0
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tqdm(total=len(waiting), desc="runs") as progress:
            while waiting or running:
                while waiting and len(running) < jobs and (until is None or time.time() < until):
                    given = waiting.pop(0)
                    process = context.Process(target=child, args=(function, given, until, os.getpid()))
                    process.start()
                    running[process.sentinel] = process, given
                if not running:
                    break
                for sentinel in wait(running):
                    process, given = running.pop(sentinel)
                    process.join()
                    if process.exitcode not in (0, *STOPPED):
                        raise UserError(f"a run ended with exit code {process.exitcode}, see above (-9: the system "
                                        "killed it, perhaps for memory: fewer --jobs); the same command goes on")
                    done += process.exitcode == 0
                    if told and process.exitcode == 0:
                        progress.set_postfix_str(told(given), refresh=False)
                    progress.update()
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
    return done


def finished(what, run, settings, flag, cut=None):
    """Whether the records of a run, {tag: [records]} or None, are there, made with these settings of train.py (None:
    any) and of prune.py's `cut` before it. UserError, naming `what` and the flag of its file: they are of another
    run."""
    found = run["config"][0] if run else {}
    recipe = (found.get("cut") or {}).get("recipe", {})
    differ = [f"{whose}{k} is {there.get(k)!r} there and {v!r} here"
              for whose, there, here in (("", found, settings), ("the cut's ", recipe, cut or {}))
              for k, v in here.items() if v is not None and there.get(k) != v]
    if found and differ:
        raise UserError(f"{what} holds another run ({'; '.join(differ)}); give another {flag}, and another --runs")
    return bool(found)


def without_steps(folder):
    """The records of a finished run, but for its training steps. Raises UserError if the run is not finished."""
    records = read_records(Path(folder) / "metrics.jsonl")
    if not any(record["tag"] == "summary" for record in records):
        raise UserError(f"{folder} is not finished; run the same command again to go on")
    return [record for record in records if record["tag"] != "step"]


def keep_run(path, name, records):
    """Append the records of one run to the experiment's file `path`, each with the run's name as `run`.

    Older records of the same run are replaced. The file is written anew and renamed under a lock, so that runs which
    end at the same time do not lose each other's records."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        others = [record for record in read_records(path) if record["run"] != name]
        own = [{"run": name, **record} for record in records]
        write_records(path, others + own)


def forget_runs(path, names):
    """Delete the records of the runs with these names from the experiment's file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        write_records(path, [record for record in read_records(path) if record["run"] not in names])


def write_records(path, records):
    """Write a file of records, one JSON object a line, whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomic(path, lambda file: file.write(text.encode()))
