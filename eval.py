"""How good a model is: nats per token, perplexity and bits per byte by one stated protocol; questions
and small tasks that it answers; and a sample of its text.

    python eval.py runs/idea-laptop-0 --sample "def read(path):" "class Reader:"
    python eval.py runs/idea-laptop-0 --data README.md --stride 32
    python eval.py SmolLM2-135M --data prose.txt chats.jsonl           # a Hugging Face folder or hub id
    python eval.py runs/cut --multiple-choice own --probe --against SmolLM2-135M
    python eval.py SmolLM2-135M --tasks arc_easy,hellaswag,piqa

The protocol. A row of a .jsonl or .parquet file, and each file of a folder, is a document of its
own, which the end-of-text token closes; any other file is read as it is. The text is cut into
windows of block_size + 1 tokens. The first token of a window is only context; the model predicts
each of the others from those before it in the window. Without --stride, `windows` of the windows are
read: they are evenly spaced, do not overlap and are always the same. The sources of a mixture that
the model was trained on share them, and each has a loss of its own. With --stride s, a window starts
every s tokens over the whole text. The first window counts all of its predictions, every other
window its last s, so that each of these has at least block_size - s tokens of context. Tokens behind
the last window are left out.

A loss is the mean over the counted tokens; of chats only the answers count (formats/chat.py). The
model runs in the dtype of its weights, and the log-softmax in float32 (float64 for float64 weights).
The dtype is printed with the loss: compare only losses of one dtype, as bfloat16 moves them by about
0.001. With --dtype auto the weights are as stored, except on a CPU: there float16 becomes float32,
and so does bfloat16 where it is not faster. Bits per byte divides by the UTF-8 bytes that the counted
tokens stand for.

Multiple-choice questions and lm_eval's tasks are scored by tasks/questions.py, --probe's tasks by
tasks/probe.py. --against lets a second model answer the same, and prints the paired differences.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import data
import shard
from checkpoint import load, tokenizer_of
from common import (
    IGNORED,
    UserError,
    check_choices,
    check_seed,
    has_fast_bfloat16,
    parse,
    pick_device,
    printable,
    progress,
    refuse_idle,
    run,
)
from distill import chunked_loss

WINDOW = 2048                        # most tokens of a window of --data, without --block-size: the usual protocol


@dataclass(frozen=True)
class Eval:
    checkpoint: str               # ckpt_*.pt, the folder of a run, a Hugging Face folder or a hub id
    data: tuple[str, ...] = ()    # texts: files or folders; default: training's hold-out, unless there are questions
    block_size: int | None = None    # tokens of context; default: what training had, with --data at most 2,048
    windows: int = 256            # windows of the hold-outs of training, evenly spaced; 0: all
    stride: int = 0               # start a window every so many tokens of the whole text; 0: `windows` of them
    batch: int = 32               # windows per forward pass
    multiple_choice: tuple[str, ...] = ()    # files of questions: JSON lines, BIG-bench's task.json; or own
    probe: bool = False           # sums, copying, brackets, phrases: answers that the model must write itself
    against: str | None = None    # a second model that answers the same: paired differences to it
    tasks: str | None = None      # lm_eval's tasks, for example arc_easy,hellaswag (pip install lm_eval)
    include_path: str | None = None    # a folder with YAML files of more lm_eval tasks
    num_fewshot: int | None = None     # examples before each question of --tasks; default: the task's own number
    limit: int | None = None      # questions per file or task; default: all
    batch_tokens: int | None = None    # tokens per forward pass of --multiple-choice and --tasks
    sample: tuple[str, ...] = ()  # also continue these prompts, all in one batch
    tokens: int = 300             # length of a sample
    temperature: float = 0.8      # of the sample; 0: greedy
    top_k: int = 50               # of the sample; 0: all tokens
    seed: int = 0                 # of the sample
    device: str = "auto"          # auto, cpu, cuda, mps
    # of the weights; auto: as stored, on a CPU at least float32, or bfloat16 where that is fast
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"


# -- the loss

def window_starts(length, T, windows, stride):
    """Where the windows of a text of `length` tokens start, (N,). `T` is the context in tokens.
    Raises UserError if the text is shorter than one window or the stride is not between 1 and T."""
    available = (length - 1) // T
    if available < 1:
        raise UserError(f"the text has {length} tokens, one window takes {T + 1}: give a longer "
                        "text or a smaller --block-size")
    if not stride:
        count = min(windows or available, available)
        return np.arange(count) * available // count * T
    if not 0 < stride <= T:
        raise UserError(f"--stride {stride} must be between 1 and the context of {T} tokens")
    return np.arange(0, length - T, stride)


def counted_parts(hidden, targets, stride, with_first_window):
    """The predictions that count, of hidden states (B, T, C) and targets (B, T): a list of such
    pairs."""
    if not stride:
        return [(hidden, targets)]
    if not with_first_window:
        return [(hidden[:, -stride:], targets[:, -stride:])]
    parts = [(hidden[:1], targets[:1])]
    if len(hidden) > 1:
        parts.append((hidden[1:, -stride:], targets[1:, -stride:]))
    return parts


@torch.no_grad()
def evaluate(model, tokens, byte_lengths, windows=256, stride=0, batch=32, rank=0, world=1, block_size=None,
             show_progress=False):
    """Mean loss of `model` over windows of `tokens` (N,), see the protocol above.

    -> {"loss" (nats per token), "perplexity", "bits_per_byte", "tokens" (counted)}. `byte_lengths`
    (V,) holds the bytes that each token stands for. `block_size` is the context in tokens; the
    default is the model's. If `world` processes call this, each runs every world-th batch, and all
    get the whole result. `show_progress` draws a bar. Raises UserError if the text is shorter than
    one window."""
    if windows < 0 or batch < 1:
        raise UserError(f"--windows {windows} must be 0 (all) or more, --batch {batch} at least 1")
    T = block_size or model.config.block_size
    device = model.embed.weight.device
    starts = window_starts(len(tokens), T, windows, stride)

    nats = 0.0
    counted = 0
    counted_bytes = 0
    # All processes run the model equally often, as a sharded one gathers its weights from all of them.
    # Where there is no batch left for a process, it runs the first one and does not count it.
    rounds = range(0, len(starts), world * batch)
    for first in progress(rounds, "evaluate", show_progress):
        first += rank * batch
        counts = first < len(starts)
        if not counts:
            first = 0
        rows = np.stack([tokens[start:start + T + 1] for start in starts[first:first + batch].tolist()])
        rows = torch.from_numpy(rows.astype(np.int64)).to(device)               # (B, T + 1)
        x, y = data.inputs_and_targets(rows)
        hidden = model.hidden(x)                                                # (B, T, C)
        if not counts:
            continue
        for states, targets in counted_parts(hidden, y, stride, first == 0):
            loss, _ = chunked_loss(states, model.head_weight, targets)
            targets = targets[targets != IGNORED]
            nats += loss.item() * targets.numel()
            counted += targets.numel()
            counted_bytes += int(byte_lengths[targets.cpu().numpy()].sum())
    shard.release(model)

    if world > 1:
        sums = torch.tensor((nats, counted, counted_bytes), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        nats = sums[0].item()
        counted = int(sums[1])
        counted_bytes = int(sums[2])

    if not counted:
        raise UserError("no answer is among the windows, all of their tokens are only context; give more windows")
    loss = nats / counted
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": counted,
            "bits_per_byte": nats / math.log(2) / max(1, counted_bytes)}


def has_documents(name):
    """Whether --data names several documents: a file of rows or a folder."""
    return Path(name).suffix in data.ROWS or Path(name).is_dir()


def read_documents(name):
    """The documents of a file or folder, [str]; a chat is a data.Chat. Raises UserError if there are
    none."""
    if not has_documents(name):
        return [data.read_text(name)]
    source = data.open_source(name, field="text", split="train", stream=False)
    documents = []
    for _, pieces in source.documents():
        pieces = list(pieces)
        is_chat = isinstance(pieces[0], data.Chat)
        documents.append(pieces[0] if is_chat else "".join(pieces))
    if not documents:
        raise UserError(f"{name} holds no text; give another file")
    return documents


def read_tokens(name, tokenizer):
    """The token ids (N,) of a text file; or of a file of rows or a folder, with the end-of-text token
    behind each document. Tokens of chats that are no answers are marked (data.CONTEXT_ONLY)."""
    pieces = []
    for document in read_documents(name):
        pieces.append(document)
        if has_documents(name):
            pieces.append(None)
    return data.encode_block(tokenizer, pieces)


def read_lines(name):
    """The text of a file or folder as one string. Raises UserError if it holds chats."""
    documents = read_documents(name)
    if any(isinstance(document, data.Chat) for document in documents):
        raise UserError(f"{name} holds chats, and --probe continues lines of a text; give a text")
    return "\n".join(documents)


def hold_out(config, tokenizer, about):
    """The hold-outs of the model's training: {source: token ids (N,)}. Raises UserError if there are
    none, or if they are not those of its training."""
    trained = about.get("run", {})
    if "data" not in trained:
        raise UserError(f"{config.checkpoint} does not say what it was trained on; give a text by "
                        "--data")
    corpus = data.load_mixture(trained["data"], tokenizer)
    if corpus.fingerprint != trained["fingerprint"]:
        raise UserError(f"{trained['data']!r} here (fingerprint {corpus.fingerprint}) is not the "
                        f"corpus that the model was trained on ({trained['fingerprint']}), so its "
                        "hold-out may have been trained on; give a text by --data")
    return corpus.domains


def dtype_name(model):
    """The dtype that the model runs in, as --dtype names it."""
    return str(model.embed.weight.dtype).removeprefix("torch.")


def print_loss(config, model, tokenizer, about):
    """Print the loss of each text of --data, or of each hold-out."""
    context = model.config.block_size
    if not config.data:
        sources = hold_out(config, tokenizer, about)
        # A given model may have been trained on shorter windows than its context.
        trained = about["run"].get("block_size") if config.block_size is None else None
        T = min(context, trained or context)
        windows = config.windows
        if windows > 0:
            windows = max(1, windows // len(sources))        # as train.py shares them
        for source, tokens in sources.items():
            print_line(config, model, tokenizer, about, tokens, f"hold-out of {source}", T, windows)
        return
    # All texts are read before the first is measured, so that a bad one is refused at once.
    texts = {name: read_tokens(name, tokenizer) for name in config.data}
    for name, tokens in texts.items():
        T = context
        # A text that is shorter is one window. A --block-size that was given is taken as it is.
        if config.block_size is None:
            T = max(1, min(context, WINDOW, len(tokens) - 1))
        print_line(config, model, tokenizer, about, tokens, name, T, windows=0)


def print_line(config, model, tokenizer, about, tokens, name, T, windows):
    """Measure a text (N,) in windows of T tokens and print the result."""
    result = evaluate(model, tokens, tokenizer.byte_lengths(), windows, config.stride, config.batch,
                      block_size=T, show_progress=True)
    step = f" at step {about['step']}" if "step" in about else ""
    print(f"{config.checkpoint}{step}: {model.config.num_params()['total']:,} parameters, {printable(name)}, "
          f"{result['tokens']:,} tokens in windows of {T}, {dtype_name(model)}\n"
          f"  {result['loss']:.4f} nats per token   perplexity {result['perplexity']:.3f}   "
          f"{result['bits_per_byte']:.4f} bits per byte")


# -- a sample

def sample(model, tokenizer, prompts, tokens, temperature=0.8, top_k=50, seed=0):
    """Continue the ids of each prompt (N,) by so many tokens: -> [the continuation as text]."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = [torch.from_numpy(np.asarray(ids).astype(np.int64)) for ids in prompts]
    idx = pad_sequence(rows, batch_first=True, padding_side="left").to(device)
    lengths = [len(ids) for ids in prompts]
    continued = model.generate(idx, tokens, temperature, top_k, generator, lengths=lengths)
    shard.release(model)
    return [tokenizer.decode(row) for row in continued[:, idx.size(1):].tolist()]


def print_sample(config, model, tokenizer):
    prompts = [tokenizer.encode(prompt) for prompt in config.sample]
    if min(map(len, prompts)) == 0:
        raise UserError("--sample needs a prompt of at least one token, for example --sample 'def "
                        "'")
    if not 0 <= config.temperature < math.inf or config.top_k < 0 or config.tokens < 1:
        raise UserError(f"--temperature {config.temperature} and --top-k {config.top_k} must be "
                        f"finite and not negative, --tokens {config.tokens} at least 1")
    check_seed(config)
    texts = sample(model, tokenizer, prompts, config.tokens, config.temperature, config.top_k, config.seed)
    for prompt, text in zip(config.sample, texts):
        print(printable(f"\n{prompt}{text}"))


# -- the command

def check_flags(config):
    """Raise UserError for a flag that would have no effect, or for a --dtype that does not
    exist."""
    check_choices(config)
    questions = config.tasks or config.multiple_choice or config.probe
    if not config.tasks:
        refuse_idle(config, ("include_path", "num_fewshot"), "without --tasks")
    if not config.tasks and not config.multiple_choice:
        refuse_idle(config, ("limit",), "without --tasks or --multiple-choice")
    if not questions:
        refuse_idle(config, ("batch_tokens",), "without --tasks, --multiple-choice or --probe")
    if not config.multiple_choice and not config.probe:
        refuse_idle(config, ("against",), "without --multiple-choice or --probe")
    if questions and not config.data:
        refuse_idle(config, ("stride", "batch"), "on questions without --data")
    if questions or config.data or config.stride:
        refuse_idle(config, ("windows",), "with --data or --stride, where all windows count, nor on questions")
    if not config.sample:
        refuse_idle(config, ("tokens", "temperature", "top_k", "seed"), "without --sample")


def open_model(config):
    """The model of the command: (GPT, what its file holds besides)."""
    device = pick_device(config.device)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model, about = load(config.checkpoint, device, dtype, config.block_size)
    # CPUs are slow with 16 bits, and round more. Some are fast in bfloat16, but float16 would have to
    # be rounded to it.
    stored = model.embed.weight.dtype
    is_fast = stored == torch.bfloat16 and has_fast_bfloat16(device)
    if config.dtype == "auto" and device == "cpu" and stored.itemsize < 4 and not is_fast:
        model.float()
    return model, about


def print_answers(config, model, tokenizer):
    """Print what --multiple-choice, --probe and --tasks ask for: -> {row of the tables: [bool]}, which
    questions were answered rightly."""
    # Only here: no other command needs them.
    from tasks import probe, questions
    # Read first, so that a bad text is refused before any question is asked.
    text = read_lines(config.data[0]) if config.probe and config.data else None
    print(f"{config.checkpoint}, {dtype_name(model)}:")
    answers = {}
    if config.multiple_choice:
        answers |= questions.print_choices(config, model, tokenizer)
    if config.probe:
        answers |= probe.print_probe(config, model, tokenizer, text)
    if config.tasks:
        questions.print_tasks(config, model, tokenizer)
    return answers


def print_against(config, answers):
    """Let the model of --against answer the same questions, and print the paired differences."""
    from tasks import statistics
    config = replace(config, checkpoint=config.against, tasks=None)
    model, about = open_model(config)
    reference = print_answers(config, model, tokenizer_of(model, about, config.checkpoint))
    statistics.print_pairs(answers, reference, config.checkpoint)


def main(config):
    check_flags(config)
    has_questions = bool(config.tasks or config.multiple_choice or config.probe)
    if has_questions:
        from tasks import questions
        questions.check(config)
    if config.against:
        # A misspelled name is an error now, and not when the first model has answered.
        load(config.against, "meta", block_size=config.block_size)
    model, about = open_model(config)
    tokenizer = tokenizer_of(model, about, config.checkpoint)
    answers = print_answers(config, model, tokenizer) if has_questions else {}
    if config.data or not has_questions:
        print_loss(config, model, tokenizer, about)
    if config.sample:
        print_sample(config, model, tokenizer)
    if config.against:
        # Two models at a time are more than a small machine may hold. A checkpoint's `about` has Adam's
        # moments, which take twice the memory of its model.
        del model, about
        print_against(config, answers)


if __name__ == "__main__":
    run(lambda: main(parse(Eval, verbatim=("sample",))))
