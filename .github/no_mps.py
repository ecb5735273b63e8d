"""A pytest plugin: hosted Macs have a GPU that PyTorch finds and can't allocate on, so leave it alone."""

import torch

torch.backends.mps.is_available = lambda: False
