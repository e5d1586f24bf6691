"""Write down once what a teacher says of the training text, for several students to learn from.

    python -m experiments.teacher smollm2 --data stdlib --out runs/teacher
    python train.py --init runs/cut --teacher runs/teacher --plan recover
    python -m experiments.teacher smollm2 --student runs/cut      # writes, and measures what the tail hides

The teacher runs over the samples that train.py reads with the same --data, --seed and --block-size,
and the --top likeliest tokens of each place are kept (formats/top_k.py has the format). The KL to
them and to the sum of the others is a lower bound of the full one (distill.top_kd_loss). A call
that was interrupted goes on where it stopped, and one with more --tokens adds them.
"""
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import data
import distill
import train
from common import UserError, check_choices, check_positive, parse, pick_device, progress, run
from formats import top_k


@dataclass(frozen=True)
class Teacher:
    model: str                               # a checkpoint, run, Hugging Face folder or hub id
    data: tuple[str, ...] = ("stdlib",)      # as train.py's
    tokens: int = 2**20                      # as many as train.py reads: --steps times --batch-tokens
    seed: int = 0                            # as train.py's
    block_size: int | None = None            # as train.py's; default: at most 512
    top: int = 64                            # tokens that are kept of each place
    out: str = "runs/teacher"                # folder
    batch: int = 4                           # windows per forward pass
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # as train.py's
    student: str | None = None               # also measure which part of the KL to this model the records hold


def likeliest(hidden, weight, targets, k):
    """The k likeliest of V tokens, at N places: -> (indices (N, k), log-probabilities (N, k), the
    probability of all others (N,), the targets' log-probability (N,)), for hidden states (N, C), an
    output projection (V, C) and targets (N,)."""
    padded = distill.operand(weight)
    chunk = distill.chunk_tokens(padded)
    parts = []
    for a in range(0, len(hidden), chunk):
        logits = (hidden[a:a + chunk] @ padded.T)[:, :len(weight)]
        log_q = torch.log_softmax(logits.float(), -1)
        log_probs, indices = log_q.topk(k)
        # A target that does not count is negative.
        target = log_q.gather(1, targets[a:a + chunk, None].clamp(min=0)).squeeze(1)
        # The sum of the others, and not 1 - Σ, which would lose the digits of a small one.
        tail = log_q.exp_().scatter_(1, indices, 0).sum(-1)
        parts.append((indices, log_probs, tail, target))
    return [torch.cat(values) for values in zip(*parts)]


@torch.no_grad()
def records_of(model, x, y, kind):
    """The records (B,) of a batch of token ids and targets (B, T)."""
    indices, log_probs, tail, target = likeliest(model.hidden(x).flatten(0, 1), model.head_weight, y.flatten(),
                                                 kind["indices"].shape[1])
    records = np.zeros(len(x), kind)
    for name, values in (("indices", indices), ("log_probs", log_probs), ("tail", tail), ("target", target)):
        records[name] = values.cpu().numpy().reshape(records[name].shape)
    for record in records:
        record["digest"] = top_k.digest_of(record)
    return records


@torch.no_grad()
def held(model, student, x, y, k):
    """The KL of a student on a batch (B, T): to the k likeliest tokens of the teacher and their tail,
    and to the whole teacher; mean nats per token."""
    targets = y.flatten().clamp(min=0)
    hidden = model.hidden(x).flatten(0, 1)
    student_hidden = student.hidden(x).flatten(0, 1)
    V = model.config.vocab_size
    chunk = distill.chunk_tokens(model.head_weight)
    known = full = 0.0
    for a in range(0, len(hidden), chunk):
        indices, log_probs, tail, target = likeliest(hidden[a:a + chunk], model.head_weight, targets[a:a + chunk], k)
        top = distill.TopK(indices, log_probs.exp(), tail, target, V)
        logits = (student_hidden[a:a + chunk] @ student.head_weight[:V].T).float()
        teacher_logits = (hidden[a:a + chunk] @ model.head_weight.T).float()
        _, divergence, *_ = distill.top_token_losses(logits.clone(), targets[a:a + chunk], top, needs_grad=False)
        known += divergence.sum().item()
        _, divergence, *_ = distill.token_losses(logits, targets[a:a + chunk], teacher_logits, needs_grad=False)
        full += divergence.sum().item()
    return known / len(hidden), full / len(hidden)


def open_model(config, device):
    """The teacher, its tokenizer and its corpus: -> model, corpus, and the settings of train.py that
    they belong to."""
    model, about = checkpoint.load(config.model, device, torch.float32)
    tokenizer = checkpoint.tokenizer_of(model, about, config.model)
    settings = train.Train(data=config.data, block_size=config.block_size, dtype=config.dtype, init=config.model)
    settings = train.fit_to(settings, model.config.block_size)
    block_size = settings.block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise UserError(f"--block-size {block_size} is more than the {model.config.block_size} tokens that the model "
                        "was trained with; give at most that")
    settings = dataclasses.replace(settings, block_size=block_size,
                                   dtype=train.dtype_for(settings, model.config, device))
    if model.config.vocab_size > tokenizer.vocab_size:
        model = checkpoint.without_padding(model, tokenizer.vocab_size)
    return distill.freeze(model), train.load_corpus(settings, tokenizer, block_size, 0, None), settings


def main(config):
    check_choices(config)
    check_positive(config, ("tokens", "block_size", "top", "batch"))
    device = pick_device(config.device)
    model, corpus, settings = open_model(config, device)
    T = settings.block_size
    if config.top > model.config.vocab_size:
        raise UserError(f"--top {config.top} is more than the {model.config.vocab_size} tokens of the vocabulary; give "
                        "at most that")
    identity = {"fingerprint": corpus.fingerprint, "seed": config.seed, "block_size": T,
                "tokenizer": corpus.tokenizer.name, "vocab_size": model.config.vocab_size, "top": config.top,
                "dtype": settings.dtype, "sha256": checkpoint.fingerprint(model)}
    folder = Path(config.out)
    with checkpoint.locked(folder):
        write(config, settings, model, corpus, identity, folder)
    if config.student:
        student, _ = checkpoint.load(config.student, device, torch.float32)
        x, y = data.batch(corpus.train, T, config.seed, 0, 0, micro_batch=config.batch, micro_steps=1)
        with train.autocast(settings, device):
            known, full = held(model, student, x.to(device), y.to(device), config.top)
        print(f"on {config.batch * T:,} tokens the KL of {config.student} is {full:.4f} nats per token, to the "
              f"{config.top} likeliest tokens and their tail {known:.4f} ({known / full:.1%})")


def write(config, settings, model, corpus, identity, folder):
    """Write the samples that the folder does not have yet, and say what it holds."""
    samples = 0
    if top_k.is_cache(folder):
        index = top_k.read_index(folder)
        top_k.refuse_another(folder, index, identity)
        samples = index["samples"]
    elif {file.name for file in folder.iterdir()} - {".lock", "teacher.bin"}:
        # Records alone are what a call left that was killed in front of its first index.
        checkpoint.refuse_existing(folder)
    T = settings.block_size
    kind = top_k.record_type(identity)
    device = str(model.embed.weight.device)
    start = time.perf_counter()
    before = samples
    needed = max(samples, -(-config.tokens // T))
    # Batches begin at multiples of --batch. One of which the folder holds a part is read again.
    for step in progress(range(samples // config.batch, -(-needed // config.batch)), "teacher"):
        x, y = data.batch(corpus.train, T, config.seed, step, 0, micro_batch=config.batch, micro_steps=1)
        with train.autocast(settings, device):
            records = records_of(model, x.to(device), y.to(device), kind)
        first = step * config.batch
        records = records[:needed - first]
        top_k.append(folder, {"teacher": config.model, **identity}, first, records)
        samples = first + len(records)
    seconds = time.perf_counter() - start
    written = (samples - before) * T
    print(f"{folder}: {samples * T:,} tokens, {kind.itemsize / T:.0f} bytes each, {samples * kind.itemsize:,} in all; "
          f"{written:,} of them written now, {train.rate_text(written / seconds)}")


if __name__ == "__main__":
    run(lambda: main(parse(Teacher)))
