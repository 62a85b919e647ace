"""Gives the API of a running server what its description allows, and what it forbids: `python -m tests.page.fuzz_api MINUTES`.

Exit code 1 for any answer of 500 or above but 503 (a full queue), or one that the description does not know. A finished job stands
by, so that its files are asked for as well. Sizes are small and requests one after another: this looks for faults, not for limits.
"""

import io
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import schemathesis
import soundfile
from hypothesis import HealthCheck, Phase, given, seed, settings


def finished_job(server: str) -> str:
    """The id of a job that is done."""
    import json

    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal((22_050, 1)), 22_050, format="WAV")
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    request = urllib.request.Request(f"{server}api/jobs", head + file.getvalue() + b"\r\n--x--\r\n")
    request.add_header("content-type", "multipart/form-data; boundary=x")
    job = json.load(urllib.request.urlopen(request))
    while job["state"] != "done":
        time.sleep(0.2)
        job = json.load(urllib.request.urlopen(f"{server}api/jobs/{job['id']}"))
    return job["id"]


def main(minutes: float) -> int:
    command = [
        sys.executable,
        "-m",
        "msr_jax.cli",
        "serve",
        "--port",
        "0",
        "--max-upload-mb",
        "2",
        "--keep-hours",
        "0.1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[index]
    schema = schemathesis.openapi.from_url(f"{server}openapi.json")
    job, start, answers, faults = finished_job(server), time.monotonic(), {}, []
    draw = random.Random(0)
    operations = [result.ok() for result in schema.get_all_operations()]
    turn = 0
    while time.monotonic() - start < 60 * minutes:
        for operation in operations:

            @seed(turn)
            @settings(
                max_examples=10,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def try_once(case):
                if (
                    case.path_parameters
                    and "job_id" in case.path_parameters
                    and draw.random() < 0.7
                    and case.method != "DELETE"
                ):
                    case.path_parameters["job_id"] = job
                    if "track" in case.path_parameters and draw.random() < 0.7:
                        case.path_parameters["track"] = draw.choice(["song", "drums", "rest"])
                    if "suffix" in case.path_parameters and draw.random() < 0.7:
                        case.path_parameters["suffix"] = draw.choice(["wav", "flac", "mp3"])
                response = case.call(timeout=60)
                answers[response.status_code] = answers.get(response.status_code, 0) + 1
                if response.status_code >= 500 and response.status_code != 503:
                    faults.append(f"{case.method} {case.formatted_path} {response.status_code}")

            try_once()
        turn += 1
    print(f"{sum(answers.values())} requests in {turn} turns: {dict(sorted(answers.items()))}")
    print("\n".join(faults))
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
