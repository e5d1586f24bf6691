"""A peer to measure against: GPT-2's block as nanoGPT trains it, at our number of parameters.

    python -m bench train          # its row in the table

The block has LayerNorm and matrices without biases (nanoGPT's default), as many KV heads as query
heads, and an exact GELU. Positions are learned, the embedding is tied, and all logits are formed at
once. The test compares the model with transformers' GPT2LMHeadModel (tests/bench/test_bench.py).
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
        C = self.d_model
        block = 4 * C**2 + 2 * C * self.d_ff + 2 * C
        return {"total": (self.vocab_size + self.block_size + 1) * C + self.n_layer * block}

    def flops_per_token(self, T, backward=True):
        """By the rules of model.GPTConfig.flops_per_token."""
        block = 4 * self.d_model**2 + 2 * self.d_model * self.d_ff
        matrices = self.n_layer * block + self.vocab_size * self.d_model
        attention = self.n_layer * 2 * T * self.d_model
        forward = 2 * (matrices + attention)
        return 3 * forward if backward else forward

    def resized(self, widths):
        """The loop asks for the config of live units. No unit of this model is ever cut."""
        return self


def peer_of(config):
    """The GPT2Config with the width, layers, context and parameters of a GPTConfig. The FFN's width
    is rounded to 8 neurons, above d_model = 512 to 64, as matrix units need it. Widths that differ
    by layer count as their mean."""
    C = config.d_model
    tile = 64 if C > 512 else 8
    heads = max(n for n in range(1, max(config.n_head) + 1) if C % n == 0)
    without_ffn = GPT2Config(config.vocab_size, config.block_size, C, heads, config.n_layer, d_ff=0)
    params = config.num_params()["total"] - without_ffn.num_params()["total"]
    d_ff = params / (2 * C * config.n_layer)
    return dataclasses.replace(without_ffn, d_ff=max(tile, tile * round(d_ff / tile)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.d_model
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.o = nn.Linear(C, C, bias=False)
        self.ln_2 = nn.LayerNorm(C, bias=False)
        self.up = nn.Linear(C, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, C, bias=False)

    def heads(self, x):
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(self, x):                                            # (B, T, C)
        q, k, v = [self.heads(part) for part in self.qkv(self.ln_1(x)).chunk(3, -1)]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.block_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        # nanoGPT also scales what writes into the residual stream; speed does not depend on it.
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        assert sum(p.numel() for p in self.parameters()) == config.num_params()["total"]

    def forward(self, idx):
        """Token ids (B, T) -> logits (B, T, V)."""
        x = self.embed(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)
