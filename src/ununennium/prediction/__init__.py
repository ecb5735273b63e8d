"""A whole scene to a map: tiles with overlap, blended, in bounded memory."""

from ununennium.prediction._model import load_model
from ununennium.prediction._predict import predict_scene

__all__ = ["load_model", "predict_scene"]
