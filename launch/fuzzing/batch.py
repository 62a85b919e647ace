"""`python -m launch.fuzzing.batch OUT`: a batch of songs, killed at random moments and finished; what it must leave is checked.

Every song once, no partial file, nothing left over, a manifest with every field of every song. Songs are made of noise and tones;
`--model` is that of `msr separate` (default: the one in the package). Beside it the time of all songs by the manifest, as a
ratio to what the network alone takes for as many chunks, measured before and after since a machine's pace changes.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from msr_jax.machine import keep_compiled_programs, keep_freed_memory
from msr_jax.separate.engine import Separator, channel_groups, load

FIELDS = {
    "source", "sha256", "model", "settings", "stems", "levels", "gain_db", "clipped", "seconds", "work_seconds", "kept", "error"
}  # fmt: skip
LIMIT = 3600  # seconds that a start may take


def write_songs(folder: Path, count: int, seconds: tuple[float, float], rng: np.random.Generator) -> list[Path]:
    """Songs of lengths in a range, in folders of ten; those that are there stay."""
    paths = []
    for k in range(count):
        rate, channels = int(rng.choice([22_050, 44_100])), int(rng.integers(1, 3))
        samples = int(rng.uniform(*seconds) * rate)
        path = folder / f"{k // 10:03d}" / f"song{k:04d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(samples)[:, None] / rate
        audio = 0.2 * np.sin(2 * np.pi * rng.uniform(50, 900, channels) * t) + 0.05 * rng.standard_normal(
            (samples, channels)
        )
        soundfile.write(path, audio, rate)
        paths.append(path)
    return paths


def lines_of(manifest: Path) -> list[str]:
    return manifest.read_text().splitlines() if manifest.exists() else []


def kill_within(command: list[str], manifest: Path, rng: np.random.Generator, more: int) -> int:
    """Start it and kill it a moment after it has told of up to `more` songs more; how many are told of now."""
    wanted = len(lines_of(manifest)) + int(rng.integers(0, more + 1))
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while len(lines_of(manifest)) < wanted and child.poll() is None and time.monotonic() - started < LIMIT:
        time.sleep(0.02)
    time.sleep(float(rng.uniform(0, 1)))
    child.send_signal(signal.SIGKILL)
    child.wait()
    return len(lines_of(manifest))


def runs_of(song: Path, separator: Separator) -> tuple[int, int]:
    """Samples of a song's chunks, and how often the network runs one of them through."""
    info = soundfile.info(song)
    frames = info.frames * separator.sample_rate / info.samplerate
    chunk, overlap = separator._chunk(frames)
    chunks = 1 + max(0, math.ceil((frames - chunk) / (chunk - overlap)))
    return chunk, chunks * len(channel_groups(info.channels, separator.config["channels"]))


def network_seconds(songs: list[Path], separator: Separator, seconds: float = 10) -> float:
    """What the network takes for the chunks of all songs if it has nothing else to wait for, from so many seconds of each length."""
    channels, total = separator.config["channels"], 0.0
    runs_of_length: Counter[int] = Counter()
    for song in songs:
        chunk, count = runs_of(song, separator)
        runs_of_length[chunk] += count
    for samples, runs in runs_of_length.items():
        size = separator.network.mixtures_at_once(samples, channels)
        mixtures = np.random.default_rng(0).standard_normal((size, samples, channels)).astype(np.float32)
        call = lambda _, mixtures=mixtures: separator.network(mixtures, np.zeros((len(mixtures), 2), int), 0)
        with ThreadPoolExecutor(2) as two:  # as songs that follow each other share calls
            list(two.map(call, range(2)))
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                done += sum(map(len, two.map(call, range(8))))
            total += runs * (time.perf_counter() - started) / done
    return total


def faults(songs: list[Path], out: Path, manifest: Path) -> list[str]:
    """What is not as it must be when all is done."""
    found = [f"left over: {path}" for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    rows = [json.loads(line) for line in lines_of(manifest)]
    sources = [row["source"] for row in rows]
    found += [f"{song}: {sources.count(str(song))} lines" for song in songs if sources.count(str(song)) != 1]
    told = set()
    for row in rows:
        if (
            set(row) != FIELDS
            or row["error"]
            or None in (row["sha256"], row["seconds"])
            or set(row["levels"]) != set(row["stems"])
        ):
            found.append(f"{row['source']}: an incomplete line")
        for path in map(Path, row["stems"].values()):
            told.add(path)
            with soundfile.SoundFile(path) as stem, soundfile.SoundFile(row["source"]) as song:
                if len(stem.read()) != song.frames or (stem.samplerate, stem.channels) != (
                    song.samplerate,
                    song.channels,
                ):
                    found.append(f"{path}: not as long as its song")
    found += [f"{path}: told of nowhere" for path in out.rglob("*.wav") if path not in told]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.fuzzing.batch", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--songs", type=int, default=200)
    parser.add_argument("--seconds", type=float, nargs=2, default=(5, 300), metavar=("FROM", "TO"), help="of a song")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    songs = write_songs(args.out / "songs", args.songs, tuple(args.seconds), rng)
    out, manifest = args.out / "stems", args.out / "manifest.jsonl"
    command = [sys.executable, "-m", "msr_jax.cli", "separate", str(args.out / "songs"), "-o", str(out)]
    command += ["--manifest", str(manifest), *(["--model", args.model, "--refine", "none"] if args.model else [])]
    keep_freed_memory()
    keep_compiled_programs()
    separator = load(args.model, refine="none") if args.model else load()
    before = network_seconds(songs, separator)
    for k in range(args.kills):
        done = kill_within(command, manifest, rng, 2 * args.songs // (args.kills + 1))
        print(f"kill {k + 1}: {done} of {args.songs} songs told of", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=LIMIT).returncode
    ended = time.monotonic()
    found = faults(songs, out, manifest) + ([f"exit code {code}"] if code else [])
    rows = [json.loads(line) for line in lines_of(manifest)]
    seconds, work = (sum(row[name] for row in rows) for name in ("seconds", "work_seconds"))
    network = (before + network_seconds(songs, separator)) / 2
    print(f"finished in {ended - began:.0f} s more: {len(rows)} songs, {seconds / 60:.1f} minutes of audio")
    print(f"{work:.0f} s of work, {work / network:.2f} times the network's own {network:.0f} s")
    print("\n".join(found) or "every song once, no partial file, nothing left over, the manifest complete")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
