"""PSNR and the Fréchet distance against closed forms and SciPy."""
import numpy as np
import pytest
import torch

from vugen.errors import UserError
from vugen.evaluate.fidelity import extract_features, frechet_distance, frechet_row, mean_psnr, psnr


def test_psnr_matches_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio
    first, second = torch.rand(3, 3, 9, 7), torch.rand(3, 3, 9, 7)
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(first, second)]
    assert psnr(first, second).numpy() == pytest.approx(expected, rel=1e-5)


def test_there_is_one_psnr():
    from vugen.data import images
    from vugen.decode import autoencoder
    assert autoencoder.psnr is psnr is images.psnr


def test_psnr_of_equal_pictures_is_finite_and_shapes_must_agree():
    images = torch.rand(2, 3, 4, 4)
    assert torch.isfinite(psnr(images, images)).all() and mean_psnr(images, images).n == 2
    with pytest.raises(UserError): psnr(images, images[:1])


def test_frechet_matches_the_general_matrix_root():
    from scipy.linalg import sqrtm
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(300, 6)) @ generator.normal(size=(6, 6)), generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)) + 1
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_frechet_is_symmetric_rotation_invariant_and_works_with_few_items():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(10, 32)), generator.normal(size=(12, 32)) * 2
    turn = np.linalg.qr(generator.normal(size=(32, 32)))[0]
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(frechet_distance(first, second), rel=1e-6)


@pytest.mark.parametrize("shapes", [((1, 4), (9, 4)), ((9, 4), (9, 5)), ((9,), (9,))])
def test_features_that_cannot_be_compared(shapes):
    with pytest.raises(UserError): frechet_distance(*(np.zeros(shape) for shape in shapes))


def test_a_score_needs_a_name_and_takes_pooled_vectors():
    class Encoder:
        name = "tiny"
        def __call__(self, images): return type("Patches", (), {"pooled": images.mean((2, 3))})()
    images = torch.rand(10, 3, 4, 4)
    assert extract_features(Encoder(), images, batch_size=3) == pytest.approx(images.mean((2, 3)).numpy(), rel=1e-6)
    assert frechet_row(Encoder(), images, images)["metric"] == "Fréchet-tiny"
    with pytest.raises(UserError, match="name"): frechet_row(lambda part: part.mean((2, 3)), images, images)


def test_a_set_of_pictures_has_an_interval_density_and_coverage():
    import contextlib, io
    from prdc import compute_prdc
    from vugen.evaluate.fidelity import picture_set_rows
    def mean(part): return torch.nn.functional.adaptive_avg_pool2d(part, 2).flatten(1)
    mean.name = "means"
    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(40, 3, 8, 8, generator=random) * 0.9, torch.rand(50, 3, 8, 8, generator=random)
    found = {row["metric"]: row for row in picture_set_rows(mean, ours, theirs, 3)}
    with contextlib.redirect_stdout(io.StringIO()): prdc = compute_prdc(mean(theirs).double().numpy(), mean(ours).double().numpy(), 3)
    assert [found[f"{name}-means"]["value"] for name in ("density", "coverage")] == pytest.approx([prdc["density"], prdc["coverage"]])
    distance = found["Fréchet-means"]
    assert distance["value"] == pytest.approx(frechet_distance(mean(ours).numpy(), mean(theirs).numpy())) and distance["low"] < distance["value"] < distance["high"] and (distance["dimension"], distance["n_reference"]) == (12, 50)
    assert frechet_row(mean, ours, theirs) == {**frechet_row(mean, ours, theirs), **{key: distance[key] for key in ("value", "low", "high")}}
