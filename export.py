"""A trained or pruned model out, into the files that other runtimes load, and read back by them before it says done.

    python export.py runs/idea-laptop-0 --to gguf model.gguf          # stock llama.cpp
    python export.py runs/idea-laptop-0 --to hf folder                # transformers (and, of equal widths, everything)
    python export.py runs/idea-laptop-0 --to deci folder              # vLLM's DeciLM: per-layer KV heads and neurons

hf: equal widths in all layers become a stock LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM; other widths
bring their class along (formats/modeling_nanoprune.py, trust_remote_code=True). Every output is written beside its place,
loaded by the runtime it is for, its logits compared with ours in float32, and then renamed: what stands there is whole
and checked (deci is checked in transformers, through the same code file; vLLM itself is not run). Not here:
quantization (llama.cpp's own llama-quantize does it).
"""
import copy
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from common import UserError, parse, run
from formats import gguf_export, huggingface, llamacpp

RUNTIME = {"hf": "transformers", "deci": "transformers", "gguf": "xllamacpp"}
TOLERANCE = 1e-4                       # of the largest logit, in float32: the two add up in another order


@dataclass(frozen=True)
class Export:
    checkpoint: str               # what to export: ckpt_*.pt, a run folder, a Hugging Face folder or a hub id
    out: str                      # the file (gguf) or folder (hf, deci) to write; nothing may be there yet
    to: str = "hf"                # hf, gguf, deci
    dtype: str = "auto"           # of the matrices: float32, float16, bfloat16; auto: as stored (float64 as float32)
    unchecked: bool = False       # if the runtime that would check the result is not installed, go on without it


def check_reader(folder, model):
    """Read `folder` by our own reader: the same config and, bit for bit, weights. UserError: they differ, and where."""
    again, _ = huggingface.load(Path(folder), "cpu", None, None)
    differ = [name for (name, a), b in zip(model.named_parameters(), again.parameters()) if not torch.equal(a, b)]
    if again.config != model.config or differ:
        raise UserError(f"read back, {folder} is another model ({', '.join(differ[:3]) or again.config}); this is "
                        "a bug, please report it")


def in_transformers(folder):
    """A Hugging Face folder as transformers' model, in float32, without its progress bars and warnings."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()      # "torch_dtype is deprecated": version 4.51 has no other name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32,
                                                             trust_remote_code=True).eval()


def check_transformers(folder, model):
    """Load `folder` in transformers and compare the logits of two random texts -> the largest difference. UserError:
    above TOLERANCE."""
    theirs = in_transformers(folder)
    tokens = torch.randint(model.config.vocab_size, (2, min(64, model.config.block_size)),
                           generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, found = copy.deepcopy(model).float()(tokens), theirs(tokens).logits
    worst, largest = (ours - found).abs().max().item(), ours.abs().max().item()
    if not worst <= TOLERANCE * largest:
        raise UserError(f"transformers computes other logits from {folder}: up to {worst:.2g} apart, the largest being "
                        f"{largest:.2g}; this is a bug, please report it")
    return worst


def check_llamacpp(file, model, tokenizer):
    """Ask `file` in llama.cpp -> the largest difference of log-probabilities. UserError: beyond llamacpp.TOLERANCE."""
    return llamacpp.check_gguf(file, copy.deepcopy(model).float(), dtype=gguf_dtype(model), tokenizer=tokenizer)


def gguf_dtype(model):
    return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[model.embed.weight.dtype]


def write(config, model, about, path):
    """Write the model to `path` -> a sentence about the layout. UserError: it is for evaluation only."""
    checkpoint.refuse_evaluation_only(model)
    if config.to == "gguf":
        gguf_export.write_gguf(model, checkpoint.tokenizer_of(about, config.checkpoint), path, gguf_dtype(model))
        return f"GGUF, architecture {gguf_export.architecture(model.config)}, {gguf_dtype(model)}"
    family = "nemotron-nas" if config.to == "deci" else huggingface.stock_family(model.config) or "nanoprune"
    if "huggingface" in about:                          # as they came, even a tokenizer that we could not read
        files = about["tokenizer_files"]
        special = {name: about["huggingface"].get(name) for name in ("bos_token_id", "eos_token_id")}
    else:
        tokenizer = checkpoint.tokenizer_of(about, config.checkpoint)
        files, special = tokenizer.as_files(), {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    path.mkdir(parents=True)
    huggingface.save(path, model, family, files, special)
    written = json.loads((path / "config.json").read_text())
    no_tokenizer = "" if files else ", WITHOUT a tokenizer: it came without one, or tiktoken's has no tokenizer.json"
    own_code = ", with its code: load it with trust_remote_code=True" if "auto_map" in written else ""
    return written["architectures"][0] + own_code + no_tokenizer


def main(config):
    if config.to not in RUNTIME or config.dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise UserError(f"--to {config.to!r} must be hf, gguf or deci, --dtype {config.dtype!r} auto, float32, float16 "
                        "or bfloat16")
    out, runtime = Path(config.out), RUNTIME[config.to]
    if out.exists():
        raise UserError(f"{out} is there already; give another place or delete it")
    installed = importlib.util.find_spec(runtime) is not None
    if not installed and not config.unchecked:
        raise UserError(f"{runtime}, which would check the result, is not installed: pip install {runtime}, or go on "
                        "without the check by --unchecked")
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model, about = checkpoint.load(config.checkpoint, "cpu", dtype)
    if model.embed.weight.dtype == torch.float64:
        model.float()
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        layout = write(config, model, about, beside)
        if config.to != "gguf":
            check_reader(beside, model)
        worst = None
        if installed and config.to == "gguf":
            worst = check_llamacpp(beside, model, checkpoint.tokenizer_of(about, config.checkpoint))
        elif installed:
            worst = check_transformers(beside, model)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in (out.iterdir() if out.is_dir() else [out]))
    what = "log-probabilities" if config.to == "gguf" else "logits"
    checked = f"not checked, as {runtime} is not installed" if worst is None else \
        f"the same in {runtime}: {what} at most {worst:.1e} apart"
    print(f"{out}: {size:,} bytes, {layout}; {checked}")


if __name__ == "__main__":
    run(lambda: main(parse(Export)))
