"""Models by name: `create_model("unet_resnet50", in_channels=12, num_classes=10)`."""

from ununennium.models._raster import RasterModel
from ununennium.models._registry import create_model, list_models, register_model

__all__ = ["RasterModel", "create_model", "list_models", "register_model"]
