"""The inference suite of bench.py: prefill, decoding and memory of dense and pruned models, ours and llama.cpp's.

    python bench.py infer --presets 135m --keep 0.8

Random weights: speed does not depend on them. Pruned models have equal parameters: "even" the same FFN width in every
layer, "uneven" widths that grow with depth, KV groups gone here and there. Decoding reads every weight once a token, so
its limit is bytes per token over the measured bandwidth; `of the bytes` is the pruned model's speed over the dense
one's, divided by what the bytes alone would allow. Not here: quality (compare.py).
"""
import dataclasses
import functools
import statistics
import tempfile
import time
from importlib.util import find_spec

import torch

import llamacpp
import model as models
from bench_train import shapes
from common import UserError
from timing import interleave, median_ratio, own_process, peak, traffic
from tokenizer import open_tokenizer

median = statistics.median


def pruned(dense, keep):
    """{"dense", "even", "uneven": GPTConfig}; the pruned ones have as many removable parameters as `keep` allows, to
    within one neuron a layer (even) and one neuron (uneven)."""
    most, L = keep * dense.removable_params(), dense.n_layer
    attention = sum(k * dense.unit_params(l, "kv") for l, k in enumerate(dense.n_kv_head))
    if most < attention + L * dense.unit_params(0, "ffn"):
        raise UserError(f"--keep {keep} leaves {most:,.0f} parameters and no neurons, as attention stays and has "
                        f"{attention:,}; give --keep above {attention / dense.removable_params() + .01:.2f}")
    even = dense.resized({(l, "ffn"): int((most - attention) / L / dense.unit_params(l, "ffn")) for l in range(L)})
    fewer = dense.resized({(l, "kv"): max(1, k - (l % 3 == 1)) for l, k in enumerate(dense.n_kv_head)})
    neurons = sum(even.d_ff) + (even.removable_params() - fewer.resized({(l, "ffn"): n for l, n in enumerate(
        even.d_ff)}).removable_params()) // dense.unit_params(0, "ffn")          # what the KV groups leave
    slope = [0.5 + (l + 0.5) / L for l in range(L)]
    at = lambda x: [min(f, int(x * s)) for f, s in zip(dense.d_ff, slope)]
    low, high = 0, 4 * max(dense.d_ff)
    while high - low > 1e-3:                                          # as many as fit, none wider than it was
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= neurons else (low, middle)
    widths = at(low)
    for l in range(L):
        widths[l] += max(0, min(dense.d_ff[l] - widths[l], neurons - sum(widths)))
    return {"dense": dense, "even": even, "uneven": fewer.resized({(l, "ffn"): n for l, n in enumerate(widths)})}


def bytes_per_token(config, context, weight_bytes, cache_bytes):
    """Bytes that decoding one token reads: every matrix and norm once (of an untied embedding one row: none) and the KV
    cache of `context` tokens."""
    n = config.num_params()
    return (n["total"] - (0 if config.tie_embeddings else n["embedding"])) * weight_bytes \
        + context * config.kv_bytes_per_token(cache_bytes)


def generate(model, prompt, tokens):
    """-> {"first": seconds to the first token, "decode": seconds per further token}, by model.generate with its
    cache, greedy, one sequence."""
    times = [time.perf_counter()]

    def note(idx):
        idx[:, -1].tolist()                                           # the token is there, on a GPU, too
        times.append(time.perf_counter())

    model.generate(prompt, tokens, temperature=0, done=note)
    return {"first": times[1] - times[0], "decode": (times[-1] - times[1]) / (tokens - 1)}


def weights_of(c):
    return torch.bfloat16 if c.dtype == "bfloat16" else torch.float32


def built(c, config):
    torch.manual_seed(0)
    model = models.GPT(config).to(c.device, weights_of(c)).eval().requires_grad_(False)
    prompt = torch.randint(config.vocab_size, (1, c.prompt), generator=torch.Generator().manual_seed(0))
    return model, prompt.to(c.device)


def memory(c, config):
    """In a process of its own: bytes at the peak of one generation, and before it (the weights)."""
    model, prompt = built(c, config)
    with peak(c.device) as found:
        model.generate(prompt, c.decode, temperature=0)
    return found


def in_llamacpp(c, configs, folder):
    """{name: call -> {"prompt", "decode": tokens/s}} of f16 files. The vocabulary is of bytes, padded."""
    calls = {}
    for name, config in configs.items():
        path = f"{folder}/{name}.gguf"
        torch.manual_seed(0)
        llamacpp.write_gguf(models.GPT(config), open_tokenizer("bytes"), path, "f16")
        calls[name] = functools.partial(llamacpp.speed, path, c.prompt, c.decode, 1)
    return calls


def infer(c, preset, vocab_size):
    """Prefill, decoding and memory of all models in turns, the bandwidth among them."""
    dense = shapes(preset, vocab_size, 1.0)[0]
    context = c.prompt + c.decode + 1
    configs = pruned(dataclasses.replace(dense, block_size=max(context, dense.block_size)), c.keep)
    peaks = {name: own_process(memory, c, config) for name, config in configs.items()}
    found, calls = {}, {}

    def keep_of(key, call):
        found[key] = []
        return lambda: found[key].append(call())

    moves = traffic(c.megabytes, c.device)
    calls |= {name: call for name, (call, _) in moves.items()}
    for name, config in configs.items():
        calls["ours", name] = keep_of(("ours", name), functools.partial(generate, *built(c, config), c.decode))
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("xllamacpp"):
            for name, call in in_llamacpp(c, configs, folder).items():
                calls["llama.cpp", name] = keep_of(("llama.cpp", name), call)
        seconds = interleave(calls, c.rounds, c.device)
    rates = {key: each[1:] for key, each in found.items()}            # the first round warmed up
    bandwidth = max(size / median(seconds[name]) for name, (_, size) in moves.items())
    rows = [row_of(c, preset, key, configs, rates, bandwidth, peaks) for key in rates]
    if not find_spec("xllamacpp"):
        rows.append({"shape": preset, "runtime": "llama.cpp", "note": "pip install xllamacpp"})
    return {"rows": rows, "memory": peaks, "bandwidth": bandwidth,
            "rates": [[*key, each] for key, each in rates.items()]}


def row_of(c, preset, key, configs, rates, bandwidth, peaks):
    """One model in one runtime as a row of the table."""
    runtime, name = key
    config, ours = configs[name], runtime == "ours"
    sizes = (weights_of(c).itemsize,) * 2 if ours else (2, 2)
    read = {n: bytes_per_token(configs[n], c.prompt + c.decode / 2, *sizes) for n in ("dense", name)}
    per_token = {n: [r["decode"] if ours else 1 / r["decode"] for r in rates[runtime, n]] for n in ("dense", name)}
    first = [r["first"] if ours else c.prompt / r["prompt"] for r in rates[key]]
    faster, allowed = median_ratio(per_token["dense"], per_token[name]), read["dense"] / read[name]
    return {"shape": preset, "runtime": runtime, "model": name, "params": config.num_params()["total"],
            "dtype": str(weights_of(c)).split(".")[1] if ours else "f16", "prefill tokens/s": c.prompt / median(first),
            "first token, s": median(first), "decode tokens/s": 1 / median(per_token[name]),
            "bytes read per token": round(read[name]), "bandwidth GB/s": bandwidth / 1e9,
            "of the roofline": read[name] / median(per_token[name]) / bandwidth, "decode ÷ dense's": faster,
            "bytes allow": allowed, "of the bytes": faster / allowed,
            "peak bytes": peaks[name]["peak_bytes"] if ours else None}
