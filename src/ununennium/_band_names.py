"""When two names mean the same band: one rule for scenes, weights and models."""

import re

# STAC's common names of Sentinel-2's bands, and others that mean one band only: neither "rededge" nor "swir" does.
_SENTINEL2 = {
    "COASTAL": "B1",
    "BLUE": "B2",
    "GREEN": "B3",
    "RED": "B4",
    "REDEDGE1": "B5",
    "REDEDGE71": "B5",
    "REDEDGE2": "B6",
    "REDEDGE75": "B6",
    "REDEDGE3": "B7",
    "REDEDGE78": "B7",
    "NIR": "B8",
    "NIR8": "B8A",
    "NIR9": "B9",
    "CIRRUS": "B10",
    "SWIR1": "B11",
    "SWIR16": "B11",
    "SWIR2": "B12",
    "SWIR22": "B12",
}

_ZEROS = re.compile(r"(?<![0-9])(?<![0-9][.,])0+(?=[0-9])")  # in front of a number; those of 650.05 nm belong to it


def same_band(name: str, *, sentinel2: bool = False) -> str:
    """Return the form in which band names are compared: capitals, no leading zeros, so that b08 is B8.

    With `sentinel2` a common name is the Sentinel-2 band that it means: red is B4.
    """
    code = _ZEROS.sub("", name.strip()).upper()
    return _SENTINEL2.get(code, code) if sentinel2 else code
