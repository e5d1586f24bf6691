"""A model on disk: one self-describing file, written whole or not at all, read by one function for everybody.

    python -c "import checkpoint; print(checkpoint.load('runs/idea-laptop-0')[0].config)"
"""
import dataclasses
import pickle
import re
import zipfile
from pathlib import Path

import torch

from common import UserError, write_atomic
from model import GPT, GPTConfig

FORMAT = "nanoprune checkpoint 1"


def save(path, model, **state):
    """Write {"format", "config", "model", **state} to `path`: temporary name, fsync, rename. `state` is plain Python
    and tensors (the tokenizer's name, plan, step, optimizer, provenance …), so that it loads with
    weights_only=True."""
    plain = getattr(model, "_orig_mod", model)                        # torch.compile's wrapper would prefix every name
    content = {"format": FORMAT, "config": dataclasses.asdict(plain.config), "model": plain.state_dict(), **state}
    write_atomic(path, lambda file: torch.save(content, file))


def checkpoints(folder):
    """A run folder's checkpoints, oldest first: files named ckpt_<step in 8 digits>.pt."""
    return sorted(Path(folder).glob("ckpt_" + "[0-9]" * 8 + ".pt"))


def newest(folder):
    """The checkpoint with the highest step in a run folder, or None."""
    return max(checkpoints(folder), default=None)


def load(path, device="cpu"):
    """Open a checkpoint, or a run folder's newest: -> (GPT, dict of everything else that `save` was given).
    Raises UserError where the file is missing, truncated, of another version, or holds pickled code."""
    path = Path(path)
    file = newest(path) if path.is_dir() else path
    if file is None or not file.exists():
        raise UserError(f"no checkpoint at {path}; give a ckpt_*.pt file or the folder of a run")
    open(file, "rb").close()                 # what the system refuses passes through, and is not called truncated
    try:
        state = torch.load(file, map_location=device, weights_only=True)
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
    return model, state
