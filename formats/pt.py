"""Files of torch.save: plain values and tensors, which stay in the file until they are used.

    python -c "import checkpoint; print(checkpoint.open_weights('runs/idea-laptop-0').rows('embed.weight', 0, 2))"

With one digest for the whole file, a reader of a few weights would have to read all of it. So each weight
and each of Adam's moments has its own digest, and the rest has one. Folders of several files: formats/dcp.py.
Not here: what a checkpoint means (checkpoint.py).
"""
import contextlib
import errno
import shutil
from pathlib import Path

import torch
import xxhash

from common import Damaged, UserError, first_line

# What weights and moments are stored in.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- digests

def seal(content):
    """Put the digests into the content of a checkpoint."""
    moments, _ = part(content.get("optimizer"))
    content["digests"] = {"model": digests_of(content.get("model", {})), "optimizer": digests_of(moments)}
    content["digest"] = digest_of(without_tensors(content))


def check_digest(file, state):
    """Raise Damaged if what a checkpoint holds besides weights and moments is not what was written; in
    the first format, if anything is not. Checkpoints from before the digest was kept have none."""
    try:
        digest = digest_of(without_tensors(state) if "digests" in state else state)
    except (AttributeError, TypeError, RuntimeError):
        digest = "of something else"         # somebody sent tensors that are in no memory, for example
    if state.get("digest", "") not in ("", digest):
        raise Damaged(f"{file} is damaged: its content is not what was written")


def check_sizes(file, content):
    """Raise Damaged for a tensor that is larger than what the file stores of it. Somebody may have sent
    an expanded one, which would take any amount of memory when it is read."""
    for tensor in tensors_in(content):
        if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Damaged(f"{file} is damaged: a tensor of {tensor.nbytes:,} bytes has only "
                          f"{tensor.untyped_storage().nbytes():,} in it")


def part(optimizer):
    """The state of an optimizer as {"exp_avg.<number of the parameter>": tensor}, its moments, and
    the rest of it, which is small."""
    moments = {}
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return moments, optimizer
    rest = {**optimizer, "state": {}}
    for number, state in optimizer["state"].items():
        rest["state"][number] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                moments[f"{key}.{number}"] = value
            else:
                rest["state"][number][key] = value
    return moments, rest


def without_tensors(content):
    """The content of a checkpoint without weights and moments, which have digests of their own."""
    rest = {key: value for key, value in content.items() if key != "model"}
    if "optimizer" in rest:
        _, rest["optimizer"] = part(rest["optimizer"])
    return rest


def digests_of(tensors):
    return {name: digest_of({name: tensor}) for name, tensor in tensors.items()}


def digest_of(content):
    """A digest of plain values and tensors, whatever their nesting. It tells damage, not intent.
    Left out is the entry "digest" of the content itself."""
    digest = xxhash.xxh3_128()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            digest.update(f"dict{len(value)}".encode())
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add({key: value for key, value in content.items() if key != "digest"})
    return digest.hexdigest()


# -- tensors

class Reader:
    """Tensors in a file that torch.save wrote. Rows are read when they are asked for. What is read is
    checked against the tensor's digest, if `digests` has been kept."""
    def __init__(self, file, tensors, digests=None):
        self.file = file
        self.tensors = dict(tensors)
        self.digests = None if digests is None else dict(digests)

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        tensor = self.tensors[name]
        return tensor.dtype if tensor.layout == torch.strided else tensor.layout

    def where(self, name):
        """What a message about a tensor names: the file and the tensor."""
        return self.file, name

    def rows(self, name, start, stop):
        """The rows [start, stop) of a tensor, which stay in the file until they are used. Raises Damaged
        if the tensor is not what was written."""
        tensor = self.tensors[name]
        if not tensor.is_cpu:
            raise UserError(f"{self.file} holds no values of {name}; use another copy")
        if self.digests is not None and self.digests.get(name) != digest_of({name: tensor}):
            raise Damaged(f"{self.file} is damaged: its content is not what was written")
        return tensor[start:stop]


def on_host(value):
    """A copy of plain values and tensors, whatever their nesting, in main memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item) for item in value)
    return value


def tensors_in(value):
    """All tensors of a nesting of dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@contextlib.contextmanager
def refusing_a_full_disk(path, content):
    """Turn what writing the content raises into a UserError if the disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as problem:
        # torch reports a full disk as a RuntimeError of its own.
        if isinstance(problem, OSError) and problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed = sum(tensor.nbytes for tensor in tensors_in(content))
        free = shutil.disk_usage(Path(path).parent).free
        raise UserError(f"{path} was not written ({first_line(problem)}): it needs {needed:,} bytes and {free:,} are "
                        "free; what was there before is still there") from None
