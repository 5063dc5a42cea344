"""Decoupled, REPA and VUGEN from one backbone: what they share to the bit, what differs, and the improved options."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from vugen.data.scenes import World, batch
from vugen.decode.autoencoder import encoder_link
from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
from vugen.decode.vae import ConvVAE, DiffusersVAE
from vugen.encode.contrastive import ContrastiveModel
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.evaluate.scene_parser import SceneParser
from vugen.generate.baselines import (
    GENERATORS, AlignedGenerator, GridConvolution, alignment_head, alignment_layer, alignment_targets, decoupled, spatial_normalize, trained_generators)
from vugen.generate.latent_spaces import LatentSpace, UnderstandingSpace, VAESpace, Whitening, patch_size_for
from vugen.generate.text_to_image import TextToImage, latent_noise, paint_with
from vugen.generate.vlm import SceneVLM, world_words
from vugen.lab.cli import STAGES, draw_chunks, main as program, stage_class
from vugen.lab.describe import parts_of
from vugen.models.flow import dimension_shift, guided
from vugen.models.saving import fingerprint
from vugen.models.seams import Generator
from vugen.train import generator as training
from vugen.train.generator import DecoupledStage, GeneratorStage, REPAStage
from vugen.train.loop import run, trained_tensors
from vugen.train.presets import PRESETS, Preset, Recipe, StagePreset, load_preset, override
from vugen.understand.scorers import load_scorers

WORLD = World()
PROMPTS = ["a red circle", "a blue star above a red heart", "a pink cross left of a black square"]
ALIGNMENT = dict(alignment_weight=0.5, alignment_layer=0, alignment_head="mlp", alignment_targets="plain", keep_targets=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "The parts that all three stand on, untrained, saved as their stages save them"
    torch.manual_seed(0)
    folder, words = tmp_path_factory.mktemp("checkpoints"), world_words(WORLD)
    contrastive = ContrastiveModel(words, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8).eval()
    contrastive.save_pretrained(folder / "contrastive")
    SceneVLM(words, 16, (4, 4), hidden_size=32, num_layers=4, num_heads=2, intermediate_size=64).save_pretrained(folder / "vlm")
    reducer = MLPReducer(hidden_size=16, dim=4)
    with torch.no_grad(): reducer.fit_whitening([contrastive.vision(batch(WORLD, 0, range(100))["images"]).tokens])
    reducer.save_pretrained(folder / "decoder/reducer")
    (folder / "decoder/encoder.json").write_text(json.dumps(encoder_link(contrastive.vision)))
    PixelDiffusionDecoder(latent_dim=4, grid_size=4, base_channels=8, multipliers=(1, 1, 1, 1), num_layers=1).save_pretrained(folder / "decoder/pixel_decoder")
    vae = ConvVAE(widths=(8, 8, 16))
    vae.fit_scale([batch(WORLD, 2, range(50))["images"]]).save_pretrained(folder / "vae")
    SceneParser.for_world(WORLD, width=8, blocks=1).save_pretrained(folder / "parser")
    return folder


def preset(model=None, steps=4, **options):
    part = StagePreset(dict(num_inference_steps=2, **(model or {})), Recipe(steps, 6, warmup_steps=1, log_every=2, checkpoint_every=2, ema_decay=0.9),
                       dict(pool=20, pool_block=10, evaluation=3, statistics=60, **ALIGNMENT | options))
    return Preset("toy", {}, {name: part for name in training.STAGES})


def awake(model):
    "The output layer starts at zero: give it something to say"
    torch.manual_seed(4)
    nn.init.normal_(model.mixture.latent_out.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    "A folder with all three, trained for four steps on one core"
    folder = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(root, folder)
    for name, stage in training.STAGES.items(): run(stage(preset(), folder), preset().stage(name).recipe, folder / name, show=False)
    return folder


# ---- latent spaces ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", [1, 2, 4])
def test_cutting_a_map_into_patches_loses_nothing(side):
    from vugen.decode.latent_diffusion import patchify, unpatchify
    latents = torch.randn(2, 3, 8, 8)
    by_hand = latents.numpy().reshape(2, 3, 8 // side, side, 8 // side, side).transpose(0, 2, 4, 1, 3, 5).reshape(2, (8 // side) ** 2, 3 * side**2)
    assert np.array_equal(patchify(latents, side).numpy(), by_hand) and torch.equal(unpatchify(patchify(latents, side), side), latents)


def test_patches_are_as_many_as_the_encoders_tokens_where_they_can_be():
    for rows in (1, 2, 4, 8, 16, 32): assert (32 // patch_size_for((32, 32), (rows, rows))) == rows
    for rows in (3, 9, 14, 18, 24):
        side = patch_size_for((32, 32), (rows, rows))
        gaps = {each: abs(math.log((32 // each) ** 2 / rows**2)) for each in (1, 2, 4, 8, 16, 32)}
        assert gaps[side] == min(gaps.values())


@pytest.mark.parametrize("published", [False, True])
def test_a_vae_space_is_the_vae_itself_whitened(root, published):
    images = batch(WORLD, 3, range(40))["images"]
    vae = diffusers_vae() if published else ConvVAE.from_pretrained(root / "vae")
    space = VAESpace(vae, 16, (4, 4)).fit_whitening(images.split(13))
    latents = space.encode(images)
    assert isinstance(space, LatentSpace) and latents.shape == (40, 16, 16) and not latents.requires_grad
    flat = latents.flatten(0, 1).double().numpy()
    assert np.abs(flat.mean(0)).max() < 1e-4 and np.abs(flat.std(0, ddof=1) - 1).max() < 1e-4
    with torch.no_grad(): direct = vae.decode(vae.encode(images))
    assert torch.allclose(space.decode(latents, num_inference_steps=3, seed=9, first=4), direct, atol=1e-4)


def diffusers_vae():
    import diffusers
    torch.manual_seed(0)
    return DiffusersVAE(diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32))


def test_whitening_drops_nothing():
    white = Whitening(5).fit_whitening([torch.randn(200, 5) * torch.arange(1.0, 6.0) + 3])
    tokens = torch.randn(2, 7, 5)
    assert torch.allclose(white.decode(white.encode(tokens)), tokens, atol=1e-5) and white.explained == 1


def test_impossible_spaces_are_refused(root):
    vae, vlm = ConvVAE.from_pretrained(root / "vae"), SceneVLM.from_pretrained(root / "vlm")
    with pytest.raises(UserError, match="square patches"): VAESpace(vae, 12, (4, 4))
    with pytest.raises(UserError, match="not square"): VAESpace(vae, 4, (4, 8))
    with pytest.raises(UserError, match="multiple of 4"): decoupled(vlm, vae, 30)
    with pytest.raises(UserError, match="needs its VAE"): TextToImage(space="vae").attach(vlm)
    with pytest.raises(UserError, match="pixels"): TextToImage(space="pixels").attach(vlm)
    with pytest.raises(UserError, match="no reducer"): UnderstandingSpace(vlm.vision).encode(torch.rand(1, 3, 32, 32))


# ---- three generators, one start ----------------------------------------------------------------------------------------------

def test_all_three_begin_with_the_same_tower_and_are_silent(root):
    mixtures = {name: (built.model if isinstance(built := stage(preset(), root).build(), AlignedGenerator) else built).mixture for name, stage in training.STAGES.items()}
    own = mixtures["generator"].state_dict()
    t = torch.tensor([0.3, 0.8])
    for mixture in mixtures.values():
        state = mixture.state_dict()
        assert all(torch.equal(state[name], value) for name, value in own.items() if name.startswith(("tower.", "time.")))
        cache = mixture.prompt_cache(*SceneVLM.from_pretrained(root / "vlm").encode(PROMPTS[:2]))
        assert mixture(latent_noise(0, 2, mixture.num_tokens, mixture.latent_dim), t, cache).abs().max() == 0 # both velocities start at the same place
    decoder = SceneVLM.from_pretrained(root / "vlm").language_model.model
    for name, value in decoder.layers.state_dict().items(): assert torch.equal(own[f"tower.layers.{name}"], value)
    assert mixtures["generator-decoupled"].num_tokens == mixtures["generator"].num_tokens == 16


def test_all_three_meet_the_same_samples_words_and_times(root):
    stages = {name: stage(preset(), root) for name, stage in training.STAGES.items()}
    for stage in stages.values(): stage.build()
    batches = {name: stage.batch(list(range(30, 36))) for name, stage in stages.items()}
    times = {name: stage.draws(batches[name]["latents"], torch.Generator().manual_seed(5))[0] for name, stage in stages.items()}
    for name in stages:
        assert torch.equal(batches[name]["ids"], batches["generator"]["ids"]) and torch.equal(batches[name]["mask"], batches["generator"]["mask"]) and torch.equal(times[name], times["generator"])
    assert torch.equal(batches["generator-repa"]["latents"], batches["generator-decoupled"]["latents"])
    images = batch(stages["generator"].world, 0, [index % 20 for index in range(30, 36)])["images"]
    vae = stages["generator-decoupled"].model.space.vae
    with torch.no_grad(): assert torch.allclose(vae.decode(vae.encode(images)), stages["generator-decoupled"].model.space.decode(batches["generator-decoupled"]["latents"]), atol=1e-4)


def test_repa_of_weight_zero_is_decoupled_to_the_bit(root, trained, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    silent = preset(alignment_weight=0.0)
    run(REPAStage(silent, tmp_path / "root"), silent.stage("generator-repa").recipe, tmp_path / "root/generator-repa", show=False)
    weights = [folder / "model.safetensors" for folder in (tmp_path / "root/generator-repa", trained / "generator-decoupled", trained / "generator-repa")]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()


def test_the_alignment_reaches_the_tower_and_not_the_encoder(root):
    stage = REPAStage(preset(alignment_layer=3), root)
    module, made = stage.build(), stage.batch(list(range(6)))
    awake(module.model)
    t, noise = stage.draws(made["latents"], torch.Generator().manual_seed(0))
    _, alignment = module(made["latents"], made["ids"], made["mask"], t, noise, made["targets"])
    alignment.backward()
    layers = module.model.mixture.tower.layers
    assert [any(value.grad is not None and value.grad.abs().max() > 0 for value in layer.parameters()) for layer in layers] == [True, True, True, False]
    assert all(value.grad.abs().max() > 0 for value in module.head.parameters())
    frozen = [*module.model.vlm.parameters(), *module.model.vae.parameters()]
    assert frozen and all(value.grad is None and not value.requires_grad for value in frozen)
    assert all(name.startswith(("model.mixture.", "head.", "model.whitening.")) for name in trained_tensors(module))


def test_the_alignment_is_one_minus_the_mean_cosine(root):
    from sklearn.metrics.pairwise import paired_cosine_distances
    stage = REPAStage(preset(), root)
    module, made = stage.build(), stage.batch(list(range(6)))
    kept = []
    t, noise = stage.draws(made["latents"], torch.Generator().manual_seed(0))
    with torch.no_grad():
        error, alignment = module(made["latents"], made["ids"], made["mask"], t, noise, made["targets"])
        module.model(made["latents"], made["ids"], made["mask"], t, noise, watch=lambda number, hidden: kept.append(hidden))
        aimed = module.head.projector(kept[module.layer - 1]).flatten(0, 1)
    images = batch(stage.world, 0, range(6))["images"]
    seen = stage.model.vlm.vision(images).tokens.detach().flatten(0, 1)
    assert alignment.item() == pytest.approx(paired_cosine_distances(aimed.numpy(), seen.numpy()).mean(), abs=1e-3) # the targets are kept in half precision
    loss, metrics = stage.loss(module, made, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(error.mean().item() + 0.5 * alignment.item(), rel=1e-5) and metrics["alignment"].item() == pytest.approx(alignment.item(), rel=1e-5)


def test_targets_kept_and_targets_made_anew_are_the_same(root):
    stages = [REPAStage(preset(keep_targets=keep), root) for keep in (True, False)]
    for stage in stages: stage.build()
    first, second = (stage.batch([3, 27, 45])["targets"] for stage in stages)
    assert torch.allclose(first.float(), second.float(), atol=2e-3)


def test_layer_and_options_of_the_alignment():
    assert [alignment_layer(number) for number in (1, 2, 5, 8, 16, 28)] == [1, 1, 2, 4, 4, 4] and alignment_layer(5, 5) == 5
    for wrong in (-1, 6):
        with pytest.raises(UserError, match="alignment layer"): alignment_layer(5, wrong)
    with pytest.raises(UserError, match="mlp, conv"): alignment_head(8, 8, (2, 2), "linear")
    with pytest.raises(UserError, match="plain, spatial"): alignment_targets(None, None, 4, "global")


def test_irepas_projector_is_a_convolution_over_the_grid():
    from scipy.signal import correlate
    layer, tokens = GridConvolution(2, 3, (4, 5)).double(), torch.randn(1, 20, 2, dtype=torch.double)
    grid = tokens[0].T.view(2, 4, 5).numpy()
    by_hand = np.stack([sum(correlate(grid[channel], kernel[channel], mode="same") for channel in range(2)) for kernel in layer.convolution.weight.detach().numpy()])
    expected = by_hand + layer.convolution.bias.detach().numpy()[:, None, None]
    assert np.allclose(layer(tokens)[0].detach().T.view(3, 4, 5).numpy(), expected)


def test_irepas_targets_are_standardised_over_places():
    from sklearn.preprocessing import scale
    tokens = torch.randn(3, 16, 7, dtype=torch.double) * 4 + 2
    expected = np.stack([scale(each.numpy()) for each in tokens]) * np.sqrt(15 / 16) # sklearn divides by the biased deviation
    assert np.allclose(spatial_normalize(tokens).numpy(), expected, atol=1e-4)
    assert torch.allclose(spatial_normalize(tokens, 0.5).mean(1), tokens.mean(1) / 2 / tokens.std(1), atol=1e-4)


# ---- saved, loaded, resumed ---------------------------------------------------------------------------------------------------

def test_each_is_a_generator_and_comes_back_as_it_was(trained):
    models = trained_generators(trained)
    assert list(models) == list(GENERATORS) and all(isinstance(model, Generator) and model.vlm is models["VUGEN"].vlm for model in models.values())
    for name, model in models.items():
        again = TextToImage.from_pretrained(trained / GENERATORS[name])
        assert again.space.name == ("understanding" if name == "VUGEN" else "vae")
        assert torch.equal(again.images(PROMPTS, seed=3, decoder_steps=2), model.images(PROMPTS, seed=3, decoder_steps=2)) and model.images(PROMPTS).shape == (3, 3, 32, 32)
        images = batch(WORLD, 8, range(2))["images"]
        assert torch.equal(again.encode_images(images), model.encode_images(images)) and again.denoising_error(images, PROMPTS, num_samples=2).shape == (2, 3)


def test_the_folder_holds_tower_and_statistics_but_no_vae_and_no_head(trained):
    from safetensors.torch import load_file
    names = load_file(trained / "generator-repa/model.safetensors")
    assert all(name.startswith(("mixture.tower.", "mixture.time.", "mixture.latent_", "whitening.")) for name in names) and names["whitening.latent_std"].shape == (16,)
    assert not any(name.startswith("whitening.") for name in load_file(trained / "generator/model.safetensors"))


def test_another_vae_is_refused(trained):
    torch.manual_seed(9)
    with pytest.raises(UserError, match="vae is not the one"): TextToImage.from_pretrained(trained / "generator-decoupled", vae=ConvVAE(widths=(8, 8, 16)).eval())


def test_a_configuration_from_before_the_spaces_loads(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "root")
    path = tmp_path / "root/generator/config.json"
    config = json.loads(path.read_text())
    for new in ("space", "vae", "vae_fingerprint", "guidance_interval", "shift_base"): del config[new]
    path.write_text(json.dumps(config))
    assert torch.equal(TextToImage.from_pretrained(tmp_path / "root").generate(PROMPTS), TextToImage.from_pretrained(trained).generate(PROMPTS))


@pytest.mark.parametrize("changes", [{}, dict(alignment_head="conv", alignment_targets="spatial")])
def test_repa_stopped_and_resumed_ends_in_the_same_bits(root, tmp_path, changes):
    shutil.copytree(root, tmp_path / "root")
    chosen = preset(**changes)
    recipe = chosen.stage("generator-repa").recipe
    run(REPAStage(chosen, tmp_path / "root"), recipe, tmp_path / "root/whole", show=False)
    assert run(REPAStage(chosen, tmp_path / "root"), recipe, tmp_path / "root/parts", stop_after=3, show=False)["status"] == "stopped"
    record = run(REPAStage(chosen, tmp_path / "root"), recipe, tmp_path / "root/parts", resume=True, show=False)["record"]
    assert (tmp_path / "root/whole/model.safetensors").read_bytes() == (tmp_path / "root/parts/model.safetensors").read_bytes()
    assert record["rows"] and record["stage"] == "generator-repa"


def test_a_published_vae_serves_from_its_folder(root, tmp_path):
    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("vae"))
    diffusers_vae().save_pretrained(tmp_path / "published")
    with pytest.raises(UserError, match="vugen train vae"): DecoupledStage(preset(), tmp_path / "root").build()
    chosen = preset(vae=str(tmp_path / "published"))
    run(DecoupledStage(chosen, tmp_path / "root"), chosen.stage("generator-decoupled").recipe, tmp_path / "root/generator-decoupled", show=False)
    model = TextToImage.from_pretrained(tmp_path / "root/generator-decoupled")
    assert isinstance(model.space.vae, DiffusersVAE) and model.images(PROMPTS[:1]).shape == (1, 3, 32, 32)


def test_each_serves_as_a_scorer(trained):
    images = batch(WORLD, 8, range(2))["images"]
    scorers = load_scorers(trained, ["denoising", "denoising-decoupled", "denoising-repa"])
    scores = {name: scorer.score(images, PROMPTS) for name, scorer in scorers.items()}
    for name, scorer in scorers.items():
        assert scorer.name == name and scores[name].shape == (2, 3) and torch.isfinite(scores[name]).all() and torch.equal(scorer.score(images, PROMPTS), scores[name])
    assert scorers["denoising-repa"].generator.space.name == "vae" and not torch.equal(scores["denoising-decoupled"], scores["denoising"])


# ---- improved options ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(trained): return awake(TextToImage.from_pretrained(trained / "generator-decoupled", num_inference_steps=8))


def test_the_whole_interval_is_plain_guidance_and_outside_it_there_is_none(model):
    plain, none = (model.generate(PROMPTS, guidance_scale=scale) for scale in (3.0, 1.0))
    assert torch.equal(model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0, 1)), plain)
    assert torch.equal(model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0.9, 1)), none) # the last step begins at 7/8
    assert torch.equal(model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0.01, 0.1)), none)
    inside = model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0.25, 0.5))
    assert not torch.allclose(inside, plain, atol=1e-3) and not torch.allclose(inside, none, atol=1e-3)


def test_a_part_of_the_interval_by_hand(model):
    told, silent = model.prompt_cache(PROMPTS), model.prompt_cache([""] * 3)
    x = latent_noise(2, 3, 16, 16)
    with torch.no_grad():
        for step in range(8):
            t = torch.full((3,), step / 8)
            velocity = model.velocity(x, t, told)
            if 2 <= step <= 4: velocity = guided(velocity, model.velocity(x, t, silent), 3.0)
            x = x + velocity / 8
    assert torch.allclose(model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0.25, 0.5), seed=2), x, atol=1e-4)


def test_the_interval_of_the_configuration_is_the_default(trained, model):
    kept = awake(TextToImage.from_pretrained(trained / "generator-decoupled", num_inference_steps=8, guidance_interval=(0.25, 0.5)))
    assert torch.equal(kept.generate(PROMPTS, guidance_scale=3.0), model.generate(PROMPTS, guidance_scale=3.0, guidance_interval=(0.25, 0.5)))
    for wrong in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="guidance interval"): model.generate(PROMPTS, guidance_interval=wrong)
    for wrong in (0.5, "all", [0.1], (0, "1")): # what `--set model.guidance_interval` may say
        with pytest.raises(UserError, match="guidance interval"): TextToImage(guidance_interval=wrong)


def test_the_shift_follows_the_size_of_a_sample(trained, model):
    for dim, grid in ((64, (16, 16)), (16, (4, 4))):
        made = TextToImage(latent_dim=dim, grid=grid, shift="dimension")
        assert made.shift == dimension_shift(grid[0] * grid[1], dim) == math.sqrt(grid[0] * grid[1] * dim / 4096)
    assert TextToImage(latent_dim=64, grid=(16, 16), shift="dimension").shift == 2.0 # the paper's latents
    by_rule = awake(TextToImage.from_pretrained(trained / "generator-decoupled", shift="dimension", shift_base=64, num_inference_steps=8))
    assert by_rule.shift == 2.0 and torch.equal(by_rule.generate(PROMPTS), model.generate(PROMPTS, shift=2.0)) and not torch.equal(by_rule.generate(PROMPTS), model.generate(PROMPTS))
    for wrong in (0, -1.0, "size", float("nan")):
        with pytest.raises(UserError, match="time shift"): TextToImage(shift=wrong)


def test_every_option_can_be_switched_alone(root):
    twin = Preset("toy", {}, load_preset("tiny-improved").stages)
    small = {"options.pool": "20", "options.pool_block": "10", "options.statistics": "20"}
    chosen = override(twin, "generator-repa", {**small, "model.shift": "1.5", "options.alignment_head": "mlp"})
    module = REPAStage(chosen, root).build()
    assert module.model.shift == 1.5 and module.model.guidance_interval == (0.1, 1.0) and not isinstance(module.head.projector, GridConvolution)
    other = REPAStage(override(twin, "generator-repa", {**small, "model.guidance_interval": "[0, 1]"}), root).build()
    assert other.model.shift == dimension_shift(16, 16, 57) and other.model.guidance_interval == (0, 1) and isinstance(other.head.projector, GridConvolution)


# ---- noise, presets and the program -------------------------------------------------------------------------------------------

def test_a_picture_is_its_seed_and_number_however_the_call_is_cut(trained):
    model = TextToImage.from_pretrained(trained)
    awake(model)
    prompts = [PROMPTS[0]] * 7
    whole = model.images(prompts, seed=6, decoder_steps=2)
    for sizes in ((1,) * 7, (3, 4), (5, 2)):
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        parts = torch.cat([model.images(prompts[start:start + size], seed=6, first=start, decoder_steps=2) for start, size in zip(starts, sizes)])
        assert torch.allclose(parts, whole, atol=1e-4)
    assert not torch.allclose(whole[0], whole[3], atol=1e-3)


def test_the_program_draws_the_same_picture_in_any_chunk(trained, monkeypatch):
    from vugen.lab import cli
    model = awake(TextToImage.from_pretrained(trained))
    quiet = lambda *words: None
    whole = draw_chunks(model, [PROMPTS[1]] * 5, 4, quiet, decoder_steps=2)
    monkeypatch.setattr(cli, "CHUNK", 2)
    assert torch.allclose(draw_chunks(model, [PROMPTS[1]] * 5, 4, quiet, decoder_steps=2), whole, atol=1e-4)


def test_every_stage_of_every_preset_can_be_trained_by_name():
    for chosen in PRESETS.values():
        for name in chosen.stages: assert stage_class(name).name == name
    assert set(load_preset("tiny").stages) == set(STAGES)


def test_baselines_take_the_recipe_of_the_generator_whatever_it_is():
    for chosen in PRESETS.values():
        own = chosen.stage("generator")
        for name in ("generator-decoupled", "generator-repa"):
            part = chosen.stage(name)
            assert part.recipe == own.recipe and part.model == own.model and own.options.items() <= part.options.items()


@pytest.mark.parametrize("size", ["tiny", "smoke"])
def test_the_description_counts_what_is_built(size):
    from vugen.generate.mixture_of_transformers import MixtureOfTransformers
    chosen = load_preset(size)
    parts = {part.name: part for part in parts_of(chosen)}
    vlm = SceneVLM(world_words(World(**chosen.world)), chosen.stage("contrastive").model["hidden_size"], (8, 8), **chosen.stage("vlm").model)
    built = MixtureOfTransformers(vlm.language_model, 4, (8, 8))
    trainable = sum(value.numel() for value in built.parameters() if value.requires_grad)
    width, features = vlm.language_model.config.hidden_size, chosen.stage("contrastive").model["hidden_size"]
    assert parts["image tower of Decoupled, a step"].trainable() == parts["image tower of REPA, a step"].trainable() == trainable
    assert parts["alignment head"].trainable() == width * features + features + features**2 + features


def test_the_program_draws_with_the_named_generator(trained, tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as left: program([str(word) for word in words])
        return left.value.code
    common = ("generate", "a red circle", "--steps", 2, "--root", trained)
    assert call(*common, "--generator", "generator-repa", "--guidance-interval", 0.2, 0.8, "--out", tmp_path / "one") == 0
    record = json.loads((tmp_path / "one/generate.json").read_text())["run"]
    assert record["generator"] == "generator-repa" and record["guidance_interval"] == [0.2, 0.8]
    assert call(*common, "--out", tmp_path / "two") == 0 and (tmp_path / "one/00000.png").read_bytes() != (tmp_path / "two/00000.png").read_bytes()
    for wrong, said in ((("--generator", "generator-other"), "generator-other"), (("--guidance-interval", 0.9, 0.1), "--guidance-interval"), (("--guidance-interval", 0, 2), "--guidance-interval")):
        capsys.readouterr()
        assert call(*common, *wrong, "--out", tmp_path / "three") == 2 and said in capsys.readouterr().err


def test_a_generator_of_vae_latents_takes_no_other_decoder(model, trained):
    with pytest.raises(UserError, match="paints them itself"): paint_with(model, trained / "decoder")


def test_an_unknown_stage_of_the_module_is_refused(capsys):
    for words in (["--stage", "generator-other"], ["--stage"]):
        with pytest.raises(SystemExit) as left: training.main(words)
        assert left.value.code == 2 and "generator-decoupled" in capsys.readouterr().err


def test_vugens_own_stage_is_not_aligned(root):
    built = GeneratorStage(preset(), root).build()
    assert isinstance(built, TextToImage) and fingerprint(built.vlm) == built.config["vlm_fingerprint"]


def test_the_statistics_of_a_vae_are_measured_where_the_loop_works(root, monkeypatch):
    from types import SimpleNamespace
    moved, stage = [], DecoupledStage(preset(), root)
    monkeypatch.setattr(ConvVAE, "to", lambda vae, place: moved.append(place) or vae)
    stage.accelerator = SimpleNamespace(device=torch.device("cpu:0"))
    assert stage.build().space.whitening.latent_std.ne(1).any() and moved == [torch.device("cpu:0")]
