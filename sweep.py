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
from pathlib import Path

from tqdm import tqdm

from common import read_records, write_atomic


def one(folder, settings, device="cpu"):
    """Run one plan to its end, quietly."""
    import train
    train.main(train.Train(out=str(folder), device=device, **settings), quiet=True)


def call(job):
    """One job in its own process -> whether it came to its end. At the time `until` it gets the signal on which
    train.py saves and ends; later none begins."""
    import torch
    function, arguments, until = job
    if until is not None and time.time() >= until:
        return False
    timer = threading.Timer(until - time.time(), os.kill, (os.getpid(), signal.SIGTERM)) if until else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())        # where train.py's loop does not run
    torch.set_num_threads(1)
    try:
        timer and timer.start()
        function(*arguments)
        return True
    except SystemExit:
        return False
    finally:
        timer and timer.cancel()


def side_by_side(function, arguments, jobs, until=None):
    """Call function(*each of `arguments`), `jobs` at a time, each in a process of its own (and so with its own peak
    memory) -> how many came to their end before `until` (seconds since the epoch). What one of them raises ends all;
    SystemExit only that one."""
    with get_context("spawn").Pool(min(jobs, max(1, len(arguments))), maxtasksperchild=1) as pool:
        done = pool.imap_unordered(call, [(function, each, until) for each in arguments])
        return sum(tqdm(done, total=len(arguments), desc="runs"))


def keep_records(folder, path):
    """Copy a run's records, but for its training steps, to the small file `path`."""
    kept = [json.dumps(r) + "\n" for r in read_records(Path(folder) / "metrics.jsonl") if r["tag"] != "step"]
    write_atomic(path, lambda file: file.write("".join(kept).encode()))
