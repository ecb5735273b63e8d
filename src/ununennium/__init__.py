"""Training for Earth-observation deep learning on PyTorch: exact, resumable, fast."""

__version__ = "0.1.0.dev0"
