"""`msr serve`: what is uploaded comes back as stems; what must not be taken is refused, and nothing is left over."""

import contextlib
import io
import re
import socket
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import requests
import soundfile
from fastapi.testclient import TestClient

from msr_jax.audio.io import AudioWriter
from msr_jax.errors import UserError
from msr_jax.serve import command, guard, source
from msr_jax.serve.api import make_app
from msr_jax.serve.audio_routes import attachment
from msr_jax.serve.decode import Decoded, Limits
from msr_jax.serve.jobs import Desk, Job, own_folder
from msr_jax.serve.models import Models
from msr_jax.serve.overview import BANDS, COLUMN, COLUMN_BYTES, Overview
from msr_jax.serve.source import Source
from tests.conftest import TINY_RATE

RATE = 2 * TINY_RATE
LIMITS = Limits(minutes=0.1)


def song_file(seconds=2.0, channels=2, rate=RATE, seed=0, kind="WAV"):
    audio = 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=kind, subtype="PCM_16")
    return file.getvalue()


def too_long():
    """The parts of an upload that does not tell its length."""
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="song.wav"\r\n\r\n'
    yield from [bytes(100_000)] * 11


def read(body):
    return soundfile.read(io.BytesIO(body), dtype="float32", always_2d=True)[0]


@pytest.fixture(scope="module")
def models(tiny_model):
    return Models([str(tiny_model)])


def client_of(models, folder, keep_hours=1.0, most=50, **options):
    desk = Desk(models, LIMITS, 1, keep_hours, most, folder)
    app = make_app(desk, **{"token": None, "max_bytes": 1_000_000, **options})
    return TestClient(app, base_url="http://localhost:8000"), desk


@pytest.fixture
def client(models, tmp_path):
    client, _ = client_of(models, tmp_path / "server")
    with client:
        yield client


def create(client, body=None, **fields):
    return client.post("/api/jobs", files={"file": ("song.wav", body or song_file())}, data=fields)


def wait(client, identity):
    for _ in range(600):
        job = client.get(f"/api/jobs/{identity}").json()
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.1)
    raise AssertionError(job)


def test_a_song_comes_back_as_stems_that_add_up_to_it(client, tmp_path):
    body = song_file()
    answer = create(client, body)
    assert answer.status_code == 202 and answer.headers["location"] == f"/api/jobs/{answer.json()['id']}"
    job = wait(client, answer.json()["id"])
    assert job["state"] == "done" and job["frames_done"] == job["frames"] == 2 * RATE
    assert job["stems"] == ["bass", "drums", "guitar", "piano", "rest"]
    base = f"/api/jobs/{job['id']}"
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"{base}/stems.zip").content))
    assert archive.testzip() is None
    stems = {name.removesuffix(".wav"): read(archive.read(name)) for name in archive.namelist()}
    assert list(stems) == job["stems"]
    np.testing.assert_allclose(sum(stems.values()), read(body), atol=1e-6)
    np.testing.assert_array_equal(read(client.get(f"{base}/drums.wav").content), stems["drums"])
    np.testing.assert_allclose(
        read(client.get(f"{base}/drums.flac").content), np.clip(stems["drums"], -1, 1), atol=2**-22
    )
    mp3 = client.get(f"{base}/drums.mp3")
    assert mp3.headers["content-type"] == "audio/mpeg"
    with AudioWriter(tmp_path / "drums.mp3", RATE, stems["drums"].shape[1]) as writer:  # as `msr separate` writes it
        writer.write(stems["drums"])
    assert mp3.content == (tmp_path / "drums.mp3").read_bytes()
    mix = read(client.get(f"{base}/mixdown.wav", params={"gains": "drums:0.5,bass:1"}).content)
    np.testing.assert_allclose(mix, 0.5 * stems["drums"] + stems["bass"], atol=1e-6)
    piece = read(client.get(f"{base}/bass.wav", params={"start": 1000, "frames": 77}).content)
    np.testing.assert_array_equal(piece, stems["bass"][1000:1077])
    view = client.get(f"{base}/song.view")
    assert len(view.content) == -(-job["frames"] // COLUMN) * COLUMN_BYTES
    assert view.headers["x-column-bands"] == str(BANDS)
    assert client.get(f"{base}/song.view", params={"start": 1 << 32}).content == b""
    assert (
        client.get(f"{base}/song.view", params={"start": 1 << 33}).status_code == 422
    )  # farther than a file can reach


def test_another_setting_takes_the_same_song_again(client):
    first = wait(client, create(client).json()["id"])
    answer = client.post(
        "/api/jobs", files={"source": (None, first["id"]), "refine": (None, "consistency"), "steps": (None, "2")}
    )
    second = wait(client, answer.json()["id"])
    assert second["state"] == "done" and (second["refine"], second["steps"]) == ("consistency", 2)
    assert client.delete(f"/api/jobs/{first['id']}").status_code == 204
    assert client.get(f"/api/jobs/{second['id']}/song.wav").status_code == 200


def test_events_end_with_the_job(client):
    identity = create(client).json()["id"]
    with client.stream("GET", f"/api/jobs/{identity}", headers={"accept": "text/event-stream"}) as events:
        lines = [line for line in events.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and '"state": "done"' in lines[-1]


@pytest.mark.parametrize(
    ("send", "status", "says"),
    [
        (lambda c: c.post("/api/jobs", json={"url": "http://localhost/song.wav"}), 415, "no addresses"),
        (lambda c: c.post("/api/jobs", files={"source": (None, "../../etc")}), 404, "no such job"),
        (lambda c: c.post("/api/jobs", files={"model": (None, "x")}), 422, "one of 'file'"),
        (lambda c: create(c, model="../bundled"), 422, "no model '../bundled'"),
        (lambda c: create(c, refine="loudly"), 422, "cannot refine by 'loudly'"),
        (lambda c: create(c, refine="consistency", steps="3"), 422, "steps must be one of 1, 2, 4"),
        (lambda c: create(c, refine="consistency", steps="-1"), 422, "whole number"),
        (lambda c: create(c, bytes(1_100_000)), 413, "larger than the 1 MB"),
        (lambda c: c.post("/api/jobs", content=too_long(), headers={"content-type": "multipart/form-data; boundary=x"}), 413, "1 MB"),
        (lambda c: create(c, b"no audio at all"), 422, "cannot be read as audio"),
        (lambda c: create(c, song_file(7.0)), 422, "longer than the 0.1 minutes"),
        (lambda c: create(c, song_file(0.1, channels=9)), 422, "9 channels; at most 8"),
        (lambda c: create(c, song_file(0.01, rate=384_000)), 422, "384000 samples a second"),
        (lambda c: c.get("/api/jobs/unknown"), 404, "no such job"),
        (lambda c: c.get("/api/jobs/%2e%2e/drums.wav"), 404, ""),
        (lambda c: c.post("/api/jobs", headers={"origin": "http://elsewhere.example"}), 403, "other sites"),
        (lambda c: c.get("/api/models", headers={"host": "elsewhere.example"}), 421, "localhost alone"),
        (
            lambda c: c.post("/api/jobs", content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data; boundary=x"}),
            (400, 422),
            "",
        ),
        (lambda c: c.post("/api/jobs", content=b"x", headers={"content-type": "multipart/form-data"}), 400, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_with_the_reason(client, tmp_path, send, status, says):
    answer = send(client)
    assert [p.name for p in (tmp_path / "server").glob("*/*")] == ["lock"] and str(tmp_path) not in answer.text
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert says in answer.text


def test_a_song_that_turns_out_damaged_fails_without_naming_a_place(client, tmp_path):
    body = bytearray(song_file(5.0, kind="FLAC"))
    body[len(body) // 2 :] = bytes(len(body) - len(body) // 2)
    job = wait(client, create(client, bytes(body)).json()["id"])
    assert job["state"] == "failed" and "the file is damaged" in job["error"] and str(tmp_path) not in job["error"]
    assert client.get(f"/api/jobs/{job['id']}/drums.wav").status_code == 409


def test_samples_can_be_had_before_all_are_decoded(monkeypatch, tmp_path):
    slow, audio = threading.Event(), Decoded(tmp_path / "song.f32", 3, 1, 8000)

    def decode(*_):
        np.array([1, 2, 3], np.float32).tofile(audio.path)
        yield audio, 2
        slow.wait()
        yield audio, 3

    monkeypatch.setattr(source, "decode", decode)
    song = Source(tmp_path / "upload", "song.wav")
    assert song.open(LIMITS) == audio
    np.testing.assert_array_equal(song.read(0, 2), [[1], [2]])
    slow.set()
    np.testing.assert_array_equal(song.read(1, 9), [[2], [3]])


def test_decoding_ends_at_its_time(tmp_path):
    (tmp_path / "upload").write_bytes(song_file(1.0))
    with pytest.raises(UserError, match="took more time or memory"):
        Source(tmp_path / "upload", "song.wav").open(LIMITS._replace(seconds=0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-minutes", "0"], "--max-minutes must be positive"),
        (["--jobs", "-1"], "--jobs must be positive"),
        (["--keep-hours", "nan"], "--keep-hours must be positive"),
        (["--max-upload-mb", "inf"], "--max-upload-mb must be positive"),
        (["--port", "70000"], "--port must lie between 0 and 65535"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen on 203.0.113.1:0"),
        (["--allow-origin", "*", "--host", "203.0.113.1"], r"--allow-origin takes one site .* not '\*'"),
        (
            ["--allow-origin", "https://friend.example/app", "--host", "203.0.113.1"],
            "without a path, not 'https://friend.example/app'",
        ),
        (["--allow-origin", "friend.example", "--host", "203.0.113.1"], "such as https://friend.example"),
    ],
)
def test_a_server_that_makes_no_sense_does_not_start(arguments, says):
    with pytest.raises(UserError, match=says):
        command.main(arguments)


def test_only_this_machine_needs_no_token():
    assert all(map(guard.is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(guard.is_loopback, ("0.0.0.0", "::", "192.168.1.2", "localhost.example")))


@pytest.mark.parametrize("host", ["127.0.0.2:8000", "127.0.0.1", "[::1]:8000", "localhost", "LOCALHOST:80"])
def test_every_address_of_this_machine_is_answered_to(client, host):
    assert client.get("/api/models", headers={"host": host}).status_code == 200
    assert client.get("/api/models", headers={"host": f"{host.split(':')[0]}.example"}).status_code == 421


@pytest.mark.parametrize(
    "path",
    ["../../../lock", "%2e%2e%2flock", "..%5clock", "song.f32", "0.f32", "upload", "%00.wav", "nothing.wav", "song.wav%2f..", "drums.exe"],
)  # fmt: skip
def test_only_tracks_of_a_job_can_be_had(client, path):
    identity = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
    assert client.get(f"/api/jobs/{identity}/{path}").status_code == 404
    assert client.get(f"/page/{path}").status_code == 404
    assert client.get(f"/api/jobs/{identity[:-1]}/song.wav").status_code == 404


def test_a_wrong_parameter_gets_a_sentence_as_all_else_does(client):
    identity = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
    for query in ("start=-1&frames=1", "start=x&frames=1", "start=0&frames=0"):
        answer = client.get(f"/api/jobs/{identity}/drums.wav?{query}")
        assert answer.status_code == 422 and isinstance(answer.json()["detail"], str)
    assert client.head("/healthz").status_code == 200


def test_a_folder_for_files_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written .* name another folder with --folder"):
        own_folder(tmp_path / "file")


def test_names_of_uploads_are_shown_but_are_no_paths(client, tmp_path):
    answer = client.post("/api/jobs", files={"file": ("../../evil/..\\song.wav", song_file(0.5))})
    job = wait(client, answer.json()["id"])
    assert job["name"] == "song.wav"
    assert {p.parts[len(tmp_path.parts)] for p in tmp_path.rglob("*")} == {"server"}
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("song.wav"))
    header = client.get(f"/api/jobs/{job['id']}/stems.zip").headers["content-disposition"]
    assert header == 'attachment; filename="song (stems).zip"'


@pytest.mark.parametrize(
    ("sent", "plain", "whole"),
    [
        ("音楽.wav", "__ (stems).zip", "音楽 (stems).zip"),
        ("Été & \u202etxt\u0085\u2028x.wav", "_t_ _ txtx (stems).zip", "Été & txtx (stems).zip"),
        ("a*b?:c.wav", "a_b__c (stems).zip", None),
        ("\u202e.wav", "song (stems).zip", None),
    ],
)
def test_a_download_has_the_songs_name_in_any_script(sent, plain, whole):
    job = Job("id", Path(), Source(Path("upload"), sent), "", "none", None, [])
    header = attachment(job, "zip")["content-disposition"]
    header.encode("ascii")
    extended = re.search(r"; filename\*=UTF-8''(\S+)$", header)
    assert header.startswith(f'attachment; filename="{plain}"')
    assert (unquote(extended[1]) if extended else None) == whole


def test_every_answer_carries_a_strict_policy(client):
    for path in ("/", "/page/main.js", "/api/models", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "access-control-allow-origin" not in headers
    assert "https://" not in client.get("/").text and "http://" not in client.get("/").text


def test_with_a_token_only_its_holder_is_served(models, tmp_path):
    client, _ = client_of(models, tmp_path, token="secret")
    with client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/api/models").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/api/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/?token=secret").status_code == 200  # follows the redirection, with the cookie
        assert client.get("/api/models").status_code == 200


def test_only_named_origins_may_use_the_api_from_a_page(models, tmp_path):
    client, _ = client_of(models, tmp_path, origins=("https://friend.example",))
    with client:
        headers = client.get("/api/models", headers={"origin": "https://friend.example"}).headers
        assert headers["access-control-allow-origin"] == "https://friend.example"
        assert (
            "access-control-allow-origin"
            not in client.get("/api/models", headers={"origin": "https://x.example"}).headers
        )


def test_a_full_queue_says_so_and_a_removed_job_leaves_nothing(models, tmp_path):
    client, desk = client_of(models, tmp_path, most=2)
    with client:
        held = threading.Event()
        desk.models = type(
            "Waiting", (), {"offers": models.offers, "stems": models.stems, "separator": lambda *_: held.wait()}
        )()
        answers = [create(client, song_file(0.2, seed=k)) for k in range(4)]
        while 202 in [a.status_code for a in answers] and len([a for a in answers if a.status_code == 202]) < 3:
            answers.append(create(client, song_file(0.2)))
        refused = create(client)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        for answer in answers:
            if answer.status_code == 202:
                client.delete(f"/api/jobs/{answer.json()['id']}")
        held.set()
        time.sleep(0.3)
        assert not [p for p in desk.folder.iterdir() if p.name != "lock"]
    assert not list(tmp_path.iterdir())


def test_files_go_when_their_time_is_over_and_when_a_server_is_gone(models, tmp_path):
    client, desk = client_of(models, tmp_path, keep_hours=0.2 / 3600)
    stale = tmp_path / "msr-serve-that-was-killed"
    stale.mkdir()
    (stale / "lock").touch()
    with client:
        identity = create(client, song_file(0.2)).json()["id"]
        for _ in range(100):
            if client.get(f"/api/jobs/{identity}").status_code == 404:
                break
            time.sleep(0.1)
        assert not [p for p in desk.folder.iterdir() if p.name != "lock"]
        client_of(models, tmp_path)[1].close()
        assert not stale.exists() and desk.folder.exists()


@pytest.mark.parametrize(
    ("pause", "length", "says"),
    [
        (60, b"100", b"nothing was received"),
        (0.01, b"100", b"slower than 4096 bytes"),
        (60, b"\xb2", b"nothing was received"),  # a digit, but no number
    ],
)
def test_an_upload_that_stands_still_or_creeps_is_ended(monkeypatch, models, tmp_path, pause, length, says):
    import asyncio

    monkeypatch.setattr(guard, "STALL", 0.05)
    desk = Desk(models, LIMITS, 1, 1.0, 5, tmp_path)
    app = make_app(desk, None, 1_000_000)
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"multipart/form-data; boundary=x"),
        (b"content-length", length),
    ]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/api/jobs", "raw_path": b"/api/jobs", "query_string": b"", "headers": headers, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
    sent = []

    async def receive():
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    desk.close()
    assert sent[0]["status"] == 408 and says in sent[1]["body"]


@contextlib.contextmanager
def served(models, folder):
    """The address of a server, and its desk."""
    import uvicorn

    desk = Desk(models, LIMITS, 1, 1.0, 5, folder)
    server = uvicorn.Server(uvicorn.Config(make_app(desk, None, 1_000_000), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield ("127.0.0.1", server.servers[0].sockets[0].getsockname()[1]), desk
    server.should_exit = True
    thread.join()


def test_what_a_visitor_breaks_off_leaves_nothing(models, tmp_path, caplog):
    with served(models, tmp_path) as (address, desk):
        base = "http://{}:{}".format(*address)
        job = requests.post(f"{base}/api/jobs", files={"file": ("song.wav", song_file())}).json()
        while (job := requests.get(f"{base}/api/jobs/{job['id']}").json())["state"] != "done":
            time.sleep(0.05)
        head = "Host: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000\r\n\r\n"
        for request in (
            f"GET /api/jobs/{job['id']}/stems.zip HTTP/1.1\r\n{head}",
            f"POST /api/jobs HTTP/1.1\r\n{head}--x\r\n",
        ):
            with socket.create_connection(address) as visitor:
                visitor.sendall(request.encode())
                visitor.recv(1) if request.startswith("GET") else None
        assert requests.delete(f"{base}/api/jobs/{job['id']}").status_code == 204
        assert requests.get(f"{base}/healthz").text == "ok"
        assert [p.name for p in desk.folder.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.exc_info]


def test_the_client_of_the_readme_gets_its_stems(models, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "msr_jax" / "serve" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    (tmp_path / "song.wav").write_bytes(song_file(0.5))
    monkeypatch.chdir(tmp_path)
    with served(models, tmp_path / "server") as (address, _):
        exec(code.replace("127.0.0.1:8000", "{}:{}".format(*address)), {})
    assert len(zipfile.ZipFile("stems.zip").namelist()) == 5
    assert not list((tmp_path / "server").iterdir())


def test_metrics_count_jobs(client):
    wait(client, create(client).json()["id"])
    text = client.get("/metrics").text
    assert "msr_jobs_taken_total 1.0" in text and 'msr_jobs_kept{state="done"} 1.0' in text


def test_columns_do_not_depend_on_how_a_song_comes():
    audio = song_file(0.7)
    samples = read(audio)
    whole = Overview(RATE).add(samples, ends=True)
    view = Overview(RATE)
    parts = [view.add(samples[k : k + 999], ends=k + 999 >= len(samples)) for k in range(0, len(samples), 999)]
    assert b"".join(parts) == whole
