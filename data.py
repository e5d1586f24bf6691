"""Text in, batches out: corpora, and a batch that is a pure function of (seed, step, micro, rank).

    python data.py                                  # this Python's standard library, as bytes
    python data.py --source "tests/*.py"            # your own files; also hf:NAME, --tokenizer gpt2
    python data.py --source packages                # the Python sources of the installed packages
    python train.py --data stdlib:2 texts/*.jsonl   # a mixture, two windows of stdlib to one of each file

1. A corpus is a row of documents. Each is closed by the tokenizer's end-of-text token. One document
   in twenty is held out (`val`). A hash decides which, not chance, so the choice is the same on
   every machine and for every tokenizer; `fingerprint` records it.
2. The standard library as bytes stays in memory. Every other corpus is tokenized once, in threads,
   into shards: files that are mapped into memory, so that a corpus may be larger than memory.
3. A row may also be a chat, or a prompt with its completion (formats/chat.py). Then tokens that are only
   context carry the bit CONTEXT_ONLY, and are no targets.
4. Training reads windows that do not overlap, in a shuffled order. The order is computed and not
   stored, see `permute`. So there is nothing to save or resume, and any number of devices sees the
   same global batches. A mixture takes its windows from several corpora in turn, see `Mixture`.

A text file is one document and is read in pieces, if its tokenizer says that a line ends a word
(`splits_at_lines`). With another tokenizer it is read whole, and takes several times its size.

Not done here: cleaning, removing duplicates, keeping attention within a document. A document that
stands in two sources of a mixture may be held out of one of them only.
"""
import codecs
import hashlib
import itertools
import json
import math
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from common import IGNORED, UserError, first_line, parse, printable, run, write_atomic
from formats import chat
from formats.tokenizer import Tokenizer, open_tokenizer
from methods.dynamic_batches import domain_of

HOLD_OUT = 20                        # one document in so many is held out (our choice)
SHARD_TOKENS = 2**25                 # a shard is written when this many wait: 134 MB as uint32
BLOCK_CHARACTERS = 2**20             # what a thread tokenizes at a time, in whole documents
CONTEXT_ONLY = 2**31                 # the bit of a stored token (uint32) that is no target
FORMAT = {"magic": "nanoprune tokens", "version": 1}
HEAVIEST = 1000                      # the largest weight of a part of a mixture

# Sources that are the .py files of a folder of sysconfig's, without these folders inside.
PYTHON = {"stdlib": "stdlib", "packages": "purelib"}
# Files of rows, each a document; any other file is one document.
ROWS = (".jsonl", ".parquet")
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


# -- documents

@dataclass(frozen=True)
class Source:
    """Where documents come from."""
    name: str                        # as the user gave it
    root: Path                       # the names of files are relative to this folder
    files: list[Path]                # empty for a dataset of the hub
    field: str                       # the field of a row that holds the text
    split: str                       # of a Hugging Face dataset
    stream: bool                     # a Hugging Face dataset is not stored
    in_pieces: bool                  # text files may be cut at line ends

    @property
    def is_dataset(self):
        return self.name.startswith("hf:")

    def documents(self):
        """One pass over (name, pieces), without empty texts; the pieces joined are the text. A row has no
        name, another file its path relative to `root`. A chat is one piece, a Chat. Raises UserError if a
        row has neither a text in `field` nor a chat, or a file is not UTF-8; of Python's own sources such
        a file is left out."""
        if self.is_dataset:
            rows = dataset_rows(self.name, self.field, self.split, self.stream)
            yield from self.texts_of_rows(self.name, rows)
            return
        for path in self.files:
            if path.suffix in ROWS:
                yield from self.texts_of_rows(path, file_rows(path, self.field))
                continue
            text = TextFile(path, self.in_pieces)
            # The standard library has files in other encodings, on purpose.
            if self.name in PYTHON:
                try:
                    text = [read_text(path)]
                except UserError:
                    continue
            if path.stat().st_size:
                yield path.relative_to(self.root).as_posix(), text

    def texts_of_rows(self, where, rows):
        for number, row in rows:
            fields = ", ".join(row) if isinstance(row, dict) else "none"
            text = row.get(self.field) if isinstance(row, dict) else None
            row_chat = None if isinstance(text, str) else chat.chat_of(row)
            if row_chat:
                try:
                    text = Chat(json.dumps(row_chat))
                except TypeError as problem:
                    # Columns of a parquet file or a dataset may hold dates or images.
                    raise UserError(f"{where}:{number} has a chat that no JSON holds ({first_line(problem)}): leave "
                                    "out this field of its messages") from problem
            if not isinstance(text, str):
                raise UserError(f"{where}:{number} has no text in field {self.field!r} (its fields: "
                                f"{fields}), nor messages with roles, nor prompt and completion: mend it or "
                                "prepare it with python data.py --field NAME")
            if text:
                yield None, [text]


class Chat(str):
    """A chat as JSON. It becomes text with the tokenizer's template, when it is encoded."""


@dataclass(frozen=True)
class TextFile:
    """The text of a file as its pieces. Each iteration reads the file."""
    path: Path
    in_pieces: bool

    def __iter__(self):
        if not self.in_pieces:
            yield read_text(self.path)
            return
        waiting = []
        for part in decoded(self.path):
            place = last_line_end(part)
            waiting.append(part[:place])
            if place:
                yield "".join(waiting)
                waiting = []
            waiting.append(part[place:])
        rest = "".join(waiting)
        if rest:
            yield rest


def decoded(path):
    """A file of UTF-8 -> its text, about BLOCK_CHARACTERS at a time. Raises UserError if it is not
    UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while content := file.read(BLOCK_CHARACTERS):
            try:
                yield decoder.decode(content)
            except UnicodeDecodeError as problem:
                # The decoder may have kept bytes of a character from before.
                raise not_utf8(path, file.tell() - len(problem.object) + problem.start) from problem
        unfinished, _ = decoder.getstate()
        if unfinished:
            raise not_utf8(path, file.tell() - len(unfinished))


def last_line_end(text):
    """The place behind the last line end that no word reaches across, or 0: the one between a character
    that is no blank and a letter or digit."""
    place = text.rfind("\n")
    while place > 0:
        if text[place + 1:place + 2].isalnum() and not text[place - 1].isspace():
            return place + 1
        place = text.rfind("\n", 0, place)
    return 0


def read_text(path):
    """A file -> its text, byte for byte: line ends stay as they are. Raises UserError if it is not
    UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise not_utf8(path, problem.start) from problem


def not_utf8(path, byte):
    return UserError(f"{path} is not UTF-8 text (byte {byte}): convert it, or choose files with a glob such as "
                     "'folder/**/*.txt'")


def open_source(name, field, split, stream, in_pieces=False):
    """Raises UserError if there are no such files, or if a setting has no effect on them."""
    is_dataset = name.startswith("hf:")
    if stream and not is_dataset:
        raise UserError(f"--stream is for hf: sources, {name!r} is always read piece by piece: leave "
                        "--stream out")
    if split != "train" and not is_dataset:
        raise UserError(f"--split is for hf: sources, {name!r} has no split {split!r}: leave --split out")
    if not is_dataset:
        root, files = list_files(name)
    elif Path(name[3:]).is_dir():
        root, files = list_files(name[3:])
    else:
        root = Path()
        files = []
    if field != "text" and not is_dataset and not any(path.suffix in ROWS for path in files):
        raise UserError(f"--field {field} is for rows ({', '.join(ROWS)} and hf: sources), {name!r} holds none: leave "
                        "--field out")
    return Source(name, root, files, field, split, stream, in_pieces)


def list_files(source):
    """A name in PYTHON, a file, a folder (hidden files left out) or a glob -> (the folder that names
    are relative to, files). Raises UserError if there are none.

    Packages bring copies of one another, so that one text may be on both sides of the hold-out."""
    if not source:
        raise UserError("the source of a corpus has no name: give stdlib, packages, a file, folder or glob, or hf:NAME")
    is_python = source in PYTHON
    path = Path(sysconfig.get_paths()[PYTHON[source]] if is_python else source).expanduser()
    if path.is_dir():
        root = path
        files = walk(root, is_python)
    elif os.path.lexists(path):
        root = path.parent
        files = [path]
    else:
        # The folder is what stands in front of the first wildcard.
        before_wildcard = itertools.takewhile(lambda part: not set("*?[") & set(part), path.parts)
        root = Path(*before_wildcard)
        files = [Path(match) for match in glob(str(path), recursive=True) if not Path(match).is_dir()]
    if is_python:
        files = [path for path in files if path.is_file()]
    for path in files:
        refuse_no_file(path)
    if not files:
        raise UserError(f"no file matches {source!r} in {os.getcwd()}: give stdlib, packages, a "
                        "file, folder or glob, or hf:NAME")
    # The system lists files in any order; a corpus has one order.
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def refuse_no_file(path):
    """Raise UserError for a link to nothing, and for what would wait for its writer: a pipe or a device."""
    if path.is_file():
        return
    if path.is_symlink():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove the link, or "
                        "choose files with a glob such as 'folder/**/*.txt'")
    raise UserError(f"{path} is no file but a pipe, socket or device: remove it, or choose files with a glob such as "
                    "'folder/**/*.txt'")


def walk(root, is_python):
    """The files below a folder. (Path.rglob is slow: site-packages can hold 100,000 files.)"""
    files = []
    for folder, inside, names in os.walk(root):
        # os.walk goes on into the folders that are left in this list.
        inside[:] = [name for name in inside if not name.startswith(".")]
        if is_python:
            inside[:] = [name for name in inside if name not in NOT_CORPUS]
            names = [name for name in names if name.endswith(".py")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files


def file_rows(path, field):
    """The rows of a .jsonl or .parquet file: (number of the line or row, dict), …. Raises UserError
    if a line is not JSON or the parquet file is not whole."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as problem:
                    raise UserError(f"{path}:{number} is not JSON ({problem}): mend or remove the "
                                    "line") from problem
        return
    import pyarrow.parquet
    # What the system refuses (no permission) passes through here and is not called damaged below.
    open(path, "rb").close()
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            # If the field is missing all columns are read, for the error to list them.
            columns = columns_of(field, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=1024, columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as problem:
        raise UserError(f"{path} is not a whole parquet file ({first_line(problem)}): get it again") from problem


def columns_of(field, names):
    """The columns to read of those with these names; None: all."""
    if field in names:
        return [field]
    return [name for name in ("messages", "prompt", "completion") if name in names] or None


def dataset_rows(source, field, split, stream):
    """The rows of "hf:NAME[:CONFIG]": (row number, dict), …. NAME is on the hub, a folder of JSONL or
    parquet files, or a folder made by `save_to_disk`. With `stream` the dataset is not stored, only
    our tokens. Raises UserError if it cannot be loaded."""
    import datasets
    name, _, config = source[3:].partition(":")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(name)
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(name, config or None, split=split, streaming=stream)
        # Where the columns are known, the other ones are not read.
        columns = columns_of(field, rows.column_names or [])
        if columns:
            rows = rows.select_columns(columns)
        yield from enumerate(rows, 1)
    except Exception as problem:     # `datasets` passes on whatever readers, hub and network raise
        raise UserError(f"cannot load {source} split {split!r} ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())}): check name, configuration, split and "
                        "network, or use stdlib") from problem


# -- the hold-out

def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def sha256(text):
    return hashlib.sha256(encoded(text)).hexdigest()


def number_of(name, pieces):
    """A document's number: the sha256 of its name, or of its text if it has no name."""
    return int(sha256("".join(pieces) if name is None else name), 16)


def crop(pieces, start, stop):
    """The characters from `start` to `stop` of a text in pieces, in pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, start - position):max(0, stop - position)]
        position += len(piece)
        if part:
            yield part


def hold_out(source):
    """-> a function (name, pieces) -> [(side, pieces), …] that puts a document on side "train" or "val".

    To val go documents whose number is divisible by HOLD_OUT. If that would leave a side empty, the
    document with the smallest number goes to val; of a single document, its last tenth. Raises
    UserError if there is no text, or if all documents are the same."""
    def by_number(name, pieces):
        return [("train" if number_of(name, pieces) % HOLD_OUT else "val", pieces)]

    def smallest(name, pieces):
        return [("val" if number_of(name, pieces) == min(numbers) else "train", pieces)]

    def last_tenth(name, pieces):
        length = sum(len(piece) for piece in pieces)
        cut = length - max(1, length // 10)
        return [("train", crop(pieces, 0, cut)), ("val", crop(pieces, cut, length))]

    numbers = []
    sides = set()
    pieces = []
    for name, pieces in source.documents():
        numbers.append(number_of(name, pieces))
        sides.add(numbers[-1] % HOLD_OUT == 0)
        if len(sides) == 2:          # both sides have one: the rest need not be read
            return by_number
    if not numbers:
        raise UserError(f"{source.name!r} holds no text: give a source with at least one document "
                        "that is not empty")
    if len(numbers) == 1 and isinstance(pieces, list) and isinstance(pieces[0], Chat):
        raise UserError(f"{source.name!r} is one chat, of which no part can be held out: give two or more")
    if len(numbers) == 1:
        return last_tenth
    if len(set(numbers)) == 1:
        raise UserError(f"the {len(numbers)} documents of {source.name!r} all have the same text, so that none can be "
                        "held out from the others: give different documents, or one file with the text")
    return smallest


# -- tokens

def tokenize(source, tok, workers, flush):
    """Call flush(side, tokens) for about SHARD_TOKENS at a time -> ([train, val] documents,
    fingerprint). The documents' order is kept, whatever the number of threads (0: one per core)."""
    from tqdm import tqdm
    workers = workers or os.cpu_count()
    counts = {"train": 0, "val": 0}
    waiting = {"train": [], "val": []}
    digest = hashlib.sha256()
    todo = blocks(source, counts, digest)
    bar = tqdm(unit=" tokens", unit_scale=True, leave=False, disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        # Tokenizers release Python's lock, so that threads use all cores.
        # In groups, because pool.map alone would read the whole corpus at once.
        while group := list(itertools.islice(todo, 4 * workers)):
            sides, texts = zip(*group)
            for side, tokens in zip(sides, pool.map(encode_block, itertools.repeat(tok), texts)):
                waiting[side].append(tokens)
                bar.update(len(tokens))
                if sum(map(len, waiting[side])) >= SHARD_TOKENS:
                    flush(side, np.concatenate(waiting[side]))
                    waiting[side] = []
    for side, parts in waiting.items():
        if parts:
            flush(side, np.concatenate(parts))
    return list(counts.values()), digest.hexdigest()[:16]


def blocks(source, counts, digest):
    """The texts of a source in blocks: (side, pieces of texts), …, with None behind each document. A
    block has at least BLOCK_CHARACTERS; only the last one of a side may be shorter. Every document is
    added to `counts` and `digest`."""
    sides_of = hold_out(source)
    texts = {"train": [], "val": []}
    characters = {"train": 0, "val": 0}
    for name, document in source.documents():
        for side, pieces in sides_of(name, document):
            counts[side] += 1
            text_digest = hashlib.sha256()
            for piece in itertools.chain(pieces, [None]):
                texts[side].append(piece)
                if piece is not None:
                    text_digest.update(encoded(piece))
                    characters[side] += len(piece)
                # What follows a chat must know whether its last token counts.
                if characters[side] >= BLOCK_CHARACTERS and not isinstance(piece, Chat):
                    yield side, texts[side]
                    texts[side] = []
                    characters[side] = 0
            # Texts make the fingerprint, not tokens: it is equal for all tokenizers.
            digest.update(json.dumps([side, name, text_digest.hexdigest()]).encode())
    # What is left is shorter than a block.
    for side in texts:
        if texts[side]:
            yield side, texts[side]


def encode_block(tok, pieces):
    """Pieces of texts -> (N,) their tokens, with the end-of-text token where there is None. Behind a
    token that is only context, the end of a text is only context, too."""
    end = np.array([tok.eot], tok.dtype)
    encoded_pieces = iter(tok.encode_batch([piece for piece in pieces if type(piece) is str]))
    parts = []
    for piece in pieces:
        if isinstance(piece, Chat):
            ids, is_context = chat.encode(tok, json.loads(piece))
            parts.append(ids.astype("<u4") | np.where(is_context, CONTEXT_ONLY, 0).astype("<u4"))
        elif piece is not None:
            parts.append(next(encoded_pieces))
        elif parts and len(parts[-1]) and parts[-1][-1] >= CONTEXT_ONLY:
            parts.append(end.astype("<u4") | np.uint32(CONTEXT_ONLY))
        else:
            parts.append(end)
    return np.concatenate(parts)


def without_marks(tokens):
    """Stored tokens as a tokenizer knows them."""
    return tokens & np.uint32(CONTEXT_ONLY - 1) if tokens.dtype.itemsize == 4 else tokens


# -- shards

class Shards:
    """Several (N_i,) arrays read as one: len(), and [start:stop] -> (stop - start,), a copy only
    where shards meet."""

    def __init__(self, parts):
        self.parts = parts
        self.starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, key):
        start, stop, step = key.indices(len(self))
        assert step == 1, "Shards are read as [start:stop]"
        pieces = []
        for part, offset in zip(self.parts, self.starts):
            # What [start:stop] covers of this shard, counted from its own beginning.
            if offset < stop and start < offset + len(part):
                pieces.append(part[max(start - offset, 0):stop - offset])
        if not pieces:
            return self.parts[0][:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def header(tok, dtype, tokens):
    """A shard's first 256 bytes, JSON padded with blanks; the tokens follow, little-endian."""
    content = {**FORMAT, "dtype": dtype.str, "tokens": tokens, "tokenizer": tok.name}
    return json.dumps(content).encode().ljust(256)


def write_shard(path, tok, tokens):
    def write(file):
        file.write(header(tok, tokens.dtype, len(tokens)))
        tokens.tofile(file)

    write_atomic(path, write)


def open_shard(path, tok):
    """-> (N,) memory map, read-only: in the tokenizer's dtype, or uint32 if it holds chats. Raises
    UserError if the header is not the one for this length and tokenizer."""
    with open(path, "rb") as file:
        first = file.read(256)
        size = file.seek(0, os.SEEK_END)
    # The header says how many tokens follow, so a file that was cut short cannot pass.
    for dtype in (tok.dtype, np.dtype("<u4")):
        tokens, rest = divmod(size - 256, dtype.itemsize)
        if not rest and first == header(tok, dtype, tokens):
            return np.memmap(path, dtype, mode="r", offset=256)
    raise UserError(f"shard {path} ({size:,} bytes) is cut short or of another version, it begins "
                    f"{first.strip()!r}: delete {path.parent} and run again")


# -- mixtures

class Mixture:
    """Several rows of tokens whose windows take turns. With weights 2 and 1 the parts follow each other
    as A B A, A B A, …; each part has its own shuffle and its own epochs. So a batch stays a pure
    function of (seed, step, micro, rank), and adding tokens to one part moves nothing in the others.

    parts    [(N_i,) tokens]
    weights  whole numbers, one a part; divided by their common divisor
    pattern  (period,) the part of each window of a turn; period is the sum of the weights"""

    def __init__(self, parts, weights):
        divisor = math.gcd(*weights)
        self.parts = list(parts)
        self.weights = [weight // divisor for weight in weights]
        # Window k of a part with weight w stands at (k + 1/2) / w of a turn: as evenly as can be.
        part = np.repeat(np.arange(len(self.parts)), self.weights)
        rank = np.concatenate([np.arange(weight) for weight in self.weights])
        order = np.argsort((rank + 0.5) / np.take(self.weights, part), kind="stable")
        self.pattern = part[order]
        self.ranks = rank[order]

    def __len__(self):
        return sum(map(len, self.parts))

    def of_part(self, index, samples):
        """Numbers of samples of the mixture (N,) -> which of them are of this part, (N,) bool, and
        which samples of the part these are."""
        turn, place = np.divmod(samples, len(self.pattern))
        is_of_part = self.pattern[place] == index
        own = turn * self.weights[index] + self.ranks[place]
        return is_of_part, own[is_of_part]

    def windows(self, block_size, what):
        """-> the number of samples before one of the parts repeats itself."""
        repeats = []
        for index, (part, weight) in enumerate(zip(self.parts, self.weights)):
            turn, rank = divmod(windows(part, block_size, what), weight)
            repeats.append(turn * len(self.pattern) + int(np.flatnonzero(self.pattern == index)[rank]))
        return min(repeats)


def weights_of(names):
    """The names of a mixture's sources, "NAME" or "NAME:WEIGHT", or one name -> {name: weight}. An end
    of digits is a weight, unless a file has this name. Raises UserError if there is no name, for a
    weight that is not between 1 and HEAVIEST, or for a name that stands twice."""
    weights = {}
    names = [names] if isinstance(names, str) else names
    if not names:
        raise UserError("--data names no text: give stdlib, packages, a file, folder or glob, or hf:NAME")
    for entry in names:
        name, _, digits = entry.rpartition(":")
        weight = 1
        if name and digits.isdecimal() and not Path(entry).exists():
            weight = int(digits)
        else:
            name = entry
        if not 1 <= weight <= HEAVIEST:
            raise UserError(f"the weight in --data {entry} must be a whole number between 1 and {HEAVIEST}; where "
                            f"{digits} is part of the name, give {entry}:1")
        if name in weights:
            raise UserError(f"--data names {name} twice; give one name with a weight, as {name}:2")
        weights[name] = weight
    return weights


def recorded(names):
    """Sources as records and checkpoints hold them: one as its name, several as a list."""
    if isinstance(names, str):
        return names
    return names[0] if len(names) == 1 else list(names)


# -- corpora

@dataclass(frozen=True)
class Corpus:
    train: Shards | Mixture          # len() and [start:stop] -> (N,) uint16 or uint32
    val: Shards                      # of a mixture: the hold-outs of all parts, one after the other
    tokenizer: Tokenizer
    fingerprint: str                 # 16 hex digits of sha256 over side, name and content of all
                                     # documents; equal for all tokenizers
    documents: tuple[int, int]       # in train, in val; a single document that was cut is in both
    folder: Path | None              # of its shards, itself a source for `load`; None: in memory
    name: str = ""                   # the source
    parts: tuple["Corpus", ...] = () # of a mixture

    @property
    def domains(self):
        """{source: tokens of its hold-out}"""
        return {part.name: part.val for part in self.parts or (self,)}

    @property
    def shares(self):
        """{source: its share of the training windows}"""
        if not self.parts:
            return {self.name: 1.0}
        period = len(self.train.pattern)
        return {part.name: weight / period for part, weight in zip(self.parts, self.train.weights)}


def load_mixture(names, tokenizer="bytes", *, block_size=1, opened=None, **options):
    """-> the Corpus of one source or of several, see `weights_of` and `load`. A source that stands in
    `opened`, {name: Corpus}, is taken from there."""
    weights = weights_of(names)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = open_tokenizer(tokenizer)
    parts = dict(opened or {})
    for name in weights:
        parts[name] = parts.get(name) or load(name, tokenizer, block_size=block_size, **options)
    parts = tuple(parts[name] for name in weights)
    if len(parts) == 1:
        return parts[0]
    train = Mixture([part.train for part in parts], weights.values())
    val = Shards([*itertools.chain.from_iterable(part.val.parts for part in parts)])
    prints = [part.fingerprint for part in parts]
    fingerprint = sha256(json.dumps([prints, train.weights]))[:16]
    documents = np.sum([part.documents for part in parts], axis=0).tolist()
    return Corpus(train, val, tokenizer, fingerprint, tuple(documents), None, " ".join(names), parts)


def load(source="stdlib", tokenizer_name="bytes", cache="data_cache", workers=0, *, field="text",
         split="train", stream=False, block_size=1):
    """-> Corpus, with at least one window of `block_size` tokens on each side.

    source: "stdlib", "packages", a file, folder or glob (UTF-8 text, .jsonl, .parquet),
    "hf:NAME[:CONFIG]", or a folder of finished shards. tokenizer_name: a name or a Tokenizer.
    cache: the folder for shards; None keeps all in memory. Of processes that start together let one
    go first, or each does all the work. Raises UserError if any of that cannot be read or is too
    short."""
    # A run hands in the tokenizer of its model.
    if isinstance(tokenizer_name, Tokenizer):
        tok = tokenizer_name
    else:
        tok = open_tokenizer(tokenizer_name)
    # A folder of finished shards is a source that needs no work.
    folder = Path(source).expanduser()
    if (folder / "train_000.bin").exists():
        if (field, split, stream) != ("text", "train", False):
            raise UserError(f"{source} holds finished tokens, on which --field, --split and --stream have no effect: "
                            "leave them out")
        return check(open_shards(folder, tok, str(source)), block_size)
    source = open_source(source, field, split, stream, tok.splits_at_lines)
    # Reading the standard library as bytes takes no longer than reading its shards.
    folder = None
    if cache is not None and (source.name != "stdlib" or tok.name != "bytes"):
        folder = Path(cache).expanduser() / cache_key(source, tok)
        if (folder / "index.json").exists():
            return check(open_shards(folder, tok, source.name), block_size)
    shards = {"train": [], "val": []}

    def flush(side, tokens):
        if folder:
            path = folder / f"{side}_{len(shards[side]):03d}.bin"
            write_shard(path, tok, tokens)
            tokens = open_shard(path, tok)
        shards[side].append(tokens)

    # Tokens are written as they come, and mapped into memory: they need not fit into it.
    counts, fingerprint = tokenize(source, tok, workers, flush)
    if folder:
        # The index is written last. Without it a killed run left half a corpus.
        numbers = {side: len(parts) for side, parts in shards.items()}
        index = {**FORMAT, "source": source.name, "tokenizer": tok.name, "documents": counts,
                 "fingerprint": fingerprint, "shards": numbers}
        write_atomic(folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
    corpus = Corpus(Shards(shards["train"]), Shards(shards["val"]), tok, fingerprint, tuple(counts),
                    folder, source.name)
    return check(corpus, block_size)


def cache_key(source, tok):
    """The name of a corpus's folder: a hash over all that its tokens depend on. A file counts by its
    size and time of change, a dataset of the hub by its name only."""
    files = []
    for path in source.files:
        # Reading all files to know whether they changed would take too long.
        stat = path.stat()
        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    key = [FORMAT, source.name, files, source.field, source.split, tok.name, tok.vocab_size, tok.eot]
    has_rows = source.is_dataset or any(path.suffix in ROWS for path in source.files)
    if has_rows and tok.chat_template:
        key.append([tok.chat_template.text, tok.chat_template.tokens])
    return sha256(json.dumps(key))[:16]


def open_shards(folder, tok, name):
    """A folder that `load` finished -> Corpus, called `name`. Raises UserError if it is unfinished, damaged, or of
    another tokenizer."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["tokenizer"] != tok.name:
            raise UserError(f"{folder} holds tokens of {index['tokenizer']!r}, not of {tok.name!r}: "
                            f"give --tokenizer {index['tokenizer']}")
        sides = []
        for side in ("train", "val"):
            paths = [folder / f"{side}_{i:03d}.bin" for i in range(index["shards"][side])]
            sides.append(Shards([open_shard(path, tok) for path in paths]))
        return Corpus(*sides, tok, index["fingerprint"], tuple(index["documents"]), folder, name)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as problem:
        raise UserError(f"{folder} is unfinished or damaged ({problem}): delete it and tokenize "
                        "again") from problem


def check(corpus, block_size):
    """-> corpus. Raises UserError if its train or val side holds no window."""
    total = sum(corpus.documents)
    for side, tokens, count in zip(("train", "val"), (corpus.train, corpus.val), corpus.documents):
        windows(tokens, block_size, f"{side} ({count} of {total} documents of {corpus.name!r})")
    return corpus


# -- batches

def windows(tokens, block_size, what="the corpus"):
    """-> the number of windows that do not overlap; the last target of one is the next one's first
    input. Of a mixture, the number before a part repeats itself. Raises UserError if there is none."""
    if isinstance(tokens, Mixture):
        return tokens.windows(block_size, what)
    if len(tokens) <= block_size:
        raise UserError(f"{what} has {len(tokens)} tokens, a window needs block_size + 1 = "
                        f"{block_size + 1}: give more text or a smaller block size")
    return (len(tokens) - 1) // block_size


def permute(index, n, seed, epoch):
    """index (N,) in [0, n) -> (N,) int64: each index's place in a shuffle of 0 … n-1. Every (seed,
    epoch) has another shuffle, and none is stored.

    The shuffle is a Feistel network. It cuts a number of 2·half bits into a left and a right half
    and repeats (left, right) -> (right, left xor f(right)). Whatever f is, that step can be undone,
    so no two numbers can meet: every number of 2·half bits has a place of its own. A place outside
    [0, n) is sent through again until it is inside ("cycle walking", Black & Rogaway 2002). Eight
    rounds and splitmix64's mixer as f are our choice: the orders look unrelated; nothing is secret."""
    # 2^(2·half) is at most 4·n, so that on average a number is sent through fewer than 4 times.
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha512(f"{seed} {epoch}".encode()).digest(), "<u8")   # (8,) a round

    def shuffle(x):
        # All of `index` at once; one key a round.
        left = x >> half
        right = x & low_bits
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)      # wraps modulo 2^64
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
            previous = left
            left = right
            right = previous ^ (mixed & low_bits)
        return left << half | right

    x = shuffle(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = shuffle(x[outside])
    return x.astype(np.int64)


def batch(tokens, block_size, seed, step, micro, rank=0, *, world=1, micro_batch, micro_steps, weights=None):
    """-> x, y: (micro_batch, T) int64 on the CPU, with T = block_size; y[:, t] follows x[:, t], and is
    IGNORED where it is only context.

    Row b is sample step·(micro_steps·world·micro_batch) + (micro·world + rank)·micro_batch + b of an
    endless row. Processes take samples in order: the global batch is the same for any number of them.
    `tokens`: (N,), or a Mixture, whose parts each have an endless row. With `weights`, one for each part,
    chance takes the place of the mixture's turns: see dynamic_batches.domain_of. No window of a part with
    n windows then comes twice within n samples."""
    import torch
    first = step * (micro_steps * world * micro_batch) + (micro * world + rank) * micro_batch
    samples = np.arange(first, first + micro_batch)
    if isinstance(tokens, Mixture):
        rows = np.empty((micro_batch, block_size + 1), np.int64)
        drawn = None if weights is None else domain_of(samples, weights, seed)
        for index, part in enumerate(tokens.parts):
            if drawn is None:
                is_of_part, own = tokens.of_part(index, samples)
            else:
                is_of_part = drawn == index
                own = samples[is_of_part]
            if own.size:
                rows[is_of_part] = read_samples(part, block_size, (seed, index), own)
    else:
        rows = read_samples(tokens, block_size, seed, samples)
    return inputs_and_targets(torch.from_numpy(rows))


def inputs_and_targets(rows):
    """Stored tokens (B, T + 1) int64 -> x, y: (B, T) each. x has no marks; y is IGNORED where there is
    one."""
    x = rows[:, :-1] & (CONTEXT_ONLY - 1)
    y = rows[:, 1:].contiguous()
    return x, y.masked_fill(y >= CONTEXT_ONLY, IGNORED)


def read_samples(tokens, block_size, seed, samples):
    """The windows of these numbers (N,) in the endless row of epochs of `tokens`: (N, T + 1) int64. An
    epoch holds every window once; windows begin at multiples of T. A last window that is not whole is
    left out (our choice)."""
    n = windows(tokens, block_size)
    epoch, place = np.divmod(samples, n)
    window = np.empty_like(place)
    for number in np.unique(epoch):  # nearly always one
        rows = epoch == number
        window[rows] = permute(place[rows], n, seed, number)
    starts = (window * block_size).tolist()
    # T + 1 tokens, as the targets are the inputs one token later.
    return np.stack([tokens[start:start + block_size + 1] for start in starts]).astype(np.int64)


def epochs(corpus, block_size, samples):
    """How many times over the training text of each source `samples` windows are: {source: number}."""
    parts = corpus.parts or (corpus,)
    return {part.name: samples * corpus.shares[part.name] / windows(part.train, block_size) for part in parts}


# -- the command

@dataclass(frozen=True)
class Prepare:
    source: str = "stdlib"           # stdlib; packages; file, folder or glob; hf:NAME[:CONFIG]
    tokenizer: str = "bytes"         # bytes, a tiktoken encoding (gpt2, …) or a model's folder
    field: str = "text"              # the field or column that holds the text
    split: str = "train"             # of an hf: source, from which we hold out our own val
    stream: bool = False             # hf: do not store the dataset, only its tokens
    cache: str = "data_cache"        # folder of tokenized shards
    workers: int = 0                 # tokenizing threads; 0: one per core


def main(settings):
    if settings.workers < 0:
        raise UserError(f"--workers {settings.workers} must be 0 (one per core) or more")
    corpus = load(settings.source, settings.tokenizer, settings.cache, settings.workers,
                  field=settings.field, split=settings.split, stream=settings.stream)
    for side, tokens, count in zip(("train", "val"), (corpus.train, corpus.val), corpus.documents):
        size = count_bytes(tokens, corpus.tokenizer)
        print(f"{side:5} {count:10,} documents {len(tokens):14,} tokens {size:14,} bytes of text")
    beginning = corpus.tokenizer.decode(without_marks(corpus.val[:800]))[:200]
    print(f"fingerprint {corpus.fingerprint}; the hold-out begins:\n{printable(beginning)}\n"
          f"train on it: python train.py --data {corpus.folder or settings.source} "
          f"--tokenizer {settings.tokenizer}")


def count_bytes(tokens, tokenizer):
    """The bytes of text that tokens stand for, a million tokens at a time."""
    lengths = tokenizer.byte_lengths()
    total = 0
    for start in range(0, len(tokens), 2**20):
        total += int(lengths[without_marks(tokens[start:start + 2**20])].sum())
    return total


if __name__ == "__main__":
    run(main, parse(Prepare))
