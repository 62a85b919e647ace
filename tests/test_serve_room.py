"""`msr serve` where its disk is full, a job is deleted under way, or what surrounds it is odd: an answer in a
sentence, nothing left over, and nothing of others removed."""

import errno
import fcntl
import io
import os
import shutil
import threading
import time
import zipfile

import numpy as np
import pytest
import soundfile

from msr_jax.errors import UserError
from msr_jax.separate.engine import Separator
from msr_jax.serve import command, downloads
from msr_jax.serve.jobs import own_folder
from msr_jax.serve.models import Models
from tests.test_serve import RATE, client_of, create, models, song_file, wait  # noqa: F401  (a fixture among them)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def server(models, tmp_path):  # noqa: F811
    client, desk = client_of(models, tmp_path / "server")
    with client:
        yield client, desk


def test_an_upload_that_meets_a_full_disk_is_answered_and_leaves_nothing(server, monkeypatch):
    client, desk = server
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        answer = create(client)
    assert answer.status_code == 507 and "No space left" in answer.json()["detail"]
    assert [p.name for p in desk.folder.iterdir()] == ["lock"]
    assert wait(client, create(client).json()["id"])["state"] == "done"


def test_a_job_that_meets_a_full_disk_names_the_reason_and_keeps_no_half_stems(server, monkeypatch):
    client, desk = server
    monkeypatch.setattr(Separator, "stream", full)
    identity = create(client).json()["id"]
    job = wait(client, identity)
    assert job["state"] == "failed" and "No space left" in job["error"]
    assert {p.name for p in desk.get(identity).folder.iterdir()} <= {"song.f32", "upload"}


def test_a_download_that_meets_a_full_disk_does_not_name_the_servers_place(server, monkeypatch):
    client, desk = server
    identity = wait(client, create(client).json()["id"])["id"]

    class Full(downloads.AudioWriter):
        def write(self, audio):
            try:
                full()
            except OSError as error:
                raise UserError(f"cannot write {self.path}") from error

    monkeypatch.setattr(downloads, "AudioWriter", Full)
    answer = client.get(f"/api/jobs/{identity}/drums.flac")
    assert answer.status_code == 507 and str(desk.folder) not in answer.text


def test_mixes_of_any_gains_do_not_fill_the_disk(server):
    client, desk = server
    identity = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
    for k in range(6):
        assert client.get(f"/api/jobs/{identity}/mixdown.wav?gains=drums:0.{k + 1}").status_code == 200
    assert len(list(desk.get(identity).folder.glob("mix_*"))) == downloads.MIXES
    assert client.get(f"/api/jobs/{identity}/drums.flac").status_code == 200  # makes room for no mix
    assert len(list(desk.get(identity).folder.glob("mix_*"))) == downloads.MIXES


def test_mixes_whose_gains_differ_in_the_last_digit_differ(server):
    client, desk = server
    identity = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
    address = f"/api/jobs/{identity}/mixdown.wav?gains=drums:"
    assert client.get(f"{address}0.000001").content != client.get(f"{address}0").content
    assert client.get(f"{address}0.5").content == client.get(f"{address}0.50").content
    assert len(list(desk.get(identity).folder.glob("mix_*"))) == 3


def test_a_file_that_cannot_be_made_is_told_without_the_servers_place(server):
    client, desk = server
    job = desk.get(wait(client, create(client, song_file(0.2)).json()["id"])["id"])
    np.full(job.samples("drums").stat().st_size // 4, 3e38, np.float32).tofile(job.samples("drums"))
    job.source.audio = job.source.audio._replace(sample_rate=100_001)
    for path, says in (("mixdown.wav?gains=drums:4", "NaN or infinite"), ("bass.flac", "no rate of 100001 Hz")):
        answer = client.get(f"/api/jobs/{job.id}/{path}")
        assert answer.status_code == 422 and says in answer.text and str(desk.folder) not in answer.text


def test_a_model_that_is_gone_is_told_without_the_servers_place(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "own")
    client, _ = client_of(Models([str(tmp_path / "own")]), tmp_path / "server")
    shutil.rmtree(tmp_path / "own")
    with client:
        job = wait(client, create(client, song_file(0.2)).json()["id"])
    assert job["error"] == "the server cannot load its model own any more"


def test_an_encoder_does_not_go_on_for_a_job_that_is_deleted(server):
    client, desk = server
    job = desk.get(wait(client, create(client, song_file(0.2)).json()["id"])["id"])
    job.cancelled = True
    with pytest.raises(FileNotFoundError):
        downloads.encoded(job, {"song": 1.0}, "flac", "song")
    assert not list(job.folder.glob("*.flac"))


def test_what_is_fetched_while_its_job_is_deleted_is_told_so(server):
    client, desk = server
    identity = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
    shutil.rmtree(desk.get(identity).folder)
    for path in ("drums.flac", "stems.zip", "mixdown.wav?gains=drums:1", "drums.wav?start=0&frames=10"):
        answer = client.get(f"/api/jobs/{identity}/{path}")
        assert answer.status_code == 404 and answer.json()["detail"] == "the job has been deleted"


def test_a_zip_whose_job_is_deleted_on_its_way_is_not_whole(server):
    client, desk = server
    job = desk.get(wait(client, create(client, song_file(0.2)).json()["id"])["id"])
    pieces = downloads.zipped(job, "wav")
    first = next(pieces)
    shutil.rmtree(job.folder)
    assert not zipfile.is_zipfile(io.BytesIO(first + b"".join(pieces)))


def test_who_watches_a_job_does_not_keep_a_server_that_ends(server, models):  # noqa: F811
    client, desk = server
    held = threading.Event()
    waiting = {"offers": models.offers, "stems": models.stems, "separator": lambda *_: held.wait()}
    desk.models = type("Waiting", (), waiting)()
    identity = create(client, song_file(0.2)).json()["id"]
    client.app.state.is_ending = lambda: True
    started = time.monotonic()
    client.get(f"/api/jobs/{identity}", headers={"accept": "text/event-stream"})
    assert time.monotonic() - started < 5
    held.set()


def test_a_browser_may_ask_before_it_uses_the_api_from_a_named_page(models, tmp_path):  # noqa: F811
    client, _ = client_of(models, tmp_path, origins=("https://friend.example",))
    with client:
        asked = {"origin": "https://friend.example", "access-control-request-method": "POST"}
        answer = client.options("/api/jobs", headers=asked)
    assert answer.status_code == 204 and answer.content == b""
    assert "x-column-bands" in answer.headers["access-control-expose-headers"]


def test_a_name_that_a_browser_escaped_is_shown_as_it_was(server):
    client, _ = server
    answer = client.post("/api/jobs", files={"file": ('a"b.wav', song_file(0.2))})
    assert answer.json()["name"] == 'a"b.wav'


def test_a_token_that_no_header_can_carry_is_refused():
    with pytest.raises(UserError, match="--token must be of ASCII"):
        command.main(["--token", "пароль", "--port", "0"])


def test_a_deleted_job_leaves_its_song_alone_to_another_that_needs_it(models, tmp_path):  # noqa: F811
    client, desk = client_of(models, tmp_path)
    with client:
        first = wait(client, create(client, song_file(0.2)).json()["id"])["id"]
        second = wait(client, client.post("/api/jobs", files={"source": (None, first)}).json()["id"])["id"]
        assert client.get(f"/api/jobs/{first}/stems.zip").status_code == 200
        folder = desk.get(first).folder
        client.delete(f"/api/jobs/{first}")
        assert sorted(path.name for path in folder.iterdir()) == ["song.f32", "upload"]
        assert client.get(f"/api/jobs/{second}/stems.zip").status_code == 200
        client.delete(f"/api/jobs/{second}")
        assert [path.name for path in desk.folder.iterdir()] == ["lock"]


def test_a_song_whose_stems_are_not_finite_fails_in_a_sentence(server):
    client, _ = server
    file = io.BytesIO()
    soundfile.write(file, np.full((RATE // 2, 2), 1e30, np.float32), RATE, format="WAV", subtype="FLOAT")
    job = wait(client, create(client, file.getvalue()).json()["id"])
    assert job["state"] == "failed" and "far louder than" in job["error"]


def test_a_site_is_told_as_browsers_name_it():
    for text in ("https://friend.example", "https://Friend.example/", "https://friend.example:443"):
        assert command.origin_of(text) == "https://friend.example"
    for text in ("http://[::1]:3000", "http://localhost:443", "https://friend.example:80", "app://local"):
        assert command.origin_of(text) == text


@pytest.mark.parametrize(
    "other", ["foo[bar]=1", '{"a":1}', "a@b=1", "=x", "na me=1", 'a="x', "", "msr_token_1=x", "msr_token=y"]
)
def test_cookies_of_other_programs_lock_nobody_out(models, tmp_path, other):  # noqa: F811
    token = 'p@ss "w;rd,%3B'
    client, _ = client_of(models, tmp_path, token=token)
    with client:
        answer = client.get("/", params={"token": token}, follow_redirects=False)
        own = answer.headers["set-cookie"].split("; ")[0]
        client.cookies.clear()
        for cookies in (f"{other}; {own}", f"{own}; {other}", f"{own};{other}"):
            assert client.get("/api/models", headers={"cookie": cookies}).status_code == 200
        assert client.get("/api/models", headers={"cookie": f"{other}; {own}x"}).status_code == 401
        elsewhere = {"cookie": own, "host": "localhost:8001"}
        assert client.get("/api/models", headers=elsewhere).status_code == 401


def test_a_server_removes_no_folder_that_is_none_of_its_kind(tmp_path):
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "lock").touch()
    (tmp_path / "msr-serve-notes").mkdir()
    _, lock = own_folder(tmp_path)
    lock.close()
    assert (tmp_path / "run-1" / "lock").exists() and (tmp_path / "msr-serve-notes").exists()


def test_a_server_that_starts_does_not_remove_what_another_is_just_making(tmp_path, monkeypatch):
    taking = fcntl.flock

    def amid(*arguments):  # another server starts before the lock is taken
        monkeypatch.setattr(fcntl, "flock", taking)
        own_folder(tmp_path)[1].close()
        taking(*arguments)

    monkeypatch.setattr(fcntl, "flock", amid)
    folder, lock = own_folder(tmp_path)
    assert (folder / "lock").exists()
    own_folder(tmp_path)[1].close()
    assert folder.exists()
    lock.close()
