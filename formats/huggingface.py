"""Hugging Face folders in and out: config.json, *.safetensors and the tokenizer's files <-> our
GPT.

    python eval.py HuggingFaceTB/SmolLM2-135M --data README.md --block-size 512       # a hub id, or a folder
    python export.py runs/idea-laptop-0 --to hf OUT

In. Llama 2/3, SmolLM2, MobileLLM, Mistral, Qwen 2/2.5 and Qwen 3 are one decoder with different
numbers, which `read_config` reads. A model whose logits would differ is refused, with the reason.
Configs may be spelled as by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).
Reading needs no transformers. Tensors come out of safetensors, or out of a pytorch_model.bin whose
code is never run, one by one and in the dtype that is asked for, so the peak of memory is the model
itself. A folder that somebody sent cannot make us read or write files outside of it.

Out. A model whose layers all have the same widths is written as a stock class. Other models bring
their own class along (formats/modeling_nanoprune.py) or take the layout of DeciLM, which vLLM
knows.

Not here: checks in other runtimes (export.py), GGUF (formats/llamacpp.py), Gemma, mixtures of
experts, quantized weights.
"""
import json
import operator
import re
import shutil
from pathlib import Path

import torch

from common import UserError, read_pickled_tensors
from formats import origin
from formats.tokenizer import check_files, read_files, read_json
from model import GPT, MOST_LAYERS, check_values, config_from, with_context

FAMILIES = ("llama", "mobilellm", "mistral", "qwen2", "qwen3", "nanoprune", "nemotron-nas")

# Our names of parameters, and those of Hugging Face.
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# The same within a layer: ours stand behind "blocks.<i>.", theirs behind "model.layers.<i>.".
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.q.bias": "self_attn.q_proj.bias",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.k.bias": "self_attn.k_proj.bias",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.v.bias": "self_attn.v_proj.bias",
    "attn.o.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}

# What our decoder computes. A config.json that lacks one of these keys means the same.
SUPPORTED = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "bias": False, "layer_sharing": False}

# transformers' default of max_position_embeddings; 2,048 for the others.
DEFAULT_CONTEXT = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}

# Llama 3's scaling of rotary positions, in the order of GPTConfig.rope_scaling.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "nanoprune": "NanopruneForCausalLM", "nemotron-nas": "DeciLMForCausalLM"}

# Families whose class is in formats/modeling_nanoprune.py, and how its names begin there.
OWN_CODE = {"nanoprune": "Nanoprune", "nemotron-nas": "DeciLM"}
OWN_FILE = Path(__file__).with_name("modeling_nanoprune.py")


def their_name(name):
    """Our name of a parameter -> Hugging Face's."""
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if layer is None:
        return NAMES[name]
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}"


# -- in: config.json. The dictionary is called `hf`, our GPTConfig `config`.

def refusal(where, reason):
    return UserError(f"{where} cannot be loaded: {reason}")


def check_supported(hf, where):
    """Raise UserError if a config.json describes another decoder than ours, and say what
    differs."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise refusal(where, f"model_type {family!r} is another decoder than ours; supported are "
                             f"{', '.join(FAMILIES)}")
    if hf.get("num_experts") or hf.get("num_local_experts"):
        raise refusal(where, "it is a mixture of experts")
    if hf.get("quantization_config"):
        raise refusal(where, "its weights are quantized; take the repository with plain weights")
    for name, value in SUPPORTED.items():
        if hf.get(name, value) != value:
            raise refusal(where, f"{name} is {hf[name]!r}, and only {value!r} is supported")


def read_context(hf, where, block_size):
    """The context in tokens. A sliding window is no window for texts up to its length: the context
    is then the window's. Raises UserError if `block_size` is longer than that."""
    family = hf["model_type"]
    context = int(hf.get("max_position_embeddings", DEFAULT_CONTEXT.get(family, 2048)))
    window = None
    if family == "mistral" or hf.get("use_sliding_window"):
        window = hf.get("sliding_window", 4096)
    if window and block_size and window < block_size:
        raise refusal(where, f"it attends to {window} tokens by a sliding window, fewer than the "
                             f"context of {block_size}; ask for at most {window} by --block-size")
    return min(context, window or context)


def read_rope(hf, where):
    """The rotary positions: (theta, scaling as in GPTConfig), from the spelling of either version
    of transformers. Of the scalings, ours computes Llama 3's only."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    if kind not in ("default", "llama3"):
        raise refusal(where, f"its rotary positions are scaled by {kind!r}, and only 'default' and "
                             "'llama3' are supported")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1:
        raise refusal(where, "its heads are rotated in part")
    if kind == "default":
        return theta, ()
    return theta, tuple(float(rope[name]) for name in ROPE_SCALING)


def read_widths(hf):
    """Query heads, KV heads and neurons of each layer: three sequences."""
    layers = hf["num_hidden_layers"]
    heads = hf["num_attention_heads"]
    if layers > MOST_LAYERS:                 # before anything is as long as that
        raise ValueError(f"num_hidden_layers, {layers:,}")
    if hf["model_type"] == "nanoprune":
        return hf["n_head"], hf["n_kv_head"], hf["d_ff"]
    if hf["model_type"] == "nemotron-nas":
        return read_deci_widths(hf["block_configs"], heads, hf["hidden_size"])
    kv_heads = hf.get("num_key_value_heads") or heads
    return (heads,) * layers, (kv_heads,) * layers, (hf["intermediate_size"],) * layers


def read_deci_widths(block_configs, heads, d_model):
    """The same from DeciLM's block_configs. `heads` is the number of query heads, which all layers
    share."""
    n_head = []
    n_kv_head = []
    d_ff = []
    for block in block_configs:
        attention = block["attention"]
        ffn = block["ffn"]
        for part in (attention, ffn):
            if part.get("replace_with_linear") or part.get("window_length"):
                raise ValueError("replace_with_linear or window_length in block_configs")
        n_head.append(0 if attention["no_op"] else heads)
        n_kv_head.append(0 if attention["no_op"] else heads // attention["n_heads_in_group"])
        if ffn["no_op"]:
            d_ff.append(0)
        else:
            d_ff.append(ffn.get("intermediate_size") or deci_d_ff(ffn["ffn_mult"], d_model))
    return n_head, n_kv_head, d_ff


def deci_d_ff(ffn_mult, d_model):
    """DeciLM's rule for FFN neurons: 2/3 · ffn_mult · d_model, rounded up to 256 (vLLM's
    nemotron_nas.py)."""
    return -(-int(2 * ffn_mult * d_model / 3) // 256) * 256


def read_config(hf, where, block_size=None):
    """A config.json (dict) -> GPTConfig. A key that is absent has the default of transformers'
    class. Raises UserError if the model is another decoder than ours, or if a value is missing or
    makes no sense."""
    check_supported(hf, where)
    family = hf["model_type"]
    try:
        theta, scaling = read_rope(hf, where)
        n_head, n_kv_head, d_ff = read_widths(hf)
        if hf.get("head_dim"):
            head_dim = int(hf["head_dim"])
        else:
            head_dim = 128 if family == "qwen3" else hf["hidden_size"] // hf["num_attention_heads"]
        fields = dict(
            vocab_size=int(hf["vocab_size"]),
            block_size=read_context(hf, where, block_size),
            d_model=int(hf["hidden_size"]),
            head_dim=head_dim,
            n_head=tuple(operator.index(n) for n in n_head),
            n_kv_head=tuple(operator.index(n) for n in n_kv_head),
            d_ff=tuple(operator.index(n) for n in d_ff),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(hf.get("tie_word_embeddings") or hf.get("share_embedding")),
            qkv_bias=hf.get("qkv_bias", family == "qwen2"),
            qk_norm=hf.get("qk_norm", family == "qwen3"))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as problem:
        raise refusal(where, f"config.json lacks or garbles {problem}; download it again") from None
    return config_from(where, fields)


# -- in: weights

# The files that transformers looks for, in its order.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def tensor_files(folder):
    """Where each tensor of a folder lies: {Hugging Face's name: (file, its name in the file)}. Raises
    UserError if there are no weights, if an index is broken or leads out of the folder, or if two
    tensors have one name."""
    present = [name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder} has no model.safetensors nor its index, and no pytorch_model.bin; download the "
                        "whole repository")
    file = folder / present[0]
    if file.suffix == ".json":
        stored = read_index(file)
    else:
        stored = dict.fromkeys(names_in(file), file)
    files = {}
    for name, file in stored.items():
        if full_name(name) in files:
            raise UserError(f"{folder} holds {full_name(name)} twice, as {files[full_name(name)][1]} and as {name}; "
                            "keep one of the two")
        files[full_name(name)] = file, name
    return files


def full_name(name):
    """A tensor's name as transformers' class for text has it. A compiled model has "_orig_mod." in its
    names, and a model without a head has no "model." in front."""
    name = name.replace("_orig_mod.", "")
    if name.startswith(("model.", "lm_head.")):
        return name
    return "model." + name


def read_index(index):
    """An index of weights -> {tensor: file}. Raises UserError if the index is broken or names files
    that are not beside it."""
    try:
        weight_map = read_json(index.read_bytes(), index)["weight_map"]
        names = sorted(set(weight_map.values()))
        suffix = index.suffixes[0]
        outside = [name for name in names if not re.fullmatch(rf"[\w.-]+\{suffix}", name)]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} has no weight_map of tensors and files; download it "
                        "again") from None
    # Whoever sends a folder does not choose which other files of this machine are read.
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, and only *{suffix} files beside it are "
                        "read; do not use it, or correct the name")
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not there; download the whole "
                            "repository")
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def names_in(file):
    """The names of the tensors in a file of weights."""
    if file.suffix == ".bin":
        return list(read_bin(file))
    with open_shard(file) as shard:
        return list(shard.keys())


def read_bin(file):
    """A .bin file -> {name: tensor}, each in the file until it is used. Raises UserError if the file
    holds code or anything but tensors by name."""
    weights = read_pickled_tensors(file, "take the repository's *.safetensors, or do not use it", mmap=True)
    is_plain = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not is_plain or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{file} holds no dictionary of tensors by name; take the model's state_dict")
    return weights


def open_shard(file):
    """Open a safetensors file. Raises UserError if it is cut short or no such file."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as problem:
        raise UserError(f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors "
                        f"file ({problem}); download it again") from None


def read_rows(file, name, shape, start, stop):
    """Copy the rows [start, stop) of a tensor out of the file, in the stored dtype. The file is closed
    again at once. Otherwise the part of its memory map that was read would count as ours, and the peak
    would be twice the model. Raises UserError if the tensor is missing, quantized or of another
    shape."""
    if file.suffix == ".bin":
        weights = read_bin(file)
        if name not in weights:
            raise missing_tensor(file, name)
        stored = weights[name]
        kind = stored.dtype if stored.layout == torch.strided else stored.layout
        check_tensor(file, name, shape, stored.shape, kind)
        return stored[start:stop].clone()
    from safetensors import SafetensorError
    with open_shard(file) as shard:
        try:
            stored = shard.get_slice(name)
        except SafetensorError:
            raise missing_tensor(file, name) from None
        kind = DTYPES.get(stored.get_dtype(), stored.get_dtype())
        check_tensor(file, name, shape, stored.get_shape(), kind)
        if start == stop:
            return torch.empty(0, *shape[1:], dtype=kind)
        return stored[start:stop]


def missing_tensor(file, name):
    return UserError(f"{file} has no tensor {name}, though the index says so; download it again")


def check_tensor(file, name, shape, stored_shape, kind):
    """Raise UserError if a stored tensor has another shape than the model's or is none of DTYPES."""
    if tuple(stored_shape) != tuple(shape):
        raise UserError(f"{file}: tensor {name} is {tuple(stored_shape)}, config.json "
                        f"asks for {tuple(shape)}; config and weights are not of the same "
                        "model")
    if kind not in DTYPES.values():
        raise UserError(f"{file}: tensor {name} is {kind}; only {', '.join(DTYPES)} are read")


def check_names(folder, family, model, files):
    """Raise UserError unless `files` has the model's tensors and no others. Two may be left over:
    the frequencies of rotary positions, which old files store, and the head of a tied model."""
    expected = {their_name(name) for name, _ in model.named_parameters()}
    if expected - files.keys() == {"lm_head.weight"}:
        raise UserError(f"{folder} has no tensor lm_head.weight, and its config.json does not tie the head to the "
                        "embedding; set tie_word_embeddings to true in config.json if the model is tied")
    for name in expected - files.keys():
        raise UserError(f"{folder} has no tensor {name}, which its config.json asks for; download "
                        "the whole repository")
    for name in files.keys() - expected:
        tied_head = name == "lm_head.weight" and model.head is None
        if not (tied_head or name.endswith("rotary_emb.inv_freq")):
            raise UserError(f"{files[name][0]} holds {files[name][1]}, for which a {family} model of this "
                            "config.json has no place; config and weights are not of the same "
                            "model")


def refuse_adapter(folder):
    """Raise UserError if a folder holds a LoRA adapter, which is a change to the weights of another
    model."""
    if (folder / "adapter_config.json").is_file():
        base = read_json((folder / "adapter_config.json").read_bytes(), folder / "adapter_config.json")
        raise UserError(f"{folder} holds an adapter (LoRA) for {base.get('base_model_name_or_path')}, not a model; "
                        "merge the two by peft's merge_and_unload() and save_pretrained(), and give that folder")


def stored_dtype(folder):
    """The name of the dtype of the stored embedding, such as "bfloat16"; None for a folder without
    weights."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        return None
    file, name = tensor_files(folder).get(NAMES["embed.weight"], (None, None))
    if file is None:
        return None
    if file.suffix == ".bin":
        kind = read_bin(file)[name].dtype
    else:
        with open_shard(file) as shard:
            kind = DTYPES.get(shard.get_slice(name).get_dtype())
    return str(kind).removeprefix("torch.") if kind in DTYPES.values() else None


class Tensors:
    """The weights of a folder by our names. Rows are read when they are asked for."""
    def __init__(self, folder, model, files):
        self.folder = folder
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.files = files
        self.ties = model.head is None and "lm_head.weight" in files

    def where(self, name):
        """What a message about a tensor names: its file, and its name there."""
        return self.files[their_name(name)]

    def rows(self, name, start, stop):
        """The rows [start, stop) of a tensor, in main memory and in the stored dtype. Raises UserError
        if the folder ties the head to the embedding and holds another head."""
        rows = read_rows(*self.where(name), self.shapes[name], start, stop)
        if name == "embed.weight" and self.ties:
            check_values(rows, rows.dtype, *reversed(self.where(name)))
            head = read_rows(*self.files["lm_head.weight"], self.shapes[name], start, stop)
            if not torch.equal(rows, head.to(rows.dtype)):
                raise UserError(f"{self.folder} ties head and embedding, but holds two different ones; set "
                                "tie_word_embeddings to false in config.json if both are meant")
        return rows


def open_weights(folder, block_size=None, reads=True):
    """Open a Hugging Face folder: -> (GPTConfig, {"huggingface": config.json, "tokenizer_files": {file
    name: content}, "origin": see formats/origin.py}, its Tensors).

    `block_size` is the context that is wanted; None takes all. If no weights will be read (not
    `reads`), there are no Tensors. Raises UserError if the model is not ours to compute, or if a file
    is missing or broken."""
    refuse_adapter(folder)
    hf = read_json((folder / "config.json").read_bytes(), folder / "config.json")
    about = {"huggingface": hf, "tokenizer_files": read_files(folder)}
    with torch.device("meta"):
        model = GPT(with_context(read_config(hf, folder, block_size), block_size, folder))
    params = model.config.num_params()["total"]
    about["origin"] = origin.read(folder, folder.resolve().name, stored_dtype(folder), params)
    if not reads:
        return model.config, about, None
    files = tensor_files(folder)
    check_names(folder, hf["model_type"], model, files)
    return model.config, about, Tensors(folder, model, files)


# -- out

def stock_family(config):
    """"llama", "qwen2" or "qwen3" if that stock class can be this model; None if it needs another
    layout."""
    shapes = set(zip(config.n_head, config.n_kv_head, config.d_ff))
    if len(shapes) > 1 or 0 in shapes.pop():
        return None                          # the layers differ, or lack a sub-block
    if config.qkv_bias and config.qk_norm:
        return None
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    # transformers 5 checks this of Llama only.
    return "llama" if config.d_model % config.n_head[0] == 0 else None


def write_config(config, family, dtype, special):
    """GPTConfig -> config.json (dict), in the spelling of transformers 4, which version 5 reads,
    too. `special` holds "bos_token_id", "eos_token_id" and, where known, "pad_token_id"."""
    heads = max(config.n_head)
    kv_heads = max(config.n_kv_head)
    if family == "nanoprune" and (heads == 0 or config.d_model % heads):
        # Our class does not use these two, but transformers 5 asks for a divisor of d_model.
        heads = 1
        kv_heads = 1
    hf = {"architectures": [ARCHITECTURES[family]],
          "model_type": family,
          "hidden_act": "silu",
          "torch_dtype": dtype,
          "vocab_size": config.vocab_size,
          "max_position_embeddings": config.block_size,
          "hidden_size": config.d_model,
          "head_dim": config.head_dim,
          "num_hidden_layers": config.n_layer,
          "num_attention_heads": heads,
          "num_key_value_heads": kv_heads,
          "intermediate_size": max(config.d_ff),
          "rms_norm_eps": config.norm_eps,
          "rope_theta": config.rope_theta,
          "tie_word_embeddings": config.tie_embeddings,
          "attention_bias": False,
          "mlp_bias": False,
          "use_cache": True,
          **special}
    if config.rope_scaling:
        scaling = dict(zip(ROPE_SCALING, config.rope_scaling))
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
        hf["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if family in OWN_CODE:
        hf["qkv_bias"] = config.qkv_bias
        hf["qk_norm"] = config.qk_norm
        hf["auto_map"] = auto_map(family)
    if family in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = False
        hf["sliding_window"] = None
    if family == "nanoprune":
        hf["n_head"] = config.n_head
        hf["n_kv_head"] = config.n_kv_head
        hf["d_ff"] = config.d_ff
    if family == "nemotron-nas":
        hf["block_configs"] = deci_blocks(config)
    return hf


def auto_map(family):
    """Which classes of modeling_nanoprune.py transformers takes for a family in OWN_CODE."""
    return {"AutoConfig": f"modeling_nanoprune.{OWN_CODE[family]}Config",
            "AutoModelForCausalLM": f"modeling_nanoprune.{OWN_CODE[family]}ForCausalLM"}


def has_own_code(folder):
    """Whether a folder brings code along that transformers is to run, and it is ours, byte for byte.
    Raises UserError for other code."""
    hf = read_json((folder / "config.json").read_bytes(), folder / "config.json")
    if "auto_map" not in hf:
        return False
    file = folder / OWN_FILE.name
    family = hf.get("model_type")
    is_ours = family in OWN_CODE and hf["auto_map"] == auto_map(family)
    if not is_ours or not file.is_file() or file.read_bytes() != OWN_FILE.read_bytes():
        raise UserError(f"{folder} brings code along ({json.dumps(hf['auto_map'])[:200]}) that is not this project's "
                        f"{OWN_FILE.name}, and such code is never run; export the model anew by python export.py")
    return True


def deci_blocks(config):
    """DeciLM's block_configs: KV heads and neurons of each layer, with one number of query heads
    for all. Raises UserError for a model that DeciLM cannot be, and names the layer."""
    heads = max(config.n_head)
    if config.n_head[0] == 0:
        raise UserError("layer 0 has no attention, where vLLM's DeciLM starts the residual; use "
                        "--to gguf or --to hf")
    if config.d_model % heads:
        raise UserError(f"layer 0 has {heads} query heads, which do not divide d_model "
                        f"{config.d_model}, as transformers asks of DeciLM's config; use --to gguf "
                        "or --to hf")
    if config.qk_norm:
        raise UserError("DeciLM has no QK norm, which layer 0 and all others have; use --to gguf "
                        "or --to hf")
    blocks = []
    for layer, (n_head, n_kv_head, d_ff) in enumerate(zip(config.n_head, config.n_kv_head, config.d_ff)):
        if n_head not in (0, heads):
            raise UserError(f"DeciLM has one number of query heads, layer {layer} has {n_head} and "
                            f"others {heads}; prune KV groups in all layers alike or in none, or "
                            "use --to gguf or --to hf")
        attention = {"no_op": not n_head, "replace_with_linear": False,
                     "n_heads_in_group": n_head // n_kv_head if n_head else None}
        ffn = {"no_op": not d_ff, "replace_with_linear": False}
        ffn_mult = 1.5 * d_ff / config.d_model
        if d_ff and deci_d_ff(ffn_mult, config.d_model) == d_ff:
            ffn["ffn_mult"] = ffn_mult
        elif d_ff:
            # No multiple of 256. vLLM reads this key, other runtimes do not.
            ffn["intermediate_size"] = d_ff
        blocks.append({"attention": attention, "ffn": ffn})
    return blocks


def save(folder, model, family, files=None, special=None):
    """Write a model into the empty `folder`: config.json, model*.safetensors (5 GB each, with an
    index) in the model's dtype, the tokenizer's `files` {name: content} and, if the family has its
    own code, that. Raises UserError if a file has another name than those of tokenizers."""
    from huggingface_hub import save_torch_state_dict
    # The names may come out of a checkpoint that somebody sent: they lead nowhere else and replace
    # no file of ours.
    files = files or {}
    check_files("the model", files)
    folder = Path(folder)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    hf = write_config(model.config, family, dtype, special or {})
    # What came with the tokenizer is written first, so that it cannot replace a file of ours.
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    weights = {their_name(name): p.detach() for name, p in model.named_parameters()}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    if family in OWN_CODE:
        shutil.copy(OWN_FILE, folder)
    (folder / "config.json").write_text(json.dumps(hf, indent=1) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)                    # safetensors makes files that only their owner may read
