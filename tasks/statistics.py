"""How certain a share of right answers is, and how certain the difference between two models that
answered the same questions.

    python eval.py CUT --multiple-choice own --probe --against DENSE

Two models that answer the same questions differ much less by chance than two independent shares
would. Their difference is therefore bootstrapped over questions: a resample draws as many questions
with replacement and keeps both models' answers together (the paired bootstrap, percentile interval).
A resample of questions that both models answer alike shows no difference: then the interval has no
width, however few these questions are.
"""
import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
QUANTILE = 1.959964                  # of the normal distribution, for 95 %


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(correct):
    """The 95 % interval of a share, by Wilson's formula (1927): [bool] -> Interval. The interval stays
    between 0 and 1, also where all answers are right or all are wrong."""
    n = len(correct)
    share = float(np.mean(correct))
    z = QUANTILE
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Without the clamps a rounding could leave the share outside.
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


class Pair(NamedTuple):
    """Two models' answers to the same questions."""
    difference: Interval             # share of right answers, model minus reference
    ratio: Interval                  # the model's share divided by the reference's
    gained: int                      # questions that only the model answers rightly
    lost: int                        # questions that only the reference answers rightly


def paired(correct, reference, resamples=RESAMPLES, seed=0):
    """Compare two models: two lists of bool, an entry for each question -> Pair, with intervals of
    95 %. The ratio is NaN if one of the resamples holds no question that the reference answers
    rightly. That is about certain with up to 7 such questions and rare with 12 or more. Raises
    ValueError if the lists differ in length or are empty."""
    correct = np.asarray(correct, bool)
    reference = np.asarray(reference, bool)
    if len(correct) != len(reference) or not len(correct):
        raise ValueError(f"{len(correct)} answers cannot be paired with {len(reference)}")
    both = np.sum(correct & reference)
    gained = np.sum(correct & ~reference)
    lost = np.sum(~correct & reference)
    n = len(correct)
    # A question has four outcomes. How often each occurs in a resample is multinomial, so that no
    # resample has to be written out.
    shares = np.array((both, gained, lost, n - both - gained - lost)) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, resamples)     # (resamples, 4)
    drawn_correct = drawn[:, 0] + drawn[:, 1]
    drawn_reference = drawn[:, 0] + drawn[:, 2]
    difference = interval(float(gained - lost) / n, (drawn_correct - drawn_reference) / n)
    if drawn_reference.min() == 0:
        return Pair(difference, Interval(math.nan, math.nan, math.nan), int(gained), int(lost))
    ratio = interval(float(correct.sum() / reference.sum()), drawn_correct / drawn_reference)
    return Pair(difference, ratio, int(gained), int(lost))


def interval(value, resampled):
    """The percentile interval of a value, of its resamples (N,)."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def print_pairs(answers, reference, name):
    """Print the paired differences of what two models answered, each {row of the table: [bool]}.
    `name` is that of the reference."""
    print(f"{'paired with ' + name:40} difference, 95 %           ratio, 95 %             gained  lost")
    for row, correct in answers.items():
        pair = paired(correct, reference[row])
        difference = f"{pair.difference.value:+.3f} [{pair.difference.low:+.3f}, {pair.difference.high:+.3f}]"
        print(f"{row:40} {difference}  {pair.ratio}  {pair.gained:6}  {pair.lost:4}")
