"""Losses that are exact on nodata. Each works in anybody's loop and says what it averages over."""

from ununennium.losses.dice import DiceLoss

__all__ = ["DiceLoss"]
