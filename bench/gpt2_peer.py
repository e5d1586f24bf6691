"""A peer to measure against: GPT-2's block as nanoGPT trains it, at our parameter count.

    python -m bench train          # its row in the table

LayerNorm and matrices without biases (nanoGPT's default), learned positions, as many KV heads as query heads, exact
GELU, tied embedding, all logits at once. The oracle is transformers' GPT2LMHeadModel (tests/bench/test_bench.py).
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int
    block_size: int
    d_model: int
    n_head: int
    n_layer: int
    d_ff: int                            # 4 d_model, less what positions cost (`peer_of`)

    def num_params(self):
        C, block = self.d_model, 4 * self.d_model**2 + 2 * self.d_model * self.d_ff + 2 * self.d_model
        return {"total": (self.vocab_size + self.block_size + 1) * C + self.n_layer * block}

    def flops_per_token(self, T, backward=True):
        """By the rules of model.GPTConfig.flops_per_token."""
        block = 4 * self.d_model**2 + 2 * self.d_model * self.d_ff
        forward = 2 * (self.n_layer * block + self.vocab_size * self.d_model) + 4 * T * self.d_model * self.n_layer
        return forward * (3 if backward else 1)

    def removable_params(self):          # nothing here is pruned
        return 0

    def resized(self, widths):
        return self


def peer_of(config):
    """A GPTConfig -> the GPT2Config with its width, layers and context, and its parameters to within half of 8 neurons
    a layer, above C = 512 of 64, as matrix units want it. Widths that differ by layer count as their mean."""
    C, L, tile = config.d_model, config.n_layer, 64 if config.d_model > 512 else 8
    heads = max(n for n in range(1, max(config.n_head) + 1) if C % n == 0)
    bare = GPT2Config(config.vocab_size, config.block_size, C, heads, L, 0)
    left = config.num_params()["total"] - bare.num_params()["total"]
    return dataclasses.replace(bare, d_ff=max(tile, tile * round(left / (2 * C * L) / tile)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.d_model, bias=False) for _ in range(2))
        self.qkv, self.o = nn.Linear(c.d_model, 3 * c.d_model, bias=False), nn.Linear(c.d_model, c.d_model, bias=False)
        self.up, self.down = nn.Linear(c.d_model, c.d_ff, bias=False), nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):                                             # (B, T, C)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)   # (B, H, T, D)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT2(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed, self.positions = (nn.Embedding(n, config.d_model) for n in (config.vocab_size, config.block_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        assert sum(p.numel() for p in self.parameters()) == config.num_params()["total"]

    def forward(self, idx):
        x = self.embed(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)
