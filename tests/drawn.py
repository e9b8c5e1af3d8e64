"""Texts of a drawn figure that cannot be read: they overlap, are clipped or are too small."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

LEAST = 7.0  # points
_SLACK = 1.0  # pixels by which boxes may touch: they hold the space above small letters


def faults_of(figure: Figure) -> list[str]:
    """What is wrong with the texts of a figure, as it is laid out when it is saved."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # as those who save it do: the layout is right the second time
    canvas.draw()
    page = figure.bbox
    texts = [text for text in _texts(figure) if text.get_visible() and text.get_text().strip()]
    boxes: list[tuple[Text, Bbox]] = [(text, text.get_window_extent(canvas.get_renderer())) for text in texts]
    faults = [
        f"{text.get_text()!r} has {text.get_fontsize():g} points"
        for text in texts
        if text.get_fontsize() < LEAST
    ]
    for text, box in boxes:
        low, high = page.min - _SLACK, page.max + _SLACK
        if (box.min < low).any() or (box.max > high).any():
            faults.append(f"{text.get_text()!r} is clipped")
    for (text, box), (other, beside) in combinations(boxes, 2):
        width = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        height = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        if width > _SLACK and height > _SLACK:
            faults.append(f"{text.get_text()!r} overlaps {other.get_text()!r}")
    return faults


def _texts(figure: Figure) -> Iterator[Text]:
    """Texts that are shown: not those of axes that are off, nor ticks outside of the range that is shown."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        if axes.get_visible():
            yield from _texts_of(axes)


def _texts_of(axes: Axes) -> Iterator[Text]:
    yield from (*axes.texts, axes.title, axes._left_title, axes._right_title)  # matplotlib has no public name
    legend = axes.get_legend()
    if legend is not None:
        yield from legend.get_texts()
    for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
        first, last = sorted(axis.get_view_interval())
        yield axis.label
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if first <= tick.get_loc() <= last:
                yield from (tick.label1, tick.label2)
