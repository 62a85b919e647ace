"""The report is one sound file: no request to anywhere, figures where they belong, sounds and pictures inside."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.evaluate import plots
from tests.conftest import TINY_RATE


class Page(HTMLParser):
    """Collects what a page refers to, and whether its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.references, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.references += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "poster")]
        if tag not in ("meta", "img", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(short_corpus, toy_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    argv = ["--data", short_corpus, "--model", toy_model, "--refine", "consistency", "--excerpts", 1, "--out", out]
    assert main(["evaluate", *map(str, argv)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_and_closes_its_tags(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.references and all(r.startswith("data:") for r in parsed.references)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert "width=device-width" in page and "prefers-color-scheme:dark" in page


def test_the_page_holds_scores_published_figures_gains_and_the_protocol(page):
    words = " ".join(Page(page).words)
    for expected in (
        "23.07",
        "quoted",
        "Gain of the refinement",
        "overlap-add",
        "deterministic estimate",
        "Track00000",
    ):
        assert expected in words
    assert page.count("<svg") == 4


def test_excerpts_can_be_heard_and_seen(page):
    sounds = re.findall(r"data:audio/mpeg;base64,([^\"]+)", page)
    assert len(sounds) == page.count("data:image/png;base64,") == 9  # the mixture; reference and estimate of each stem
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))
    assert rate == TINY_RATE and len(audio) >= 5 * rate and np.abs(audio).max() > 0.05


def test_plots_are_well_formed_and_escape_names():
    names = 'a <b> & "c"'
    box = plots.box_plot({names: {"x": [1.0, 2.0, 3.0], "y": []}, "empty": {"x": []}}, "dB", names)
    dots = plots.scatter({names: [(1.0, -1.0, names)], "none": []}, "x", "y", names)
    for drawn in (box, dots, plots.scatter({}, "x", "y", "t"), plots.box_plot({}, "dB", "t")):
        ElementTree.fromstring(drawn)
    assert "median 2.00, n = 3" in box


def test_ticks_are_round_and_inside():
    assert plots.ticks(-1.3, 3.7) == [-1, 0, 1, 2, 3]
    assert plots.ticks(0, 23) == [0, 5, 10, 15, 20]


def test_a_tone_shows_at_its_place_in_the_spectrogram():
    rate = 16_000
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    data = base64.b64decode(plots.spectrogram(tone, rate, width=20, height=96).split(",")[1])
    assert data.startswith(b"\x89PNG")
    start = data.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(96, 61)[:, 1:].reshape(96, 20, 3)
    brightest = int(rows.sum((1, 2), dtype=int).argmax())
    frequency = np.geomspace(40, rate / 2, 96)[::-1][brightest]
    assert frequency == pytest.approx(1000, rel=0.06)
