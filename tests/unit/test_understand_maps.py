"Maps against scikit-learn's and umap's own, neighbours against scikit-learn's."
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from vugen.errors import UserError
from vugen.understand.maps import UMAP_LEAST, LatentMap, latent_map, nearest, plot_map, plot_neighbours

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(50, 7), (5, 40), (2, 3), (1, 4), (6, 1)])
def test_pca_is_scikit_learns_up_to_sign(shape):
    data = RNG.normal(size=shape) + 5
    found = latent_map(torch.tensor(data, dtype=torch.float32))
    assert isinstance(found, LatentMap) and found.points.shape == (shape[0], 2) and found.points.dtype == np.float32 and found.method == "pca" and len(found) == shape[0]
    count = min(2, *shape)
    if shape[0] > 1:
        own = PCA(count).fit(data)
        assert np.allclose(np.abs(found.points[:, :count]), np.abs(own.transform(data)), atol=1e-4) and np.allclose(found.explained[:count], own.explained_variance_ratio_, atol=1e-6)
    assert (found.points[:, count:] == 0).all() and (latent_map(data).points == latent_map(data).points).all()


def test_the_sign_does_not_depend_on_the_order():
    data, order = RNG.normal(size=(40, 6)), RNG.permutation(40)
    assert np.allclose(latent_map(data).points[order], latent_map(data[order]).points, atol=1e-5)


def test_umap_keeps_clusters_and_seeds():
    data = np.concatenate([RNG.normal(size=(25, 10)) * .1 + 5 * np.eye(10)[number] for number in range(3)])
    found = latent_map(data, "umap", seed=1)
    assert found.method == "umap" and found.explained is None and found.points.dtype == np.float32 and (latent_map(data, "umap", seed=1).points == found.points).all()
    _, near = NearestNeighbors(n_neighbors=6).fit(found.points).kneighbors(found.points)
    assert (near // 25 == np.arange(75)[:, None] // 25).mean() > .95
    few = latent_map(data[:UMAP_LEAST - 1], "umap")
    assert few.method == "pca" and few.explained is not None


def test_neighbours_are_scikit_learns():
    data, asked = RNG.normal(size=(700, 12)), RNG.normal(size=(300, 12))
    indices, found = nearest(torch.tensor(data), asked, 9)
    distances, own = NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(data).kneighbors(asked)
    assert (indices == own).all() and np.allclose(1 - found, distances, atol=1e-6) and indices.shape == found.shape == (300, 9) and indices.dtype == np.int64 and found.dtype == np.float32
    assert (np.diff(found, axis=1) <= 0).all()


def test_equal_neighbours_come_in_their_order_and_nothing_is_like_nothing():
    indices, found = nearest([[1, 0], [2, 0], [0, 1], [0, 0]], [[3, 0], [0, 0]], 4)
    assert indices.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]] and found.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("call,said", [
    (lambda: latent_map(torch.zeros(3)), "[3]"), (lambda: latent_map(torch.zeros(0, 3)), "one vector a row"), (lambda: latent_map([[0., float("nan")]]), "row 0"), (lambda: latent_map(torch.zeros(3, 2), "tsne"), "tsne"),
    (lambda: nearest(torch.zeros(3, 2), torch.zeros(1, 3), 1), "3 channels"), (lambda: nearest(torch.zeros(3, 2), torch.zeros(1, 2), 4), "from 1 to 3"), (lambda: nearest(torch.zeros(3, 2), torch.zeros(1, 2), 0), "from 1 to 3"),
    (lambda: plot_map(latent_map(torch.eye(3)), ["a"]), "one each")])
def test_bad_input_is_one_sentence(call, said):
    with pytest.raises(UserError) as caught: call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_figures_show_every_point_and_picture():
    from matplotlib import pyplot
    found = latent_map(RNG.normal(size=(12, 4)))
    axis = plot_map(found, ["red", "blue"] * 6, marks=["circle"] * 6 + ["square"] * 6)
    assert sum(len(part.get_offsets()) for part in axis.collections) == 12 and {text.get_text() for text in axis.get_legend_handles_labels()[0] and axis.legend().get_texts()} == {"red", "blue"}
    images = torch.rand(5, 3, 8, 8)
    figure = plot_neighbours(images, images[:2], *nearest(images.flatten(1), images[:2].flatten(1), 3))
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 8 and np.allclose(shown[0], shown[1])  # a picture is its own nearest neighbour
    pyplot.close("all")


def test_without_umap_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UserError, match="umap-learn"): latent_map(RNG.normal(size=(40, 4)), "umap")
    assert latent_map(RNG.normal(size=(20, 4)), "umap").method == "pca"


def test_a_colour_that_lacks_the_first_form_is_in_the_legend_too():
    import matplotlib
    matplotlib.use("agg")
    from vugen.understand.maps import latent_map, plot_map
    found = latent_map(np.random.default_rng(0).standard_normal((6, 4)))
    axis = plot_map(found, ["red"] * 3 + ["blue"] * 3, marks=["circle"] * 3 + ["square"] * 3)
    assert sorted(axis.get_legend_handles_labels()[1]) == ["blue", "red"]
