"""Our model as a GGUF file that stock llama.cpp loads, and the same model asked there.

    python export.py runs/idea-laptop-0 --to gguf model.gguf      # write_gguf; with xllamacpp installed also check_gguf
    llama-cli -m model.gguf -p "def read(path):"                  # llama.cpp's own programs, as they are

Most of llama.cpp's architectures have one width for all layers; `architecture` takes such a one where that will do. Two
read widths layer by layer: "deci" (NVIDIA's pruned Llamas) and, with QK norm, "openelm" (Apple's). An absent sub-block
is one unit of zeros there, which adds exactly 0. The format (ggml's docs/gguf.md) is written here: magic, key-values,
table of tensors, tensors. Not here: quantizing (llama-quantize does it, best at widths that 32 divides), SentencePiece.
"""
import dataclasses
import json
import math
import statistics
import struct
import urllib.request

import torch

from common import UserError, write_atomic
from formats.tokenizer import ABSENT, BYTES, GPT2, LLAMA3, PROBE, QWEN2, SMOLLM2, known_pattern, merges
from model import Block, rotary

DTYPES = {"f32": (torch.float32, 0), "f16": (torch.float16, 1), "bf16": (torch.bfloat16, 30)}     # and ggml's numbers
TOLERANCE = {"f32": 1e-2, "f16": 0.1, "bf16": 0.5}                            # nats, see check_gguf


# -- the tensors

def widths(config):
    """Query heads, KV heads and neurons of each layer as they are written: three lists, nothing below 1."""
    return [[max(1, n) for n in ns] for ns in (config.n_head, config.n_kv_head, config.d_ff)]


def architecture(config):
    """Name of the llama.cpp architecture that computes `config` (llama.cpp, src/models/*.cpp). UserError where there is
    none, with the layer, the reason and the remedy."""
    layers = list(zip(*widths(config)))
    uneven = next((l for l, layer in enumerate(layers) if layer != layers[0]), None)
    if not config.qk_norm:
        square = layers[0][0] * config.head_dim == config.d_model
        plain = "qwen2" if config.qkv_bias and square and not config.rope_scaling else "llama"   # qwen2 takes no other
        return plain if uneven is None else "deci"
    for wrong, what in ((config.rope_scaling, "Llama 3's RoPE scaling"), (config.qkv_bias, "a QKV bias")):
        if wrong:
            raise UserError(f"llama.cpp has no architecture with QK norm and {what}; export with --to hf")
    if uneven is not None and not config.tie_embeddings:
        raise UserError(f"layer {uneven} has {layers[uneven]} query heads, KV heads and neurons, layer 0 {layers[0]}: "
                        "together with QK norm llama.cpp takes that only in openelm, whose head is the embedding, and "
                        "this model's is not; prune all layers to one width, or export with --to hf")
    return "qwen3" if uneven is None else "openelm"


def rope_factors(config):
    """(D/2,) what llama.cpp divides each rotary frequency by, read off model.rotary: the angle at position 1 is the
    frequency."""
    plain, scaled = (torch.atan2(*reversed(rotary(c, 1, 1, torch.device("cpu"), torch.float64)))
                     for c in (dataclasses.replace(config, rope_scaling=()), config))
    return (plain / scaled)[0, :config.head_dim // 2]


@torch.no_grad()
def tensors(model, arch):
    """Every tensor under llama.cpp's name, one after the other: (name, tensor); matrices are (out, in)."""
    config = model.config
    with torch.device("meta"):                   # not initialised: random numbers stay undrawn
        absent = Block(dataclasses.replace(config, n_head=(1,), n_kv_head=(1,), d_ff=(1,)), 0)
    for name, p in absent.to_empty(device="cpu").named_parameters():
        p.fill_("norm" in name)                  # one unit of zeros; gains of 1

    def paired(p):
        """Rows of q and k: we turn the pairs (i, i + D/2) of a head, these architectures neighbours (2i, 2i + 1)."""
        if arch not in ("llama", "deci"):
            return p
        return p.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    yield "token_embd.weight", model.embed.weight
    if model.head is not None:
        yield "output.weight", model.head.weight
    yield "output_norm.weight", model.norm.weight
    if config.rope_scaling:
        yield "rope_freqs.weight", rope_factors(config)
    for l, block in enumerate(model.blocks):
        attn_norm, attn = (block.attn_norm, block.attn) if block.attn is not None else (absent.attn_norm, absent.attn)
        ffn_norm, ffn = (block.ffn_norm, block.ffn) if block.ffn is not None else (absent.ffn_norm, absent.ffn)
        layer = {"attn_norm": attn_norm, "attn_output": attn.o, "ffn_norm": ffn_norm, "ffn_gate": ffn.gate,
                 "ffn_up": ffn.up, "ffn_down": ffn.down}
        if config.qk_norm:
            layer |= {"attn_q_norm": attn.q_norm, "attn_k_norm": attn.k_norm}
        for name, module in layer.items():
            yield f"blk.{l}.{name}.weight", module.weight
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            q, k, v = (getattr(linear, part) for linear in (attn.q, attn.k, attn.v))
            if arch == "openelm":
                yield f"blk.{l}.attn_qkv.{part}", torch.cat((q, k, v))
            else:
                yield from zip((f"blk.{l}.attn_{x}.{part}" for x in "qkv"), (paired(q), paired(k), v))


def shapes(config, arch):
    """The key-values that say what the tensors are. Head sizes are said once, and n_head · D need not be d_model."""
    heads, kv, ff = (ns if arch in ("deci", "openelm") else ns[0] for ns in widths(config))
    return {f"{arch}.{key}": value for key, value in {
        "context_length": config.block_size, "embedding_length": config.d_model, "block_count": config.n_layer,
        "vocab_size": config.vocab_size, "feed_forward_length": ff, "attention.head_count": heads,
        "attention.head_count_kv": kv, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim, "rope.freq_base": float(config.rope_theta)}.items()}


# -- the vocabulary

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5                            # token types, by llama.cpp's numbers
RULES = {"gpt-2": GPT2, "smollm": SMOLLM2, "llama-bpe": LLAMA3, "qwen2": QWEN2}      # llama.cpp's names of patterns


def rule(tokenizer):
    """llama.cpp's name of the pre-tokenizer that cuts text into words as ours does. UserError: there is none."""
    pattern = known_pattern(tokenizer.encoding)
    if pattern is None:
        raise UserError(f"the vocabulary {tokenizer.name!r} cuts text into words by {tokenizer.encoding._pat_str}, and "
                        f"we know llama.cpp's rules {', '.join(RULES)} only; export with --to hf")
    return next(name for name, known in RULES.items() if known == pattern)


def besides_tokens(tokenizer):
    """What Hugging Face's files say besides tokens: ids of added ones that are not special, id of the one that opens
    every text (or None), chat template (or None)."""
    content = json.loads(tokenizer.files.get("tokenizer.json", "{}"))
    config = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    plain = [token["id"] for token in content.get("added_tokens") or [] if not token.get("special")]
    post = content.get("post_processor") or {}
    first = [step["single"][0] for step in post.get("processors", [post]) if step.get("single")]
    opening = next((one["SpecialToken"]["id"] for one in first if "SpecialToken" in one), None)
    template = tokenizer.files.get("chat_template.jinja") or config.get("chat_template")
    return plain, tokenizer.specials.get(opening), template if isinstance(template, str) else None


def vocabulary(tokenizer, size):
    """The key-values of a tokenizer, for an embedding of `size` rows; rows that no token has are called [PAD<id>].
    Added tokens that are not special ("<think>") come out of plain text there, as at Hugging Face, and not in ours."""
    letters = {byte: char for char, byte in BYTES.items()}                    # GPT-2's spelling of bytes
    spelled = lambda token: "".join(letters[byte] for byte in token)
    if tokenizer.encoding is None:               # bytes: nothing to merge, so any rule will do; NUL is the end of text
        ranks, specials, name = {bytes([b]): b for b in range(1, 256)}, {"<|endoftext|>": 0}, "qwen2"
    else:
        ranks, specials, name = tokenizer.encoding._mergeable_ranks, tokenizer.specials, rule(tokenizer)
        ranks = {token: i for token, i in ranks.items() if i < ABSENT}
    texts = {i: spelled(token) for token, i in ranks.items()} | {i: text for text, i in specials.items()}
    if max(texts) >= size:
        raise UserError(f"the vocabulary {tokenizer.name!r} has ids up to {max(texts)}, the model's embedding {size} "
                        "rows; take the tokenizer that the model was trained with")
    plain, opening, template = besides_tokens(tokenizer)
    types = dict.fromkeys(texts, NORMAL) | dict.fromkeys(specials.values(), CONTROL)
    types |= dict.fromkeys(plain, USER_DEFINED)
    bos = next(i for i in (opening, tokenizer.bos, tokenizer.eot) if i is not None)        # unsaid, it would be 11
    values = {"model": "gpt2", "pre": name, "tokens": [texts.get(i, f"[PAD{i}]") for i in range(size)],
              "token_type": [types.get(i, UNUSED) for i in range(size)],
              "merges": [f"{spelled(left)} {spelled(right)}" for left, right in merges(ranks)],
              "eos_token_id": tokenizer.eot, "bos_token_id": bos, "add_bos_token": opening is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | (
        {"tokenizer.chat_template": template} if template else {})


# -- the file

def packed(value):
    """A key's value in GGUF: the number of its type, then its bytes. bool, int, float, str, list of int or of str."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(packed(text)[4:] for text in value)
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    number, letter = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack("<I" + letter, number, value)


def write_gguf(model, tokenizer, path, dtype="f16"):
    """Write the model with its tokenizer to `path`, whole or not at all; one converted tensor at a time is in memory.
    dtype f32, f16 or bf16 is that of matrices; norms and biases stay f32. UserError: llama.cpp has no architecture or
    pre-tokenizer for it, the vocabulary is larger than the embedding, a weight is too large for f16."""
    if dtype not in DTYPES:
        raise UserError(f"a GGUF is written in {', '.join(DTYPES)}, not {dtype!r}; llama-quantize makes others of it")
    arch = architecture(model.config)
    values = {"general.architecture": arch, **shapes(model.config, arch),
              **vocabulary(tokenizer, model.config.vocab_size)}
    type_of = lambda tensor: DTYPES[dtype if tensor.dim() == 2 else "f32"]

    def write(file):
        table, offset = [], 0
        for name, tensor in tensors(model, arch):
            wanted, number = type_of(tensor)
            table.append(packed(name)[4:] + struct.pack(f"<I{tensor.dim()}QIQ", tensor.dim(), *reversed(tensor.shape),
                                                        number, offset))
            offset += -(-tensor.numel() * wanted.itemsize // 32) * 32         # each begins at a multiple of 32 bytes
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(table), len(values)))
        for key, value in values.items():
            file.write(packed(key)[4:] + packed(value))
        file.write(b"".join(table))
        for name, tensor in tensors(model, arch):
            converted = tensor.to("cpu", type_of(tensor)[0]).contiguous()
            if not converted.isfinite().all():
                raise UserError(f"{name} has an entry of {tensor.abs().max():g}, which {dtype} does not hold; give "
                                "bf16 or f32")
            file.write(bytes(-file.tell() % 32))
            file.write(converted.view(torch.uint8).numpy().data)
        file.write(bytes(-file.tell() % 32))

    write_atomic(path, write)


# -- llama.cpp asked

def opened(path, context, threads=None, exact=True):
    """xllamacpp's server: llama.cpp's own, on the CPU, with room for `context` tokens; it listens on this machine only.
    exact: without flash attention, keys and values in float32 instead of f16."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError("llama.cpp is asked through the package xllamacpp; pip install xllamacpp") from None
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers = str(path), context, 1, 0
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads or torch.get_num_threads()
    p.verbosity, p.warmup, p.fit_params, p.cache_ram_mib, p.endpoint_metrics = 1, False, False, 0, True    # 1: errors
    if exact:
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(p)
    except RuntimeError:
        raise UserError(f"llama.cpp does not load {path}; its lines here say why") from None
    server.handle_metrics()                      # waits for its loop: closed before that begins, it would hang
    return server


def encoded(server, text):
    """Text -> llama.cpp's token ids, nothing put in front."""
    content = json.dumps({"content": text, "parse_special": False}).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))     # no proxy
    return json.load(direct.open(f"{server.listening_address}/tokenize", content, timeout=60))["tokens"]


def complete(server, prompt, **settings):
    """llama.cpp's answer to a prompt of token ids, nothing put in front. UserError: it refuses."""
    answer = server.handle_completions({"prompt": [int(i) for i in prompt], "temperature": 0, **settings})
    if "choices" not in answer:
        reason = answer.get("error", answer).get("message")
        raise UserError(f"llama.cpp refuses {len(prompt)} tokens: {reason}; a file's context is that of its model")
    return answer


def greedy(server, prompt, tokens, top=5):
    """See `ask`. llama.cpp gives no probabilities where its token ends within a UTF-8 character. So it is made to say
    "a" and asked what it would have said: the probabilities are those before the bias."""
    said = []
    for _ in range(tokens):
        answer = complete(server, [*prompt, *(token for token, _ in said)], max_tokens=1, logprobs=top,
                          cache_prompt=True, logit_bias=[["a", 1e9]])
        best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        best = [(one["id"], math.nan if one["logprob"] is None else one["logprob"]) for one in best]
        said.append((best[0][0], best))
    return said


def ask(path, prompt, tokens=32, top=5, threads=None):
    """llama.cpp's greedy continuation of `prompt` (token ids, of which none is added; the end of text does not end it):
    per token (id, [(id, log-probability in nats) of the `top` likeliest])."""
    return greedy(opened(path, len(prompt) + tokens + 1, threads), prompt, tokens, top)


def drawn(config, tokens):
    """Prompts of 1, 6, 24 and 120 random ids, shorter where context is short of so many and `tokens` more."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (max(1, min(n, config.block_size - tokens)),), generator=draw).tolist()
            for n in (1, 6, 24, 120)]


@torch.no_grad()
def gaps(server, model, prompts, tokens):
    """llama.cpp continues the prompts, and our model (float32) reads its tokens: for each position the largest
    difference (nats) between a top-5 log-probability of llama.cpp's and ours, or our best token's and that of
    llama.cpp's best, so that a tie is none; and where: (difference, prompt, position, token, ours, llama.cpp's)."""
    for number, prompt in enumerate(prompts):
        said = greedy(server, prompt, tokens)
        ids = torch.tensor([[*prompt, *(token for token, _ in said)]], device=model.embed.weight.device)
        ours = model(ids)[0, len(prompt) - 1:-1].float().log_softmax(-1).cpu()                     # (tokens, V)
        for position, (row, (token, best)) in enumerate(zip(ours, said), len(prompt)):
            pairs = [(row.max().item(), row[token].item(), token)]
            pairs += [(row[i].item(), theirs, i) for i, theirs in best if not theirs < -80]     # float32 runs out there
            yield max((gap if (gap := abs(mine - theirs)) < math.inf else math.inf, number, position, i, mine, theirs)
                      for mine, theirs, i in pairs)                          # not a number: infinitely far


def check_gguf(path, model, prompts=None, dtype="f16", tokenizer=None, tokens=16, threads=None):
    """Compare the file in llama.cpp with the model on continuations of `prompts` (lists of ids; None: drawn ones): ->
    the largest of the `gaps`. With `tokenizer`, the tokens of PROBE as well.

    UserError: f32: a gap is above TOLERANCE. f16, bf16: the median one is; llama.cpp rounds activations as it does
    weights, which can flip single positions (15 nats in bf16, in a model just cut by a third; PyTorch's do so, too)."""
    tokens = max(1, min(tokens, model.config.block_size // 2))
    prompts = prompts or drawn(model.config, tokens)
    server = opened(path, max(map(len, prompts)) + tokens + 1, threads)
    if tokenizer and encoded(server, PROBE) != tokenizer.encode(PROBE).tolist():
        raise UserError(f"{path}: llama.cpp's tokens of a text differ from ours, {encoded(server, PROBE)} and "
                        f"{tokenizer.encode(PROBE).tolist()}; give it ids, no text")
    found = list(gaps(server, model, prompts, tokens))
    gap, number, position, token, mine, theirs = max(found)
    judged = gap if dtype == "f32" else statistics.median(gap for gap, *_ in found)
    if not judged <= TOLERANCE[dtype]:
        raise UserError(f"{path} is not the model: {judged:.3g} nats apart{' (median)' * (dtype != 'f32')}, more than "
                        f"{TOLERANCE[dtype]}; most at position {position} of prompt {number}, where token {token} has "
                        f"log-probability {mine} in ours and {theirs} in llama.cpp; " +
                        ("report it" if dtype == "f32" else "see whether an f32 file is right, and report it if not"))
    return gap


def speed(path, prompt=128, tokens=64, repeats=3, threads=None):
    """llama.cpp's tokens per second on the CPU, {"prompt", "decode"}: medians of the repeats behind a first one that
    does not count. The file's context must hold prompt + tokens."""
    server = opened(path, prompt + tokens + 1, threads, exact=False)
    runs = [complete(server, [1] * prompt, max_tokens=tokens, ignore_eos=True, cache_prompt=False)["timings"]
            for _ in range(repeats + 1)][1:]
    return {name: statistics.median(run[f"{key}_per_second"] for run in runs)
            for name, key in (("prompt", "prompt"), ("decode", "predicted"))}
