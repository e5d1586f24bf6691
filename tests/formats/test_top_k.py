"""A folder of a teacher's records that somebody sent: whatever its files say, it is a sentence, and no index leads out
of the vocabulary."""
import json

import numpy as np
import pytest

from common import UserError
from formats import top_k

IDENTITY = {"vocab_size": 100, "top": 3, "block_size": 4}


@pytest.mark.parametrize("changes", [
    dict(samples=-1), dict(samples=0), dict(samples="3"), dict(samples=2.5), dict(samples=1e999), dict(samples=True),
    dict(samples=10**30), dict(block_size=-3), dict(block_size=0), dict(block_size=2**40), dict(top=0),
    dict(top=2**40), dict(vocab_size=0), dict(vocab_size="a")])
def test_an_index_that_counts_wrongly_is_refused(tmp_path, changes):
    (tmp_path / "teacher.json").write_text(json.dumps({**top_k.FORMAT, **IDENTITY, "samples": 2, **changes}))
    (tmp_path / "teacher.bin").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="is damaged or of another version .*delete|has 1,000 bytes, and .* take"):
        top_k.CachedTeacher(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("indices", 100), ("log_probs", np.nan), ("log_probs", np.inf), ("log_probs", -np.inf), ("log_probs", 5),
    ("tail", np.nan), ("tail", -0.5), ("tail", 1.5), ("target", np.nan), ("target", -np.inf), ("target", 1)])
def test_records_that_no_teacher_writes_are_refused(tmp_path, field, value):
    records = np.zeros(2, top_k.record_type(IDENTITY))
    records["log_probs"] = np.log(0.3)
    records["tail"] = 0.1
    for change in (False, True):
        if change:
            records[field][1, 2] = value
        for record in records:
            record["digest"] = top_k.digest_of(record)
        top_k.append(tmp_path, IDENTITY, 0, records)
        cache = top_k.CachedTeacher(tmp_path)
        assert cache.read(0, 1 if change else 2).indices.shape[1:] == (4, 3)
    with pytest.raises(UserError, match="samples 0 to 1 in .* hold no probabilities of 100 tokens; delete the folder"):
        cache.read(0, 2)
