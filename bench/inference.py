"""The inference suite of bench/__main__.py: prefill, decoding and memory of dense and pruned models, ours and llama.cpp's.

    python -m bench infer --presets 135m --keep 0.8

Random weights. Pruned models have equal parameters: "even" the same FFN width in every layer, "uneven" widths that grow
with depth, in every third layer a KV group's worth of neurons instead of the group. Decoding reads every weight once a
token, so its limit is bytes per token over the measured bandwidth; `of the bytes` is the pruned model's speed over the
dense one's, divided by what the bytes alone would allow. Not here: quality (experiments/compare.py).
"""
import dataclasses
import functools
import statistics
import tempfile
import time
from importlib.util import find_spec

import torch

import model as models
from bench.timing import interleave, median_ratio, own_process, peak, traffic
from bench.training import shapes
from common import UserError
from formats import gguf_export, llamacpp
from formats.tokenizer import open_tokenizer

median = statistics.median


def pruned(dense, keep):
    """{"dense", "even", "uneven": GPTConfig}; the pruned ones have as many removable parameters as `keep` allows, to
    within one neuron a layer (even) and one neuron (uneven)."""
    most, L, each = keep * dense.removable_params(), dense.n_layer, dense.unit_params(0, "ffn")
    attention = sum(k * dense.unit_params(l, "kv") for l, k in enumerate(dense.n_kv_head))
    if most < attention + L * each:
        raise UserError(f"--keep {keep} leaves {most:,.0f} parameters and no neurons, as attention stays and has "
                        f"{attention:,}; give --keep above {attention / dense.removable_params() + .01:.2f}")
    width = int((most - attention) / L / each)
    even = dense.resized({(l, "ffn"): width for l in range(L)})
    steep = min(width, dense.d_ff[0] - width) / 2                     # up to so many fewer or more; the sum stays
    widths = [width + round(steep * (2 * l / max(1, L - 1) - 1)) for l in range(L)]
    fewer = [l for l in range(0, L, 3) if dense.n_kv_head[l] > 1]     # lose a KV group and get its neurons' worth
    freed = sum(dense.unit_params(l, "kv") for l in fewer) // each
    for i, l in enumerate(fewer):
        widths[l] += freed * (i + 1) // len(fewer) - freed * i // len(fewer)
    return {"dense": dense, "even": even, "uneven": dense.resized(
        {(l, "ffn"): n for l, n in enumerate(widths)} | {(l, "kv"): dense.n_kv_head[l] - 1 for l in fewer})}


def bytes_per_token(config, context, size):
    """Bytes that decoding one token reads, at `size` bytes a number: every matrix and norm once (of an untied embedding
    one row: none) and the KV cache of `context` tokens."""
    n = config.num_params()
    read = n["total"] - n["embedding"] * (not config.tie_embeddings)
    return read * size + context * config.kv_bytes_per_token(size)


def generate(model, prompt, tokens):
    """-> {"first": seconds to the first token, "decode": seconds per further token}, by model.generate with its
    cache, greedy, one sequence."""
    times = [time.perf_counter()]

    def note(idx):
        idx[:, -1].tolist()                                           # the token is there, on a GPU, too
        times.append(time.perf_counter())

    model.generate(prompt, tokens, temperature=0, done=note)
    return {"first": times[1] - times[0], "decode": (times[-1] - times[1]) / (tokens - 1)}


def built(c, config):
    torch.manual_seed(0)
    with torch.device(c.device):
        model = models.GPT(config).to(getattr(torch, c.dtype)).eval().requires_grad_(False)
    prompt = torch.randint(config.vocab_size, (1, c.prompt), generator=torch.Generator().manual_seed(0))
    return model, prompt.to(c.device)


def memory(c, config):
    """In a process of its own, or on a GPU: bytes at the peak of one generation, and before it (the weights)."""
    model, prompt = built(c, config)
    with peak(c.device) as found:
        model.generate(prompt, c.decode, temperature=0)
    return found


def llamacpp_memory(path, prompt, tokens):
    """In a process of its own, as `memory`: llama.cpp's, its file mapped into memory included."""
    with peak("cpu") as found:
        llamacpp.speed(path, prompt, tokens, 1)
    return found


def infer(c, preset, vocab_size):
    """Prefill, decoding and memory of all models in turns, the bandwidth among them."""
    dense, on_gpu, note = shapes(preset, vocab_size)[0], c.device.startswith("cuda"), None
    configs = pruned(dataclasses.replace(dense, block_size=max(c.prompt + c.decode + 1, dense.block_size)), c.keep)
    peaks = {("ours", name): memory(c, config) if on_gpu else own_process(memory, c, config)
             for name, config in configs.items()}
    found, moves = {}, traffic(c.device)

    def keep_of(key, call):
        found[key] = []
        return lambda: found[key].append(call())

    calls = {name: call for name, (call, _) in moves.items()}
    for name, config in configs.items():
        calls["ours", name] = keep_of(("ours", name), functools.partial(generate, *built(c, config), c.decode))
    if on_gpu or not find_spec("xllamacpp") or not find_spec("gguf"):
        note = "asked on the CPU only: --device cpu" if on_gpu else "pip install xllamacpp gguf"
    with tempfile.TemporaryDirectory() as folder:
        for name, config in {} if note else configs.items():
            key, path = ("llama.cpp", name), f"{folder}/{name}.gguf"
            torch.manual_seed(0)                                      # the vocabulary is of bytes, padded
            gguf_export.write_gguf(models.GPT(config), open_tokenizer("bytes"), path, "f16")
            peaks[key] = own_process(llamacpp_memory, path, c.prompt, c.decode)
            calls[key] = keep_of(key, functools.partial(llamacpp.speed, path, c.prompt, c.decode, 1))
        seconds = interleave(calls, c.rounds, c.device)
    rates = {key: each[1:] for key, each in found.items()}            # the first round warmed up
    bandwidth = max(size / median(seconds[name]) for name, (_, size) in moves.items())
    rows = [row_of(c, preset, key, configs, rates, bandwidth, peaks) for key in rates]
    rows += [{"table": "inference", "shape": preset, "runtime": "llama.cpp", "note": note}] if note else []
    return {"rows": rows, "note": f"; ours in {c.dtype}, llama.cpp's files in f16: compare "
            "shares of the roofline; on a CPU memory is the whole process's, with Python and PyTorch in both",
            "memory": [[*key, each] for key, each in peaks.items()], "bandwidth": bandwidth,
            "rates": [[*key, each] for key, each in rates.items()]}


def row_of(c, preset, key, configs, rates, bandwidth, peaks):
    """One model in one runtime as a row of the table."""
    runtime, name = key
    config, ours = configs[name], runtime == "ours"
    size = getattr(torch, c.dtype).itemsize if ours else 2
    read = {n: bytes_per_token(configs[n], c.prompt + c.decode / 2, size) for n in ("dense", name)}
    per_token = {n: [r["decode"] if ours else 1 / r["decode"] for r in rates[runtime, n]] for n in ("dense", name)}
    first = median([r["first"] if ours else c.prompt / r["prompt"] for r in rates[key]])
    faster, allowed = median_ratio(per_token["dense"], per_token[name]), read["dense"] / read[name]
    return {"table": "inference", "shape": preset, "runtime": runtime, "model": name,
            "params": config.num_params()["total"], "prefill tokens/s": c.prompt / first, "first token, s": first,
            "decode tokens/s": 1 / median(per_token[name]), "bytes read per token": round(read[name]),
            "bandwidth GB/s": bandwidth / 1e9, "of the roofline": read[name] / median(per_token[name]) / bandwidth,
            "decode ÷ dense's": faster, "bytes allow": allowed, "of the bytes": faster / allowed,
            "peak bytes": peaks[key]["peak_bytes"]}
