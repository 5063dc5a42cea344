"""The reducers against scikit-learn, against each other, through saving, and with bad input."""
import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vugen.encode.reducers import MLPReducer, PCAReducer, RunningMoments, linear_map, load_reducer
from vugen.errors import UserError


def tokens(count=600, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.linspace(2, 0.05, size)[:, None]
    return torch.randn(count, size, generator=generator) @ mixing + 5 * torch.randn(size, generator=generator)


def fitted_pca(data, dim=6, parts=7):
    reducer = PCAReducer(data.shape[1], dim)
    for part in data.chunk(parts): reducer.partial_fit(part)
    return reducer.finalize()


@pytest.mark.parametrize("parts", [1, 2, 13])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_do_not_depend_on_the_batches(parts, offset):
    data = tokens().double() + offset
    moments = RunningMoments(24)
    for part in data.chunk(parts): moments.update(part)
    np.testing.assert_allclose(moments.covariance(), np.cov(data.numpy().T), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.mean, data.mean(0))


def test_moments_of_two_shards_merge():
    data = tokens()
    first, second = RunningMoments(24).update(data[:100]), RunningMoments(24).update(data[100:])
    merged = first.merge(second.count, second.mean, second.scatter)
    torch.testing.assert_close(merged.covariance(), RunningMoments(24).update(data).covariance())


def test_empty_batch_changes_nothing():
    moments = RunningMoments(3).update(torch.zeros(0, 3)).update(torch.eye(3)).update(torch.zeros(2, 0, 3))
    assert moments.count == 3 and torch.isfinite(moments.covariance()).all()


@pytest.mark.parametrize("dim", [1, 6, 24])
def test_pca_equals_scikit_learn(dim):
    data = tokens()
    ours, theirs = fitted_pca(data, dim), PCA(dim, svd_solver="full").fit(data.double().numpy())
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-5)
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(ours.encode_raw(data), theirs.transform(data.double().numpy()), atol=1e-3)
    assert float(ours.explained) == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-6)


def test_pca_decode_is_the_pseudo_inverse():
    data = tokens()
    reducer = fitted_pca(data).fit_whitening(data.chunk(3))
    latents = reducer.encode(data)
    torch.testing.assert_close(reducer.encode(reducer.decode(latents)), latents, rtol=1e-3, atol=1e-3)
    error = (reducer.decode(latents) - data).var(0).sum() / data.var(0).sum()
    assert float(error) == pytest.approx(1 - float(reducer.explained), abs=1e-4)
    whole = fitted_pca(data, 24)
    torch.testing.assert_close(whole.decode(whole.encode(data)), data, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [PCAReducer, MLPReducer])
def test_whitening_gives_unit_channels_and_keeps_shape(kind):
    data = tokens().reshape(20, 30, 24)
    reducer = kind(24, 4)
    if kind is PCAReducer: reducer.partial_fit(data).finalize()
    before = reducer.encode_raw(data)
    torch.testing.assert_close(reducer.encode(data), before)
    latents = reducer.fit_whitening(data.split(3)).encode(data).detach()
    assert latents.shape == (20, 30, 4) and reducer.ratio == 6
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.reshape(-1, 4).std(0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(reducer.encode_raw(data), before)


def test_whitening_survives_a_dead_channel():
    data = tokens()
    reducer = MLPReducer(24, 4)
    with torch.no_grad(): reducer.layers[-1].weight[2] = 0
    latents = reducer.fit_whitening([data]).encode(data)
    assert torch.isfinite(latents).all() and latents[:, 2].abs().max() < 1e-4


def test_mlp_inverse_is_least_squares_and_cannot_beat_pca():
    data = tokens()
    reducer = MLPReducer(24, 6).fit_whitening([data]).fit_inverse(data.chunk(5))
    latents = reducer.encode_raw(data).detach().double().numpy()
    design = np.c_[latents, np.ones(len(latents))]
    solution = np.linalg.lstsq(design, data.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(reducer.decode(reducer.encode(data)).detach(), design @ solution, atol=2e-3)
    assert 0 < float(reducer.explained) <= float(fitted_pca(data).explained)


def test_linear_map_with_collinear_sources_is_finite():
    source = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias, explained = linear_map(RunningMoments(3).update(torch.cat([source, 2 * source, 3 * source + 1], 1)), 2)
    torch.testing.assert_close(torch.cat([source, 2 * source], 1) @ weight + bias, 3 * source + 1)
    assert float(explained) == pytest.approx(1)


def test_mlp_trains_through_encode():
    reducer = MLPReducer(24, 4)
    reducer.encode(tokens()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in reducer.parameters())
    assert not list(PCAReducer(24, 4).parameters())


@pytest.mark.parametrize("kind", [PCAReducer, MLPReducer])
def test_saved_reducers_return_identical(kind, tmp_path):
    data = tokens()
    reducer = fitted_pca(data, 4) if kind is PCAReducer else MLPReducer(24, 4).fit_inverse([data])
    reducer.fit_whitening([data]).save_pretrained(tmp_path)
    again = load_reducer(tmp_path)
    assert type(again) is kind and again.dim == 4
    assert torch.equal(again.encode(data), reducer.encode(data))
    assert torch.equal(again.decode(again.encode(data)), reducer.decode(reducer.encode(data)))


def test_reducers_refuse_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="between 1 and 8"): PCAReducer(8, 9)
    with pytest.raises(UserError, match="between 1 and 8"): MLPReducer(8, 0)
    with pytest.raises(UserError, match="finalize"): PCAReducer(8, 2).encode(torch.zeros(3, 8))
    with pytest.raises(UserError, match="fit_inverse"): MLPReducer(8, 2).decode(torch.zeros(3, 2))
    with pytest.raises(UserError, match="At least two"): PCAReducer(8, 2).finalize()
    with pytest.raises(UserError, match="9 channels"): PCAReducer(8, 2).partial_fit(torch.zeros(3, 9))
    with pytest.raises(UserError, match="config.json"): load_reducer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "VisionTransformer"}))
    with pytest.raises(UserError, match="holds a VisionTransformer"): load_reducer(tmp_path)
