"""A peer's cut, measured as ours: Torch-Pruning's own example for language models, at our budget.

    python -m methods.torch_pruning_peer smollm2 --keep 0.8 --out runs/torch-pruning-0.8
    python eval.py runs/torch-pruning-0.8 --block-size 256 --windows 8

experiments/smollm2.py fetches the folder smollm2. The cut is that of examples/LLMs/prune_llm.py of
Torch-Pruning 1.6.1 (DepGraph, arXiv 2301.12900): norms of weights, no data, no gradients, and one
ratio for d_model, neurons and the query heads of each KV head. The query heads are rounded
generously: any ratio above 0 takes one query head of every KV head, in SmolLM2 a third of them.

Three things are ours: a search for the ratio, float32, and settings that make transformers 5
traceable. The budget is that of prune.py, attention and FFN; the embedding shrinks with d_model, so
the whole model gets smaller. The result is one of our GPTs. Needs torch-pruning and transformers.
Not here: families other than Llama; training after the cut.
"""
import dataclasses
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
import data
from common import UserError, parse, run
from formats import huggingface
from model import from_weights, shapes_of


@dataclass(frozen=True)
class Peer:
    folder: str                   # a Llama as a Hugging Face folder or hub id
    keep: float = 0.8             # fraction of the attention and FFN parameters to keep, at most
    out: str | None = None        # folder for the cut model; default: runs/torch-pruning-<keep>


def open_llama(folder, **changes):
    """The folder as transformers' model in float32. With `changes` of its config, a model so
    changed with random weights. Without cache and fused attention the results are the same, but the
    empty cache of transformers 5 hangs the trace, and its fused attention hides the KV groups."""
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder, use_cache=False,
                                                     attn_implementation="eager", **changes)
    if changes:
        return transformers.AutoModelForCausalLM.from_config(config).float()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float()


def prune(model, ratio):
    """The example's call on transformers' `model`, in place, and its repair of the numbers that the
    class holds. Returns the seconds of the cut."""
    import torch_pruning as tp
    config = model.config
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {}
    for attention in attentions:
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            heads[linear] = linear.out_features // config.head_dim
    start = time.perf_counter()
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    # The defaults of the channel groups are one dictionary for all calls, so each call gets its
    # own.
    pruner = tp.pruner.BasePruner(
        model, torch.arange(4)[None], importance, pruning_ratio=ratio, head_pruning_ratio=ratio,
        prune_num_heads=True, prune_head_dims=False, num_heads=heads,
        output_transform=lambda out: out.logits, ignored_layers=[model.lm_head], round_to=4,
        in_channel_groups={}, out_channel_groups={})
    pruner.step()
    config.hidden_size = model.lm_head.in_features
    config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    config.num_attention_heads = attentions[0].q_proj.out_features // config.head_dim
    config.num_key_value_heads = attentions[0].k_proj.out_features // config.head_dim
    for attention in attentions:
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    return time.perf_counter() - start


def removable_params(folder, ratio):
    """Attention and FFN parameters of one layer cut at this ratio. All layers get the same widths,
    so one layer of random weights tells."""
    model = open_llama(folder, num_hidden_layers=1, vocab_size=8, pad_token_id=None)
    prune(model, ratio)
    return huggingface.read_config(model.config.to_dict(), folder).removable_params()


def find_ratio(folder, keep):
    """The ratio that just meets `keep`, by bisection. Raises UserError if no ratio does."""
    low = 0.0
    high = 1.0
    budget = keep * removable_params(folder, 0.0)
    for _ in range(14):
        middle = (low + high) / 2
        if removable_params(folder, middle) <= budget:
            high = middle
        else:
            low = middle
    if high == 1:
        raise UserError(f"Torch-Pruning cannot cut {folder} down to --keep {keep}; keep more")
    return high


def cut(folder, keep, block_size=None):
    """A Llama's Hugging Face `folder` with at most `keep` of its attention and FFN parameters.

    Returns (GPT in float32, seconds of one `prune`, the ratio). `block_size`: the GPT's context;
    default: the folder's. Raises UserError if a package is missing, for another family, and if no
    ratio cuts enough."""
    if not (find_spec("torch_pruning") and find_spec("transformers")):
        raise UserError("methods/torch_pruning_peer.py needs two packages more: pip install "
                        "torch-pruning transformers")
    _, about = checkpoint.load(folder, "meta")
    if about.get("huggingface", {}).get("model_type") != "llama" or not 0 < keep < 1:
        raise UserError(f"{folder} must be a Hugging Face folder of model_type 'llama', --keep "
                        f"{keep} between 0 and 1")
    ratio = find_ratio(folder, keep)
    llama = open_llama(folder)
    seconds = prune(llama, ratio)
    config = huggingface.read_config(llama.config.to_dict(), folder)
    if block_size is not None:
        config = dataclasses.replace(config, block_size=block_size)
    weights = {}
    for name in shapes_of(config):
        weights[name] = llama.get_parameter(huggingface.their_name(name))
    model = from_weights(config, weights)
    check_logits(model, llama)
    return model, seconds, ratio


def check_logits(model, llama):
    """Assert that our model computes what transformers' model does."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=generator)
    expected = llama(ids).logits
    tolerance = 1e-4 * expected.abs().max()
    assert (model(ids) - expected).abs().max() <= tolerance, "other logits than transformers"


def main(settings):
    out = Path(settings.out or f"runs/torch-pruning-{settings.keep:g}")
    checkpoint.refuse_existing(out)
    model, seconds, ratio = cut(settings.folder, settings.keep)
    _, about = checkpoint.load(settings.folder, "meta")
    tokenizer = checkpoint.tokenizer_of(model, about, settings.folder)
    # eval.py measures the hold-out of this text.
    corpus = data.load("stdlib", tokenizer)
    made = {"data": "stdlib", "fingerprint": corpus.fingerprint, "cut_from": settings.folder}
    checkpoint.save_made(out, model, tokenizer, None, made)
    config = model.config
    print(f"ratio {ratio:.4f}, {seconds:.2f} s: {config.num_params()['total']:,} parameters, "
          f"{config.removable_params():,} in attention and FFN; d_model {config.d_model}, "
          f"{config.n_head[0]} query heads, {config.n_kv_head[0]} KV heads, {config.d_ff[0]} neurons "
          f"in each layer; saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Peer)))
