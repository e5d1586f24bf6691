"""The probe: items that a program can check, answers judged exactly, and models that answer as they are made to."""
import re

import pytest
import torch

from common import UserError
from formats.tokenizer import Bytes
from model import GPT, GPTConfig
from tasks import probe

CONFIG = GPTConfig(vocab_size=256, block_size=512, d_model=16, head_dim=8, n_head=(2,), n_kv_head=(1,), d_ff=(8,))
TEXT = "\n".join(f"the {word} is seen in the {word}." for word in probe.WORDS)
SIGNS = {"sums": " Answer:", "copying": " ->", "brackets": " ="}


def last_line(item):
    return item.prompt.split("\n")[-1]


def solve(kind, line):
    """The answer, without the code under test."""
    if kind == "sums":
        first, second = map(int, re.fullmatch(r"Question: What is (\d+) \+ (\d+)\? Answer:", line).groups())
        assert 10 <= min(first, second) and max(first, second) < 50
        return str(first + second)
    if kind == "copying":
        return line.removesuffix(" ->")
    if kind == "brackets":
        text = line.removesuffix(" =").replace(" ", "")
        return " ".join(text[::-1].translate(str.maketrans("([{<", ")]}>")))
    if kind == "lines":
        return line.split()[1]
    (phrase,) = [phrase for phrase in probe.PHRASES if phrase.startswith(line + " ")]
    return phrase.split()[-1]


def test_items_and_their_examples_are_right_and_the_same_every_time():
    items = probe.make_items(40, seed=3, text=TEXT)
    assert items == probe.make_items(40, seed=3, text=TEXT) != probe.make_items(40, seed=4, text=TEXT)
    assert list(items) == ["sums", "copying", "brackets", "phrases", "lines"]
    for kind, of_kind in items.items():
        assert len(of_kind) == 40
        for item in of_kind:
            assert item.answer == solve(kind, last_line(item))
            # What stands before is solved as well, and does not hold the item itself.
            for line in item.prompt.split("\n")[:-1] if kind in SIGNS else ():
                question, sign, answer = line.partition(SIGNS[kind])
                assert answer.strip() == solve(kind, question + sign)
    for item in items["lines"]:
        assert f"\n{item.prompt} {item.answer}.\n".replace("\n", " ") in f" {TEXT} ".replace("\n", " ")
        assert len(item.prompt) <= 400
        assert len(item.prompt) > 380 or TEXT.startswith(item.prompt)
    assert len(set(probe.PHRASES)) == len(probe.PHRASES) >= 100


@pytest.mark.parametrize("answer, is_word, continuation, right", [
    ("19", False, " 19\n12 + 1 = 13", True), ("19", False, "19", True), ("19", False, " 190\n", False),
    ("19", False, " 1", False), ("a b", False, " a b\n", True), ("a b", False, " a b c", False),
    ("a", False, "\na", False), ("Paris", True, " Paris, the city", True), ("Paris", True, " Parisian", False),
    ("Paris", True, "", False), ("Paris", True, " in Paris", False)])
def test_an_answer_counts_only_whole(answer, is_word, continuation, right):
    assert probe.is_right(probe.Item("", answer, is_word), continuation) is right


def test_the_probe_counts_right_answers_and_names_each(monkeypatch):
    items = probe.make_items(10, text=TEXT)
    expected = {item.prompt: (" " + item.answer + "\nrest", number) for of_kind in items.values()
                for number, item in enumerate(of_kind)}

    def complete_all(model, tokenizer, requests, batch_tokens):
        answers = [expected[bytes(ids).decode()] for ids, _ in requests]
        return [text if number % 3 else " wrong" for text, number in answers]

    monkeypatch.setattr(probe, "complete_all", complete_all)
    result = probe.probe(GPT(CONFIG), Bytes(), 10, text=TEXT)
    for of_kind in result.values():
        assert of_kind["correct"] == [number % 3 > 0 for number in range(10)]
        assert of_kind["accuracy"] == 0.6 and of_kind["items"] == 10 and of_kind["commonest"] <= 0.3


def test_a_batch_answers_as_single_prompts_do():
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    result = probe.probe(model, Bytes(), 3, batch_tokens=10**6)
    for kind, of_kind in probe.make_items(3).items():
        budget = 2 + max(len(item.answer) + 1 for item in of_kind)
        for item, answer in zip(of_kind, result[kind]["answers"]):
            ids = torch.tensor([list(item.prompt.encode())])
            alone = model.generate(ids, budget, temperature=0)[0, ids.size(1):].tolist()
            assert Bytes().decode(alone).split("\n")[0].split("\0")[0] == answer


def test_what_cannot_be_probed_is_refused():
    short = GPT(GPTConfig(**{**CONFIG.__dict__, "block_size": 64}))
    with pytest.raises(UserError, match="--probe needs a context of .* tokens for its .*, the model has 64"):
        probe.probe(short, Bytes(), 2)
    assert [item.answer for item in probe.make_items(2, text="a b " + "x" * 999 + " end\n")["lines"]] == ["end"]
    with pytest.raises(UserError, match="no line of 4 words whose last word"):
        probe.make_items(2, text="one\ntwo words\n")
