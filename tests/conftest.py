"""Two threads for every test: more only wait for each other on small tensors, and two do where tests run side by side.

Triton's interpreter where no GPU is.
"""

import os
from collections.abc import Iterator

import pytest
import torch

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported


@pytest.fixture(autouse=True)
def threads_are_put_back() -> Iterator[None]:
    """Commands set them for their process, which here goes on."""
    yield
    torch.set_num_threads(THREADS)
