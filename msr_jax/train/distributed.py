"""Several processes as one run: how they find each other, and how they agree on an error or on stopping."""

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple, TypeVar, overload

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from msr_jax.errors import UserError, first_line
from msr_jax.messages import saying

T = TypeVar("T")
MESSAGE_BYTES = 1024
LOOKS = 20  # half a second each


class Cluster(NamedTuple):
    """Where this process stands: `processes` in all, this one is `process`, number 0 listens at `coordinator` (host:port).

    None in these stands for what JAX finds out by itself; `method` is then JAX's name for the way (None: it looks).
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    method: str | None = None


def find_cluster(
    env: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    is_wanted: bool = False,
) -> Cluster | None:
    """The cluster that flags or the environment describe; None for a process on its own.

    In this order: the three flags; `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (or the rank
    that a GKE JobSet, Open MPI or SLURM gives); several tasks of one `srun`; `mpirun`; a TPU slice of several hosts as
    GKE announces it. TPU VMs say nothing in the environment: `is_wanted` lets JAX ask the machine.

    Raises:
      UserError: flags or variables that are incomplete or contradict each other.
    """
    if any(flag is not None for flag in (coordinator, processes, process)):
        if coordinator is None or processes is None or process is None:
            raise UserError("--coordinator, --processes and --process are given together or not at all")
        return _checked(coordinator, processes, process, "--coordinator, --processes and --process")
    if "JAX_COORDINATOR_ADDRESS" in env:
        count = _first(env, "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
        rank = _first(env, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
        if count is None or rank is None:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID; set all three or none"
            )
        return _checked(env["JAX_COORDINATOR_ADDRESS"], count, rank, "JAX_COORDINATOR_ADDRESS")
    if (_first(env, "SLURM_STEP_NUM_TASKS") or 1) > 1:
        return Cluster(method="slurm")
    if (_first(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:  # Open MPI 5 no longer tells its processes where the first one is
            raise UserError(
                "this Open MPI does not name a coordinator; give mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"
            )
        return Cluster(method="ompi")
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or is_wanted:
        return Cluster()
    return None


def _first(env: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if name in env:
            if not env[name].isdecimal():
                raise UserError(f"{name} must be a number, not '{env[name]}'")
            return int(env[name])
    return None


def _checked(coordinator: str, processes: int, process: int, source: str) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"the coordinator is written HOST:PORT, not '{coordinator}' ({source})")
    if not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: they are counted from 0 ({source})")
    return Cluster(coordinator, processes, process, "deactivate")


def initialize(cluster: Cluster | None) -> None:
    """Join the other processes; must come before anything is computed. Waits for all of them.

    Raises:
      UserError: there is no such cluster, or its processes do not come together.
    """
    if cluster is None:
        return
    place = cluster.coordinator or "the coordinator"
    try:
        with saying(f"waiting for the other processes, at {place}", after=10):
            jax.distributed.initialize(*cluster[:3], cluster_detection_method=cluster.method)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({first_line(error)}); check the coordinator and the count"
        ) from error


def is_main() -> bool:
    """Whether this process writes logs and models; one does."""
    return jax.process_index() == 0


@overload
def agree(action: Callable[[], T]) -> T: ...
@overload
def agree(action: Callable[[], T], main_only: bool) -> T | None: ...
def agree(action: Callable[[], T], main_only: bool = False) -> T | None:
    """Run `action` in every process (or in the first only); if it fails in one with a UserError, all raise that error.

    All processes must call it. Without this, those where nothing went wrong would wait for the others forever.

    Returns:
      What `action` returned here; None where it did not run.
    """
    result, message = None, ""
    if is_main() or not main_only:
        try:
            result = action()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            message = str(error)
    if jax.process_count() > 1:
        sent = np.frombuffer(message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
        messages = [bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(sent)]
        failed = next((row for row in messages if row), None)
        if failed is not None:
            raise UserError(failed.decode(errors="replace"))
    return result


def check_is_shared(folder: epath.Path) -> None:
    """Raises UserError in all processes if one of them does not see what the first one writes into a folder."""
    if jax.process_count() == 1:
        return
    token = str(int(multihost_utils.broadcast_one_to_all(np.random.default_rng().integers(2**31))))
    probe = folder / f".seen-by-all-{token}"  # another each time: a bucket may allow neither removing nor replacing

    def write() -> None:
        try:
            probe.write_text(token)
        except Exception as error:  # of a bucket's own kind
            raise UserError(f"cannot write to {folder} ({str(error) or type(error).__name__})") from error

    def look() -> None:
        for _ in range(LOOKS):  # a disk over the network may show it somewhat later
            with suppress(Exception):  # of a bucket's own kind
                if probe.read_text() == token:
                    return
            time.sleep(0.5)
        raise UserError(
            f"process {jax.process_index()} does not see what process 0 writes to {folder}; set config.train.checkpoints to a place that "
            "all see, such as gs://BUCKET/RUN"
        )

    agree(write, main_only=True)
    try:
        agree(look)
    finally:
        if is_main():
            with suppress(Exception):  # of a bucket's own kind
                probe.unlink(missing_ok=True)


def check_same_in_all(sums: Mapping[str, str], what: str, advice: str = "give all hosts the same") -> None:
    """Raises UserError in all processes if their checksums (hexadecimal, 32 bits) are not those of the first one."""
    if jax.process_count() == 1 or not sums:
        return
    rows = multihost_utils.process_allgather(np.array([int(crc, 16) for crc in sums.values()], np.uint32))
    for k, row in enumerate(rows):
        if not np.array_equal(row, rows[0]):
            raise UserError(f"{what} in process {k} than in process 0; {advice}")


@functools.cache
def _largest() -> tuple[jax.sharding.NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = jax.sharding.Mesh(jax.devices(), ("all",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("all",), ()))
    return split, jax.jit(lambda flags: flags.max(), out_shardings=whole)


def any_process(flag: bool) -> jax.Array:
    """Whether `flag` is set in some process, as an array on the devices: not waited for. All processes must call it."""
    split, largest = _largest()
    return largest(jax.make_array_from_process_local_data(split, np.full(jax.local_device_count(), flag, np.int32)))
