"""Fifty jobs of twenty clients at once over loopback, then a server that is killed: `python -m tests.page.load_jobs`.

Every client compares what it gets with its own songs: the stems with those that the library makes of the same song, and their sum
with the song. Exit code 1 where a job is lost or mixed up, where the server's memory grows, or where anything of a killed server is
left once the next one has started.
"""

import argparse
import io
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import requests
import soundfile

import msr_jax
from msr_jax.serve.jobs import OWN

RATE = 44_100
GROWTH = 1.05  # of resident memory between the first fifth of the jobs and the end


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "msr_jax.cli", "serve", "--port", "0", "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, re.search(r"http://\S+/", process.stdout.readline())[0]  # type: ignore[index]


def song(number: int) -> np.ndarray:
    """(samples, 2) float32: a tone and noise that no other number has, 1 to 2 seconds."""
    rng = np.random.default_rng(number)
    t = np.arange(int(RATE * (1 + number % 11 / 10))) / RATE
    tone = 0.2 * np.sin(2 * np.pi * (110 + 17 * number) * t)
    return (tone[:, None] + 0.1 * rng.standard_normal((len(t), 2))).astype(np.float32)


def post(server: str, samples: np.ndarray, name: str) -> dict:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return requests.post(f"{server}api/jobs", files={"file": (name, file.getvalue())}, timeout=600).json()


def stems_of(server: str, job: dict) -> dict[str, np.ndarray]:
    while job["state"] not in ("done", "failed"):
        time.sleep(0.3)
        job = requests.get(f"{server}api/jobs/{job['id']}", timeout=600).json()
    assert job["state"] == "done", job["error"]
    body = requests.get(f"{server}api/jobs/{job['id']}/stems.zip", timeout=600).content
    archive = zipfile.ZipFile(io.BytesIO(body))
    return {
        n.removesuffix(".wav"): soundfile.read(io.BytesIO(archive.read(n)), dtype="float32")[0]
        for n in archive.namelist()
    }


def memory(pid: int) -> float:
    """Resident memory in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3  # type: ignore[index]


def descendants(pid: int) -> list[int]:
    own = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [p for child in own for p in (child, *descendants(child))]


def queue_all(server: str, pid: int, jobs: int, clients: int) -> tuple[dict[int, dict[str, np.ndarray]], list[float]]:
    """Every job's stems, and the server's memory after each."""
    got: dict[int, dict[str, np.ndarray]] = {}
    sizes: list[float] = []
    lock = threading.Lock()

    def client(own: list[int]) -> None:
        made = {number: post(server, song(number), f"{number}.wav") for number in own}  # all of them wait at once
        for number, job in made.items():
            stems = stems_of(server, job)
            with lock:
                got[number] = stems
                sizes.append(memory(pid))

    threads = [threading.Thread(target=client, args=(list(range(k, jobs, clients)),)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, sizes


def check_stems(got: dict[int, dict[str, np.ndarray]]) -> tuple[float, float]:
    """The largest difference of a sum from its song, and of a stem from the library's."""
    separator = msr_jax.load(refine="none", residual="rest")
    sums, apart = 0.0, 0.0
    for number, stems in got.items():
        own = song(number)
        sums = max(sums, float(np.abs(np.sum(list(stems.values()), 0) - own).max()))
        for stem, samples in separator.separate(own, RATE).items():
            apart = max(apart, float(np.abs(stems[stem] - samples).max()))
    return sums, apart


def kill(folder: Path, process: subprocess.Popen, server: str) -> list[str]:
    """What is wrong after a server with songs in every state is killed and the next one has started."""
    ids = [post(server, np.tile(song(k), (20, 1)), "song.wav")["id"] for k in range(5)]
    while requests.get(f"{server}api/jobs/{ids[0]}", timeout=60).json()["state"] == "queued":
        time.sleep(0.05)
    helpers = descendants(process.pid)
    process.kill()
    process.wait()
    left = len(list(folder.rglob("*.f32")))
    process, server = start(folder)
    wrong = [
        f"job {k} answers"
        for k, i in enumerate(ids)
        if requests.get(f"{server}api/jobs/{i}", timeout=60).status_code != 404
    ]
    runs = [path for path in folder.iterdir() if path.name.startswith(OWN)]
    if len(runs) != 1 or [p.name for p in folder.rglob("*") if p.is_file()] != ["lock"]:
        wrong.append(f"files are left: {sorted(map(str, folder.rglob('*')))}")
    end = time.monotonic() + 10
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in helpers):
        time.sleep(0.1)
    wrong += [f"process {pid} is left" for pid in helpers if Path(f"/proc/{pid}").exists()]
    if np.abs(np.sum(list(stems_of(server, post(server, song(0), "0.wav")).values()), 0) - song(0)).max() > 1e-6:
        wrong.append("the next server separates wrongly")
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    wrong += [f"{path} is left after SIGTERM" for path in folder.iterdir()]
    print(f"killed with 5 jobs, {left} files of samples and {len(helpers)} processes: {wrong or 'nothing is left'}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--clients", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        process, server = start(folder)
        stems_of(server, post(server, song(0), "warm.wav"))
        begun = time.monotonic()
        got, sizes = queue_all(server, process.pid, args.jobs, args.clients)
        seconds = time.monotonic() - begun
        sums, apart = check_stems(got)
        early = max(sizes[: max(1, args.jobs // 5)])
        print(f"{len(got)} of {args.jobs} jobs of {args.clients} clients came back in {seconds:.0f} s")
        print(f"sums differ from their songs by {sums:.1e}, stems from the library's by {apart:.1e}")
        print(
            f"resident memory: {early:.0f} MB after a fifth of the jobs, {sizes[-1]:.0f} MB after all, {max(sizes):.0f} MB at most"
        )
        wrong = kill(folder, process, server)
    good = len(got) == args.jobs and sums <= 1e-6 and apart <= 1e-6 and max(sizes) <= GROWTH * early and not wrong
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
