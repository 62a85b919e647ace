"""Samplers and teacher: one scan, explicit noise, cost that follows the steps taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.methods.consistency import draw_levels
from msr_jax.methods.samplers import (
    noise_from_keys,
    noise_from_sequence,
    refine_by_consistency,
    refine_by_diffusion,
    solve_by_heun,
)
from msr_jax.methods.schedules import consistency_sigmas, karras_sigmas, sampler_sigmas

X = jnp.linspace(-0.5, 0.5, 24).reshape(2, 12, 1)


def denoise(x, sigma):
    return x * (0.25 / (0.25 + sigma.reshape(-1, 1, 1) ** 2))


def equations(function, *args):
    """Number of operations in the program, those inside scans and conditionals counted once."""

    def count(jaxpr):
        inner = [v for e in jaxpr.eqns for v in e.params.values()]
        nested = [j for v in inner for j in (v if isinstance(v, tuple | list) else [v])]
        return len(jaxpr.eqns) + sum(
            count(getattr(j, "jaxpr", j)) for j in nested if hasattr(getattr(j, "jaxpr", j), "eqns")
        )

    return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("sampler", ["diffusion", "consistency", "teacher"])
def test_the_program_does_not_grow_with_the_number_of_steps(sampler):
    keys = jax.random.split(jax.random.key(0), 2)

    def size(steps):
        noise = noise_from_keys(keys, X.shape)
        if sampler == "diffusion":
            sigmas = sampler_sigmas(steps, 1e-4, 0.5, 9)
            return equations(
                lambda x, s: refine_by_diffusion(denoise, x, s, noise, num_resamples=2, s_churn=5.0),
                X,
                sigmas,
            )
        if sampler == "consistency":
            sigmas = consistency_sigmas(steps, 1e-4, 0.5, 9)
            return equations(lambda x, s: refine_by_consistency(denoise, x, s, noise, sigma_min=1e-4), X, sigmas)
        grid = karras_sigmas(steps + 1, 1e-4, 0.5, 9)
        return equations(lambda x, g: solve_by_heun(denoise, x, g, jnp.zeros(2, int), 1), X, grid)

    assert size(4) == size(64)


def test_a_sampler_is_compiled_once_for_all_noise_levels():
    traces = []

    def counting(x, sigma):
        traces.append(1)
        return denoise(x, sigma)

    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(lambda x, s: refine_by_diffusion(counting, x, s, noise_from_keys(keys, x.shape)))
    for sigma_max in (0.01, 0.1, 1.0):
        run(X, sampler_sigmas(3, 1e-4, sigma_max, 9))
    assert len(traces) == 1


def test_an_example_s_noise_ignores_its_batch():
    keys = jax.random.split(jax.random.key(0), 2)
    sigmas = sampler_sigmas(2, 1e-4, 0.5, 9)
    run = lambda x, k: refine_by_diffusion(
        denoise, x, sigmas, noise_from_keys(k, x.shape), s_churn=9.0, num_resamples=2
    )
    np.testing.assert_allclose(run(X, keys)[1], run(X[1:], keys[1:])[0], atol=1e-6)


def test_the_standard_rule_injects_noise_after_every_call_but_the_last():
    used = []

    def noise(index):
        jax.debug.callback(lambda i: used.append(int(i)), index)
        return jnp.ones_like(X)

    sigmas = consistency_sigmas(2, 1e-4, 0.5, 9)
    identity = lambda x, sigma: x
    standard = refine_by_consistency(identity, X, sigmas, noise, sigma_min=1e-4, renoise="standard", clip=0.0)
    released = refine_by_consistency(identity, X, sigmas, noise, sigma_min=1e-4, clip=0.0)
    np.testing.assert_allclose(released - X, sigmas[0], rtol=1e-5)
    np.testing.assert_allclose(standard - released, np.sqrt(sigmas[1] ** 2 - 1e-8), rtol=1e-4)


def test_heun_sampling_is_more_exact_than_euler_on_a_gaussian():
    sigmas = sampler_sigmas(12, 1e-3, 2.0, 7)
    silence = noise_from_sequence(jnp.zeros((100, *X.shape)))
    exact = X * np.sqrt(0.25 / (0.25 + 4.0))  # the ODE's end point for data of variance 0.25
    euler, heun = (refine_by_diffusion(denoise, X, sigmas, silence, solver=s, clip=0.0) for s in ("euler", "heun"))
    assert np.abs(heun - exact).max() < 0.5 * np.abs(euler - exact).max()


def test_the_paper_s_rule_draws_the_start_uniformly_and_then_the_steps_among_those_left():
    levels, draws = 5, 8000
    starts, steps = jax.vmap(lambda key: draw_levels(key, 3, levels, "paper"))(
        jax.random.split(jax.random.key(0), draws)
    )
    assert (starts == starts[:, :1]).all()  # shared by the batch
    counts = np.zeros((levels, levels))
    np.add.at(counts, (np.asarray(starts[:, 0]), np.asarray(steps)), 1)
    # By start and steps: starts 0 … 3 alike, of start 2 one or two steps, and so on.
    expected = np.zeros((levels, levels))
    expected[3, 1] = 1 / 4
    expected[2, 1:3] = 1 / 8
    expected[1, 1:4] = 1 / 12
    expected[0, 1:5] = 1 / 16
    np.testing.assert_allclose(counts / draws, expected, atol=0.015)
    assert not counts[expected == 0].any()


def test_the_teacher_calls_its_network_twice_per_step_taken_and_no_more():
    calls = []

    def counting(x, sigma):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(x, sigma)

    grid = jnp.asarray(karras_sigmas(10, 1e-4, 0.5, 9))
    solve = jax.jit(lambda h: solve_by_heun(counting, X, grid, jnp.array([0, 1]), h))
    for h in (1, 3, 8):
        calls.clear()
        solve(h).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 2 * h
