"""Small drawings for the report, as text: box plots and scatter plots in SVG, spectrograms as PNG.

Colours are classes and `currentColor`, so that the page's style decides, by day and by night.
"""

import base64
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 640, 290
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 12, 50


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    step = (high - low or 1.0) / count
    size = 10.0 ** np.floor(np.log10(step))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= step * 0.999)
    return [
        float(round(v / step) * step) + 0.0 for v in np.arange(np.ceil(low / step) * step, high + step * 1e-6, step)
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    margin = max(0.06 * (high - low), 0.1)  # rounding errors stay a flat line
    return low - margin, high + margin


def _frame(y_low: float, y_high: float, y_label: str, title: str) -> tuple[list[str], Callable[[float], float]]:
    y = lambda v: TOP + (y_high - v) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for v in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts, y


def box_plot(groups: Mapping[str, Mapping[str, Sequence[float]]], y_label: str, title: str) -> str:
    """Boxes (quartiles, median; whiskers from the 5th to the 95th percentile) of {group: {series: values}}, side by side."""
    marks = {
        (g, s): np.percentile(values, [5, 25, 50, 75, 95])
        for g, series in groups.items()
        for s, values in series.items()
        if len(values)
    }
    parts, y = _frame(*_range([v for m in marks.values() for v in m]), y_label, title)
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    for k, (group, series) in enumerate(groups.items()):
        middle = LEFT + (k + 0.5) * slot
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{escape(group)}</text>')
        wide = min(34.0, 0.7 * slot / len(series))
        for n, (name, values) in enumerate(series.items()):
            if not len(values):
                continue
            p5, p25, p50, p75, p95 = (y(v) for v in marks[group, name])
            x = middle + (n - (len(series) - 1) / 2) * wide * 1.15
            told = f"{group}, {name}: median {marks[group, name][2]:.2f}, n = {len(values)}"
            parts.append(
                f'<g class="series{n}"><title>{escape(told)}</title>'
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{p95:.1f}" y2="{p5:.1f}"/>'
                f'<rect x="{x - wide / 2:.1f}" y="{p75:.1f}" width="{wide:.1f}" height="{max(p25 - p75, 1):.1f}"/>'
                f'<line class="median" x1="{x - wide / 2:.1f}" x2="{x + wide / 2:.1f}" y1="{p50:.1f}" y2="{p50:.1f}"/></g>'
            )
    return "".join([*parts, "</svg>"])


def scatter(points: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, y_label: str, title: str) -> str:
    """Points {series: [(x, y, name)]}, a line at y = 0 among them."""
    everything = [p for series in points.values() for p in series]
    x_low, x_high = _range([p[0] for p in everything])
    parts, y = _frame(*_range([0.0, *(p[1] for p in everything)]), y_label, title)
    x = lambda v: LEFT + (v - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
    for v in ticks(x_low, x_high, 8):
        parts.append(f'<text x="{x(v):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{v:g}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    for n, series in enumerate(points.values()):
        for px, py, name in series:
            parts.append(
                f'<circle class="series{n % 6}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="4"><title>{escape(name)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def png(rows: np.ndarray) -> bytes:
    """A PNG file of (height, width, 3) uint8."""
    height, width = rows.shape[:2]
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def spectrogram(audio: np.ndarray, sample_rate: int, width: int = 320, height: int = 96, span: float = 70.0) -> str:
    """A data URI of a spectrogram of (samples,): logarithmic frequency from 40 Hz up, `span` dB below full scale."""
    from scipy.signal import stft  # slow to import, and only a report needs it

    size = 2048
    padded = np.pad(audio, (0, max(0, size - len(audio))))
    _, _, z = stft(padded, sample_rate, nperseg=size, noverlap=size * 3 // 4)
    level = 20 * np.log10(np.abs(z) + 1e-9)
    lowest, highest = min(40, sample_rate / 16), sample_rate / 2
    bins = np.geomspace(lowest, highest, height)[::-1] / highest * (level.shape[0] - 1)
    columns = np.linspace(0, level.shape[1] - 1, width)
    shown = level[np.round(bins).astype(int)[:, None], np.round(columns).astype(int)]
    t = np.clip((shown + span) / (span - 10), 0, 1)  # partials of music stay below -10 dB
    # Dark blue over violet and orange to pale yellow.
    stops = np.array([[10, 8, 32], [70, 20, 110], [190, 50, 90], [250, 140, 40], [252, 250, 190]])
    colour = np.stack([np.interp(t, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], -1)
    return "data:image/png;base64," + base64.b64encode(png(colour.astype(np.uint8))).decode()
