"""A model on disk: our checkpoint, a run folder, a Hugging Face folder or hub id, opened by one function for everybody.

    python -c "import checkpoint; print(checkpoint.load('runs/idea-laptop-0')[0].config)"

Ours is one self-describing file, written whole or not at all and read without running code from it; Hugging Face's is
formats/huggingface.py's. Not here: what a run keeps in its folder besides (folder.py).
"""
import dataclasses
import pickle
import re
import zipfile
from pathlib import Path

import torch

from common import UserError, write_atomic
from formats import huggingface
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig

FORMAT = "nanoprune checkpoint 1"


def save(path, model, **state):
    """Write {"format", "config", "model", **state} to `path`: temporary name, fsync, rename. `state` is plain Python
    and tensors (the tokenizer's name, plan, step, optimizer, provenance …), so that it loads with
    weights_only=True."""
    plain = getattr(model, "_orig_mod", model)                        # torch.compile's wrapper would prefix every name
    refuse_evaluation_only(plain)
    content = {"format": FORMAT, "config": dataclasses.asdict(plain.config), "model": plain.state_dict(), **state}
    checksums = torch.serialization.get_crc32_options()               # torch.load never reads them, and they would
    torch.serialization.set_crc32_options(False)                      # take a third of the time (unzip misses them)
    try:
        write_atomic(path, lambda file: torch.save(content, file))
    finally:
        torch.serialization.set_crc32_options(checksums)


def refuse_evaluation_only(model):
    """UserError for a baseline that is more than its GPTConfig (methods/slicegpt.py, prune.cut with mend "bias")."""
    if type(model) is not GPT:
        raise UserError(f"this model is for evaluation only, as {model.evaluation_only}, which no GPTConfig and no "
                        "runtime has; cut another way to save or export it")


def checkpoints(folder):
    """A run folder's checkpoints, oldest first: files named ckpt_<step in 8 digits>.pt."""
    return sorted(Path(folder).glob("ckpt_" + "[0-9]" * 8 + ".pt"))


def newest(folder):
    """The checkpoint with the highest step in a run folder, or None."""
    return max(checkpoints(folder), default=None)


def load(path, device="cpu", dtype=None, block_size=None):
    """Open `path`: a checkpoint, a run folder (its newest), a Hugging Face folder or hub id -> (GPT, about).

    dtype None: as stored. device "meta": no weights are read, only their config. block_size: tokens of context wanted,
    at most the trained number; None: all. `about`: what `save` was given besides the model; of a Hugging Face folder
    {"huggingface": its config.json, "tokenizer_files"}. UserError: missing, truncated, of another version or shape."""
    folder = find(path)
    if folder.is_dir() and (folder / "config.json").exists():
        model, about = huggingface.load(folder, device, dtype, block_size)
    else:
        model, about = load_ours(folder, device)
        model = model if dtype is None else model.to(dtype)
    if block_size is not None and block_size > model.config.block_size:
        raise UserError(f"{path} was trained with a context of {model.config.block_size} tokens, not {block_size}; ask "
                        "for at most that")
    if block_size is not None:
        model.config = dataclasses.replace(model.config, block_size=block_size)
    return model, about


def find(path):
    """`path` if it is there, or the local copy of the hub's repository of that name."""
    found = Path(path)
    if found.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or found.parent.exists():
        return found
    import huggingface_hub
    try:
        wanted = ["config.json", "model*.safetensors*", "*token*", "vocab.json", "merges.txt", "chat_template.jinja"]
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except Exception as problem:             # whatever the hub and the network raise
        raise UserError(f"no checkpoint at {path}, and the hub does not give it ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())[:150]}); check the name and the network, or give a "
                        "folder that was downloaded before") from None


def tokenizer_of(about, path):
    """The Tokenizer of the model that `load(path)` returned with `about`. UserError: it has none that we can read."""
    if "huggingface" in about and not about["tokenizer_files"]:
        raise UserError(f"{path} has no tokenizer.json; add the file (train.py takes --tokenizer, too)")
    return open_tokenizer(about["run"]["tokenizer"] if "run" in about else str(path), about.get("tokenizer_files"))


def load_ours(path, device):
    """A checkpoint, or a run folder's newest -> (GPT on the device, dict of everything else that `save` was given, in
    main memory: who needs only the model has no optimizer on a GPU)."""
    file = newest(path) if path.is_dir() else path
    if file is None or not file.exists():
        raise UserError(f"no checkpoint at {path}; give a ckpt_*.pt file, the folder of a run, a Hugging Face folder "
                        "or a hub id such as HuggingFaceTB/SmolLM2-135M")
    open(file, "rb").close()                 # what the system refuses passes through, and is not called truncated
    try:
        state = torch.load(file, map_location="meta" if device == "meta" else "cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        code = re.search(r"GLOBAL ([\w.]+)", str(problem))
        raise UserError(f"{file} is not a checkpoint of plain tensors and numbers"
                        + (f": it would run {code[1]}, and pickled code is never run" if code else "")
                        + "; use a file that train.py wrote") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, LookupError, OSError) as problem:
        raise UserError(f"{file} is truncated or no checkpoint ({(str(problem) or 'it ends').splitlines()[0][:100]}); "
                        "delete it to go on from the one before") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{file} has format {found!r}, this code reads {FORMAT!r}; use the code that wrote it")
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**state.pop("config")))
        model.load_state_dict(state.pop("model"), assign=True)
    except (RuntimeError, KeyError, TypeError) as problem:
        raise UserError(f"{file}: config and weights disagree or are missing: "
                        f"{' '.join(str(problem).split())[:200]}") from None
    return model.to(device), state
