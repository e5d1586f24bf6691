"""How good a model is: nats per token, perplexity, bits per byte under one stated protocol; and a sample of its text.

    python eval.py runs/idea-laptop-0 --sample "def read(path):"
    python eval.py runs/idea-laptop-0 --data README.md --stride 32
    python eval.py SmolLM2-135M --multiple-choice questions.jsonl      # a Hugging Face folder or hub id
    python eval.py SmolLM2-135M --tasks arc_easy,hellaswag,piqa

Protocol. The hold-out is cut into windows of block_size + 1 tokens. Without --stride: `windows` of them, evenly
spaced, not overlapping, always the same ones; no context from before a window; its first token is only context, the
others all count. With --stride s: windows start every s tokens over the whole text and, but for the first, count
their last s tokens, so that every counted token has at least block_size - s tokens of context. What is
left behind the last window counts in neither. Losses are means over counted tokens, formed in the weights' dtype with
float32 logits (float64 for float64 weights); bits per byte divides by the UTF-8 bytes those tokens stand for.
Questions with choices and lm_eval's tasks are scored by tasks/questions.py.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from checkpoint import load, tokenizer_of
from common import UserError, parse, pick_device, refuse_idle, run
from distill import chunked_loss


@dataclass(frozen=True)
class Eval:
    checkpoint: str               # ckpt_*.pt, the folder of a run, a Hugging Face folder or a hub id
    data: str | None = None       # a text file, all windows of it; default: training's hold-out, unless questions are
    block_size: int | None = None    # tokens of context; default: what the model was trained with
    windows: int = 256            # windows of the hold-out, evenly spaced (0 = all; a text file always: all)
    stride: int = 0               # move windows by so many tokens over the whole text (0 = windows as above)
    batch: int = 32               # windows per forward pass
    multiple_choice: tuple[str, ...] = ()    # files of questions: JSON lines, or BIG-bench's task.json (tasks/questions.py)
    tasks: str | None = None      # lm_eval's tasks, for example arc_easy,hellaswag (pip install lm_eval)
    include_path: str | None = None    # a folder with YAML files of more lm_eval tasks
    num_fewshot: int | None = None     # examples before each question of --tasks; default: the task's
    limit: int | None = None      # questions per file or task; default: all
    batch_tokens: int | None = None    # tokens per forward pass of --multiple-choice and --tasks
    sample: str | None = None     # also continue this prompt
    tokens: int = 300             # length of the sample
    temperature: float = 0.8      # of the sample; 0 = greedy
    top_k: int = 50               # of the sample; 0 = all tokens
    seed: int = 0                 # of the sample
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # of the weights: float32, bfloat16, …; auto: as stored, on a CPU at least float32


@torch.no_grad()
def evaluate(model, tokens, byte_lengths, windows=256, stride=0, batch=32, rank=0, world=1):
    """Mean loss of `model` over windows of `tokens` (N,), see the protocol above -> {"loss" (nats per token),
    "perplexity", "bits_per_byte", "tokens" (counted)}. Of `world` processes that all call this each runs every world-th
    batch, and all get the result. Raises UserError where the text is shorter than one window."""
    T, device = model.config.block_size, model.embed.weight.device
    if windows < 0 or batch < 1:
        raise UserError(f"--windows {windows} must be 0 (all) or more, --batch {batch} at least 1")
    available = (len(tokens) - 1) // T
    if available < 1:
        raise UserError(f"the text has {len(tokens)} tokens, one window takes {T + 1}: give a longer text or "
                        "a smaller --block-size")
    if stride:
        if not 0 < stride <= T:
            raise UserError(f"--stride {stride} must be between 1 and the context of {T} tokens")
        starts = np.arange(0, len(tokens) - T, stride)
    else:
        count = min(windows or available, available)
        starts = np.arange(count) * available // count * T
    nats, counted, in_bytes = 0.0, 0, 0
    for a in range(rank * batch, len(starts), world * batch):
        rows = np.stack([tokens[s:s + T + 1] for s in starts[a:a + batch].tolist()])
        rows = torch.from_numpy(rows.astype(np.int64)).to(device)               # (batch, T + 1)
        hidden, y = model.hidden(rows[:, :-1]), rows[:, 1:]
        parts = [(hidden, y)]
        if stride:                                                              # all but the first: the last tokens
            first = 1 if a == 0 else 0
            parts = [(hidden[:first], y[:first]), (hidden[first:, -stride:], y[first:, -stride:])]
        for h, t in parts:
            if t.numel():
                nats += chunked_loss(h, model.head_weight, t)[0].item() * t.numel()
                counted += t.numel()
                in_bytes += int(byte_lengths[t.cpu().numpy()].sum())
    if world > 1:
        sums = torch.tensor((nats, counted, in_bytes), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        nats, counted, in_bytes = sums[0].item(), *map(int, sums[1:].tolist())
    loss = nats / counted
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": counted,
            "bits_per_byte": nats / math.log(2) / max(1, in_bytes)}


def sample(model, tokenizer, prompt_ids, tokens, temperature=0.8, top_k=50, seed=0):
    """Continue prompt_ids (N,) by so many tokens -> the continuation as text."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.from_numpy(np.asarray(prompt_ids).astype(np.int64))[None].to(device)
    out = model.generate(idx, tokens, temperature, top_k, generator)
    return tokenizer.decode(out[0, idx.size(1):].tolist())


def open_model(config):
    """-> (GPT, what its file says besides) for the flags of the command."""
    device = pick_device(config.device)
    if config.dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise UserError(f"--dtype {config.dtype!r} is not one of auto, float32, bfloat16, float16, float64")
    model, about = load(config.checkpoint, device, None if config.dtype == "auto" else getattr(torch, config.dtype),
                        config.block_size)
    if config.dtype == "auto" and device == "cpu" and model.embed.weight.dtype.itemsize < 4:
        model.float()                                        # CPUs are slow in half precision, and round more
    return model, about


def print_loss(config, model, tokenizer, about):
    windows, trained = config.windows if config.data is None else 0, about.get("run", {})
    if config.data is None:
        if "data" not in trained:
            raise UserError(f"{config.checkpoint} does not say what it was trained on; give a text by --data")
        corpus, name = data.load(trained["data"], tokenizer), f"hold-out of {trained['data']}"
        if corpus.fingerprint != trained["fingerprint"]:
            raise UserError(f"{trained['data']!r} here (fingerprint {corpus.fingerprint}) is not the corpus that the "
                            f"model was trained on ({trained['fingerprint']}), so its hold-out may have been trained "
                            "on; give a text by --data")
        tokens = corpus.val
    else:
        try:
            tokens, name = tokenizer.encode(Path(config.data).read_text(encoding="utf-8")), config.data
        except UnicodeDecodeError:
            raise UserError(f"{config.data} is not UTF-8 text; convert it first") from None
    result = evaluate(model, tokens, tokenizer.byte_lengths(), windows, config.stride, config.batch)
    step = f" at step {about['step']}" if "step" in about else ""
    print(f"{config.checkpoint}{step}: {model.config.num_params()['total']:,} parameters, {name}, "
          f"{result['tokens']:,} tokens in windows of {model.config.block_size}\n"
          f"  {result['loss']:.4f} nats per token   perplexity {result['perplexity']:.3f}   "
          f"{result['bits_per_byte']:.4f} bits per byte")


def print_sample(config, model, tokenizer):
    ids = tokenizer.encode(config.sample)
    if len(ids) == 0:
        raise UserError("--sample needs a prompt of at least one token, for example --sample 'def '")
    if not 0 <= config.temperature < math.inf or config.top_k < 0 or config.tokens < 1:
        raise UserError(f"--temperature {config.temperature} and --top-k {config.top_k} must be finite and not "
                        f"negative, --tokens {config.tokens} at least 1")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed} must be between 0 and {2**63 - 1}")
    text = sample(model, tokenizer, ids, config.tokens, config.temperature, config.top_k, config.seed)
    print(f"\n{config.sample}{text}")


def main(config):
    asks = bool(config.tasks or config.multiple_choice)
    for names, used, why in ((("include_path", "num_fewshot"), config.tasks, "without --tasks"),
                             (("limit", "batch_tokens"), asks, "without --tasks or --multiple-choice"),
                             (("stride", "batch"), config.data or not asks, "on questions without --data"),
                             (("windows",), not (config.data or config.stride or asks),
                              "with --data or --stride, where all windows count, nor on questions"),
                             (("tokens", "temperature", "top_k", "seed"), config.sample is not None,
                              "without --sample")):
        refuse_idle(config, () if used else names, why)
    if asks:
        from tasks import questions      # only now: the other commands need nothing of it
        questions.check(config)
    model, about = open_model(config)
    tokenizer = tokenizer_of(about, config.checkpoint)
    if asks:
        questions.main(config, model, tokenizer)
    if config.data is not None or not asks:
        print_loss(config, model, tokenizer, about)
    if config.sample is not None:
        print_sample(config, model, tokenizer)


if __name__ == "__main__":
    run(lambda: main(parse(Eval)))
