"""results.json, results.md and report.html of an evaluation. The page is one file that asks the network for nothing."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import soundfile

from msr_jax.audio.io import read_audio, resample, writable_rate
from msr_jax.evaluate import plots
from msr_jax.evaluate.protocols import METRICS, of_track
from msr_jax.evaluate.published import DATA, PUBLISHED, Row
from msr_jax.files import write_whole

NAMES = {
    "si_sdri_active": "SI-SDRi, active stems (dB)",
    "si_sdri_msdm": "SI-SDRi, MSDM convention (dB)",
    "si_sdr": "SI-SDR, active stems (dB)",
    "sdr": "SDR (dB)",
    "isr": "ISR (dB)",
    "sir": "SIR (dB)",
    "sar": "SAR (dB)",
    "snr": "SNR, whole track (dB)",
    "log_wmse": "log-WMSE",
}
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1d22;--soft:#656b78;--line:#d9dce3;--card:#f5f6f9;--warn:#b3261e;
--c0:#2f6fde;--c1:#d9730d;--c2:#1d9a6c;--c3:#9a4fd0;--c4:#c2334d;--c5:#7a7f00}
@media(prefers-color-scheme:dark){:root{--back:#14161a;--text:#e8eaee;--soft:#9aa2b1;--line:#353a44;--card:#1d2026;
--warn:#ff8a80;--c0:#78a6ff;--c1:#ffab5e;--c2:#5fd3a5;--c3:#c79bf2;--c4:#ff8095;--c5:#d3d65c}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin-top:2.2rem}.soft,figcaption{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.note{white-space:normal;text-align:left;min-width:12rem;color:var(--soft)}
tr.ours td{font-weight:600;background:var(--card)}.warn{border-left:4px solid var(--warn);padding:.1rem 1rem;
background:var(--card)}figure{margin:1rem 0}svg{width:100%;height:auto;display:block}svg text{font-size:13px;fill:var(--text)}
.grid{stroke:var(--line)}.zero{stroke:var(--text);stroke-dasharray:4 3}
svg g line{stroke:var(--c);stroke-width:1.5}svg g rect{fill:var(--c);fill-opacity:.35;stroke:var(--c)}
svg g .median{stroke-width:3}circle{fill:var(--c);fill-opacity:.8}.key i{display:inline-block;width:.8em;height:.8em;
border-radius:50%;background:var(--c);margin:0 .35em 0 1em}.series0{--c:var(--c0)}.series1{--c:var(--c1)}
.series2{--c:var(--c2)}.series3{--c:var(--c3)}.series4{--c:var(--c4)}.series5{--c:var(--c5)}
.sounds{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:.8rem}
.sound{background:var(--card);border-radius:.5rem;padding:.6rem;min-width:0}.sound img{width:100%;height:6rem;display:block;
border-radius:.3rem}.sound audio{width:100%;height:2.2rem;margin-top:.4rem}pre{overflow-x:auto;background:var(--card);
padding:.8rem;border-radius:.5rem;font-size:.8rem}
@media(max-width:40rem){body{padding:.8rem;font-size:15px}svg text{font-size:19px}th,td{padding:.3rem .4rem}
td:first-child{white-space:normal;min-width:6.5rem}td.note{min-width:14rem}}
"""


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def without_det(results: Mapping[str, Any]) -> list[str]:
    """Lines TRACK: REASON of the scored tracks whose deterministic estimate was not scored: its figures are of the others."""
    det = results.get("deterministic")
    reasons = {p["track"]: p["reason"] for p in det["problems"]} if det else {}
    return [f"{name}: {reasons[name]}" for name in results["tracks"] if name in reasons]


def markdown(results: Mapping[str, Any]) -> str:
    """The aggregate as a table, what was not scored, and the settings."""
    settings = results["settings"]
    stems = settings["stems"]
    rows = [f"| | {' | '.join([*stems, 'average'])} |", "|---" * (len(stems) + 2) + "|"]
    for metric in METRICS:
        values, counts = results["aggregate"][metric], results["counts"][metric]
        cells = [f"{number(values[s])} (n = {counts[s]})" for s in stems]
        rows.append(f"| {NAMES[metric]} | {' | '.join([*cells, number(values['average'])])} |")
    parts = ["\n".join(rows), f"Tracks: {len(results['tracks'])}. Real time factor: {number(results['rtf'], 3)}"]
    if "released" in results:
        told = ", ".join(
            f"{k} {results['released'][k]:.2f}"
            for k in ("msdm_si_sdr_avg", "sdr_avg", "sdr_median_of_medians")
            if k in results["released"]
        )
        parts.append(f"As the released evaluation logs it (dB): {told}")
    if results["problems"]:
        parts.append(f"**Not scored, in no average: {len(results['problems'])}**")
        parts.append("\n".join(f"- {p['track']}: {p['reason']}" for p in results["problems"]))
    if lacking := without_det(results):
        parts.append(
            f"**The deterministic estimate of {len(lacking)} tracks was not scored: its figures are of the others**"
        )
        parts.append("\n".join(f"- {text}" for text in lacking))
    notes = [f"- {name}: {note}" for name, track in results["tracks"].items() for note in track["notes"]]
    if notes:
        parts.append(f"Notes: {len(notes)}")
        parts.append("\n".join(notes))
    parts.append("\n".join(f"- {k}: {v}" for k, v in settings.items()))
    return "\n\n".join(parts) + "\n"


def write_results(out: Path, results: Mapping[str, Any], excerpts: Mapping[str, Path] = MappingProxyType({})) -> None:
    """Write results.json (strict JSON), results.md and report.html, each whole or not at all; `excerpts` as of `report`.

    Raises:
      UserError: one cannot be written.
    """
    write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_whole(out / "results.md", markdown(results))
    write_whole(out / "report.html", report(results, excerpts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], ours: int = 0) -> str:
    """An HTML table of plain text that scrolls by itself on a narrow screen; the first `ours` rows stand out."""
    cells = lambda row, tag: "".join(
        f"<{tag}{' class=note' if tag == 'td' and head[k] == '' and k else ''}>{escape(str(c))}</{tag}>"
        for k, c in enumerate(row)
    )
    lines = [f"<tr{' class=ours' if k < ours else ''}>{cells(row, 'td')}</tr>" for k, row in enumerate(rows)]
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _scores(results: Mapping[str, Any], stems: Sequence[str]) -> str:
    rows = []
    for metric in METRICS:
        values = results["aggregate"][metric]
        rows.append([NAMES[metric], *(number(values[s]) for s in [*stems, "average"])])
        if "deterministic" in results:
            det = results["deterministic"]["aggregate"][metric]
            rows.append(["deterministic estimate", *(number(det[s]) for s in [*stems, "average"])])
    return table(["", *stems, "average"], rows)


def headline(results: Mapping[str, Any]) -> list[float | None]:
    """SI-SDRi, SDR, SIR, SAR (dB, averages) as the published tables count them for the results' number of channels."""
    values = results["aggregate"]
    convention = "si_sdri_msdm" if results["settings"]["channels"] == 1 else "si_sdri_active"
    return [values[m]["average"] for m in (convention, "sdr", "sir", "sar")]


def quoted(row: Row) -> str:
    """Where a published row comes from, in words."""
    has_figure = any(v is not None for v in row[2:9])
    told = f"quoted: {row.source}" if has_figure or row.note else f"no figure in the {row.source}"
    return told + (f"; {row.note}" if row.note else "")


def _published(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    rows = [["this run", *(number(v) for v in headline(results)), "–", number(results["rtf"], 3), "measured here"]]
    if "deterministic" in results:
        det = {**results["deterministic"], "settings": settings}
        told = [number(v) for v in headline(det)]
        lacking = len(without_det(results))
        said = (
            f"measured here, on {len(det['tracks'])} of the {len(results['tracks'])} tracks"
            if lacking
            else "measured here"
        )
        rows.append(["this run, deterministic", *told, "–", number(det["rtf"], 3), said])
    count = len(rows)
    for r in PUBLISHED[min(2, settings["channels"])]:
        values = [number(v) for v in (r.si_sdri, r.sdr, r.sir, r.sar)]
        rows.append([r.system, *values, number(r.seconds, 3), number(r.rtf, 3), quoted(r)])
    head = ["system", "SI-SDRi", "SDR", "SIR", "SAR", "s / segment", "RTF", ""]
    return table(head, rows, ours=count)


def _boxes(results: Mapping[str, Any], stems: Sequence[str], metric: str) -> str:
    runs = {"this run": results["tracks"]}
    if "deterministic" in results:
        runs = {"deterministic": results["deterministic"]["tracks"], **runs}
    groups = {s: {n: [v for t in run.values() for v in t[metric][s]] for n, run in runs.items()} for s in stems}
    return f"<figure>{plots.box_plot(groups, 'dB', NAMES[metric])}<figcaption>{_key(runs)}</figcaption></figure>"


def _key(names: Iterable[str]) -> str:
    return (
        '<span class="key">'
        + "".join(f'<i class="series{n % 6}"></i>{escape(s)}' for n, s in enumerate(names))
        + "</span>"
    )


def _gains(results: Mapping[str, Any], stems: Sequence[str], metric: str) -> str:
    points: dict[str, list] = {s: [] for s in stems}
    for name, before in results["deterministic"]["tracks"].items():
        after = results["tracks"].get(name)
        for s in stems:
            pair = [v for t in (before, after) if t and (v := of_track(metric, t[metric][s])) is not None]
            if len(pair) == 2:
                gain = pair[1] - pair[0]
                points[s].append((pair[0], gain, f"{name}, {s}: {pair[0]:.2f} dB, {gain:+.2f} dB by refinement"))
    drawn = plots.scatter(points, f"deterministic {NAMES[metric]}", "gain (dB)", f"gain in {NAMES[metric]}")
    return f"<figure>{drawn}<figcaption>{_key(stems)} — a point is a track's stem; above the line refinement helped.</figcaption></figure>"


def _sound(path: Path, title: str) -> str:
    audio, rate = read_audio(path)
    coded = io.BytesIO()
    heard_rate = writable_rate(".mp3", rate)
    heard = resample(audio, rate, heard_rate)
    heard = heard if heard.shape[1] <= 2 else heard.mean(1, keepdims=True)
    soundfile.write(coded, np.clip(heard, -1, 1), heard_rate, format="MP3")
    source = "data:audio/mpeg;base64," + base64.b64encode(coded.getvalue()).decode()
    picture = plots.spectrogram(audio.mean(1), rate)
    return (
        f'<div class="sound"><b>{escape(title)}</b><img alt="spectrogram of {escape(title)}" src="{picture}">'
        f'<audio controls preload="metadata" src="{source}"></audio></div>'
    )


def _excerpts(folders: Mapping[str, Path], tracks: Mapping[str, Any], stems: Sequence[str]) -> str:
    parts = []
    for name in tracks:
        if name not in folders:
            continue
        parts.append(f"<h3>{escape(name)}</h3>" + _sound(folders[name] / "mixture.wav", "mixture"))
        for stem in stems:
            pair = [
                _sound(folders[name] / f"{stem}.{kind}.wav", f"{stem}, {kind}") for kind in ("reference", "estimate")
            ]
            parts.append(f'<div class="sounds" style="margin-top:.8rem">{"".join(pair)}</div>')
    if not parts:
        return ""
    told = "Spectrograms from 40 Hz to half the sample rate, logarithmic; the players hold MP3."
    return f"<h2>To hear and see</h2><p class=soft>{told}</p>{''.join(parts)}"


def _tracks(results: Mapping[str, Any], stems: Sequence[str]) -> str:
    rows = []
    for name, track in results["tracks"].items():
        row = [name, number(track["seconds"], 1)]
        for metric in ("si_sdri_active", "sdr"):
            values = [v for s in stems if (v := of_track(metric, track[metric][s])) is not None]
            row.append(number(float(np.mean(values)) if values else None))
        rows.append([*row, "; ".join(track["notes"])])
    head = ["track", "seconds", "SI-SDRi, active", "SDR", ""]
    return f"<details><summary>All {len(rows)} tracks</summary>{table(head, rows)}</details>"


def report(results: Mapping[str, Any], excerpts: Mapping[str, Path]) -> str:
    """The page: figures beside published ones, box plots, refinement gains, excerpts, tracks, settings.

    Args:
      results: as results.json.
      excerpts: folders of what `write_excerpt` wrote, by track; a track may have none.
    """
    settings = results["settings"]
    stems, data = settings["stems"], DATA[min(2, settings["channels"])]
    subject = settings["model"] or settings["estimates"] or "the mixture as its own estimate"
    problems = ""
    if results["problems"]:
        listed = "".join(f"<li>{escape(p['track'])}: {escape(p['reason'])}</li>" for p in results["problems"])
        problems = f'<div class="warn"><p><b>Not scored, in no average: {len(results["problems"])}</b></p><ul>{listed}</ul></div>'
    if lacking := without_det(results):
        listed = "".join(f"<li>{escape(text)}</li>" for text in lacking)
        told = f"The deterministic estimate of {len(lacking)} tracks was not scored: its figures are of the others"
        problems += f'<div class="warn"><p><b>{told}</b></p><ul>{listed}</ul></div>'
    gains = ""
    if "deterministic" in results:
        gains = "<h2>Gain of the refinement</h2>" + "".join(
            _gains(results, stems, m) for m in ("si_sdri_active", "sdr")
        )
    body = f"""
<h1>Separation by {escape(str(subject))}</h1>
<p>Refinement: {escape(str(settings["refine"]))}, steps: {escape(str(settings.get("steps", "–")))}. {len(results["tracks"])}
tracks of {escape(settings["data"])}, {settings["sample_rate"]} Hz, {settings["channels"]} channel(s). BSSEval by
{settings["bss_backend"]}. Real time factor {number(results["rtf"], 3)}.</p>
<p class=soft>Protocol <b>{settings["protocol"]}</b>: {escape(settings["protocol_text"])}.</p>{problems}
<h2>Scores</h2>{_scores(results, stems)}
<h2>Beside published figures</h2>
<p class=soft>Quoted figures are of the official test split of {data} under the released protocol and on other hardware; this
run is on the tracks named above under protocol {settings["protocol"]}. Averages over stems, dB; – is not given.</p>{_published(results)}
<h2>SI-SDR improvement by stem</h2>{_boxes(results, stems, "si_sdri_active")}
<h2>SDR by stem</h2>{_boxes(results, stems, "sdr")}
<p class=soft>Boxes: quartiles and median of all windows or frames; whiskers: 5th to 95th percentile.</p>{gains}
{_excerpts(excerpts, results["tracks"], stems)}
<h2>Tracks</h2>{_tracks(results, stems)}
<h2>Settings</h2><pre>{escape(json.dumps(settings, indent=1, ensure_ascii=False))}</pre>"""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{head}<title>Separation report</title><style>{STYLE}</style></head><body>{body}</body></html>\n'
