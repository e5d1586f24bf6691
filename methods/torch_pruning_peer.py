"""A peer's cut, measured as ours: Torch-Pruning's own example for language models, at our budget, as one of our GPTs.

    python -m methods.torch_pruning_peer smollm2 --keep 0.8 --out runs/torch-pruning-0.8    # smollm2: see experiments/smollm2.py
    python eval.py runs/torch-pruning-0.8 --block-size 256 --windows 8

As in examples/LLMs/prune_llm.py of Torch-Pruning 1.6.1 (DepGraph, arXiv 2301.12900): norms of weights, no data, no
gradients; one ratio for d_model, neurons and the query heads of each KV head. These it rounds generously: any ratio
above 0 takes one query head of every KV head, in SmolLM2 a third of them. Ours: a search for the ratio, float32,
settings that make transformers 5 traceable. The budget is prune.py's, attention and FFN; the embedding shrinks with
d_model, so the whole gets smaller. Needs torch-pruning, transformers. Not here: families but Llama; training after it.
"""
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
import data
from common import UserError, parse, run
from formats import huggingface
from model import GPT


@dataclass(frozen=True)
class Peer:
    folder: str                   # a Llama as a Hugging Face folder or hub id
    keep: float = 0.8             # fraction of the attention and FFN parameters to keep, at most
    out: str | None = None        # folder for the cut model; default: runs/torch-pruning-<keep>


def open_theirs(folder, **config):
    """The folder as transformers' model in float32; with `config`, so changed and with random weights. Same results
    without cache and kernel, but transformers 5's empty cache hangs the trace, and its kernel hides the KV groups."""
    import transformers
    c = transformers.AutoConfig.from_pretrained(folder, use_cache=False, attn_implementation="eager", **config)
    auto = transformers.AutoModelForCausalLM
    return (auto.from_config(c) if config else auto.from_pretrained(folder, config=c)).float()


def prune(model, ratio):
    """The example's call on transformers' `model`, in place, and its repair of the class's numbers -> seconds."""
    import torch_pruning as tp
    c, layers = model.config, [layer.self_attn for layer in model.model.layers]
    heads = {p: p.out_features // c.head_dim for a in layers for p in (a.q_proj, a.k_proj, a.v_proj)}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model, torch.arange(4)[None], tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=ratio, head_pruning_ratio=ratio, prune_num_heads=True, prune_head_dims=False, num_heads=heads,
        output_transform=lambda out: out.logits, ignored_layers=[model.lm_head], round_to=4,
        in_channel_groups={}, out_channel_groups={})              # their defaults are one dict for all calls
    pruner.step()
    c.hidden_size, c.intermediate_size = model.lm_head.in_features, model.model.layers[0].mlp.gate_proj.out_features
    H, K = (p.out_features // c.head_dim for p in (layers[0].q_proj, layers[0].k_proj))
    c.num_attention_heads, c.num_key_value_heads = H, K
    for attention in layers:
        attention.num_key_value_groups = H // K
    return time.perf_counter() - start


def find_ratio(folder, keep):
    """The ratio that just meets `keep`: bisection with one layer of random weights, as all get the same widths."""
    def params(ratio):
        model = open_theirs(folder, num_hidden_layers=1, vocab_size=8, pad_token_id=None)
        prune(model, ratio)
        return huggingface.read_config(model.config.to_dict(), folder).removable_params()
    low, high, budget = 0.0, 1.0, keep * params(0.0)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if params(middle) <= budget else (middle, high)
    if high == 1:
        raise UserError(f"Torch-Pruning cannot cut {folder} down to --keep {keep}; keep more")
    return high


def cut(folder, keep):
    """A Llama's Hugging Face `folder` with at most `keep` of its attention and FFN parameters -> (GPT in float32,
    seconds of one `prune`, the ratio). UserError: a package is missing, another family, nothing small enough."""
    if not (find_spec("torch_pruning") and find_spec("transformers")):
        raise UserError("methods/torch_pruning_peer.py needs two packages more: pip install torch-pruning transformers")
    about = checkpoint.load(folder, "meta")[1]
    if about.get("huggingface", {}).get("model_type") != "llama" or not 0 < keep < 1:
        raise UserError(f"{folder} must be a Hugging Face folder of model_type 'llama', --keep {keep} between 0 and 1")
    ratio, theirs = find_ratio(folder, keep), open_theirs(folder)
    seconds = prune(theirs, ratio)
    with torch.device("meta"):
        model = GPT(huggingface.read_config(theirs.config.to_dict(), folder))
    model.load_state_dict({n: theirs.get_parameter(huggingface.their_name(n)) for n in model.state_dict()}, assign=True)
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-4 * expected.abs().max(), "other logits than theirs"
    return model, seconds, ratio


def main(config):
    out = Path(config.out or f"runs/torch-pruning-{config.keep:g}")
    if out.exists():
        raise UserError(f"{out} is there already; give another --out or delete it")
    model, seconds, ratio = cut(config.folder, config.keep)
    tokenizer, c = checkpoint.tokenizer_of(checkpoint.load(config.folder, "meta")[1], config.folder), model.config
    checkpoint.save(out / "ckpt_00000000.pt", model, step=0, tokenizer_files=tokenizer.files, run={
        "tokenizer": tokenizer.name, "data": "stdlib", "fingerprint": data.load("stdlib", tokenizer).fingerprint,
        "cut_from": config.folder})              # eval.py measures that hold-out
    print(f"ratio {ratio:.4f}, {seconds:.2f} s: {c.num_params()['total']:,} parameters, {c.removable_params():,} "
          f"in attention and FFN; d_model {c.d_model}, {c.n_head[0]} query heads, {c.n_kv_head[0]} KV heads, "
          f"{c.d_ff[0]} neurons in each layer; saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Peer)))
