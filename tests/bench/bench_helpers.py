"""What several tests of the benchmarks share."""
import json
import pickle

from bench import __main__ as bench
from bench import variants
from model import GPTConfig

UNEVEN = GPTConfig(256, 64, 96, 16, (6, 4, 0), (2, 4, 0), (128, 200, 60))


def settings(suite, **flags):
    """Resolved settings of a suite at toy size."""
    toy = dict(presets=("toy",), vocab=(300,), rounds=1, steps=2, micro_batch=2, micro_steps=2)
    flags = {**toy, **flags}
    read = {name: flags[name] for name in flags if name in bench.SUITES[suite].reads}
    return bench.resolve(bench.Bench(suite, **read))


def load(suite="train", **flags):
    return variants.fitted(settings(suite, **flags), "toy", 300)[0]


def as_recorded(measured):
    """What a suite returned, as the records hold it."""
    return json.loads(json.dumps(measured))


def same_process(function, *args):
    """In the place of timing.own_process. What it is sent must not name the script, which another
    process cannot import."""
    assert b"bench.__main__" not in pickle.dumps((function, args))
    return function(*args)


def by(rows, *columns):
    """{the row's values of these columns: row}"""
    if len(columns) == 1:
        return {row[columns[0]]: row for row in rows}
    return {tuple(row.get(column) for column in columns): row for row in rows}
