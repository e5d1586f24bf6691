"""Candidates: sharing statistics changes nothing, and the winner is the rule's."""
import dataclasses
import re

import pytest
import torch
from helpers import EQUAL, close, new, text

import checkpoint
import prune
import score
from common import UserError, parse
from experiments import candidates
from experiments.candidates import Candidate
from formats.tokenizer import open_tokenizer
from model import GPTConfig
from tasks.questions import Question

FLAGS = ("--score taylor", "--score flap --allocate standardised --iterations 2",
         "--structure layer,ffn,kv --score taylor --layer-share 0.6",
         "--structure layer,ffn,kv --score wanda --layer-share 0.6 --mend least-squares",
         "--structure layer --score influence", "--allocate measured --score wanda")


def recipes_of(flags=FLAGS):
    return {words: parse(prune.Prune, f"--keep 0.6 --eval-windows 4 --block-size 8 {words}".split()) for words in flags}


def test_shared_statistics_make_the_same_models(monkeypatch):
    """Six recipes take one pass over the uncut model, one without two layers, and one of an iteration."""
    config = dataclasses.replace(EQUAL, vocab_size=256)
    model, _ = new(config, torch.float32)
    batches, passes = text(config, 4), []
    collected = score.collect

    def counted(model, *args):
        passes.append(model.config)
        return collected(model, *args)
    monkeypatch.setattr(score, "collect", counted)
    tokens = torch.randint(256, (200,), generator=torch.Generator().manual_seed(0)).numpy()
    some = [Question("ab", (" c", " dd"), 0), Question("x", (" yy", " z"), 1)]
    winner, rows = candidates.choose(model, recipes_of(), batches, {"one": tokens, "two": tokens[:100]},
                                     open_tokenizer("bytes"), some)
    assert len(passes) == 3 and sum(shape == config for shape in passes) == 1
    assert winner.loss == min(row.loss for row in rows) and winner.losses.keys() == {"one", "two"}
    assert all(row.right.shape == (2,) for row in rows)
    for row in rows:
        alone, _ = prune.cut_in_stages(model, batches, row.recipe)
        assert alone.config == row.model.config
        for p, q in zip(alone.parameters(), row.model.parameters(), strict=True):
            close(q, p, 1e-4, 1e-5)              # a pass that also takes gradients rounds otherwise
    lines = candidates.table(rows, winner).splitlines()
    assert len(lines) == len(rows) + 2 and lines[1].startswith("->") and all(row.name in "".join(lines) for row in rows)


def row(name, loss, right):
    config = GPTConfig(vocab_size=4, block_size=4, d_model=4, head_dim=4, n_head=(1,), n_kv_head=(1,), d_ff=(1,))
    return Candidate(name, None, new(config)[0], {"text": loss}, torch.tensor(right, dtype=torch.float32), 1.0)


def test_the_lowest_loss_wins_unless_questions_say_clearly_otherwise():
    half = [0, 1] * 50
    first, second = row("first", 2.0, half), row("second", 1.9, half)
    assert candidates.best([first, second]) is second
    assert candidates.best([row("first", 1.9, half), second]).name == "first"              # a tie
    # 4 more of 100 are right: 0.04 ± 0.0197. 3 more: 0.03 ± 0.0171.
    better, hardly = row("better", 2.0, [1, 1] * 4 + half[8:]), row("hardly", 2.0, [1, 1] * 3 + half[6:])
    assert candidates.gain(better, second) == pytest.approx((.04, .0196946), abs=1e-6)
    assert candidates.best([better, second]) is better and candidates.best([hardly, second]) is second
    assert candidates.best([better, second, row("much", 3.0, [1] * 100)]).name == "much"
    assert candidates.best([row("first", 2.0, []), row("second", 1.9, [])]).name == "second"


def test_the_command_prints_the_table_and_the_winners_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    checkpoint.save(folder / "ckpt_00000000.pt", new(dataclasses.replace(EQUAL, vocab_size=256), torch.float32)[0],
                    run={"tokenizer": "bytes"})
    file.write_text("Some words, and some more of them. " * 400)
    flags = ["--score random", "--structure layer,ffn,kv --score wanda --layer-share 0.5"]
    common = f"--keep 0.5 --windows 8 --eval-windows 2 --block-size 8 --device cpu --data {file}"
    argv = [str(folder), f"--common={common}", f"--recipes={'; '.join(flags)}"]
    candidates.main(parse(candidates.Candidates, argv, verbatim=("common", "recipes")))
    said = capsys.readouterr().out
    assert all(f"  {words}\n" in said for words in flags)
    winner = re.search(r"^-> .*  (--.*)$", said, re.M)[1]
    assert said.endswith(f"python prune.py --init {folder} {common} {winner}\n")
    recipe = parse(prune.Prune, said.splitlines()[-1].split()[2:])
    assert recipe.keep == .5 and recipe.init == str(folder)


def test_default_mending_calibrates_for_itself_and_what_all_share_stays_in_common(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    checkpoint.save(folder / "ckpt_00000000.pt", new(dataclasses.replace(EQUAL, vocab_size=256), torch.float32)[0],
                    run={"tokenizer": "bytes"})
    file.write_text("Some words, and some more of them. " * 400)
    common = f"--keep 0.5 --windows 8 --eval-windows 2 --block-size 8 --device cpu --data {file}"
    candidates.main(candidates.Candidates(str(folder), f"{common} --measured-windows 4", "--allocate measured"))
    for wrong, sentence in (
            (dict(recipes="--score wanda --windows 4"), "all candidates share --windows; take it out of .*wanda"),
            (dict(common=f"{common} --choices own"), "leave --choices and --data self out"),
            (dict(common="--keep 0.5 --data self"), "leave --choices and --data self out"),
            (dict(common="--keep 0.5 --windows 4 --block-size 1"), "inputs to 4 windows x 1 = 4 tokens")):
        with pytest.raises(UserError, match=sentence):
            candidates.main(candidates.Candidates(str(folder), **{"common": common, **wrong}))


def test_what_is_no_cut_of_units_is_refused():
    with pytest.raises(UserError, match="not --structure 2:4; leave it out"):
        candidates.choose(None, {"2:4": prune.Prune(structure="2:4")}, [], {}, None)
