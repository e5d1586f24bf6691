"""Stock llama.cpp, asked through the package xllamacpp: does a GGUF file compute what our model does, and how fast?

    python export.py runs/idea-laptop-0 --to gguf model.gguf      # formats/gguf_export.py writes, check_gguf checks
"""
import json
import math
import statistics
import urllib.request

import torch

from common import UserError
from formats.tokenizer import PROBE

TOLERANCE = {"f32": 1e-2, "f16": 0.1, "bf16": 0.5}                            # nats, see check_gguf


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
