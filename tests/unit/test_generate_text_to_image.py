"""Prompts to latents to pictures, and back as a classifier, on untrained miniatures; and the two training stages."""
import dataclasses
import json

import pytest
import torch
from torch import nn

from vugen.data.scenes import World, batch, captions, sample_scenes
from vugen.decode.autoencoder import encoder_link
from vugen.decode.feed_forward import FeedForwardDecoder
from vugen.decode.latent_diffusion import LatentDiffusionDecoder
from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
from vugen.encode.contrastive import ContrastiveModel
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.evaluate.scene_parser import SceneParser
from vugen.generate.text_to_image import TextToImage, latent_noise, paint_with
from vugen.generate.vlm import SceneVLM, world_words
from vugen.lab.cli import main as program
from vugen.models.flow import euler
from vugen.models.saving import fingerprint
from vugen.models.seams import Generator
from vugen.paths import checkpoints_dir
from vugen.train.generator import GeneratorStage, LatentPool, held_out_prompts
from vugen.train.loop import run
from vugen.train.presets import Preset, Recipe, StagePreset
from vugen.train.vlm import VLMStage

WORLD = World()
PROMPTS = ["a red circle", "a blue star above a red heart", "a pink cross left of a black square"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "All parts, untrained, saved as the stages save them"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    words = world_words(WORLD)
    contrastive = ContrastiveModel(words, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8).eval()
    contrastive.save_pretrained(folder / "contrastive")
    vlm = SceneVLM(words, 16, (4, 4), hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, encoder_fingerprint=fingerprint(contrastive.vision)).attach(contrastive.vision).eval()
    vlm.save_pretrained(folder / "vlm")
    reducer = MLPReducer(hidden_size=16, dim=4)
    with torch.no_grad(): reducer.fit_whitening([contrastive.vision(batch(WORLD, 0, range(100))["images"]).tokens])
    reducer.save_pretrained(folder / "decoder/reducer")
    (folder / "decoder/encoder.json").write_text(json.dumps(encoder_link(contrastive.vision)))
    PixelDiffusionDecoder(latent_dim=4, grid_size=4, base_channels=8, multipliers=(1, 1, 1, 1), num_layers=1).save_pretrained(folder / "decoder/pixel_decoder")
    SceneParser.for_world(WORLD, width=8, blocks=1).save_pretrained(folder / "parser")
    model = TextToImage(latent_dim=4, grid=(4, 4), num_inference_steps=4, vlm_fingerprint=fingerprint(vlm), reducer_fingerprint=fingerprint(reducer)).attach(vlm, reducer)
    nn.init.normal_(model.mixture.latent_out.weight, std=0.2)
    model.save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def model(root): return TextToImage.from_pretrained(root)


def test_it_is_a_generator(model, root):
    assert isinstance(model, Generator) and not model.training
    direct = TextToImage.from_pretrained(root / "generator")
    assert torch.equal(direct.generate(PROMPTS), model.generate(PROMPTS))


def test_the_folder_holds_the_tower_alone(root):
    from safetensors import safe_open
    with safe_open(root / "generator/model.safetensors", "pt") as file: names = set(file.keys())
    assert names and all(name.startswith(("mixture.tower.", "mixture.time.", "mixture.latent_")) for name in names)


def test_noise_belongs_to_the_picture_not_to_the_batch(model):
    assert torch.equal(latent_noise(4, 5, 16, 4)[:3], latent_noise(4, 3, 16, 4))
    assert not torch.equal(latent_noise(4, 2, 16, 4)[0], latent_noise(4, 2, 16, 4)[1]) and not torch.equal(latent_noise(4, 1, 16, 4), latent_noise(5, 1, 16, 4))
    whole = model.generate(PROMPTS)
    assert torch.allclose(model.generate(PROMPTS[:2]), whole[:2], atol=1e-5)


def sample_alone(model, prompt, noise):
    "Six Euler steps of one picture, its prompt never beside a longer one"
    cache = model.prompt_cache([prompt])
    return euler(lambda x, t: model.velocity(x, t, cache), noise, 6)


def test_cached_and_uncached_sampling_agree(model):
    with torch.no_grad():
        uncached = euler(lambda x, t: model.velocity(x, t, PROMPTS), latent_noise(2, 3, 16, 4), 6)
        padded = model.prompt_cache(PROMPTS)
        alone = [sample_alone(model, prompt, latent_noise(2, 3, 16, 4)[row:row + 1]) for row, prompt in enumerate(PROMPTS)]
    cached = model.generate(PROMPTS, guidance_scale=1, num_inference_steps=6, seed=2)
    assert len(padded) == 3 and (cached - uncached).abs().max() < 1e-5 and (cached - torch.cat(alone)).abs().max() < 1e-5


def test_guidance_is_the_straight_line_through_both_velocities(model):
    noise, t = latent_noise(0, 3, 16, 4), torch.zeros(3)
    with torch.no_grad(): told, silent = (model.velocity(noise, t, model.prompt_cache(prompts)) for prompts in (PROMPTS, [""] * 3))
    for scale in (0.0, 1.0, 3.0):
        one_step = model.generate(PROMPTS, guidance_scale=scale, num_inference_steps=1)
        assert torch.allclose(one_step, noise + silent + scale * (told - silent), atol=1e-5)


def test_the_prompt_of_no_words_is_bos_alone(model):
    ids, mask = model.vlm.encode([""])
    assert ids.tolist() == [[model.vlm.tokenizer.bos_id]] and mask.tolist() == [[True]]


def test_understanding_is_the_same_with_the_tower_attached(root):
    images = batch(WORLD, 0, range(2))["images"]
    bare = SceneVLM.from_pretrained(root / "vlm")
    ids = bare.encode(["a red circle", "a blue heart"])[0]
    before = bare.logits(images, ids)
    grown = TextToImage.from_pretrained(root, vlm=bare).train()
    noise = latent_noise(0, 2, 16, 4)
    optimizer = torch.optim.SGD([p for p in grown.parameters() if p.requires_grad], 1.0)
    grown(noise, *bare.encode(["a red circle", "a blue heart"]), torch.rand(2), noise.flip(0)).mean().backward()
    optimizer.step()
    assert torch.equal(bare.logits(images, ids), before)


def test_the_loss_is_equation_one(model):
    latents, noise, t = latent_noise(1, 3, 16, 4), latent_noise(2, 3, 16, 4), torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        mixed = t[:, None, None] * latents + (1 - t)[:, None, None] * noise
        by_hand = (latents - noise - model.velocity(mixed, t, PROMPTS)).square().mean((1, 2))
        assert torch.allclose(model(latents, *model.vlm.encode(PROMPTS), t, noise), by_hand, atol=1e-5)


def test_denoising_errors_share_times_and_noise(model):
    images = batch(WORLD, 4, range(3))["images"]
    errors = model.denoising_error(images, PROMPTS, num_samples=3)
    assert errors.shape == (3, 3) and torch.equal(errors, model.denoising_error(images, PROMPTS, num_samples=3))
    assert torch.allclose(model.denoising_error(images[1:2], PROMPTS[2:], num_samples=3)[0, 0], errors[1, 2], atol=1e-5)
    twins = model.denoising_error(images, [PROMPTS[0], PROMPTS[0]], num_samples=2)
    assert torch.allclose(twins[:, 0], twins[:, 1], atol=1e-6)


def test_pictures_come_out(model):
    pictures = model.images(PROMPTS[:2], num_inference_steps=2, decoder_steps=2)
    assert pictures.shape == (2, 3, 32, 32) and 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal(pictures, model.images(PROMPTS[:2], num_inference_steps=2, decoder_steps=2))


@pytest.mark.parametrize("prompts, said", [
    ([""], "empty"), (["  \n "], "empty"), (["red " * 2500], "10000 characters"), (["a red elephant"], "elephant"),
    ([], "no prompt"), (["a <bos> circle"], "special"), (["un cercle rouge"], "un"),
])
def test_bad_prompts_get_one_sentence(model, prompts, said):
    with pytest.raises(UserError, match=said) as found: model.generate(prompts, num_inference_steps=1)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


def test_bad_numbers_are_refused(model):
    with pytest.raises(UserError, match="num_inference_steps"): model.generate(PROMPTS, num_inference_steps=0)
    with pytest.raises(TypeError): model.generate("a red circle")


def test_parts_of_other_models_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="nowhere"): TextToImage.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="SceneVLM"): TextToImage.from_pretrained(root / "vlm")
    stranger = MLPReducer(hidden_size=16, dim=4)
    with pytest.raises(UserError, match="reducer"): TextToImage.from_pretrained(root, reducer=stranger)
    config = json.loads((root / "generator/config.json").read_text())
    other = TextToImage(**{**{key: value for key, value in config.items() if key != "class"}, "vlm_fingerprint": "0" * 16})
    with pytest.raises(UserError, match="vlm"): other.attach(SceneVLM.from_pretrained(root / "vlm"))


def test_a_pool_computes_each_block_once_and_alike():
    calls = []
    def make(indices): calls.append(indices[0]); return torch.tensor(indices).float()[:, None, None]
    pool = LatentPool(make, size=30, block=10)
    assert pool[[29, 30, 61, 5]].flatten().tolist() == [29, 0, 1, 5] and sorted(calls) == [0, 20]
    with pytest.raises(UserError, match="multiple"): LatentPool(make, size=25, block=10)


def small_preset(**options):
    recipe = Recipe(4, 6, warmup_steps=1, log_every=2, checkpoint_every=2, ema_decay=0.9)
    return Preset("toy", {}, {
        "vlm": StagePreset(dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64), recipe, dict(evaluation=6)),
        "generator": StagePreset(dict(num_inference_steps=2), recipe, dict(pool=20, pool_block=10, evaluation=3, **options))})


@pytest.mark.parametrize("stage_class", [VLMStage, GeneratorStage])
def test_a_stage_stopped_and_resumed_ends_in_the_same_bits(root, tmp_path, stage_class):
    import shutil
    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("generator"))
    preset, name = small_preset(), stage_class.name
    recipe = preset.stage(name).recipe
    run(stage_class(preset, tmp_path / "root"), recipe, tmp_path / "root/whole", show=False)
    assert run(stage_class(preset, tmp_path / "root"), recipe, tmp_path / "root/parts", stop_after=3, show=False)["status"] == "stopped"
    record = run(stage_class(preset, tmp_path / "root"), recipe, tmp_path / "root/parts", resume=True, show=False)["record"]
    assert (tmp_path / "root/whole/model.safetensors").read_bytes() == (tmp_path / "root/parts/model.safetensors").read_bytes()
    assert record["rows"] and all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in record["rows"])


def test_a_finished_stage_loads(root, tmp_path):
    import shutil
    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("generator"))
    preset = small_preset()
    run(GeneratorStage(preset, tmp_path / "root"), preset.stage("generator").recipe, tmp_path / "root/generator", show=False)
    assert TextToImage.from_pretrained(tmp_path / "root").images(["a red star"]).shape == (1, 3, 32, 32)


def test_a_missing_judge_is_found_before_training(root, tmp_path):
    import shutil
    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("parser", "generator"))
    with pytest.raises(UserError, match="parser"): GeneratorStage(small_preset(), tmp_path / "root").build()


def test_some_training_prompts_are_empty_and_all_are_pure(root):
    stage = GeneratorStage(small_preset(prompt_dropout=0.5), root)
    stage.build()
    prompts = stage.prompts(list(range(200)))
    assert 60 < prompts.count("") < 140 and prompts == stage.prompts(list(range(200)))
    assert held_out_prompts(WORLD, 5, 3) == held_out_prompts(WORLD, 5, 3) and all(" " in prompt for prompt in held_out_prompts(WORLD, 5, 3))


def test_plain_wording_comes_first_whatever_the_batch(root):
    stage = GeneratorStage(small_preset(prompt_dropout=0.0, plain_steps=2, paraphrase=1.0), root) # batches of 6: the first 12 samples
    stage.build()
    whole = stage.prompts(list(range(24)))
    assert whole == sum((stage.prompts([index]) for index in range(24)), [])
    scenes = sample_scenes(stage.world, stage.seed, [index % 20 for index in range(24)])
    plain = captions(scenes, dataclasses.replace(stage.world, paraphrase=0.0), stage.seed, list(range(24)))
    assert whole[:12] == plain[:12] and sum(one != two for one, two in zip(whole[12:], plain[12:])) > 3


def test_sampling_takes_the_time_shift_of_training(root, model):
    shifted = TextToImage.from_pretrained(root, shift=3.0)
    assert torch.equal(shifted.generate(PROMPTS), model.generate(PROMPTS, shift=3.0)) and not torch.equal(shifted.generate(PROMPTS), model.generate(PROMPTS))


# ---- whoever paints -----------------------------------------------------------------------------------------------------------

PAINTERS = {"decoder": 8, "decoder-ldm": 25, "distill": 1, "decoder-feedforward": 1}


@pytest.fixture(scope="module")
def embedded(): return TextToImage.from_pretrained(checkpoints_dir("tiny"))


@pytest.fixture(scope="module")
def sampled(embedded): return embedded.generate(PROMPTS, num_inference_steps=12)


@pytest.mark.parametrize("name,steps", PAINTERS.items())
def test_every_decoder_of_the_same_latents_paints_them(embedded, sampled, name, steps):
    folder = checkpoints_dir("tiny") / name
    kind = LatentDiffusionDecoder if name == "decoder-ldm" else FeedForwardDecoder if name == "decoder-feedforward" else PixelDiffusionDecoder
    alone = kind.from_pretrained(folder / ("latent_decoder" if name == "decoder-ldm" else "pixel_decoder")).eval()
    paint_with(embedded, folder)
    said = {} if name == "decoder-feedforward" else dict(num_inference_steps=steps)
    assert torch.equal(embedded.images(PROMPTS, num_inference_steps=12), alone.decode(sampled, seed=0, **said))
    whole = embedded.space.decode(sampled, seed=4)
    parts = torch.cat([embedded.space.decode(sampled[:1], seed=4), embedded.space.decode(sampled[1:], seed=4, first=1)])
    assert torch.allclose(parts, whole, atol=1e-4)  # as `vugen generate` paints many


def test_decoders_agree_on_what_stands_where(embedded, sampled):
    painted = {name: paint_with(embedded, checkpoints_dir("tiny") / name).space.decode(sampled) for name in PAINTERS}
    for name, pictures in painted.items():
        own, others = ((pictures - each).square().mean() for each in (painted["decoder"], painted["decoder"].roll(1, 0)))
        assert own < others / 4 and (name == "decoder" or own > 0)


def test_a_decoder_of_other_latents_is_refused(embedded, sampled, tmp_path):
    before = paint_with(embedded, checkpoints_dir("tiny") / "distill").pixel_decoder
    for folder, said in ((checkpoints_dir("tiny") / "decoder-pca", "another reducer"), (tmp_path / "decoder-ldm", "vugen train decoder-ldm")):
        with pytest.raises(UserError, match=said): paint_with(embedded, folder)
    assert embedded.pixel_decoder is embedded.space.parts["pixel_decoder"] is before


@pytest.mark.parametrize("name,steps", PAINTERS.items())
def test_the_program_paints_with_the_named_decoder(name, steps, tmp_path):
    with pytest.raises(SystemExit) as left: program(["generate", *PROMPTS[:1], "--n", "2", "--steps", "3", "--decoder", name, "--out", str(tmp_path / "drawn"), "--root", str(checkpoints_dir("tiny"))])
    record = json.loads((tmp_path / "drawn/generate.json").read_text())["run"]
    assert left.value.code == 0 and record["decoder"] == name and record["decoder_steps"] == steps and (tmp_path / "drawn/00001.png").is_file()


def test_the_program_names_the_decoders_it_has(tmp_path, capsys):
    for name in ("decoder-pca", "decoder-larger", "../decoder"):
        with pytest.raises(SystemExit) as left: program(["generate", "a red circle", "--steps", "1", "--decoder", name, "--out", str(tmp_path / "none"), "--root", str(checkpoints_dir("tiny"))])
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.count("\n") == 1 and name in said and not (tmp_path / "none").exists()
        assert name == "decoder-pca" or "decoder-ldm" in said
