"""Text that a model writes itself: seeded, kept, prompts out of the loss, written anew while a model is cut."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import new

import checkpoint
import data
import eval as evaluation
import prune
import score
from common import IGNORED, UserError, parse
from formats.tokenizer import open_tokenizer
from methods import self_text
from model import GPTConfig

T = 16
BYTES = open_tokenizer("bytes")
CONFIG = GPTConfig(vocab_size=256, block_size=T, d_model=12, head_dim=4, n_head=(3, 3), n_kv_head=(3, 3), d_ff=(8, 8))


@pytest.fixture(scope="module")
def model():
    return new(CONFIG, torch.float32)[0]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n\nabcde\n")
    return tmp_path / "prompts.txt"


def tokens_of(corpus):
    return np.concatenate([corpus.train[:], corpus.val[1:]])


def test_the_same_seed_writes_the_same_text_which_is_kept(model, tmp_path, monkeypatch, capsys):
    first = self_text.load(model, BYTES, 6, T, 0, cache=tmp_path)
    assert "the model wrote 112 tokens" in capsys.readouterr().out
    unkept = self_text.load(model, BYTES, 6, T, 0, cache=None)
    other = self_text.load(model, BYTES, 6, T, 1, cache=tmp_path)
    other_model = self_text.load(new(CONFIG, torch.float32, seed=1)[0], BYTES, 6, T, 0, cache=tmp_path)
    monkeypatch.setattr(self_text, "write", None)
    again = self_text.load(model, BYTES, 6, T, 0, cache=tmp_path)
    assert tokens_of(first).tobytes() == tokens_of(again).tobytes() == tokens_of(unkept).tobytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (tokens_of(other) != tokens_of(first)).sum() > 90
    # Models whose distributions are nearly even draw alike by the same seed.
    assert (tokens_of(other_model) != tokens_of(first)).sum() > 20
    # Seven windows that begin as a document does; the last one is held out.
    starts = np.flatnonzero(tokens_of(first) >= data.CONTEXT_ONLY)
    assert starts.tolist() == list(range(0, 7 * T + 1, T)) and set(tokens_of(first)[starts]) == {data.CONTEXT_ONLY}
    assert len(first.train) == 6 * T + 1 and len(first.val) == T + 1
    kept = tmp_path / f"self-{first.fingerprint}.bin"
    kept.write_bytes(kept.read_bytes()[:-4])
    with pytest.raises(UserError, match="has 112 tokens and should have 113: delete it"):
        self_text.load(model, BYTES, 6, T, 0, cache=tmp_path)


def test_tokens_are_drawn_from_the_models_own_distribution(model):
    texts = self_text.write(model, BYTES, 3000 * 2, 2, 0)
    assert all(len(ids) == 1 for _, ids in texts)
    drawn = torch.tensor([ids[0] for _, ids in texts]).bincount(minlength=256) / len(texts)
    p = model(torch.tensor([[BYTES.eot]]))[0, 0].softmax(-1).detach()
    # The mean of chi² is the number of classes less one; its standard deviation about the root of twice that.
    chi2 = (len(texts) * (drawn - p).square() / p).sum()
    assert abs(chi2 - 255) < 6 * (2 * 255 + (1 / p).sum() / len(texts))**.5


def test_an_answer_ends_with_its_end_and_prompts_are_marked(model, prompts):
    ids = self_text.encode_prompts(prompts, BYTES, T)
    assert ids == {tuple(b"ab"): "ab", tuple(b"abcde"): "abcde"}
    with torch.no_grad():
        likely_end = new(CONFIG, torch.float32)[0]
        likely_end.embed.weight[BYTES.eot] *= 5
    texts = self_text.write(likely_end, BYTES, 40 * T, T, 0, ids)
    assert {prompt for prompt, _ in texts} == set(ids)
    ended = 0
    for prompt, answer in texts:
        assert BYTES.eot not in answer[:-1] and answer
        ended += answer[-1] == BYTES.eot
        assert answer[-1] == BYTES.eot or len(prompt) + len(answer) == T
    assert 10 < ended < len(texts)
    stream = self_text.packed(texts, BYTES, 40 * T)
    assert len(stream) == 40 * T + 1
    place = 0
    for prompt, answer in texts:
        piece = stream[place:place + len(prompt) + len(answer)].astype(np.int64)
        whole = [i + data.CONTEXT_ONLY for i in prompt] + answer
        assert piece.tolist() == whole[:len(piece)]
        place += len(whole)


def test_prompts_give_no_gradient(prompts):
    model = new(CONFIG)[0]
    corpus = self_text.load(model, BYTES, 8, T, 0, prompts, cache=None)
    batches = score.batches(corpus.train, T, 8, 4, 0)
    stats = score.collect(model, batches, {"grad"})
    total = 0
    for x, y in batches:
        assert (y == IGNORED).any() and x.min() >= 0
        log_p = model(x).log_softmax(-1)
        losses = [-log_p[b, t, y[b, t]] for b in range(4) for t in range(T) if y[b, t] >= 0]
        total = total + sum(losses) / len(losses) / len(batches)
    expected = torch.autograd.grad(total, [model.get_parameter(name) for name in stats.grad])
    for gradient, value in zip(stats.grad.values(), expected):
        torch.testing.assert_close(gradient, value)
    # Evaluation and perplexity without a layer leave them out, too.
    result = evaluation.evaluate(model, corpus.val, BYTES.byte_lengths(), 2, block_size=T)
    x, y = data.inputs_and_targets(torch.from_numpy(corpus.val[:].astype(np.int64)).unfold(0, T + 1, T))
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)
    assert result["loss"] == pytest.approx(expected.item()) and result["tokens"] == (y >= 0).sum()


@pytest.fixture
def saved(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "model" / "ckpt_00000000.pt", model, step=0, tokenizer_files={},
                    run={"tokenizer": "bytes"})
    return dict(init=str(tmp_path / "model"), data=("self",), windows=8, micro_batch=4, eval_windows=2, device="cpu",
                dtype="float32")


def test_a_model_that_is_cut_in_steps_writes_anew_at_each(saved, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("a text of another kind " * 30)
    writers = []
    write = self_text.write
    monkeypatch.setattr(self_text, "write", lambda model, *a: (writers.append(model.config.widths()), write(
        model, *a))[1])
    measured = []
    evaluate = prune.evaluate
    monkeypatch.setattr(prune, "evaluate", lambda model, tokens, *a, **k: (measured.append(tokens), evaluate(
        model, tokens, *a, **k))[1])
    for flags in (dict(score="taylor"),
                  dict(structure="sublayer", score="perplexity", data=("other.txt", "self:3"))):
        writers.clear()
        measured.clear()
        prune.main(prune.Prune(**saved | flags, keep=.5, iterations=2, out=flags["score"]))
        cut = checkpoint.load(flags["score"])[0].config.widths()
        sizes = [sum(widths.values()) for widths in writers]
        assert sum(CONFIG.widths().values()) > sizes[-1] > sum(cut.values())
        # Before and after are measured on the whole model's text.
        half = len(measured) // 2
        assert all(before is after for before, after in zip(measured[:half], measured[half:], strict=True))
        said = capsys.readouterr().out
        assert said.count("hold-out of self") == 2 and "the loss rises by the KL divergence" in said
    assert half == 2 and "of other.txt (25%) and self (75%)" in said
    with pytest.raises(UserError, match="does not say what it was trained on; give a text by --data"):
        evaluation.main(evaluation.Eval("taylor", device="cpu"))


def test_rows_for_training_are_read_as_others(saved, prompts, tmp_path):
    settings = dict(model=saved["init"], tokens=2000, device="cpu", dtype="float32")
    argv = [saved["init"], *"--tokens 2000 --device cpu --dtype float32 --out own.jsonl".split()]
    self_text.main(parse(self_text.Write, argv))
    rows = [json.loads(line) for line in open("own.jsonl")]
    assert all(row["text"] and "\0" not in row["text"] for row in rows)
    assert data.load("own.jsonl", BYTES, cache=None).documents[0] > 100
    self_text.main(self_text.Write(**settings, out="answers.jsonl", prompts=str(prompts)))
    rows = [json.loads(line) for line in open("answers.jsonl")]
    assert {row["prompt"] for row in rows} == {"ab", "abcde"} and any(row["completion"] for row in rows)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab"}\n')
    assert self_text.read_prompts("rows.jsonl") == ["ab"]
    with pytest.raises(UserError, match="own.jsonl is there already"):
        self_text.main(self_text.Write(**settings, out="own.jsonl"))


def test_a_chat_model_answers_as_in_a_chat(model, prompts):
    chat = type(BYTES)()
    chat.files = {"chat_template.jinja": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
                                         "{% if add_generation_prompt %}a:{% endif %}"}
    ids = self_text.encode_prompts(prompts, chat, 24)
    assert ids == {tuple(b"u:ab;a:"): "ab", tuple(b"u:abcde;a:"): "abcde"}
    texts = [(tuple(b"u:ab;a:"), [*b"yes", 0]), (tuple(b"u:ab;a:"), [*b"no end"]), (tuple(b"u:abcde;a:"), [0])]
    assert self_text.rows_of(texts, chat, ids) == [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "yes"}]}]


def test_refusals(saved, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("ab\nabcdefghi\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    stdlib = dict(prompts="long.txt", data=("stdlib",))
    for flags, sentence in ((dict(prompts="empty.txt"), "empty.txt holds no prompts"),
                            (dict(prompts="long.txt"), "prompt 2 of long.txt has 9 tokens, and must have 1 to 8"),
                            (dict(prompts="wrong.jsonl"), "wrong.jsonl:2 has no prompt"),
                            (stdlib, "--prompts has no effect without --data self")):
        with pytest.raises(UserError, match=sentence):
            prune.main(prune.Prune(**{**saved, **flags}, out="cut"))
        assert not (tmp_path / "cut").exists()
