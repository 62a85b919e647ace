"""How a part sounds: samples of a SoundFont or patch set, or a small synthesiser of our own, and then a chain of effects.

One SoundFont is all that pip brings, and a separator trained on one set of samples fails on the next. So every part is
coloured anew (equaliser, saturation, chorus, room), and a share of parts is synthesised with random parameters.
"""

import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import signal

from data_prep.arranger import CRASH, HAT, KICK, OPEN, PEDAL, RIDE, SIDE, Part
from data_prep.scores import write_midi
from msr_jax.errors import UserError

RATE = 44_100  # Hz
TAIL = 1.5  # seconds that a note may ring on


def default_soundfont() -> str:
    """Path of the SoundFont that the package pretty_midi carries. Raises UserError where that is missing."""
    try:
        import importlib.resources

        return str(importlib.resources.files("pretty_midi") / "TimGM6mb.sf2")
    except ModuleNotFoundError as error:
        raise UserError("rendering needs a SoundFont: pip install pretty_midi, or name one with --soundfont") from error


@lru_cache(maxsize=4)
def _font(path: str):
    """A SoundFont, which takes longer to load than a part to play: each process keeps a few, of up to 300 MB each."""
    try:
        import tinysoundfont
    except ModuleNotFoundError as error:
        raise UserError("rendering needs tinysoundfont: pip install --no-deps tinysoundfont") from error
    synth = tinysoundfont.Synth(samplerate=RATE)
    try:
        return synth, synth.sfload(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a SoundFont ({error})") from error


@lru_cache(maxsize=64)
def presets(soundfont: str, is_drum: bool) -> tuple[int, ...]:
    """The programs that a SoundFont's own list has, or its kits."""
    synth, font = _font(soundfont)
    return tuple(n for n in range(128) if synth.sfpreset_name(font, 128 if is_drum else 0, n) is not None)


def patch_part(part: Part, seconds: float, patches: str) -> np.ndarray:
    """Render a part with a patch set (a configuration of TiMidity++, such as FreePats'): (samples,) float32, mono.

    A note that the set has no patch for is silent. Raises UserError where TiMidity++ is missing or fails.
    """
    plain = "--preserve-silence -EFreverb=0 -EFchorus=0 -EFdelay=0 --volume=70"  # effects are ours, see `colour`
    output = f"--sampling-freq={RATE} --output-mode=r --output-mono --output-16bit --output-signed --output-linear -o -"
    with tempfile.TemporaryDirectory() as folder:
        score = Path(folder) / "part.mid"
        write_midi(score, [part])
        command = ["timidity", f"--config-file={patches}", "--quiet=7", *plain.split(), *output.split(), str(score)]
        try:
            played = subprocess.run(command, capture_output=True, check=True).stdout
        except FileNotFoundError as error:
            raise UserError(f"{patches} needs timidity; install it, or leave that --soundfont out") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.decode().strip() or f"exit code {error.returncode}").splitlines()[0]
            raise UserError(f"timidity cannot play with {patches}: {reason}") from error
    count = int(seconds * RATE)
    audio = np.frombuffer(played, "<i2")[:count].astype(np.float32) / 32768
    return np.pad(audio, (0, count - len(audio)))


def sample_part(part: Part, seconds: float, soundfont: str, cents: float, rest: float = 1.0) -> np.ndarray:
    """Render a part with a SoundFont: (samples,) float32, mono; `rest` seconds more let what rings end."""
    synth, font = _font(soundfont)
    is_drum = part.group == "drums"
    if part.program not in presets(soundfont, is_drum):  # it would play another one, and say nothing
        raise UserError(f"{soundfont} has no {'kit' if is_drum else 'program'} {part.program}")
    synth.program_select(0, font, 128 if is_drum else 0, part.program, is_drum)
    synth.set_tuning(0, cents / 100)
    events = [(n.start, 1, n.pitch, n.velocity) for n in part.notes]
    events += [(n.start + n.duration, 0, n.pitch, 0) for n in part.notes]
    pieces, done = [], 0
    for at, is_on, pitch, velocity in [*sorted(events), (seconds, 2, 0, 0)]:
        count = int(min(at, seconds) * RATE) - done
        if count > 0:
            pieces.append(np.frombuffer(bytes(synth.generate(count)), np.float32).reshape(-1, 2).mean(1))
            done += count
        if is_on == 1:
            synth.noteon(0, pitch, velocity)
        elif is_on == 0:
            synth.noteoff(0, pitch)
    synth.sounds_off()
    synth.generate(int(rest * RATE))  # what still rings ends here and not in the next part
    return np.concatenate(pieces)


def _decay(count: int, seconds: float) -> np.ndarray:
    return np.exp(-np.arange(count) / (RATE * seconds))


class StringModel:
    """Plucked strings (Karplus and Strong): guitars and basses."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.loss = rng, rng.uniform(0.985, 0.9985)
        self.bright, self.pick = rng.uniform(0.1, 0.5), rng.uniform(0.08, 0.45)

    def __call__(self, pitch: int, count: int) -> np.ndarray:
        period = RATE / (440 * 2 ** ((pitch - 69) / 12))
        delay = int(period - self.bright)
        burst = self.rng.standard_normal(delay)
        burst -= np.roll(burst, int(self.pick * delay))
        frac = period - self.bright - delay
        taps = np.convolve([1 - frac, frac], [1 - self.bright, self.bright])
        excitation = np.pad(burst, (0, max(0, count - delay)))[:count]
        return signal.lfilter([1.0], np.concatenate([[1.0], np.zeros(delay - 1), -self.loss * taps]), excitation)


class ToneModel:
    """Sums of partials with their own decays, or two-operator FM: pianos, electric pianos, synthesised basses."""

    def __init__(self, rng: np.random.Generator, group: str):
        self.is_fm = rng.random() < (0.4 if group == "piano" else 0.3)
        self.slope, self.stretch = rng.uniform(0.6, 2.0), rng.uniform(0, 6e-4)
        self.decay, self.odd = rng.uniform(0.3, 2.5), rng.uniform(0.3, 1.0)
        self.ratio, self.index = float(rng.choice([1, 1, 2, 3, 7, 14])), rng.uniform(0.5, 4)
        self.phases = rng.uniform(0, 2 * np.pi, 40)
        self.attack = rng.uniform(0.001, 0.02)

    def __call__(self, pitch: int, count: int) -> np.ndarray:
        freq, t = 440 * 2 ** ((pitch - 69) / 12), np.arange(count) / RATE
        rise = np.minimum(t / self.attack, 1)
        if self.is_fm:
            modulator = self.index * np.exp(-t / (0.3 * self.decay)) * np.sin(2 * np.pi * freq * self.ratio * t)
            return rise * np.exp(-t / self.decay) * np.sin(2 * np.pi * freq * t + modulator)
        out = np.zeros(count)
        for k in range(1, min(40, int(9000 / freq)) + 1):
            partial = freq * k * np.sqrt(1 + self.stretch * k * k)
            level = k**-self.slope * (self.odd if k % 2 == 0 else 1)
            out += (
                level * np.exp(-t * (1 + 0.25 * k) / self.decay) * np.sin(2 * np.pi * partial * t + self.phases[k - 1])
            )
        return rise * out


class VoiceModel:
    """A vowel: partials with vibrato under three formants, which differ from singer to singer."""

    def __init__(self, rng: np.random.Generator):
        self.vowels = np.array([[730, 1090, 2440], [270, 2290, 3010], [570, 840, 2410], [530, 1840, 2480]])
        self.rng, self.size = rng, rng.uniform(0.85, 1.2)
        self.rate, self.depth, self.breath = rng.uniform(4.5, 6.5), rng.uniform(0.003, 0.012), rng.uniform(0.005, 0.04)

    def __call__(self, pitch: int, count: int) -> np.ndarray:
        t, formants = np.arange(count) / RATE, self.size * self.vowels[self.rng.integers(len(self.vowels))]
        freq = 440 * 2 ** ((pitch - 69) / 12)
        bend = 1 + self.depth * np.minimum(t / 0.4, 1) * np.sin(2 * np.pi * self.rate * t)
        phase, out = 2 * np.pi * np.cumsum(freq * bend) / RATE, np.zeros(count)
        for k in range(1, min(40, int(6000 / freq)) + 1):
            level = sum(
                g / (1 + ((k * freq - f) / w) ** 2)
                for f, w, g in zip(formants, (90, 120, 160), (1, 0.6, 0.3), strict=True)
            )
            out += level / k**0.5 * np.sin(k * phase)
        return np.minimum(t / 0.04, 1) * (out + self.breath * self.rng.standard_normal(count))


class DrumModel:
    """Sines that fall and filtered noise: a synthesised kit."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.kick, self.fall = rng, rng.uniform(42, 70), rng.uniform(1.5, 6)
        self.kick_decay, self.snare = rng.uniform(0.06, 0.3), rng.uniform(150, 260)
        self.rattle, self.metal = rng.uniform(0.05, 0.22), rng.uniform(5000, 9000)

    def _sweep(self, count: int, freq: float, decay: float) -> np.ndarray:
        t = np.arange(count) / RATE
        return np.sin(2 * np.pi * np.cumsum(freq * (1 + self.fall * np.exp(-t / 0.02))) / RATE) * np.exp(-t / decay)

    def __call__(self, pitch: int, count: int) -> np.ndarray:
        noise = self.rng.standard_normal(count)
        if pitch == KICK:
            return 2.0 * self._sweep(count, self.kick, self.kick_decay)
        if pitch in (HAT, PEDAL, OPEN, RIDE, CRASH, 57):
            seconds = {HAT: 0.04, PEDAL: 0.03, OPEN: 0.25, RIDE: 0.35}.get(pitch, 0.9)
            sos = signal.butter(2, self.metal / (RATE / 2), "high", output="sos")
            return 0.6 * signal.sosfilt(sos, noise) * _decay(count, seconds)
        if pitch in (38, 39, 40, SIDE):
            sos = signal.butter(1, [1200 / (RATE / 2), 9000 / (RATE / 2)], "band", output="sos")
            body = self._sweep(count, self.snare, 0.09)
            return body + 0.8 * signal.sosfilt(sos, noise) * _decay(count, 0.03 if pitch == SIDE else self.rattle)
        return 1.3 * self._sweep(count, 60 + 9 * (pitch - 38), 0.2)


def synthesise_part(rng: np.random.Generator, part: Part, seconds: float) -> np.ndarray:
    """Render a part with one of the models above, its parameters drawn once: (samples,) float32."""
    if part.group == "drums":
        model: Callable[[int, int], np.ndarray] = DrumModel(rng)
    elif part.group == "guitar" or (part.group == "bass" and rng.random() < 0.5):
        model = StringModel(rng)
    elif part.group == "vocals":
        model = VoiceModel(rng)
    else:
        model = ToneModel(rng, part.group)
    release, total = rng.uniform(0.02, 0.15), int(seconds * RATE)
    out, longest = np.zeros(total + int(TAIL * RATE)), int(2.5 * RATE)
    cache: dict[int, np.ndarray] = {}
    for note in part.notes:
        if note.pitch not in cache:
            cache[note.pitch] = model(note.pitch, longest)
        ring = TAIL - 0.1 if part.group == "drums" else note.duration + release
        count = min(int(ring * RATE), longest, len(out) - int(note.start * RATE))
        fade = np.clip((count - np.arange(count)) / (release * RATE), 0, 1)
        at = int(note.start * RATE)
        out[at : at + count] += cache[note.pitch][:count] * fade * (note.velocity / 127) ** 1.7
    return out[:total].astype(np.float32)


def _biquad(kind: str, freq: float, gain_db: float, q: float) -> np.ndarray:
    """A peaking or shelving filter (audio EQ cookbook) as one second-order section."""
    a, w = 10 ** (gain_db / 40), 2 * np.pi * freq / RATE
    alpha, cos = np.sin(w) / (2 * q), np.cos(w)
    if kind == "peak":
        b, den = [1 + alpha * a, -2 * cos, 1 - alpha * a], [1 + alpha / a, -2 * cos, 1 - alpha / a]
    else:
        s, r = (1 if kind == "low" else -1), 2 * np.sqrt(a) * alpha
        b = [
            a * (a + 1 - s * (a - 1) * cos + r),
            s * 2 * a * (a - 1 - s * (a + 1) * cos),
            a * (a + 1 - s * (a - 1) * cos - r),
        ]
        den = [
            a + 1 + s * (a - 1) * cos + r,
            -s * 2 * (a - 1 + s * (a + 1) * cos),
            a + 1 + s * (a - 1) * cos - r,
        ]
    return np.array([*b, *den]) / den[0]


def colour(rng: np.random.Generator, x: np.ndarray, group: str) -> np.ndarray:
    """Effects drawn at random: equaliser, saturation (guitars and basses more), chorus, room. (samples,) float32."""
    bands = [("low", rng.uniform(80, 300)), ("high", rng.uniform(2500, 8000))]
    bands += [("peak", float(np.exp(rng.uniform(np.log(150), np.log(6000))))) for _ in range(rng.integers(1, 4))]
    sos = np.stack([_biquad(kind, freq, rng.uniform(-8, 8), rng.uniform(0.5, 2)) for kind, freq in bands])
    x = signal.sosfilt(sos, x)
    peak = np.abs(x).max()
    if peak > 0 and rng.random() < {"guitar": 0.45, "bass": 0.35, "drums": 0.25}.get(group, 0.12):
        x = np.tanh(x / peak * rng.uniform(1.5, 8)) * peak
    if group != "drums" and rng.random() < 0.25:
        sweep = 0.012 + 0.004 * np.sin(2 * np.pi * rng.uniform(0.2, 1.2) * np.arange(len(x)) / RATE)
        place = np.clip(np.arange(len(x)) - sweep * RATE, 0, None)
        x = x + rng.uniform(0.3, 0.8) * np.interp(place, np.arange(len(x)), x)
    if rng.random() < 0.6:
        seconds = rng.uniform(0.1, 1.2)
        room = rng.standard_normal(int(seconds * RATE)) * _decay(int(seconds * RATE), seconds / 4)
        wet = signal.oaconvolve(x, room / np.sqrt(np.square(room).sum()))[: len(x)]
        x = x + rng.uniform(0.05, 0.4) * wet
    return x.astype(np.float32)


def to_stereo(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Place a mono part (samples,) on the stage: panned, in a room whose sides differ; (samples, 2) float32."""
    angle = np.pi / 4 + rng.uniform(-0.5, 0.5)
    room = rng.standard_normal((int(0.3 * RATE), 2)) * _decay(int(0.3 * RATE), rng.uniform(0.02, 0.09))[:, None]
    room *= rng.uniform(0.03, 0.25) / np.sqrt(np.square(room).sum(0))
    wet = signal.oaconvolve(x[:, None], room, axes=0)[: len(x)]
    return (x[:, None] * np.array([np.cos(angle), np.sin(angle)]) * np.sqrt(2) + wet).astype(np.float32)


def integrated_loudness(x: np.ndarray) -> float:
    """Loudness of mono audio (samples,) in LUFS (ITU-R BS.1770-4: K-weighting and two gates); -70 for silence."""
    high_pass = signal.butter(2, 38 / (RATE / 2), "high", output="sos")
    weighted = signal.sosfilt(np.concatenate([_biquad("high", 1500, 4, 0.7071)[None], high_pass]), x)
    block, hop = int(0.4 * RATE), int(0.1 * RATE)
    count = max(0, (len(x) - block) // hop + 1)
    power = np.array([np.square(weighted[k * hop : k * hop + block]).mean() for k in range(count)])
    kept = power[power > 10 ** ((-70 + 0.691) / 10)]
    kept = kept[kept > 0.1 * kept.mean()] if len(kept) else kept
    return float(-0.691 + 10 * np.log10(kept.mean())) if len(kept) else -70.0


def render_part(
    rng: np.random.Generator, part: Part, seconds: float, soundfonts: list[str], synthesised: float
) -> np.ndarray:
    """One part's audio: (samples,) float32 of unit level; silent if it has no notes.

    Args:
      synthesised: share of parts that our own models play; vocals always are.
    """
    soundfont, cents = soundfonts[rng.integers(len(soundfonts))], rng.normal(0, 8)
    if part.group == "vocals" or (part.group != "other" and rng.random() < synthesised):
        x = synthesise_part(rng, part, seconds)
    else:
        x = (
            patch_part(part, seconds, soundfont)
            if soundfont.endswith(".cfg")
            else sample_part(part, seconds, soundfont, cents)
        )
    x = colour(rng, x, part.group)
    loud = np.sqrt(np.square(x[np.abs(x) > 1e-4]).mean()) if (np.abs(x) > 1e-4).any() else 0.0
    return x / loud if loud else x
