"""The reducers against scikit-learn, against each other, through saving, and with bad input."""
import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vugen.encode.reducers import MLPReducer, PCAReducer, RunningMoments, linear_map, load_reducer, narrowed, narrowing
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


@pytest.mark.parametrize("ratio, dim", [(1, 128), (2, 64), (4, 32), (8, 16), (16, 8), (32, 4)])
def test_mlp_reducer_of_every_ratio_trains_jointly(ratio, dim):
    from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
    from vugen.models.vit import VisionTransformer
    from vugen.train.decoder import DecoderStage, DecoderTraining
    from vugen.train.presets import Preset, Recipe, StagePreset, load_preset
    torch.manual_seed(0)
    encoder = VisionTransformer(hidden_size=128, num_layers=1, num_heads=2)
    part = StagePreset(dict(ratio=ratio, base_channels=8, num_layers=1), Recipe(steps=1, batch_size=2), dict(mixture={"scenes": 1.0}))
    module = DecoderStage(Preset("test", load_preset("tiny").world, {"decoder": part}), "unused", encoder=encoder).build()
    assert isinstance(module, DecoderTraining) and isinstance(module.decoder, PixelDiffusionDecoder)
    assert (module.reducer.dim, module.reducer.ratio, module.decoder.latent_dim) == (dim, ratio, dim)
    optimizer, before = torch.optim.SGD(module.parameters(), 0.1), module.reducer.layers[1].weight.clone()
    for step in range(4):                                    # zero-initialised layers pass gradients on one after another
        loss, _ = module(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(step))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert torch.isfinite(loss) and not torch.equal(module.reducer.layers[1].weight, before)


def test_pca_streams_in_constant_memory():
    reducer, seen = PCAReducer(24, 3), []
    held = lambda: sum(value.numel() for value in vars(reducer.moments).values() if torch.is_tensor(value)) + sum(value.numel() for value in reducer.state_dict().values())
    for seed in range(40):
        reducer.partial_fit(tokens(50, seed=0) + seed)
        seen.append(held())
    assert len(set(seen)) == 1 and reducer.moments.count == 2000 and seen[0] < 24 * 24 + 200


@pytest.mark.parametrize("sizes", [[1] * 30, [1, 28, 1], [7, 0, 23]])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_pca_equals_scikit_learn_however_the_stream_is_cut(sizes, offset):
    "Fewer tokens than would fill the space twice, single tokens, an empty batch, and a mean far from 0."
    data = tokens(30) + offset
    reducer = PCAReducer(24, 5)
    for part in data.split(sizes): reducer.partial_fit(part)
    reducer.finalize()
    theirs = PCA(5, svd_solver="full").fit(data.double().numpy())
    np.testing.assert_allclose(reducer.components, theirs.components_, atol=1e-5)
    np.testing.assert_allclose(reducer.explained_variance, theirs.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(reducer.decode_raw(reducer.encode_raw(data)), theirs.inverse_transform(theirs.transform(data.double().numpy())), atol=2e-3)


def test_whitening_stays_frozen_while_weights_move():
    data = tokens()
    reducer = MLPReducer(24, 4).fit_whitening([data])
    before = reducer.latent_mean.clone(), reducer.latent_std.clone()
    optimizer = torch.optim.SGD(reducer.parameters(), 0.1)
    reducer.train().encode(data).square().mean().backward(), optimizer.step()
    assert torch.equal(reducer.latent_mean, before[0]) and torch.equal(reducer.latent_std, before[1])
    assert not {"latent_mean", "latent_std"} & {name for name, _ in reducer.named_parameters()}


def test_narrowed_pca_is_that_of_scikit_learn():
    data = tokens(96, 10)
    reducer = PCAReducer(10, 6).partial_fit(data).finalize().fit_whitening([data])
    latents = reducer.encode(data).reshape(6, 16, 6)
    way = narrowing(reducer, latents)
    for kept in range(1, 7):
        known = PCA(kept).fit(data.double().numpy())
        wanted = known.inverse_transform(known.transform(data.double().numpy()))
        np.testing.assert_allclose(reducer.decode(narrowed(latents, way, kept)).reshape(-1, 10).numpy(), wanted, atol=2e-3)


def test_a_narrowed_learned_reducer_loses_no_more_of_its_tokens_than_any_map_of_that_rank():
    torch.manual_seed(0)
    data = torch.randn(8, 16, 12) * torch.linspace(3, 0.1, 12)
    reducer = MLPReducer(12, 5).fit_whitening([data]).fit_inverse([data]).requires_grad_(False)
    latents = reducer.encode(data)
    way, full = narrowing(reducer, latents), reducer.decode(latents).reshape(-1, 12).double()
    assert torch.equal(narrowed(latents, way, 5), latents)
    values = torch.linalg.svdvals(full - full.mean(0)).square()
    for kept in range(1, 6):  # Eckart and Young
        lost = (reducer.decode(narrowed(latents, way, kept)).reshape(-1, 12) - full).square().sum()
        assert torch.allclose(lost, values[kept:].sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_without_a_way_back_the_loudest_directions_of_the_latents_are_kept(kept):
    latents = tokens(300, 6, seed=3)
    known = PCA(kept).fit(latents.double().numpy())
    wanted = known.inverse_transform(known.transform(latents.double().numpy()))
    np.testing.assert_allclose(narrowed(latents, narrowing(MLPReducer(24, 6), latents), kept).numpy(), wanted, atol=1e-3)


@pytest.mark.parametrize("kept", [0, 7, -1])
def test_no_other_number_of_directions_can_be_kept(kept):
    with pytest.raises(UserError, match="give 1 to 6"): narrowed(torch.zeros(2, 6), narrowing(MLPReducer(24, 6), tokens(50, 6)), kept)
