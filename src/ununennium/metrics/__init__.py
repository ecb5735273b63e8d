"""Metrics from exact integer counts, usable in anybody's loop: ``update``, ``compute``, ``reset``."""

from ununennium.metrics.classification import Dice, IoU
from ununennium.metrics.collection import Metric, MetricCollection
from ununennium.metrics.confusion import ConfusionMatrix

__all__ = ["ConfusionMatrix", "Dice", "IoU", "Metric", "MetricCollection"]
