"""Text that a model writes itself: what a cut of it is calibrated on, or what a smaller model learns from it.

    python prune.py --init MODEL --data self                    # from the model's own beginning of a text
    python prune.py --init MODEL --data self --prompts FILE     # answers to prompts
    python -m methods.self_text MODEL --tokens 100000 --out own.jsonl           # rows, to be read as any others
    python train.py --plan recover --init CUT --teacher MODEL --data own.jsonl    # trains a cut model back
    python -m pytest tests/methods/test_self_text.py

A cut keeps what its calibration text uses. RESP (arXiv 2512.02185) calibrates on the model's own
answers, leaves the prompts out of the loss, and lets the model answer anew at every step of an
iterative cut. All three are done here. For training, the text is the whole model's (Self-Data, arXiv
2410.09982), which is why train.py reads rows and does not write them.

Our choices: the temperature is 1 and no token is ruled out, so that the text has the model's own
distribution. Then the loss that a cut adds on held-out text of this kind estimates the KL divergence
between the whole model and the cut one. Without prompts a text begins with the token that opens a
document and ends with the window: behind an end-of-text token the model goes on to the next document,
or to the next turn of a chat, as in the text that it was trained on. With prompts a text ends with
its end-of-text token, and a model with a chat template gets each prompt as a user's message. Not done
here: choosing good or difficult texts (SSGR, arXiv 2511.18864).
"""
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import data
from common import UserError, has_fast_bfloat16, parse, pick_device, progress, run, write_atomic

# Texts at a time. SmolLM2-135M in bfloat16 on one core with AVX512-BF16 writes 211, 245 and 323
# tokens a second with 16, 32 and 64 of them.
BATCH = 64
# One window is held out for so many that are calibrated on.
HOLD_OUT = 4
FORMAT = "nanoprune self 1"


# -- prompts

def prefix_of(tokenizer):
    """The token that opens a document."""
    return tokenizer.eot if tokenizer.bos is None else tokenizer.bos


def read_prompts(path):
    """The prompts of a file: the lines of a text that are not blank, or the field "prompt" of the rows
    of a .jsonl file. Raises UserError if there are none, or if a row has no such text."""
    if Path(path).suffix == ".jsonl":
        rows = [(number, row.get("prompt") if isinstance(row, dict) else None)
                for number, row in data.file_rows(Path(path), "prompt")]
    else:
        rows = [(number, line) for number, line in enumerate(data.read_text(path).splitlines(), 1) if line.strip()]
    for number, prompt in rows:
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'{path}:{number} has no prompt; a line is {{"prompt": "Say hello."}}')
    if not rows:
        raise UserError(f"{path} holds no prompts: give a file with a prompt a line")
    return [prompt for _, prompt in rows]


def prompt_ids(prompt, tokenizer):
    """A prompt as a tuple of ids: as a user says it, if the tokenizer has a chat template."""
    template = tokenizer.chat_template
    if template is None:
        return (*tokenizer.opening, *tokenizer.encode(prompt).tolist())
    text, _ = template.render(messages_of(prompt), add_generation_prompt=True)
    return tuple(tokenizer.encode(text, special=True).tolist())


def messages_of(prompt):
    return [{"role": "user", "content": prompt}]


def encode_prompts(path, tokenizer, T):
    """The prompts of a file: {ids: prompt}. Raises UserError for a prompt that leaves less than half of
    a text of T tokens to its answer."""
    prompts = {}
    for number, prompt in enumerate(read_prompts(path), 1):
        ids = prompt_ids(prompt, tokenizer)
        if not 0 < len(ids) <= T // 2:
            raise UserError(f"prompt {number} of {path} has {len(ids)} tokens, and must have 1 to {T // 2}, half of a "
                            f"window of {T}; shorten it, or give a larger --block-size")
        prompts[ids] = prompt
    return prompts


# -- texts

def write(model, tokenizer, tokens, T, seed, prompts=None):
    """Texts that the model writes, of at least so many tokens in all: [(prompt ids, ids)], each text
    with at most T tokens. `prompts` are tuples of ids; they are answered in an order that the seed
    shuffles, again and again. Without prompts a text begins with the token that opens a document."""
    is_answer = prompts is not None
    prompts = list(prompts or [(prefix_of(tokenizer),)])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    end = tokenizer.eot if is_answer else None
    texts = []
    written = 0
    with progress(range(tokens), "write") as bar:
        while written < tokens:
            # As many texts as are expected to do, in batches of about the same size.
            length = written / len(texts) if texts else T
            missing = math.ceil((tokens - written) / length)
            rows = math.ceil(missing / math.ceil(missing / BATCH))
            first = len(texts)
            batch = [prompts[order[i % len(order)]] for i in range(first, first + rows)]
            for prompt, ids in zip(batch, continue_all(model, batch, T, end, generator, bar)):
                # Rows of an embedding beyond the vocabulary stand for no text.
                ids = [i for i in ids if i < tokenizer.vocab_size]
                texts.append((prompt, ids))
                written += len(prompt) + len(ids)
    return texts


def continue_all(model, prompts, T, end, generator, bar):
    """Continue the prompts in one batch, each up to the token `end` or to T tokens with its prompt:
    [ids]. With `end` None all get T tokens."""
    device = model.embed.weight.device
    lengths = [len(prompt) for prompt in prompts]
    idx = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def done(continued):
        bar.update(int((~ended).sum()))
        if end is not None:
            ended.logical_or_(continued[:, -1] == end)
        return bool(ended.all())

    continued = model.generate(idx.to(device), T - min(lengths), 1.0, None, generator, done, lengths)
    answers = []
    for length, ids in zip(lengths, continued[:, idx.size(1):].tolist()):
        ids = ids[:T - length]
        if end in ids:
            ids = ids[:ids.index(end) + 1]
        answers.append(ids)
    return answers


def packed(texts, tokenizer, tokens):
    """The texts one behind the other, (tokens + 1,) uint32; prompts are marked as context that no loss
    counts."""
    parts = []
    for prompt, ids in texts:
        parts.append(np.array(prompt, np.uint32) | np.uint32(data.CONTEXT_ONLY))
        parts.append(np.array(ids, np.uint32))
    # A window's last target is the first token of the next text.
    parts.append(np.array([prefix_of(tokenizer) | data.CONTEXT_ONLY], np.uint32))
    return np.concatenate(parts)[:tokens + 1]


# -- as a corpus

def load(model, tokenizer, windows, T, seed, prompts=None, cache="data_cache"):
    """So many windows of T tokens that the model writes, and others that are held out: data.Corpus.

    `prompts`: the name of a file. The same model, seed and prompts have the same text, which is kept
    in the folder `cache` (None: nowhere). Raises UserError for prompts that cannot be read."""
    if prompts is not None:
        prompts = encode_prompts(prompts, tokenizer, T)
    held_out = max(1, windows // HOLD_OUT)
    tokens = (windows + held_out) * T
    key = [FORMAT, checkpoint.fingerprint(model), tokenizer.name, tokenizer.vocab_size, tokenizer.eot, tokenizer.bos,
           tokens, T, seed, None if prompts is None else list(prompts), BATCH]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = None if cache is None else Path(cache).expanduser() / f"self-{digest}.bin"
    if path and path.exists():
        text = np.fromfile(path, "<u4")
        if len(text) != tokens + 1:
            raise UserError(f"{path} has {len(text):,} tokens and should have {tokens + 1:,}: delete it and run again")
    else:
        text = written_now(model, tokenizer, tokens, T, seed, prompts)
        if path:
            write_atomic(path, text.astype("<u4").tofile)
    border = windows * T
    train = data.Shards([text[:border + 1]])
    val = data.Shards([text[border:]])
    return data.Corpus(train, val, tokenizer, digest, (windows, held_out), None, "self")


def written_now(model, tokenizer, tokens, T, seed, prompts):
    """The text of `load`, (tokens + 1,); says how fast it was written."""
    begin = time.perf_counter()
    text = packed(write(model, tokenizer, tokens, T, seed, prompts), tokenizer, tokens)
    seconds = time.perf_counter() - begin
    print(f"the model wrote {tokens:,} tokens in {seconds:.1f} seconds, {tokens / seconds:,.0f} a second")
    return text


# -- as a file of rows

@dataclass(frozen=True)
class Write:
    model: str                       # a checkpoint, run folder, Hugging Face folder or hub id
    out: str = "own.jsonl"           # file of rows {"text"}; with --prompts {"prompt", "completion"} or chats
    tokens: int = 2**17              # at least so many, prompts included
    prompts: str | None = None       # a prompt a line, or .jsonl with a field "prompt"
    block_size: int | None = None    # tokens of a text; default: the model's context, at most 512
    seed: int = 0
    device: str = "auto"             # auto, cpu, cuda, mps
    # auto: bfloat16 where it is faster
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def rows_of(texts, tokenizer, prompts):
    """Texts as the rows of a file; `prompts` is {ids: prompt} or None. Special tokens are left out, as
    no document can spell one, and texts without a prompt are divided there. An answer that has no end
    is left out of chats, as the template would put one there."""
    special = {tokenizer.eot, *tokenizer.specials.values()}
    rows = []
    for prompt, ids in texts:
        if prompts is None:
            rows += [{"text": tokenizer.decode(document)} for document in divided(ids, special)]
            continue
        answer = tokenizer.decode(i for i in ids if i not in special)
        if answer and tokenizer.chat_template is None:
            rows.append({"prompt": prompts[prompt], "completion": answer})
        elif answer and ids[-1] == tokenizer.eot:
            rows.append({"messages": [*messages_of(prompts[prompt]), {"role": "assistant", "content": answer}]})
    return rows


def divided(ids, special):
    """The stretches of ids between special tokens, without empty ones: [ids]."""
    documents = [[]]
    for i in ids:
        if i in special:
            documents.append([])
        else:
            documents[-1].append(i)
    return [document for document in documents if document]


def main(settings):
    if Path(settings.out).exists():
        raise UserError(f"{settings.out} is there already; give another --out or delete it")
    if settings.tokens < 1 or not 0 <= settings.seed < 2**63:
        raise UserError(f"--tokens {settings.tokens} must be at least 1, --seed {settings.seed} between 0 and "
                        f"{2**63 - 1}")
    device = pick_device(settings.device)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    model, about = checkpoint.load(settings.model, device, getattr(torch, dtype))
    tokenizer = checkpoint.tokenizer_of(model, about, settings.model)
    T = settings.block_size or min(512, model.config.block_size)
    if not 2 <= T <= model.config.block_size:
        raise UserError(f"--block-size {T} must be between 2 and the model's context of {model.config.block_size}")
    prompts = None if settings.prompts is None else encode_prompts(settings.prompts, tokenizer, T)
    begin = time.perf_counter()
    texts = write(model, tokenizer, settings.tokens, T, settings.seed, prompts)
    rows = rows_of(texts, tokenizer, prompts)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(settings.out, lambda file: file.write(lines.encode()))
    seconds = time.perf_counter() - begin
    written = sum(len(ids) for _, ids in texts)
    print(f"{len(rows):,} rows in {settings.out}, {written / seconds:,.0f} tokens a second")


if __name__ == "__main__":
    run(main, parse(Write))
