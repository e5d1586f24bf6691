"""Runs of train.py side by side: a process and one thread each, what is finished is not run again, killed ones go on.

    python reproduce.py --preset toy --jobs 2

One thread, so that a run's sums do not depend on the machine's cores. For reproduce.py and scaling.py, which say what
to run. Not here: what a run is (train.py), several GPUs.
"""
import json
import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

from common import UserError, read_records, run, write_atomic

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)      # exit codes of a run that saved and ended on a signal


def one(folder, settings, device="cpu"):
    """Run one plan to its end, quietly."""
    import train
    train.main(train.Train(out=str(folder), device=device, **settings), quiet=True)


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


def side_by_side(function, arguments, jobs, until=None):
    """Call function(*each of `arguments`), `jobs` at a time, each in a process of its own (and so with its own peak
    memory) -> how many came to their end. From `until` (seconds since the epoch) on none begins and those that run are
    stopped. UserError: one failed or was killed (its own message is printed); the others are stopped and saved."""
    context, waiting, running, done = get_context("spawn"), list(arguments), {}, 0
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tqdm(total=len(waiting), desc="runs") as progress:
            while waiting or running:
                while waiting and len(running) < jobs and (until is None or time.time() < until):
                    process = context.Process(target=child, args=(function, waiting.pop(0), until, os.getpid()))
                    process.start()
                    running[process.sentinel] = process
                if not running:
                    break
                for sentinel in wait(running):
                    process = running.pop(sentinel)
                    process.join()
                    if process.exitcode not in (0, *STOPPED):
                        raise UserError(f"a run ended with exit code {process.exitcode}, see above (-9: the system "
                                        "killed it, perhaps for memory: fewer --jobs); the same command goes on")
                    done += process.exitcode == 0
                    progress.update()
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return done


def keep_records(folder, path):
    """Copy a finished run's records, but for its training steps, to the small file `path`. UserError: not finished."""
    records = read_records(Path(folder) / "metrics.jsonl")
    if not any(r["tag"] == "summary" for r in records):
        raise UserError(f"{folder} is not finished; run the same command again to go on")
    kept = [json.dumps(r) + "\n" for r in records if r["tag"] != "step"]
    write_atomic(path, lambda file: file.write("".join(kept).encode()))
