import pytest
import torch


@pytest.fixture(autouse=True)
def _few_threads():
    """One thread: tiny models are faster so, and sums do not depend on the machine."""
    torch.set_num_threads(1)
