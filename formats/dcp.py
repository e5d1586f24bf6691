"""Folders of torch.distributed.checkpoint (DCP): tensors of which each process writes the rows that it holds.

    torchrun --nproc-per-node 2 train.py --shard fsdp --preset toy --out RUN    # RUN/ckpt_<step>/model/ is one

    __<process>_0.distcp    that process's rows of every tensor, each as torch.save writes it
    .metadata               PyTorch's index of the pieces, a pickle

PyTorch writes the folder, and its own tools can read it. We do not read `.metadata`, because PyTorch
unpickles that file, which would run the code of whoever sent it. `write` returns the same index as
plain values, for checkpoint.py to store. It has a digest of each piece, so that a process can check
what it reads without reading what the others need. Each piece is opened with weights_only=True.

Pieces are rows, as shard.py has them. Not here: what else belongs to a checkpoint (checkpoint.py).
"""
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash

from common import Damaged, UserError, read_pickled_tensors
from formats.origin import leads_out
from formats.pt import DTYPES

REMEDY = "use a folder that train.py wrote"


class Piece(NamedTuple):
    """The rows of a tensor that one process wrote."""
    first: int            # the first of the rows
    rows: int
    file: str             # the file's name in the folder
    offset: int           # where the piece begins in the file, in bytes
    length: int           # bytes
    digest: str           # xxh3 of these bytes


# -- out

class NotWritten(Exception):
    """Writing failed in one of the processes."""
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


def make_writer(folder):
    """What writes and fsyncs a file for each process. The path on this machine is not recorded."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta
    writer = FileSystemWriter(folder)
    writer.storage_meta = StorageMeta
    return writer


def write(folder, tensors, group=None):
    """Write {name: tensor} into the new `folder`: -> its index, see `Reader`.

    If a process group is up, all processes of `group` (None: all there are) call this with the same
    names. Each writes its rows of the DTensors, and the first process gets the index; the others get
    None. What writing raises in any of them, such as an OSError, is the cause of a NotWritten in all."""
    # Imported here, as it takes half a second, which no other command should wait for.
    import torch.distributed.checkpoint as distributed_checkpoint
    try:
        with warnings.catch_warnings():
            # A process alone is told that it is alone.
            warnings.simplefilter("ignore")
            metadata = distributed_checkpoint.save(tensors, storage_writer=make_writer(folder), process_group=group)
    except distributed_checkpoint.CheckpointException as problem:
        cause, _ = next(iter(problem.failures.values()))
        raise NotWritten(cause) from None
    digests = digests_of_own(folder, metadata)
    if dist.is_initialized():
        all_digests = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
        dist.gather_object(digests, all_digests, dst=0, group=group)
        if all_digests is None:
            return None
        digests = {}
        for of_process in all_digests:
            digests |= of_process
    return {name: entry_of(name, metadata, digests) for name in metadata.state_dict_metadata}


def digests_of_own(folder, metadata):
    """{(file, offset): digest} of the pieces that this process wrote, as they are on the disk."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    digests = {}
    for place in metadata.storage_data.values():
        if place.relative_path.startswith(f"__{rank}_"):
            content = read_bytes(Path(folder, place.relative_path), place.offset, place.length)
            digests[place.relative_path, place.offset] = xxhash.xxh3_128(content).hexdigest()
    return digests


def entry_of(name, metadata, digests):
    """The entry of a tensor in the index: its shape, its dtype and its pieces in order."""
    from torch.distributed.checkpoint.metadata import MetadataIndex
    stored = metadata.state_dict_metadata[name]
    pieces = []
    for chunk in stored.chunks:
        place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        digest = digests[place.relative_path, place.offset]
        pieces.append((chunk.offsets[0], chunk.sizes[0], place.relative_path, place.offset, place.length, digest))
    # A process without rows has written an empty piece.
    pieces = sorted(piece for piece in pieces if piece[1] > 0)
    return tuple(stored.size), stored.properties.dtype, pieces


def read_bytes(file, offset, length):
    """These bytes of a file. Raises Damaged if the file ends before."""
    if not file.is_file() or file.stat().st_size < offset + length:
        raise Damaged(f"{file} is missing or truncated")
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(length)


# -- in

class Reader:
    """The tensors of a folder, whose rows are read when they are asked for.

    `index`: {tensor: (shape, dtype, [the values of a Piece, …])}. Raises UserError for an index that
    garbles this, or that leads out of the folder."""
    def __init__(self, folder, index):
        self.folder = Path(folder)
        self.entries = {}
        self.files = set()
        try:
            for name, (shape, dtype, pieces) in index.items():
                self.entries[name] = shape, dtype, [Piece(*values) for values in pieces]
                self.check(name)
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"{folder} has an index that garbles its tensors; {REMEDY}") from None

    def check(self, name):
        """Raise UserError or ValueError for an entry of the index that `write` does not make."""
        shape, dtype, pieces = self.entries[name]
        if dtype not in DTYPES or type(shape) is not tuple or not shape:
            raise ValueError(name)
        if not all(type(size) is int for size in shape):
            raise ValueError(name)
        row = 0
        for piece in pieces:
            numbers = (piece.rows, piece.offset, piece.length)
            if piece.first != row or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(name)
            row += piece.rows
            if piece.file not in self.files:
                self.check_file(piece.file)
        if row != shape[0]:
            raise ValueError(name)

    def check_file(self, file):
        """Raise UserError for a file outside of the folder: whoever sends a folder does not choose which
        other files of this machine are read."""
        is_name = isinstance(file, str) and re.fullmatch(r"__\d+_\d+\.distcp", file)
        if not is_name or leads_out(self.folder / file) or self.folder.is_symlink():
            raise UserError(f"{self.folder} names {str(file)[:100]!r}, and only *.distcp files in the folder itself "
                            f"are read; do not use it, or {REMEDY}")
        self.files.add(file)

    def names(self):
        return self.entries.keys()

    def shape(self, name):
        return self.entries[name][0]

    def dtype(self, name):
        return self.entries[name][1]

    def where(self, name):
        """What a message about a tensor names: the place and the tensor."""
        return self.folder, name

    def rows(self, name, start, stop):
        """The rows [start, stop) of a tensor, in main memory and in the stored dtype."""
        shape, dtype, pieces = self.entries[name]
        rows = torch.empty(stop - start, *shape[1:], dtype=dtype)
        for piece in pieces:
            first = max(start, piece.first)
            last = min(stop, piece.first + piece.rows)
            if first < last:
                stored = self.read(name, piece)
                rows[first - start:last - start] = stored[first - piece.first:last - piece.first]
        return rows

    def read(self, name, piece):
        """The tensor of a piece. Raises Damaged if it is not what was written."""
        shape, dtype, _ = self.entries[name]
        file = self.folder / piece.file
        content = read_bytes(file, piece.offset, piece.length)
        if xxhash.xxh3_128(content).hexdigest() != piece.digest:
            raise Damaged(f"{file} is damaged: its content is not what was written")
        stored = read_pickled_tensors(file, REMEDY, content=io.BytesIO(content))
        is_tensor = isinstance(stored, torch.Tensor) and stored.is_cpu and stored.layout == torch.strided
        if not is_tensor or stored.dtype != dtype or tuple(stored.shape) != (piece.rows, *shape[1:]):
            raise UserError(f"{file} holds another tensor than {name}, as its index has it; {REMEDY}")
        return stored
