"""Predict a scene slowly, saying when a batch begins; ends by a signal.

Arguments: source, destination.
"""

import sys
import time

from torch import nn

from ununennium.prediction import predict_scene


class Slow(nn.Conv2d):
    def forward(self, images):
        print("batch", flush=True)
        time.sleep(0.2)
        return super().forward(images)


predict_scene(Slow(3, 4, 1), *sys.argv[1:], tile=64, batch_size=1, device="cpu", progress=False)
