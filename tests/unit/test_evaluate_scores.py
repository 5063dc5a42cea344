"Every score against a reference implementation on the same features, and against closed forms."
import contextlib
import io

import numpy as np
import pytest
import torch

from vugen.errors import UserError
from vugen.evaluate import manifolds
from vugen.evaluate.features import Extractor, FeatureSet
from vugen.evaluate.fidelity import FrechetTo, frechet_distance, frechet_estimate, infinite_estimate, infinite_fit
from vugen.evaluate.kernels import cmmd, kernel_distance, polynomial_kernel, subset_kid
from vugen.evaluate.manifolds import manifold_scores, neighbour_radii
from vugen.evaluate.reconstruction import ssim
from vugen.evaluate.reference import ReferenceStatistics, moments
from vugen.evaluate.scores import ScoreOptions, score_rows


def sets(n=300, m=260, width=24, seed=0):
    random = np.random.default_rng(seed)
    turn = random.normal(size=(width, width)) / width**0.5
    return (random.normal(size=(n, width)) @ turn + 0.3).astype(np.float32), (random.normal(size=(m, width)) * 1.2 @ turn).astype(np.float32)


class Identity(torch.nn.Module):
    def __init__(self, width): super().__init__(); self.num_features = width
    def forward(self, features): return features


def test_frechet_against_torchmetrics_and_scipy():
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import FrechetInceptionDistance
    features, reference = sets()
    judge = FrechetInceptionDistance(feature=Identity(24), input_img_size=(24, 1, 1)).set_dtype(torch.float64)
    judge.update(torch.from_numpy(reference), real=True); judge.update(torch.from_numpy(features), real=False)
    found = FrechetTo(*moments(reference))(features)
    assert found == pytest.approx(float(judge.compute()), rel=1e-4)
    one, two = (np.cov(values.astype(np.float64), rowvar=False) for values in (features, reference))
    exact = np.square(features.mean(0, dtype=np.float64) - reference.mean(0, dtype=np.float64)).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert found == pytest.approx(exact, rel=1e-8) and frechet_distance(features, reference) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("n", [2, 10, 23, 24, 25])
def test_frechet_of_few_pictures_against_scipy(n):
    from scipy.linalg import sqrtm
    features, reference = sets()
    one, two = (np.cov(values.astype(np.float64), rowvar=False) for values in (features[:n], reference))
    exact = np.square(features[:n].mean(0, dtype=np.float64) - reference.mean(0, dtype=np.float64)).sum() + np.trace(one) + np.trace(two) - 2 * np.trace(sqrtm(sqrtm(two).real @ one @ sqrtm(two).real).real)
    assert FrechetTo(*moments(reference))(features[:n]) == pytest.approx(exact, rel=1e-4)


def test_frechet_of_two_known_normal_distributions():
    random, first, second = np.random.default_rng(0), np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    features = random.normal(size=(200_000, 3)) * first + 1
    exact = 3 + np.square(first - second).sum()
    assert FrechetTo(np.zeros(3), np.diag(second**2))(features) == pytest.approx(exact, rel=0.02)
    for one in (features, features[:2]): assert FrechetTo(*moments(reference := features * 2))(one) >= 0 and len(reference)


def test_extrapolation_removes_most_of_the_bias():
    scale = np.linspace(1, 0.2, 16)
    judge, left = FrechetTo(np.zeros(16), np.diag(scale**2)), []
    for seed in range(6):
        features = np.random.default_rng(seed).normal(size=(400, 16)) * scale
        left.append((judge(features), infinite_fit(judge, features, seed=seed)[0]))
    raw, infinite = np.mean(left, 0)
    assert raw > 0.05 and abs(infinite) < raw / 4


def test_intervals_cover_and_the_small_have_none():
    scale = np.linspace(1, 0.3, 8)
    judge, expected, hits = FrechetTo(np.zeros(8), np.diag(scale**2)), [], 0
    draws = [np.random.default_rng(seed).normal(size=(200, 8)) * scale + 0.2 for seed in range(40)]
    expected = np.mean([judge(features) for features in draws])
    for features in draws:
        found = frechet_estimate(judge, features)
        hits += found.low <= expected <= found.high
    assert hits >= 34
    assert frechet_estimate(judge, draws[0][:19]).low is None and infinite_estimate(judge, draws[0][:99]).low is None
    assert infinite_estimate(judge, draws[0]).low is not None


def test_kid_against_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance
    features, reference = sets(200, 200)
    judge = KernelInceptionDistance(feature=Identity(24), subsets=1, subset_size=200)
    judge.update(torch.from_numpy(reference).double(), real=True); judge.update(torch.from_numpy(features).double(), real=False)
    expected = float(judge.compute()[0])
    assert kernel_distance(features, reference).value == pytest.approx(expected, rel=1e-4)
    assert subset_kid(features, reference, 3, 1000)[0] == pytest.approx(expected, rel=1e-4)
    mean, spread = subset_kid(features, reference, 40, 60)
    assert abs(mean - expected) < spread and subset_kid(features, reference, 4, 60, seed=1) == subset_kid(features, reference, 4, 60, seed=1)


def test_kid_of_equal_distributions_is_zero_on_average():
    found = [kernel_distance(*sets(60, 60, 6, seed)) for seed in range(3)]
    random = np.random.default_rng(0)
    none = [kernel_distance(random.normal(size=(60, 6)), random.normal(size=(60, 6))).value for _ in range(40)]
    assert abs(np.mean(none)) < 3 * np.std(none) / 40**0.5 and all(each.value > 3 * np.std(none) for each in found)


def test_cmmd_against_a_double_loop():
    features, reference = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in sets(30, 25, 12))
    def kernel(first, second): return np.mean([[np.exp(-sum((float(a) - float(b)) ** 2 for a, b in zip(one, two)) / 200) for two in second] for one in first])
    expected = 1000 * (kernel(features, features) + kernel(reference, reference) - 2 * kernel(features, reference))
    assert cmmd(features, reference).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("measure", [kernel_distance, cmmd, lambda a, b: manifold_scores(a, b), lambda a, b: FrechetTo(*moments(b))(a)])
def test_too_few_pictures_and_other_extractors_are_refused(measure):
    features, reference = sets(40, 40)
    with pytest.raises(UserError): measure(features[:1], reference)
    with pytest.raises(UserError): measure(features[:, :5], reference)


def prdc(real, fake, k):
    from prdc import compute_prdc
    with contextlib.redirect_stdout(io.StringIO()): return compute_prdc(real, fake, k)


@pytest.mark.parametrize("n,m,width,k,tile", [(300, 260, 24, 5, 2048), (300, 260, 24, 5, 64), (257, 130, 3, 1, 32), (90, 400, 200, 20, 50), (40, 40, 5, 38, 7)])
def test_balls_against_prdc(n, m, width, k, tile, monkeypatch):
    monkeypatch.setattr(manifolds, "TILE", tile)
    fake, real = sets(m, n, width)
    found, expected = manifold_scores(fake + 50, real + 50, k), prdc((real + 50).astype(np.float64), (fake + 50).astype(np.float64), k)
    for name, value in expected.items(): assert found[name].value == pytest.approx(value, abs=1e-12)
    assert all(each.low <= each.value <= each.high for each in found.values())


def brute(real, fake, k):
    "The definition in double precision: squares of differences, sorted."
    gaps = lambda a, b: np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)).sum(2)
    radii = [np.sort(gaps(a, a), 1)[:, k] for a in (real, fake)]
    cross = gaps(real, fake)
    inside = cross < radii[0][:, None]
    return {"precision": inside.any(0).mean(), "recall": (cross < radii[1][None]).any(1).mean(), "density": inside.sum(0).mean() / k, "coverage": inside.any(1).mean()}


@pytest.mark.parametrize("case", ["itself", "twice", "one point", "collapsed", "grid"])
def test_ties_and_repeated_pictures_are_decided_as_by_exact_arithmetic(case, monkeypatch):
    monkeypatch.setattr(manifolds, "TILE", 40)
    random = np.random.default_rng(0)
    real = (random.normal(size=(120, 10)) + 30).astype(np.float32)
    fake = {"itself": real, "twice": np.concatenate([real[:50], real[:50]]), "one point": np.repeat(real[:1], 90, 0),
            "collapsed": (real[:1] + 1e-5 * random.normal(size=(90, 10))).astype(np.float32), "grid": random.integers(0, 3, (100, 10)).astype(np.float32)}[case]
    if case == "grid": real = random.integers(0, 3, (120, 10)).astype(np.float32)
    found = manifold_scores(fake, real, 4)
    for name, value in brute(real, fake, 4).items(): assert found[name].value == pytest.approx(value, abs=1e-12), name


def test_the_way_of_very_many_near_pairs_is_right_too(monkeypatch):
    monkeypatch.setattr(manifolds, "TILE", 200)
    monkeypatch.setattr(manifolds, "pair_distances", lambda *rest: pytest.fail("pair by pair"))
    monkeypatch.setattr(manifolds, "UNIT", 1.0)  # nothing is sure
    real = np.random.default_rng(0).normal(size=(216, 2)).astype(np.float32)
    squared = np.sort(np.square(real[:, None] - real[None]).sum(2), 1)
    monkeypatch.setattr(manifolds, "_exact", lambda first, second, rows, columns, offsets, exact=manifolds._exact: exact(first, second, np.resize(rows, 64 * 200 + len(rows)), np.resize(columns, 64 * 200 + len(rows)), offsets)[:len(rows)])
    np.testing.assert_allclose(neighbour_radii(real, 3), squared[:, 3], rtol=1e-4)


@pytest.mark.parametrize("k", [0, 40, 99])
def test_neighbours_that_there_are_not(k):
    fake, real = sets(40, 60)
    with pytest.raises(UserError, match=f"k is {k}"): manifold_scores(fake, real, k)


def test_ssim_against_scikit_image():
    from skimage.metrics import structural_similarity
    first, second = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0)), torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(1)) * 0.5
    second = (first + second) / 2
    mirrored = lambda image: np.pad(image.double().numpy(), ((0, 0), (5, 5), (5, 5)), "reflect")  # torchmetrics mirrors the borders, scikit-image leaves out five pixels
    expected = [structural_similarity(mirrored(a), mirrored(b), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11) for a, b in zip(first, second)]
    assert ssim(first, second).numpy() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="11"): ssim(first[..., :10], second[..., :10])


def test_rows_say_all_that_a_number_depends_on():
    values = sets()
    toy = Extractor("toy", 1, "none", None, None, "")
    found, other = (FeatureSet(each, [str(place) for place in range(len(each))], "toy", toy.fingerprint, "none") for each in values)
    rows, notes = score_rows(found, ReferenceStatistics.of(other), toy, ("fid", "density", "cmmd"), ScoreOptions(k=3))
    assert [row["metric"] for row in rows] == ["Fréchet-toy", "Fréchet-toy∞", "density-toy", "MMD-toy"] and not notes
    assert all({"value", "low", "high", "n", "extractor", "resize", "fingerprint", "n_reference", "dimension"} <= set(row) for row in rows) and rows[2]["k"] == 3
    short = FeatureSet(found.values[:20], found.names[:20], "toy", toy.fingerprint, "none")
    assert "singular" in score_rows(short, ReferenceStatistics.of(other), toy, ("fid",))[1]["Fréchet-toy"]
    assert polynomial_kernel(np.ones((1, 4)), np.ones((1, 4)))[0, 0] == 8


def test_shares_of_all_or_none_have_a_width():
    from scipy.stats import binomtest
    features, reference = sets(40, 50)
    same, far = manifold_scores(reference, reference), manifold_scores(features + 1000, reference)
    for found, count, n in ((same["precision"], 50, 50), (same["coverage"], 50, 50), (far["precision"], 0, 40), (far["coverage"], 0, 50), (far["recall"], 0, 50)):
        assert found.value == count / n and (found.low, found.high) == pytest.approx(tuple(binomtest(count, n).proportion_ci(method="wilson")), abs=1e-9) and found.high > found.low


def test_subsets_that_are_nearly_the_whole_are_told():
    features, reference = sets(40, 50)
    toy, told = Extractor("toy", 1, "none", None, None, ""), {}
    found, real = (FeatureSet(values, [str(place) for place in range(len(values))], "toy", toy.fingerprint, "none") for values in (features, reference))
    for size in (20, 21): told[size] = score_rows(found, ReferenceStatistics.of(real), toy, ["kid"], ScoreOptions(subsets=3, subset_size=size))[1]
    assert not told[20] and "overlap" in told[21]["kernel-toy, mean over subsets"]
