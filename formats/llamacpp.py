"""Stock llama.cpp, asked through the package xllamacpp: does a GGUF file compute what our model does,
and how fast?

    python export.py runs/idea-laptop-0 --to gguf model.gguf     # formats/gguf_export.py writes the
                                                                 # file, check_gguf compares it
"""
import json
import math
import statistics
import urllib.request
from dataclasses import dataclass

import torch

from common import UserError
from formats.tokenizer import PROBE

TOLERANCE = {"f32": 1e-2, "f16": 0.1, "bf16": 0.5, "q8_0": 0.5}  # nats, see check_gguf


# -- the server

def open_server(path, context, threads=None, exact=True):
    """xllamacpp's server on a GGUF file: llama.cpp's own, on the CPU, with room for `context` tokens.
    It listens on this machine only. exact: no flash attention, and keys and values in float32
    instead of f16. Raises UserError if xllamacpp is missing or llama.cpp does not load the file."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError("llama.cpp is asked through the package xllamacpp; pip install "
                        "xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = threads or torch.get_num_threads()
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.verbosity = 1                         # errors only
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.endpoint_metrics = True
    if exact:
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        raise UserError(f"llama.cpp does not load {path}; its lines here say why") from None
    # This waits until the server's loop runs. Closed before that, the server would hang.
    server.handle_metrics()
    return server


def tokenize(server, text):
    """Text -> llama.cpp's token ids, with nothing put in front."""
    content = json.dumps({"content": text, "parse_special": False}).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))        # through no proxy
    return json.load(direct.open(f"{server.listening_address}/tokenize", content, timeout=60))["tokens"]


def complete(server, prompt, **settings):
    """llama.cpp's answer to a prompt of token ids, with nothing put in front. Raises UserError if it
    refuses."""
    prompt = [int(token) for token in prompt]
    answer = server.handle_completions({"prompt": prompt, "temperature": 0, **settings})
    if "choices" not in answer:
        reason = answer.get("error", answer).get("message")
        raise UserError(f"llama.cpp refuses {len(prompt)} tokens: {reason}; a file's context is that of "
                        "its model")
    return answer


def greedy(server, prompt, tokens, top=5):
    """llama.cpp's greedy continuation, see `ask`.

    llama.cpp gives no probabilities where its token ends within a UTF-8 character. So a large bias
    makes it choose "a" every time. The probabilities that it reports are those before the bias, and
    the likeliest token among them is the one it would have chosen."""
    continuation = []
    for _ in range(tokens):
        chosen = [token for token, _ in continuation]
        answer = complete(server, [*prompt, *chosen], max_tokens=1, logprobs=top, cache_prompt=True,
                          logit_bias=[["a", 1e9]])
        best = []
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logprob = math.nan if entry["logprob"] is None else entry["logprob"]
            best.append((entry["id"], logprob))
        continuation.append((best[0][0], best))
    return continuation


def ask(path, prompt, tokens=32, top=5, threads=None):
    """llama.cpp's greedy continuation of `prompt` (token ids, to which none is added; the end of text
    does not end it): for each token (id, [(id, log-probability in nats) of the `top` likeliest])."""
    return greedy(open_server(path, len(prompt) + tokens + 1, threads), prompt, tokens, top)


# -- the check

@dataclass(order=True)
class Gap:
    """The largest difference at one position of a continuation."""
    nats: float
    prompt: int                                  # its number
    position: int
    token: int
    model: float                                 # log-probability in our model
    llamacpp: float                              # log-probability in llama.cpp


def random_prompts(config, tokens):
    """Prompts of 1, 6, 24 and 120 random ids; shorter ones if the context is too short for so many
    and `tokens` more."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for length in (1, 6, 24, 120):
        length = max(1, min(length, config.block_size - tokens))
        prompts.append(torch.randint(config.vocab_size, (length,), generator=generator).tolist())
    return prompts


@torch.no_grad()
def gaps(server, model, prompts, tokens):
    """Let llama.cpp continue the prompts, and our model (float32) read the tokens -> a Gap for every
    position.

    Compared are the log-probabilities of llama.cpp's five likeliest tokens. Besides, our likeliest
    token must be as likely as llama.cpp's is with us; two equally likely ones are no difference."""
    for number, prompt in enumerate(prompts):
        continuation = greedy(server, prompt, tokens)
        ids = [*prompt, *(token for token, _ in continuation)]
        ids = torch.tensor([ids], device=model.embed.weight.device)
        logprobs = model(ids)[0, len(prompt) - 1:-1].float().log_softmax(-1).cpu()         # (tokens, V)
        for place, (token, best) in enumerate(continuation):
            row = logprobs[place]
            position = len(prompt) + place
            pairs = [(token, row.max().item(), row[token].item())]
            for i, logprob in best:
                if not logprob < -80:            # beyond that float32 runs out
                    pairs.append((i, row[i].item(), logprob))
            yield max(Gap(distance(a, b), number, position, i, a, b) for i, a, b in pairs)


def distance(a, b):
    """The difference of two log-probabilities; infinite if one is not a number."""
    difference = abs(a - b)
    return difference if difference < math.inf else math.inf


def check_gguf(path, model, prompts=None, dtype="f16", tokenizer=None, tokens=16, threads=None):
    """Compare the file in llama.cpp with the model -> the largest of the gaps, in nats.

    Compared are continuations of `prompts` (lists of ids; None: random ones) and, with `tokenizer`,
    the tokens of PROBE. Raises UserError if the gap is above TOLERANCE: for f32 the largest one, for
    f16 and bf16 the median. llama.cpp rounds activations as it does weights, and that can change
    single positions (by 15 nats in bf16, in a model just cut by a third); PyTorch's do so as well."""
    tokens = max(1, min(tokens, model.config.block_size // 2))
    prompts = prompts or random_prompts(model.config, tokens)
    longest = max(len(prompt) for prompt in prompts)
    server = open_server(path, longest + tokens + 1, threads)
    if tokenizer:
        check_tokens(path, server, tokenizer)
    compared = list(gaps(server, model, prompts, tokens))
    gap = max(compared)
    if dtype == "f32":
        judged = gap.nats
        kind = ""
        remedy = "report it"
    else:
        judged = statistics.median(position.nats for position in compared)
        kind = " (median)"
        remedy = "see whether an f32 file is right, and report it if not"
    if not judged <= TOLERANCE[dtype]:
        raise UserError(f"{path} is not the model: {judged:.3g} nats apart{kind}, more than "
                        f"{TOLERANCE[dtype]}; most at position {gap.position} of prompt {gap.prompt}, where "
                        f"token {gap.token} has log-probability {gap.model} in ours and {gap.llamacpp} in "
                        f"llama.cpp; {remedy}")
    return gap.nats


def check_tokens(path, server, tokenizer):
    """Raise UserError if llama.cpp makes other tokens of PROBE than `tokenizer`."""
    expected = tokenizer.encode(PROBE).tolist()
    tokens = tokenize(server, PROBE)
    if tokens != expected:
        raise UserError(f"{path}: llama.cpp's tokens of a text differ from ours, {tokens} and {expected}; "
                        "give it ids, no text")


def speed(path, prompt=128, tokens=64, repeats=3, threads=None):
    """llama.cpp's tokens per second on the CPU, {"prompt", "decode"}: medians of the repeats after a
    first one that does not count. The file's context must hold prompt + tokens."""
    server = open_server(path, prompt + tokens + 1, threads, exact=False)
    timings = []
    for _ in range(repeats + 1):
        answer = complete(server, [1] * prompt, max_tokens=tokens, ignore_eos=True, cache_prompt=False)
        timings.append(answer["timings"])
    return {"prompt": statistics.median(timing["prompt_per_second"] for timing in timings[1:]),
            "decode": statistics.median(timing["predicted_per_second"] for timing in timings[1:])}
