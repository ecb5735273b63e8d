"""Metrics from exact counts and sums, usable in anybody's loop: ``update``, ``compute``, ``reset``."""

from ununennium.metrics.classification import (
    F1,
    AverageAccuracy,
    CohenKappa,
    Dice,
    IoU,
    OverallAccuracy,
    Precision,
    Recall,
)
from ununennium.metrics.collection import Metric, MetricCollection
from ununennium.metrics.confusion import ConfusionMatrix
from ununennium.metrics.regression import MAE, R2, RMSE

__all__ = [
    "F1",
    "MAE",
    "R2",
    "RMSE",
    "AverageAccuracy",
    "CohenKappa",
    "ConfusionMatrix",
    "Dice",
    "IoU",
    "Metric",
    "MetricCollection",
    "OverallAccuracy",
    "Precision",
    "Recall",
]
