"""Class colours that the colour-blind can tell apart too."""

from __future__ import annotations

# The first seven are Okabe and Ito's; nine were chosen together, and eight more one by one, for the largest distance
# in CIELAB from all others and from white and grey, as seen with normal colour vision, protanopia and deuteranopia
# (simulated after Machado et al. 2009).
_COLORS = """
    0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 c369ff 3c4b00 e10f3c 3c6969 780f78
    003cb4 00ffa5 87003c c3b469 a5f069 00d2e1 d20fb4 ff6987 87693c 87e1b4 785a87 d2873c
"""


# How the lightness of the 24 changes when they come round again: shares of black (below 0) or white mixed in.
_ROUNDS = (0.0, -0.45, 0.5)


def palette(num_classes: int) -> list[str]:
    """Return a colour for each class, "#rrggbb"; after 24 come darker variants, then lighter ones; 72 in all.

    Notes
    -----
    The first seven are those of Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/), without
    black.
    """
    colors = _COLORS.split()
    rounds = (_ROUNDS[i // len(colors) % len(_ROUNDS)] for i in range(num_classes))
    return [_mixed(f"#{colors[i % len(colors)]}", share) for i, share in enumerate(rounds)]


def _mixed(color: str, share: float) -> str:
    """Return a colour with a share of white mixed in, or of black if it is below 0."""
    end = 255 if share > 0 else 0
    return "#" + "".join(f"{round(channel + abs(share) * (end - channel)):02x}" for channel in rgb(color))


def rgb(color: str) -> tuple[int, int, int]:
    """Return red, green and blue, 0 … 255, of "#rrggbb".

    Raises
    ------
    ValueError
        If it is not written so.
    """
    digits = color.removeprefix("#")
    if len(digits) != 6 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
        raise ValueError(f'{color!r} is no colour: write it as "#rrggbb", such as "#1f77b4"')
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
