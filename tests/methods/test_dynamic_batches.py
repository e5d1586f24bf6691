"""Dynamic batches: the published update, and domains that are a function of (sample, weights, seed) alone."""
import math

import numpy as np
import pytest
import torch

import data
from methods.dynamic_batches import domain_of, mixed, reweigh

# Sheared LLaMA's weights in the beginning, and its references for 1.3B parameters.
WEIGHTS = (.67, .045, .045, .02, .045, .025, .15)
REFERENCE = (1.9643, .7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)
LOSSES = (2.1, .8, 2.3, 1.7, 1.9, 1.5, 2.4)


def test_an_update_is_the_published_one():
    weights = reweigh(WEIGHTS, LOSSES, REFERENCE)
    assert weights.round(4).tolist() == [.6585, .0408, .0454, .0188, .0445, .0227, .1695]
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    assert reweigh(WEIGHTS, REFERENCE, REFERENCE, floor=0) == pytest.approx(WEIGHTS, abs=1e-15)
    # A domain below its reference loses weight, as in the release; the paper's formula would clip.
    below = reweigh((.5, .5), (1., 2.), (2., 2.), floor=0)
    assert below.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert reweigh((.5, .5), (0., 900.), (0., 0.), floor=.01).tolist() == pytest.approx([.005, .995])


def test_the_mixer_is_splitmix64s():
    """The first numbers of the generator that starts at 0, from its authors' code."""
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(x) for x in mixed(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_domains_come_as_often_as_their_weights_say(seed):
    n = 10_000
    weights = np.array(WEIGHTS)
    for scale in (1, 7):
        domains = domain_of(np.arange(n), scale * weights, seed)
        counts = np.bincount(domains, minlength=7)
        assert (abs(counts - n * weights) < 3 * np.sqrt(n * weights * (1 - weights))).all()
    # Neighbours are independent: pairs come as often as products say.
    first = domains == 0
    assert abs((first[1:] & first[:-1]).mean() - .67 ** 2) < 3 * math.sqrt(.67 ** 2 * .33 * 4 / n)
    assert (domain_of(np.arange(n), weights, seed ^ 1) != domains).any()


def test_a_sample_has_its_domain_whatever_is_asked_with_it():
    samples = np.array([2**40, 5, 0, 7, 5])
    together = domain_of(samples, WEIGHTS, 3)
    assert together.tolist() == [domain_of([k], WEIGHTS, 3).item() for k in samples]
    assert set(domain_of(np.arange(1000), (0, 1, 0), 3)) == {1}
    # Raising a weight takes samples from other domains, and gives none of this one's away.
    more = domain_of(np.arange(1000), (.2, .8), 0)
    less = domain_of(np.arange(1000), (.4, .6), 0)
    assert (more >= less).all() and (more != less).any()


def test_batches_take_rows_of_the_drawn_text_and_ranks_share_them():
    """data.batch: a sample's window is the one of its number in the endless row of its text."""
    texts = [np.arange(start, start + 1000) for start in (0, 10_000, 50_000)]
    mixture, weights = data.Mixture(texts, (1, 1, 1)), (.5, .3, .2)

    def batch(rank, world, weights, step=2):
        return data.batch(mixture, 8, 1, step, 0, rank, world=world, micro_batch=32 // world, micro_steps=1,
                          weights=weights)[0]

    whole = batch(0, 1, weights)
    samples = np.arange(64, 96)
    for sample, domain, row in zip(samples, domain_of(samples, weights, 1).tolist(), whole.tolist()):
        [expected] = data.read_samples(texts[domain], 8, (1, domain), np.array([sample]))
        assert row == expected[:8].tolist()
    assert whole.equal(torch.cat([batch(rank, 4, weights) for rank in range(4)]))
    assert not whole.equal(batch(0, 1, (.2, .3, .5))) and not whole.equal(batch(0, 1, None))
    assert len({*(whole[:, 0] // 10_000).tolist()}) == 3
    # Within as many samples as a text has windows none of its windows comes twice.
    epoch, _ = data.batch(mixture, 8, 1, 0, 0, micro_batch=124, micro_steps=1, weights=weights)
    assert len(epoch[:, 0].unique()) == 124
