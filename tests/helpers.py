"""What several test files share: models, texts and configurations, and oracles written without the code under test."""
import ast

import torch
import torch.nn.functional as F

import prune
from methods import sparse
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=13, block_size=8, d_model=12, head_dim=4)
CONFIGS = {
    "plain": GPTConfig(**SHAPE, n_head=(2, 3), n_kv_head=(2, 3), d_ff=(5, 7)),
    "gqa": GPTConfig(**SHAPE, n_head=(4, 9), n_kv_head=(2, 3), d_ff=(5, 7)),
    "gqa+bias": GPTConfig(**SHAPE, n_head=(4, 9), n_kv_head=(2, 3), d_ff=(5, 7), qkv_bias=True),
    "qk norm": GPTConfig(**SHAPE, n_head=(2, 3), n_kv_head=(2, 3), d_ff=(5, 7), qk_norm=True),
    "all": GPTConfig(**SHAPE, n_head=(6, 3, 4), n_kv_head=(3, 3, 2), d_ff=(6, 3, 8), qkv_bias=True, qk_norm=True,
                     tie_embeddings=False)}
WITH_HOLES = {**CONFIGS, "holes": GPTConfig(**SHAPE, n_head=(4, 0, 2), n_kv_head=(2, 0, 2), d_ff=(5, 6, 0))}


def new(config, dtype=torch.float64, seed=0, device="cpu"):
    """A model and its AdamW, built as train.py does. Weights far from 0 and gains far from 1."""
    torch.manual_seed(seed)
    model = GPT(config).to(device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(5 * p if p.dim() == 2 else p + 0.2 * torch.randn_like(p))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    return model, torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                    lr=5e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batch(config, step, rank=0):
    tokens = torch.randint(config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1000 * rank + step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def entries(config, layer, kind, unit):
    """[(parameter name, index of the unit's entries in it)]"""
    if kind == "ffn":
        ffn = f"blocks.{layer}.ffn."
        return [(ffn + "gate.weight", [unit]), (ffn + "up.weight", [unit]),
                (ffn + "down.weight", (slice(None), [unit]))]
    D, H, K, attn = config.head_dim, config.n_head[layer], config.n_kv_head[layer], f"blocks.{layer}.attn."
    own = [unit * D + d for d in range(D)]
    served = [h * D + d for h in range(H) if h // (H // K) == unit for d in range(D)]      # Hugging Face's convention
    rows = (("q", served), ("k", own), ("v", own))
    return [(attn + "o.weight", (slice(None), served))] + [
        (f"{attn}{x}.{part}", index) for x, index in rows for part in ("weight", "bias")[:1 + config.qkv_bias]]


def channels_of_unit(config, layer, kind, unit):
    """The unit's columns of the matrix that reads its output, `o` or `down`, by `entries`."""
    return next(index[1] for name, index in entries(config, layer, kind, unit) if isinstance(index, tuple))


def without(config, layer, kind, *units):
    """All units alive but exactly these."""
    return prune.everything(config) | {(layer, kind): torch.tensor(
        [i for i in range(config.widths()[layer, kind]) if i not in units], dtype=torch.long)}


FIELDS = {"grad", "grad_sq", "sensitivity", "mean", "square", "position", "size", "gram", "cosine", "channel"}


def text(config, n=3):
    """n batches of random tokens, (4, 8) each."""
    return [batch(config, step) for step in range(n)]


def inputs(model, batches):
    """{parameter name: (windows, T, n)} float64: what comes into each matrix and out of each norm, in plain passes."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        is_norm = name.endswith("norm")
        hooks.append(module.register_forward_hook(lambda _, args, out, name=name, is_norm=is_norm: found.setdefault(
            f"{name}.weight", []).append((out if is_norm else args[0]).detach())))
    for x, _ in batches:
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items() if parts[0].is_floating_point()}


def gradients(model, x, y):
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss_of(model, x, y), parameters)))


def close(found, expected, rtol=1e-6, atol=1e-9):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


def fingerprint(model):
    """What `untouched` compares: parameters and their values, modules."""
    return [(name, p, p.detach().clone()) for name, p in model.named_parameters()], list(model.named_modules())


def untouched(model, was):
    """Assert that the model is the same objects with the same values as when `was = fingerprint(model)` was taken."""
    (parameters, modules), (now, modules_now) = was, fingerprint(model)
    assert [(n, id(m)) for n, m in modules] == [(n, id(m)) for n, m in modules_now]
    for (name, p, value), (name_now, p_now, value_now) in zip(parameters, now, strict=True):
        assert name == name_now and p is p_now and torch.equal(value, value_now)


STRUCTURES = [("ffn",), ("kv",), ("ffn", "kv")]
EQUAL = GPTConfig(**SHAPE, n_head=(8,) * 8, n_kv_head=(4,) * 8, d_ff=(40,) * 8)


def price(config, budget):
    """What all units cost, from the model's totals."""
    none = config.resized(dict.fromkeys(config.widths(), 0))
    return {"params": lambda c: sum(c.num_params()[group] for group in ("attention", "ffn")),
            "flops": lambda c: c.flops_per_token(c.block_size, False) - none.flops_per_token(c.block_size, False),
            "kv_bytes": GPTConfig.kv_bytes_per_token}[budget](config)


def random_config(rng, equal=False):
    """Uneven layers, some without attention or FFN; or all of the same shape."""
    L, g = rng.randint(1, 6), rng.randint(1, 3)
    kv, d_ff = ([rng.randint(0, 6) for _ in range(L)], [rng.randint(0, 30) for _ in range(L)])
    kv, d_ff = ([rng.randint(1, 6)] * L, [rng.randint(1, 30)] * L) if equal else (kv, [max(1, d_ff[0]), *d_ff[1:]])
    return GPTConfig(**SHAPE, n_head=[g * k for k in kv], n_kv_head=kv, d_ff=d_ff, qkv_bias=rng.random() < .5)


def random_scores(config, seed, ties=False):
    g = torch.Generator().manual_seed(seed)
    scores = {key: torch.rand(n, generator=g, dtype=torch.float64) for key, n in config.widths().items()}
    return {key: (s * 8).round() for key, s in scores.items()} if ties else scores


def imports(file):
    """Dotted names of all modules that a file imports, anywhere in it; of `from formats import tokenizer` both."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def masks_of(model, pattern, norms=None):
    """Which weights magnitude keeps, or with the norms of all inputs {name: (in,)} Wanda: {name: (out, in)}."""
    score = sparse.magnitude if norms is None else sparse.wanda
    masks = {}
    for name, p in sparse.matrices(model):
        square = None if norms is None else norms[name].to(p).square()
        _, masks[name] = score(p.detach(), sparse.Inputs(None, square, None), pattern)
    return masks
