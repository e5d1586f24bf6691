"""How the benchmarks measure: rounds in turns, medians, limits, peak memory, records.

    python -m pytest tests/bench/test_timing.py

Nothing here knows the numbers of a card or of a processor. The limit of FLOP/s is a large matrix
product in the same dtype, and the limit of bytes/s is a large copy. Both are timed in turns with
what they limit. All seconds are wall time, and the device's queue is empty at both ends. A *cell*
is what is measured in one go. A cell is not measured again if the records have it from the same
commit; a cell that failed is. Not here: what is measured (bench/__main__.py).
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

import torch

from common import UserError, append_record, peak_memory, read_records
from report import markdown

# -- time

def synchronize(device):
    """Wait until a GPU has finished its work. A CPU never has work left."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def seconds_of(call, device="cpu"):
    """Call the function: -> wall seconds, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(calls, rounds, device="cpu"):
    """Call the functions {name: function} in turns, A B A B …: -> {name: [seconds of each round]}.
    One round more runs first and does not count."""
    seconds = {name: [] for name in calls}
    # Round by round, so that a slow minute of the machine falls on all of them.
    for _ in range(1 + rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return {name: measured[1:] for name, measured in seconds.items()}


def median_ratio(numerators, denominators):
    """The median of the ratios within each round. What slows the machine down slows both sides of a
    ratio."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))


# -- limits

ROWS = {"cpu": 2048, "gpu": 8192}            # of the square matrices that are multiplied
MEGABYTES = {"cpu": 512, "gpu": 2048}        # of the array that is copied


def kind_of(device):
    """The key of the two tables above."""
    return "gpu" if device.startswith("cuda") else "cpu"


def matmul(dtype, device):
    """A product of two large random matrices, 16 times on a GPU: -> function, its FLOPs."""
    n = ROWS[kind_of(device)]
    repeats = 16 if kind_of(device) == "gpu" else 1
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)

    def call():
        for _ in range(repeats):
            torch.mm(a, b, out=out)
    return call, 2 * n**3 * repeats


def traffic(device):
    """Two ways to move a large array: -> {"copy": (function, bytes), "read": (function, bytes)}. A
    copy reads and writes. A matrix-vector product only reads, as decoding does. The better rate of
    the two is the bandwidth."""
    side = round((MEGABYTES[kind_of(device)] * 2**20 / 4) ** .5)
    matrix = torch.randn(side, side, device=device)
    out = torch.empty_like(matrix)
    vector = torch.randn(side).to(device)
    return {"copy": (lambda: out.copy_(matrix), 8 * side**2),
            "read": (lambda: torch.mv(matrix, vector), 4 * side**2)}


# -- memory

def process_memory(line):
    """Bytes that this process holds (line "VmRSS" of Linux's /proc) or has held at most ("VmHWM").
    Without /proc: the most that it has held so far. (The system's own maximum would start at the
    one of the process that started ours.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    lines = [text for text in status.read_text().splitlines() if text.startswith(f"{line}:")]
    return 1024 * int(lines[0].split()[1])


@contextlib.contextmanager
def peak(device):
    """Measure the memory of a block. Yields a dictionary that afterwards holds `before_bytes`, in
    use as the block began, and `peak_bytes`, the most in use until it ended. On a CPU this is the
    memory of the whole process, on a GPU that of PyTorch's tensors."""
    memory = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        memory["before_bytes"] = torch.cuda.memory_allocated(device)
        yield memory
        memory["peak_bytes"] = peak_memory(device)
        return
    if os.access("/proc/self/clear_refs", os.W_OK):
        # On Linux this makes the peak start anew.
        Path("/proc/self/clear_refs").write_text("5")
    memory["before_bytes"] = process_memory("VmRSS")
    yield memory
    memory["peak_bytes"] = process_memory("VmHWM")


@contextlib.contextmanager
def freed_at_once():
    """Processes that start inside give arrays of 128 KB and more back to the system as soon as they are
    free. By itself glibc keeps freed arrays of up to 32 MB, and the peak would count them."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**17)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def own_process(function, *args):
    """Call the function in a fresh process with as many threads as ours, so that its peak memory is
    its own: -> what it returns. What it raises is raised here. Raises UserError if the system
    killed the process."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(f"the process of {function.__name__} was ended, which is what running "
                            "out of memory looks like: give a smaller shape or a smaller "
                            "--micro-batch") from None


# -- records

def machine(device):
    """What a number depends on besides the settings and the code."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "torch": str(torch.__version__)}


class Records:
    """A file with one line for each cell: the `rows` of its tables and a `note` for their
    titles."""
    def __init__(self, file):
        self.file = Path(file)

    def all(self):
        """The last record of every cell. A record of a failure gives way to a later one."""
        last = {}
        for record in read_records(self.file):
            key = json.dumps([record["suite"], record["cell"], record["about"]], sort_keys=True)
            last[key] = record
        return list(last.values())

    def measure(self, suite, cell, about, call):
        """Measure a cell and record it: -> whether it has its numbers. A cell that was recorded
        with the same `about` (settings, machine, code) is left alone. `call()` returns {"rows":
        [{column: value}]} and anything else that should be kept. What it raises is printed and
        recorded in one line."""
        key = json.loads(json.dumps({"suite": suite, "cell": cell, "about": about}))
        if any(record.items() >= key.items() and "failed" not in record for record in self.all()):
            print(f"{suite}, {cell}: in {self.file} already", flush=True)
            return True
        print(f"{suite}, {cell} …", flush=True)
        try:
            measured = call()
        except Exception as problem:
            first_line = (str(problem).strip() or "without a message").splitlines()[0]
            failure = f"{type(problem).__name__}: {first_line[:200]}"
            print(f"{suite}, {cell}: {failure}", flush=True)
            row = {"table": "failed, the same command tries again", "cell": cell, "note": failure}
            measured = {"failed": failure, "rows": [row]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_record(self.file, **key, **measured)
        return "failed" not in measured


def show(value):
    """The text of a table's entry: three digits, or all of a whole number."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def title_of(record, table):
    """The title of the tables that this record's rows belong to."""
    about = record["about"]
    rounds = about["settings"].get("rounds")
    medians = f"medians of {rounds} rounds; " if rounds else ""
    where = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    name = f"{record['suite']}, {table}" if table else record["suite"]
    return f"**{name}** ({medians}{where}, code {about['code']}{record.get('note', '')}):"


def tables(records):
    """The records as Markdown: one table for each suite, machine, commit, number of rounds and
    note. A table has the columns that any of its rows has. The rows of one cell may belong to
    several tables."""
    rows_of = {}
    for record in records:
        for row in record["rows"]:
            columns = {name: value for name, value in row.items() if name != "table"}
            rows_of.setdefault(title_of(record, row.get("table")), []).append(columns)
    texts = []
    for title, rows in rows_of.items():
        head = []
        for row in rows:
            head += [column for column in row if column not in head]
        body = []
        for row in rows:
            body.append([show(row.get(column)) for column in head])
        texts.append(f"{title}\n\n{markdown(head, body)}")
    return "\n\n".join(texts)
