"Denoising errors against hand calculation, exact posteriors and the generator's own error."
import pytest
import torch

from vugen.understand.diffusion_classifier import (GaussianMixtureClasses, accuracy_by_time, classifier_scores, classifier_times, denoising_errors,
                                                   likelihood_weights, paired_errors, paired_noises)


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
