"""A model whose layers do not fit the device: they lie in main memory, and one at a time is brought to
the device.

    python prune.py --init meta-llama/Llama-3.1-8B --keep 0.5 --offload
    python -m pytest tests/methods/test_offload.py      # the statistics of a whole model, to 1e-12

Embedding, last norm and head stay on the device. Where a layer runs, it is brought there and dropped
again (`keep_layers_off`), so that everything which only runs the model need not know. A backward pass
would hold all layers that it ran through. So `collect` goes forward layer by layer, each with all
windows, keeps the residual stream in front of each layer in main memory, and goes backward from the
last layer to the first, each run again from its stored stream. Sums go to main memory with the layer.

Memory on the device: one layer, its sums, and the activations of one batch in this layer. Not here:
training (train.py --shard), several devices (shard.py).
"""
import contextlib

import torch

from common import progress
from distill import chunked_loss
from model import rotary
from score import GRADIENTS, READERS, Stats, averaged, hook_activations, hook_gradients, restored_gradients

# -- layers in main memory

@contextlib.contextmanager
def on_device(module, device, changes=False):
    """Inside of a `with` all parameters of the module lie on the device. `changes`: what they become
    there is copied back."""
    elsewhere = {p: p.data for p in module.parameters() if p.device != device}
    for p, held in elsewhere.items():
        p.data = held.to(device)
    try:
        yield
    finally:
        for p, held in elsewhere.items():
            if changes:
                held.copy_(p.data)
            p.data = held


def keep_layers_off(model, device):
    """Put embedding, last norm and head onto the device. Bring each layer there, from where it lies,
    whenever it runs."""
    for name, module in model.named_children():
        if name != "blocks":
            module.to(device)
    for block in model.blocks:
        run_on_device(block)
    return model


def run_on_device(block):
    """Bring a layer to the device of its input for as long as it runs."""
    stay = contextlib.ExitStack()

    def bring(block, args):
        stay.enter_context(on_device(block, args[0].device))

    def drop(block, args, output):
        stay.close()

    block.register_forward_pre_hook(bring)
    block.register_forward_hook(drop, always_call=True)


def keep_like(small, model):
    """The model `small`, which was cut from `model`, with its layers where those of `model` lie."""
    device = model.embed.weight.device
    if any(p.device != device for p in model.parameters()):
        keep_layers_off(small, device)
    return small


# -- calibration

def collect(model, batches, needs, readers=READERS):
    """What score.collect returns, layer by layer: every layer sees all batches before the next one
    runs. The statistics are in main memory. The gradients are those of the text's loss."""
    batches = list(batches)
    stats = Stats()
    for x, _ in batches:
        stats.tokens += x.numel()
        stats.windows += len(x)
    with restored_gradients(model), contextlib.ExitStack() as hooks:
        model.requires_grad_(False)
        if GRADIENTS.isdisjoint(needs):
            hook_activations(model, stats, needs, readers, hooks)
            forward(model, batches, stats)
        else:
            streams = forward(model, batches, Stats())
            hook_activations(model, stats, needs, readers, hooks)
            hook_gradients(model, stats, needs, hooks)
            backward(model, batches, streams, stats)
    return averaged(stats, model, len(batches))


def turns(model, batches):
    """cos and sin for the positions of a window."""
    weight = model.embed.weight
    return rotary(model.config, 0, batches[0][0].size(1), weight.device, weight.dtype)


@torch.no_grad()
def forward(model, batches, stats):
    """The residual streams in front of each layer and behind the last one: [[stream (B, T, C) of each
    batch] of each layer], in main memory."""
    device = model.embed.weight.device
    angles = turns(model, batches)
    streams = [model.embed(x.to(device)).cpu() for x, _ in batches]
    before = []
    for block in progress(model.blocks, "forward"):
        before.append(streams)
        with on_device(block, device):
            streams = [block(stream.to(device), *angles).cpu() for stream in streams]
        move_to_host(stats)
    for stream in streams:
        model.norm(stream.to(device))               # for its hook
    move_to_host(stats)
    return [*before, streams]


def backward(model, batches, streams, stats):
    """Run each layer again with gradients, from the last one to the first. `streams`: see `forward`;
    the list is emptied."""
    device = model.embed.weight.device
    angles = turns(model, batches)
    gradients = []                                  # of the loss by the stream behind the layer
    for stream, (_, y) in zip(streams.pop(), batches):
        stream = stream.to(device).requires_grad_()
        loss, _ = chunked_loss(model.norm(stream), model.head_weight, y.to(device))
        loss.backward()
        gradients.append(stream.grad.cpu())
    for block in progress(list(model.blocks)[::-1], "backward"):
        with on_device(block, device):
            for i, stream in enumerate(streams.pop()):
                stream = stream.to(device).requires_grad_()
                block(stream, *angles).backward(gradients[i].to(device))
                gradients[i] = stream.grad.cpu()
        move_to_host(stats)


def move_to_host(stats):
    """Move the sums to main memory. Cosines are single numbers, read at the end."""
    for name, sums in vars(stats).items():
        if isinstance(sums, dict) and name != "cosine":
            for key in sums:
                sums[key] = sums[key].cpu()
