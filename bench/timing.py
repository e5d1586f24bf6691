"""How the benchmarks measure: interleaved rounds, medians, limits found in the same run, peak memory, records.

    python -m pytest tests/bench/test_bench.py           # the order A B A B, medians, what is skipped

Nothing here knows a card's or a processor's numbers: the limit is a large matrix product in the same dtype (FLOP/s) or
a large copy (bytes/s), timed in turns with what it is the limit of. All seconds are wall time, with the device's queue
empty at both ends. A *cell* is what is measured in one go; one that the records have, measured by the same code, is not
measured again; one that failed is. Not here: what is measured (bench/__main__.py).
"""
import contextlib
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from common import UserError, append_record, peak_memory, read_records
from report import markdown

# -- time

def synchronize(device):
    """Wait until the GPU has done what it was given; a CPU has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def seconds_of(call, device="cpu"):
    """Call it -> wall seconds, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(variants, rounds, device="cpu"):
    """Call {name: function} in turns, A B A B …: a round that does not count, then `rounds` that do -> {name: [seconds
    of each round]}."""
    seconds = [{name: seconds_of(call, device) for name, call in variants.items()} for _ in range(1 + rounds)]
    return {name: [each[name] for each in seconds[1:]] for name in variants}


def median_ratio(a, b):
    """Median of a_i / b_i: each ratio within its round, so that the machine's mood falls on both."""
    return statistics.median(x / y for x, y in zip(a, b))


@contextlib.contextmanager
def stopwatch(device, *places):
    """While inside, time every call of owner.name for each (owner, name, part) in `places`; yields {part: seconds},
    filled as they are called. On a GPU the calls wait for their work, so the whole is slower than without."""
    seconds = dict.fromkeys((part for *_, part in places), 0.0)

    def watched(function, part):
        def call(*args, **kwargs):
            found = []
            seconds[part] += seconds_of(lambda: found.append(function(*args, **kwargs)), device)
            return found[0]
        return call

    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), part)))
        yield seconds


# -- limits

ROWS = {"cpu": 2048, "gpu": 8192}            # of the square matrices whose product is the limit of FLOP/s
MEGABYTES = {"cpu": 512, "gpu": 2048}        # of the array whose copy is the limit of bytes/s


def matmul(dtype, device):
    """-> (call, its FLOPs): a product of two large random matrices; on a GPU 16."""
    n, repeats = (ROWS["gpu"], 16) if device.startswith("cuda") else (ROWS["cpu"], 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call():
        for _ in range(repeats):
            torch.mm(a, b, out=out)
    return call, 2 * n**3 * repeats


def traffic(device):
    """-> {"copy": (call, bytes), "read": (call, bytes)}: a copy, whose bytes are read and written, and a matrix-vector
    product, which only reads and is what decoding does. The better rate of the two is the bandwidth."""
    side = round((MEGABYTES["gpu" if device.startswith("cuda") else "cpu"] * 2**20 / 4) ** .5)
    a, out, x = torch.randn(side, side, device=device), torch.empty(side, side, device=device), torch.randn(side)
    x = x.to(device)
    return {"copy": (lambda: out.copy_(a), 8 * side**2), "read": (lambda: torch.mv(a, x), 4 * side**2)}


# -- memory

def resident(line="VmHWM"):
    """Bytes of memory that this very process holds (VmRSS) or held at most (VmHWM: ru_maxrss starts at the parent's
    where a process is spawned). Without /proc: the most so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    return next(1024 * int(text.split()[1]) for text in status.read_text().splitlines() if text.startswith(line))


@contextlib.contextmanager
def peak(device):
    """Yields a dict that holds, behind the block, `before_bytes` and `peak_bytes`: of the process on a CPU, of
    PyTorch's allocations on a GPU."""
    found, on_gpu = {}, device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")                 # Linux: the peak starts anew
    found["before_bytes"] = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    yield found
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else resident()


def own_process(function, *args):
    """function(*args) in a fresh process with as many threads as ours, so that its peak memory is its own. What it
    raises is raised here; UserError: the system killed it."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(f"the process of {function.__name__} was ended, which is what running out of memory looks "
                            "like: give a smaller shape or a smaller --micro-batch") from None


# -- records

def machine(device):
    """What a number depends on besides the settings."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "torch": str(torch.__version__)}


class Records:
    """A file of records: one line a cell, with the `rows` of its tables and a `note` for their titles."""
    def __init__(self, file):
        self.file = Path(file)

    def all(self):
        """The last record of every cell: one that failed gives way to a later one."""
        key = lambda r: json.dumps([r["suite"], r["cell"], r["about"]], sort_keys=True)
        return list({key(r): r for r in read_records(self.file)}.values())

    def cell(self, suite, cell, about, measure):
        """Measure a cell, unless one of the same suite, name and `about` (dict: settings, machine, code) is there.
        measure() -> {"rows": [{column: value}], anything else that should be kept}. -> whether it has its numbers; what
        it raises is printed and recorded in one line."""
        key = json.loads(json.dumps({"suite": suite, "cell": cell, "about": about}))
        if any(r.items() >= key.items() and "failed" not in r for r in self.all()):
            print(f"{suite}, {cell}: in {self.file} already", flush=True)
            return True
        print(f"{suite}, {cell} …", flush=True)
        try:
            found = measure()
        except Exception as problem:
            first, *_ = (str(problem).strip() or "without a message").splitlines()
            failed = f"{type(problem).__name__}: {first[:200]}"
            print(f"{suite}, {cell}: {failed}", flush=True)
            found = {"failed": failed, "rows": [{"table": "failed, the same command tries again", "cell": cell,
                                                 "note": failed}]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_record(self.file, **key, **found)
        return "failed" not in found


def show(value):
    """A table's entry: three digits, or all of a whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def tables(records):
    """Records -> Markdown: a table for each suite, machine, code, number of rounds and note, with the columns that any
    row has."""
    groups = {}
    for r in records:
        rounds = r["about"]["settings"].get("rounds")
        where = ", ".join(f"{k} {v}" for k, v in {**r["about"]["machine"], "code": r["about"]["code"]}.items())
        for row in r["rows"]:                     # rows of one cell may belong to tables with other columns
            row = dict(row)
            title = r["suite"] + (f", {row.pop('table')}" if "table" in row else "")
            medians = f"medians of {rounds} rounds; " if rounds else ""
            groups.setdefault(f"**{title}** ({medians}{where}{r.get('note', '')}):", []).append(row)
    texts = []
    for title, rows in groups.items():
        head = list(dict.fromkeys(column for row in rows for column in row))
        texts.append(f"{title}\n\n" + markdown(head, [[show(row.get(column)) for column in head] for row in rows]))
    return "\n\n".join(texts)
