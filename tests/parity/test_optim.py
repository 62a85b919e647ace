"""Optimisers and the distillation target's average move parameters as the published training did."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msr_jax.config import unet_base
from msr_jax.train.optim import make_optimizer, make_schedule
from tests.parity.fixtures import assert_close, find_fixtures, load


@pytest.mark.parametrize("path", find_fixtures("optimizer"))
@pytest.mark.parametrize("name,b2,key", [("radam", 0.999, "radam_lr1e-2"), ("adam", 0.99, "adam_lr1e-2_b099")])
def test_optimisers_and_averages(path, name, b2, key):
    arrays, meta = load(path)
    optim = {**unet_base().optim.to_dict(), "name": name, "lr": 1e-2, "b2": b2}
    tx = make_optimizer(optim, make_schedule(optim, 100))
    params = ema = jnp.linspace(-1.0, 1.0, arrays["grads"].shape[1])
    state, rows, averages = tx.init(params), [params], []
    for grad in arrays["grads"]:
        ema = optax.incremental_update(params, ema, 1e-3)  # before the optimiser's step, as released
        averages.append(ema)
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
        rows.append(params)
    assert_close(np.stack(rows), arrays[f"{key}.params"], meta["tolerance"])
    assert_close(np.stack(averages), arrays[f"{key}.ema_mu0.999_updated_before_each_step"], meta["tolerance"])
