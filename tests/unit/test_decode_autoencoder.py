"Encoder, reducer and decoder together; the training stage that makes them."
import json

import pytest
import torch

from vugen.data.scenes import World, batch, holds, parse, sample_scenes
from vugen.decode.autoencoder import PixelAutoencoder, encoder_link, psnr
from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
from vugen.encode.reducers import MLPReducer, PCAReducer
from vugen.errors import UserError
from vugen.models.vit import VisionTransformer
from vugen.train.decoder import (
    HELD_OUT, DecoderPCAStage, DecoderStage, DecoderTraining, Pictures, add_latent_noise, batch_whiten, draw_kinds, emoji_world, parser_rows, photograph_crop,
)
from vugen.train.presets import Preset, Recipe, StagePreset, load_preset, override

WORLD = load_preset("tiny").world


def vision(): return VisionTransformer(hidden_size=32, num_layers=1, num_heads=2).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    root, encoder = tmp_path_factory.mktemp("root"), vision()
    reducer, decoder = MLPReducer(32, 8), PixelDiffusionDecoder(base_channels=8, num_layers=1)
    for parameter in decoder.parameters():
        if parameter.abs().sum() == 0: torch.nn.init.normal_(parameter, std=0.05)
    reducer.save_pretrained(root / "decoder" / "reducer")
    decoder.save_pretrained(root / "decoder" / "pixel_decoder")
    (root / "decoder" / "encoder.json").write_text(json.dumps(encoder_link(encoder)))
    return root, encoder, PixelAutoencoder(encoder, reducer, decoder).eval()


def test_round_trip_through_a_folder(saved):
    root, encoder, made = saved
    again, images = PixelAutoencoder.from_pretrained(root, encoder=encoder), torch.rand(3, 3, 32, 32)
    assert torch.equal(again.encode(images), made.encode(images)) and torch.equal(again.reconstruct(images, 2), made.reconstruct(images, 2))
    assert not any(p.requires_grad for p in again.parameters())


def test_another_encoder_is_refused(saved):
    root, _, _ = saved
    torch.manual_seed(5)
    with pytest.raises(UserError, match="another encoder"): PixelAutoencoder.from_pretrained(root, encoder=vision())
    with pytest.raises(UserError, match="encoder.json"): PixelAutoencoder.from_pretrained(root, "decoder-pca", encoder=vision())


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="64"): PixelAutoencoder(VisionTransformer(hidden_size=64, num_layers=1), MLPReducer(32, 8), PixelDiffusionDecoder(base_channels=8))
    with pytest.raises(UserError, match="latents of 4"): PixelAutoencoder(vision(), MLPReducer(32, 4), PixelDiffusionDecoder(base_channels=8))
    with pytest.raises(UserError, match="8×8 tokens"): PixelAutoencoder(vision(), MLPReducer(32, 8), PixelDiffusionDecoder(base_channels=8, grid_size=4))


def test_pictures_of_any_size_are_taken(saved):
    _, _, autoencoder = saved
    images = torch.rand(2, 3, 50, 70)
    painted = autoencoder.reconstruct(images, 1)
    assert painted.shape == (2, 3, 32, 32) and autoencoder.psnr(images, painted).shape == (2,)


def test_psnr_is_that_of_the_definition():
    images = torch.rand(4, 3, 8, 8)
    others = images + 0.05 * torch.randn(images.shape)
    expected = [10 * torch.log10(1 / (a - b).square().mean()) for a, b in zip(images, others)]
    assert torch.allclose(psnr(images, others), torch.stack(expected), atol=1e-4) and psnr(images, images).gt(107).all()


def test_batch_whitening_hides_scale_and_shift():
    raw = torch.randn(16, 64, 8)
    moved = raw * torch.linspace(0.5, 20, 8) + torch.linspace(-3, 3, 8)
    assert torch.allclose(batch_whiten(raw), batch_whiten(moved), atol=1e-3)


def test_frozen_whitening_matches_what_the_decoder_saw():
    torch.manual_seed(0)
    part = StagePreset(dict(base_channels=8, num_layers=1), Recipe(steps=1, batch_size=32), dict(mixture={"scenes": 1.0}, statistics=512))
    stage = DecoderStage(Preset("test", WORLD, {"decoder": part}), "unused", encoder=vision())
    module = stage.build()
    images = stage.batch(range(256))["images"]
    seen = module.latents(images)
    with torch.no_grad(): stage.freeze(module)
    later = module.reducer.encode(module.encoder(images).tokens)
    assert (seen - later).abs().mean() < 0.1


def test_latent_noise_is_bounded_and_repeatable():
    latents = torch.zeros(200, 64, 8)
    noised = add_latent_noise(latents, 0.4, torch.Generator().manual_seed(0))
    strengths = noised.flatten(1).std(1)
    assert strengths.max() < 0.45 and strengths.min() < 0.05 and abs(strengths.mean() - 0.2) < 0.03
    assert torch.equal(noised, add_latent_noise(latents, 0.4, torch.Generator().manual_seed(0))) and add_latent_noise(latents, 0, None) is latents


def test_latent_noise_has_a_uniform_deviation():
    "Noise-augmented training as in FACTS: σ ~ U(0, 0.8), drawn for each picture, on whitened latents."
    from scipy.stats import kstest
    strengths = add_latent_noise(torch.zeros(500, 64, 8), 0.8, torch.Generator().manual_seed(1)).flatten(1).std(1)
    assert kstest(strengths.numpy() / 0.8, "uniform").pvalue > 0.01


def test_rebuilding_tokens_regularises_the_reducer_and_its_head_is_not_shipped(tmp_path):
    torch.manual_seed(0)
    part = StagePreset(dict(base_channels=8, num_layers=1), Recipe(steps=1, batch_size=4), dict(mixture={"scenes": 1.0}, statistics=64, evaluation=4, feature_weight=0.5))
    stage = DecoderStage(Preset("test", WORLD, {"decoder": part}), tmp_path, encoder=vision())
    module, images = stage.build(), stage.batch(range(4))["images"]
    loss, metrics = module(images, torch.Generator().manual_seed(0))
    tokens = module.encoder(images).tokens.double()
    wanted = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    by_hand = (module.token_head(module.latents(images)).double() - wanted).square().mean()
    assert metrics["features"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert loss.item() == pytest.approx(metrics["flow"].item() + 0.5 * by_hand.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(module.rebuild(module.latents(images), module.tokens(images)), module.reducer.layers[-1].weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad(): stage.save(module.eval(), tmp_path / "decoder")
    assert sorted(path.name for path in (tmp_path / "decoder").iterdir()) == ["encoder.json", "pixel_decoder", "reducer"]
    assert not any("head" in name for name in PixelAutoencoder.from_pretrained(tmp_path, encoder=stage.encoder).state_dict())
    with pytest.raises(UserError, match="PCA does not"): DecoderPCAStage(Preset("test", WORLD, {"decoder-pca": part}), tmp_path, encoder=vision()).build()


def test_options_beside_the_preset_can_be_set_and_misspelt_ones_not():
    changed = override(load_preset("tiny"), "decoder", {"options.feature_weight": "0.1", "options.latent_noise": "0.8", "options.alignment_head": "irepa"})
    assert changed.stage("decoder").options["feature_weight"] == 0.1 and changed.stage("decoder").options["alignment_head"] == "irepa"
    assert "feature_weight" not in load_preset("tiny").stage("decoder").options
    with pytest.raises(UserError, match="feature_wait"): override(load_preset("tiny"), "decoder", {"options.feature_wait": "0.1"})
    with pytest.raises(UserError, match="feature_weight"): override(load_preset("tiny"), "vlm", {"options.feature_weight": "0.1"})


def test_the_encoder_and_a_pca_reducer_are_frozen_and_the_mlp_learns():
    torch.manual_seed(0)
    pca = PCAReducer(32, 8)
    pca.partial_fit(torch.randn(100, 32)).finalize()
    images = torch.rand(4, 3, 32, 32)
    for reducer, learns in ((MLPReducer(32, 8), True), (pca, False)):
        module = DecoderTraining(vision(), reducer, PixelDiffusionDecoder(base_channels=8, num_layers=1), options=dict(latent_noise=0.1))
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        for step in range(4):                                    # zero-initialised layers pass gradients on one after another
            loss, metrics = module(images, torch.Generator().manual_seed(step))
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        changed = {name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == ({"reducer", "decoder"} if learns else {"decoder"}) and set(metrics) == {"flow", "estimate_mse"}


def test_the_mixture_is_a_pure_function_of_seed_and_index():
    pictures = Pictures(World(**WORLD), {"scenes": 0.6, "photographs": 0.4})
    together = pictures.images(3, list(range(20)))
    for index in (0, 7, 19): assert torch.equal(pictures.images(3, [index])[0], together[index])
    assert not torch.equal(pictures.images(4, [7])[0], together[7])
    assert together.min() >= 0 and together.max() <= 1


def test_shares_of_the_mixture_are_kept():
    kinds = draw_kinds({"scenes": 8, "emoji": 1, "photographs": 1}, 0, range(4000))
    assert abs(kinds.count("scenes") / 4000 - 0.8) < 0.03 and abs(kinds.count("emoji") / 4000 - 0.1) < 0.02
    with pytest.raises(UserError, match="paintings"): Pictures(World(**WORLD), {"paintings": 1.0})


def test_crops_stay_inside_a_small_photograph():
    from PIL import Image
    small = Image.new("RGB", (40, 20), "red")
    for index in range(20):
        crop = photograph_crop([small], 32, 0, index)
        assert crop.shape == (3, 32, 32)


@pytest.mark.parametrize("stage_class", [DecoderStage, DecoderPCAStage])
def test_a_stage_writes_what_loads_and_measures_held_out_pictures(stage_class, tmp_path):
    torch.manual_seed(0)
    part = StagePreset(dict(base_channels=8, num_layers=1), Recipe(steps=1, batch_size=4), dict(mixture={"scenes": 1.0}, statistics=64, evaluation=4))
    stage = stage_class(Preset("test", WORLD, {stage_class.name: part}), tmp_path, encoder=vision())
    module = stage.build()
    assert torch.equal(stage.batch([5])["images"][0], stage.batch([4, 5])["images"][1])
    assert not torch.equal(stage.pictures.images(stage.seed + HELD_OUT, [0]), stage.batch([0])["images"])
    with torch.no_grad(): stage.save(module.eval(), tmp_path / "decoder"); rows = stage.measure(module, tmp_path / "decoder")
    again = PixelAutoencoder.from_pretrained(tmp_path, encoder=stage.encoder)
    assert abs(again.encode(stage.batch(range(64))["images"]).std() - 1) < 0.2
    assert {row["metric"] for row in rows} >= {"psnr, 8 steps", "psnr, 1 step"} and all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_emoji_keep_what_is_held_out_of_them():
    world = emoji_world(World(held_out=("red circle", "large dog", "dog left of circle")))
    assert world.held_out == ("large dog",) and not world.shapes
    assert not any(holds(scene, parse("large dog")) for scene in sample_scenes(world, 0, range(4000)))
    assert sum(item.name == "dog" for scene in sample_scenes(world, 0, range(4000)) for item in scene.items) > 3
    assert emoji_world(World()) == World(shapes=(), emoji=("all",), emoji_share=1.0)


def test_a_decoder_is_measured_on_what_is_held_out(tmp_path, monkeypatch):
    from vugen.evaluate import scene_parser
    world = World(**{**WORLD, "emoji": ("dog", "cat"), "held_out": ("red circle", "large dog")})
    part = StagePreset(dict(base_channels=8, num_layers=1), Recipe(steps=1, batch_size=4), dict(mixture={"scenes": .5, "emoji": .5}, evaluation=6))
    stage = DecoderStage(Preset("test", world.asdict(), {"decoder": part}), tmp_path, encoder=vision())
    test = World.from_dict({**world.asdict(), "split": "test"})
    pictures = stage.held_out()
    assert torch.equal(pictures["scenes"], batch(test, stage.seed + HELD_OUT, range(6))["images"])
    assert torch.equal(pictures["emoji"], batch(emoji_world(test), stage.seed + HELD_OUT, range(2))["images"])
    assert all(holds(scene, parse("large dog")) for scene in sample_scenes(emoji_world(test), 0, range(5)))
    asked = []
    (tmp_path / "parser").mkdir(), (tmp_path / "parser" / "config.json").write_text("{}")
    monkeypatch.setattr(scene_parser.SceneParser, "from_pretrained", lambda folder: None)
    monkeypatch.setattr(scene_parser, "parser_accuracy", lambda parser, world, *rest, **columns: asked.append(world) or [])
    parser_rows(PixelAutoencoder(vision(), MLPReducer(32, 8), PixelDiffusionDecoder(base_channels=8, num_layers=1)), tmp_path, world, 0, 4)
    assert asked == [test, test]


def test_smoke_preset_trains_by_the_public_command(tmp_path, capsys):
    from vugen.encode.contrastive import ContrastiveModel
    from vugen.train.decoder import main
    smoke = load_preset("smoke")
    model = smoke.stage("contrastive").model
    ContrastiveModel(["red", "circle"], **model).save_pretrained(tmp_path / "contrastive")
    for name in ("decoder", "decoder-pca"):
        with pytest.raises(SystemExit) as exit: main(["--stage", name, "--preset", "smoke", "--root", str(tmp_path), "--set", "options.evaluation=4"])
        assert exit.value.code == 0, capsys.readouterr().err
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["steps"] == 4 and record["rows"]
    assert any("gain" in row["metric"] for row in record["rows"])
    assert PixelAutoencoder.from_pretrained(tmp_path, "decoder-pca").reconstruct(torch.rand(1, 3, 32, 32), 1).shape == (1, 3, 32, 32)


def test_a_pca_reducer_is_fitted_where_the_loop_works(tmp_path, monkeypatch):
    from types import SimpleNamespace
    part = StagePreset(dict(base_channels=8, num_layers=1), Recipe(steps=1, batch_size=4), dict(mixture={"scenes": 1.0}, statistics=64, evaluation=4))
    stage, moved = DecoderPCAStage(Preset("test", WORLD, {"decoder-pca": part}), tmp_path, encoder=vision()), []
    stage.accelerator = SimpleNamespace(device=torch.device("cpu:0"))
    monkeypatch.setattr(stage.encoder, "to", lambda place: moved.append(place) or stage.encoder)
    reducer = stage.build().reducer
    assert moved == [torch.device("cpu:0")] and not reducer.explained.isnan()
