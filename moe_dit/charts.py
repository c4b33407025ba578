"""Charts of characters, for a terminal: curves of braille dots, and a heat map of experts' load."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.text import Text

Points = Sequence[tuple[float, float]]  # steps, rising, and finite values

FAINT = "bright_black"
LABEL = 8  # columns before a chart: a number and a space
BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # a cell's bits, by column and row from the top
HEIGHTS = "▁▂▃▄▅▆▇"  # of a share, where there are no colours; a quarter of an even one to four times
EVEN, OVER, UNDER = (62, 66, 74), (74, 134, 232), (217, 115, 26)  # red, green, blue; the report's colours
BEGINNING = 0.02  # share of the steps whose values may lie above the chart: they would flatten all that follows


def chart(
    title: str,
    curves: Sequence[tuple[Points, str, str]],
    span: tuple[int, int],
    width: int,
    height: int,
    colours: bool = True,
) -> Text:
    """Curves over steps in one frame, with the frame's bounds beside it.

    The scale is logarithmic where values are positive and span more than a decade.

    Args:
        title: what is shown; it stands on top.
        curves: points, style and letter of each; where there are several and no colours, they are drawn in letters.
        span: first and last step.
        width, height: of all, in columns and lines; at least 20 and 4.
        colours: whether the terminal has colours.
    """
    columns, rows = width - LABEL, height - 2
    curves = [(_thinned(curve, columns), style, letter) for curve, style, letter in curves]
    points = [point for curve, _, _ in curves for point in curve]
    if not points:
        return Text(f"{title}\n", "bold").append("no step yet" + "\n" * (height - 2), FAINT)
    first, last = span
    later = [y for x, y in points if x - first >= BEGINNING * (last - first)]
    low, high = min(y for _, y in points), max(later or [y for _, y in points])
    if low >= high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    scale = math.log if low > 0 and high > 10 * low else float
    dots: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], int] = {}
    for number, (curve, _, _) in enumerate(curves):
        placed = [
            (
                round((x - first) / ((last - first) or 1) * (2 * columns - 1)),
                round((scale(high) - scale(min(y, high))) / (scale(high) - scale(low)) * (4 * rows - 1)),
            )
            for x, y in curve
        ]
        for at, down in _line(placed):
            cell = (down // 4, at // 2)
            dots[cell] = dots.get(cell, 0) | DOTS[at % 2][down % 4]
            owners[cell] = number
    text = Text(f"{title}\n", "bold", no_wrap=True)
    for row in range(rows):
        bound = {0: f"{high:.4g}", rows - 1: f"{low:.4g}"}.get(row, "")
        text.append(f"{bound:>{LABEL - 1}} ", FAINT)
        for column in range(columns):
            if (row, column) not in dots:
                text.append(" ")
                continue
            _, style, letter = curves[owners[row, column]]
            drawn = letter if len(curves) > 1 and not colours else chr(BRAILLE + dots[row, column])
            text.append(drawn, style)
        text.append("\n")
    right = f"step {last:,.0f}"
    return text.append(f"{'':{LABEL}}{first:<,.0f}".ljust(width - len(right)) + right, FAINT)


def _thinned(curve: Points, most: int) -> Points:
    """The means of neighbouring points, at most ``most``: a band of dots shows less than a line."""
    count = min(most, len(curve))
    bounds = [i * len(curve) // count for i in range(count + 1)] if count else []
    return [tuple(map(fmean, zip(*curve[a:b], strict=True))) for a, b in pairwise(bounds)]  # type: ignore[misc]


def _line(placed: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """The dots of the lines between neighbouring points (columns, rows)."""
    found = set(placed[-1:])
    for (x0, y0), (x1, y1) in pairwise(placed):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        found |= {(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)) for i in range(steps)}
    return found


def heat_map(load: Sequence[Sequence[float]], width: int, colours: bool = True) -> Text:
    """Each expert's share of its layer's tokens beside an even share, a line a layer; "x" where it is none.

    Args:
        load: a layer's shares, which sum to 1; layers may have other numbers of experts.
        width: columns; where experts are too many for it, a cell is the mean of some neighbours.
        colours: whether the terminal has colours; otherwise heights show the share.
    """
    label = len(str(len(load) - 1)) + 1
    most = max(len(layer) for layer in load)
    together = math.ceil(most / (width - label))  # experts of a cell
    wide = max(1, min(3, (width - label) // math.ceil(most / together)))
    text = Text(no_wrap=True)
    for row, layer in enumerate(load):
        text.append(f"{row:>{label - 1}} ", FAINT)
        for start in range(0, len(layer), together):
            shares = layer[start : start + together]
            ratio = sum(shares) / len(shares) * len(layer)
            _cell(text, ratio, min(shares) <= 0, wide, colours)
        text.append("\n")
    text.append(" " * label)
    for ratio, name in ((0.0, "no token"), (0.25, "a quarter"), (1.0, "even"), (4.0, "4 times its share")):
        _cell(text, ratio, ratio == 0, 1, colours)
        text.append(f" {name}  ", FAINT)
    text.rstrip()
    return text.append(f"; {together} experts a cell", FAINT) if together > 1 else text


def _cell(text: Text, ratio: float, dead: bool, wide: int, colours: bool) -> None:
    """Add a cell: full colour, or height, from a factor of 4 to even."""
    place = max(-1.0, min(1.0, math.log2(ratio) / 2 if ratio > 0 else -1.0))
    drawn = "x" if dead else " " if colours else HEIGHTS[round((place + 1) / 2 * (len(HEIGHTS) - 1))]
    end = OVER if place > 0 else UNDER
    red, green, blue = (round(a + (b - a) * abs(place)) for a, b in zip(EVEN, end, strict=True))
    text.append(drawn.center(wide) if dead or colours else drawn * wide, f"bold white on rgb({red},{green},{blue})")
