"Activations by name on every model of the bench: attention against transformers' own eager maps, gradients against finite differences, patches against models changed by hand."
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from vugen.decode.autoencoder import load_decoder
from vugen.encode.encoders import EfficientNetLite0, FrozenEncoder
from vugen.encode.text_towers import MiniLM
from vugen.errors import UserError
from vugen.experiment.arms import ARMS
from vugen.models.seams import Patches
from vugen.paths import checkpoints_dir
from vugen.understand.capture import ActivationCache, Selection, attention_weights, glob_expression, map_tensors, nearest_names, run_with_cache, run_with_patch
from vugen.understand.scorers import Parts

PARTS = Parts()
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def hooks(model): return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def tower(family, seed=0):
    "A vision tower of transformers with random weights, and its inputs"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "clip": model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8))
        elif family == "siglip": model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=32, patch_size=8))
        elif family == "dinov2": model = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8))
        elif family == "vit": model = transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8))
        elif family == "ijepa": model = transformers.IJepaModel(transformers.IJepaConfig(**SIZES, image_size=32, patch_size=8))
    return model.eval()


FAMILIES = ("clip", "siglip", "dinov2", "vit", "ijepa")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ("sdpa", "eager"))
def test_attention_is_what_transformers_tells_of_itself(family, how):
    model = tower(family)
    model.set_attn_implementation(how)
    output, cache = run_with_cache(model, pixel_values=IMAGES, names=(), attention=True)
    with torch.no_grad(): plain = model(pixel_values=IMAGES)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state) and hooks(model) == 0
    model.set_attn_implementation("eager")
    with torch.no_grad(): told = model(pixel_values=IMAGES, output_attentions=True).attentions
    layers = [name for name in cache if "head" not in name]
    assert len(told) == len(layers) == 2
    for name, own in zip(layers, told): assert torch.allclose(cache[name], own, atol=1e-6) and cache[name].shape == own.shape


def test_the_pooling_head_of_siglip_is_read_too():
    model = tower("siglip")
    _, cache = run_with_cache(model, pixel_values=IMAGES, names=(), attention="**head**")
    (name,), head = list(cache), model.head if hasattr(model, "head") else model.vision_model.head
    with torch.no_grad():
        hidden = model(pixel_values=IMAGES).last_hidden_state
        _, own = head.attention(head.probe.repeat(2, 1, 1), hidden, hidden, average_attn_weights=False)
    assert torch.allclose(cache[name], own, atol=1e-6) and name.endswith("attention.pattern")
    _, cache = run_with_cache(model, pixel_values=IMAGES, names=(), attention="**head**", gradient_of=lambda output: output.pooler_output[:, 0].sum())
    assert cache.gradients[name].shape == own.shape and cache.gradients[name].abs().sum() > 0


@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_grouped_causal_attention_of_language_models(family):
    sizes = dict(SIZES, num_key_value_heads=2, vocab_size=50, max_position_embeddings=32, head_dim=8)
    kind = {"llama": (transformers.LlamaConfig, transformers.LlamaModel), "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model)}[family]
    model = kind[1](kind[0](**sizes)).eval()
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    _, cache = run_with_cache(model, input_ids=ids, attention_mask=mask, names=(), attention="layers.*.self_attn")
    model.set_attn_implementation("eager")
    with torch.no_grad(): told = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    for name, own in zip(cache, told, strict=True): assert torch.allclose(cache[name], own, atol=1e-6)


def parts_of_the_bench():
    "(what, model, inputs, method, a module that must be in the cache, layers of attention)"
    root, contrastive, generator = checkpoints_dir(), PARTS.contrastive, PARTS.generator
    ids, mask = contrastive.tokenize(["a red circle", "a blue square left of a red circle"])
    latents = generator.encode_images(IMAGES)
    t = torch.tensor([.3, .6])
    yield "contrastive images", contrastive, (IMAGES,), "encode_image", "vision.blocks.3", 4
    yield "contrastive captions", contrastive, (["a red circle"],), "encode_text", "text.blocks.1.mlp", 2
    yield "text tower", contrastive.text, (ids, mask), None, "blocks.0", 2
    yield "sentence encoder", MiniLM(), (["a red circle", "two"],), "encode", "model.encoder.layer.0", 6
    yield "EfficientNet-Lite0", EfficientNetLite0(), (IMAGES,), None, None, 0
    yield "LiT pair", PARTS.lit, (IMAGES, ["a red circle"]), "score", "image_projection", 6
    yield "VLM", PARTS.vlm, (IMAGES, ["a red circle"]), "caption_log_likelihood", None, None
    yield "generator", generator, (latents, t, ["a red circle", "a blue square"]), "velocity", "mixture.tower.layers.0", None
    for folder in ("decoder/pixel_decoder", "decoder-feedforward/pixel_decoder", "decoder-ldm/latent_decoder", "distill/pixel_decoder"):
        if (root / folder).is_dir(): yield folder, load_decoder(root / folder), (latents, 2), "decode", None, None


@pytest.mark.parametrize("what,model,inputs,method,module,layers", [pytest.param(*row, id=row[0]) for row in parts_of_the_bench()])
def test_every_model_of_the_bench_is_open_to_view(what, model, inputs, method, module, layers):
    with torch.no_grad(): plain = (model if method is None else getattr(model, method))(*inputs)
    output, cache = run_with_cache(model, *inputs, method=method, attention=layers != 0)
    if layers == 0: _, cache = run_with_cache(model, *inputs, method=method)
    for one, other in zip(tensors(plain), tensors(output), strict=True): assert torch.equal(one, other)
    assert len(cache) and hooks(model) == 0 and (module is None or module in cache)
    patterns = [name for name in cache if name.endswith(".pattern")]
    assert len(patterns) == layers if layers is not None else patterns or "feedforward" in what
    names = {name for name, _ in model.named_modules()}
    for name in patterns:
        assert name.removesuffix(".pattern") in names  # the owner is a module that there is
        assert torch.allclose(cache[name].sum(-1), torch.ones(()), atol=1e-5) and cache[name].ndim == 4


def tensors(output):
    if isinstance(output, torch.Tensor): return [output]
    if dataclasses.is_dataclass(output): output = list(vars(output).values())
    return [part for part in output if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("name", ("contrastive", "captioner", "vugen"))
def test_the_arms_of_the_experiment_are_open_to_view(name):
    kind, settings, _ = ARMS[name]
    arm = kind(words=["a", "red", "circle"], sizes={}, **settings).eval()
    rows = torch.zeros(2, 1, dtype=torch.long)
    images = torch.rand(2, 3, arm.sizes.image_size, arm.sizes.image_size)
    with torch.no_grad(): plain = arm.score_pairs(images, ["a red circle"], rows, arm.scores[-1])
    output, cache = run_with_cache(arm, images, ["a red circle"], rows, arm.scores[-1], method="score_pairs", attention=True)
    owners = [key.removesuffix(".pattern") for key in cache if key.endswith(".pattern")]
    assert torch.equal(plain, output) and owners and all(owner in dict(arm.named_modules()) for owner in owners)
    if name == "vugen": assert any(owner.startswith("tower.") for owner in owners)  # layers that are run by a function, not by a module


def test_attention_of_the_generator_is_the_softmax_of_its_queries_and_keys():
    from vugen.generate.mixture_of_transformers import joint_mask, normed, project_heads
    generator = PARTS.generator
    latents, t = generator.encode_images(IMAGES), torch.tensor([.3, .6])
    cache = generator.prompt_cache(["a red circle", "a blue square left of a red circle"])
    _, seen = run_with_cache(generator, latents, t, cache, method="velocity", names=["mixture.tower.layers.*"], attention="mixture.tower.**")
    tower, (first, second) = generator.mixture.tower, list(seen.select("mixture.tower.layers.*"))[:2]
    with torch.no_grad():
        query, key, _ = project_heads(tower.layers[1].self_attn, normed(tower.layers[1].input_layernorm, seen[first]))
        keys = torch.cat([cache.keys[1], key], 2).repeat_interleave(query.shape[1] // key.shape[1], 1)
        own = (query @ keys.mT * tower.layers[1].self_attn.scaling + joint_mask(cache, 64)).softmax(-1)
    assert torch.allclose(seen["mixture.tower.layers.1.self_attn.pattern"], own, atol=1e-6) and second == "mixture.tower.layers.1"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x): return self.second(torch.tanh(self.first(x)))


def test_gradients_are_those_of_finite_differences():
    model, x = Small().double(), torch.randn(3, 4, dtype=torch.float64)
    for parameter in model.parameters(): parameter.requires_grad_(False)
    loss = lambda output: output.pow(2).sum()
    _, cache = run_with_cache(model, x, gradient_of=loss)
    numbers = torch.zeros_like(cache["first"])
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(6)):
        step = torch.zeros_like(numbers); step[tuple(place)] = 1e-5
        up, down = (loss(run_with_patch(model, x, patches={"first": lambda activation: activation + sign * step})) for sign in (1, -1))
        numbers[tuple(place)] = (up - down) / 2e-5
    assert torch.allclose(cache.gradients["first"], numbers, atol=1e-7)
    own = x.clone().requires_grad_()
    loss(model(own)).backward()
    assert torch.equal(cache.gradients["input.0"], own.grad) and not any(parameter.grad is not None for parameter in model.parameters()) and not x.requires_grad


def test_gradients_reach_attention_also_through_the_fused_kernel():
    model = tower("clip")
    score = lambda output: output.pooler_output[:, 0].sum()
    found = []
    for how in ("sdpa", "eager"):
        model.set_attn_implementation(how)
        found.append(run_with_cache(model, pixel_values=IMAGES, names=(), attention=True, gradient_of=score)[1].gradients)
    assert len(found[0]) == 3 and all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0]) and found[0]["input.pixel_values"].abs().sum() > 0


def test_a_patch_is_the_model_changed_by_hand():
    vision = PARTS.contrastive.vision
    _, clean = run_with_cache(vision, IMAGES, names="blocks.*")
    with torch.no_grad():
        hidden = torch.zeros_like(clean["blocks.1"])
        for block in vision.blocks[2:]: hidden = block(hidden)
        own = vision.norm(hidden)
    assert torch.equal(run_with_patch(vision, IMAGES, patches={"blocks.1": torch.zeros_like}).tokens, own)
    same = run_with_patch(vision, IMAGES.flip(0), patches={"blocks.3": clean["blocks.3"]})
    assert torch.equal(same.tokens, vision(IMAGES).tokens.detach())


def test_patched_attention_mixes_as_told():
    vision, uniform = PARTS.contrastive.vision, lambda weights: torch.full_like(weights, 1 / 64)
    output, cache = run_with_cache(vision, IMAGES, names="blocks.0.*", attention="blocks.0.*", patches={"blocks.0.attention.pattern": uniform})
    attention = vision.blocks[0].attention
    with torch.no_grad(): value = attention.key_value(cache["blocks.0.attention_norm"]).chunk(2, -1)[1].mean(1, keepdim=True).expand(-1, 64, -1)
    assert torch.allclose(cache["blocks.0.attention"], attention.out(value), atol=1e-5) and (cache["blocks.0.attention.pattern"] == 1 / 64).all()
    own = run_with_patch(vision, IMAGES, patches={"blocks.*.attention.pattern": lambda weights: weights})
    assert torch.allclose(own.tokens, vision(IMAGES).tokens, atol=1e-5) and not torch.allclose(output.tokens, own.tokens, atol=1e-2)


def test_fields_of_a_dataclass_are_kept_and_patched():
    model = PARTS.contrastive
    vectors, cache = run_with_cache(model, IMAGES, method="encode_image", names="vision", patches={"vision.pooled": torch.ones_like})
    assert list(cache) == ["vision.tokens", "vision.pooled"] and (cache["vision.pooled"] == 1).all()
    assert torch.allclose(vectors[0], functional.normalize(model.image_projection(torch.ones(128)), dim=-1))
    output = map_tensors("x", Patches(torch.zeros(1, 4, 2), (2, 2), torch.zeros(1, 2)), lambda name, tensor: tensor + 1)
    assert output.grid == (2, 2) and output.tokens.sum() == 8
    made = map_tensors("x", transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(2)), lambda name, tensor: tensor + 1)
    assert type(made).__name__ == "BaseModelOutput" and made.last_hidden_state.sum() == 2 and made[0].sum() == 2


class Breaks(nn.Module):
    def forward(self, x): raise RuntimeError("broken")


def test_hooks_go_away_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), Breaks())
    with pytest.raises(RuntimeError, match="broken"): run_with_cache(model, torch.zeros(1, 4), attention=True)
    with pytest.raises(UserError, match="shape"): run_with_patch(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4), patches={"0": torch.zeros(3)})
    assert hooks(model) == 0 and torch.softmax(torch.zeros(1, 1, 1, 2), -1).sum() == 1


def test_what_is_kept_does_not_change_later():
    class InPlace(nn.Module):
        def __init__(self): super().__init__(); self.one = nn.Linear(2, 2)
        def forward(self, x): return self.one(x).add_(100)
    output, cache = run_with_cache(InPlace(), torch.zeros(1, 2))
    assert (output - cache["one"] == 100).all()


def test_all_runs_of_a_module_and_the_device():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.one = nn.Linear(2, 2, bias=False)
        def forward(self, x): return self.one(self.one(x))
    model, x = Twice(), torch.randn(3, 2)
    output, cache = run_with_cache(model, x, device="cpu")
    assert len(cache.calls("one")) == 2 and torch.equal(cache["one"], output) and torch.equal(cache.calls("one")[0], x @ model.one.weight.T) and cache.nbytes == 48
    assert not cache["one"].requires_grad and "one" in cache and cache.get("two") is None


@pytest.mark.parametrize("wanted,said", [
    (dict(names="vision.block.*"), "vision.blocks"), (dict(names=["vision.blocks.*", "txt.**"]), "'txt.**'"), (dict(names="vision.cls"), "vision"), (dict(max_bytes=10_000), "max_bytes"), (dict(names=[3]), "globs"),
    (dict(names=(), attention="vision.norm"), "no attention"), (dict(names="text.blocks.0"), "in what ran"), (dict(patches={"vision.blocks.9": torch.zeros_like}), "vision.blocks"),
    (dict(patches={"vision.blocks.0.attention.pattern": lambda weights: weights[:1]}), "shape"), (dict(gradient_of=lambda output: output), "one number"), (dict(patches={"vision.norm": 3}), "int")])
def test_bad_wishes_are_one_sentence(wanted, said):
    model = PARTS.contrastive
    with pytest.raises(UserError) as caught: run_with_cache(model, IMAGES, method="encode_image", **wanted)
    assert said in str(caught.value) and "\n" not in str(caught.value) and hooks(model) == 0


def test_other_mistakes_are_one_sentence_too():
    with pytest.raises(UserError, match="encode_image"): run_with_cache(PARTS.contrastive, IMAGES, method="encode_imges")
    with pytest.raises(UserError, match="no patch"): run_with_patch(PARTS.contrastive, IMAGES, patches={})
    with pytest.raises(UserError, match="no_grad"): run_with_cache(PARTS.contrastive, IMAGES, ["a red circle"], method="score", names=(), gradient_of=lambda scores: scores.sum())
    with pytest.raises(UserError, match="holds no 'a'"): ActivationCache({"b": [torch.zeros(1)]})["a"]
    with pytest.raises(UserError, match="no activation fits"): ActivationCache({"b": [torch.zeros(1)]}).select("c")
    with pytest.raises(UserError, match="MultiheadAttention"): run_with_patch(tower("siglip"), pixel_values=IMAGES, patches={"**attention.pattern": lambda weights: weights})


def test_globs():
    fits = lambda pattern, name: glob_expression(pattern).fullmatch(name) is not None
    assert fits("**", "a.b") and fits("**.mlp", "mlp") and fits("**.mlp", "a.b.mlp") and not fits("*.mlp", "a.b.mlp") and fits("a.?", "a.1") and not fits("a.?", "a.11") and fits("a.[12]", "a.2") and not fits("a.b", "axb")
    assert Selection(lambda name: "mlp" in name)("a.mlp") and not Selection(()) and Selection("a.*").first("a.b") == "a.*"
    assert nearest_names("zzzz", ["a", "b"]) == "a, b" and nearest_names("x", []) == "none at all"


def test_weights_against_the_kernel_with_every_option():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    added = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    for options in (dict(), dict(is_causal=True), dict(scale=.3), dict(attn_mask=added), dict(attn_mask=added > 0)):
        own = attention_weights(query, key, options.get("attn_mask"), options.get("is_causal", False), options.get("scale"), enable_gqa=True) @ value.repeat_interleave(2, 1)
        assert torch.allclose(own, functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options), atol=1e-12)


def test_frozen_encoders_of_transformers_give_their_names(tmp_path):
    tower("dinov2").save_pretrained(tmp_path)
    encoder = FrozenEncoder.from_pretrained(tmp_path)
    patches, cache = run_with_cache(encoder, IMAGES, names="model.**.layernorm", attention="**", gradient_of=lambda output: output.pooled.sum())
    assert patches.tokens.shape == (2, 16, 32) and torch.allclose(cache["model.layernorm"][:, 1:], patches.tokens) and cache.gradients["input.0"].shape == IMAGES.shape
