"""A result as a picture, SVG written by hand: an appliance needs no plotting library for it, and text stays text.

Left: time per token, the percentiles that there are samples for. Right: where a request's time goes, stage after stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from .stages import REQUEST_PARTS

_WIDTH, _ROW, _LABEL, _GAP = 1080, 26, 190, 60
_PANEL = (_WIDTH - 3 * _GAP) / 2
_TOP = 90
# Okabe and Ito's, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKS = ("min", "p50", "p90", "p95", "p99", "max")


def as_svg(result: dict[str, Any]) -> str:
    """The picture's text.

    Args:
        result: of :meth:`Suite.run`.
    """
    tokens = _token_times(result)
    requests = _request_parts(result)
    height = _TOP + _ROW * max(len(tokens), len(requests), 1) + 70
    body = [
        *_title(result),
        *_panel(_GAP, "Time per token, ms", _slowest(tokens), len(tokens)),
        *[line for i, row in enumerate(tokens) for line in _percentile_row(i, row, tokens)],
        *_legend(_GAP, _MARKS, height),
        *_panel(2 * _GAP + _PANEL, "A request, ms (medians)", _longest(requests), len(requests)),
        *[line for i, row in enumerate(requests) for line in _waterfall_row(i, row, requests)],
        *_legend(2 * _GAP + _PANEL, REQUEST_PARTS, height),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _token_times(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Stage and its marks in milliseconds, ascending; only those that there are enough samples for."""
    rows = []
    for stage, metrics in _measured(result):
        summary = metrics.get("itl", {}).get("summary")
        if summary is not None:
            rows.append((stage, [(mark, summary[mark] * 1e3) for mark in _MARKS if summary[mark] is not None]))
    return rows


def _request_parts(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Request and its parts in milliseconds, in their order."""
    rows = []
    for stage, metrics in _measured(result):
        if stage.startswith("request"):
            medians = {name: (metrics[name]["summary"] or {}).get("p50") for name in REQUEST_PARTS}
            rows.append((stage.removeprefix("request "), [(name, (medians[name] or 0.0) * 1e3) for name in medians]))
    return rows


def _measured(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in result["stages"]:
        if stage["measured"]:
            yield stage["name"], {metric["name"]: metric for metric in stage["metrics"]}


def _slowest(tokens: list[tuple[str, list[tuple[str, float]]]]) -> float:
    return _round_up(max((marks[-1][1] for _, marks in tokens), default=0.0))


def _longest(requests: list[tuple[str, list[tuple[str, float]]]]) -> float:
    return _round_up(max((sum(value for _, value in parts) for _, parts in requests), default=0.0))


def _round_up(value: float) -> float:
    """To the next of 1, 2, 4 and 8 times a power of ten: quarters of those are short numbers."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value)


def _title(result: dict[str, Any]) -> list[str]:
    machine, model = result["machine"], result["model"]
    disturbed = [phase for phase, counted in result["counted"].items() if not counted["undisturbed"]]
    warning = f"  EVERY ROUND WAS DISTURBED ({', '.join(disturbed)})" if disturbed else ""
    return [
        _text(_GAP, 28, f"{model['name']}, {model['precision']}", size=17, weight="bold"),
        _text(_GAP, 48, f"{machine['cpu']}, threads: {machine['threads_used']}{warning}", colour="#555"),
    ]


def _panel(left: float, title: str, largest: float, rows: int) -> Iterator[str]:
    """Title, and a scale from nought to ``largest``, in quarters."""
    yield _text(left, _TOP - 18, title, weight="bold")
    if not rows:
        yield _text(left, _TOP + 16, "not measured", colour="#555")
        return
    bottom = _TOP + rows * _ROW
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + _LABEL + share * (_PANEL - _LABEL)
        yield f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>'
        yield _text(x, bottom + 16, f"{share * largest:,g}", anchor="middle", colour="#555")


def _percentile_row(
    index: int, row: tuple[str, list[tuple[str, float]]], rows: list[tuple[str, list[tuple[str, float]]]]
) -> Iterator[str]:
    name, marks = row
    y = _TOP + index * _ROW + _ROW / 2
    scale = _scale(_GAP, _slowest(rows))
    yield _text(_GAP, y + 4, name)
    yield (
        f'<line x1="{scale(marks[0][1]):.1f}" y1="{y}" x2="{scale(marks[-1][1]):.1f}" y2="{y}" '
        f'stroke="#999" stroke-width="2"/>'
    )
    for mark, value in marks:
        colour = _COLOURS[_MARKS.index(mark)]
        title = f"<title>{mark}: {value:.3g} ms</title>"
        yield f'<circle cx="{scale(value):.1f}" cy="{y}" r="5" fill="{colour}">{title}</circle>'


def _waterfall_row(
    index: int, row: tuple[str, list[tuple[str, float]]], rows: list[tuple[str, list[tuple[str, float]]]]
) -> Iterator[str]:
    name, parts = row
    left = 2 * _GAP + _PANEL
    y = _TOP + index * _ROW
    scale = _scale(left, _longest(rows))
    yield _text(left, y + _ROW / 2 + 4, name)
    start = 0.0
    for colour, (part, value) in zip(_COLOURS, parts, strict=False):
        width = scale(start + value) - scale(start)
        yield (
            f'<rect x="{scale(start):.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" fill="{colour}">'
            f"<title>{part}: {value:.3g} ms</title></rect>"
        )
        start += value
    yield _text(scale(start) + 6, y + _ROW / 2 + 4, f"{start:,.3g}" if start < 100 else f"{start:,.0f}")


def _scale(left: float, largest: float) -> Any:
    """Milliseconds to a place in a panel."""
    return lambda value: left + _LABEL + (value / largest if largest else 0.0) * (_PANEL - _LABEL)


def _legend(left: float, names: tuple[str, ...], height: float) -> Iterator[str]:
    for index, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        x = left + index * 80
        yield f'<rect x="{x:.1f}" y="{height - 30}" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 15, height - 21, name)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    colour: str = "#222",
) -> str:
    # Names come from a bundle; characters that XML forbids would make the picture unreadable.
    clean = escape("".join(c for c in text if c.isprintable()))
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{clean}</text>'
    )
