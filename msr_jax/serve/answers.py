"""What the API answers with: reports of jobs, offers of models, problems."""

from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel, Field

from msr_jax.serve.jobs import Desk, Job


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


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    # Everything can also be answered with: no token (401), another site's (403), the wrong host (421).
    return {code: {"model": Problem} for code in (401, 403, 421, *codes)}


def report(desk: Desk, job: Job) -> JobReport:
    """How a job stands."""
    return JobReport(**job.report(desk.ahead(job)))


def job_of(desk: Desk, identity: str) -> Job:
    """A job that is kept. Raises HTTPException 404 where there is none."""
    job = desk.get(identity)
    if job is None:
        raise HTTPException(404, "there is no such job; it may have ended long ago, or with an earlier server")
    return job


def finished_job(desk: Desk, identity: str) -> Job:
    """A job whose stems are whole. Raises HTTPException 404 where there is none, 409 where it is not done."""
    job = job_of(desk, identity)
    if job.state != "done":
        raise HTTPException(409, f"the job is {job.state}; its files can be had when it is done")
    return job
