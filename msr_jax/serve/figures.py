"""What /metrics tells of a desk, for Prometheus."""

from collections.abc import Iterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from msr_jax.serve.answers import problems
from msr_jax.serve.jobs import Desk


def figure_routes(desk: Desk) -> APIRouter:
    """GET /metrics."""
    router = APIRouter()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(desk))

    @router.get("/metrics", response_class=PlainTextResponse, responses=problems())
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


class _Figures:
    """A collector of `prometheus_client`."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def collect(self) -> Iterator[Metric]:
        states = dict.fromkeys(("queued", "decoding", "separating", "done", "failed"), 0)
        for job in list(self.desk.jobs.values()):
            states[job.state] += 1
        kept = GaugeMetricFamily("msr_jobs_kept", "Jobs whose files are there, by state.", labels=["state"])
        for state, count in states.items():
            kept.add_metric([state], count)
        yield kept
        for name, count in list(self.desk.counts.items()):
            yield CounterMetricFamily(f"msr_jobs_{name}", f"Jobs that were {name} since the start.", value=count)
