"""Training curves, one panel per metric, drawn with matplotlib."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Point = tuple[float, float]

_PANEL_INCHES = (4.5, 3.0)
_COLUMNS = 3  # of a legend
_INK, _FAINT, _GRID, _PAGE, _WRONG = "#20242c", "#707783", "#eaecf0", "#f4f5f7", "#c82e2a"
# Distinct for color-blind readers too (Okabe and Ito).
_LINES = ("#0072b2", "#d55e00", "#00946c", "#be5f96", "#cd8a00", "#46a0d7")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of a curve sheet: lines over the same axes."""

    title: str
    lines: Mapping[str, Sequence[Point]]  # name -> (x, y) points in order of x; a non-finite y breaks the line
    x_label: str = "step"
    log_y: bool = False  # logarithmic y axis, on which a y that is not positive breaks the line


def curve_sheet(panels: Sequence[Panel], *, heading: str = "", columns: int | None = None) -> Image.Image:
    """Plots metrics over steps, one panel each, with the last value of each line in the legend.

    Args:
      panels: in row-major order.
      heading: text above everything.
      columns: panels per row; None takes up to three.

    Returns:
      An RGB image.

    Raises:
      ValueError: no panel, a line without a point or with an x that is not finite, more lines in a panel than
        colors, or columns below 1.
    """
    _check(panels)
    columns = min(3, len(panels)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    rows = math.ceil(len(panels) / columns)
    size = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + (0.4 if heading else 0))
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor=_PAGE)
    canvas = FigureCanvasAgg(figure)
    if heading:
        figure.suptitle(heading, color=_INK, fontsize=16, x=0.01, ha="left")
    for place, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, columns, place), panel)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _check(panels: Sequence[Panel]) -> None:
    if not panels:
        raise ValueError("panels is empty; a curve sheet needs at least one")
    for panel in panels:
        if not panel.lines or not all(panel.lines.values()):
            raise ValueError(f"panel {panel.title!r} has no line or a line without a point: {dict(panel.lines)}")
        if not all(math.isfinite(x) for points in panel.lines.values() for x, _ in points):
            raise ValueError(f"panel {panel.title!r} has a point whose x is not finite")
        if len(panel.lines) > len(_LINES):
            raise ValueError(
                f"panel {panel.title!r} has {len(panel.lines)} lines; at most {len(_LINES)} can be told apart"
            )


def _draw(axes: Axes, panel: Panel) -> None:
    legend_rows = math.ceil(len(panel.lines) / _COLUMNS)
    axes.set_title(panel.title, color=_INK, fontsize=11, loc="left", pad=6 + 14 * legend_rows)
    axes.set_xlabel(panel.x_label, color=_FAINT, fontsize=8, loc="right")
    axes.tick_params(which="both", colors=_FAINT, labelsize=8)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID)
    if panel.log_y:
        axes.set_yscale("log")
    drawn = False
    for (name, points), color in zip(panel.lines.items(), _LINES, strict=False):
        x, y = np.array(points, float).T
        y[~np.isfinite(y) | (panel.log_y & (y <= 0))] = np.nan
        known = np.flatnonzero(~np.isnan(y))
        if len(known):
            drawn = True
            # Markers show points without neighbors, which have no line, and the end of each line.
            alone = np.isnan(np.append(y[1:], np.nan)) & np.isnan(np.append(np.nan, y[:-1]))
            marked = sorted({*np.flatnonzero(alone & ~np.isnan(y)).tolist(), int(known[-1])})
            label = f"{name}  {y[known[-1]]:.3g}"
            axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3, markevery=marked, label=label)
    if drawn:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, borderpad=0, handlelength=1,
            ncols=_COLUMNS, frameon=False, fontsize=8, labelcolor=_FAINT,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no finite value", color=_WRONG, transform=axes.transAxes, ha="center", va="center")
