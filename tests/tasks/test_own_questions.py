"""Our own questions: the same every time, and no answer can be told without its question."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tasks import own_questions
from tasks.questions import read_questions

ROWS = own_questions.rows()


def test_they_are_many_and_the_same_every_time(tmp_path):
    assert len(ROWS) >= 400 and len({json.dumps((row["query"], sorted(row["choices"]))) for row in ROWS}) > 480
    command = [sys.executable, "-m", "tasks.own_questions", str(tmp_path / "own.jsonl")]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, env={"PYTHONHASHSEED": "7"})
    assert read_questions(tmp_path / "own.jsonl") == read_questions("own")
    assert [row["query"] for row in ROWS] != [row["query"] for row in own_questions.rows(seed=1)]


def test_choices_of_a_question_differ():
    for row in ROWS:
        assert len(set(row["choices"])) == len(row["choices"]) in (2, 4), row
        assert all(choice.startswith(" ") and choice == choice.rstrip() for choice in row["choices"])


@pytest.mark.parametrize("number", [2, 4])
def test_the_right_choice_stands_everywhere_equally_often(number):
    places = Counter(row["gold"] for row in ROWS if len(row["choices"]) == number)
    expected = sum(places.values()) / number
    assert all(abs(places[place] - expected) <= 0.1 * expected for place in range(number))


GUESSERS = {"longest": lambda choice: len(choice), "shortest": lambda choice: -len(choice), "alphabet": str}


@pytest.mark.parametrize("name", GUESSERS)
def test_a_guesser_that_sees_no_query_is_at_chance(name):
    right, chance, variance = 0, 0, 0
    for row in ROWS:
        values = [GUESSERS[name](choice) for choice in row["choices"]]
        best = [place for place, value in enumerate(values) if value == max(values)]
        right += (row["gold"] in best) / len(best)
        p = 1 / len(row["choices"])
        chance += p
        variance += p * (1 - p)
    assert abs(right - chance) < 2 * variance**0.5


def test_answers_are_right_where_a_program_can_tell():
    for row in ROWS:
        right = row["choices"][row["gold"]].strip()
        if row["kind"] == "sums":
            first, second = row["query"].split("\n")[-1].removesuffix(" =").split(" + ")
            assert int(first) + int(second) == int(right)
        if row["kind"] == "comparisons":
            pick = max if "larger" in row["query"] else min
            assert int(right) == pick(int(choice) for choice in row["choices"])
        if row["kind"] == "agreement":
            assert right.startswith("is ") == (row["query"].split()[1] in
                                               {words.split()[0] for words in own_questions.SUBJECTS})
