"Denoising errors against hand calculation, exact posteriors and the generator's own error."
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from vugen.errors import UserError
from vugen.models.flow import PREDICTIONS, convert, interpolate
from vugen.understand.diffusion_classifier import (ESTIMATORS, LOSSES, WEIGHTS, GaussianMixtureClasses, accuracy_by_samples, accuracy_by_time, bernstein, classifier_scores, classifier_times, corrected,
                                                   denoising_errors, even_times, fit_time_weight, fitted_weight, hashed_uniform, likelihood_weights, noise_of, paired_errors, paired_noises, residual_losses,
                                                   sample_plan, scrambled, stratified_times, time_weight, uniform_times, van_der_corput, weighted)


@pytest.mark.parametrize("count, low, high", [(1, 0., 1.), (5, .2, .8), (100, 0., 1.)])
def test_times_are_midpoints_of_equal_strata(count, low, high):
    times = classifier_times(count, low, high)
    edges = torch.linspace(low, high, count + 1)
    assert torch.allclose(times, (edges[1:] + edges[:-1]) / 2) and times.min() > low and times.max() < high


@pytest.mark.parametrize("arguments", [(0,), (3, .8, .2), (3, -.1, .5), (3, .5, 1.1)])
def test_impossible_times(arguments):
    with pytest.raises(ValueError): classifier_times(*arguments)


def constant(noisy, t, conditions): return torch.as_tensor(conditions).view(-1, 1).expand_as(noisy)


def test_errors_by_hand():
    "target = x − ε; the network predicts its condition"
    latents, noises, times = torch.tensor([[1., 2.], [0., 0.]]), torch.tensor([[0., 0.], [1., 0.]]), torch.tensor([.3, .6])
    errors = denoising_errors(constant, latents, [0., 1.], times, noises)
    expected = [[[1 + 4, 0 + 4], [0 + 1, 1 + 1]], [[0, 1], [2, 4 + 1]]]
    assert errors.tolist() == expected


def test_every_candidate_meets_the_same_noise():
    seen = {}
    def spy(noisy, t, conditions):
        for row, time, condition in zip(noisy, t, conditions): seen.setdefault(condition, []).append((round(time.item(), 5), *row.tolist()))
        return noisy
    denoising_errors(spy, torch.randn(3, 4), ["a", "b"], classifier_times(5), paired_noises(5, (4,)), batch_size=4)
    assert sorted(seen["a"]) == sorted(seen["b"]) and len(seen["a"]) == 15


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batches_do_not_matter(batch_size):
    generator = torch.Generator().manual_seed(0)
    latents, conditions = torch.randn(5, 3, 2, generator=generator), [0., 1., 2.]
    network = lambda noisy, t, told: noisy * t.view(-1, 1, 1) + torch.tensor(told).view(-1, 1, 1)
    times, noises = classifier_times(4), paired_noises(4, (3, 2))
    assert torch.allclose(denoising_errors(network, latents, conditions, times, noises, batch_size=batch_size), denoising_errors(network, latents, conditions, times, noises), rtol=1e-5)


def test_conditions_are_prepared_once_for_all_times():
    calls = []
    def prepare(conditions):
        calls.append(len(conditions))
        return torch.tensor(conditions)
    denoising_errors(constant, torch.randn(4, 2), [0., 1.], classifier_times(6), paired_noises(6, (2,)), prepare, batch_size=4)
    assert calls == [4, 4]


def test_errors_are_summed_in_float32():
    "In half precision 4096 squares of 1/16 and a difference of one thousandth would be lost"
    latents = torch.zeros(1, 4096, dtype=torch.bfloat16)
    network = lambda noisy, t, told: torch.full_like(noisy, .25)
    errors = denoising_errors(network, latents, ["a"], torch.tensor([.5]), torch.zeros(1, 4096))
    assert errors.dtype == torch.float32 and errors.item() == 256


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"): paired_errors(constant, torch.zeros(3, 2), [1., 2.], torch.tensor([.5]), torch.zeros(1, 2))
    with pytest.raises(ValueError): denoising_errors(constant, torch.zeros(3, 2), [1.], torch.tensor([.5, .6]), torch.zeros(1, 2))


def test_empty_inputs_keep_their_shape():
    assert denoising_errors(constant, torch.zeros(0, 2), [1., 2.], classifier_times(3), torch.zeros(3, 2)).shape == (0, 2, 3)


def test_scores_and_accuracy_by_time():
    errors = torch.tensor([[[4., 0.], [2., 6.]], [[1., 1.], [1., 3.]]])
    assert classifier_scores(errors).tolist() == [[-2, -4], [-1, -2]]
    assert classifier_scores(errors, torch.tensor([2., 0.])).tolist() == [[-4, -2], [-1, -1]]
    assert accuracy_by_time(errors, torch.tensor([0, 0])).tolist() == [0, 1]  # time 0: wrong and tied; time 1: right twice


@pytest.fixture(scope="module")
def mixture(): return GaussianMixtureClasses(torch.tensor([[[-1., 0., .5], [1., .5, 0.]], [[0., -1., 0.], [.6, 1., -.5]]]), deviation=.35)


def test_velocity_of_one_gaussian_is_linear():
    "For a single Gaussian at μ the best guess is known in closed form"
    mu, sigma = torch.tensor([.7, -.2]), .4
    single = GaussianMixtureClasses(mu.view(1, 1, 2), sigma)
    x_t, t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(.05, .95, 6)
    gain = (t * sigma ** 2 / (t ** 2 * sigma ** 2 + (1 - t) ** 2))[:, None]
    data = mu + gain * (x_t - t[:, None] * mu)
    noise = (x_t - t[:, None] * data) / (1 - t[:, None])
    assert torch.allclose(single.velocity(x_t, t, [0] * 6), data - noise, atol=1e-5)


def test_decisions_are_those_of_bayes_rule(mixture):
    generator = torch.Generator().manual_seed(3)
    points = mixture.sample(torch.arange(120) % 2, generator)
    truth = mixture.log_likelihood(points)
    errors = denoising_errors(mixture.velocity, points, [0, 1], classifier_times(150), paired_noises(150, (3,), 1), batch_size=500)
    clear = (truth[:, 0] - truth[:, 1]).abs() > 1
    agree = classifier_scores(errors).argmax(1) == truth.argmax(1)
    assert clear.sum() > 70 and agree[clear].double().mean() > .97
    flipped = denoising_errors(lambda x, t, c: mixture.velocity(x, 1 - t, c), points, [0, 1], classifier_times(150), paired_noises(150, (3,), 1), batch_size=500)
    right = torch.arange(120) % 2
    error_of = lambda errors: errors[torch.arange(120), right].mean()
    assert error_of(flipped) > 1.25 * error_of(errors)  # a swapped clock may still rank right, but it is noticed


def test_likelihood_weights_give_log_likelihood_ratios(mixture):
    points = mixture.sample(torch.arange(40) % 2, torch.Generator().manual_seed(4))
    times, noises = classifier_times(1500, 0, 1), paired_noises(1500, (3,), 5)
    errors = sum(denoising_errors(mixture.velocity, points, [0, 1], times, sign * noises, batch_size=2000) for sign in (1, -1)) / 2
    scores, truth = classifier_scores(errors, likelihood_weights(times)), mixture.log_likelihood(points)
    found, ratio = scores[:, 0] - scores[:, 1], truth[:, 0] - truth[:, 1]
    slope = ((found * ratio).sum() / ratio.square().sum()).item()
    assert abs(slope - 1) < .06 and torch.corrcoef(torch.stack([found, ratio]))[0, 1] > .995


def test_agrees_with_the_generators_own_error():
    "The same (t, ε) give the same mean squared error as `TextToImage.denoising_error`"
    from vugen.data.scenes import World, batch
    from vugen.encode.reducers import MLPReducer
    from vugen.generate.text_to_image import TextToImage, latent_noise
    from vugen.generate.vlm import SceneVLM, world_words
    from vugen.models.vit import VisionTransformer
    from vugen.understand.scorers import DenoisingScorer
    torch.manual_seed(0)
    vision = VisionTransformer(image_size=32, patch_size=8, hidden_size=16, num_layers=1, num_heads=2)
    vlm = SceneVLM(world_words(World()), vision_hidden_size=16, vision_grid=(4, 4), hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64).attach(vision).eval()
    toy = TextToImage(latent_dim=4, grid=(4, 4)).attach(vlm, MLPReducer(hidden_size=16, dim=4)).eval()
    torch.nn.init.normal_(toy.mixture.latent_out.weight, std=.2)
    samples = batch(World(), 0, range(3))
    scorer = DenoisingScorer(toy, toy.encode_images, num_times=3, batch_size=4)
    noises = latent_noise(5, 3, 16, 4)
    errors = denoising_errors(toy.velocity, toy.encode_images(samples["images"]), samples["captions"], scorer.times, noises, toy.prompt_cache)
    assert torch.allclose(errors.mean(2) / 64, toy.denoising_error(samples["images"], samples["captions"], num_samples=3, seed=5), atol=1e-5)
    matrix = scorer.score(samples["images"], samples["captions"])
    assert torch.allclose(scorer.score_pairs(samples["images"], samples["captions"]), matrix.diag(), atol=1e-3)
    items = scorer.score_items(samples["images"][None], [samples["captions"]])
    assert torch.allclose(items[0], matrix, atol=1e-3)
    raw = DenoisingScorer(toy, toy.encode_images, num_times=3, subtract_unconditional=False).score(samples["images"], samples["captions"])
    shift = matrix - raw
    assert torch.allclose(shift, shift[:, :1].expand(-1, 3), atol=1e-3) and shift.std() > 0  # one number a picture: nothing changes between captions


def test_hashed_numbers_are_uniform_and_independent():
    draws = np.stack([hashed_uniform(seed, 1, np.arange(20_000)) for seed in range(3)])
    assert all(scipy.stats.kstest(row, "uniform").pvalue > .001 for row in draws)
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < .03 and abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < .03
    assert len(np.unique(draws)) == draws.size


def test_van_der_corput_is_scipys():
    assert np.array_equal(van_der_corput(np.arange(300)), scipy.stats.qmc.Halton(1, scramble=False).random(300)[:, 0])


@pytest.mark.parametrize("power", range(9))
def test_scrambled_points_lie_one_in_each_stratum(power):
    for seed in (0, 7):
        for block in (0, 3):  # of every aligned block, not of the first alone
            points = scrambled(np.arange(2 ** power) + block * 2 ** power, seed)
            assert sorted((points * 2 ** power).astype(int)) == list(range(2 ** power)) and 0 < points.min() and points.max() < 1


def test_each_scrambled_point_is_uniform():
    draws = np.stack([stratified_times(5, seed) for seed in range(800)])
    assert all(scipy.stats.kstest(draws[:, place], "uniform").pvalue > .001 for place in range(5))


def test_even_times_are_the_midpoints_from_the_middle_outwards():
    for count in (1, 2, 5, 10, 64): assert np.allclose(np.sort(even_times(count, 0)), classifier_times(count, 0, 1))
    for power in (1, 2, 3, 4, 5):  # the first 2ᵏ − 1 leave no gap twice as long as another
        first = np.sort(even_times(1023, 0)[:2 ** power - 1])
        assert np.ptp(np.diff([0, *first, 1])) < .002


@pytest.mark.parametrize("name", ESTIMATORS)
def test_plans_are_functions_of_seed_and_index(name):
    plan, twin, other = (sample_plan(12, name, .1, .9, seed) for seed in (4, 4, 5))
    assert torch.equal(plan.times, twin.times) and torch.equal(plan.noises((3, 2)), twin.noises((3, 2))) and not torch.equal(plan.noises((3, 2)), other.noises((3, 2)))
    assert ("even" in name) == torch.equal(plan.times, other.times) and .1 < plan.times.min() and plan.times.max() < .9 and plan.times.dtype == torch.float64
    if "even" not in name:
        longer = sample_plan(50, name, .1, .9, 4)
        assert torch.equal(longer[:12].times, plan.times) and torch.equal(longer.noises((3, 2))[:12], plan.noises((3, 2)))
    for number, (index, sign) in enumerate(zip(plan.index.tolist(), plan.sign.tolist())): assert torch.equal(plan.noises((4,))[number], sign * noise_of(4, index, (4,)))
    paired = ESTIMATORS[name][1]
    assert plan.index.tolist() == [place // 2 if paired else place for place in range(12)] and plan.sign.tolist() == ([1, -1] * 6 if paired else [1] * 12)
    if paired: assert torch.equal(plan.times[::2], plan.times[1::2])
    chosen = plan[torch.tensor([3, 0])]
    assert torch.equal(chosen.noises((4,)), plan.noises((4,))[[3, 0]]) and len(chosen) == 2
    assert len(sample_plan(7, name)) == 7  # odd numbers too


def test_noises_are_normal_and_independent():
    noises = sample_plan(500, "uniform", seed=2).noises((40,))
    assert scipy.stats.kstest(noises.flatten().numpy(), "norm").pvalue > .001
    assert abs(np.corrcoef(noises[:-1].flatten(), noises[1:].flatten())[0, 1]) < .03
    times = uniform_times(500, 2)
    assert np.abs([np.corrcoef(times, noises[:, place])[0, 1] for place in range(40)]).max() < .2


def test_estimators_are_unbiased_and_their_variances_as_in_theory():
    "∫ e^t dt, where the variance of n independent times is known, and stratified ones gain a factor of n² for smooth functions"
    truth, one = np.e - 1, (np.e ** 2 - 1) / 2 - (np.e - 1) ** 2
    means = {kind: np.stack([np.exp(sample_plan(64, kind, 0, 1, seed).times.numpy()) for seed in range(600)]).cumsum(1) / np.arange(1, 65) for kind in ("uniform", "stratified")}
    for number in (1, 4, 16, 64):
        error = means["uniform"][:, number - 1]
        assert abs(error.mean() - truth) < 5 * np.sqrt(one / number / 600) and error.var() == pytest.approx(one / number, rel=.3)
        layered = means["stratified"][:, number - 1]
        local = (np.e ** 2 - 1) / 2 / 12 / number ** 3  # mean of f'² over 12 n³
        assert abs(layered.mean() - truth) < 5 * np.sqrt(one / number ** 3 / 600) and layered.var() == pytest.approx(local, rel=.3)
    even = np.exp(sample_plan(64, "even", 0, 1).times.numpy()).mean()
    assert abs(even - truth) < np.e / 24 / 64 ** 2


def test_antithetic_noises_cancel_what_is_odd():
    direction, plan = torch.tensor([1., -2., 3.]), sample_plan(8, "antithetic")
    assert abs((plan.noises((3,)) @ direction).sum()) < 1e-5 and abs((sample_plan(8, "stratified").noises((3,)) @ direction).sum()) > .1


@pytest.mark.parametrize("arguments, message", [((0,), "at least one sample"), ((4, "golden"), "no estimator 'golden'"), ((4, "even", .5, .5), "low < high"), ((4, "even", -.1, .5), "0 ≤ low")])
def test_impossible_plans(arguments, message):
    with pytest.raises(UserError, match=message): sample_plan(*arguments)


def test_losses_are_torchs():
    generator = torch.Generator().manual_seed(0)
    predicted, target = 2 * torch.randn(5, 3, 4, generator=generator), torch.randn(5, 3, 4, generator=generator)
    found = residual_losses(predicted, target)
    per_row = lambda loss: loss(predicted, target, reduction="none").flatten(1).sum(1)
    for place, loss in enumerate((torch.nn.functional.mse_loss, torch.nn.functional.l1_loss, torch.nn.functional.huber_loss)): assert torch.allclose(found[:, place], per_row(loss), rtol=1e-5)
    assert residual_losses(predicted.bfloat16(), target.bfloat16()).dtype == torch.float32
    network = lambda noisy, t, told: noisy * t.view(-1, 1)
    latents, times, noises = torch.randn(2, 4, generator=generator), torch.tensor([.2, .7]), torch.randn(2, 4, generator=generator)
    for place, loss in enumerate(LOSSES):
        errors = paired_errors(network, latents, [0, 1], times, noises, loss=loss)
        direct = [residual_losses(network(interpolate(latents, noises[[j, j]], times[[j, j]]), times[[j, j]], None), latents - noises[j]) for j in (0, 1)]
        assert torch.allclose(errors, torch.stack([each[:, place] for each in direct], 1))
    with pytest.raises(UserError, match="no loss 'l3'"): paired_errors(network, latents, [0, 1], times, noises, loss="l3")


@pytest.mark.parametrize("name, prediction, stated", [("uniform", "velocity", lambda t: 1), ("simple", "epsilon", lambda t: 1), ("vdm", "data", lambda t: t / (1 - t) ** 3),
                                                      ("exponential", "data", lambda t: np.exp(-7 * (1 - t)))])
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_weights_are_those_of_the_error_they_are_stated_for(name, prediction, stated, loss):
    "The velocity's loss under the restated weight is the stated weight times the loss of that prediction, computed from the prediction itself"
    generator = torch.Generator().manual_seed(1)
    data, noise, guess = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(.1, .9, 6, dtype=torch.float64)
    x_t = interpolate(data, noise, t)
    truth = {"velocity": data - noise, "epsilon": noise, "data": data}[prediction]
    size = (lambda residual: residual.square().sum(1)) if loss == "l2" else (lambda residual: residual.abs().sum(1))
    expected = torch.as_tensor(stated(t)) * size(convert(guess, x_t, t, "velocity", prediction) - truth)
    assert WEIGHTS[name].prediction == prediction in PREDICTIONS
    losses = residual_losses(guess, data - noise)
    assert torch.allclose(weighted(losses, t, loss, name), expected, rtol=1e-5)


def test_unknown_weights_and_losses():
    with pytest.raises(UserError, match="no weight 'heavy': choose among uniform, simple, vdm, exponential"): time_weight("heavy")
    with pytest.raises(UserError, match="no loss"): weighted(torch.zeros(1, 1, 3), torch.tensor([.5]), "l3")
    assert time_weight(WEIGHTS["vdm"]) is WEIGHTS["vdm"] and all(weight(torch.tensor([0., 1.])).isfinite().all() for weight in WEIGHTS.values())


def test_vdm_weight_is_the_likelihood_and_no_other_weight_is(mixture):
    points = mixture.sample(torch.arange(40) % 2, torch.Generator().manual_seed(4))
    plan = sample_plan(2048, "antithetic", 0, 1, seed=5)
    errors, truth = denoising_errors(mixture.velocity, points, [0, 1], plan.times.float(), plan.noises((3,)), batch_size=2000), mixture.log_likelihood(points)
    ratio = truth[:, 0] - truth[:, 1]
    def slope(weight):
        scores = classifier_scores(errors, time_weight(weight)(plan.times))
        found = scores[:, 0] - scores[:, 1]
        return ((found * ratio).sum() / ratio.square().sum()).item()
    assert abs(slope("vdm") - 1) < .06
    assert all(abs(slope(name) - 1) > .2 for name in WEIGHTS if name != "vdm")
    assert torch.allclose(WEIGHTS["vdm"](plan.times), likelihood_weights(plan.times))


def mid_times_only(count, seed):
    "Errors [I, 3, 32] of items for which the caption matters between t = 0.35 and 0.65, and a false lead that grows towards t = 1"
    generator = torch.Generator().manual_seed(seed)
    labels, times = torch.arange(count) % 3, sample_plan(32, "stratified", .02, .98).times
    wrong = (torch.arange(3) != labels[:, None]).double()[..., None]
    informative = ((times - .5).abs() < .15).double()
    lead = torch.randn(count, 3, 1, generator=generator).double() * 2 * (times > .7)
    return 50 + informative * wrong * .6 + lead + .7 * torch.randn(count, 3, 32, generator=generator).double(), labels, times


def test_fitted_weight_is_the_optimum():
    "The same problem in the power basis, solved by scipy: same cross-entropy, same curve"
    errors, labels, times = mid_times_only(60, 0)
    fitted = fit_time_weight(errors, labels, times, ridge=0.)
    powers = torch.stack([times ** place for place in range(4)], -1)
    features = -torch.einsum("ics,sk->ick", errors, powers).numpy() / 32
    def loss(coefficients):
        logits = features @ coefficients
        return float((scipy.special.logsumexp(logits, 1) - logits[np.arange(60), labels.numpy()]).mean())
    found = scipy.optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    assert fitted.cross_entropy == pytest.approx(found.fun, abs=1e-6)
    direct = powers.numpy() @ found.x
    assert np.allclose(fitted(times).numpy(), direct, atol=5e-3 * np.abs(direct).max())
    scores = classifier_scores(errors, fitted(times)).double()  # logits: a calibrated posterior
    assert torch.nn.functional.cross_entropy(scores, labels).item() == pytest.approx(fitted.cross_entropy, abs=1e-3)


def test_few_items_suffice_to_beat_uniform_weights():
    errors, labels, times = mid_times_only(400, 1)
    few, rest = torch.arange(20), torch.arange(20, 400)  # 5%
    accuracy = lambda weight: accuracy_by_samples(weighted(errors[rest][..., None].expand(-1, -1, -1, 3), times, "l2", weight), labels[rest])[-1].item()
    fitted = fit_time_weight(errors[few], labels[few], times, ridge=1e-2)
    assert accuracy(fitted) > accuracy("uniform") + .1 and accuracy(fitted) > accuracy("vdm")
    curve = fitted(torch.tensor([.05, .5, .95]))
    assert curve[1] > curve[0] and curve[1] > curve[2]


def test_positive_weights_stay_positive():
    errors, labels, times = mid_times_only(60, 2)
    errors = errors.flip(1) + 3 * ((times > .8) * (torch.arange(3) == labels[:, None])[..., None])  # late times mislead
    free, positive = (fit_time_weight(errors, labels, times, positive=choice) for choice in (False, True))
    grid = torch.linspace(float(times.min()), float(times.max()), 101)
    assert free(grid).min() < 0 < positive(grid).min() and free.cross_entropy <= positive.cross_entropy + 1e-9


def test_fits_of_plans_of_each_item():
    errors, labels, times = mid_times_only(30, 3)
    together = fit_time_weight(errors, labels, times)
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(number)) for number in range(30)])
    mixed = fit_time_weight(errors.gather(2, order[:, None].expand(-1, 3, -1)), labels, times[order])
    assert np.allclose(together.coefficients, mixed.coefficients, rtol=1e-4)
    with pytest.raises(UserError, match="several times"): fit_time_weight(errors, labels, torch.full((32,), .5))


def test_bernstein_is_scipys():
    from scipy.interpolate import BPoly
    times, coefficients = torch.linspace(.2, .8, 9, dtype=torch.float64), [1., -2., .5, 3.]
    assert np.allclose(bernstein(times, 3, .2, .8) @ torch.tensor(coefficients, dtype=torch.float64), BPoly(np.array(coefficients)[:, None], [.2, .8])(times))
    assert np.allclose(fitted_weight(coefficients, (.2, .8))(times), BPoly(np.array(coefficients)[:, None], [.2, .8])(times))


def test_correction_matters_between_pictures_and_not_between_captions():
    means = torch.nn.functional.pad(.5 * torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0)), (0, 61))
    every = GaussianMixtureClasses(torch.cat([means.repeat(1, 3, 1), means.reshape(1, 6, 64)]), .35)
    labels, plan = torch.arange(90) % 3, sample_plan(24, "antithetic")
    points = every.sample(labels, torch.Generator().manual_seed(1))
    errors = denoising_errors(every.velocity, points, [0, 1, 2, 3], plan.times.float(), plan.noises((64,)), batch_size=900).double()
    plain, fair = errors[:, :3], corrected(errors[:, :3], errors[:, 3])
    assert torch.equal(plain.mean(2).argsort(1), fair.mean(2).argsort(1))  # image → text
    assert torch.allclose(fair.mean(2).diff(dim=1), plain.mean(2).diff(dim=1))
    def between_pictures(errors): return torch.stack([(errors[labels == label, label].mean(1) < errors[labels == (label + 1) % 3, label].mean(1)).double().mean() for label in range(3)]).mean()
    assert between_pictures(fair) > between_pictures(plain) + .1 and between_pictures(fair) > .85


def test_accuracy_by_samples_is_that_of_prefixes():
    errors, labels, _ = mid_times_only(30, 4)
    found = accuracy_by_samples(errors, labels)
    for number in (1, 5, 32): assert found[number - 1] == (errors[..., :number].sum(2).argmin(1) == labels).double().mean()


def test_scorer_defaults_are_as_they_were_and_options_choose_otherwise():
    from test_understand_denoisers import toy
    from vugen.data.scenes import World, batch
    from vugen.understand.scorers import DenoisingScorer
    model, samples = toy(), batch(World(), 0, range(3))
    images, captions = samples["images"], samples["captions"]
    scorer = DenoisingScorer(model, model.encode_images, subtract_unconditional=False)
    latents, pairs = model.encode_images(images), captions * 3
    direct = classifier_scores(paired_errors(model.velocity, latents.repeat_interleave(3, 0), pairs, classifier_times(4), paired_noises(4, (16, 4)), model.prompt_cache, 128)).view(3, 3)
    assert torch.allclose(scorer.score(images, captions), direct, rtol=1e-5) and scorer.plan is None and scorer.weights is None
    plan = sample_plan(6, "antithetic", .1, .9, seed=2)
    chosen = DenoisingScorer(model, model.encode_images, "x", 6, .1, .9, False, 2, estimator="antithetic", weight="exponential", loss="l1")
    errors = paired_errors(model.velocity, latents.repeat_interleave(3, 0), pairs, plan.times.float(), plan.noises((16, 4)), model.prompt_cache, loss="l1")
    assert torch.allclose(chosen.score(images, captions), classifier_scores(errors, WEIGHTS["exponential"](plan.times, "l1")).view(3, 3), rtol=1e-4)
    with pytest.raises(UserError, match="no estimator"): DenoisingScorer(model, model.encode_images, estimator="golden")
    with pytest.raises(UserError, match="no weight"): DenoisingScorer(model, model.encode_images, weight="heavy")
