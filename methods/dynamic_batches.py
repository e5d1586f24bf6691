"""Dynamic batch loading: texts on which the model is furthest behind a reference loss come more often.

    python train.py --data prose.jsonl code.jsonl --init X --plan scratch --reference auto
    python -m pytest tests/methods/test_dynamic_batches.py

Sheared LLaMA (arXiv 2310.06694, section 2.2) trains on several domains at once. After every
evaluation the weight of each domain grows with its excess loss (DoReMi's rule, arXiv 2305.10429):

    new = softmax(log w + eta · (loss - reference)),   w = (1 - floor) · new + floor / domains

The paper writes max(loss - reference, 0); its released code does not clip, nor does `reweigh`. The
release draws domains from a random number generator without a seed, so that a stopped run goes on
with other batches. Here a hash of the sample's number draws (`domain_of`): a batch is a pure function
of (seed, step, weights). Not here: reading windows (data.py), when texts are
weighed and where the references come from (train.py).
"""
import numpy as np


def reweigh(weights, losses, reference, eta=1.0, floor=1e-4):
    """The domains' next weights (D,), which sum to 1, from their weights, their losses in nats per token
    and the reference losses, (D,) each."""
    logits = np.log(np.asarray(weights, np.float64)) + eta * np.subtract(losses, reference)
    new = np.exp(logits - logits.max())
    return (1 - floor) * new / new.sum() + floor / len(new)


def domain_of(samples, weights, seed):
    """The domain of each sample: numbers (N,) -> (N,) int64. Sample k lies in domain d with the
    probability weights[d] / sum(weights), whatever the other samples are."""
    edges = np.cumsum(np.asarray(weights, np.float64))
    domain = np.searchsorted(edges / edges[-1], uniform(samples, seed), side="right")
    return domain.astype(np.int64)


def uniform(samples, seed):
    """A number in [0, 1) for each sample (N,), by splitmix64: the state of the generator after so many
    steps from the seed, mixed."""
    # uint64 wraps modulo 2^64.
    state = np.asarray(samples, np.uint64) + np.uint64(1)
    state = mixed(np.uint64([seed])) + state * np.uint64(0x9E3779B97F4A7C15)
    # The upper 53 bits are what a float64 holds.
    return (mixed(state) >> np.uint64(11)) * 2.0**-53


def mixed(x):
    """splitmix64's mixer, which can be undone: (N,) uint64 -> (N,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
