"""Songs that come in: the route that queues one."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from msr_jax.serve.answers import JobReport, job_of, problems, report
from msr_jax.serve.decode import check
from msr_jax.serve.jobs import Desk, Full, Job, Source

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


def upload_routes(desk: Desk) -> APIRouter:
    """POST /api/jobs."""
    router = APIRouter()

    @router.post(
        "/api/jobs",
        status_code=202,
        openapi_extra=UPLOAD,
        response_model=JobReport,
        responses=problems(400, 404, 408, 413, 415, 422, 503, 507),
    )
    async def create(request: Request, response: Response) -> JobReport:
        """Queue a song."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HTTPException(415, "send the song itself as multipart/form-data, in the field 'file'; no addresses")
        try:
            desk.check_room()
            async with request.form(max_files=1, max_fields=8) as form:
                job = await _queue(desk, dict(form))
        except ClientDisconnect as error:  # it hears no answer; nothing was queued
            raise HTTPException(400, "the song did not arrive whole") from error
        except Full as error:
            raise HTTPException(503, str(error), {"retry-after": "30"}) from error
        response.headers["location"] = f"/api/jobs/{job.id}"
        return report(desk, job)

    return router


async def _queue(desk: Desk, form: dict[str, Any]) -> Job:
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
        earlier = job_of(desk, source)
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
