"""A loss on choices: what keeps right answers ahead of wrong ones, in place of what predicts a text.

    python prune.py --init MODEL --score taylor --choices FILE      # FILE: questions, as eval.py reads them
    python -m pytest tests/methods/test_margin.py

GISP (arXiv 2510.18030) ranks units by the gradient of a margin between right and wrong choices, where
a model is to answer questions. The loss of a question here is -log softmax of the right choice, over
the mean log-probability per token of each choice. A hinge max(0, 1 - margin) would be an alternative.
Its gradient is 0 for every question that is answered with ease and sees one wrong choice of several,
so most questions would say nothing; the softmax is our choice. Use questions that the model is not
evaluated on.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tasks.questions import Encoder, batch_of, grow


@dataclass(frozen=True)
class Answers:
    """Where the choices of one question are predicted."""
    arguments: dict               # of model.hidden
    choices: torch.Tensor         # (N,) the choice of each predicted token
    nodes: torch.Tensor           # (N,) the row of the hidden states (B·T, C) that predicts it
    tokens: torch.Tensor          # (N,) its id
    lengths: torch.Tensor         # (choices,) tokens of each choice
    gold: int                     # the right choice


def batches(model, tokenizer, questions):
    """[Question] -> [(x, Answers)], a question a batch; x (B, T) holds the question's tokens once, and
    those of its choices behind it."""
    encoder = Encoder(tokenizer)
    device = model.embed.weight.device
    questions_as_batches = []
    for question in questions:
        requests = [encoder.pair(question.query, choice) for choice in question.choices]
        trees = sorted(grow(requests, model.config.block_size), key=lambda tree: -len(tree.ids))
        x, arguments, *answers = batch_of(trees, device)
        choices, nodes, tokens = (torch.from_numpy(values).to(device) for values in answers)
        answers = Answers(arguments, choices, nodes, tokens, choices.bincount(), question.gold)
        questions_as_batches.append((x, answers))
    return questions_as_batches


def loss(model, x, answers):
    """The loss of one question in nats."""
    hidden = model.hidden(x, **answers.arguments).flatten(0, 1)[answers.nodes]       # (N, C)
    logits = F.linear(hidden, model.head_weight)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    log_p = log_p.gather(1, answers.tokens[:, None])[:, 0]
    means = log_p.new_zeros(len(answers.lengths)).index_add(0, answers.choices, log_p) / answers.lengths
    return -means.log_softmax(0)[answers.gold]
