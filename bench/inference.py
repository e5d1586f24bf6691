"""The suite infer of `python -m bench`: prefill, decoding and memory of dense and pruned models,
ours and llama.cpp's.

    python -m bench infer --presets 135m --keep 0.8 --prompt 128 1024 4096

Weights are random. Two pruned models have equally many parameters. "even" has the same FFN width in
every layer. "uneven" has widths that grow with depth, and in every third layer a KV group's worth
of neurons instead of the group. Decoding reads every weight once a step, so its limit is the bytes
of a step over the measured bandwidth. `of the bytes` is the speed of a model over that of the dense
one, divided by what the bytes alone would allow. Behind the shortest prompt, the dense model also
continues BATCH prompts at once. Not here: quality (experiments/compare.py).
"""
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec

import torch

import model as models
from bench.timing import interleave, median_ratio, own_process, peak, traffic
from bench.variants import shapes
from common import UserError
from formats import gguf_export, llamacpp
from formats.tokenizer import open_tokenizer

BATCH = 8                        # prompts
median = statistics.median


# -- the models

def pruned(dense, keep):
    """{"dense", "even", "uneven": GPTConfig}. The even model has as many removable parameters as
    `keep` allows, to within a neuron a layer, and the uneven one as many as the even one, to within
    a neuron. Raises UserError if `keep` leaves no neurons."""
    layers = range(dense.n_layer)
    neuron = dense.unit_params(0, "ffn")
    budget = keep * dense.removable_params()
    attention = sum(dense.n_kv_head[layer] * dense.unit_params(layer, "kv") for layer in layers)
    if budget < attention + dense.n_layer * neuron:
        raise UserError(f"--keep {keep} leaves {budget:,.0f} parameters and no neurons, as attention "
                        f"stays and has {attention:,}; give --keep above "
                        f"{attention / dense.removable_params() + .01:.2f}")
    width = int((budget - attention) / dense.n_layer / neuron)
    even = dense.resized({(layer, "ffn"): width for layer in layers})

    # Widths on a line through the mean, so that their sum stays.
    slope = min(width, dense.d_ff[0] - width) / 2
    widths = {}
    for layer in layers:
        widths[layer, "ffn"] = width + round(slope * (2 * layer / max(1, dense.n_layer - 1) - 1))
    fewer = [layer for layer in layers[::3] if dense.n_kv_head[layer] > 1]
    neurons = sum(dense.unit_params(layer, "kv") for layer in fewer) // neuron
    for i, layer in enumerate(fewer):
        widths[layer, "kv"] = dense.n_kv_head[layer] - 1
        widths[layer, "ffn"] += neurons * (i + 1) // len(fewer) - neurons * i // len(fewer)
    return {"dense": dense, "even": even, "uneven": dense.resized(widths)}


def bytes_per_token(config, context, size):
    """The bytes that decoding a token reads, at `size` bytes a number: every matrix and norm once,
    and the KV cache of `context` tokens. Of an embedding that is not tied only a row is read, which
    is left out."""
    params = config.num_params()
    weights = params["total"] if config.tie_embeddings else params["total"] - params["embedding"]
    return weights * size + context * config.kv_bytes_per_token(size)


# -- what is measured

def build(config, device, dtype, tokens, prompts):
    """A model with random weights and random prompts of so many tokens."""
    torch.manual_seed(0)
    with torch.device(device):
        model = models.GPT(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (prompts, tokens), generator=generator)
    return model, idx.to(device)


def generate(model, idx, tokens):
    """Continue the prompts idx (B, T) greedily: -> {"first": seconds to the first token of each,
    "decode": seconds per further token of each}."""
    times = [time.perf_counter()]

    def note(idx):
        idx[:, -1].tolist()                  # waits until a GPU has the token
        times.append(time.perf_counter())

    model.generate(idx, tokens, temperature=0, done=note)
    return {"first": times[1] - times[0], "decode": (times[-1] - times[1]) / (tokens - 1)}


def write_file(path, config):
    """Write a model with random weights for llama.cpp. The tokenizer only fills the file: its
    vocabulary of bytes is padded."""
    torch.manual_seed(0)
    gguf_export.write_gguf(models.GPT(config), open_tokenizer("bytes"), path, "f16")


def llamacpp_generate(path, prompt, tokens):
    """`generate` for llama.cpp. The seconds of the prompt count as those to the first token."""
    rates = llamacpp.speed(path, prompt, tokens, 1)
    return {"first": prompt / rates["prompt"], "decode": 1 / rates["decode"]}


def memory(config, device, dtype, tokens, prompts, decode):
    """The bytes before a generation (the weights) and at its peak, in a process of its own."""
    model, idx = build(config, device, dtype, tokens, prompts)
    with peak(device) as measured:
        model.generate(idx, decode, temperature=0)
    return measured


def llamacpp_memory(path, prompt, tokens):
    """`memory` for llama.cpp. The file that it maps into memory is included."""
    with peak("cpu") as measured:
        llamacpp.speed(path, prompt, tokens, 1)
    return measured


# -- the suite

@dataclass
class Measured:
    """All that was measured of one shape. Keys are (runtime, model)."""
    about: dict                  # the first columns of every row
    sizes: dict                  # {runtime: bytes of a number in its weights}
    configs: dict                # by model only
    prompts: dict                # by model only: how many are continued at once
    prompt: int                  # tokens of each
    decode: int                  # tokens
    bandwidth: float             # bytes per second
    seconds: dict                # [{"first", "decode"}] of each round
    memory: dict


def infer(settings, preset, vocab_size):
    """Time prefill and decoding behind prompts of each length."""
    parts = [infer_behind(prompt, settings, preset, vocab_size) for prompt in settings.prompt]
    together = {"note": parts[0]["note"], "bandwidth": [part["bandwidth"] for part in parts]}
    for key in ("rows", "memory", "rates"):
        together[key] = list(itertools.chain(*[part[key] for part in parts]))
    return together


def infer_behind(prompt, settings, preset, vocab_size):
    """Time all models in turns behind prompts of so many tokens, with the bandwidth among them."""
    decode = settings.decode
    dense, _ = shapes(preset, vocab_size)
    context = max(prompt + decode + 1, dense.block_size)
    configs = pruned(dataclasses.replace(dense, block_size=context), settings.keep)
    prompts = dict.fromkeys(configs, 1)
    if prompt == min(settings.prompt):
        batch = f"dense, {BATCH} prompts"
        configs[batch] = configs["dense"]
        prompts[batch] = BATCH
    left_out = None
    if settings.device.startswith("cuda"):
        left_out = "asked on the CPU only: --device cpu"
    elif not (find_spec("xllamacpp") and find_spec("gguf")):
        left_out = "pip install xllamacpp gguf"

    # Memory is measured in fresh processes. Then all models stay loaded and take turns.
    peaks = {}
    generations = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            arguments = (config, settings.device, settings.dtype, prompt, prompts[name])
            peaks["ours", name] = own_process(memory, *arguments, decode)
            generations["ours", name] = functools.partial(generate, *build(*arguments), decode)
            if not left_out and prompts[name] == 1:
                path = f"{folder}/{name}.gguf"
                write_file(path, config)
                peaks["llama.cpp", name] = own_process(llamacpp_memory, path, prompt, decode)
                generations["llama.cpp", name] = functools.partial(llamacpp_generate, path, prompt, decode)
        bandwidth, seconds = time_in_turns(generations, settings.rounds, settings.device)

    about = {"table": "inference", "shape": preset, "prompt": prompt}
    sizes = {"ours": getattr(torch, settings.dtype).itemsize, "llama.cpp": 2}
    measured = Measured(about, sizes, configs, prompts, prompt, decode, bandwidth, seconds, peaks)
    rows = [row(measured, runtime, name) for runtime, name in generations]
    if left_out:
        rows.append({**about, "runtime": "llama.cpp", "note": left_out})
    note = (f"; ours in {settings.dtype}, llama.cpp's files in f16: compare shares of the roofline; "
            "on a CPU memory is the whole process's, with Python and PyTorch in both")
    return {"rows": rows, "note": note, "bandwidth": bandwidth,
            "memory": [[*key, prompt, size] for key, size in peaks.items()],
            "rates": [[*key, prompt, rounds] for key, rounds in seconds.items()]}


def time_in_turns(generations, rounds, device):
    """Call the generations in turns, with the limits of bytes/s among them: -> bandwidth, {key:
    [what each round returned]}. The first round does not count."""
    moves = traffic(device)
    returned = {key: [] for key in generations}
    calls = {name: call for name, (call, _) in moves.items()}
    for key, generation in generations.items():
        calls[key] = lambda key=key, generation=generation: returned[key].append(generation())
    seconds = interleave(calls, rounds, device)
    bandwidth = max(size / median(seconds[name]) for name, (_, size) in moves.items())
    return bandwidth, {key: values[1:] for key, values in returned.items()}


def row(measured, runtime, name):
    """One model in one runtime as a row of the table."""
    context = measured.prompt + measured.decode / 2
    size = measured.sizes[runtime]
    # A step reads the weights once for all prompts, and the cache of each.
    prompts = measured.prompts[name]
    read = bytes_per_token(measured.configs[name], prompts * context, size) / prompts
    allowed = bytes_per_token(measured.configs["dense"], context, size) / read
    rounds = [each["decode"] / prompts for each in measured.seconds[runtime, name]]
    dense_rounds = [each["decode"] for each in measured.seconds[runtime, "dense"]]
    first = median([each["first"] for each in measured.seconds[runtime, name]])
    faster = median_ratio(dense_rounds, rounds)
    return {**measured.about, "runtime": runtime, "model": name,
            "params": measured.configs[name].num_params()["total"],
            "prefill tokens/s": prompts * measured.prompt / first, "first token, s": first,
            "decode tokens/s": 1 / median(rounds), "bytes read per token": round(read),
            "bandwidth GB/s": measured.bandwidth / 1e9,
            "of the roofline": read / median(rounds) / measured.bandwidth,
            "decode ÷ dense's": faster, "bytes allow": allowed, "of the bytes": faster / allowed,
            "peak bytes": measured.memory[runtime, name]["peak_bytes"]}
