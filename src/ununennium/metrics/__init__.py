"""Metrics from exact integer counts, usable in anybody's loop: ``update``, ``compute``, ``reset``."""

from ununennium.metrics.collection import Metric, MetricCollection
from ununennium.metrics.confusion import ConfusionMatrix, Dice, IoU

__all__ = ["ConfusionMatrix", "Dice", "IoU", "Metric", "MetricCollection"]
