"""Adapters on miniatures saved and loaded in each family's real format: what the generator is given, and what the tower must leave alone."""
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vugen.data.scenes import World, batch
from vugen.encode.contrastive import ContrastiveModel
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.generate.adapters import ADAPTERS, LlavaAdapter, UnderstandingModel, VLMAdapter, load_adapter, load_tokenizer, save_miniature, window_order
from vugen.generate.mixture_of_transformers import ImageTower, MixtureOfTransformers, check_layer, prompt_cache, text_decoder
from vugen.generate.text_to_image import TextToImage, latent_noise
from vugen.generate.vlm import SceneVLM, world_words
from vugen.models.flow import euler, guided
from vugen.models.saving import fingerprint
from vugen.models.seams import Generator, VisionEncoder

PROMPTS = ["a red circle left of a blue square", "a green star", ""]
FAMILIES = [*ADAPTERS, "vlm"]
IMAGES = batch(World(), 0, range(3))["images"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "One folder a family, and our own model with its encoder"
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in ADAPTERS: save_miniature(family, folder / family)
    torch.manual_seed(0)
    words = world_words(World())
    contrastive = ContrastiveModel(words, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8).eval()
    contrastive.save_pretrained(folder / "contrastive")
    SceneVLM(words, 16, (4, 4), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48).attach(contrastive.vision).eval().save_pretrained(folder / "vlm")
    return folder


def load(root, family, **options): return load_adapter(root / family, **({"image_size": 32} if family == "qwen2_5_vl" else {}), **options)


@pytest.fixture(scope="module", params=FAMILIES)
def model(root, request): return load(root, request.param)


@pytest.fixture(scope="module", params=list(ADAPTERS))
def adapter(root, request): return load(root, request.param)


@pytest.fixture
def mixture(model):
    "With a tower that is no longer a copy"
    torch.manual_seed(1)
    made = MixtureOfTransformers(model.language_model, latent_dim=4, grid=model.vision.grid).eval()
    nn.init.normal_(made.latent_out.weight, std=0.1)
    with torch.no_grad():
        for value in made.tower.parameters(): value += 0.05 * torch.randn_like(value)
    return made


def state(mixture): return latent_noise(3, 3, mixture.num_tokens, 4), torch.tensor([0.1, 0.5, 0.9])


class BothTowers(nn.Module):
    "The text tower's module on the first tokens, the image tower's on the rest: a drop-in for one module of a transformers decoder"
    def __init__(self, text, image, words):
        super().__init__()
        self.text, self.image, self.words = text, image, words

    def forward(self, hidden): return torch.cat([self.text(hidden[:, :self.words]), self.image(hidden[:, self.words:])], 1)


def join(frozen, tower, words):
    "Replace every projection and norm of `frozen` by the pair of both towers"
    for name, part in list(frozen.named_children()):
        if isinstance(part, nn.Linear) or name.endswith("norm"): setattr(frozen, name, BothTowers(part, getattr(tower, name), words))
        else: join(part, getattr(tower, name), words)


def joint_forward(mixture, hidden, ids, mask):
    "Text and image tokens in ONE pass of transformers' own decoder: text causal, image to all, one rotary index for the image. Nothing is cached."
    joint, (number, words), count = copy.deepcopy(mixture.decoder), ids.shape, hidden.shape[1]
    join(joint.layers, mixture.tower.layers, words)
    joint.norm = BothTowers(joint.norm, mixture.tower.norm, words)
    allowed = torch.zeros(number, 1, words + count, words + count, dtype=torch.bool)
    allowed[:, :, :words, :words] = torch.ones(words, words, dtype=torch.bool).tril()
    allowed[:, :, words:, words:] = True
    allowed[:, :, words:, :words] = mask[:, None, None]
    positions = torch.cat([torch.arange(words).expand(number, -1), mask.sum(1, keepdim=True).expand(-1, count)], 1)
    scores = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    out = joint(inputs_embeds=torch.cat([joint.embed_tokens(ids), hidden], 1), attention_mask=scores, position_ids=positions, use_cache=False).last_hidden_state
    return out[:, :words], out[:, words:]


def uncached(mixture, latents, t, ids, mask):
    "Velocity without `PromptCache`, `ImageTower.forward` or any attention of ours; and the text states"
    text, image = joint_forward(mixture, mixture.latent_in(latents) + mixture.positions + mixture.time(t)[:, None], ids, mask)
    return mixture.latent_out(image), text


# what an adapter gives

def test_all_give_what_the_generator_asks_for(model):
    assert isinstance(model, UnderstandingModel) and isinstance(model.vision, VisionEncoder) and not model.training
    patches = model.vision(IMAGES)
    assert patches.grid == tuple(model.vision.grid) and patches.tokens.shape == (3, patches.grid[0] * patches.grid[1], model.vision.hidden_size)
    assert torch.isfinite(patches.tokens).all() and not patches.tokens.requires_grad
    assert text_decoder(model.language_model) is text_decoder(model.language_model)


def test_the_folder_is_what_transformers_itself_loads(root, adapter):
    theirs = AutoModelForImageTextToText.from_pretrained(root / adapter.family)
    assert type(theirs) is type(adapter.model) and fingerprint(theirs) == fingerprint(adapter.model)
    config = json.loads((root / adapter.family / "config.json").read_text())
    assert config["model_type"] == adapter.family and config["architectures"] == [type(theirs).__name__]


def test_tokens_stand_before_the_bridge(adapter):
    "The family's own bridge on our tokens gives the features that the model itself puts among its words"
    tokens, model = adapter.vision(IMAGES).tokens, adapter.model.model
    side = adapter.vision.grid[0]
    inputs = adapter.image_inputs(adapter.vision.preprocess(IMAGES), torch.zeros(3, 1))
    inputs.pop("mm_token_type_ids", None)
    theirs = model.get_image_features(**inputs).pooler_output
    theirs = torch.cat(list(theirs)).view(3, adapter.num_image_tokens, -1)
    if adapter.family == "qwen2_5_vl":
        cells = tokens.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3).flatten(1, 2)  # [B, cells, 2, 2, D], in rows of cells
        ours = model.visual.merger(cells.flatten(0, 3)).view(3, len(cells[0]), -1)
    else: ours = model.multi_modal_projector(tokens)
    assert theirs.shape == (3, adapter.num_image_tokens, 32) and torch.allclose(ours, theirs, atol=1e-5)


def test_a_patch_moves_the_token_at_its_place(model):
    rows = model.vision.grid[0]
    side, picture = 32 // rows, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    for row, column in ((0, 1), (1, 0), (rows - 1, 2), (2, rows - 1)):
        other = picture.clone()
        part = other[:, :, row * side:(row + 1) * side, column * side:(column + 1) * side]
        part.copy_(1 - part.round())
        moved = (model.vision(other).as_map() - model.vision(picture).as_map()).norm(dim=1)[0]
        assert divmod(int(moved.argmax()), rows) == (row, column)


@pytest.mark.parametrize("rows, merge, window", [(8, 2, 2), (12, 2, 4), (10, 2, 4), (6, 2, 4), (9, 3, 2)])
def test_window_order_is_that_of_transformers(rows, merge, window):
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index
    size = torch.tensor([[1, rows, rows]])
    cells, _ = get_vision_window_index(size, merge, window * merge * 4, 4)
    places = get_vision_position_ids(size, merge).view(-1, merge ** 2, 2)[cells].flatten(0, 1)
    assert torch.equal(window_order((rows, rows), merge, window), places[:, 0] * rows + places[:, 1])


def test_pixels_are_those_of_the_familys_own_processor(root):
    from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil
    pixels = (np.random.default_rng(0).random((32, 32, 3)) * 255).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    qwen, llava = load(root, "qwen2_5_vl"), load(root, "llava")
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=64, longest_edge=1024))
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, *qwen.vision.grid]]
    assert torch.allclose(qwen.patches(qwen.vision.preprocess(images)), theirs["pixel_values"], atol=1e-5)
    clip = CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    assert torch.allclose(llava.vision.preprocess(images), clip(Image.fromarray(pixels), return_tensors="pt")["pixel_values"], atol=1e-5)


def test_pictures_of_any_size_are_read(adapter):
    assert adapter.vision(torch.rand(1, 3, 50, 70)).grid == adapter.vision.grid
    if adapter.family == "qwen2_5_vl":
        with pytest.raises(UserError, match="cells of 8"): load_adapter(adapter.config._name_or_path, image_size=36).vision
        assert load_adapter(adapter.config._name_or_path, image_size=48).vision(IMAGES).grid == (12, 12)
        assert load_adapter(adapter.config._name_or_path).vision.image_size == 448
    elif adapter.family == "llava":
        with pytest.raises(UserError, match="32 pixels"): load_adapter(adapter.config._name_or_path, image_size=64).vision
    else:
        with pytest.raises(UserError, match="patches of 4"): load_adapter(adapter.config._name_or_path, image_size=30).vision


@pytest.mark.parametrize("size", [16, 64])
def test_perception_lm_shows_the_generator_other_sizes_and_understands_at_its_own(root, size):
    """Tokens as transformers interpolates positions; the logits of understanding do not change by a bit."""
    own, other = load(root, "perception_lm"), load_adapter(root / "perception_lm", image_size=size)
    assert other.vision.grid == (size // 4,) * 2 and other.num_image_tokens == own.num_image_tokens
    seen = other.tower(other.vision.preprocess(IMAGES), interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    assert torch.equal(other.vision(IMAGES).tokens, seen)
    ids, mask = own.encode(["a red circle"] * len(IMAGES))
    assert torch.equal(own.logits(IMAGES, ids, mask), other.logits(IMAGES, ids, mask))


def test_a_timm_encoder_is_asked_to_take_any_size(tmp_path):
    from vugen.generate.adapters import any_size
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_lang_large_patch14_448", "model_args": {"embed_dim": 1024}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perception_lm", "vision_config": vision, "text_config": {"model_type": "llama"}}))
    assert any_size(tmp_path).vision_config.model_args == {"embed_dim": 1024, "dynamic_img_size": True}


def test_a_stage_stands_on_the_model_that_its_preset_names(root):
    from dataclasses import replace

    from vugen.generate.adapters import stage_vlm
    from vugen.train.presets import load_preset
    paper = load_preset("paper-imagenet")
    part = replace(paper.stage("generator"), model={**paper.stage("generator").model, "vlm": str(root / "perception_lm"), "image_size": 16})
    found = stage_vlm(part, root)
    assert found.vision.grid == (4, 4) and {value.dtype for value in found.model.parameters()} == {torch.bfloat16}
    decoder = replace(paper.stage("decoder"), options={**paper.stage("decoder").options, "encoder": str(root / "perception_lm"), "encoder_size": 16}, recipe=replace(part.recipe, precision="fp32"))
    assert stage_vlm(decoder, root).vision(IMAGES).tokens.dtype == torch.float32
    with pytest.raises(UserError): stage_vlm(load_preset("tiny").stage("generator"), root / "nothing")


def test_a_generator_of_the_papers_preset_saves_and_loads(root, tmp_path):
    """The image tower grows on a published model shown smaller pictures; saved, it finds the same model again and draws the same."""
    import shutil

    from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
    from vugen.encode.reducers import MLPReducer
    from vugen.generate.text_to_image import TextToImage
    shutil.copytree(root / "perception_lm", tmp_path / "vlm")
    MLPReducer(24, 4).save_pretrained(tmp_path / "decoder/reducer"); PixelDiffusionDecoder(4, 32, 4, base_channels=8, num_layers=1).save_pretrained(tmp_path / "decoder/pixel_decoder")
    model = TextToImage(latent_dim=4, grid=(4, 4), vlm="../vlm", image_size=16).attach(load_adapter(tmp_path / "vlm", image_size=16), MLPReducer.from_pretrained(tmp_path / "decoder/reducer"))
    model.eval().save_pretrained(tmp_path / "generator")
    again = TextToImage.from_pretrained(tmp_path / "generator")
    assert again.encode_images(IMAGES).shape == (len(IMAGES), 16, 4) and torch.equal(again.encode_images(IMAGES), model.encode_images(IMAGES))
    assert torch.equal(again.generate(["a red circle"], num_inference_steps=2), model.generate(["a red circle"], num_inference_steps=2))


def test_llava_may_join_layers_and_keep_the_class_token(root, tmp_path):
    import shutil
    whole = load(root, "llava")
    shutil.copytree(root / "llava", tmp_path / "full")
    config = json.loads((tmp_path / "full/config.json").read_text())
    (tmp_path / "full/config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    full = load_adapter(tmp_path / "full")
    assert full.num_image_tokens == 17 and torch.equal(full.vision(IMAGES).tokens, whole.vision(IMAGES).tokens)
    assert full.logits(IMAGES, *full.encode(PROMPTS)).shape[:2] == full.encode(PROMPTS)[0].shape
    model = copy.deepcopy(whole.model)
    model.config.vision_feature_layer = [-2, -1]
    both = LlavaAdapter(model, whole.tokenizer, whole.preprocessing).vision(IMAGES).tokens
    assert both.shape == (3, 16, 48) and torch.equal(both[..., :24], whole.vision(IMAGES).tokens)


# prompts and understanding

def test_the_prompt_of_no_words_is_the_start_token(adapter):
    ids, mask = adapter.encode(PROMPTS)
    assert mask[2].tolist() == [True] + [False] * (len(mask[2]) - 1) and (ids[:, 0] == adapter.start_id).all()
    assert adapter.tokenizer.decode(adapter.encode([""])[0][0]) in ("<|begin_of_text|>", "<s>", "<|endoftext|>")
    assert adapter.tokenizer.decode(ids[1][mask[1]][1:]) == PROMPTS[1]


def test_the_chat_template_is_the_checkpoints_own(root, adapter):
    spoken = load(root, adapter.family, chat=True)
    (ids, mask), seen = spoken.encode(PROMPTS[:2]), spoken.encode(PROMPTS[:2], seen=True)[0]
    turn = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]}]
    assert ids[1][mask[1]].tolist() == load_tokenizer(root / adapter.family).apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert (seen == spoken.image_id).sum(1).tolist() == [spoken.num_image_tokens] * 2
    assert spoken.encode([""])[0].tolist() == [[spoken.start_id]]
    assert spoken.logits(IMAGES[:2], seen).shape[:2] == seen.shape


def test_an_older_folder_keeps_its_template_in_a_file_of_its_own(root, tmp_path):
    import shutil
    shutil.copytree(root / "llava", tmp_path / "old")
    template = (tmp_path / "old/chat_template.jinja").read_text()
    (tmp_path / "old/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"): load_adapter(tmp_path / "old", chat=True).encode(["a star"])
    (tmp_path / "old/chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert "ASSISTANT" in load_tokenizer(tmp_path / "old").decode(load_adapter(tmp_path / "old", chat=True).encode(["a star"])[0][0])


def test_understanding_is_that_of_transformers(adapter):
    "Our logits are the model's own forward on a prompt with image places, written as its processor writes it"
    ids, mask = adapter.encode(PROMPTS[:2], seen=True)
    inputs = adapter.image_inputs(adapter.vision.preprocess(IMAGES[:2]), ids)
    theirs = adapter.model(input_ids=ids, attention_mask=mask.long(), **inputs).logits
    plain, plain_mask = adapter.encode(PROMPTS[:2])
    ours = adapter.logits(IMAGES[:2], plain, plain_mask)
    added = ids.shape[1] - plain.shape[1]
    assert added == len(adapter.image_places) and torch.allclose(ours[plain_mask], theirs[:, added:][plain_mask], atol=1e-5)
    assert not torch.allclose(ours[0, 0], adapter.logits(IMAGES[1:2], plain[:1])[0, 0], atol=1e-3)  # the picture is seen
    assert torch.allclose(adapter.logits(None, plain[1:], plain_mask[1:])[0, :2], adapter.model(plain[1:, :2]).logits[0], atol=1e-5)


# the tower

def test_the_tower_begins_as_an_exact_copy(model):
    mixture = MixtureOfTransformers(model.language_model, 4, model.vision.grid)
    ours, theirs = mixture.tower.state_dict(), {**{f"layers.{k}": v for k, v in mixture.decoder.layers.state_dict().items()}, "norm.weight": mixture.decoder.norm.weight}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {p.data_ptr() for p in mixture.tower.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    noise, t = state(mixture)
    assert mixture(noise, t, mixture.prompt_cache(*model.encode(["a star"] * 3))).abs().max() == 0


def test_understanding_is_untouched_to_the_bit(root, model):
    ids, mask = model.encode(PROMPTS)
    with torch.no_grad(): seen, blind = model.logits(IMAGES, ids, mask), model.logits(None, ids, mask)
    generator = TextToImage(latent_dim=4, grid=model.vision.grid).attach(model).train()
    noise, t = state(generator.mixture)
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        generator(noise, ids, mask, t, noise.flip(0)).mean().backward()
        optimizer.step()
    with torch.no_grad(): assert torch.equal(model.logits(IMAGES, ids, mask), seen) and torch.equal(model.logits(None, ids, mask), blind)
    assert not torch.equal(generator.mixture.tower.layers[0].mlp.up_proj.weight, generator.mixture.decoder.layers[0].mlp.up_proj.weight)


def test_gradients_reach_the_tower_alone(model, mixture):
    noise, t = state(mixture)
    mixture.train()(noise, t, mixture.prompt_cache(*model.encode(PROMPTS))).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters()) and not mixture.decoder.training
    trained = {name: p for name, p in mixture.named_parameters() if p.requires_grad and not name.endswith("k_proj.bias")}
    assert trained and all(name.startswith(("tower.", "time.", "latent_")) for name in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_cached_and_joint_velocities_agree(model, mixture):
    ids, mask = model.encode(PROMPTS)
    noise, t = state(mixture)
    with torch.no_grad():
        cached = mixture(noise, t, mixture.prompt_cache(ids, mask))
        joint, _ = uncached(mixture, noise, t, ids, mask)
        assert cached.abs().max() > 0.1 and (cached - joint).abs().max() < 1e-5


def test_cached_and_joint_sampling_agree(model, mixture):
    generator = TextToImage(latent_dim=4, grid=model.vision.grid).attach(model)
    generator.mixture.load_state_dict(mixture.state_dict())
    told, silent = model.encode(PROMPTS[:2]), model.encode(["", ""])
    field = lambda x, t: guided(uncached(mixture, x, t, *told)[0], uncached(mixture, x, t, *silent)[0], 2.0)
    with torch.no_grad(): joint = euler(field, latent_noise(5, 2, mixture.num_tokens, 4), 4)
    assert isinstance(generator, Generator)
    sampled = generator.generate(PROMPTS[:2], guidance_scale=2.0, num_inference_steps=4, seed=5)
    assert (sampled - joint).abs().max() < 1e-5


def test_text_knows_neither_image_nor_time(model, mixture):
    ids, mask = model.encode(PROMPTS)
    (noise, t), cache = state(mixture), mixture.prompt_cache(ids, mask)
    kept = [part.clone() for part in (*cache.keys, *cache.values)]
    with torch.no_grad():
        _, text = uncached(mixture, noise, t, ids, mask)
        _, other = uncached(mixture, 9 * noise.flip(0), 1 - t, ids, mask)
        alone = mixture.decoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mixture(noise, t, cache), mixture(9 * noise, 1 - t, cache)
    assert torch.equal(text, other) and torch.allclose(text[mask], alone[mask], atol=1e-5)
    again = mixture.prompt_cache(ids, mask)
    assert all(torch.equal(one, two) and torch.equal(one, three) for one, two, three in zip(kept, (*cache.keys, *cache.values), (*again.keys, *again.values)))


def test_tokens_and_places_commute(model, mixture):
    (noise, t), cache = state(mixture), mixture.prompt_cache(*model.encode(PROMPTS))
    order = torch.randperm(mixture.num_tokens, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        straight = mixture(noise, t, cache)
        assert torch.allclose(mixture(noise[:, order], t, cache, places=order), straight[:, order], atol=1e-5)
        assert not torch.allclose(mixture(noise[:, order], t, cache), straight[:, order], atol=1e-3)


ROPE = dict(rope_theta=1e4)
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)
DECODERS = {
    "qwen3, whose queries and keys have norms": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "yarn, which stretches them": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(ROPE, rope_type="yarn", factor=8.0, original_max_position_embeddings=32))),
    "llama3, the scaling of PLM-1B": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(ROPE, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "heads wider than hidden size over heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16, attention_bias=True)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_agree_with_the_joint_pass(name):
    torch.manual_seed(0)
    language_model = DECODERS[name]().eval()
    with torch.no_grad():
        for key, value in language_model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight", "bias")): value += 0.5 * torch.randn_like(value)
    made = MixtureOfTransformers(language_model, 4, (3, 4)).eval()
    nn.init.normal_(made.latent_out.weight, std=0.1)
    ids, mask = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 3, 0, 0], [1, 0, 0, 0, 0]]), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    with torch.no_grad():
        for value in made.tower.parameters(): value += 0.05 * torch.randn_like(value)
        cached = made(*state(made), made.prompt_cache(ids, mask))
        assert (cached - uncached(made, *state(made), ids, mask)[0]).abs().max() < 1e-5 and cached.abs().max() > 0.1


def test_layers_that_would_be_computed_wrongly_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM
    small = dict(SIZES, num_hidden_layers=1)
    for strange in (Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8)), Olmo2ForCausalLM(Olmo2Config(**small))):
        with pytest.raises(UserError, match="Llama-style layer"): ImageTower(text_decoder(strange))
    layer = Qwen3ForCausalLM(Qwen3Config(**small, head_dim=8)).model.layers[0]
    assert check_layer(layer) is layer
    layer.self_attn.q_norm.weight = nn.Parameter(torch.ones(32))
    with pytest.raises(UserError, match="attention"): check_layer(layer)


def test_a_prompt_beyond_a_sliding_window_is_refused():
    from transformers import MistralConfig, MistralForCausalLM
    decoder = text_decoder(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval())
    ids = torch.arange(1, 8)[None]
    with pytest.raises(UserError, match="sliding window"): prompt_cache(decoder, ids, ids > 0)
    assert prompt_cache(decoder, ids[:, :3], ids[:, :3] > 0).keys[0].shape[2] == 3


def test_a_frozen_model_in_half_precision_carries_a_tower_in_full(root, adapter):
    half = load(root, adapter.family, dtype=torch.bfloat16)
    made = MixtureOfTransformers(half.language_model, 4, half.vision.grid)
    nn.init.normal_(made.latent_out.weight, std=0.1)
    assert {p.dtype for p in made.tower.parameters()} == {torch.float32} and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    velocity = made(*state(made), made.prompt_cache(*half.encode(PROMPTS)))
    velocity.square().mean().backward()
    assert velocity.dtype == torch.float32 and half.vision(IMAGES).tokens.dtype == torch.float32 and torch.isfinite(half.logits(IMAGES, *half.encode(PROMPTS))).all()


# the whole generator

def test_a_generator_is_saved_beside_any_model_and_loads_again(root, adapter, tmp_path):
    torch.manual_seed(2)
    reducer, made = MLPReducer(hidden_size=adapter.vision.hidden_size, dim=4).eval(), str(root / adapter.family)
    model = TextToImage(latent_dim=4, grid=adapter.vision.grid, vlm=made, vlm_fingerprint=fingerprint(adapter)).attach(adapter, reducer)
    nn.init.normal_(model.mixture.latent_out.weight, std=0.2)
    model.save_pretrained(tmp_path / "generator")
    options = dict(vlm=adapter) if adapter.family == "qwen2_5_vl" else {}  # its size of pictures is the caller's choice
    again = TextToImage.from_pretrained(tmp_path, reducer=reducer, pixel_decoder=nn.Identity(), **options)
    assert torch.equal(again.generate(PROMPTS[:2], num_inference_steps=2), model.generate(PROMPTS[:2], num_inference_steps=2))
    assert again.encode_images(IMAGES).shape == (3, model.mixture.num_tokens, 4) and model.denoising_error(IMAGES, PROMPTS[:2], num_samples=1).shape == (3, 2)
    other = load_adapter(save_miniature(adapter.family, tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="vlm"): TextToImage(latent_dim=4, grid=adapter.vision.grid, vlm_fingerprint=fingerprint(adapter)).attach(other)


# bad input

def one_sentence(error): return "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_unsupported_model_is_named(tmp_path, root):
    LlamaForCausalLM(LlamaConfig(**dict(SIZES, num_hidden_layers=1))).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="llama model, for which there is no adapter") as error: load_adapter(tmp_path / "llama")
    assert one_sentence(error)
    with pytest.raises(UserError, match="ContrastiveModel"): load_adapter(root / "contrastive")
    with pytest.raises(UserError, match="PerceptionLM.* is not a llava"): LlavaAdapter(load(root, "perception_lm").model, None, {})
    with pytest.raises(UserError, match="no miniature of gpt2"): save_miniature("gpt2", tmp_path)


@pytest.mark.parametrize("family", list(ADAPTERS))
def test_broken_folders_are_refused(root, tmp_path, family):
    import shutil
    def spoiled(name, spoil):
        shutil.copytree(root / family, tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(UserError) as error: load_adapter(tmp_path / name)
        assert one_sentence(error) and name in str(error.value)
        return str(error.value)
    assert "weights" in spoiled("empty", lambda folder: (folder / "model.safetensors").unlink())
    assert "weights" in spoiled("cut", lambda folder: (folder / "model.safetensors").write_bytes((root / family / "model.safetensors").read_bytes()[:1000]))
    assert "tokenizer" in spoiled("silent", lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")])
    assert "config.json" in spoiled("nameless", lambda folder: (folder / "config.json").unlink())
    assert "JSON" in spoiled("torn", lambda folder: (folder / "config.json").write_text("{"))


def test_weights_that_lack_a_tensor_are_refused(root, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(root / "llava", tmp_path / "part")
    weights = load_file(root / "llava/model.safetensors")
    weights.pop(next(name for name in weights if "k_proj" in name))
    save_file(weights, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights.*k_proj"): load_adapter(tmp_path / "part")


def test_odd_prompts_are_refused(adapter):
    image = adapter.tokenizer.convert_ids_to_tokens(adapter.image_id)
    with pytest.raises(UserError, match="image token"): adapter.encode([f"a {image} of a star"])
    with pytest.raises(TypeError): adapter.encode("a star")
    with pytest.raises(UserError, match="shape"): adapter.vision(torch.rand(3, 32, 32))


def test_a_model_stays_frozen(adapter):
    assert not adapter.train().training and not adapter.model.training and not any(p.requires_grad for p in adapter.parameters())
    assert isinstance(adapter, VLMAdapter) and len(list(adapter.parameters())) == len(list(adapter.model.parameters()))


def test_perception_lm_without_timm_says_what_to_install(root, tmp_path, monkeypatch):
    import transformers
    def missing(*arguments, **options): raise ImportError("TimmWrapperModel requires the timm library")
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", missing)
    with pytest.raises(UserError, match="pip install timm"): load_adapter(root / "perception_lm")


def test_perception_lm_with_its_own_encoder(tmp_path):
    "The Perception Encoder itself, from timm; elsewhere CLIP's transformer stands in for it"
    pytest.importorskip("timm", reason="timm and torchvision are not installed, so no Perception Encoder can be built", exc_type=ImportError)
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration
    save_miniature("perception_lm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = dict(embed_dim=32, depth=2, num_heads=2, img_size=[56, 56], global_pool="", use_post_transformer_norm=False, init_values=0.1, ref_feat_shape=[4, 4])
    config["vision_config"] = dict(model_type="timm_wrapper", architecture="vit_pe_lang_large_patch14_448", num_classes=0, label_names=[], do_pooling=False, global_pool="map", model_args=sizes)
    PerceptionLMForConditionalGeneration(PerceptionLMConfig(**config)).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    tokens, pixels = adapter.vision(IMAGES).tokens, adapter.vision.preprocess(IMAGES)
    assert adapter.vision.grid == (4, 4) and adapter.vision.patch_size == 14 and adapter.num_image_tokens == 4
    assert torch.equal(adapter.tower(pixels).last_hidden_state[:, 1:], tokens)  # the class token left out
    features = adapter.model.model.get_image_features(pixel_values=pixels[:, None]).pooler_output
    assert torch.allclose(adapter.model.model.multi_modal_projector(tokens), features, atol=1e-5)
    assert adapter.logits(IMAGES, *adapter.encode(PROMPTS)).shape[2] == 352
