"""The margin of choices: its gradient is that of whole logits, choice by choice, and only gradients come from it."""
import pytest
import torch
from helpers import new

import prune
import score
from common import UserError
from formats.tokenizer import open_tokenizer
from methods import margin
from model import GPTConfig
from tasks.questions import Question

BYTES = open_tokenizer("bytes")
CONFIG = GPTConfig(vocab_size=256, block_size=64, d_model=12, head_dim=4, n_head=(3, 3), n_kv_head=(3, 3), d_ff=(8, 8))
QUESTIONS = [Question("a bc", (" d", " efg", " dd"), 1), Question("xyz", (" u", " v w" * 6), 0)]


def oracle(model, question):
    """The loss of a question, each choice run alone."""
    means = []
    for choice in question.choices:
        context, ids = question.query.encode(), choice.encode()
        log_p = model(torch.tensor([list(context + ids)]))[0].log_softmax(-1)
        rows = range(len(context) - 1, len(context) + len(ids) - 1)
        means.append(sum(log_p[row, i] for row, i in zip(rows, ids)) / len(ids))
    return -torch.stack(means).log_softmax(0)[question.gold]


def test_gradients_are_those_of_whole_logits():
    model = new(CONFIG)[0]
    stats = score.collect(model, margin.batches(model, BYTES, QUESTIONS), {"grad", "grad_sq"}, loss=margin.loss)
    names = list(stats.grad)
    each = [torch.autograd.grad(oracle(model, q), [model.get_parameter(name) for name in names]) for q in QUESTIONS]
    for name, a, b in zip(names, *each):
        torch.testing.assert_close(stats.grad[name], (a + b) / 2)
        torch.testing.assert_close(stats.grad_sq[name], (a.square() + b.square()) / 2)


def test_only_gradients_come_from_the_choices():
    model = new(CONFIG, torch.float32)[0]
    text = [(torch.randint(256, (2, 8)), torch.randint(256, (2, 8)))]
    questions = margin.batches(model, BYTES, QUESTIONS)
    recipe = prune.Prune(score="taylor", mend="least-squares")
    stats = prune.collect(model, text, recipe, questions=questions)
    plain = prune.collect(model, text, recipe)
    for name, gram in plain.gram.items():
        torch.testing.assert_close(stats.gram[name], gram)
    expected = score.collect(model, questions, {"grad"}, loss=margin.loss).grad
    for name, gradient in expected.items():
        assert torch.equal(stats.grad[name], gradient) and not torch.equal(plain.grad[name], gradient)


@pytest.mark.parametrize("flags", [dict(score="wanda"), dict(structure="layer", score="influence")])
def test_choices_are_refused_where_no_gradient_is_read(flags):
    with pytest.raises(UserError, match="--choices has no effect"):
        prune.check(prune.Prune(choices="questions.jsonl", **flags))
