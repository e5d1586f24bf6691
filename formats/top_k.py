"""What a teacher says of a row of training samples, on disk: its likeliest tokens at each place.

    python -m experiments.teacher MODEL --data stdlib --out teacher       # writes such a folder
    python train.py --init CUT --teacher teacher --plan recover           # reads it instead of a model

teacher.bin holds a record for each sample of the endless row of data.batch, in its order, so that
students of any micro-batch and number of processes read the same. teacher.json says what the
records are of and how many are whole; it is replaced after each batch of them, and what a killed
process left behind the last whole one is written anew. A record has, for T tokens of context:

    indices   (T, k) uint16, or uint32 for V above 65,536: the k likeliest tokens, the likeliest first
    log_probs (T, k) float16
    tail      (T,)   float32: the probability of all other tokens, summed before anything is rounded
    target    (T,)   float32: the log-probability of the target
    digest           uint64: xxh3 over the other fields

These are 4k + 8 bytes a token (with uint32 6k + 8). The log-probabilities lie between 0 and about
-60: float16 has three bits more than bfloat16 there, and needs none of its range. When they are
read, the k probabilities are scaled to the sum 1 - tail. Nothing is pickled. Not here: the loss
(distill.top_kd_loss).
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import xxhash

from common import Damaged, UserError, write_atomic
from distill import TopK

FORMAT = {"magic": "nanoprune teacher", "version": 1}


def is_cache(path):
    """Whether there is such a folder at `path`."""
    return (Path(path) / "teacher.json").is_file()


def record_type(identity):
    """The numpy dtype of a record."""
    T = identity["block_size"]
    k = identity["top"]
    index = "<u2" if identity["vocab_size"] <= 2**16 else "<u4"
    return np.dtype([("indices", index, (T, k)), ("log_probs", "<f2", (T, k)), ("tail", "<f4", (T,)),
                     ("target", "<f4", (T,)), ("digest", "<u8")])


def digest_of(record):
    """The digest of a record's other fields."""
    digest = xxhash.xxh3_64()
    for name in record.dtype.names[:-1]:
        digest.update(np.ascontiguousarray(record[name]))
    return digest.intdigest()


def read_index(folder):
    """The content of teacher.json. Raises UserError if it is damaged or of another version."""
    file = Path(folder) / "teacher.json"
    try:
        index = json.loads(file.read_bytes())
        if {name: index[name] for name in FORMAT} != FORMAT:
            raise ValueError(f"version {index['version']}")
        for name in ("block_size", "top", "vocab_size", "samples"):
            if type(index[name]) is not int or index[name] < 1:
                raise ValueError(f"{name} {index[name]!r}")
        record_type(index)
    except (ValueError, LookupError, TypeError) as problem:
        raise UserError(f"{file} is damaged or of another version ({problem}); delete {folder} and write it "
                        "again") from None
    return index


def append(folder, identity, samples, records):
    """Write records (N,) behind the first `samples` records of a folder, then the index that counts
    them."""
    folder = Path(folder)
    with open(folder / "teacher.bin", "ab") as file:
        file.truncate(samples * records.dtype.itemsize)
        records.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    index = {**FORMAT, **identity, "samples": samples + len(records)}
    write_atomic(folder / "teacher.json", lambda out: out.write(json.dumps(index, indent=1).encode()))


def refuse_another(folder, index, expected):
    """Raise UserError if the index says otherwise than the dictionary `expected`."""
    differ = [f"{name} is {index.get(name)!r} there and {value!r} here"
              for name, value in expected.items() if index.get(name) != value]
    if differ:
        raise UserError(f"the teacher in {folder} was written for other samples ({'; '.join(differ)}); give the same "
                        "settings, or write another folder with python -m experiments.teacher")


class CachedTeacher:
    """A folder of records, opened to be read."""

    def __init__(self, folder):
        self.folder = folder
        self.index = read_index(folder)
        self.samples = self.index["samples"]
        kind = record_type(self.index)
        size = (Path(folder) / "teacher.bin").stat().st_size
        if size < self.samples * kind.itemsize:
            raise UserError(f"{folder}/teacher.bin has {size:,} bytes, and {self.samples} samples take "
                            f"{self.samples * kind.itemsize:,}; delete {folder} and write it again")
        self.records = np.memmap(Path(folder) / "teacher.bin", kind, mode="r", shape=(self.samples,))

    def fingerprint(self):
        """A digest of what the records are of. A folder to which samples were added is the same."""
        identity = {name: value for name, value in self.index.items() if name not in ("samples", "teacher")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def refuse_fewer(self, samples):
        """Raise UserError if there are not so many samples."""
        if self.samples < samples:
            T = self.index["block_size"]
            raise UserError(f"the teacher in {self.folder} has {self.samples} samples of {T} tokens, the run reads "
                            f"{samples}; go on with python -m experiments.teacher … --tokens {samples * T}, or give "
                            "fewer --steps")

    def read(self, first, count):
        """What is known at the samples `first` … first + count - 1: a TopK of (count, T, k) and
        (count, T). Raises Damaged for a record that is not what was written, or that no teacher can have
        written."""
        records = self.records[first:first + count]
        for number, record in enumerate(records, first):
            if record["digest"] != digest_of(record):
                raise Damaged(f"sample {number} in {self.folder} is damaged; delete the folder and write it again")
        probs = torch.from_numpy(records["log_probs"].astype(np.float32)).exp_()
        tail = torch.from_numpy(records["tail"].copy())
        # Rounded to float16, they may sum to more than one.
        sums = probs.sum(-1)
        indices = torch.from_numpy(records["indices"].astype(np.int64))
        target = torch.from_numpy(records["target"].copy())
        # A digest tells damage, not intent. NaN fails each of these.
        are_probabilities = (sums > 0) & (sums < 2) & (tail >= 0) & (tail <= 1) & (target < 1e-3) & target.isfinite()
        if not are_probabilities.all() or (indices >= self.index["vocab_size"]).any():
            raise Damaged(f"samples {first} to {first + count - 1} in {self.folder} hold no probabilities of "
                          f"{self.index['vocab_size']} tokens; delete the folder and write it again")
        probs *= ((1 - tail) / sums)[..., None]
        return TopK(indices, probs, tail, target, self.index["vocab_size"])
