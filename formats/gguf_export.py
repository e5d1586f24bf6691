"""Our model with its tokenizer as a GGUF file, which stock llama.cpp loads.

    python export.py runs/idea-laptop-0 --to gguf model.gguf     # needs the package gguf
    llama-cli -m model.gguf -p "def read(path):"                 # llama.cpp's own program

Most of llama.cpp's architectures have one width for all layers; a model of equal widths becomes one
of these. Two read a width for each layer: "deci" (NVIDIA's pruned Llamas) and, for models with QK
norm, "openelm" (Apple's). They know no absent sub-block. It is written as one unit whose weights are
zero, which adds exactly 0. A layer without both sub-blocks is left out. The library gguf knows the file
format and llama.cpp's names.

Not here: the tokenizer (formats/gguf_vocabulary.py); asking llama.cpp (formats/llamacpp.py);
quantizing to fewer than 8 bits (llama-quantize does it, best at widths that 256 divides).
"""
import copy
import dataclasses
import errno

import torch

from common import UserError, write_atomic
from formats.gguf_vocabulary import add_vocabulary, import_gguf
from formats.huggingface import their_name
from model import Block, rotary

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# llama.cpp's names for such files.
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

# q8_0 stores 32 neighbours of a row as integers of 8 bits and one scale in f16: 34 bytes.
Q8_BLOCK = 32
Q8_BYTES = 34
Q8_LARGEST = 127 * 65504             # the largest integer times the largest scale


# -- the architecture

def written_layers(config):
    """The numbers of the layers that have a sub-block; the first layer if none has."""
    present = [layer for layer, units in enumerate(zip(config.n_kv_head, config.d_ff)) if any(units)]
    return present or [0]


def widths(config):
    """Query heads, KV heads and neurons of each layer as they are written: three lists, with 1 for an
    absent sub-block."""
    layers = written_layers(config)
    n_head = [max(1, config.n_head[layer]) for layer in layers]
    n_kv_head = [max(1, config.n_kv_head[layer]) for layer in layers]
    d_ff = [max(1, config.d_ff[layer]) for layer in layers]
    return n_head, n_kv_head, d_ff


def architecture(config):
    """The name of the llama.cpp architecture that computes `config` (llama.cpp, src/models/*.cpp).
    Raises UserError, with the layer, the reason and the remedy, if there is none."""
    layers = list(zip(*widths(config)))
    uneven = next((number for number, layer in enumerate(layers) if layer != layers[0]), None)
    if not config.qk_norm:
        if uneven is not None:
            return "deci"
        # qwen2 has no head size of its own and no scaled RoPE; llama takes a QKV bias as well.
        is_square = layers[0][0] * config.head_dim == config.d_model
        return "qwen2" if config.qkv_bias and is_square and not config.rope_scaling else "llama"
    if config.rope_scaling:
        raise UserError("llama.cpp has no architecture with QK norm and Llama 3's RoPE scaling; export "
                        "with --to hf")
    if config.qkv_bias:
        raise UserError("llama.cpp has no architecture with QK norm and a QKV bias; export with --to hf")
    if uneven is None:
        return "qwen3"
    if not config.tie_embeddings:
        written = written_layers(config)
        raise UserError(f"layer {written[uneven]} has {layers[uneven]} query heads, KV heads and neurons, layer "
                        f"{written[0]} {layers[0]}: together with QK norm llama.cpp takes that only in openelm, whose "
                        "head is the embedding, and this model's is not; prune all layers to one width, "
                        "or export with --to hf")
    return "openelm"


def add_shapes(writer, config, arch):
    """Add the key-values that say what the tensors are."""
    n_head, n_kv_head, d_ff = widths(config)
    depth = len(d_ff)
    if arch not in ("deci", "openelm"):          # one number for all layers
        n_head = n_head[0]
        n_kv_head = n_kv_head[0]
        d_ff = d_ff[0]
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(depth)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv_head)
    # The head size is given, because n_head · head_dim need not be d_model.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


# -- the tensors

@torch.no_grad()
def tensors(model, arch):
    """Every tensor under llama.cpp's name, one after the other: (name, tensor); matrices are (out, in)."""
    gguf = import_gguf()
    config = model.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    name_map = gguf.get_tensor_name_map(number, config.n_layer)

    def llamacpp_name(hugging_face_name):
        return name_map.get_name(hugging_face_name, (".weight", ".bias"))

    for name, parameter in model.named_parameters():
        if not name.startswith("blocks."):
            yield llamacpp_name(their_name(name)), parameter
    if config.rope_scaling:
        yield "rope_freqs.weight", rope_factors(config)
    absent = dict(absent_block(config).named_parameters())
    for layer, place in enumerate(written_layers(config)):
        parameters = {**absent, **dict(model.blocks[place].named_parameters())}
        for name, tensor in layer_tensors(parameters, arch, config.head_dim).items():
            if name == "attn.qkv.weight":
                full_name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
            else:
                full_name = their_name(f"blocks.{layer}.{name}")
            yield llamacpp_name(full_name), tensor


def absent_block(config):
    """A block of one KV group and one neuron that adds exactly 0: its weights are 0, its gains 1."""
    with torch.device("meta"):                   # not initialised, so no random numbers are drawn
        block = Block(dataclasses.replace(config, n_head=(1,), n_kv_head=(1,), d_ff=(1,)), 0)
    block.to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    return block


def layer_tensors(parameters, arch, head_dim):
    """{our name: parameter} of a layer -> {name: tensor} in llama.cpp's order of rows."""
    parameters = dict(parameters)
    if arch in ("llama", "deci"):
        for name in ("attn.q.weight", "attn.q.bias", "attn.k.weight", "attn.k.bias"):
            if name in parameters:
                parameters[name] = pair_neighbours(parameters[name], head_dim)
    if arch == "openelm":                        # q, k and v are one matrix
        parts = [parameters.pop(name) for name in ("attn.q.weight", "attn.k.weight", "attn.v.weight")]
        parameters["attn.qkv.weight"] = torch.cat(parts)
    return parameters


def pair_neighbours(parameter, head_dim):
    """Reorder rows of q or k. Our RoPE turns the pairs (i, i + D/2) of a head, and that of these two
    architectures turns neighbours (2i, 2i + 1)."""
    return parameter.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(config):
    """(D/2,) what llama.cpp divides each rotary frequency by. At position 1 an angle is its frequency,
    so that model.rotary gives the frequencies with and without scaling."""
    frequencies = []
    for scaling in ((), config.rope_scaling):
        changed = dataclasses.replace(config, rope_scaling=scaling)
        cos, sin = rotary(changed, 1, 1, torch.device("cpu"), torch.float64)
        frequencies.append(torch.atan2(sin, cos)[0, :config.head_dim // 2])
    plain, scaled = frequencies
    return plain / scaled


# -- the file

def write_gguf(model, tokenizer, path, dtype="f16", name=None, license=None, base_model=None):
    """Write the model with its tokenizer to `path`, whole or not at all. One converted tensor at a time
    is in memory.

    dtype: f32, f16, bf16 or q8_0 for matrices, see `kind_of`; norms and biases stay f32. `name`, `license` and
    `base_model`, the name of the model that this one was made of, are written where they are known.
    Raises UserError if llama.cpp has no architecture or no tokenizer for it, if the vocabulary is
    larger than the embedding, if a weight is too large for f16 or q8_0, or if 32 does not divide
    d_model in q8_0."""
    if dtype not in FILE_TYPES:
        raise UserError(f"a GGUF is written in {', '.join(FILE_TYPES)}, not {dtype!r}; llama-quantize makes "
                        "others of it")
    if dtype == "q8_0" and model.config.d_model % Q8_BLOCK:
        raise UserError(f"q8_0 stores blocks of {Q8_BLOCK} weights, and the model's rows of {model.config.d_model} are "
                        f"no multiple; cut channels with --multiple-of {Q8_BLOCK}, or give --dtype float16")
    gguf = import_gguf()
    arch = architecture(model.config)

    def write(file):
        writer = gguf.GGUFWriter(file.name, arch)
        if name:
            writer.add_name(name)
        if license:
            writer.add_license(license)
        if base_model:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_model)
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[dtype]))
        add_shapes(writer, model.config, arch)
        add_vocabulary(writer, tokenizer, model.config.vocab_size)
        for tensor_name, tensor in tensors(model, arch):
            kind = kind_of(tensor, dtype)
            if kind == "q8_0":
                size = tensor.numel() // Q8_BLOCK * Q8_BYTES
            else:
                size = tensor.numel() * DTYPES[kind].itemsize
            writer.add_tensor_info(tensor_name, tensor.shape, None, size, gguf.GGMLQuantizationType[kind.upper()])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # The library's own loop would hold all converted tensors, or write them to disk twice.
            for tensor_name, tensor in tensors(model, arch):
                write_tensor(writer, convert(tensor_name, tensor, dtype))
        finally:
            writer.close()

    write_atomic(path, write)


def kind_of(tensor, dtype):
    """The type of a tensor in a file of `dtype`: norms and biases are f32. In q8_0 a matrix whose rows no
    whole number of blocks makes is f16, as llama-quantize has it."""
    if tensor.dim() != 2:
        return "f32"
    if dtype == "q8_0" and tensor.shape[1] % Q8_BLOCK:
        return "f16"
    return dtype


def not_quantized(model):
    """The names of the matrices that a q8_0 file has in f16."""
    return [name for name, p in model.named_parameters() if kind_of(p, "q8_0") == "f16"]


def quantized(tensor):
    """A matrix -> the bytes of q8_0, a NumPy array."""
    gguf = import_gguf()
    return gguf.quants.quantize(tensor.detach().to("cpu", torch.float32).numpy(), gguf.GGMLQuantizationType.Q8_0)


def as_in_q8_0(model):
    """A copy of the model in float32 that computes with what a q8_0 file holds. (Blocks lie along rows, so
    the order of the rows does not matter.)"""
    gguf = import_gguf()
    rounded = copy.deepcopy(model).float()
    for p in rounded.parameters():
        kind = kind_of(p, "q8_0")
        if kind == "q8_0":
            weights = gguf.quants.dequantize(quantized(p), gguf.GGMLQuantizationType.Q8_0)
            p.data = torch.from_numpy(weights)
        else:
            p.data = p.data.to(DTYPES[kind]).float()
    return rounded


def convert(name, tensor, dtype):
    """A tensor -> its bytes in a file of `dtype`."""
    kind = kind_of(tensor, dtype)
    if kind == "q8_0":
        # NaN is not at most any number.
        is_held = tensor.abs().max() <= Q8_LARGEST
    else:
        converted = tensor.detach().to("cpu", DTYPES[kind]).contiguous()
        is_held = converted.isfinite().all()
    if not is_held:
        raise UserError(f"{name} has an entry of {tensor.abs().max():g}, which {kind} does not hold; give "
                        "bf16 or f32")
    return quantized(tensor) if kind == "q8_0" else converted.view(torch.uint8).numpy()


def write_tensor(writer, data):
    try:
        writer.write_tensor_data(data)
    except OSError as problem:
        # numpy's error lacks the system's number, and without a number it would look like a bug.
        raise OSError(problem.errno or errno.ENOSPC, "the file could not be written to its end",
                      str(writer.path)) from None
