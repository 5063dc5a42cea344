"Flow matching against closed forms, other conventions and another implementation."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vugen.models import flow

TIMES = st.floats(.01, .99)


def pair(seed=0, shape=(6, 4)):
    generator = torch.Generator().manual_seed(seed)
    data, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return data, noise, torch.rand(shape[0], generator=generator, dtype=torch.float64) * .98 + .01


@pytest.mark.parametrize("source", flow.PREDICTIONS)
@pytest.mark.parametrize("target", flow.PREDICTIONS)
def test_conversions_are_exact(source, target):
    data, noise, t = pair()
    x_t = flow.interpolate(data, noise, t)
    truth = {"velocity": data - noise, "epsilon": noise, "data": data}
    torch.testing.assert_close(flow.convert(truth[source], x_t, t, source, target), truth[target], rtol=0, atol=1e-11)


@pytest.mark.parametrize("source", flow.PREDICTIONS)
@pytest.mark.parametrize("target", flow.PREDICTIONS)
def test_conversions_of_wrong_predictions_invert(source, target):
    data, noise, t = pair(1)
    x_t, guess = flow.interpolate(data, noise, t), torch.randn(6, 4, dtype=torch.float64)
    back = flow.convert(flow.convert(guess, x_t, t, source, target), x_t, t, target, source)
    torch.testing.assert_close(back, guess, rtol=1e-8, atol=1e-8)


def test_error_conversions_of_the_literature():
    "In the noise level u: ‖ε−ε̂‖² = (1−u)²‖v−v̂‖², ‖x−x̂‖² = u²‖v−v̂‖², ‖x−x̂‖² = ‖ε−ε̂‖²/SNR with SNR = ((1−u)/u)²."
    data, noise, t = pair(2)
    u, x_t = 1 - t, flow.interpolate(data, noise, t)
    v_hat = torch.randn(6, 4, dtype=torch.float64)
    error = lambda name, truth: (flow.convert(v_hat, x_t, t, "velocity", name) - truth).square().sum(1)
    velocity, epsilon, clean = error("velocity", data - noise), error("epsilon", noise), error("data", data)
    torch.testing.assert_close(epsilon, (1 - u) ** 2 * velocity)
    torch.testing.assert_close(clean, u ** 2 * velocity)
    torch.testing.assert_close(clean, epsilon / ((1 - u) / u) ** 2)
    torch.testing.assert_close(flow.convert_error(clean, t, "data", "epsilon"), epsilon)
    torch.testing.assert_close(flow.signal_to_noise(t), ((1 - u) / u) ** 2)


@settings(deadline=None, max_examples=50)
@given(TIMES, st.floats(.1, 20))
def test_shift_in_our_time_is_the_published_one(t, s):
    u = 1 - t
    assert math.isclose(flow.time_shift(t, s), 1 - s * u / (1 + (s - 1) * u), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(flow.time_shift(flow.time_shift(t, s), 1 / s), t, rel_tol=1e-9)
    assert (flow.time_shift(t, s) <= t) == (s >= 1) or math.isclose(flow.time_shift(t, s), t)


def test_shift_keeps_the_ends_and_the_dimension_rule():
    assert flow.time_shift(0., 5.) == 0 and flow.time_shift(1., 5.) == 1
    assert flow.dimension_shift(256, 64) == 2 and flow.dimension_shift(256, 16) == 1


def test_logit_normal_times():
    t = flow.sample_time(200_000, generator=torch.Generator().manual_seed(0)).double()
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean()) < .01 and abs(logit.std() - 1) < .01


def test_uniform_times():
    t = flow.sample_time((1000, 200), "uniform", torch.Generator().manual_seed(0))
    assert t.shape == (1000, 200) and abs(t.mean() - .5) < .005 and abs(t.var() - 1 / 12) < .005


def test_times_depend_on_the_generator_alone():
    draw = lambda seed: flow.sample_time(5, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1); first = draw(3)
    torch.manual_seed(2)
    assert torch.equal(first, draw(3)) and not torch.equal(first, draw(4))


@pytest.mark.parametrize("kind", ["cosine", "", "logit_normal"])
def test_unknown_kinds_are_named(kind):
    with pytest.raises(ValueError, match="unknown kind of time"): flow.sample_time(3, kind)
    with pytest.raises(ValueError, match="unknown prediction"): flow.convert(torch.zeros(1), torch.zeros(1), .5, "velocity", kind)
    with pytest.raises(ValueError, match="points_to"): flow.reversed_time(None, kind)


@pytest.mark.parametrize("mean,std", [(0., 1.), (2., .5), (-1., 3.)])
@pytest.mark.parametrize("shift", [1., 2.])
def test_euler_reproduces_a_gaussian(mean, std, shift):
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = flow.euler(flow.gaussian_velocity(mean, std), noise, 250, shift)
    assert abs(sample.mean() - (mean + std * noise.mean())) < .03 * (1 + std)
    assert abs(sample.std() / (std * noise.std()) - 1) < .03


def test_orders_of_convergence():
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    gap = lambda sampler, n: (sampler(flow.gaussian_velocity(1., 2.), noise, n) - (1 + 2 * noise)).abs().max().item()
    assert 1.8 < gap(flow.euler, 100) / gap(flow.euler, 200) < 2.2
    assert 3.5 < gap(flow.heun, 100) / gap(flow.heun, 200) < 4.5


def test_gaussian_velocity_is_the_conditional_mean():
    "Monte Carlo: the mean of data − noise over samples whose x_t falls near x."
    generator, mean, std, t = torch.Generator().manual_seed(0), 1.5, .7, .4
    data = mean + std * torch.randn(2_000_000, generator=generator)
    noise = torch.randn(2_000_000, generator=generator)
    x_t = flow.interpolate(data, noise, t)
    for x in (-.2, .6, 1.2):
        near = (x_t - x).abs() < .02
        estimate = (data - noise)[near].mean()
        assert abs(estimate - flow.gaussian_velocity(mean, std)(torch.tensor([[x]]), torch.tensor([t]))) < .03


def test_flow_loss_is_least_at_the_exact_field():
    noisy = flow.diffuse(2 + .5 * torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    loss = lambda field: (field(noisy.x_t, noisy.t) - noisy.velocity).square().mean().item()
    exact = loss(flow.gaussian_velocity(2., .5))
    assert exact < loss(flow.gaussian_velocity(2.1, .5)) and exact < loss(flow.gaussian_velocity(2., .6)) and exact < loss(flow.gaussian_velocity(2., .4))


@pytest.mark.parametrize("shift", [1., 3.])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_same_samples_as_diffusers(shift, steps):
    diffusers = pytest.importorskip("diffusers")
    field, start = flow.gaussian_velocity(-1., .3), torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = start
    for time in scheduler.timesteps: x = scheduler.step(-field(x, 1 - time / 1000), time, x).prev_sample # its velocity points to the noise
    torch.testing.assert_close(flow.euler(field, start, steps, shift), x, rtol=1e-4, atol=1e-4)


def test_reversed_models_sample_alike():
    ours, noise = flow.gaussian_velocity(2., .5), torch.randn(10, 3, dtype=torch.float64)
    stable_diffusion_3 = lambda x, timestep: -ours(x, 1 - timestep / 1000)
    ssdd = lambda x, u: ours(x, 1 - u)
    want = flow.euler(ours, noise, 20)
    torch.testing.assert_close(flow.euler(flow.reversed_time(stable_diffusion_3, scale=1000), noise, 20), want)
    torch.testing.assert_close(flow.euler(flow.reversed_time(ssdd, points_to="data"), noise, 20), want)


@pytest.mark.parametrize("sampler", [flow.euler, flow.heun])
def test_samplers_want_a_step(sampler):
    with pytest.raises(ValueError, match="at least 1"): sampler(lambda x, t: x, torch.zeros(1, 1), 0)


def test_guidance():
    data, noise, t = pair()
    torch.testing.assert_close(flow.guided(data, noise, 1.), data)
    torch.testing.assert_close(flow.guided(data, noise, 0.), noise)
    torch.testing.assert_close(flow.guided(data, noise, 3.) - data, 2 * (data - noise))


def test_guided_gaussians_in_closed_form():
    "Guidance between two exact fields of one spread shifts the mean: m_u + w (m_c − m_u)."
    noise = torch.randn(10, 1, dtype=torch.float64)
    field = flow.with_guidance(flow.gaussian_velocity(2., .5), flow.gaussian_velocity(1., .5), 3.)
    torch.testing.assert_close(flow.heun(field, noise, 200), flow.heun(flow.gaussian_velocity(4., .5), noise, 200), atol=1e-3, rtol=1e-3)


def test_no_unconditional_pass_where_guidance_is_off():
    calls = []
    uncond = lambda x, t: calls.append(t[0].item()) or x * 0
    flow.euler(flow.with_guidance(lambda x, t: x * 0, uncond, 5., (.3, .6)), torch.zeros(1, 1), 10)
    assert [round(t, 1) for t in calls] == [.3, .4, .5, .6]
    calls.clear(); flow.euler(flow.with_guidance(lambda x, t: x * 0, uncond, 1.), torch.zeros(1, 1), 10)
    assert not calls


def test_ends_stay_finite():
    x = torch.randn(2, 3)
    for t in (0., 1.):
        for source in flow.PREDICTIONS:
            for target in flow.PREDICTIONS: assert flow.convert(torch.randn(2, 3), x, t, source, target).isfinite().all()
