"""What the values of bands are like: mean, standard deviation, range and percentiles, in one pass over rasters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ununennium.data._saved import Saved
from ununennium.data._scenes import as_scenes
from ununennium.data.chips import Chips
from ununennium.data.scene import Scene

_CODES = 2**16


class BandStatistics(Saved):
    """Counts, moments and a histogram of each band's valid pixels; those of several rasters can be added.

    Values of rasters with integers of 8 or 16 bits are counted one by one, so that everything is exact. Values of any
    other type are counted by the upper 16 bits of their float32 (ordered as the numbers are), so that percentiles are
    off by 2⁻⁸ of their value at most; minimum and maximum are exact, mean and standard deviation are float64.

    Parameters
    ----------
    bands : sequence of str
    dtype : str
        NumPy's name of the rasters' type.

    Attributes
    ----------
    bands : tuple of str
    dtype : numpy.dtype
    is_exact : bool
        Whether values are counted one by one: integers of 8 or 16 bits.
    count : int
        Valid pixels.
    mean, std, min, max : tuple of float
        By band; std is the population's. NaN without a pixel.
    """

    _name = "these are no statistics"

    def __init__(self, bands: Sequence[str], dtype: str) -> None:
        self.bands: tuple[str, ...] = tuple(bands)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.is_exact: bool = self.dtype.kind in "ui" and self.dtype.itemsize <= 2
        self.count: int = 0
        self._histogram = np.zeros((len(self.bands), _CODES), np.int64)
        self._mean = np.zeros(len(self.bands))
        self._squares = np.zeros(len(self.bands))  # sum of squared distances from the mean
        self._range = np.stack([np.full(len(self.bands), math.inf), np.full(len(self.bands), -math.inf)])

    def update(self, values: NDArray[Any]) -> None:
        """Take up pixels.

        Parameters
        ----------
        values : ndarray (C, N)
            Of the statistics' bands and type, finite.

        Raises
        ------
        ValueError
            If they are of another shape or type, or not finite; then none is taken up.
        """
        expected = f"values must be ({len(self.bands)}, N) in {self.dtype}, a row for each band"
        if values.ndim != 2 or len(values) != len(self.bands):
            raise ValueError(f"{expected}, got {values.shape}: give the pixels of {', '.join(self.bands)}")
        if values.dtype != self.dtype:
            raise ValueError(f"{expected}, got {values.dtype}: make the statistics with dtype={values.dtype.name!r}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{expected}, and finite, got NaN or infinite ones: leave pixels without data out")
        if values.shape[1] == 0:
            return
        part = BandStatistics(self.bands, self.dtype.name)
        part.count = values.shape[1]
        for band, each in enumerate(values):
            part._histogram[band] = np.bincount(_codes(each, self.is_exact), minlength=_CODES)
            if not self.is_exact:
                exact = each.astype(np.float64)
                part._mean[band] = exact.mean()
                part._squares[band] = np.square(exact - part._mean[band]).sum()
                part._range[:, band] = exact.min(), exact.max()
        self.merge(part)

    def merge(self, other: "BandStatistics") -> None:
        """Take up the pixels of other statistics.

        Counts are added. Means and squares of floats are joined as Chan, Golub and LeVeque do (Algorithms for computing
        the sample variance, The American Statistician 37, 1983, doi:10.2307/2683386).

        Raises
        ------
        ValueError
            If bands or types differ.
        """
        for what in ("bands", "dtype"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(
                    f"statistics differ in {what}: {getattr(self, what)} and {getattr(other, what)} can't be "
                    "merged: measure the same bands of rasters of one type"
                )
        if other.count == 0:
            return
        total = self.count + other.count
        distance = other._mean - self._mean
        self._mean = self._mean + distance * (other.count / total)
        self._squares = self._squares + other._squares + distance**2 * (self.count * other.count / total)
        self._range = np.stack(
            [np.minimum(self._range[0], other._range[0]), np.maximum(self._range[1], other._range[1])]
        )
        self._histogram = self._histogram + other._histogram
        self.count = total

    def __add__(self, other: "BandStatistics") -> "BandStatistics":
        both = BandStatistics(self.bands, self.dtype.name)
        both.merge(self)
        both.merge(other)
        return both

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band."""
        return tuple(self._moments(band)[0] for band in range(len(self.bands)))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each band, of the population."""
        return tuple(self._moments(band)[1] for band in range(len(self.bands)))

    @property
    def min(self) -> tuple[float, ...]:
        """Smallest value of each band."""
        return self._extreme(0)

    @property
    def max(self) -> tuple[float, ...]:
        """Largest value of each band."""
        return self._extreme(1)

    def percentile(self, q: float) -> tuple[float, ...]:
        """Return the q-th percentile of each band, q from 0 to 100, interpolated as `numpy.percentile` does.

        Raises
        ------
        ValueError
            If q is no percentage.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q must be a percentage, from 0 to 100, got {q!r}")
        if self.count == 0:
            return (math.nan,) * len(self.bands)
        place = q / 100 * (self.count - 1)
        low = math.floor(place)
        found = []
        for band, (smallest, largest) in enumerate(zip(self.min, self.max, strict=True)):
            cumulated = np.cumsum(self._histogram[band])
            codes = np.searchsorted(cumulated, [low, min(low + 1, self.count - 1)], side="right")
            below, above = np.clip(_values(codes, self.dtype, self.is_exact), smallest, largest).tolist()
            found.append(below + (above - below) * (place - low))
        return tuple(found)

    def __repr__(self) -> str:
        return f"BandStatistics({len(self.bands)} bands, {self.dtype}, {self.count:,} pixels)"

    def __str__(self) -> str:
        wide = max(map(len, ["band", *self.bands]))
        columns = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        columns |= {f"{q}%": self.percentile(q) for q in (2, 50, 98)}
        lines = [f"{'band':<{wide}}" + "".join(f"{name:>12}" for name in columns)]
        for band, name in enumerate(self.bands):
            lines.append(f"{name:<{wide}}" + "".join(f"{column[band]:>12.6g}" for column in columns.values()))
        return "\n".join(lines)

    def _state(self) -> dict[str, Any]:
        histograms = []
        for counts in self._histogram:
            used = np.flatnonzero(counts)
            first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
            histograms.append({"first": first, "counts": counts[first:stop].tolist()})
        state: dict[str, Any] = {"bands": self.bands, "dtype": self.dtype.name, "count": self.count}
        if self.count:  # for people and other programs; only what follows is read back
            state |= {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        if self.count and not self.is_exact:
            state["moments"] = [self._mean.tolist(), self._squares.tolist(), *self._range.tolist()]
        return state | {"histograms": histograms}

    @classmethod
    def _of_state(cls, state: Mapping[str, Any]) -> Self:
        made = cls(state["bands"], state["dtype"])
        made.count = int(state["count"])
        for counts, each in zip(made._histogram, state["histograms"], strict=True):
            counts[each["first"] : each["first"] + len(each["counts"])] = each["counts"]
        if "moments" in state:
            mean, squares, smallest, largest = (np.array(row, np.float64) for row in state["moments"])
            made._mean, made._squares, made._range = mean, squares, np.stack([smallest, largest])
        return made

    def _moments(self, band: int) -> tuple[float, float]:
        if self.count == 0:
            return math.nan, math.nan
        if not self.is_exact:
            return float(self._mean[band]), math.sqrt(self._squares[band] / self.count)
        codes = np.flatnonzero(self._histogram[band])
        values = _values(codes, self.dtype, True).astype(np.int64).tolist()
        counts = self._histogram[band, codes].tolist()
        total = sum(value * count for value, count in zip(values, counts, strict=True))  # Python's, never too large
        squares = sum(value * value * count for value, count in zip(values, counts, strict=True))
        return total / self.count, math.sqrt((self.count * squares - total * total) / (self.count * self.count))

    def _extreme(self, which: int) -> tuple[float, ...]:
        if self.count == 0:
            return (math.nan,) * len(self.bands)
        if not self.is_exact:
            return tuple(self._range[which].tolist())
        codes = np.array([np.flatnonzero(counts)[-which] for counts in self._histogram])
        return tuple(_values(codes, self.dtype, True).tolist())


def band_statistics(data: Chips | Scene | Sequence[Scene], bands: Sequence[str | int] | None = None) -> BandStatistics:
    """Return statistics of bands over valid pixels, reading each pixel once, in bounded memory.

    Parameters
    ----------
    data : Chips, Scene or sequence of Scene
        For chips: every pixel that is in any of them, counted once; for chips at random, in any that could be drawn. So
        those of a training region never see the others.
    bands : sequence of str or int, optional
        By default those of the chips, or all of the first scene. A pixel counts where these have data.

    Raises
    ------
    ValueError
        If a band is unknown, or no pixel is valid.

    Examples
    --------
    >>> statistics = band_statistics(train)  # doctest: +SKIP
    >>> model = RasterModel(network, train.bands, statistics.mean, statistics.std)  # doctest: +SKIP
    """
    scenes = data.scenes if isinstance(data, Chips) else as_scenes(data)
    if isinstance(data, Chips) and bands is None:
        bands = data.bands
    names = [scenes[0].bands[index] for index in scenes[0].band_indices(bands)]
    dtype = np.result_type(*(scene.dtype for scene in scenes))
    found = BandStatistics(names, dtype.name)
    for values in _values_of(data, scenes, names):
        found.update(values.astype(dtype, copy=False))
    if found.count == 0:
        raise ValueError(
            f"no pixel of {scenes[0]}{' and the others' if len(scenes) > 1 else ''} has data in all of the bands "
            f"{', '.join(names)}: leave out bands without data, or correct the files' nodata value"
        )
    return found


def _values_of(data: Any, scenes: Sequence[Scene], names: Sequence[str]) -> Iterator[NDArray[Any]]:
    for number, scene in enumerate(scenes):
        bands = scene.band_indices(names)
        for window in scene._strips():
            wanted = data._covered(number, window) if isinstance(data, Chips) else None
            if wanted is not None and not wanted.any():
                continue
            image, valid = scene.read(window, bands)
            if wanted is not None:
                valid &= wanted
            yield image.reshape(len(bands), -1) if valid.all() else image[:, valid]


def _codes(values: NDArray[Any], is_exact: bool) -> NDArray[Any]:
    """Return numbers from 0 to 65535 in the order of values: the value itself, or the first bits of its float32."""
    if is_exact:
        return values if values.dtype.kind == "u" else values.astype(np.int64) + 2**15
    limit = np.finfo(np.float32).max
    bits = (values.clip(-limit, limit).astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(2**31)) >> np.uint32(16)


def _values(codes: NDArray[Any], dtype: np.dtype[Any], is_exact: bool) -> NDArray[np.float64]:
    """Return the values that codes stand for: themselves, or the middle of those with the same first bits."""
    if is_exact:
        return codes.astype(np.float64) - (2**15 if dtype.kind == "i" else 0)
    first = codes.astype(np.uint32) << np.uint32(16)
    ends = np.stack([first, first | np.uint32(2**16 - 1)])
    bits = np.where(ends >> np.uint32(31) == 1, ends & np.uint32(2**31 - 1), ~ends)
    with np.errstate(invalid="ignore"):
        middle: NDArray[np.float64] = bits.view(np.float32).astype(np.float64).mean(axis=0)
    return middle
