"""Two threads for every test: more only wait for each other on small tensors. Triton's interpreter where no GPU is."""

import os

import torch

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
