"""Text in, batches out: corpora, and a batch that is a pure function of (seed, step, micro, rank).

    python data.py                                                    # this Python's standard library, as bytes
    python data.py --source "tests/*.py"                             # your own files; also hf:NAME, --tokenizer gpt2
    python data.py --source packages                                 # the Python sources of the installed packages

1. A corpus is a row of documents, each closed by the tokenizer's end-of-text token. One in twenty is held out (`val`),
   by a hash and not by chance: the same on every machine and for every tokenizer; `fingerprint` records which.
2. The standard library as bytes stays in memory. All else is tokenized once, in threads (tiktoken releases Python's
   lock), into memory-mapped shards: a corpus may be larger than memory.
3. Training reads non-overlapping windows in a shuffled order that is *computed*, not stored: nothing to save or resume,
   and any number of devices sees the same global batches (nanoGPT's memmaps plus a shuffle, see `permute`).

Not done here: cleaning, removing duplicates, mixing sources, masking attention between the documents of a window,
documents larger than memory (a text file is one document: cut it or use JSONL).
"""
import hashlib
import itertools
import json
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np

from common import UserError, parse, run, write_atomic
from formats.tokenizer import Tokenizer, open_tokenizer

HOLD_OUT = 20  # one document in so many is held out (our choice)
SHARD_TOKENS = 2**25  # a shard is written when this many are waiting: 134 MB as uint32. Bounds our memory
BLOCK_CHARACTERS = 2**20  # what a thread tokenizes at a time, in whole documents
FORMAT = {"magic": "nanoprune tokens", "version": 1}
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # folders left out of:
PYTHON = {"stdlib": "stdlib", "packages": "purelib"}  # sources whose .py files lie in a folder of sysconfig's


def list_files(source):
    """A name in PYTHON, a file, a folder (hidden files left out) or a glob -> (the folder that names are relative to,
    files). Packages bring copies of one another, so a text may be on both sides. UserError: nothing found."""
    python = source in PYTHON
    path = Path(sysconfig.get_paths()[PYTHON[source]] if python else source).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        root, found = path, []
        for folder, inside, names in os.walk(root):  # not rglob: site-packages can hold 100,000 files
            inside[:] = [s for s in inside if s[0] != "." and not (python and s in NOT_CORPUS)]
            found += [Path(folder, s) for s in names if s[0] != "." and (not python or s.endswith(".py"))]
    else:
        root = Path(*itertools.takewhile(lambda part: not set("*?[") & set(part), path.parts))
        found = [p for p in map(Path, glob(str(path), recursive=True)) if p.is_file()]
    if not found:
        raise UserError(f"no file matches {source!r} in {os.getcwd()}: give stdlib, packages, a file, folder or glob, "
                        "or hf:NAME")
    return root, sorted(found, key=lambda p: p.relative_to(root).as_posix())


def file_rows(path, field):
    """A .jsonl or .parquet file -> (line or row number, dict), .... UserError: a line that is not JSON."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as problem:
                    raise UserError(f"{path}:{number} is not JSON ({problem}): mend or remove the line") from problem
                yield number, row
    else:
        import pyarrow.parquet
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                columns = [field] if field in table.schema_arrow.names else None  # None: all, for the error to list
                batches = table.iter_batches(batch_size=1024, columns=columns)
                yield from enumerate((row for rows in batches for row in rows.to_pylist()), 1)
        except pyarrow.ArrowException as problem:
            reason = str(problem).splitlines()[0]
            raise UserError(f"{path} is not a whole parquet file ({reason}): get it again") from problem


def hugging_face_rows(source, field, split, stream):
    """"hf:NAME[:CONFIG]", NAME on the hub, a folder of JSONL or parquet files, or one made by `save_to_disk` -> (row
    number, dict), .... `stream`: the dataset is not stored, only our tokens. UserError: it cannot be had."""
    import datasets
    name, _, config = source[3:].partition(":")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(name)
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(name, config or None, split=split, streaming=stream)
        yield from enumerate(rows.select_columns([field]) if field in (rows.column_names or []) else rows, 1)
    except Exception as problem:  # `datasets` passes on whatever its readers, the hub and the network raise
        raise UserError(f"cannot load {source} split {split!r} ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())}): check name, configuration, split and network, or use "
                        "stdlib") from problem


def documents(source, root, files, field, split, stream):
    """One pass over (name, text): rows have no name, other files their path relative to `root`. Empty ones are left
    out. UserError: a row without text in `field`; a file that is not UTF-8 (Python's sources: left out)."""
    for path in files:
        hub = source.startswith("hf:")
        if hub or path.suffix in (".jsonl", ".parquet"):
            for number, row in hugging_face_rows(source, field, split, stream) if hub else file_rows(path, field):
                text, fields = (row.get(field), ", ".join(row)) if isinstance(row, dict) else (None, "none")
                if not isinstance(text, str):
                    raise UserError(f"{path}:{number} has no text in field {field!r} (its fields: {fields}): mend it "
                                    "or prepare it with python data.py --field NAME")
                if text:
                    yield None, text
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as problem:
            if source in PYTHON:
                continue
            raise UserError(f"{path} is not UTF-8 text (byte {problem.start}): convert it, or choose files with a glob "
                            "such as 'folder/**/*.txt'") from problem
        if text:
            yield path.relative_to(root).as_posix(), text


def sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hold_out(fresh, source):
    """-> rule(name, text) = [(side, text), ...]. To `val` goes a document whose sha256 (of its name, or of its text
    where it has none) is 0 modulo HOLD_OUT. Only where that leaves a side empty: the one with the smallest hash; of a
    single document the last tenth. `fresh()` starts a pass, read no further than needed. UserError: no text."""
    def number(name, text):
        return int(sha256(text if name is None else name), 16)

    hashes, sides = [], set()
    for document in fresh():
        hashes.append(number(*document))
        sides.add(hashes[-1] % HOLD_OUT == 0)
        if len(sides) == 2:
            return lambda *document: [("train" if number(*document) % HOLD_OUT else "val", document[1])]
    if not hashes:
        raise UserError(f"{source!r} holds no text: give a source with at least one document that is not empty")
    if len(hashes) == 1:
        return lambda name, text: [("train", text[:-(len(text) // 10 or 1)]), ("val", text[-(len(text) // 10 or 1):])]
    return lambda *document: [("val" if number(*document) == min(hashes) else "train", document[1])]


def tokenize(fresh, source, tok, workers, flush):
    """Call flush(side, tokens) for about SHARD_TOKENS at a time, in the documents' order whatever the number of threads
    (0: one per core) -> ([train, val] documents, fingerprint)."""
    from tqdm import tqdm
    rule, digest, workers = hold_out(fresh, source), hashlib.sha256(), workers or os.cpu_count()
    counts, waiting, eot = {"train": 0, "val": 0}, {"train": [], "val": []}, np.array([tok.eot], tok.dtype)

    def blocks():
        block, characters = {"train": [], "val": []}, {"train": 0, "val": 0}
        for side, name, text in ((side, name, part) for name, whole in fresh() for side, part in rule(name, whole)):
            counts[side] += 1
            digest.update(json.dumps([side, name, sha256(text)]).encode())
            block[side].append(text)
            characters[side] += len(text)
            if characters[side] >= BLOCK_CHARACTERS:
                yield side, block[side]
                block[side], characters[side] = [], 0
        yield from block.items()

    def encode(block):
        return block[0], [part for text in block[1] for part in (tok.encode(text), eot)]

    todo = blocks()
    with ThreadPoolExecutor(workers) as pool, tqdm(unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        while group := list(itertools.islice(todo, 4 * workers)):  # bounded: pool.map alone would read the whole corpus
            for side, parts in pool.map(encode, group):
                waiting[side] += [np.concatenate(parts)] if parts else []
                bar.update(sum(map(len, parts)))
                if sum(map(len, waiting[side])) >= SHARD_TOKENS:
                    flush(side, np.concatenate(waiting[side]))
                    waiting[side] = []
    for side, parts in waiting.items():
        if parts:
            flush(side, np.concatenate(parts))
    return list(counts.values()), digest.hexdigest()[:16]


class Shards:
    """Several (N_i,) arrays read as one: len(), and [start:stop] -> (stop - start,), a copy only where shards meet."""

    def __init__(self, parts):
        self.parts, self.starts = parts, [0, *itertools.accumulate(map(len, parts))]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, key):
        start, stop, step = key.indices(len(self))
        assert step == 1, "Shards are read as [start:stop]"
        pieces = [part[max(start - at, 0):stop - at] for part, at in zip(self.parts, self.starts)
                  if at < stop and start < at + len(part)]
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0] if pieces else self.parts[0][:0]


def header(tok, tokens):
    """A shard's first 256 bytes, JSON padded with spaces; the tokens follow, little-endian."""
    about = {**FORMAT, "dtype": tok.dtype.str, "tokens": tokens, "tokenizer": tok.name}
    return json.dumps(about).encode().ljust(256)


def open_shard(path, tok):
    """-> (N,) memory map, read-only. UserError: the header is not the one for this length and tokenizer."""
    with open(path, "rb") as file:
        found, file_bytes = file.read(256), file.seek(0, os.SEEK_END)
    tokens, rest = divmod(file_bytes - 256, tok.dtype.itemsize)
    if rest or found != header(tok, tokens):
        raise UserError(f"shard {path} ({file_bytes:,} bytes) is cut short or of another version, it begins "
                        f"{found.strip()!r}: delete {path.parent} and run again")
    return np.memmap(path, tok.dtype, mode="r", offset=256)


@dataclass(frozen=True)
class Corpus:
    train: Shards  # len() and [start:stop] -> (N,) uint16 or uint32
    val: Shards
    tokenizer: Tokenizer
    fingerprint: str  # 16 hex digits of sha256 over side, name and content of all documents; equal for all tokenizers
    documents: tuple[int, int]  # in train, in val; a single document that was cut counts in both
    folder: Path | None  # of its shards, itself a source for `load`; None: in memory


def open_shards(folder, tok):
    """A folder that `load` finished -> Corpus. UserError: unfinished, damaged, or of another tokenizer."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["tokenizer"] != tok.name:
            raise UserError(f"{folder} holds tokens of {index['tokenizer']!r}, not of {tok.name!r}: give --tokenizer "
                            f"{index['tokenizer']}")
        sides = (Shards([open_shard(folder / f"{side}_{i:03d}.bin", tok) for i in range(index["shards"][side])])
                 for side in ("train", "val"))
        return Corpus(*sides, tok, index["fingerprint"], tuple(index["documents"]), folder)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as problem:
        raise UserError(f"{folder} is unfinished or damaged ({problem}): delete it and tokenize again") from problem


def load(source="stdlib", tokenizer_name="bytes", cache="data_cache", workers=0, *, field="text", split="train",
         stream=False, block_size=1):
    """-> Corpus, checked for `block_size`. `source`: "stdlib" | "packages" | file, folder or glob (UTF-8 text, .jsonl,
    .parquet) | "hf:NAME[:CONFIG]" | a folder of finished shards. `tokenizer_name`: or a Tokenizer. `cache` None: all in
    memory. Of processes that start together let one go first, or each does all the work. UserError: all the above."""
    tok = tokenizer_name if isinstance(tokenizer_name, Tokenizer) else open_tokenizer(tokenizer_name)
    if (Path(source) / "train_000.bin").exists():
        return check(open_shards(Path(source), tok), block_size)
    hub = source.startswith("hf:")
    if stream and not hub:
        raise UserError(f"--stream is for hf: sources, {source!r} is always read piece by piece: leave --stream out")
    root, files = list_files(source) if not hub else list_files(source[3:]) if Path(source[3:]).is_dir() else ("", [])
    stats = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]  # a hub dataset: by name only
    folder = None  # keep it in memory
    if cache is not None and (source != "stdlib" or tok.name != "bytes"):
        key = json.dumps([FORMAT, source, stats, field, split, tok.name, tok.vocab_size, tok.eot])
        folder = Path(cache) / sha256(key)[:16]
        if (folder / "index.json").exists():  # written last: without it a killed run left half a corpus
            return check(open_shards(folder, tok), block_size)
    shards = {"train": [], "val": []}

    def flush(side, tokens):
        if folder:
            path = folder / f"{side}_{len(shards[side]):03d}.bin"
            write_atomic(path, lambda file: (file.write(header(tok, len(tokens))), tokens.tofile(file)))
            tokens = open_shard(path, tok)
        shards[side].append(tokens)

    fresh = partial(documents, source, root, [source] if hub else files, field, split, stream)
    counts, fingerprint = tokenize(fresh, source, tok, workers, flush)
    if folder:
        index = {**FORMAT, "source": source, "tokenizer": tok.name, "documents": counts, "fingerprint": fingerprint,
                 "shards": {side: len(parts) for side, parts in shards.items()}}
        write_atomic(folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
    corpus = Corpus(Shards(shards["train"]), Shards(shards["val"]), tok, fingerprint, tuple(counts), folder)
    return check(corpus, block_size)


def windows(tokens, block_size, what="the corpus"):
    """-> the number of non-overlapping windows; the last target of one is the next one's first input. UserError: 0."""
    if len(tokens) <= block_size:
        raise UserError(f"{what} has {len(tokens)} tokens, a window needs block_size + 1 = {block_size + 1}: give more "
                        "text or a smaller block size")
    return (len(tokens) - 1) // block_size


def check(corpus, block_size):
    """-> corpus. UserError: its train or val side holds no window."""
    for side, tokens, count in zip(("train", "val"), (corpus.train, corpus.val), corpus.documents):
        windows(tokens, block_size, f"{side} ({count} of the corpus's {sum(corpus.documents)} documents)")
    return corpus


def permute(index, n, seed, epoch):
    """index (N,) in [0, n) -> (N,) int64: a shuffle of 0..n-1, another one for each (seed, epoch), without storing it.
    A Feistel network, (L, R) -> (R, L xor f(R)), is a bijection whatever f is; ours covers the 2·half bits that hold n.
    What lands outside [0, n) goes through again until it is inside ("cycle walking", Black & Rogaway 2002), so a
    bijection it stays. 8 rounds and splitmix64's mixer for f are our choice: unrelated orders, no secrecy."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha512(f"{seed} {epoch}".encode()).digest(), "<u8")  # (8,), one per round

    def shuffle(x):
        left, right = x >> half, x & low
        for key in keys:
            f = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # wraps modulo 2^64
            f = (f ^ (f >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((f ^ (f >> np.uint64(31))) & low)
        return left << half | right

    x = shuffle(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = shuffle(x[outside])
    return x.astype(np.int64)


def batch(tokens, block_size, seed, step, micro, rank=0, *, world=1, micro_batch, micro_steps):
    """-> x, y: (micro_batch, T) int64 on the CPU, T = block_size; y[:, t] follows x[:, t]. Row b is sample
    step·(micro_steps·world·micro_batch) + (micro·world + rank)·micro_batch + b of an endless row of epochs, each of
    which holds every window once, at multiples of T; a last incomplete one is left out (our choice)."""
    import torch
    n = windows(tokens, block_size)
    first = step * (micro_steps * world * micro_batch) + (micro * world + rank) * micro_batch
    epoch, place = np.divmod(np.arange(first, first + micro_batch), n)
    window = np.empty_like(place)
    for e in np.unique(epoch):  # nearly always one
        window[epoch == e] = permute(place[epoch == e], n, seed, e)
    rows = np.stack([tokens[w * block_size:(w + 1) * block_size + 1] for w in window.tolist()])  # (micro_batch, T + 1)
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def epochs(tokens, block_size, samples):
    """How many times over the corpus `samples` windows are."""
    return samples / windows(tokens, block_size)


@dataclass(frozen=True)
class Prepare:
    source: str = "stdlib"  # stdlib; packages; a file, folder or glob (text, .jsonl, .parquet); hf:NAME[:CONFIG]
    tokenizer: str = "bytes"  # bytes, a tiktoken encoding (gpt2, cl100k_base, ...) or a folder with tokenizer.json
    field: str = "text"  # the field or column that holds the text
    split: str = "train"  # of an hf: source, from which we hold out our own val
    stream: bool = False  # hf: do not store the dataset, only its tokens
    cache: str = "data_cache"  # folder of tokenized shards
    workers: int = 0  # tokenizing threads; 0: one per core


def main(settings):
    if settings.workers < 0:
        raise UserError(f"--workers {settings.workers} must be 0 (one per core) or more")
    corpus = load(settings.source, settings.tokenizer, settings.cache, settings.workers, field=settings.field,
                  split=settings.split, stream=settings.stream)
    lengths = corpus.tokenizer.byte_lengths()
    for side, tokens, count in zip(("train", "val"), (corpus.train, corpus.val), corpus.documents):
        text_bytes = sum(int(lengths[tokens[i:i + 2**20]].sum()) for i in range(0, len(tokens), 2**20))
        print(f"{side:5} {count:10,} documents {len(tokens):14,} tokens {text_bytes:14,} bytes of text")
    print(f"fingerprint {corpus.fingerprint}; the hold-out begins:\n{corpus.tokenizer.decode(corpus.val[:800])[:200]}\n"
          f"train on it: python train.py --data {corpus.folder or settings.source} --tokenizer {settings.tokenizer}")


if __name__ == "__main__":
    run(main, parse(Prepare))
