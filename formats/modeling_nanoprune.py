"""A pruned model in transformers (and the config of a DeciLM in vLLM): Llama's decoder with other
widths in every layer.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

export.py copies this file into the folders that it writes. The class builds transformers' own Llama
or Qwen 3 layers, then replaces their projections by ones of the layer's widths: `n_head`,
`n_kv_head` and `d_ff` in config.json, where 0 means that the sub-block is absent. So attention
kernels, masks, caches and generation are transformers' own. They are those of version 4.51 or
later; a static cache needs 4.56.
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
        self.n_head = list(n_head)
        self.n_kv_head = list(n_kv_head)
        self.d_ff = list(d_ff)
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        super().__init__(**kwargs)
        # Qwen 3's layers ask for these.
        self.use_sliding_window = False
        self.sliding_window = None


class Block(dict):
    """A JSON object whose keys are attributes too, as vLLM reads block_configs."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(NanopruneConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), num_attention_heads=1, hidden_size=1, **kwargs):
        self.block_configs = []
        n_head = []
        n_kv_head = []
        d_ff = []
        for block in block_configs:
            attention = Block(block["attention"])
            ffn = Block(block["ffn"])
            self.block_configs.append(Block(attention=attention, ffn=ffn))
            n_head.append(0 if attention.no_op else num_attention_heads)
            n_kv_head.append(0 if attention.no_op else num_attention_heads // attention.n_heads_in_group)
            if ffn.no_op:
                d_ff.append(0)
            elif "intermediate_size" in ffn:
                d_ff.append(ffn.intermediate_size)
            else:
                # DeciLM's rule: 2/3 · ffn_mult · hidden_size, rounded up to a multiple of 256.
                d_ff.append(-(-int(2 * ffn.ffn_mult * hidden_size / 3) // 256) * 256)
        # A config.json that this class has saved holds the widths, too.
        kwargs |= {"n_head": n_head, "n_kv_head": n_kv_head, "d_ff": d_ff}
        super().__init__(num_attention_heads=num_attention_heads, hidden_size=hidden_size, **kwargs)


class NoAttention(nn.Module):
    """Stands in for an absent attention. It adds nothing to the residual stream."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **arguments):
        # transformers takes positions, masks and padding from the length of the first layer's
        # cache. So an absent attention caches one unused value per token; an empty tensor would
        # count as length 0. The cache is found by its type, because its name changes:
        # past_key_value, past_key_values and, from 5.24 on, cache.
        for cache in arguments.values():
            if isinstance(cache, Cache):
                unused = hidden_states.new_ones(hidden_states.size(0), 1, hidden_states.size(1), 1)
                cache.update(unused, unused, self.layer)
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    """Stands in for an absent FFN."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def stock_layer(config, i):
    """Decoder layer i of transformers: Llama's, or with QK norm Qwen 3's."""
    if not config.qk_norm:
        return LlamaDecoderLayer(config, i)
    # Qwen 3's layer reads `layer_types` while it is built (4.53 to 5.9). The model's own config
    # must not have it: `generate` would make a dictionary of masks for a static cache, and Llama's
    # forward pass takes one mask.
    typed = copy.copy(config)
    typed.layer_types = ["full_attention"] * config.num_hidden_layers
    layer = Qwen3DecoderLayer(typed, i)
    # transformers changes the attention kernel in the model's config.
    layer.self_attn.config = config
    return layer


def narrow(layer, config, i):
    """Give a stock layer the widths of layer i."""
    hidden_size = config.hidden_size
    if config.n_head[i]:
        q_size = config.n_head[i] * config.head_dim
        kv_size = config.n_kv_head[i] * config.head_dim
        attention = layer.self_attn
        attention.q_proj = nn.Linear(hidden_size, q_size, bias=config.qkv_bias)
        attention.k_proj = nn.Linear(hidden_size, kv_size, bias=config.qkv_bias)
        attention.v_proj = nn.Linear(hidden_size, kv_size, bias=config.qkv_bias)
        attention.o_proj = nn.Linear(q_size, hidden_size, bias=False)
        attention.num_key_value_groups = config.n_head[i] // config.n_kv_head[i]
    else:
        layer.self_attn = NoAttention(i)
        layer.input_layernorm = nn.Identity()
    if config.d_ff[i]:
        layer.mlp.gate_proj = nn.Linear(hidden_size, config.d_ff[i], bias=False)
        layer.mlp.up_proj = nn.Linear(hidden_size, config.d_ff[i], bias=False)
        layer.mlp.down_proj = nn.Linear(config.d_ff[i], hidden_size, bias=False)
    else:
        layer.mlp = NoFFN()
        layer.post_attention_layernorm = nn.Identity()
    return layer


class NanopruneForCausalLM(LlamaForCausalLM):
    config_class = NanopruneConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            self.model.layers.append(narrow(stock_layer(config, i), config, i))
        self.post_init()


class DeciLMForCausalLM(NanopruneForCausalLM):
    config_class = DeciLMConfig
