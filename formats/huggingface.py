"""Hugging Face folders in and out: config.json, *.safetensors and the tokenizer's files <-> our GPT.

    python eval.py HuggingFaceTB/SmolLM2-135M --data README.md --block-size 512       # a hub id, or a folder
    python export.py runs/idea-laptop-0 --to hf OUT

In: Llama 2/3, SmolLM2, MobileLLM, Mistral, Qwen 2/2.5 and Qwen 3 are one decoder in other numbers (`read_config`);
anything whose logits would differ is refused with the reason. Configs may be spelled as by transformers 4 (rope_theta,
rope_scaling) or 5 (rope_parameters). No transformers, no pickles: safetensors, one tensor at a time, in the dtype that
is wanted, so the peak is the model itself. Out: equal widths in all layers are a stock class; others bring their own
class along (formats/modeling_nanoprune.py) or take DeciLM's layout, which vLLM knows. Not here: checks in those runtimes
(export.py), GGUF (formats/llamacpp.py), Gemma, mixtures of experts, quantized weights.
"""
import json
import re
import shutil
from pathlib import Path

import torch

from common import UserError
from formats.tokenizer import FILES, read_files, read_json
from model import GPT, GPTConfig, with_context

FAMILIES = ("llama", "mobilellm", "mistral", "qwen2", "qwen3", "nanoprune", "nemotron-nas")
NAMES = {  # ours -> theirs; a layer's names stand behind blocks.<i>. and model.layers.<i>.
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"attn.{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkvo" for part in ("weight", "bias")},
    **{f"attn.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"ffn.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}}
OWN_CODE = {"nanoprune": "Nanoprune", "nemotron-nas": "DeciLM"}      # classes in formats/modeling_nanoprune.py begin so
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def their_name(name):
    """Our parameter's name -> Hugging Face's."""
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return f"model.layers.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[name]


def read_rope(c, refuse):
    """-> (theta, scaling as in GPTConfig), from either spelling; only Llama 3's scaling is ours."""
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", c.get("rope_theta", 10000.0)))
    if kind not in ("default", "llama3"):
        refuse(f"its rotary positions are scaled by {kind!r}, and only 'default' and 'llama3' are supported")
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) != 1:
        refuse("its heads are rotated in part")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, () if kind == "default" else tuple(float(rope[name]) for name in names)


def read_widths(c):
    """-> n_head, n_kv_head, d_ff, a number per layer: ours ("nanoprune"), DeciLM's block_configs, or one for all."""
    L, H = c["num_hidden_layers"], c["num_attention_heads"]
    if c["model_type"] == "nanoprune":
        return c["n_head"], c["n_kv_head"], c["d_ff"]
    if c["model_type"] != "nemotron-nas":
        return (H,) * L, (c.get("num_key_value_heads") or H,) * L, (c["intermediate_size"],) * L
    attention, ffn = ([block[kind] for block in c["block_configs"]] for kind in ("attention", "ffn"))
    if any(part.get(name) for part in (*attention, *ffn) for name in ("replace_with_linear", "window_length")):
        raise ValueError("replace_with_linear or window_length in block_configs")
    heads = tuple(0 if a["no_op"] else H for a in attention)
    return heads, tuple(h // a["n_heads_in_group"] if h else 0 for h, a in zip(heads, attention)), tuple(
        0 if f["no_op"] else f.get("intermediate_size") or deci_d_ff(f["ffn_mult"], c["hidden_size"]) for f in ffn)


def deci_d_ff(ffn_mult, d_model):
    """DeciLM's rule for FFN neurons: 2/3 · ffn_mult · d_model, rounded up to 256 (vLLM's nemotron_nas.py)."""
    return -(-int(2 * ffn_mult * d_model / 3) // 256) * 256


def read_config(c, where, block_size=None):
    """A config.json (dict) -> GPTConfig. Defaults of absent keys are those of transformers' class. A sliding window is
    no window up to its length: the context is that, unless a longer block_size is asked for. UserError where the model
    is not ours to compute, with what differs."""
    def refuse(reason):
        raise UserError(f"{where} cannot be loaded: {reason}")

    family = c.get("model_type")
    if family not in FAMILIES:
        refuse(f"model_type {family!r} is another decoder than ours; supported are {', '.join(FAMILIES)}")
    if any(c.get(name) for name in ("num_experts", "num_local_experts")):
        refuse("it is a mixture of experts")
    if c.get("quantization_config"):
        refuse("its weights are quantized; take the repository with plain weights")
    for name, allowed in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False), ("bias", False),
                          ("layer_sharing", False)):
        if c.get(name, allowed) != allowed:
            refuse(f"{name} is {c[name]!r}, and only {allowed!r} is supported")
    slides = family == "mistral" or c.get("use_sliding_window")
    try:
        usual = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}.get(family, 2048)
        context = int(c.get("max_position_embeddings", usual))
        window = c.get("sliding_window", 4096) if slides else None
        if window and block_size and window < block_size:
            refuse(f"it attends to {window} tokens by a sliding window, fewer than the context of {block_size}; ask "
                   f"for at most {window} by --block-size")
        theta, scaling = read_rope(c, refuse)
        heads, kv_heads, d_ff = read_widths(c)
        return GPTConfig(
            int(c["vocab_size"]), min(context, window or context), int(c["hidden_size"]),
            int(c.get("head_dim") or (128 if family == "qwen3" else c["hidden_size"] // c["num_attention_heads"])),
            heads, kv_heads, d_ff, norm_eps=float(c.get("rms_norm_eps", 1e-6)), rope_theta=theta, rope_scaling=scaling,
            tie_embeddings=bool(c.get("tie_word_embeddings", False) or c.get("share_embedding", False)),
            qkv_bias=c.get("qkv_bias", family == "qwen2"), qk_norm=c.get("qk_norm", family == "qwen3"))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as problem:
        refuse(f"config.json lacks or garbles {problem}; download it again")


def tensor_files(folder):
    """Where each tensor of a folder lies: {their name: file}, from the one file or else the index, as transformers."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists() and not single.exists():
        pickles = [p.name for p in folder.glob("*.bin")]
        raise UserError(f"{folder} has no model.safetensors nor its index" + (
            f", only {pickles[0]}: pickled weights are never opened, convert them" if pickles else
            "; download the whole repository"))
    if single.exists():
        with open_shard(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    try:
        weight_map = read_json(index.read_bytes(), index)["weight_map"]
        names = sorted(set(weight_map.values()))
        # Whoever sends a folder does not choose which other files of this machine are read.
        outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} has no weight_map of tensors and files; download it again") from None
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, and only *.safetensors files beside it are read; do not use it, "
                        "or correct the name")
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{index} names {name}, which is not there; download the whole repository")
    files = {tensor: folder / name for tensor, name in weight_map.items()}
    return files


def open_shard(file):
    """A safetensors file. UserError where it is cut short or no such file."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as problem:
        raise UserError(f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file ({problem}); "
                        "download it again") from None


def read_tensor(file, name, shape, device, dtype):
    """One tensor, copied out of the file, which is closed again: else what was read of its memory map would count as
    ours and the peak be twice the model."""
    from safetensors import SafetensorError
    with open_shard(file) as shard:
        try:
            found = shard.get_slice(name)
        except SafetensorError:
            raise UserError(f"{file} has no tensor {name}, though the index says so; download it again") from None
        if tuple(found.get_shape()) != tuple(shape):
            raise UserError(f"{file}: tensor {name} is {tuple(found.get_shape())}, config.json asks for "
                            f"{tuple(shape)}; config and weights are not of the same model")
        if found.get_dtype() not in DTYPES:
            raise UserError(f"{file}: tensor {name} is {found.get_dtype()}; only {', '.join(DTYPES)} are read")
        return shard.get_tensor(name).to(device, dtype or DTYPES[found.get_dtype()], copy=True)


def load(folder, device, dtype, block_size):
    """-> (GPT, {"huggingface": config.json, "tokenizer_files": {file name: text}})."""
    c = read_json((folder / "config.json").read_bytes(), folder / "config.json")
    about = {"huggingface": c, "tokenizer_files": read_files(folder)}
    with torch.device("meta"):
        model = GPT(with_context(read_config(c, folder, block_size), block_size, folder))
    if str(device) == "meta":
        return model, about
    files, wanted = tensor_files(folder), {their_name(name): p.shape for name, p in model.named_parameters()}
    for name in wanted.keys() - files.keys():
        raise UserError(f"{folder} has no tensor {name}, which its config.json asks for; download the whole repository")
    for name in files.keys() - wanted.keys():
        if not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and model.head is None):
            raise UserError(f"{files[name]} holds {name}, for which a {c['model_type']} model of this config.json has "
                            "no place; config and weights are not of the same model")
    weights = {name: read_tensor(files[their_name(name)], their_name(name), p.shape, device, dtype)
               for name, p in model.named_parameters()}
    if model.head is None and "lm_head.weight" in files and not torch.equal(weights["embed.weight"], read_tensor(
            files["lm_head.weight"], "lm_head.weight", model.embed.weight.shape, device, dtype)):
        raise UserError(f"{folder} ties head and embedding, but holds two different ones; set tie_word_embeddings to "
                        "false in config.json if both are meant")
    kinds = {str(w.dtype) for w in weights.values()}
    if len(kinds) > 1:
        raise UserError(f"{folder} mixes {' and '.join(sorted(kinds))}; choose one by --dtype")
    model.load_state_dict(weights, assign=True)
    return model, about


# -- the way out
def stock_family(config):
    """"llama", "qwen2" or "qwen3", if that stock class can be this model; None: another layout is needed."""
    shapes = set(zip(config.n_head, config.n_kv_head, config.d_ff))
    if len(shapes) > 1 or 0 in shapes.pop() or config.qkv_bias and config.qk_norm:
        return None                                               # layers differ, or lack a sub-block
    if config.qk_norm or config.qkv_bias:
        return "qwen3" if config.qk_norm else "qwen2"
    return "llama" if config.d_model % config.n_head[0] == 0 else None       # transformers 5 checks this of Llama only


def write_config(config, family, dtype, special):
    """GPTConfig -> config.json (dict), in the spelling of transformers 4, which version 5 reads too. `special`:
    {"bos_token_id", "eos_token_id"}."""
    H, K = max(config.n_head), max(config.n_kv_head)
    if family == "nanoprune" and (H == 0 or config.d_model % H):
        H = K = 1                                                 # not used, but transformers 5 wants a divisor of C
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
             "nanoprune": "NanopruneForCausalLM", "nemotron-nas": "DeciLMForCausalLM"}
    c = {"architectures": [names[family]], "model_type": family, "hidden_act": "silu", "torch_dtype": dtype,
         "vocab_size": config.vocab_size, "max_position_embeddings": config.block_size, "hidden_size": config.d_model,
         "head_dim": config.head_dim, "num_hidden_layers": config.n_layer, "num_attention_heads": H,
         "num_key_value_heads": K, "intermediate_size": max(config.d_ff), "rms_norm_eps": config.norm_eps,
         "rope_theta": config.rope_theta, "tie_word_embeddings": config.tie_embeddings, "attention_bias": False,
         "mlp_bias": False, "use_cache": True, **special}
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        c["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                             "original_max_position_embeddings": int(original)}
    if family in OWN_CODE:
        c |= {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm,
              "auto_map": {name: f"modeling_nanoprune.{OWN_CODE[family]}{end}"
                           for name, end in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "ForCausalLM"))}}
    if family in ("qwen2", "qwen3"):
        c |= {"use_sliding_window": False, "sliding_window": None}
    if family == "nanoprune":
        c |= {"n_head": config.n_head, "n_kv_head": config.n_kv_head, "d_ff": config.d_ff}
    if family == "nemotron-nas":
        c |= {"block_configs": deci_blocks(config)}
    return c


def deci_blocks(config):
    """DeciLM's block_configs: KV heads and FFN neurons per layer, one number of query heads. A width that is no
    multiple of 256 is written as `intermediate_size`, which vLLM reads and others do not. UserError: the layer."""
    H, blocks = max(config.n_head), []
    if config.n_head[0] == 0:
        raise UserError("layer 0 has no attention, where vLLM's DeciLM starts the residual; use --to gguf or --to hf")
    if config.d_model % H:
        raise UserError(f"layer 0 has {H} query heads, which do not divide d_model {config.d_model}, as "
                        "transformers asks of DeciLM's config; use --to gguf or --to hf")
    if config.qk_norm:
        raise UserError("DeciLM has no QK norm, which layer 0 and all others have; use --to gguf or --to hf")
    for layer, (h, k, f) in enumerate(zip(config.n_head, config.n_kv_head, config.d_ff)):
        if h not in (0, H):
            raise UserError(f"DeciLM has one number of query heads, layer {layer} has {h} and others {H}; prune KV "
                            "groups in all layers alike or in none, or use --to gguf or --to hf")
        ffn_mult = 1.5 * f / config.d_model
        width = {"ffn_mult": ffn_mult} if deci_d_ff(ffn_mult, config.d_model) == f else {"intermediate_size": f}
        group = h // k if h else None
        blocks.append({"attention": {"no_op": not h, "replace_with_linear": False, "n_heads_in_group": group},
                       "ffn": {"no_op": not f, "replace_with_linear": False, **(width if f else {})}})
    return blocks


def save(folder, model, family, files=None, special=None):
    """Write config.json, model*.safetensors (5 GB each, with an index), the tokenizer's files and, if `family` has its
    own code, that into the empty `folder`. Weights in the model's dtype. files: {name: text}. UserError: a file of
    another name than a tokenizer's."""
    from huggingface_hub import save_torch_state_dict
    for name in files or {}:
        # The names may come out of a checkpoint that somebody sent: none leads outside, none replaces our own files.
        if name not in FILES:
            raise UserError(f"{name!r} is no file of a tokenizer; those are {', '.join(FILES)}: take the tokenizer from "
                            "another checkpoint")
    folder, dtype = Path(folder), str(model.embed.weight.dtype).removeprefix("torch.")
    config = write_config(model.config, family, dtype, special or {})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {their_name(name): p.detach() for name, p in model.named_parameters()}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if family in OWN_CODE:
        shutil.copy(Path(__file__).with_name("modeling_nanoprune.py"), folder)
    for file in folder.iterdir():
        file.chmod(0o644)                              # safetensors makes files that only their owner reads
