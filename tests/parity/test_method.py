"""The method's functions give what the published implementation gave: schedules, samplers, losses, distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.methods.consistency import distillation_loss, step_probabilities, teach
from msr_jax.methods.denoiser import edm_scalings
from msr_jax.methods.diffusion import denoising_loss, mix_estimate
from msr_jax.methods.losses import DISTANCES, STFT_WINDOWS, centred_stft, l1_multires_stft, safe_modulus
from msr_jax.methods.samplers import (
    noise_from_sequence,
    refine_by_consistency,
    refine_by_diffusion,
    solve_by_heun,
)
from msr_jax.methods.schedules import (
    consistency_sigmas,
    distillation_sigma,
    karras_sigmas,
    lognormal_sigma,
    sampler_sigmas,
)
from tests.parity.fixtures import assert_close, cases, find_fixtures

LOSSES = {"mse": "mse", "bsroformer": "l1_multires_stft"}


def channels_last(x):
    """(batch, …, time) -> (batch, time, channels): every axis between batch and time is folded into channels."""
    return jnp.asarray(x).reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)


def channels_first(x, like):
    return np.asarray(x.swapaxes(1, 2)).reshape(like.shape)


def analytic_network(a):
    """The fixtures' stand-in network; a (4,) are its parameters."""

    def network(x, tau):
        tau = tau.reshape(-1, *(1,) * (x.ndim - 1))
        return a[0] * x + a[1] * jnp.tanh(x) + a[2] * tau * x + a[3] * jnp.sin(3 * x)

    return network


def recording(function):
    """Wrap a denoiser so that it notes what it was called with, in order, from inside a scan too."""
    calls = []

    def wrapped(x, sigma):
        y = function(x, sigma)
        jax.debug.callback(lambda *call: calls.append([np.asarray(v) for v in call]), x, sigma, y, ordered=True)
        return y

    return wrapped, calls


def gaussian_denoiser(mu, s_data):
    wide = lambda sigma: sigma.reshape(-1, *(1,) * (mu.ndim - 1))
    return lambda x, sigma: mu + (x - mu) * s_data**2 / (s_data**2 + wide(sigma) ** 2)


@pytest.mark.parametrize("path", find_fixtures("karras_schedule"))
def test_schedules(path):
    for p, expected, tolerance in cases(path):
        args = (p["T"], p["sigma_min"], p["sigma_max"], p["rho"])
        assert_close(sampler_sigmas(*args), expected["sigmas_with_zero"], tolerance)
        if "grid" in expected:
            assert_close(karras_sigmas(*args), expected["grid"], tolerance)
        assert_close(consistency_sigmas(*args), expected["cd_sampler_sigmas"][: p["T"]], tolerance)


@pytest.mark.parametrize("path", find_fixtures("msdm_sampler"))
def test_diffusion_sampler(path):
    for p, a, tolerance in cases(path):
        num_steps, resamples = p["T"], p["R"]
        sequence = [a["init_noise"]]
        for i in range(num_steps):
            for r in range(resamples):
                back = a["renoise"][i, r] if r < resamples - 1 else np.zeros_like(a["x_det"])
                sequence += [a["churn_noise"][i, r], back]
        denoise, calls = recording(gaussian_denoiser(jnp.asarray(a["mu"]), p["s_data"]))
        sigmas = sampler_sigmas(num_steps, p["sigma_min"], p["sigma_max"], p["rho"])
        noise = noise_from_sequence(jnp.stack(sequence))

        def run(clip, denoise=denoise, a=a, sigmas=sigmas, noise=noise, resamples=resamples, churn=p["s_churn"]):
            return refine_by_diffusion(
                denoise, a["x_det"], sigmas, noise, num_resamples=resamples, s_churn=churn, clip=clip
            )

        assert_close(run(1.0), a["x_final_clamped"], tolerance)
        jax.effects_barrier()
        assert len(calls) == p["network_evaluations"]
        assert_close(np.stack([c[0] for c in calls]), a["denoiser_inputs"], tolerance)
        assert_close(np.stack([c[1][0] for c in calls]), a["denoiser_sigmas"], tolerance)
        assert_close(np.stack([c[2] for c in calls]), a["denoiser_outputs"], tolerance)
        assert_close(run(0.0), a["x_final"], tolerance)


@pytest.mark.parametrize("path", find_fixtures("cd_multistep"))
def test_consistency_sampler(path):
    for p, a, tolerance in cases(path):
        mu, s = jnp.asarray(a["mu"]), p["s_data"]

        def consistency(x, sigma, mu=mu, s=s, p=p):
            sigma = sigma.reshape(-1, *(1,) * (x.ndim - 1))
            return mu + (x - mu) * jnp.sqrt((s**2 + p["sigma_min"] ** 2) / (s**2 + sigma**2))

        consistency, calls = recording(consistency)
        used = a.get("reinjected_noise", np.zeros((0, *a["x_det"].shape), np.float32))
        assert len(used) == p["noise_reinjections"]
        spare = np.full((p["T"], *a["x_det"].shape), 1e3, np.float32)  # would show if it were injected
        noise = noise_from_sequence(jnp.concatenate([a["init_noise"][None], used, spare]))
        sigmas = consistency_sigmas(p["T"], p["sigma_min"], p["sigma_max"], p["rho"])
        final = refine_by_consistency(consistency, a["x_det"], sigmas, noise, sigma_min=p["sigma_min"])
        assert_close(final, a["x_final_clamped"], tolerance)
        jax.effects_barrier()
        assert len(calls) == p["network_evaluations"]
        for position, name in enumerate(("f_inputs", "f_sigmas", "f_outputs")):
            got = np.stack([c[position] if position != 1 else c[1][0] for c in calls])
            assert_close(got, a[name], tolerance)


@pytest.mark.parametrize("path", find_fixtures("heun_teacher"))
def test_heun_teacher_from_every_level_by_every_number_of_steps(path):
    for p, a, tolerance in cases(path):
        assert_close(step_probabilities(p["T"]), a["prob_of_h"], {"rtol": 1e-6})
        grid = karras_sigmas(p["T"], p["sigma_min"], p["sigma_max"], p["rho"])
        assert_close(grid, a["grid"], {"rtol": 2e-5, "atol": 1e-9})
        grid = jnp.asarray(grid)
        denoise = gaussian_denoiser(jnp.asarray(a["mu"]), p["s_denoiser"])

        @jax.jit
        def solve(level, steps, a=a, denoise=denoise, grid=grid):
            x = a["x0"] + grid[level] * a["eps"]
            return solve_by_heun(denoise, x, grid, jnp.full((x.shape[0],), level), steps)

        for k, (level, steps) in enumerate(a["index_and_steps"]):
            assert_close(solve(level, steps), a["x_out"][k], tolerance)


@pytest.mark.parametrize("path", find_fixtures("diffusion_loss"))
def test_diffusion_loss(path):
    for p, a, tolerance in cases(path):
        clean, start, noise = (channels_last(a[name]) for name in ("clean", "x_tilde", "noise"))
        sigma = jnp.asarray(a["sigmas"])
        assert_close(lognormal_sigma(a["std_normal_for_sigma"], p["P_mean"], p["P_std"]), sigma, tolerance)
        if p["loss_type"] == "mse":  # the U-Net recipe starts from the clean stem, whatever was drawn
            assert_close(start, clean, {})
        else:
            mixed = mix_estimate(clean, channels_last(a["x_det"]), jnp.asarray(a["extracted_mask"]))
            assert_close(mixed, start, tolerance)
        scalings = edm_scalings(sigma, p["sigma_data"])
        assert_close(np.stack(scalings), a["precond_cskip_cout_cin_cnoise"], tolerance)

        def loss(net_params, p=p, clean=clean, start=start, sigma=sigma, noise=noise):
            return denoising_loss(
                analytic_network(net_params), clean, start, sigma, noise,
                sigma_data=p["sigma_data"], clip=1.0, distance=DISTANCES[LOSSES[p["loss_type"]]],
            )  # fmt: skip

        (value, parts), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(a["net_params"]))
        assert_close(channels_first(parts["denoised"], a["denoised"]), a["denoised"], tolerance)
        assert_close(parts["distance"], a["per_example_unweighted"], tolerance)
        assert_close(parts["weight"], a["weights"], tolerance)
        assert_close(value, a["loss"][0], tolerance)
        assert np.abs(grad - a["grad"]).max() <= 1e-3 * np.abs(a["grad"]).max()


@pytest.mark.parametrize("path", find_fixtures("cd_loss"))
def test_distillation_step(path):
    for p, a, tolerance in cases(path):
        clean, start, noise, dsm_noise = (channels_last(a[k]) for k in ("clean", "x_tilde", "noise", "dsm_noise"))
        distance = DISTANCES[LOSSES[p["loss_norm"]]]
        grid = karras_sigmas(p["T"], p["sigma_min"], p["sigma_max"], p["rho"])
        target, teacher = (analytic_network(jnp.asarray(a[name])) for name in ("target", "teacher"))
        sigma = distillation_sigma(
            a["dsm_std_normal"],
            a["dsm_uniform"],
            p.get("p_mean", -3.0),
            p.get("p_std", 1.0),
            p["sigma_min"],
            p["sigma_max"],
            p["rho"],
            p["diffusion_mult"],
        )
        assert_close(sigma, a["dsm_sigmas"], {"rtol": 1e-4})

        def distilled(
            student, p=p, a=a, start=start, noise=noise, target=target, teacher=teacher, grid=grid, d=distance
        ):
            level = jnp.asarray(a["t_index"])
            noised, solved = teach(teacher, start, noise, level, p["h"], grid, sigma_data=p["sigma_data"])
            loss, parts = distillation_loss(
                analytic_network(student), target, noised, solved, level, p["h"], grid,
                sigma_data=p["sigma_data"], sigma_min=p["sigma_min"], distance=d,
            )  # fmt: skip
            return loss, {**parts, "teacher_out": solved}

        of_dsm = DISTANCES[LOSSES[p.get("dsm_loss_type", p["loss_norm"])]]

        def denoised(student, p=p, clean=clean, start=start, sigma=sigma, noise=dsm_noise, d=of_dsm):
            network = analytic_network(student)
            return denoising_loss(network, clean, start, sigma, noise, sigma_data=p["sigma_data"], distance=d)

        student = jnp.asarray(a["student"])
        (cd, parts), cd_grad = jax.jit(jax.value_and_grad(distilled, has_aux=True))(student)
        (dsm, dsm_parts), dsm_grad = jax.jit(jax.value_and_grad(denoised, has_aux=True))(student)
        for ours, name in (
            ("estimate", "estimate"),
            ("teacher_out", "x_teacher_out"),
            ("target_out", "target_out"),
        ):
            assert_close(channels_first(parts[ours], a[name]), a[name], tolerance)
        assert_close(parts["distance"], a["consistency_loss"], {"rtol": 1e-4, "atol": 1e-9})
        assert_close(dsm_parts["weight"] * dsm_parts["distance"], a["denoising_loss"], {"rtol": 1e-4})
        assert_close(p["consistency_weight"] * cd + p["denoising_weight"] * dsm, a["total"][0], {"rtol": 1e-4})
        total = p["consistency_weight"] * cd_grad + p["denoising_weight"] * dsm_grad
        for ours, name in (
            (cd_grad, "grad_consistency"),
            (dsm_grad, "grad_denoising"),
            (total, "grad_total"),
        ):
            assert np.abs(ours - a[name]).max() <= 1e-3 * np.abs(a[name]).max()


@pytest.mark.parametrize("path", find_fixtures("dsm_sigma"))
def test_noise_levels_of_the_denoising_term(path):
    for p, a, tolerance in cases(path):
        sigmas = distillation_sigma(
            a["std_normal"],
            a["uniform"],
            p["p_mean"],
            p["p_std"],
            p["sigma_min"],
            p["sigma_max"],
            p["rho"],
            p["diffusion_mult"],
        )
        assert_close(sigmas, a["sigmas"], tolerance)


@pytest.mark.parametrize("path", find_fixtures("multires_stft"))
def test_multi_resolution_stft_loss(path):
    for p, a, tolerance in cases(path):
        estimate, target = channels_last(a["recon"]), channels_last(a["target"])

        def loss(x, y):
            each = l1_multires_stft(x, y)
            return each.sum(), each

        (total, each), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(estimate, target)
        assert_close(each, a["loss_per_example"], tolerance)
        assert_close(total, a["loss_per_example"].sum(), tolerance)
        difference = (estimate - target).swapaxes(1, 2)
        for k, window in enumerate(p["window_sizes"]):
            spectrum = centred_stft(difference, window, max(window, p["min_n_fft"]), p["hop"])
            assert_close(safe_modulus(spectrum).mean((1, 2, 3)), a["stft_terms"][:, k], tolerance)
        assert tuple(p["window_sizes"]) == STFT_WINDOWS
        assert_close(channels_first(grad, a["grad_of_sum"]), a["grad_of_sum"], {"rtol": 1e-2, "atol": 1e-6})
