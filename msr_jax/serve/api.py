"""The HTTP API over a desk of jobs, and the page that uses it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool

from msr_jax.errors import UserError
from msr_jax.serve.answers import JobReport, Offer, job_of, problems, report
from msr_jax.serve.audio_routes import audio_routes
from msr_jax.serve.figures import figure_routes
from msr_jax.serve.guard import Guard
from msr_jax.serve.jobs import ENDED, Desk
from msr_jax.serve.uploads import upload_routes

PAGE = Path(__file__).with_name("page")
TICK = 0.2  # seconds between two looks at a job that is watched


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

    _answer_errors(app)
    app.include_router(upload_routes(desk))
    _add_jobs(app, desk)
    app.include_router(audio_routes(desk))

    @app.get("/api/models", response_model=list[Offer], responses=problems())
    async def models() -> Any:
        """What can be asked for."""
        return list(desk.models.offers.values())

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    app.include_router(figure_routes(desk))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, token=token, max_bytes=max_bytes, origins=origins)
    return app


def _add_jobs(app: FastAPI, desk: Desk) -> None:
    """Routes that tell how a job stands, and that stop one."""

    @app.get("/api/jobs/{job_id}", response_model=JobReport, responses=problems(404))
    async def read(job_id: str, request: Request) -> Any:
        """The state of a job; as server-sent events, one at each change, where the request accepts text/event-stream."""
        job = job_of(desk, job_id)
        if "text/event-stream" not in request.headers.get("accept", ""):
            return report(desk, job)

        async def events() -> AsyncIterator[str]:
            last = None
            while desk.get(job.id) is job and not app.state.is_ending():
                now = report(desk, job).model_dump()
                if now != last:
                    yield f"data: {json.dumps(now)}\n\n"
                if now["state"] in ENDED:
                    return
                last = now
                await asyncio.sleep(TICK)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.delete("/api/jobs/{job_id}", status_code=204, responses=problems(404))
    def delete(job_id: str) -> None:
        """Stop a job and remove its files."""
        desk.remove(job_of(desk, job_id))


def _answer_errors(app: FastAPI) -> None:
    """Errors become a sentence in JSON."""

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
