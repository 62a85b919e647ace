"""From the data set to global batches on the devices, one dispatch after the other."""

from collections.abc import Generator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from msr_jax.data.pipeline import make_train_dataset
from msr_jax.errors import UserError
from msr_jax.train.sharding import stacked_batch_sharding


def open_dataset(config: Mapping[str, Any]) -> grain.MapDataset:
    """This process's part of every micro-batch of `data.batch` examples: element k is micro-batch k of the run.

    Micro-batches, not steps, are what the processes share, so that each holds the same examples whatever their number.

    Raises:
      UserError: no such records, or others than the config's.
    """
    return make_train_dataset(
        config["data"], config["stems"], config["sample_rate"], config["seed"],
        jax.process_index(), jax.process_count(), config["channels"],
    )  # fmt: skip


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises UserError unless the devices divide the batch."""
    if batch < 1 or batch % mesh.size:
        below = batch - batch % mesh.size
        near = f"{below} or {below + mesh.size}" if below > 0 else f"{mesh.size}"
        raise UserError(
            f"data.batch ({batch}) must be a multiple of the {mesh.size} devices of the mesh, such as {near}"
        )


def dispatches(
    dataset: grain.MapDataset, start: int, config: Mapping[str, Any], mesh: Mesh
) -> Generator[tuple[int, dict[str, jax.Array]], None, None]:
    """(last step, batches on the devices with leaves (steps, accumulate, batch, …)) from step `start` on."""
    per, total, workers = (
        config["train"]["steps_per_dispatch"],
        config["train"]["steps"],
        config["data"]["workers"],
    )
    micro = config["optim"]["accumulate"]
    # An element is a whole batch: Grain's own default would hold 500 of them.
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, per * micro))
    data = dataset[start * micro :].to_iter_dataset(read)
    if workers:
        flags.FLAGS.mark_as_parsed()  # the worker processes read absl flags
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))
    iterator = iter(data)
    sharding = stacked_batch_sharding(mesh)
    try:
        step = start
        while step < total:
            count = min(per - step % per, total - step)
            chosen = [next(iterator) for _ in range(count * micro)]
            step += count
            stacked = {name: np.stack([batch[name] for batch in chosen]) for name in chosen[0]}
            stacked = {name: array.reshape(count, micro, *array.shape[1:]) for name, array in stacked.items()}
            yield step, {k: jax.make_array_from_process_local_data(sharding, v) for k, v in stacked.items()}
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
