"""The report's drawings: matplotlib figures as SVG text that stands inside an HTML page.

Text stays text, the background is transparent, and the colours are the page's CSS variables (COLOURS), so that a
drawing follows light and dark mode; maps are small images in colours that read on both. The same values give the same
text, and the ids of two drawings never meet.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH = 860  # of a drawing, in units that are a screen's pixels on a page of full width
HALF = 430  # of one that has another beside it, and fills a phone's page
POINTS = 1500  # of a curve: more than a screen can show
FEW = 40  # points; a curve of so few shows each, and is not smoothed

INK = "#6a7078"  # 6a7078", "#dfe3e8", "#2563c9", "#d9731a"
LINE = "#dfe3e8"
ACCENT = "#2563c9"
UNDER = "#d9731a"
# What matplotlib draws in these colours follows the page's variables; more than even is in the accent.
COLOURS = {INK: "var(--faint)", LINE: "var(--line)", ACCENT: "var(--accent)", UNDER: "var(--under)"}
MIDDLE_BLUE = "#4a86e8"  # of images, which cannot follow the page: reads on white and on black
UNKNOWN = (0.5, 0.5, 0.5, 0.3)
LAYERS = LinearSegmentedColormap.from_list("layers", ["#d9731a", "#c0559b", "#4a86e8"])  # first to last layer
STYLE: Any = {
    "font.size": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe-dit",
    "text.parse_math": False,  # names of classes may have a dollar in them
}
# A share beside an even one: a factor of 4 is full colour.
RATIOS = ((0.25, "a quarter or less"), (0.5, "half"), (1.0, "even"), (2.0, "double"), (4.0, "4 times or more"))
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


# --- curves -----------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value's neighbours on both sides, so that a curve's bends stay where they are.

    As many on one side as on the other: up to half a ``window``, a tenth of the place from the start, or what is left
    to the end.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    place = np.arange(len(values))
    half = np.minimum.reduce([place // 10, len(values) - 1 - place, np.full(len(values), max(window, 1) // 2)])
    return ((sums[place + half + 1] - sums[place - half]) / (2 * half + 1)).tolist()


def line_chart(
    steps: Sequence[int], values: Sequence[float], label: str, width: int = WIDTH, log_steps: bool = False
) -> str:
    """Values over steps: raw thin, smoothed thick (few values: one line and its points).

    Args:
        steps: rising, at least one.
        values: finite; the axis is logarithmic where they are positive and span more than a decade.
        label: what they are; it stands at the axis.
        width: of the drawing.
        log_steps: both axes are logarithmic.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((width / 72, (300 if width == WIDTH else 240) / 72), layout="constrained")
        axes = figure.subplots()
        # Rare spikes would flatten everything else.
        ordered = sorted(values)
        low = ordered[0]
        high = ordered[min(len(ordered) - 1, math.ceil(0.999 * len(ordered)))]
        if low > 0 and (high / low > 10 or log_steps):
            low = low / 1.1
            high = high * 1.1
            axes.set_yscale("log")
            # 1, 2 and 5 times powers of ten; powers alone where that is many.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_ylabel(f"{label} (log scale)")
        else:
            margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
            low = float(low - margin)
            high = high + margin
            axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_ylim(low, high)
        if log_steps and steps[0] > 0 and steps[-1] > 10 * steps[0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator())
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDTH else 4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_xlabel("step")
        axes.grid(axis="y")
        if len(values) <= FEW:
            axes.plot(steps, values, "o-", color=ACCENT, linewidth=2, markersize=5, gid="points")
        else:
            stride = max(1, len(values) // POINTS)
            kept = sorted({*range(min(POINTS // 5, len(values))), *range(0, len(values), stride), len(values) - 1})
            smoothed = smooth(values, len(values) // 50)
            for series, thick, opacity, name in ((values, 0.8, 0.4, "raw"), (smoothed, 2, 1, "smooth")):
                shown = [min(max(series[i], low), high) for i in kept]
                at = [steps[i] for i in kept]
                axes.plot(at, shown, color=ACCENT, linewidth=thick, alpha=opacity, gid=name)
        return _svg(figure, f"{label} over steps")


def bars(values: Sequence[float], label: str, x_label: str) -> str:
    """One bar for each equal part of [0, 1] on the x axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH / 72, 240 / 72), layout="constrained")
        axes = figure.subplots()
        edges = np.linspace(0, 1, len(values) + 1)
        axes.bar(edges[:-1], values, 0.92 / len(values), align="edge", color=ACCENT, alpha=0.8)
        axes.set_xlim(0, 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        return _svg(figure, f"{label} over {x_label}")


def lines(
    x: Sequence[float], series: Mapping[str, Sequence[float]], label: str, x_label: str, limit: tuple[float, str]
) -> str:
    """A curve for each layer, first to last from orange to blue.

    Args:
        x: in [0, 1].
        series: a curve's name in the legend -> its values.
        label, x_label: of the axes.
        limit: a value to compare with, and its name; drawn dashed.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH / 72, max(280, 20 * len(series) + 60) / 72), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(series.items()):
            colour = LAYERS(i / max(len(series) - 1, 1))
            axes.plot(x, values, "o-", color=colour, linewidth=2, markersize=3, label=name)
        axes.axhline(limit[0], color=INK, linestyle="--", linewidth=1, label=limit[1])
        low = min([limit[0], *(min(values) for values in series.values())])
        high = max([limit[0], *(max(values) for values in series.values())])
        margin = (high - low) * 0.06 or 0.1
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(0, 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y")
        figure.legend(loc="outside right upper")
        return _svg(figure, f"{label} over {x_label}")


# --- maps of shares ---------------------------------------------------------------------------------------------------


def heat_map(load: Sequence[Sequence[float]]) -> str:
    """Share of tokens of each layer's experts, beside an even share; each cell says its numbers under the pointer.

    An expert without tokens has a cross.

    Args:
        load: a layer's shares, which sum to 1; layers may have other numbers of experts.
    """
    columns = max(len(layer) for layer in load)
    side = min(34.0, (WIDTH - 60) / columns)
    tips = {}
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(1, 1, side * len(load) + 50)
        axes[0].set_xlim(0, (WIDTH - 60) / side)
        axes[0].set_ylim(len(load), 0)
        axes[0].spines[:].set_visible(False)
        axes[0].xaxis.tick_top()
        axes[0].xaxis.set_label_position("top")
        axes[0].set_xlabel("expert", loc="left")
        axes[0].set_ylabel("MoE layer")
        every = math.ceil(26 / side)
        axes[0].set_xticks(np.arange(0, columns, every) + 0.5, [str(i) for i in range(0, columns, every)])
        axes[0].set_yticks(np.arange(len(load)) + 0.5, [str(i) for i in range(len(load))])
        for row, layer in enumerate(load):
            for column, share in enumerate(layer):
                cell = f"cell-{row}-{column}"
                axes[0].add_patch(_cell(column, row, share * len(layer), gid=cell))
                tips[cell] = f"MoE layer {row}, expert {column}: {share:.2%} of the tokens"
                if share == 0:
                    how: Any = {"horizontalalignment": "center", "verticalalignment": "center", "color": UNDER}
                    axes[0].text(column + 0.5, row + 0.5, "x", gid=f"dead-{row}-{column}", **how)
        return _svg(figure, "expert load by layer and expert", tips)


def maps(
    panels: Mapping[str, np.ndarray],
    label: str,
    x_label: str,
    y_label: str,
    *,
    x_span: tuple[float, float] | None = None,
    y_names: Sequence[str] = (),
    columns: int = 5,
    height: float = 0,
) -> str:
    """A map for each layer side by side, all in one scale: the colour is a ratio to what is expected.

    Args:
        panels: a panel's title -> ratios [rows, columns]; NaN is grey.
        label: what is shown, for those who cannot see it.
        x_label, y_label: of the axes.
        x_span: the x axis runs between these; None counts the columns.
        y_names: a name for each row; none counts the rows.
        columns: most panels in a row.
        height: of a panel; 0 for square cells.
    """
    across = min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    rows, wide = next(iter(panels.values())).shape
    square = (min(WIDTH / across, 320) - 20) * rows / wide
    with matplotlib.rc_context(STYLE):
        figure, all_axes = _grid(down, across, down * ((height or square) + 74))
        for i, (axes, (title, ratios)) in enumerate(zip(all_axes, panels.items(), strict=False)):
            left, right = x_span or (-0.5, wide - 0.5)
            axes.imshow(
                _colours(ratios),
                interpolation="none",
                aspect="auto" if height else "equal",
                extent=(left, right, rows - 0.5, -0.5),
            )
            axes.set_title(title)
            axes.spines[:].set_visible(True)
            if x_span:  # without the ends, which would meet the next panel's
                axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if y_names:
                axes.set_yticks(range(rows), y_names if i % across == 0 else [""] * rows)
            else:
                axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            if i + across >= len(panels):
                axes.set_xlabel(x_label)
            if i % across == 0:
                axes.set_ylabel(y_label)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        return _svg(figure, label)


def tiles(panels: Mapping[str, Mapping[str, np.ndarray]], label: str) -> str:
    """A row of small square maps for each layer, in the colours of :func:`maps`.

    Args:
        panels: a row's title -> its tiles: name -> ratios [rows, columns], all of one size.
        label: what is shown, for those who cannot see it.
    """
    most = max(len(row) for row in panels.values())
    side = next(iter(next(iter(panels.values())).values())).shape[1]
    gap = max(1, side // 8)
    tile = min(90.0, (WIDTH - 40) / most * side / (side + gap))
    with matplotlib.rc_context(STYLE):
        figure, all_axes = _grid(len(panels), 1, len(panels) * (tile + 48))
        for axes, (title, row) in zip(all_axes, panels.items(), strict=True):
            for i, ratios in enumerate(row.values()):
                left = i * (side + gap)
                extent = (left, left + side, len(ratios), 0)
                axes.imshow(_colours(ratios), interpolation="none", extent=extent)
                frame = Rectangle((left, 0), side, len(ratios), fill=False, edgecolor=LINE, linewidth=1)
                axes.add_patch(frame)
            axes.set_xlim(0, (WIDTH - 40) / tile * side)
            axes.set_ylim(side, 0)
            axes.set_anchor("W")
            axes.spines[:].set_visible(False)
            axes.set_yticks([])
            axes.xaxis.tick_top()
            axes.xaxis.set_major_locator(FixedLocator([i * (side + gap) + side / 2 for i in range(len(row))]))
            axes.set_xticklabels(list(row))
            axes.set_title(title, loc="left")
        return _svg(figure, label)


def _grid(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with axes in rows and columns, ``height`` high, and below them what the colours of ratios mean."""
    legend_height = 44
    layout = ConstrainedLayoutEngine(w_pad=0.05, wspace=0.03)
    figure = Figure((WIDTH / 72, (height + legend_height) / 72), layout=layout)
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, legend_height))
    above, below = parts
    _legend(below)
    return figure, list(np.ravel(np.asarray(above.subplots(rows, columns))))


def _legend(place: SubFigure) -> None:
    axes = place.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.set_xlim(0, WIDTH * 0.96)
    axes.set_ylim(44, 0)
    axes.set_axis_off()
    x = 0.0
    for ratio, name in RATIOS:
        axes.add_patch(_cell(x, 14, ratio, size=18, gid=f"legend-{ratio}"))
        axes.text(x + 25, 23.5, name, verticalalignment="center")
        x += 165


def _strength(ratio: Any) -> Any:
    """Opacity of a ratio's colour: 0 where it is 1, full from a factor of 4."""
    with np.errstate(divide="ignore"):
        return np.minimum(1.0, np.abs(np.log2(ratio)) / 2)


def _cell(x: float, y: float, ratio: float, *, size: float = 1.0, gid: str) -> Rectangle:
    colour = ACCENT if ratio >= 1 else UNDER
    face = (*to_rgb(colour), float(_strength(ratio)))
    return Rectangle((x, y), size, size, facecolor=face, edgecolor=LINE, linewidth=0.5, gid=gid)


def _colours(ratios: np.ndarray) -> np.ndarray:
    """Ratios [rows, columns] as RGBA: even is transparent, unknown (NaN) is grey."""
    ratios = np.asarray(ratios, float)
    rgba = np.empty((*ratios.shape, 4))
    rgba[..., :3] = np.where(ratios[..., None] >= 1, to_rgb(MIDDLE_BLUE), to_rgb(UNDER))
    rgba[..., 3] = _strength(ratios)
    rgba[np.isnan(ratios)] = UNKNOWN
    return rgba


# --- a figure as text -------------------------------------------------------------------------------------------------


def _svg(figure: Figure, label: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure as an <svg> element for a page.

    Args:
        figure: what to draw.
        label: read out instead of the picture.
        tips: an artist's gid -> the text that appears under the pointer.
    """
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    for prefix, space in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(buffer.getvalue())
    unique = "f" + hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    for child in list(root):  # metadata, and a style sheet that would act on the whole page
        if child.tag == f"{{{SVG}}}metadata" or child.find(f"{{{SVG}}}style") is not None:
            root.remove(child)
    for size in ("width", "height"):  # the page decides; viewBox keeps the shape
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter():
        if tips and element.get("id") in tips:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = tips[element.attrib["id"]]
            element.insert(0, title)
        for name, value in element.attrib.items():
            element.attrib[name] = _attribute(name.rpartition("}")[2], value, unique)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return re.sub(r">\s+<", "><", text)


def _attribute(name: str, value: str, unique: str) -> str:
    """An attribute's value with ids of this figure alone, the page's font, and short numbers."""
    if name == "id":
        return f"{unique}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{unique}-{value[1:]}"
    if name == "d":
        return re.sub(r"\s+", " ", re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}", value)).strip()
    if name == "style":
        return re.sub(r"font-family: [^;]*;?\s*", "", value)
    return value.replace("url(#", f"url(#{unique}-")
