import pytest

from bench import timing


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    """The limits (a matrix product, a copy) at toy size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROWS", {"cpu": 512, "gpu": 256})
        patch.setattr(timing, "MEGABYTES", {"cpu": 1, "gpu": 1})
        yield
