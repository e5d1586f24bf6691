"""Our model and its tokenizer as a GGUF file, which stock llama.cpp loads.

    python export.py runs/idea-laptop-0 --to gguf model.gguf      # needs the package gguf; checks with xllamacpp
    llama-cli -m model.gguf -p "def read(path):"                  # llama.cpp's own programs, as they are

Most of llama.cpp's architectures have one width for all layers; `architecture` takes such a one where that will do. Two
read widths layer by layer: "deci" (NVIDIA's pruned Llamas) and, with QK norm, "openelm" (Apple's). An absent sub-block
is one unit of zeros there, which adds exactly 0. The library gguf knows the format and llama.cpp's names. Not here:
quantizing (llama-quantize does it, best at widths that 32 divides); asking llama.cpp (formats/llamacpp.py).
"""
import base64
import dataclasses
import errno
import json

import torch

from common import UserError, write_atomic
from formats.huggingface import their_name
from formats.tokenizer import (
    BYTE_PIECE,
    GPT2,
    LETTERS,
    LLAMA3,
    PRE_TOKENIZERS,
    PROBE,
    QWEN2,
    SMOLLM2,
    from_files,
    pairs_of,
    spells_bytes,
    steps_of,
)
from model import Block, rotary

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file is written by the package gguf: pip install gguf") from None
    return gguf


# -- the tensors

def widths(config):
    """Query heads, KV heads and neurons of each layer as they are written: three lists, nothing below 1."""
    return [[max(1, n) for n in row] for row in (config.n_head, config.n_kv_head, config.d_ff)]


def architecture(config):
    """Name of the llama.cpp architecture that computes `config` (llama.cpp, src/models/*.cpp). Raises UserError, with
    the layer, the reason and the remedy, if there is none."""
    layers = list(zip(*widths(config)))
    uneven = next((number for number, layer in enumerate(layers) if layer != layers[0]), None)
    if not config.qk_norm:
        if uneven is not None:
            return "deci"
        # qwen2 has neither another head size nor a scaled RoPE.
        is_square = layers[0][0] * config.head_dim == config.d_model
        return "qwen2" if config.qkv_bias and is_square and not config.rope_scaling else "llama"
    if config.rope_scaling:
        raise UserError("llama.cpp has no architecture with QK norm and Llama 3's RoPE scaling; export with --to hf")
    if config.qkv_bias:
        raise UserError("llama.cpp has no architecture with QK norm and a QKV bias; export with --to hf")
    if uneven is None:
        return "qwen3"
    if not config.tie_embeddings:
        raise UserError(f"layer {uneven} has {layers[uneven]} query heads, KV heads and neurons, layer 0 {layers[0]}: "
                        "together with QK norm llama.cpp takes that only in openelm, whose head is the embedding, and "
                        "this model's is not; prune all layers to one width, or export with --to hf")
    return "openelm"


def rope_factors(config):
    """(D/2,) what llama.cpp divides each rotary frequency by. At position 1 the angle is the frequency, so both can be
    read off model.rotary."""
    frequencies = []
    for scaling in ((), config.rope_scaling):
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        cos, sin = rotary(scaled, 1, 1, torch.device("cpu"), torch.float64)
        frequencies.append(torch.atan2(sin, cos)[0, :config.head_dim // 2])
    plain, scaled = frequencies
    return plain / scaled


def absent_block(config):
    """A block of one KV group and one neuron that adds exactly 0: all weights are zero, and gains are 1."""
    with torch.device("meta"):                   # not initialised, so no random numbers are drawn
        block = Block(dataclasses.replace(config, n_head=(1,), n_kv_head=(1,), d_ff=(1,)), 0)
    block.to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    return block


def layer_tensors(parameters, arch, head_dim):
    """{our name: parameter} of a layer -> the same as llama.cpp has them."""
    if arch in ("llama", "deci"):
        for name in ("attn.q.weight", "attn.q.bias", "attn.k.weight", "attn.k.bias"):
            if name in parameters:
                parameters[name] = pair_neighbours(parameters[name], head_dim)
    if arch == "openelm":                        # q, k and v are one matrix there
        parts = [parameters.pop(name) for name in ("attn.q.weight", "attn.k.weight", "attn.v.weight")]
        parameters["attn.qkv.weight"] = torch.cat(parts)
    return parameters


def pair_neighbours(parameter, head_dim):
    """Rows of q or k. Our RoPE turns the pairs (i, i + D/2) of a head; llama.cpp turns neighbours (2i, 2i + 1)."""
    return parameter.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def tensors(model, arch):
    """Every tensor under llama.cpp's name, one after the other: (name, tensor); matrices are (out, in)."""
    gguf = import_gguf()
    config = model.config
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[arch], config.n_layer)

    def llamacpp_name(name):
        return names.get_name(name, (".weight", ".bias"))

    for name, parameter in model.named_parameters():
        if not name.startswith("blocks."):
            yield llamacpp_name(their_name(name)), parameter
    if config.rope_scaling:
        yield "rope_freqs.weight", rope_factors(config)
    absent = dict(absent_block(config).named_parameters())
    for layer, block in enumerate(model.blocks):
        parameters = layer_tensors(absent | dict(block.named_parameters()), arch, config.head_dim)
        for name, parameter in parameters.items():
            if name == "attn.qkv.weight":
                yield llamacpp_name(f"model.layers.{layer}.self_attn.qkv_proj.weight"), parameter
            else:
                yield llamacpp_name(their_name(f"blocks.{layer}.{name}")), parameter


def add_shapes(writer, config, arch):
    """Add the key-values that say what the tensors are."""
    rows = widths(config)
    if arch not in ("deci", "openelm"):
        rows = [row[0] for row in rows]          # one number for all layers
    heads, kv_heads, neurons = rows
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    # The size of a head is said apart, as heads times their size need not be d_model.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


# -- the vocabulary

RULES = {"gpt-2": GPT2, "smollm": SMOLLM2, "llama-bpe": LLAMA3, "qwen2": QWEN2}      # llama.cpp's names of patterns


def rule(tokenizer):
    """llama.cpp's name of the pre-tokenizer that cuts text into words as `tokenizer` does, judged by PROBE. Raises
    UserError if there is none. (cl100k_base counts as "llama-bpe"; the two differ in blank lines at the very end of a
    text, which cl100k_base leaves one word.)"""
    import tokenizers
    pre_tokenizer = tokenizer.finds_specials.pre_tokenizer
    words = pre_tokenizer.pre_tokenize_str(PROBE)
    for name, pattern in RULES.items():
        steps = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step
                 for step in PRE_TOKENIZERS[pattern]]
        blank = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
        blank["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        known = tokenizers.Tokenizer.from_str(json.dumps(blank))
        if known.pre_tokenizer.pre_tokenize_str(PROBE) == words:
            return name
    raise unknown_rule(tokenizer.name, pre_tokenizer)


@dataclasses.dataclass
class Vocabulary:
    """A tokenizer in llama.cpp's terms. `texts`, `types` and `scores` go by id."""
    kind: str                        # gpt2: byte-level BPE; llama: SentencePiece's BPE; t5: its Unigram
    texts: dict[int, str]
    types: dict[int, int]            # see gguf.TokenType; NORMAL if absent
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    merges: list[str] = dataclasses.field(default_factory=list)
    rule: str = "default"            # how text is cut into words
    charsmap: bytes = b""            # SentencePiece's table of characters that it replaces
    removes_blanks: bool = False     # whether several blanks become one


def vocabulary(tokenizer):
    """A Tokenizer -> Vocabulary. Raises UserError if llama.cpp does not tokenize so."""
    if "tokenizer.model" in tokenizer.files:
        return model_vocabulary(tokenizer)
    files = tokenizer.as_files()
    if not files:
        raise unknown_rule(tokenizer.name, tokenizer.encoding._pat_str)
    if tokenizer.files != files:                 # bytes, or one of tiktoken's vocabularies
        name = tokenizer.name
        tokenizer = from_files(name, files)
        tokenizer.name = name
    content = json.loads(files["tokenizer.json"])
    if content["model"].get("type") == "Unigram":
        return unigram_vocabulary(content, tokenizer)
    if spells_bytes(content):
        return byte_level_vocabulary(content, tokenizer)
    return bpe_vocabulary(content, tokenizer)


def texts_and_types(tokenizer):
    """The tokens of a tokenizer.json by id, and the types of added ones: CONTROL if they are special in the file,
    else USER_DEFINED."""
    types = import_gguf().TokenType
    texts = {i: tokenizer.plain.id_to_token(i) for i in range(tokenizer.vocab_size)}
    texts = {i: text for i, text in texts.items() if text is not None}
    kinds = {i: types.CONTROL if token.special else types.USER_DEFINED for i, token in tokenizer.added.items()}
    return texts, kinds


def byte_level_vocabulary(content, tokenizer):
    """Byte-level BPE, as in GPT-2."""
    texts, types = texts_and_types(tokenizer)
    # The library writes no empty list, which is what bytes have: then NUL twice, which no text contains.
    merges = pairs_of(content["model"]) or [[LETTERS[0], LETTERS[0]]]
    return Vocabulary("gpt2", texts, types, merges=[" ".join(pair) for pair in merges], rule=rule(tokenizer))


def bpe_vocabulary(content, tokenizer):
    """SentencePiece's BPE. llama.cpp merges the pair whose union has the best score: the earlier its merge, the
    better."""
    model = content["model"]
    if not model.get("byte_fallback"):
        raise UserError(f"the vocabulary {tokenizer.name!r} has no tokens for single bytes, which llama.cpp needs with "
                        "SentencePiece's BPE; export with --to hf")
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] not in ("Prepend", "Replace"):
            raise changed_characters(tokenizer.name, step["type"])
    texts, types = texts_and_types(tokenizer)
    add_byte_and_unknown_types(types, texts, tokenizer.plain.token_to_id(model.get("unk_token") or ""))
    scores = {}
    for number, (left, right) in enumerate(pairs_of(model)):
        scores.setdefault(model["vocab"][left + right], -float(number))
    never = -float(len(texts) + len(pairs_of(model)))        # tokens that no merge makes
    return Vocabulary("llama", texts, types, {i: scores.get(i, never) for i in texts})


def unigram_vocabulary(content, tokenizer):
    """SentencePiece's Unigram model."""
    model = content["model"]
    if model.get("byte_fallback"):
        raise unigram_with_bytes(tokenizer.name)
    texts, types = texts_and_types(tokenizer)
    add_byte_and_unknown_types(types, texts, model.get("unk_id"))
    found = Vocabulary("t5", texts, types, {i: score for i, (_, score) in enumerate(model["vocab"])})
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            found.charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            found.removes_blanks = True
        elif step["type"] not in ("Strip", "Prepend", "Replace"):
            raise changed_characters(tokenizer.name, step["type"])
    return found


def model_vocabulary(tokenizer):
    """A tokenizer.model, which has all that llama.cpp wants, and in its terms."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise UserError("the tokens of a tokenizer.model are read by the packages sentencepiece and protobuf: pip "
                        "install sentencepiece protobuf") from None
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    unigram, bpe = 1, 2                          # TrainerSpec.model_type
    normalizer = proto.normalizer_spec
    kind = {unigram: "t5", bpe: "llama"}.get(proto.trainer_spec.model_type)
    if kind is None:
        raise UserError(f"the vocabulary {tokenizer.name!r} is neither BPE nor Unigram; export with --to hf")
    if kind == "t5" and proto.trainer_spec.byte_fallback:
        raise unigram_with_bytes(tokenizer.name)
    if kind == "llama" and (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces):
        raise changed_characters(tokenizer.name, normalizer.name)
    texts = {i: piece.piece for i, piece in enumerate(proto.pieces)}
    types = {i: piece.type for i, piece in enumerate(proto.pieces)}
    scores = {i: piece.score for i, piece in enumerate(proto.pieces)}
    for text, i in tokenizer.specials.items():
        if i not in texts:
            texts[i] = text
            types[i] = import_gguf().TokenType.CONTROL
    return Vocabulary(kind, texts, types, scores, charsmap=normalizer.precompiled_charsmap,
                      removes_blanks=normalizer.remove_extra_whitespaces)


def add_byte_and_unknown_types(types, texts, unknown):
    """Say which tokens are bytes and which stands for unknown characters."""
    kinds = import_gguf().TokenType
    for i, text in texts.items():
        if BYTE_PIECE.fullmatch(text):
            types[i] = kinds.BYTE
    if unknown is not None:
        types[unknown] = kinds.UNKNOWN


def unigram_with_bytes(name):
    return UserError(f"the vocabulary {name!r} is a Unigram model that spells unknown characters as bytes, and "
                     "llama.cpp's has no such tokens; export with --to hf")


def changed_characters(name, how):
    return UserError(f"the vocabulary {name!r} changes the characters of a text by {how}, and llama.cpp does not with "
                     "SentencePiece's BPE; export with --to hf")


def unknown_rule(name, how):
    return UserError(f"the vocabulary {name!r} cuts text into words by {how}, and we know llama.cpp's rules "
                     f"{', '.join(RULES)} only; export with --to hf")


def add_vocabulary(writer, tokenizer, size):
    """Add the key-values of a tokenizer, for an embedding of `size` rows; rows that no token has are [PAD<id>].

    Added tokens that are not special ("<think>") come out of plain text there, as at Hugging Face, and not in ours."""
    if tokenizer.vocab_size > size:
        raise UserError(f"the vocabulary {tokenizer.name!r} has ids up to {tokenizer.vocab_size - 1}, the model's "
                        f"embedding {size} rows; take the tokenizer that the model was trained with")
    kinds = import_gguf().TokenType
    tokens = vocabulary(tokenizer)
    types = {i: kinds.NORMAL for i in tokens.texts} | tokens.types
    writer.add_tokenizer_model(tokens.kind)
    writer.add_tokenizer_pre(tokens.rule)
    writer.add_token_list([tokens.texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([int(types.get(i, kinds.UNUSED)) for i in range(size)])
    if tokens.kind == "gpt2":
        writer.add_token_merges(tokens.merges)
    else:
        writer.add_token_scores([float(tokens.scores.get(i, -1000.0)) for i in range(size)])
        writer.add_add_space_prefix(tokenizer.adds_blank)
        writer.add_remove_extra_whitespaces(tokens.removes_blanks)
        for i in [i for i, kind in types.items() if kind == kinds.UNKNOWN]:
            writer.add_unk_token_id(i)
    if tokens.charsmap:
        writer.add_precompiled_charsmap(tokens.charsmap)

    writer.add_eos_token_id(tokenizer.eot)
    # llama.cpp takes a token of its own choice if there is no beginning of text.
    openings = [*tokenizer.opening[:1], tokenizer.bos, tokenizer.eot]
    writer.add_bos_token_id(next(i for i in openings if i is not None))
    writer.add_add_bos_token(bool(tokenizer.opening))
    template = chat_template(tokenizer)
    if template:
        writer.add_chat_template(template)


def chat_template(tokenizer):
    """The text of a model's chat template, or None."""
    config = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    template = tokenizer.files.get("chat_template.jinja") or config.get("chat_template")
    return template if isinstance(template, str) else None


# -- the file

def write_gguf(model, tokenizer, path, dtype="f16"):
    """Write the model with its tokenizer to `path`, whole or not at all; one converted tensor at a time is in memory.
    dtype f32, f16 or bf16 is that of matrices; norms and biases stay f32. Raises UserError if llama.cpp has no
    architecture or tokenizer for it, the vocabulary is larger than the embedding, or a weight too large for f16."""
    if dtype not in DTYPES:
        raise UserError(f"a GGUF is written in {', '.join(DTYPES)}, not {dtype!r}; llama-quantize makes others of it")
    gguf = import_gguf()
    arch = architecture(model.config)

    def write(file):
        writer = gguf.GGUFWriter(file.name, arch)
        add_shapes(writer, model.config, arch)
        add_vocabulary(writer, tokenizer, model.config.vocab_size)
        for name, tensor in tensors(model, arch):
            kind = dtype if tensor.dim() == 2 else "f32"
            size = tensor.numel() * DTYPES[kind].itemsize
            writer.add_tensor_info(name, tensor.shape, None, size, gguf.GGMLQuantizationType[kind.upper()])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors(model, arch):
                write_tensor(writer, convert(name, tensor, dtype))
        finally:
            writer.close()

    write_atomic(path, write)


def write_tensor(writer, data):
    try:
        writer.write_tensor_data(data)
    except OSError as problem:                   # numpy's has no number, and without one it would look like a bug
        number = problem.errno or errno.ENOSPC
        raise OSError(number, "the file could not be written to its end", str(writer.path)) from None


def convert(name, tensor, dtype):
    """A tensor -> its bytes in `dtype` if it is a matrix, else in f32."""
    converted = tensor.detach().to("cpu", DTYPES[dtype if tensor.dim() == 2 else "f32"]).contiguous()
    if not converted.isfinite().all():
        raise UserError(f"{name} has an entry of {tensor.abs().max():g}, which {dtype} does not hold; give bf16 or f32")
    return converted.view(torch.uint8).numpy()
