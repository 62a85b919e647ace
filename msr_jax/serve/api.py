"""The HTTP API over a desk of jobs, and the page that uses it."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from msr_jax.errors import UserError
from msr_jax.serve import downloads
from msr_jax.serve.decode import check
from msr_jax.serve.guard import Guard
from msr_jax.serve.jobs import ENDED, Desk, Full, Job, Source
from msr_jax.serve.overview import BANDS, COLUMN, COLUMN_BYTES

PAGE = Path(__file__).with_name("page")
TICK = 0.2  # seconds between two looks at a job that is watched
MOST_FRAMES = 1 << 20  # samples of one piece
MOST_COLUMNS = 1 << 16
GAIN = 4.0  # the largest factor of a mixdown


class JobReport(BaseModel):
    """`frames_done` of `frames` samples of every stem can be had; `ahead` jobs come before it in the queue."""

    id: str
    name: str
    model: str
    refine: str
    steps: int | None
    state: str = Field(description="queued, decoding, separating, done or failed")
    error: str | None
    ahead: int | None
    stems: list[str]
    sample_rate: int | None
    channels: int | None
    frames: int | None
    frames_done: int


class Offer(BaseModel):
    """A model: its stems, its rate in Hz, and how it can refine, in how many steps."""

    name: str
    stems: list[str]
    sample_rate: int
    channels: int
    refinements: list[str]
    steps: list[int]


class Problem(BaseModel):
    """What was wrong, in a sentence."""

    detail: str


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    # Everything can also be answered with: no token (401), another site's (403), the wrong host (421).
    return {code: {"model": Problem} for code in (401, 403, 421, *codes)}


UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "an audio file"},
                        "source": {
                            "type": "string",
                            "description": "instead of a file: a job whose song to take again",
                        },
                        "model": {"type": "string"},
                        "refine": {"type": "string"},
                        "steps": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def make_app(desk: Desk, token: str | None, max_bytes: int, origins: tuple[str, ...] = ()) -> FastAPI:
    """The application; at its end the desk is closed and its files are removed."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.close)

    app = FastAPI(
        title="msr_jax",
        summary="Separates songs into stems.",
        version=version("msr_jax"),
        docs_url=None,  # the usual pages of documentation load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.is_ending = lambda: False  # whoever runs it says when

    def job_of(identity: str) -> Job:
        job = desk.get(identity)
        if job is None:
            raise HTTPException(404, "there is no such job; it may have ended long ago, or with an earlier server")
        return job

    def finished(identity: str) -> Job:
        job = job_of(identity)
        if job.state != "done":
            raise HTTPException(409, f"the job is {job.state}; its files can be had when it is done")
        return job

    def report(job: Job) -> JobReport:
        return JobReport(**job.report(desk.ahead(job)))

    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(OSError)
    async def no_room(_: Request, error: OSError) -> JSONResponse:
        if isinstance(error, FileNotFoundError):  # deleted while this was on its way
            return JSONResponse({"detail": "the job has been deleted"}, 404)
        return JSONResponse({"detail": f"the server cannot keep that: {error.strerror or 'its disk fails'}"}, 507)

    @app.exception_handler(RuntimeError)
    async def gone(_: Request, error: RuntimeError) -> JSONResponse:
        if "does not exist" not in str(error):  # as FileResponse says of a file that was there a moment ago
            raise error
        return JSONResponse(
            {"detail": "the job has been deleted, or the file made way for a newer one; ask again"}, 404
        )

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.post(
        "/api/jobs",
        status_code=202,
        openapi_extra=UPLOAD,
        response_model=JobReport,
        responses=_problems(400, 404, 408, 413, 415, 422, 503, 507),
    )
    async def create(request: Request, response: Response) -> JobReport:
        """Queue a song."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HTTPException(415, "send the song itself as multipart/form-data, in the field 'file'; no addresses")
        try:
            desk.check_room()
            async with request.form(max_files=1, max_fields=8) as form:
                job = await _queue(desk, job_of, dict(form))
        except ClientDisconnect as error:  # it hears no answer; nothing was queued
            raise HTTPException(400, "the song did not arrive whole") from error
        except Full as error:
            raise HTTPException(503, str(error), {"retry-after": "30"}) from error
        response.headers["location"] = f"/api/jobs/{job.id}"
        return report(job)

    @app.get("/api/jobs/{job_id}", response_model=JobReport, responses=_problems(404))
    async def read(job_id: str, request: Request) -> Any:
        """The state of a job; as server-sent events, one at each change, where the request accepts text/event-stream."""
        job = job_of(job_id)
        if "text/event-stream" not in request.headers.get("accept", ""):
            return report(job)

        async def events() -> AsyncIterator[str]:
            last = None
            while desk.get(job.id) is job and not app.state.is_ending():
                now = report(job).model_dump()
                if now != last:
                    yield f"data: {json.dumps(now)}\n\n"
                if now["state"] in ENDED:
                    return
                last = now
                await asyncio.sleep(TICK)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.delete("/api/jobs/{job_id}", status_code=204, responses=_problems(404))
    def delete(job_id: str) -> None:
        """Stop a job and remove its files."""
        desk.remove(job_of(job_id))

    @app.get("/api/jobs/{job_id}/stems.zip", response_class=Response, responses=_problems(404, 409, 422, 507))
    def stems(job_id: str, format: Annotated[str, Query(pattern="^(wav|flac|mp3)$")] = "wav") -> StreamingResponse:
        """All stems as a ZIP; with `rest`, what they leave of the song, they add up to it."""
        job = finished(job_id)
        pieces = downloads.zipped(job, format)
        first = next(pieces)  # what the format cannot hold shows here, before the answer begins
        return StreamingResponse(
            itertools.chain([first], pieces), headers=attachment(job, "zip"), media_type="application/zip"
        )

    @app.get("/api/jobs/{job_id}/mixdown.{suffix}", response_class=Response, responses=_problems(404, 409, 422, 507))
    def mixdown(
        job_id: str,
        suffix: str,
        gains: Annotated[str, Query(description="factors by stem: drums:1,bass:0.5")],
    ) -> FileResponse:
        """A sum of stems."""
        _check_suffix(suffix)
        job = finished(job_id)
        chosen = _gains(job, gains)
        key = hashlib.sha256(repr(sorted(chosen.items())).encode()).hexdigest()[:32]  # of all digits of all gains
        path = downloads.encoded(job, chosen, suffix, f"mix_{key}")
        return FileResponse(path, media_type=downloads.MEDIA[suffix], headers=attachment(job, suffix, "mix"))

    @app.get("/api/jobs/{job_id}/{track}.view", response_class=Response, responses=_problems(404, 422))
    def view(job_id: str, track: str, start: Annotated[int, Query(ge=0, le=1 << 32)] = 0) -> Response:
        """Columns that draw a track ("song" is the song): lowest and highest sample (int8), then levels of bands (uint8)."""
        job = job_of(job_id)
        _check_track(job, track)
        data = b""
        with contextlib.suppress(FileNotFoundError), open(job.view(track), "rb") as file:
            file.seek(start * COLUMN_BYTES)
            data = file.read(MOST_COLUMNS * COLUMN_BYTES)
        data = data[: len(data) // COLUMN_BYTES * COLUMN_BYTES]
        return Response(data, media_type="application/octet-stream", headers=VIEW_HEADERS)

    @app.get("/api/jobs/{job_id}/{track}.{suffix}", response_class=Response, responses=_problems(404, 409, 422, 507))
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
            job = finished(job_id)
            _check_track(job, track)
            name = track if track == "song" else str(job.stems.index(track))
            path = downloads.encoded(job, {track: 1.0}, suffix, name)
            return FileResponse(path, media_type=downloads.MEDIA[suffix], headers=attachment(job, suffix, track))
        job = job_of(job_id)
        _check_track(job, track)
        if suffix != "wav":
            raise HTTPException(422, "pieces are wav")
        if job.source.audio is None or start >= job.frames:
            raise HTTPException(409, f"sample {start} is not there; {job.frames} are")
        body = downloads.piece(job.read(track, start, frames), job.source.audio.sample_rate)
        return Response(body, media_type="audio/wav")

    @app.get("/api/models", response_model=list[Offer], responses=_problems())
    async def models() -> Any:
        """What can be asked for."""
        return list(desk.models.offers.values())

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(desk))

    @app.get("/metrics", response_class=PlainTextResponse, responses=_problems())
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, token=token, max_bytes=max_bytes, origins=origins)
    return app


VIEW_HEADERS = {"x-column-samples": str(COLUMN), "x-column-bands": str(BANDS)}


async def _queue(desk: Desk, job_of: Callable[[str], Job], form: dict[str, Any]) -> Job:
    file, source = form.get("file"), form.get("source")
    texts = {k: v for k, v in form.items() if isinstance(v, str)}
    if isinstance(file, UploadFile) == isinstance(source, str):
        raise HTTPException(422, "send one of 'file' (a file, with its name) and 'source' (a job)")
    offers = desk.models.offers
    model = texts.get("model") or next(iter(offers))
    refine = texts.get("refine") or "none"
    steps = texts.get("steps") or None
    if steps is not None and not re.fullmatch(r"\d{1,3}", steps, re.ASCII):
        raise HTTPException(422, f"steps must be a whole number, not '{steps}'")
    desk.models.stems(model, refine, int(steps) if steps else None)  # before anything is written
    if isinstance(source, str):
        earlier = job_of(source)
        taken: Source | Path = earlier.source
        name = earlier.source.name
    else:
        assert isinstance(file, UploadFile)
        # Browsers escape quotes and ends of lines so.
        told = re.sub("%0[AD]", "", (file.filename or "song").replace("%22", '"'))
        name = Path(told.replace("\\", "/")).name[:200] or "song"
        taken = await run_in_threadpool(_store, desk, file)
    try:
        if isinstance(taken, Path):
            await run_in_threadpool(check, taken, desk.limits)
        return await run_in_threadpool(desk.take, taken, name, model, refine, int(steps) if steps else None)
    except BaseException:
        if isinstance(taken, Path):
            taken.unlink(missing_ok=True)
        raise


def _store(desk: Desk, file: UploadFile) -> Path:
    handle, path = tempfile.mkstemp(prefix="upload-", dir=desk.folder)
    try:
        with open(handle, "wb") as out:
            shutil.copyfileobj(file.file, out)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return Path(path)


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


class _Figures:
    """What /metrics tells of a desk."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def collect(self):
        states = dict.fromkeys(("queued", "decoding", "separating", "done", "failed"), 0)
        for job in list(self.desk.jobs.values()):
            states[job.state] += 1
        kept = GaugeMetricFamily("msr_jobs_kept", "Jobs whose files are there, by state.", labels=["state"])
        for state, count in states.items():
            kept.add_metric([state], count)
        yield kept
        for name, count in list(self.desk.counts.items()):
            yield CounterMetricFamily(f"msr_jobs_{name}", f"Jobs that were {name} since the start.", value=count)
