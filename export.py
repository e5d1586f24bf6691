"""A trained or pruned model out, into the files that other runtimes load, and read back by them
before it says done.

    python export.py runs/idea-laptop-0 --to gguf model.gguf          # stock llama.cpp
    python export.py runs/idea-laptop-0 --to hf folder                # transformers (and, of equal widths, everything)
    python export.py runs/idea-laptop-0 --to deci folder              # vLLM's DeciLM: per-layer KV heads and neurons

With --to hf a model whose layers all have the same widths becomes a stock LlamaForCausalLM,
Qwen2ForCausalLM or Qwen3ForCausalLM. A model of other widths brings its class along
(formats/modeling_nanoprune.py), and is loaded with trust_remote_code=True.

Every output is written under a temporary name, loaded by the runtime that it is for, and compared
with our logits in float32. Only then is it renamed: what has the final name is whole and checked. A
DeciLM folder is checked in transformers, through the same class; vLLM itself is not run. Not here:
quantization to fewer than 8 bits (llama.cpp's own llama-quantize does it).
"""
import copy
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from common import UserError, check_choices, first_line, parse, printable, run
from formats import gguf_export, huggingface, llamacpp, origin
from formats.model_card import model_card
from formats.tokenizer import from_files, has_tokenizer, special_ids

RUNTIME = {"hf": "transformers", "deci": "transformers", "gguf": "xllamacpp"}
GGUF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

# Transformers adds up in another order than we do. This much of the largest logit may differ, in
# float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    checkpoint: str               # what to export: ckpt_*.pt, a run folder, a Hugging Face folder or a hub id
    out: str                      # the file (gguf) or folder (hf, deci) to write; it must not exist
    to: Literal["hf", "gguf", "deci"] = "hf"
    # of the matrices; auto: that of the Hugging Face folder that the model was made of, else as stored
    # (float64 as float32); q8_0, 8.5 bits a weight: with --to gguf only
    dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0"] = "auto"
    unchecked: bool = False       # if the runtime that would check the result is not installed, go on without it


# -- reading

def load(config):
    """The model in the dtype that it is to be written in: -> (GPT, about). Raises UserError for a
    weight that this dtype does not hold."""
    name = config.dtype
    if name == "auto":
        # A cut model is stored in float32, whatever it was made of.
        _, about = checkpoint.load(config.checkpoint, "meta")
        name = None if "huggingface" in about else origin_of(about)["dtype"]
    if name == "q8_0":
        name = "float32"                     # what is rounded to 8 bits is rounded once
    dtype = None if name is None else getattr(torch, name)
    model, about = checkpoint.load(config.checkpoint, "cpu", dtype)
    if model.embed.weight.dtype == torch.float64:
        # Read again, which refuses what float32 does not hold.
        model, about = checkpoint.load(config.checkpoint, "cpu", torch.float32)
    return model, about


def origin_of(about):
    """Where the model comes from, by formats/origin.py, also if nothing is known of it."""
    return about.get("origin") or origin.NOTHING


# -- writing

def write(config, model, about, path, figures=None):
    """Write the model to `path`: -> a phrase about its layout. `figures` is Markdown for its model
    card. Raises UserError if no runtime computes this model."""
    checkpoint.refuse_evaluation_only(model)
    if config.to == "gguf":
        dtype = gguf_dtype(config, model)
        tokenizer = checkpoint.tokenizer_of(model, about, config.checkpoint)
        source = Path(config.checkpoint).resolve()
        name = source.parent.name if source.is_file() else source.name
        known = origin_of(about)
        # A folder that is exported as it is has no other model behind it.
        base_model = None if "huggingface" in about else known["name"]
        gguf_export.write_gguf(model, tokenizer, path, dtype, name, known["license"], base_model)
        layout = f"GGUF, architecture {gguf_export.architecture(model.config)}, {dtype}"
        rest = gguf_export.not_quantized(model)
        if dtype == "q8_0" and rest:
            layout += (f", with {len(rest)} matrices in f16, as 32 does not divide their rows ({rest[0]}; cut with "
                       "--multiple-of 32)")
        return layout

    if config.to == "deci":
        family = "nemotron-nas"
    else:
        family = huggingface.stock_family(model.config) or "nanoprune"
    files, special = tokenizer_files(model, about, config.checkpoint)
    path.mkdir(parents=True)
    huggingface.save(path, model, family, files, special)
    write_card(config, model, about, path, files, figures)

    written = json.loads((path / "config.json").read_text())
    layout = f"{written['architectures'][0]}, {written['torch_dtype']}"
    if "auto_map" in written:
        layout += ", with its code: load it with trust_remote_code=True"
    if not has_tokenizer(files):
        layout += ", WITHOUT a tokenizer: it came without one, or tiktoken's has no tokenizer.json"
    return layout


def gguf_dtype(config, model):
    """The type of the matrices of a GGUF file."""
    return "q8_0" if config.dtype == "q8_0" else GGUF_DTYPE[model.embed.weight.dtype]


def write_card(config, model, about, path, files, figures):
    """Write README.md and the legal texts into the folder, if the checkpoint says what it was made of."""
    known = origin.hand_on(about)
    if known is None and figures is None:
        return
    known = known or origin.NOTHING
    origin.write(path, known)
    has_chat = "chat_template.jinja" in files or '"chat_template"' in files.get("tokenizer_config.json", "")
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    own_code = (path / huggingface.OWN_FILE.name).exists()
    text = model_card(printable(Path(config.out).name), model.config, known, dtype, own_code, has_chat, figures)
    (path / "README.md").write_text(text, encoding="utf-8")


def tokenizer_files(model, about, source):
    """The tokenizer of a model that `checkpoint.load` opened: ({file name: content}, ids of its
    special tokens). Files of a Hugging Face folder are handed on as they came, even if we could not
    read the tokenizer."""
    if "huggingface" in about:
        files = about["tokenizer_files"]
        refuse_larger_tokenizer(model, files, source)
        special = {name: about["huggingface"].get(name) for name in ("bos_token_id", "eos_token_id")}
    else:
        tokenizer = checkpoint.tokenizer_of(model, about, source)
        files = tokenizer.as_files()
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    # What generates text reads these first: there may be several ends of a text.
    return files, {**special, **special_ids(files, model.config.vocab_size, source)}


def refuse_larger_tokenizer(model, files, source):
    """Raise UserError if the tokenizer in these files has more tokens than the model. One that we
    cannot read passes."""
    try:
        tokenizer = from_files(source, files)
    except UserError:
        return
    tokenizer.refuse_fewer_rows(model.config.vocab_size, source)


# -- checking

def check(config, model, about, path, installed):
    """Compare what `path` holds with the model: -> a phrase about the result. Raises UserError if
    the two differ."""
    if config.to != "gguf":
        check_reader(path, model)
    if not installed:
        return f"not checked, as {RUNTIME[config.to]} is not installed"
    exact = copy.deepcopy(model).float()
    if config.to == "gguf":
        tokenizer = checkpoint.tokenizer_of(model, about, config.checkpoint)
        dtype = gguf_dtype(config, model)
        if dtype == "q8_0":
            exact = gguf_export.as_in_q8_0(model)
        difference = llamacpp.check_gguf(path, exact, dtype=dtype, tokenizer=tokenizer)
        return f"the same in xllamacpp: log-probabilities at most {difference:.1e} apart"
    difference = check_transformers(path, exact)
    return f"the same in transformers: logits at most {difference:.1e} apart"


def check_reader(folder, model):
    """Read `folder` with our own reader. Raises UserError unless the config and, bit for bit, the
    weights are those of the model."""
    again, _ = checkpoint.load(folder)
    weights = zip(model.named_parameters(), again.parameters())
    different = [name for (name, a), b in weights if not torch.equal(a, b)]
    if again.config != model.config or different:
        raise UserError(f"read back, {folder} is another model "
                        f"({', '.join(different[:3]) or again.config}); this is a bug, please "
                        "report it")


def check_transformers(folder, model):
    """Load `folder` in transformers and compare the logits of two random texts: -> the largest
    difference. Raises UserError if it is above TOLERANCE of the largest logit."""
    peer = in_transformers(folder)
    shape = 2, min(64, model.config.block_size)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
        difference = (logits - peer(tokens).logits).abs().max().item()
    largest = logits.abs().max().item()
    # Written so that a difference that is not a number is refused as well.
    if not difference <= TOLERANCE * largest:
        raise UserError(f"transformers computes other logits from {folder}: up to {difference:.2g} "
                        f"apart, the largest being {largest:.2g}; this is a bug, please report it")
    return difference


def in_transformers(folder):
    """A Hugging Face folder as transformers' model, in float32, without progress bars and warnings.
    Raises UserError if the folder brings along other code than ours, or an adapter, which names
    another folder."""
    huggingface.refuse_adapter(Path(folder))
    own_code = huggingface.has_own_code(Path(folder))
    import transformers
    transformers.utils.logging.disable_progress_bar()
    # It warns that "torch_dtype is deprecated", but version 4.51 has no other name for it.
    transformers.utils.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, trust_remote_code=own_code)
    except Exception as problem:             # whatever transformers raises at odd files
        raise UserError(f"transformers does not load {folder} ({type(problem).__name__}: {first_line(problem)}); "
                        "correct config.json or generation_config.json of the model") from problem
    return model.eval()


# -- the command

def main(config, figures=None):
    """Export by the settings. `figures` is Markdown for the model card of a folder, or None."""
    check_choices(config)
    if config.dtype == "q8_0" and config.to != "gguf":
        raise UserError(f"--dtype q8_0 is a type of GGUF files, and --to {config.to} writes none; give --to gguf")
    out = Path(config.out)
    if out.exists():
        raise UserError(f"{out} is there already; give another place or delete it")
    runtime = RUNTIME[config.to]
    installed = importlib.util.find_spec(runtime) is not None
    if not installed and not config.unchecked:
        raise UserError(f"{runtime}, which would check the result, is not installed: pip install "
                        f"{runtime}, or go on without the check by --unchecked")

    model, about = load(config)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        layout = write(config, model, about, beside, figures)
        checked = check(config, model, about, beside, installed)
        os.replace(beside, out)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)

    files = out.iterdir() if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {size:,} bytes, {layout}; {checked}")


if __name__ == "__main__":
    run(lambda: main(parse(Export)))
