from types import SimpleNamespace

import torch

from ununennium.training.transfer import Transfer


def test_on_a_cpu_a_batch_is_passed_through():
    batch = {"image": torch.randn(2, 3), "crs": "EPSG:32633", "more": [torch.zeros(1)]}
    moved = Transfer(torch.device("cpu"))(batch)
    assert moved["image"] is batch["image"]
    assert moved["crs"] == "EPSG:32633"


def test_beside_the_computation_it_is_copied_on_one_stream_and_waited_for_on_the_other(monkeypatch):
    """The order of what CUDA is told, with stand-ins for its streams; what it does then is for tests/gpu."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            told.append(f"enter {self.name}")

        def __exit__(self, *error):
            told.append(f"leave {self.name}")

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class OnDevice(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            told.append(f"recorded on {stream.name}")

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    moved = [torch.zeros(2).as_subclass(OnDevice), {"mask": (torch.zeros(1).as_subclass(OnDevice), "text")}]
    monkeypatch.setattr("ununennium.training.transfer.to_device", lambda batch, device: told.append("copy") or moved)
    transfer = Transfer(torch.device("cpu"))
    transfer._stream, transfer.device = Stream("copies"), SimpleNamespace(type="cuda")
    assert transfer("batch") is moved
    assert told == [
        "enter copies", "copy", "leave copies", "compute waits for copies", *["recorded on compute"] * 2,
    ]  # fmt: skip
