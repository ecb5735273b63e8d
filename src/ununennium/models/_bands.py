"""Bands by name: which filter of a pretrained first layer each band of the input takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ununennium._band_names import same_band

Unmatched = Literal["raise", "mean", "zero"]

RGB = ("red", "green", "blue")


def check_bands(bands: Sequence[str], in_channels: int) -> tuple[str, ...]:
    """Return the bands as a tuple.

    Raises
    ------
    TypeError
        If they are not a sequence of names.
    ValueError
        If there is not one name a channel, or a name is there twice.
    """
    if isinstance(bands, str) or not all(isinstance(band, str) for band in bands):
        raise TypeError(f'bands must be a sequence of names such as ["B2", "B3", "B4"], got {bands!r}.')
    if len(bands) != in_channels:
        raise ValueError(
            f"bands has {len(bands)} names, but in_channels is {in_channels}: name each band of the input once, in "
            f"the input's order. Got {_listed(bands)}."
        )
    _check_different(bands, [same_band(band) for band in bands])
    return tuple(bands)


@dataclass(frozen=True)
class FilterMap:
    """What each band of the input takes from a pretrained first layer.

    Attributes
    ----------
    places : tuple of (int or None)
        Of each input band its namesake's place among the pretrained bands; None if it has none.
    num_source : int
        Number of pretrained bands.
    unmatched : "mean" or "zero"
        What a band without a namesake takes: the mean of all pretrained bands' filters, or zeros.
    """

    places: tuple[int | None, ...]
    num_source: int
    unmatched: Unmatched

    @property
    def changes_nothing(self) -> bool:
        """Whether the input has the pretrained bands in their order."""
        return self.places == tuple(range(self.num_source))

    def __call__(self, filters: Tensor) -> Tensor:
        """Return filters (O, in_channels, …) from pretrained ones (O, num_source, …), which are copied as they are."""
        other = filters.mean(dim=1) if self.unmatched == "mean" else torch.zeros_like(filters[:, 0])
        return torch.stack([other if place is None else filters[:, place] for place in self.places], dim=1)


def match_bands(
    bands: tuple[str, ...] | None,
    in_channels: int,
    source: str,
    source_bands: tuple[str, ...],
    unmatched: Unmatched,
    *,
    sentinel2: bool,
) -> FilterMap:
    """Find each input band among the pretrained bands by name.

    Parameters
    ----------
    bands : tuple of str, optional
        The input's bands; None says that they are the pretrained ones in their order.
    in_channels : int
        How many there are.
    source : str
        What the pretrained weights are called.
    source_bands : tuple of str
        Their bands, in the order of the filters.
    unmatched : str
        What to do with an input band that has no namesake.
    sentinel2 : bool
        Whether "red" and the like are names of Sentinel-2's bands.

    Raises
    ------
    ValueError
        If a band has no namesake and `unmatched` is "raise"; if two are the same band; if the bands are not named
        and are not as many as the pretrained.
    """
    if bands is None:
        if in_channels != len(source_bands):
            raise ValueError(
                f"{source} has filters for {len(source_bands)} bands ({', '.join(source_bands)}), but in_channels is "
                f"{in_channels}. Name the input's bands, bands=[...], and each takes the filters of its namesake."
            )
        return FilterMap(tuple(range(in_channels)), in_channels, unmatched)
    known = {same_band(band, sentinel2=sentinel2): place for place, band in enumerate(source_bands)}
    codes = [same_band(band, sentinel2=sentinel2) for band in bands]
    _check_different(bands, codes)
    places = tuple(known.get(code) for code in codes)
    if unmatched == "raise" and None in places:
        matched = [band for band, place in zip(bands, places, strict=True) if place is not None]
        missing = [band for band, place in zip(bands, places, strict=True) if place is None]
        raise ValueError(
            f"{len(missing)} of {len(bands)} bands have no namesake in {source}. Unmatched: {_listed(missing)}. "
            f"Matched: {_listed(matched)}. Its bands: {_listed(source_bands)}. Correct the names, or choose what "
            'such a band starts from: unmatched="mean" (the mean of all the filters) or unmatched="zero".'
        )
    return FilterMap(places, len(source_bands), unmatched)


def check_unmatched(unmatched: str) -> None:
    """Raise a ValueError if this is no policy for bands without a namesake."""
    if unmatched not in get_args(Unmatched):
        raise ValueError(f"unmatched must be one of {', '.join(map(repr, get_args(Unmatched)))}, got {unmatched!r}.")


def _check_different(bands: Sequence[str], codes: Sequence[str]) -> None:
    for code in codes:
        alike = [band for band, other in zip(bands, codes, strict=True) if other == code]
        if len(alike) > 1:
            raise ValueError(f"bands must name each band once, but {' and '.join(map(repr, alike))} are both {code}.")


def _listed(bands: Sequence[str]) -> str:
    return ", ".join(bands) or "none"
