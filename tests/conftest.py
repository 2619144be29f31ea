"""Two threads for every test: more only wait for each other on small tensors."""

import torch

torch.set_num_threads(2)
