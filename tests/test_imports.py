"""Importing is quick and has no side effects."""

import subprocess
import sys

HEAVY = ["segmentation_models_pytorch", "timm", "torchvision", "rasterio", "matplotlib", "tqdm", "jsonargparse",
         "torchmetrics", "safetensors.torch", "torch.distributed.tensor", "sklearn"]  # fmt: skip


def test_importing_the_training_api_imports_torch_and_little_more():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import ununennium.training, ununennium.losses, ununennium.metrics, ununennium.models\n"
        f"print(*[m for m in {HEAVY!r} if m in set(sys.modules) - before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_importing_draws_no_random_numbers_and_changes_no_settings():
    code = (
        "import random, numpy, torch\n"
        "def state(): return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),"
        " torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())\n"
        "before = state()\n"
        "import ununennium.training, ununennium.losses, ununennium.metrics, ununennium.models\n"
        "assert state() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
