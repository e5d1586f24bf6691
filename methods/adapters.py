"""Adapters: a frozen matrix is trained through two of low rank, which in the end become part of it.

    python -m methods.lora --init CUT --data texts/brown.jsonl --steps 300 --out runs/back
    python -m pytest tests/methods/test_lora.py

LoRA (arXiv 2106.09685) freezes each matrix W (out, in) of the blocks and trains two small ones beside it:

    y = W x + α/r · B A x        with A (r, in) drawn and B (out, r) zero at first

In the end W + α/r · B A takes the place of W (`merge`), so that the result is a plain GPT. The frozen
matrices take no gradient at all: Adam's moments, and the file of a killed run (`save`), are those of a
few per cent of the parameters. Not here: training (methods/lora.py), cutting on the way
(methods/loraprune.py).
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from common import UserError, first_line, read_pickled_tensors
from formats.pt import digest_of
from methods import loraprune
from model import from_weights

# What a killed run leaves.
UNFINISHED = "adapters.pt"


# -- in the model

class Adapted(nn.Module):
    """A linear layer that is frozen and trained through two matrices of rank r: (..., in) -> (..., out).
    Its weight and bias keep their names."""
    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        # On the CPU, so that the same seed draws the same numbers for every device.
        uniform = 2 * torch.rand(rank, linear.in_features, generator=generator) - 1
        self.A = nn.Parameter(uniform.to(self.weight) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        # B (A x), where W takes no gradient, costs less than the gradient of all of (W + B A) x.
        low = self.scale * F.linear(x, self.A)                          # (..., r)
        out = F.linear(x, self.weight, self.bias)
        # The product is added while it is computed, in one pass over the output.
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.B.T).view_as(out)

    def merged(self):
        """W + α/r · B A, (out, in)."""
        return self.weight + self.scale * (self.B @ self.A)


def adapt(model, rank=8, alpha=16, seed=0):
    """Freeze the model, in place, and put adapters beside all matrices of its blocks. Returns the
    parameters that train."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for part in block.children():
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Adapted(linear, rank, alpha, generator))
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def merge(model):
    """A plain GPT with the same logits, up to rounding. The adapted model stays as it is."""
    weights = {name: p.detach() for name, p in model.named_parameters() if not name.endswith((".A", ".B"))}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            weights[f"{name}.weight"] = module.merged()
    return from_weights(model.config, weights)


# -- on disk: a run that was killed

def adapters_of(model):
    """The parameters that train: {name: parameter}."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(path, identity, state):
    """Write what training has changed of a checkpoint.State: the adapters, Adam's moments, the living units,
    the averages."""
    adapters = {name: p.detach() for name, p in adapters_of(state.model).items()}
    content = {"identity": identity, "step": state.step, "adapters": adapters,
               "optimizer": state.optimizer.state_dict(), "alive": checkpoint.listed(state.alive),
               "averages": checkpoint.listed(state.averages)}
    checkpoint.write(path, {"content": content, "content_digest": digest_of(content)})


@torch.no_grad()
def resume(path, identity, state):
    """Put what `save` wrote into the State of a run that begins, in place. Raises UserError for a damaged
    file, and for one of other settings, another model or another text."""
    file = read_pickled_tensors(path, "delete it to begin anew")
    saved = file.get("content") if isinstance(file, dict) else None
    if not isinstance(saved, dict) or file.get("content_digest") != digest_of(saved):
        raise UserError(f"{path} is damaged; delete it to begin anew")
    try:
        recorded = saved["identity"]
        differ = [name for name, value in identity.items() if recorded.get(name) != value]
        if differ:
            raise UserError(f"{path} is of a run with another {', '.join(differ)}; give another --out, or delete it "
                            "to begin anew")
        adapters = adapters_of(state.model)
        if saved["adapters"].keys() != adapters.keys():
            raise ValueError("its adapters are those of another model")
        for name, p in adapters.items():
            p.copy_(saved["adapters"][name])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.alive = checkpoint.by_key(saved["alive"])
        state.averages = checkpoint.by_key(saved["averages"], state.model.embed.weight.device)
        state.step = saved["step"]
        loraprune.zero_(state.model, state.optimizer, state.alive)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise UserError(f"{path} does not hold the state of a run ({first_line(problem)}); delete it to begin "
                        "anew") from None
