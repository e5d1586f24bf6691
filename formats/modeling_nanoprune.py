"""A pruned model in transformers (and its DeciLM config in vLLM): Llama's decoder with another width in every layer.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

export.py copies this file into the folders it writes. It builds transformers' own Llama or Qwen 3 layers, then replaces
their projections by ones of the layer's widths (`n_head`, `n_kv_head`, `d_ff` in config.json; 0: the sub-block is
absent), so attention kernels, masks, caches and generation are transformers' (4.51 or later; a static cache needs 4.56).
"""
import copy

import torch
from torch import nn
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class NanopruneConfig(LlamaConfig):
    model_type = "nanoprune"

    def __init__(self, n_head=(), n_kv_head=(), d_ff=(), qkv_bias=False, qk_norm=False, **kwargs):
        self.n_head, self.n_kv_head, self.d_ff = list(n_head), list(n_kv_head), list(d_ff)
        self.qkv_bias, self.qk_norm = qkv_bias, qk_norm
        super().__init__(**kwargs)
        self.use_sliding_window, self.sliding_window = False, None                     # Qwen 3's layers ask for these


class Block(dict):
    """A JSON object whose keys are attributes too, as vLLM reads block_configs."""
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(NanopruneConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), num_attention_heads=1, hidden_size=1, **kwargs):
        self.block_configs = [Block({kind: Block(part) for kind, part in block.items()}) for block in block_configs]
        attention, ffn = ([block[kind] for block in self.block_configs] for kind in ("attention", "ffn"))
        heads = [0 if a.no_op else num_attention_heads for a in attention]
        kwargs |= {"n_head": heads, "n_kv_head": [h and h // a.n_heads_in_group for h, a in zip(heads, attention)],
                   "d_ff": [0 if f.no_op else f["intermediate_size"] if "intermediate_size" in f else
                            -(-int(2 * f.ffn_mult * hidden_size / 3) // 256) * 256 for f in ffn]}
        super().__init__(num_attention_heads=num_attention_heads, hidden_size=hidden_size, **kwargs)


class NoAttention(nn.Module):
    """Stands in for an absent attention. It adds nothing to the residual stream."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **arguments):
        # transformers takes positions, masks and padding from the length of the first layer's cache. So an absent
        # attention caches one unused value per token; an empty tensor would count as length 0. The argument is found by
        # its type, because its name changes: past_key_value, past_key_values and, from 5.24 on, cache.
        for cache in arguments.values():
            if isinstance(cache, Cache):
                unused = hidden_states.new_ones(hidden_states.size(0), 1, hidden_states.size(1), 1)
                cache.update(unused, unused, self.layer)
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def narrow(layer, config, i):
    """Give a stock layer the widths of layer i."""
    C, H, K, F = config.hidden_size, config.n_head[i], config.n_kv_head[i], config.d_ff[i]
    D, attn = config.head_dim, layer.self_attn
    if H:
        attn.q_proj, attn.o_proj = nn.Linear(C, H * D, bias=config.qkv_bias), nn.Linear(H * D, C, bias=False)
        attn.k_proj, attn.v_proj = (nn.Linear(C, K * D, bias=config.qkv_bias) for _ in range(2))
        attn.num_key_value_groups = H // K
    else:
        layer.self_attn, layer.input_layernorm = NoAttention(i), nn.Identity()
    if F:
        layer.mlp.gate_proj, layer.mlp.up_proj = (nn.Linear(C, F, bias=False) for _ in range(2))
        layer.mlp.down_proj = nn.Linear(F, C, bias=False)
    else:
        layer.mlp, layer.post_attention_layernorm = NoFFN(), nn.Identity()
    return layer


def stock_layer(config, i):
    """A decoder layer of transformers': Llama's, or with QK norm Qwen 3's."""
    if not config.qk_norm:
        return LlamaDecoderLayer(config, i)
    # Qwen 3's layer reads `layer_types` while it is built (4.53 to 5.9). The model's own config must not have it:
    # `generate` would make a dictionary of masks for a static cache, and Llama's forward pass takes one mask.
    typed = copy.copy(config)
    typed.layer_types = ["full_attention"] * config.num_hidden_layers
    layer = Qwen3DecoderLayer(typed, i)
    layer.self_attn.config = config                 # transformers changes the attention's kernel in there
    return layer


class NanopruneForCausalLM(LlamaForCausalLM):
    config_class = NanopruneConfig

    def __init__(self, config):
        super().__init__(config)
        layers = (narrow(stock_layer(config, i), config, i) for i in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)
        self.post_init()


class DeciLMForCausalLM(NanopruneForCausalLM):
    config_class = DeciLMConfig
