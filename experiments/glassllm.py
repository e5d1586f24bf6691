"""A tiny real model that is cut and recovered in seconds: one of the two in the PyPI package glassllm.

    python -m experiments.glassllm fetch glass        # a Hugging Face folder of 852,608 parameters (2 MB)
    python prune.py --init glass --keep 0.6 --data texts/brown.jsonl --out runs/cut
    python train.py --init runs/cut --teacher glass --plan recover --data texts/brown.jsonl --steps 300 --lr 1e-3

The package (MIT, 3 MB) is a Transformer in NumPy, trained on Lewis Carroll (en) or Machado de Assis
(pt), with a context of 128 tokens. Its layers are Llama's, stored as (in, out); its rotary positions
turn neighbours (2i, 2i + 1) of a head, and ours turn (i, i + D/2). Its tokenizer merges characters
and not bytes: what its books do not hold becomes <unk>. llama.cpp has no such tokenizer.

No code of the package is run. Not here: a model to use (experiments/smollm2.py).
"""
import io
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common import UserError, parse, run
from experiments.smollm2 import download
from formats import huggingface
from formats.tokenizer import read_json
from formats.tokenizer_json import BLANK
from model import GPT, check_values, config_from

PACKAGE = "glassllm==0.1.0"
LICENSE = "glassllm-0.1.0.dist-info/licenses/LICENSE"
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")

# A member of the archive is unpacked up to so many bytes. (The largest has 1.6 million.)
LARGEST = 2**26

# Our names of parameters, and those of the package. Its matrices are (in, out).
NAMES = {"attn_norm.weight": "norm1.gamma", "attn.q.weight": "attn.W_Q", "attn.k.weight": "attn.W_K",
         "attn.v.weight": "attn.W_V", "attn.o.weight": "attn.W_O", "ffn_norm.weight": "norm2.gamma",
         "ffn.gate.weight": "ffn.W1", "ffn.up.weight": "ffn.W3", "ffn.down.weight": "ffn.W2"}
CARD = """---
license: mit
language: {language}
library_name: transformers
---
# glassllm, {language}

A model of {params:,} parameters out of the PyPI package `{package}` by Oséias Dias de Farias,
with its rows in the order of Hugging Face's Llama.
"""


@dataclass(frozen=True)
class Glass:
    task: Literal["fetch"]
    folder: str                   # the Hugging Face folder to write
    language: Literal["en", "pt"] = "en"


def fetch(folder, language):
    """Write one of the package's models as a Hugging Face folder. A folder that has a model is left
    as it is."""
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(download(PACKAGE, tmp)) as wheel:
        model = read_model(io.BytesIO(member(wheel, f"glassllm/weights/{language}.npz")))
        content = read_json(member(wheel, f"glassllm/weights/{language}.tokenizer.json"), PACKAGE)
        license = member(wheel, LICENSE)
    files = tokenizer_files(content)

    # The final name is that of a whole folder.
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    ids = {f"{name}_token_id": SPECIALS.index(f"<{name}>") for name in ("bos", "eos", "pad")}
    files["generation_config.json"] = json.dumps(ids)
    huggingface.save(beside, model, "llama", files, ids)
    (beside / "LICENSE").write_bytes(license)
    params = model.config.num_params()["total"]
    card = CARD.format(language=language, params=params, package=PACKAGE)
    (beside / "README.md").write_text(card, encoding="utf-8")
    os.replace(beside, folder)
    print(f"{folder}: {params:,} parameters")


def member(wheel, name):
    """The content of a file in the package. Raises UserError if it is missing or too large."""
    try:
        size = wheel.getinfo(name).file_size
    except KeyError:
        raise UserError(f"{PACKAGE} has no {name}; another version may be cached: empty pip's cache") from None
    if size > LARGEST:
        raise UserError(f"{name} of {PACKAGE} has {size:,} bytes, more than {LARGEST:,}; do not use it")
    return wheel.read(name)


def read_model(file):
    """A file of the package's weights (.npz) -> GPT in their dtype. Raises UserError for one of
    another form; pickled objects in it are never read."""
    try:
        arrays = dict(np.load(file, allow_pickle=False))
        theirs = json.loads(str(arrays.pop("__config__")))
        head_dim = theirs["d_model"] // theirs["n_heads"]
        layers = theirs["n_layers"]
        fields = dict(vocab_size=theirs["vocab_size"], block_size=theirs["max_len"], d_model=theirs["d_model"],
                      head_dim=head_dim, n_head=(theirs["n_heads"],) * layers,
                      n_kv_head=(theirs["n_kv_heads"],) * layers, d_ff=(arrays["blocks.0.ffn.W1"].shape[1],) * layers,
                      norm_eps=theirs["eps"], rope_theta=theirs["rope_base"])
        with torch.device("meta"):
            model = GPT(config_from(PACKAGE, fields))
        weights = {}
        for name, _ in model.named_parameters():
            weights[name] = our_tensor(name, arrays, head_dim)
            check_values(weights[name], weights[name].dtype, name, PACKAGE)
        model.load_state_dict(weights, assign=True)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError, RuntimeError,
            zipfile.BadZipFile) as problem:
        raise UserError(f"the weights of {PACKAGE} are not of the form that we know ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())[:120]}); take the version named here") from None
    return model


def our_tensor(name, arrays, head_dim):
    """The parameter of ours that is called `name`, out of the package's arrays."""
    if name == "embed.weight":
        return torch.from_numpy(arrays["E"])
    if name == "norm.weight":
        return torch.from_numpy(arrays["norm_f.gamma"])
    _, layer, rest = name.split(".", 2)
    tensor = torch.from_numpy(arrays[f"blocks.{layer}.{NAMES[rest]}"])
    if tensor.dim() == 2:
        tensor = tensor.T
    if rest in ("attn.q.weight", "attn.k.weight"):
        # Rows 2i and 2i + 1 of a head become its rows i and i + D/2.
        tensor = tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return tensor.contiguous()


def tokenizer_files(content):
    """The package's tokenizer -> {file name: text} of the same in Hugging Face's form.

    Text is brought to NFC and its blanks are spelled as U+2581. Words are cut at line ends and in
    front of blanks; within a word the merges go in their order."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    try:
        merges = [(left, right) for left, right in content["merges"]]
        texts = [*SPECIALS, *content["alphabet"], *(left + right for left, right in merges)]
        # Of two tokens of one text the package takes the last.
        vocab = {text: i for i, text in enumerate(texts)}
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    except Exception as problem:             # the library raises nothing more specific
        raise UserError(f"the tokenizer of {PACKAGE} is not of the form that we know ({problem}); take the version "
                        "named here") from None
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", BLANK)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{BLANK}*[^{BLANK}\n]+|{BLANK}+"), "isolated")
    backend.decoder = decoders.Replace(BLANK, " ")
    backend.add_special_tokens(list(SPECIALS))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}


def main(config):
    fetch(Path(config.folder), config.language)


if __name__ == "__main__":
    run(lambda: main(parse(Glass)))
