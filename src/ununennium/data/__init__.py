"""Chips of georeferenced rasters for training, spatial splits, and statistics of bands."""

from ununennium.data.chips import Chips
from ununennium.data.scene import Scene, Window
from ununennium.data.split import Region, Split, block_split
from ununennium.data.statistics import BandStatistics, band_statistics

__all__ = ["BandStatistics", "Chips", "Region", "Scene", "Split", "Window", "band_statistics", "block_split"]
