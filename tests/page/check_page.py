"""The page in a real browser, `bash launch/test_page.sh`: outside the ordinary run, for it needs Chromium.

What leaves the mixer is recorded behind its last node, sample by sample, and compared with the files.
"""

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
import soundfile
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

SHOTS = Path(os.environ.get("MSR_SHOTS", "page_out"))
SECONDS = 12
RATE = 44_100
# Collects what the mixer puts out, on the audio thread, which loses nothing when the page is busy.
RECORDER = """registerProcessor("recorder", class extends AudioWorkletProcessor {
  process([input]) { if (input[0]) this.port.postMessage(input[0].slice()); return true; }
});"""
RECORD = """async (RECORDER) => {
  const { context, output } = window.msrPlayer;
  if (window.recorded) { window.recorded = []; return; }
  const module = new Blob([RECORDER], { type: "text/javascript" });
  await context.audioWorklet.addModule(URL.createObjectURL(module));
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  window.recorded = [];
  node.port.onmessage = (e) => window.recorded.push(...e.data);
  output.connect(node);
}"""


@pytest.fixture(scope="session")
def song(tmp_path_factory):
    """A song of beats and tones, stereo, whose samples are all different."""
    path = tmp_path_factory.mktemp("song") / "Beats & tones.wav"
    t = np.arange(SECONDS * RATE) / RATE
    rng = np.random.default_rng(0)
    beats = 0.4 * rng.standard_normal(len(t)) * np.exp(-30 * (t % 0.5))
    tones = 0.15 * np.sin(2 * np.pi * 110 * t) + 0.1 * np.sin(2 * np.pi * (440 + 110 * (t // 1 % 3)) * t)
    soundfile.write(path, np.stack([beats + tones, 0.8 * beats + tones], 1), RATE, subtype="PCM_24")
    return path


def start(folder):
    command = [sys.executable, "-m", "msr_jax.cli", "serve", "--port", "0", "--folder", str(folder)]
    # As people start it: the ordinary tests' flags, for fast compilation and slow programs, are in this process' environment.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return process, re.search(r"http://\S+", process.stdout.readline())[0]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    process, address = start(folder)
    yield address
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert not list(folder.iterdir()), "files of the server are left over"


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        arguments = ["--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


def visit(browser, server, **options):
    """A page that asks no other host and reports no error but that a request was refused (422)."""
    context = browser.new_context(**options)
    page = context.new_page()
    foreign, errors = [], []
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((server, "data:", "blob:")) else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" and " 422 " not in m.text else None)
    page.goto(server)
    yield page
    context.close()
    assert not foreign and not errors


@pytest.fixture
def page(browser, server):
    yield from visit(browser, server)


@pytest.fixture
def heard_page(browser, server):
    """One that a recorder may be added to, which the page's policy forbids otherwise."""
    yield from visit(browser, server, bypass_csp=True)


def drop(page, song):
    """Drop a file onto the page as a person does."""
    data = page.evaluate_handle(
        """async ([name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
        return transfer; }""",
        [song.name, base64.b64encode(song.read_bytes()).decode()],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def separated(page):
    expect(page.locator("#status")).to_have_text("Separated.", timeout=240_000)


def saved(page, link):
    with page.expect_download() as download:
        page.click(link)
    return Path(download.value.path()).read_bytes(), download.value.suggested_filename


def read(body):
    return soundfile.read(io.BytesIO(body), dtype="float32", always_2d=True)[0]


def heard(page, seconds=3.0, start=0):
    """Samples of the left channel that leave the mixer while the page plays from a sample of the song on."""
    page.evaluate("async (start) => { window.msrPlayer.seek(start); await window.msrPlayer.play(); }", start)
    page.evaluate(RECORD, RECORDER)
    page.wait_for_timeout(1000 * seconds)
    return np.array(page.evaluate("window.recorded"), np.float32)


def assert_is_part_of(recorded, file):
    """Every stretch of sound in `recorded` is `file`, sample for sample, at one offset."""
    sound = np.flatnonzero(np.abs(recorded) > 1e-4)
    middle = recorded[sound[0] + 4096 : sound[-1] - 4096]
    assert len(middle) > RATE, "too little was heard"
    probe = middle[:8192]
    size = 1 << (len(file) + len(probe)).bit_length()
    match = np.fft.irfft(np.fft.rfft(file, size) * np.conj(np.fft.rfft(probe, size)))[: len(file) - len(probe)]
    power = np.cumsum(np.square(file, dtype=np.float64))
    at = int(np.argmin(power[len(probe) :] - power[: len(match)] - 2 * match))  # where the difference is least
    np.testing.assert_allclose(middle, file[at : at + len(middle)], atol=1e-6)


def check_zip(page, song):
    body, name = saved(page, "#zip")
    assert name == "Beats & tones (stems).zip"
    archive = zipfile.ZipFile(io.BytesIO(body))
    stems = {entry.removesuffix(".wav"): read(archive.read(entry)) for entry in archive.namelist()}
    np.testing.assert_allclose(sum(stems.values()), read(song.read_bytes()), atol=1e-6)
    return stems


def test_a_song_is_dropped_heard_soloed_refined_and_taken_away(heard_page, song):
    page = heard_page
    drop(page, song)
    expect(page.locator("#progress")).to_be_visible()
    separated(page)
    stems = check_zip(page, song)
    page.get_by_role("button", name="Solo drums").click()
    page.click("#play")
    assert_is_part_of(heard(page), stems["drums"][:, 0])
    page.get_by_role("button", name="Solo drums").click()
    page.click("#original")
    assert_is_part_of(heard(page), read(song.read_bytes())[:, 0])
    page.click("#original")
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / "light.png", full_page=True)

    first = page.evaluate("window.msrPlayer.jobId")
    page.get_by_label("2", exact=True).check()
    page.wait_for_function(f"window.msrPlayer.jobId !== '{first}'", timeout=240_000)
    separated(page)
    refined = check_zip(page, song)
    assert np.abs(refined["drums"] - stems["drums"]).max() > 1e-3
    asked = []
    page.on("request", lambda r: asked.append(r.method))
    page.get_by_label("none", exact=True).check()
    page.wait_for_function(f"window.msrPlayer.jobId === '{first}'")
    assert "POST" not in asked, "what was computed is computed again"


def test_loops_repeat_to_the_sample(heard_page, song):
    page = heard_page
    drop(page, song)
    separated(page)
    page.click("#original")
    page.evaluate("window.msrPlayer.setLoop({from: 44100, to: 66150})")
    recorded = heard(page, start=44100)
    part = read(song.read_bytes())[44100:66150, 0]
    assert_is_part_of(recorded, np.tile(part, 20))


def test_the_keyboard_is_enough(page, song):
    page.locator("#file").focus()
    page.set_input_files("#file", song)  # what the browser's own dialogue would give
    separated(page)
    page.locator("#play").focus()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("2")
    expect(page.get_by_role("button", name="Solo drums")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Pause")
    page.keyboard.press("m")
    expect(page.get_by_role("button", name="Mute drums")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("0")
    expect(page.get_by_role("button", name="Mute drums")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Play")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    assert {"play", "position", "zip", "mix", "format", "Solo bass", "Mute rest", "Level of piano"} <= reached
    page.locator("#zip").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert zipfile.is_zipfile(download.value.path())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True}),
    ],
)
def test_nothing_serious_stands_in_anybodys_way(browser, server, song, name, options):
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(server)
    drop(page, song)
    separated(page)
    page.wait_for_timeout(500)
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the screen"
    )
    found = Axe().run(page).response["violations"]
    assert not [v for v in found if v["impact"] in ("serious", "critical")], [(v["id"], v["nodes"]) for v in found]
    context.close()


def test_a_bad_file_is_told_in_a_sentence(page, tmp_path):
    bad = tmp_path / "notes.wav"
    bad.write_text("no sound")
    drop(page, bad)
    expect(page.locator("#status")).to_contain_text("cannot be read as audio", timeout=30_000)


@pytest.fixture
def left_page(browser, server):
    """One whose requests may fail."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server)
    yield page
    context.close()


def test_a_second_song_begins_at_its_beginning_and_waits_for_play(heard_page, song):
    page = heard_page
    drop(page, song)
    separated(page)
    page.evaluate("window.msrPlayer.seek(5 * 44100)")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Pause")
    first = page.evaluate("window.msrPlayer.jobId")
    drop(page, song)
    expect(page.locator("#play")).to_have_text("Play")
    page.wait_for_function(f"window.msrPlayer.jobId !== '{first}'", timeout=240_000)
    separated(page)
    assert page.evaluate("[window.msrPlayer.playing, window.msrPlayer.now()]") == [False, 0]
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Pause")
    page.wait_for_function("window.msrPlayer.now() > 4410")
    assert page.evaluate("window.msrPlayer.now()") < 5 * RATE


def test_play_says_so_where_the_server_has_forgotten_the_song(left_page, server, song):
    page = left_page
    drop(page, song)
    separated(page)
    requests.delete(f"{server}api/jobs/{page.evaluate('window.msrPlayer.jobId')}")
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.click("#play")
    expect(page.locator("#status")).to_contain_text("has forgotten the song")
    expect(page.locator("#play")).to_have_text("Play")
    page.wait_for_timeout(1000)
    assert len(asked) <= len(page.evaluate("window.msrPlayer.tracks"))


def test_a_server_that_is_gone_is_told_and_a_job_can_be_cancelled_without_it(browser, tmp_path):
    process, address = start(tmp_path)
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal((300 * RATE, 1)), RATE)
    drop(page, tmp_path / "long.wav")
    expect(page.locator("#status")).to_have_text("Separating …", timeout=240_000)
    process.kill()
    process.wait()
    expect(page.locator("#status")).to_contain_text("interrupted; trying again", timeout=30_000)
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#work")).to_be_hidden()
    context.close()


def test_a_song_that_the_browser_cannot_play_can_be_taken_away(page, tmp_path):
    path = tmp_path / "slow.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((4000, 2)), 2000)
    drop(page, path)
    separated(page)
    expect(page.locator("#unplayable")).to_be_visible()
    expect(page.locator("#play")).to_be_disabled()
    assert zipfile.is_zipfile(io.BytesIO(saved(page, "#zip")[0]))


def first_stem(server, path):
    """Seconds from the end of an upload to the first samples of its stems; the job is removed again."""
    with open(path, "rb") as song:
        job = requests.post(f"{server}api/jobs", files={"file": song}).json()
    begun = time.monotonic()
    while job["frames_done"] == 0:
        time.sleep(0.05)
        job = requests.get(f"{server}api/jobs/{job['id']}").json()
    seconds = time.monotonic() - begun
    requests.delete(f"{server}api/jobs/{job['id']}")
    time.sleep(3)  # what is being computed for it still ends
    return seconds


def test_the_first_stem_is_there_within_three_seconds_of_a_long_song(server, tmp_path):
    """Once the server is warm."""
    rng = np.random.default_rng(1)
    path = tmp_path / "long.flac"
    soundfile.write(path, 0.1 * rng.standard_normal((180 * RATE, 2)), RATE)
    seconds = [first_stem(server, path) for _ in range(4)]
    print("first stem audible after the upload of three minutes:", *(f"{s:.2f} s" for s in seconds))
    assert np.median(seconds[1:]) <= 3
