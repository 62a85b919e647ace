"""Audio that goes out: stems, pieces of them, mixdowns, and the columns that draw them."""

import contextlib
import hashlib
import itertools
import re
import unicodedata
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi.responses import FileResponse, StreamingResponse

from msr_jax.serve import downloads
from msr_jax.serve.answers import finished_job, job_of, problems
from msr_jax.serve.jobs import Desk, Job
from msr_jax.serve.overview import BANDS, COLUMN, COLUMN_BYTES

MOST_FRAMES = 1 << 20  # samples of one piece
MOST_COLUMNS = 1 << 16
GAIN = 4.0  # the largest factor of a mixdown
VIEW_HEADERS = {"x-column-samples": str(COLUMN), "x-column-bands": str(BANDS)}


def audio_routes(desk: Desk) -> APIRouter:
    """GET of everything below /api/jobs/ID/ that sounds, or draws what sounds."""
    router = APIRouter()

    @router.get("/api/jobs/{job_id}/stems.zip", response_class=Response, responses=problems(404, 409, 422, 507))
    def stems(job_id: str, format: Annotated[str, Query(pattern="^(wav|flac|mp3)$")] = "wav") -> StreamingResponse:
        """All stems as a ZIP; with `rest`, what they leave of the song, they add up to it."""
        job = finished_job(desk, job_id)
        pieces = downloads.zipped(job, format)
        first = next(pieces)  # what the format cannot hold shows here, before the answer begins
        return StreamingResponse(
            itertools.chain([first], pieces), headers=attachment(job, "zip"), media_type="application/zip"
        )

    @router.get("/api/jobs/{job_id}/mixdown.{suffix}", response_class=Response, responses=problems(404, 409, 422, 507))
    def mixdown(
        job_id: str,
        suffix: str,
        gains: Annotated[str, Query(description="factors by stem: drums:1,bass:0.5")],
    ) -> FileResponse:
        """A sum of stems."""
        _check_suffix(suffix)
        job = finished_job(desk, job_id)
        chosen = _gains(job, gains)
        key = hashlib.sha256(repr(sorted(chosen.items())).encode()).hexdigest()[:32]  # of all digits of all gains
        path = downloads.encoded(job, chosen, suffix, f"mix_{key}")
        return FileResponse(path, media_type=downloads.MEDIA[suffix], headers=attachment(job, suffix, "mix"))

    @router.get("/api/jobs/{job_id}/{track}.view", response_class=Response, responses=problems(404, 422))
    def view(job_id: str, track: str, start: Annotated[int, Query(ge=0, le=1 << 32)] = 0) -> Response:
        """Columns that draw a track ("song" is the song): lowest and highest sample (int8), then levels of bands (uint8)."""
        job = job_of(desk, job_id)
        _check_track(job, track)
        data = b""
        with contextlib.suppress(FileNotFoundError), open(job.view(track), "rb") as file:
            file.seek(start * COLUMN_BYTES)
            data = file.read(MOST_COLUMNS * COLUMN_BYTES)
        data = data[: len(data) // COLUMN_BYTES * COLUMN_BYTES]
        return Response(data, media_type="application/octet-stream", headers=VIEW_HEADERS)

    @router.get("/api/jobs/{job_id}/{track}.{suffix}", response_class=Response, responses=problems(404, 409, 422, 507))
    def stem(
        job_id: str,
        track: str,
        suffix: str,
        start: Annotated[int | None, Query(ge=0, le=1 << 40, description="sample of the song; wav only")] = None,
        frames: Annotated[int, Query(ge=1, le=MOST_FRAMES)] = MOST_FRAMES,
    ) -> Response:
        """A stem of a finished job, or the song by the name "song"; with `start`, a piece of it as far as it is there."""
        _check_suffix(suffix)
        if start is None:
            job = finished_job(desk, job_id)
            _check_track(job, track)
            name = track if track == "song" else str(job.stems.index(track))
            path = downloads.encoded(job, {track: 1.0}, suffix, name)
            return FileResponse(path, media_type=downloads.MEDIA[suffix], headers=attachment(job, suffix, track))
        job = job_of(desk, job_id)
        _check_track(job, track)
        if suffix != "wav":
            raise HTTPException(422, "pieces are wav")
        if job.source.audio is None or start >= job.frames:
            raise HTTPException(409, f"sample {start} is not there; {job.frames} are")
        body = downloads.piece(job.read(track, start, frames), job.source.audio.sample_rate)
        return Response(body, media_type="audio/wav")

    return router


def _check_suffix(suffix: str) -> None:
    if suffix not in downloads.MEDIA:
        raise HTTPException(404, f"there are {', '.join(downloads.MEDIA)}, not '{suffix}'")


def _check_track(job: Job, track: str) -> None:
    if track != "song" and track not in job.stems:
        raise HTTPException(404, f"the job has the stems {', '.join(job.stems)}, not '{track}'")


def _gains(job: Job, text: str) -> dict[str, float]:
    chosen: dict[str, float] = {}
    for part in text.split(","):
        stem, _, gain = part.partition(":")
        if stem not in job.stems or not re.fullmatch(r"\d{1,2}(\.\d{1,6})?", gain, re.ASCII) or float(gain) > GAIN:
            raise HTTPException(422, f"gains are written drums:1,bass:0.5, stems of the job and 0 to {GAIN:g}")
        chosen[stem] = float(gain)
    return chosen


def attachment(job: Job, suffix: str, what: str = "stems") -> dict[str, str]:
    """The header that names a download after its song: whole, and in ASCII for who does not know better."""
    title = "".join(c for c in Path(job.source.name).stem if _shows(c)).strip(" .") or "song"
    name = re.sub(r'[\\/:*?"<>|]', "_", f"{title} ({what}).{suffix}")  # which file systems forbid
    plain = re.sub(r"[^\w .()-]", "_", name, flags=re.ASCII)
    extended = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}"  # RFC 6266
    return {"content-disposition": f'attachment; filename="{plain}"{extended}'}


def _shows(character: str) -> bool:
    # Not control characters, surrogates, ends of lines, nor what turns the direction of writing; the joiners of scripts do no harm.
    return character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
