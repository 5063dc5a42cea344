"Shapes of clouds whose dimension is known, CKA against closed forms and against the U-statistic counted out."
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.datasets import make_swiss_roll
from sklearn.decomposition import PCA
from sklearn.gaussian_process.kernels import RBF
from sklearn.neighbors import NearestNeighbors

from vugen.errors import UserError
from vugen.understand.geometry import (MEASURES, MinibatchCKA, block_names, cka, cka_table, effective_rank, geometry_rows, hsic, kernel_matrix, layer_features, mle_dimension, neighbour_distances,
                                       participation_ratio, plot_cka, run_geometry, two_nn)
from vugen.understand.scorers import Parts

RNG = np.random.default_rng(0)


def orthogonal(n): return np.linalg.qr(RNG.normal(size=(n, n)))[0]


def test_spectra_are_those_of_scikit_learn():
    data = RNG.normal(size=(80, 10)) * np.linspace(.1, 3, 10) @ orthogonal(10) + 9
    own = PCA().fit(data)
    assert np.isclose(effective_rank(data), np.exp(entropy(own.singular_values_ / own.singular_values_.sum())))
    assert np.isclose(participation_ratio(data), own.explained_variance_.sum() ** 2 / (own.explained_variance_ ** 2).sum())


@pytest.mark.parametrize("measure", (effective_rank, participation_ratio))
def test_equal_directions_count_one_each(measure):
    for d in (1, 3, 7):
        cloud = np.concatenate([np.eye(d), -np.eye(d)]) @ orthogonal(12)[:d]
        assert np.isclose(measure(cloud + 4), d) and np.isclose(measure(1e-8 * cloud), d) and np.isclose(measure(torch.tensor(cloud)), d)
    assert measure(np.ones((5, 3))) == 0


def test_distances_are_scikit_learns():
    data = RNG.normal(size=(600, 9)) + 1000
    own = NearestNeighbors(n_neighbors=8).fit(data).kneighbors(np.unique(data, axis=0))[0][:, 1:]
    assert np.allclose(neighbour_distances(data, 7), own, rtol=1e-9)
    assert neighbour_distances(np.array([[0.], [0.], [1.], [3.]]), 1).tolist() == [[1], [1], [2]]  # twins count once


@pytest.mark.parametrize("d", (1, 2, 4, 8))
def test_dimensions_of_clouds_that_are_known(d):
    found = {"cube": RNG.uniform(size=(2500, d)), "Gaussian": RNG.normal(size=(2500, d))}
    ball = RNG.normal(size=(2500, d + 1)); found["sphere"] = ball / np.linalg.norm(ball, axis=1, keepdims=True)
    for cloud in found.values():
        hidden = np.pad(cloud, ((0, 0), (0, 20 - cloud.shape[1]))) @ orthogonal(20)
        assert abs(two_nn(hidden) / d - 1) < .2 and abs(mle_dimension(hidden) / d - 1) < .2
        assert np.isclose(two_nn(hidden), two_nn(hidden * 7 + 3)) and np.isclose(mle_dimension(hidden), mle_dimension(hidden * 7 + 3))


def test_a_bent_sheet_has_two_dimensions():
    roll = make_swiss_roll(3000, random_state=0)[0]
    assert abs(two_nn(roll) - 2) < .2 and abs(mle_dimension(roll) - 2) < .2 and participation_ratio(roll) > 2.3


def counted(K, L):
    terms = [K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in itertools.permutations(range(len(K)), 4)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n", (4, 6))
def test_the_unbiased_hsic_is_the_counted_one(n):
    a, b = (torch.tensor(RNG.normal(size=(n, 3))) for _ in range(2))
    for K, L in ((kernel_matrix(a), kernel_matrix(b)), (kernel_matrix(a, "rbf"), kernel_matrix(b)), (kernel_matrix(a), kernel_matrix(a))):
        assert torch.isclose(hsic(K, L), counted(K, L), atol=1e-12)


def test_cka_knows_rotation_scale_and_independence():
    x = RNG.normal(size=(150, 6))
    for kernel in ("linear", "rbf"):
        for debiased in (True, False):
            assert np.isclose(cka(x, -2 * x @ orthogonal(6) + 5, kernel, debiased), 1) and np.isclose(cka(x, x ** 3, kernel, debiased), cka(x ** 3, x, kernel, debiased))
    unrelated = [cka(x[:20], RNG.normal(size=(20, 300))) for _ in range(60)]
    assert abs(np.mean(unrelated)) < .03 < .3 < cka(x[:20], RNG.normal(size=(20, 300)), debiased=False)


def test_linear_cka_is_its_closed_form_in_features():
    x, y = RNG.normal(size=(40, 5)), RNG.normal(size=(40, 9))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = lambda a, b: np.linalg.norm(a.T @ b) ** 2
    assert np.isclose(cka(x, y, debiased=False), norm(x, y) / np.sqrt(norm(x, x) * norm(y, y)))


def test_the_rbf_kernel_is_scikit_learns():
    x = RNG.normal(size=(30, 4))
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    median = torch.tensor(squares)[~torch.eye(30, dtype=torch.bool)].median().item()
    assert np.allclose(kernel_matrix(x, "rbf", .5).numpy(), RBF(.5 * np.sqrt(median))(x))


def test_minibatches_estimate_the_whole():
    x = RNG.normal(size=(2000, 5)); y = np.tanh(x @ RNG.normal(size=(5, 12))) + .5 * RNG.normal(size=(2000, 12))
    whole = cka_table({"x": x}, {"y": y, "noise": RNG.normal(size=(2000, 12))})
    parted = cka_table({"x": x}, {"y": y, "noise": RNG.normal(size=(2000, 12))}, batch_size=50)
    assert abs(whole - parted).max() < .03 and np.isclose(whole[0, 0], cka(x, y))


def test_layers_of_an_encoder():
    vision = Parts().contrastive.vision
    images = torch.rand(10, 3, 32, 32)
    layers = layer_features(vision, images, batch_size=4)
    assert list(layers) == block_names(vision) == [f"blocks.{number}" for number in range(4)]
    with torch.no_grad(): own = vision(images)
    assert torch.allclose(layer_features(vision, images, "norm")["norm"], own.pooled, atol=1e-5) and layer_features(vision, images, "norm", "flat")["norm"].shape == (10, 64 * 128)
    assert torch.allclose(layer_features(vision, images, "norm", "first")["norm"], own.tokens[:, 0], atol=1e-5)
    rows = geometry_rows({"norm": RNG.normal(size=(60, 3))}, "mine")
    assert [row["metric"] for row in rows] == list(MEASURES) and all(row["category"] == "norm" and row["n"] == 60 and row["channels"] == 3 for row in rows)


def test_feature_maps_of_convolutions_are_averaged_over_places():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2))
    images = torch.rand(4, 3, 8, 8)
    assert torch.allclose(layer_features(model, images)["0"], model(images).mean((2, 3)), atol=1e-6)


def test_by_name():
    found = run_geometry(against="contrastive", limit=40, layers="blocks.[03]")
    same = {(row["layer"], row["other_layer"]): row["value"] for row in found["rows"] if row["metric"].startswith("CKA (linear")}
    shapes, likenesses = 2 * len(MEASURES), 2 * 2 * 2  # two layers of each encoder, two kernels
    assert len(found["rows"]) == shapes + likenesses and np.isclose(same["blocks.0", "blocks.0"], 1) and same["blocks.0", "blocks.3"] < 1 and found["run"]["limit"] == 40
    axis = plot_cka(np.array([[1., .2]]), ["a"], ["b", "c"])
    assert [text.get_text() for text in axis.texts] == ["1.00", "0.20"]


@pytest.mark.parametrize("call,said", [
    (lambda: effective_rank([[1., 2.]]), "at least 2"), (lambda: two_nn(np.zeros((9, 2))), "different"), (lambda: mle_dimension(np.eye(9), 2), "at least 3"), (lambda: cka(np.eye(5), np.eye(4)), "5 and 4"),
    (lambda: cka(np.eye(3), np.eye(3)), "at least 4"), (lambda: cka(np.eye(5), np.eye(5), "cosine"), "cosine"), (lambda: MinibatchCKA().value(), "update"), (lambda: MinibatchCKA().update([np.eye(5)], [np.eye(4)]), "same"),
    (lambda: block_names(torch.nn.Linear(2, 2)), "no stack"), (lambda: run_geometry(limit=5), "at least 30"), (lambda: run_geometry("efficientnet-lite0", "untrained"), "no untrained twin"),
    (lambda: layer_features(Parts().contrastive.vision, torch.rand(2, 3, 32, 32), "blocks.*", "max"), "max")])
def test_bad_input_is_one_sentence(call, said):
    with pytest.raises(UserError) as caught: call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_edges_of_the_geometry_are_told_in_a_sentence():
    import pytest
    from vugen.errors import UserError
    from vugen.understand.geometry import cka_table, two_nn
    features = np.random.default_rng(0).standard_normal((10, 3))
    with pytest.raises(UserError, match="from 0 to less than 1"): two_nn(features, discard=-1)
    with pytest.raises(UserError, match="no layers"): cka_table({}, {})
    few = {"layer": torch.from_numpy(features)}
    assert np.allclose(cka_table(few, few, batch_size=16), cka_table(few, few))
