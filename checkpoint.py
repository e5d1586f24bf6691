"""A model on disk and a run on disk: written whole or not at all, and read without running code.

    python -c "import checkpoint; print(checkpoint.load('runs/idea-laptop-0')[0].config)"

`load` opens every kind of model for every script: our checkpoint, a run's folder, a Hugging Face
folder or a hub id. `open_weights` opens the same without reading weights, for a process that holds
only some rows of them (shard.py). A run is a folder, and `RunFolder` knows its files:

    ckpt_<step>.pt   the newest two; each is the state *before* that step's events, all that a step changes (`State`)
    ckpt_<step>/     the same of a sharded model: model/ and optimizer/ by all processes (formats/dcp.py), and
                     state.pt for the rest
    teacher.pt       the enlarged model before the first cut, where it became the teacher; it is never rotated away.
                     Or teacher/, likewise
    metrics.jsonl    the records that docs/records.md lists, rewound on resume to the moment of the checkpoint

No state of a random-number generator is kept. After the initial weights nothing draws from one, and
batches are a function of the step. Not here: the loop (train.py), the files of Hugging Face
(formats/huggingface.py).
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from filelock import FileLock, Timeout

import shard
from common import (
    Damaged,
    UserError,
    append_record,
    commit,
    first_line,
    read_pickled_tensors,
    read_records,
    write_atomic,
)
from distill import freeze
from formats import dcp, huggingface, origin, pt
from formats.tokenizer import FILES, has_tokenizer, open_tokenizer
from model import GPT, GPTConfig, check_values, config_from, from_weights, shapes_of, with_context

# In the first, one digest is over everything. In the second, each large tensor has its own.
FORMATS = ("nanoprune checkpoint 1", "nanoprune checkpoint 2")
FORMAT = FORMATS[-1]

# What write_atomic calls a file until it is whole; also a folder, and while that is removed.
TEMPORARY = ".*." + "[0-9a-f]" * 16 + ".tmp"

# Two calls of the same run may differ in these settings.
NOT_IDENTITY = ("stage", "device", "out", "compile", "shard", "recompute")

# The parts that a run's wall time is divided into.
PARTS = ("train", "score", "cut", "slice", "eval", "save")


# -- a model on disk

def save(path, model, **state):
    """Write {"format", "config", "model", **state} to `path`. `state` is plain Python and tensors
    (the tokenizer's name, step, optimizer …), so that it loads with weights_only=True. Raises
    UserError for a model that no GPTConfig describes."""
    write(path, content_of(model, state))


def save_made(folder, model, tokenizer, source, made, **state):
    """Write a model that was made of another one as the folder of a run with one checkpoint. `source` is
    the origin of the model (formats/origin.py). `made` says how, and stands where a run has its settings."""
    save(folder / "ckpt_00000000.pt", model, step=0, tokenizer_files=tokenizer.files, **state, origin=source,
         run={"tokenizer": tokenizer.name, **made})


def content_of(model, state):
    """What a checkpoint holds, except for its digests."""
    # torch.compile's wrapper would prefix every name.
    plain = getattr(model, "_orig_mod", model)
    refuse_evaluation_only(plain)
    return {"config": asdict(plain.config), "model": plain.state_dict(), **state, "format": FORMAT}


def write(path, content):
    """Write the content of a checkpoint with its digests, under a temporary name that is fsynced and
    then renamed. Raises UserError if the disk is full."""
    pt.seal(content)

    # torch.load never reads the checksums, and they would take a third of the time. (unzip misses
    # them.)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with pt.refusing_a_full_disk(path, content):
            write_atomic(path, lambda file: torch.save(content, file))
    finally:
        torch.serialization.set_crc32_options(checksums)


def refuse_evaluation_only(model):
    """Raise UserError for a baseline that is more than its GPTConfig: a subclass of GPT."""
    if type(model) is not GPT and not shard.is_sharded(model):
        raise UserError(f"this model is for evaluation only, as {model.evaluation_only}, which no GPTConfig and no "
                        "runtime has; cut another way to save or export it")


def checkpoints(folder):
    """The checkpoints in a run's folder, oldest first: files ckpt_<step in 8 digits>.pt, and folders
    ckpt_<step in 8 digits>."""
    names = "ckpt_" + "[0-9]" * 8
    folders = [path for path in Path(folder).glob(names) if path.is_dir()]
    return sorted([*Path(folder).glob(names + ".pt"), *folders])


def newest(folder):
    """The checkpoint with the highest step in a run's folder, or None."""
    return max(checkpoints(folder), default=None)


def step_of(checkpoint):
    """The step of a checkpoint in a run's folder."""
    return int(checkpoint.name[5:13])


@dataclass(frozen=True)
class Weights:
    """A model on disk that is opened, and whose weights are read when they are asked for."""
    config: GPTConfig
    about: dict                   # what `load` returns besides the model
    tensors: object               # has rows(name, start, stop) and where(name)
    moments: object = None        # the same of an optimizer

    @functools.cached_property
    def shapes(self):
        """{name: shape} of the parameters, in the model's order."""
        return shapes_of(self.config)

    def rows(self, name, start, stop, dtype=None):
        """The rows [start, stop) of a parameter, in main memory and in the stored dtype. Raises Damaged
        if they are not what was written, and UserError if they are not finite, now or in `dtype`."""
        rows = self.tensors.rows(name, start, stop)
        file, stored_name = self.tensors.where(name)
        check_values(rows, dtype or rows.dtype, stored_name, file)
        return rows


def load(path, device="cpu", dtype=None, block_size=None):
    """Open a checkpoint, a run's folder (its newest), a Hugging Face folder or a hub id: -> (GPT,
    about).

    `dtype` None keeps the stored one. With the device "meta" no weights are read, only their
    config. `block_size` is the context that is wanted, at most the trained one; None takes all.
    `about` holds what `save` was given besides the model; for a Hugging Face folder {"huggingface":
    its config.json, "tokenizer_files", "origin": see formats/origin.py}. It stays in main memory, and
    its "optimizer" in the file until it is used. Raises UserError for a file that is missing,
    truncated, of another version or of another shape than it says."""
    reads = str(device) != "meta"

    def open_and_read(place):
        weights = open_place(place, path, block_size, reads)
        return whole_model(weights, device, dtype), weights.about

    return first_undamaged(path, open_and_read)


def open_weights(path, block_size=None):
    """Open what `load` opens, without reading weights: -> Weights."""
    return first_undamaged(path, lambda place: open_place(place, path, block_size, reads=True))


def open_place(place, path, block_size, reads):
    """Open one checkpoint or Hugging Face folder on this machine, which the user calls `path`: ->
    Weights. If no weights will be read (not `reads`), they are not looked at."""
    if not is_huggingface(place):
        return open_checkpoint(place, block_size, reads)
    weights = Weights(*huggingface.open_weights(place, block_size, reads))
    if place != Path(path):
        weights.about["origin"]["name"] = str(path)      # a hub id; the folder's name is a hash
    return weights


def whole_model(weights, device, dtype=None):
    """The model on the device, in `dtype` or as it is stored. On the device "meta" it has no weights.
    Raises UserError for a Hugging Face folder that mixes dtypes."""
    with torch.device("meta"):
        model = GPT(weights.config)
    if str(device) == "meta":
        return model if dtype is None else model.to(dtype)
    tensors = {}
    for name, shape in weights.shapes.items():
        rows = weights.rows(name, 0, shape[0], dtype)
        # A copy: the file may be replaced while the model is used.
        tensors[name] = rows.to(device, dtype or rows.dtype, copy=True)
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1 and "huggingface" in weights.about:
        raise UserError(f"{weights.tensors.folder} mixes {' and '.join(dtypes)}; choose one by --dtype")
    model.load_state_dict(tensors, assign=True)
    return model


def is_huggingface(folder):
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def first_undamaged(path, open_place, agree=None):
    """What `open_place` makes of what is at `path`. If the newest checkpoint in the folder of a run is
    damaged, it is the one before, and a sentence says so. `agree`: see RunFolder.agree."""
    place = find(path)
    if is_huggingface(place):
        return open_place(place)
    is_run = place.is_dir() and not (place / "state.pt").exists()
    candidates = checkpoints(place)[::-1] if is_run else [place]
    if not candidates or not candidates[0].exists():
        raise UserError(f"no checkpoint at {place}; give a ckpt_*.pt file, the folder of a run, a Hugging Face folder "
                        "or a hub id such as HuggingFaceTB/SmolLM2-135M")
    damages = []
    for candidate in candidates:
        opened = None
        damage = None
        try:
            opened = open_place(candidate)
        except Damaged as problem:
            damage = str(problem)
        if agree is not None:
            damage = agree(damage)
        if damage is None:
            for damage in damages:
                print(f"warning: {damage}; going on from {candidate.name}", file=sys.stderr)
            return opened
        damages.append(damage)
    raise UserError(f"{'; '.join(damages)}; restore the file from a copy")


def find(path):
    """`path` if it exists, else the local copy of the hub's repository of that name. Raises
    UserError if neither is to be had."""
    local = Path(path)
    could_be_a_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not local.parent.exists()
    if local.exists() or not could_be_a_hub_id:
        return local
    import huggingface_hub
    files = ["*config.json", "model*.safetensors*", *FILES, "additional_chat_templates/*", "README.md", *origin.LEGAL]
    try:
        folder = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=files))
        if not list(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(str(path), allow_patterns=["pytorch_model*.bin*"])
        return folder
    except Exception as problem:             # whatever the hub and the network raise
        raise UserError(f"no checkpoint at {path}, and the hub does not give it ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())[:150]}); check the name and the network, or give a "
                        "folder that was downloaded before") from None


def tokenizer_of(model, about, path):
    """The Tokenizer of the model that `load(path)` returned with `about`. Raises UserError if it
    has none that we can read, or one with more tokens than the model."""
    if "huggingface" in about and not has_tokenizer(about["tokenizer_files"]):
        raise UserError(f"{path} has no tokenizer.json or tokenizer.model; add the file (train.py takes --tokenizer, "
                        "too)")
    name = str(path)
    files = about.get("tokenizer_files")
    if "run" in about:
        # A checkpoint that somebody sent does not choose a folder of this machine.
        name = str(about["run"].get("tokenizer", "of an unknown name"))
        files = {} if files is None else files
    tokenizer = open_tokenizer(name, files)
    tokenizer.refuse_fewer_rows(model.config.vocab_size, path)
    return tokenizer


def open_checkpoint(path, block_size=None, reads=True):
    """Open one of our checkpoints, a file or a folder of shards: -> Weights. Raises Damaged for one that
    is truncated or changed, and UserError for one of another format."""
    sharded = path.is_dir()
    file = path / "state.pt" if sharded else path
    if sharded and (not file.is_file() or origin.leads_out(file)):
        raise Damaged(f"{path} is damaged: it has no file state.pt")
    state = read_pickled_tensors(file, "use a file that train.py wrote", "cpu" if reads else "meta", mmap=reads)
    if not isinstance(state, dict) or state.get("format") not in FORMATS:
        form = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{file} has format {form!r}, this code reads {FORMAT!r}; use the code that wrote it")
    if reads:
        pt.check_sizes(file, state)
        pt.check_digest(file, state)
    try:
        config = with_context(config_from(file, state.pop("config")), block_size, file)
        digests = state.pop("digests", {})
        if sharded:
            shards = state.pop("shards")
            tensors = dcp.Reader(path / "model", shards["model"])
            moments = dcp.Reader(path / "optimizer", shards.get("optimizer", {}))
        else:
            tensors = pt.Reader(file, state.pop("model"), digests.get("model"))
            stored_moments, _ = pt.part(state.get("optimizer"))
            moments = pt.Reader(file, stored_moments, digests.get("optimizer"))
        weights = Weights(config, state, tensors, moments)
        check_names(weights)
        check_masks(state.get("masks"), weights.shapes)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{file}: config and weights disagree or are missing: "
                        f"{' '.join(str(problem).split())[:200]}") from None
    check_state(file, state)
    if reads:
        # What is small does not stay in the file.
        for key, value in state.items():
            state[key] = value if key == "optimizer" else pt.on_host(value)
    return weights


def check_names(weights):
    """Raise KeyError or UserError unless a checkpoint holds the parameters of its config and no others."""
    for name, shape in weights.shapes.items():
        check_stored(weights.tensors, name, shape)
    for name in weights.tensors.names() - weights.shapes.keys():
        raise KeyError(f"{name} has no place in the config")


def check_stored(tensors, name, shape):
    """Raise UserError if a stored tensor has another shape, or is none of pt.DTYPES."""
    stored = tensors.shape(name)
    file, _ = tensors.where(name)
    if stored != tuple(shape) or tensors.dtype(name) not in pt.DTYPES:
        raise UserError(f"{file}: config and weights disagree: {name} is {stored} of {tensors.dtype(name)} there, and "
                        f"{tuple(shape)} by the config; use another copy")


def check_masks(packed, shapes):
    """Raise ValueError, or what garbled values raise, unless the packed masks of a sparse model have the
    shapes of its matrices. Unpacking takes as much memory as they say."""
    for name, (inputs, bits) in (packed or {}).items():
        outputs, columns = shapes[name]
        packed_shape = (outputs, math.ceil(columns / 8))
        if inputs != columns or bits.dtype != torch.uint8 or bits.shape != packed_shape:
            raise ValueError(f"the mask of {name} has another shape")


def check_state(file, state):
    """Check, in place, what a checkpoint that somebody sent says besides config and weights."""
    # Only `load` says that a model is Hugging Face's.
    state.pop("huggingface", None)
    if not isinstance(state.get("run", {}), dict):
        raise UserError(f"{file} has {state['run']!r:.60} where the settings of its run should be; use a file that "
                        "train.py or prune.py wrote")
    state["origin"] = origin.of_checkpoint(file, state)


def fingerprint(model):
    """sha256 over a model's config and weights. (Two files of the same model may differ in their
    bytes.)"""
    digest = hashlib.sha256(repr(model.config).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of(weights, dtype):
    """The fingerprint of the model that `load` with this dtype would make of the same weights. They
    are read one tensor at a time."""
    digest = hashlib.sha256(repr(weights.config).encode())
    for name, shape in weights.shapes.items():
        rows = weights.rows(name, 0, shape[0], dtype).to(dtype)
        digest.update(rows.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_existing(path):
    """Raise UserError if there is something at `path`. A folder with nothing but what a killed process
    left, its lock and temporary files, counts as nothing."""
    contents = path.iterdir() if path.is_dir() else []
    others = [file for file in contents if file.name != ".lock" and not file.match(TEMPORARY)]
    if others or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is there already; give another --out or delete it")


def temporary(path):
    """A name beside `path` that nothing has, and that the next process to come removes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove(path):
    """Remove a file or a folder, if it is there. A folder is renamed first, so that no half of it keeps
    the name."""
    if path.is_dir() and not path.is_symlink():
        half = temporary(path)
        path.rename(half)
        shutil.rmtree(half)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path):
    """Hold the folder of a run for this process. Raises UserError if another process holds it.
    Temporary files that a killed process left there are removed; a folder that was made here and is
    empty in the end goes as well."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    file = path / ".lock"
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process works in {path} and holds {file}; wait until it has ended, or give another "
                        "--out") from None
    try:
        for leftover in path.glob(TEMPORARY):
            remove(leftover)
        yield
    finally:
        if list(path.iterdir()) == [file]:
            file.unlink()
        lock.release()
        with contextlib.suppress(OSError):           # not empty
            for folder in created:
                folder.rmdir()


@contextlib.contextmanager
def new_folder(path):
    """Hold a folder that is to be written. Raises UserError if there is something at `path`, or if
    another process holds it."""
    refuse_existing(path)
    with locked(path):
        refuse_existing(path)                # another process may have come first
        yield


def provenance():
    """Which code wrote a checkpoint."""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": commit()}


# -- a run on disk

class Background:
    """Does one piece of work at a time in a thread of its own. `wait` raises what the work
    raised."""
    def __init__(self):
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.work = None

    def start(self, function, *args):
        self.work = self.thread.submit(function, *args)

    def wait(self):
        work = self.work
        self.work = None
        if work is not None:
            work.result()


def saves_in_background(model):
    """Whether checkpoints of the model are written while it trains on: where a GPU trains it. They
    are copied to main memory first."""
    return not model.embed.weight.is_cpu


@dataclass
class State:
    """All that a training step changes, and so all that a checkpoint of a run holds."""
    model: GPT
    optimizer: torch.optim.Optimizer
    alive: dict                                  # {(layer, kind): indices of live units in the model}
    averages: dict | None = None                 # {(layer, kind): (2, units)}, moving averages of the score
    masks: dict = field(default_factory=dict)    # {parameter name: (out, in) bool} of a sparse model
    teacher: GPT | None = None                   # frozen, or a top_k.CachedTeacher; it has a file of its own
    step: int = 0                                # optimizer steps done
    teacher_file: dict | None = None             # {"file", "sha256"}; it stays when the teacher is dropped
    dropped: bool = False                        # whether the teacher was dropped, for good
    judged: dict = field(default_factory=lambda: {"student": None, "teacher": None, "steps": 0})  # smoothed losses
    window: dict = field(default_factory=dict)   # sums since the last "step" record
    # Of texts that are weighed anew as the model learns: {"weights", "reference", "drawn": a number for each
    # text, "step": of the last evaluation}
    balance: dict | None = None
    flops: dict = field(default_factory=lambda: {"executed": 0.0, "credited": 0.0})
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


# Adam's moments, of the shape of their parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

# The fields of State that are stored as they are.
PLAIN = ("step", "teacher_file", "dropped", "judged", "window", "flops", "seconds", "balance")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""
    path: Path
    identity: dict                # the resolved settings that make the run this one; see `identity_of`
    defaults: dict                # of the settings: what a run from before a setting existed had
    batch_tokens: int
    tokenizer_files: dict
    writes: bool                  # only one process of a run does
    origin: dict | None = None    # where the model of --init comes from
    background: Background = field(default_factory=Background)      # writes the newest checkpoint
    waiting: object = None        # the process group for long waits

    @property
    def metrics(self):
        return self.path / "metrics.jsonl"

    @property
    def teacher(self):
        """The file or folder of the teacher that the run has captured."""
        folder = self.path / "teacher"
        return folder if folder.is_dir() else self.path / "teacher.pt"

    def log(self, tag, step, **record):
        """Append a record to metrics.jsonl."""
        if self.writes:
            append_record(self.metrics, tag=tag, step=step, tokens=step * self.batch_tokens, **record)

    def save(self, state, masks):
        """Write the checkpoint of this step and keep the newest two. A checkpoint of this step that
        exists is the same one. All processes that share a model call this. `masks`: those of the
        state, packed. Raises UserError if the disk is full; of a checkpoint that is written in the
        background, the next call or background.wait() does."""
        self.background.wait()
        path = self.path / f"ckpt_{state.step:08d}"
        if shard.is_sharded(state.model):
            if not self.from_first(self.has, state.step):
                self.save_shards(path, state, masks)
            return
        if not self.writes or self.has(state.step):
            return
        path = path.with_suffix(".pt")
        content = content_of(state.model, self.plain_content(state, masks, state.optimizer.state_dict()))
        if saves_in_background(state.model):
            self.background.start(self.write_and_rotate, path, pt.on_host(content))
        else:
            self.write_and_rotate(path, content)

    def has(self, step):
        return step in map(step_of, checkpoints(self.path))

    def plain_content(self, state, masks, optimizer):
        """What a checkpoint holds besides the model."""
        held = {name: getattr(state, name) for name in PLAIN}
        return held | {"run": self.identity, "optimizer": optimizer, "alive": listed(state.alive),
                       "averages": listed(state.averages), "masks": masks, "tokenizer_files": self.tokenizer_files,
                       "origin": self.origin, "records": self.seal_records(), "provenance": provenance()}

    def write_and_rotate(self, path, content):
        """Write the checkpoint and remove all but the newest two."""
        write(path, content)
        self.rotate()

    def rotate(self):
        for old in checkpoints(self.path)[:-2]:
            remove(old)

    def save_shards(self, path, state, masks):
        """Write the folder of a checkpoint, all processes together, and keep the newest two."""
        shard.release(state.model)           # its parameters are those of the optimizer again
        moments, optimizer = pt.part(state.optimizer.state_dict())
        named = {}
        for number, name in enumerate(names_in_order(state.optimizer, state.model)):
            for key in MOMENTS:
                if f"{key}.{number}" in moments:
                    named[f"{key}.{name}"] = moments[f"{key}.{number}"]
        content = self.plain_content(state, masks, optimizer) if self.writes else None
        self.write_shards(path, state.model, content, named)
        if self.writes:
            self.rotate()

    def write_shards(self, path, model, content, moments=None):
        """Write a folder of shards, all processes together: the model, an optimizer's moments, if there are
        any, and the `content` of the first process. The folder gets its name when it is whole."""
        refuse_evaluation_only(model)
        parts = {"model": {name: p.detach() for name, p in model.named_parameters()}}
        if moments:
            parts["optimizer"] = moments
        half = self.from_first(temporary, path)
        indices = {}
        try:
            for name, tensors in parts.items():
                indices[name] = dcp.write(half / name, tensors, self.waiting)
        except dcp.NotWritten as problem:
            if self.writes:
                remove(half)
            with pt.refusing_a_full_disk(path, parts):
                raise problem.cause from None

        def finish():
            state = {"config": asdict(model.config), **content, "format": FORMAT, "shards": indices}
            try:
                write(half / "state.pt", state)
            except BaseException:
                remove(half)
                raise
            remove(path)
            half.rename(path)

        self.from_first(finish)

    def from_first(self, function, *args):
        """Call the function in the first process only: -> in all processes, what it returns there. They
        wait for it, and what it raises for the user is raised in all of them."""
        if not dist.is_initialized():
            return function(*args)
        outcome = [None, None]
        if self.writes:
            try:
                outcome[0] = function(*args)
            except (UserError, OSError) as problem:
                outcome[1] = problem
        dist.broadcast_object_list(outcome, src=0, group=self.waiting)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def from_all(self, value):
        """The values of all processes."""
        if not dist.is_initialized():
            return [value]
        values = [None] * dist.get_world_size(self.waiting)
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def resume(self, device, make_optimizer, build=None):
        """The State in the newest checkpoint, without its teacher and with packed masks; None if the
        folder holds no checkpoint.

        `build(config)` makes a sharded model with weights that are still to be filled; None: the model
        will be whole. The checkpoint may be of either kind, and written by another number of
        processes. Of weights and moments a process reads the rows that it holds. Raises UserError if
        the folder holds another run."""
        agree = None
        if build is not None:
            agree = self.agree_on_damage
            self.refuse_different_folders()
        if newest(self.path) is None:
            if self.metrics.exists():
                # Killed before its first checkpoint, or not ours.
                records = read_records(self.metrics) or [{}]
                self.refuse_another_run(records[0])
            return None
        state, records = first_undamaged(
            self.path, lambda place: self.open_state(place, device, make_optimizer, build), agree)
        self.check_records(records, state.step)
        if self.writes:
            # Newer checkpoints are damaged, or they would have been taken. They make room.
            for file in checkpoints(self.path):
                if step_of(file) > state.step:
                    damaged = file.with_suffix(".damaged")
                    remove(damaged)
                    file.rename(damaged)
        return state

    def open_state(self, place, device, make_optimizer, build):
        """The State in a checkpoint, and what it says of the records."""
        weights = open_checkpoint(place)
        saved = weights.about
        self.refuse_another_run(saved.get("run", {}))
        if "alive" not in saved:
            raise UserError(f"{self.path} was begun by an older version of this code; finish it with that, or give "
                            "another --out")
        if build is None:
            model = whole_model(weights, device)
        else:
            model = shard.fill_(build(weights.config), weights.rows)
        try:
            state = State(model, make_optimizer(model), by_key(saved["alive"]), by_key(saved["averages"], device),
                          saved.get("masks"))
            fill_optimizer(state.optimizer, model, weights)
            # Checkpoints from before texts could be weighed anew have no balance.
            saved.setdefault("balance", None)
            for name in PLAIN:
                setattr(state, name, saved[name])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            raise UserError(f"the checkpoint in {self.path} does not hold the state of a run ({first_line(problem)}); "
                            "give another --out to begin anew") from None
        return state, saved.get("records")

    def agree_on_damage(self, damage):
        """The first damage, or None, that any of the processes has found. Each has read other rows."""
        damages = [damage for damage in self.from_all(damage) if damage is not None]
        return damages[0] if damages else None

    def refuse_different_folders(self):
        """Raise UserError if the processes that share a model do not see the same checkpoints."""
        seen = self.from_all([path.name for path in checkpoints(self.path)])
        if any(names != seen[0] for names in seen):
            raise UserError(f"the {len(seen)} processes do not see the same checkpoints in {self.path}; put it on a "
                            "file system that all of them share")

    def seal_records(self):
        """Write metrics.jsonl through to the disk: -> how many records a checkpoint counts on, and
        their digest. The config record is left out, as resuming writes it anew."""
        with open(self.metrics, "rb") as file:
            os.fsync(file.fileno())
            lines = file.read().splitlines(keepends=True)[1:]
        return {"count": len(lines), "digest": xxhash.xxh3_128(b"".join(lines)).hexdigest()}

    def check_records(self, sealed, step):
        """Raise UserError if metrics.jsonl has lost or changed a record that the checkpoint of
        `step` counts on."""
        if not self.writes or sealed is None:
            return                           # a checkpoint from before records were counted
        read_records(self.metrics)           # a line that cannot be read is named
        lines = self.metrics.read_bytes().splitlines(keepends=True)[1:] if self.metrics.exists() else []
        lines = lines[:sealed["count"]]
        if len(lines) < sealed["count"]:
            problem = f"has {len(lines)} of the {sealed['count']} records"
        elif xxhash.xxh3_128(b"".join(lines)).hexdigest() != sealed["digest"]:
            problem = f"has other than the {sealed['count']} records"
        else:
            return
        raise UserError(f"{self.metrics} {problem} that the checkpoint of step {step} counts on; restore it from a "
                        "copy, or give another --out to begin anew")

    def refuse_another_run(self, recorded):
        """Raise UserError if the recorded settings are not ours. A setting that is not recorded, as
        the code that wrote them did not have it, had its default."""
        recorded = {**self.defaults, **recorded}
        differ = [f"{name} is {recorded.get(name)!r} there and {value!r} here"
                  for name, value in self.identity.items() if recorded.get(name) != value]
        if differ:
            raise UserError(f"{self.path} holds a run of another configuration ({'; '.join(differ)}); "
                            "give another --out or delete it")

    def rewind(self, step, **about):
        """Make metrics.jsonl what it was when the checkpoint of `step` was taken. What came after
        it will be written again. `about` goes into the config record, with the commit of the code;
        if the run was begun by another one, both are named."""
        if not self.writes:
            return
        first, *rest = read_records(self.metrics) or [{}]
        commits = first.get("code", "unknown").split("+") if step else []
        if commit() not in commits:
            commits.append(commit())
        config = {"tag": "config", "step": 0, "tokens": 0, **self.identity, **about, "code": "+".join(commits)}

        # The step record of the checkpoint's own step was written before it, its other records
        # after it.
        kept = [r for r in rest if r["step"] < step or (r["step"] == step and r["tag"] == "step")]
        lines = [json.dumps(record) + "\n" for record in [config, *kept]]
        write_atomic(self.metrics, lambda file: file.write("".join(lines).encode()))

    def save_teacher(self, model, step):
        """Write the model as teacher.pt, or a sharded one as the folder teacher; -> its path."""
        self.background.wait()
        about = {"run": self.identity, "step": step, "tokenizer_files": self.tokenizer_files, "origin": self.origin}
        file = self.path / "teacher.pt"
        folder = self.path / "teacher"
        if shard.is_sharded(model):
            shard.release(model)
            self.write_shards(folder, model, about)
            self.from_first(remove, file)
            return folder
        if self.writes:
            save(file, model, **about)
            remove(folder)
        return file

    def open_teacher(self, path, state, build=None):
        """Load the teacher at `path`, frozen, into the state. `build`: as of `resume`, for a sharded
        teacher. Raises UserError for one with another tokenizer or a shorter context, and for one
        that has changed since the run began."""
        student = state.model
        weight = student.embed.weight
        if build is None:
            teacher, about = load(path, weight.device, weight.dtype)
        else:
            teacher = open_weights(path)
            about = teacher.about
        tokenizer = tokenizer_of(teacher, about, path)
        if tokenizer.name != self.identity["tokenizer"]:
            raise UserError(f"the teacher {path} has {tokenizer.vocab_size} tokens of {tokenizer.name!r}, the student "
                            f"those of {self.identity['tokenizer']!r}; give a teacher with the same tokenizer")
        window = self.identity.get("block_size") or student.config.block_size
        if teacher.config.block_size < window:
            raise UserError(f"the teacher {path} was trained with a context of {teacher.config.block_size} tokens, the "
                            f"student has {window}; give a teacher with at least that")
        if build is None:
            sha256 = fingerprint(teacher)
        else:
            sha256 = self.from_first(fingerprint_of, teacher, weight.dtype)
        self.remember_teacher(state, {"file": str(newest(path) or path), "sha256": sha256})

        # Models of one family differ in rows that no token has. The loss is over the others.
        rows = teacher.config.vocab_size
        if rows != student.config.vocab_size:
            rows = tokenizer.vocab_size
        if build is not None:
            teacher = shard.fill_(build(replace(teacher.config, vocab_size=rows)), teacher.rows)
        elif rows != teacher.config.vocab_size:
            teacher = without_padding(teacher, rows)
        state.teacher = freeze(teacher)

    def remember_teacher(self, state, opened):
        """Put the teacher's {"file", "sha256"} into the state. Raises UserError if it has changed
        since the run began."""
        before = state.teacher_file
        if before and before["sha256"] != opened["sha256"]:
            raise UserError(f"the teacher {opened['file']} has changed since the run began (sha256 "
                            f"{opened['sha256'][:12]}, then {before['sha256'][:12]}); restore it or begin anew with "
                            "another --out")
        state.teacher_file = opened


def names_in_order(optimizer, model):
    """The names of the model's parameters, in the order in which the optimizer numbers them."""
    name_of = {p: name for name, p in model.named_parameters()}
    return [name_of[p] for p in parameters_of(optimizer)]


def parameters_of(optimizer):
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def fill_optimizer(optimizer, model, weights):
    """Load the state of an optimizer that was saved with the opened `weights`. Of its moments a process
    reads the rows that it holds."""
    _, saved = pt.part(weights.about["optimizer"])
    parameters = parameters_of(optimizer)
    # A file numbers parameters as the optimizer does, a folder of shards names them.
    labels = names_in_order(optimizer, model) if isinstance(weights.moments, dcp.Reader) else range(len(parameters))
    state = {}
    for number, entry in saved["state"].items():
        p = parameters[number]
        state[number] = pt.on_host(entry)
        for key in MOMENTS:
            stored = f"{key}.{labels[number]}"
            check_stored(weights.moments, stored, p.shape)
            rows = weights.moments.rows(stored, *shard.rows(p)).to(shard.local(p).device, copy=True)
            state[number][key] = shard.from_rows(rows, p, p.shape) if shard.is_sharded(model) else rows
    optimizer.load_state_dict({**saved, "state": state})


def without_padding(model, rows):
    """The same model with the first `rows` rows of its embedding and head. The others are padding:
    no text has their tokens."""
    weights = model.state_dict()
    for name in ("embed.weight", "head.weight"):
        if name in weights:
            weights[name] = weights[name][:rows].clone()
    return from_weights(replace(model.config, vocab_size=rows), weights)


def identity_of(config, corpus_fingerprint):
    """What makes a run this run: its resolved settings and its corpus, without where and how far it
    is to run."""
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    return {**identity, "fingerprint": corpus_fingerprint}


def listed(tensors):
    """{(layer, kind): tensor} as a list of (layer, kind, tensor), which a checkpoint of plain
    values can hold."""
    return None if tensors is None else [(layer, kind, tensor) for (layer, kind), tensor in tensors.items()]


def by_key(rows, device=None):
    """The dictionary that `listed` was given."""
    return None if rows is None else {(layer, kind): tensor.to(device) for layer, kind, tensor in rows}
