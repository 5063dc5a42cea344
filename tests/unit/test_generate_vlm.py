"""Questions, and a small vision–language model: its likelihoods, answers, files and refusals."""
import json

import pytest
import torch

from vugen.data.scenes import World, batch, captions, sample_scenes
from vugen.errors import UserError
from vugen.generate.vlm import QUESTION_KINDS, Projector, SceneVLM, question, world_words
from vugen.models.saving import fingerprint
from vugen.models.vit import VisionTransformer

WORLD = World()
SMALL = dict(vision_hidden_size=16, vision_grid=(4, 4), hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)


def make_vision(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(image_size=32, patch_size=8, hidden_size=16, num_layers=1, num_heads=2).eval()


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(1)
    return SceneVLM(world_words(WORLD), **SMALL).attach(make_vision()).eval()


@pytest.fixture(scope="module")
def pictures(): return batch(WORLD, 3, range(4))["images"]


def told_truth(scene, asked):
    "Answer a question from the scene, read independently of how it was made"
    things = [(item.color, item.name) for item in scene.items]
    words = asked.split()
    if words[0] == "how": return {1: "one", 2: "two"}[len(things)]
    if words[:2] == ["what", "color"]: return next(color for color, name in things if name == words[4])
    if words[:2] == ["what", "shape"]: return next(name for color, name in things if color == words[4])
    if words[:2] == ["is", "there"]: return "yes" if tuple(words[3:5]) in things else "no"
    first, second = tuple(words[2:4]), tuple(words[-3:-1])
    across = {"left": ("x", 1), "right": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[words[4]]
    pairs = [(a, b) for a in scene.items for b in scene.items if a is not b and (a.color, a.name) == first and (b.color, b.name) == second]
    return "yes" if any((getattr(b, across[0]) - getattr(a, across[0])) * across[1] > 0 for a, b in pairs) else "no"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_are_true_of_the_scene(kind):
    scenes = sample_scenes(WORLD, 5, list(range(300)))
    made = [(scene, question(scene, 5, index, kind, WORLD if index % 2 else None)) for index, scene in enumerate(scenes)]
    made = [(scene, found) for scene, found in made if found]
    assert len(made) > 100
    for scene, (asked, answer, named) in made:
        assert named == kind and answer == told_truth(scene, asked), (asked, answer, scene.items)


@pytest.mark.parametrize("kind", ["relation", "existence"])
def test_yes_and_no_are_balanced(kind):
    scenes = sample_scenes(World(counts={2: 1.0}), 6, list(range(600)))
    for world in (None, WORLD):
        answers = [found[1] for index, scene in enumerate(scenes) if (found := question(scene, 6, index, kind, world))]
        assert 0.44 < answers.count("yes") / len(answers) < 0.56


def test_questions_are_pure_and_speakable():
    tokenizer = SceneVLM(world_words(WORLD), **SMALL).tokenizer
    scenes = sample_scenes(WORLD, 7, list(range(200)))
    once = [question(scene, 7, index) for index, scene in enumerate(scenes)]
    assert once == [question(scene, 7, index) for index, scene in enumerate(scenes)]
    tokenizer.encode([f"{asked} {answer}" for asked, answer, _ in once])
    tokenizer.encode(captions(scenes, WORLD, 7, list(range(200))))
    with pytest.raises(UserError, match="kind"): question(scenes[0], 0, 0, "why")


def test_a_world_of_many_objects_fits_its_words():
    world = World(counts={3: 1.0}, fills=("solid", "striped"), attributes_per_object=2, emoji=("dog", "tree"))
    tokenizer = SceneVLM(world_words(world), **SMALL).tokenizer
    scenes = sample_scenes(world, 1, list(range(50)))
    tokenizer.encode(captions(scenes, world, 1, list(range(50))))
    tokenizer.encode([f"{found[0]} {found[1]}" for index, scene in enumerate(scenes) if (found := question(scene, 1, index))])


def test_the_projector_averages_neighbours():
    projector, tokens = Projector(8, 8, (4, 6), 2), torch.randn(2, 24, 8)
    corner = projector.mlp(tokens)[:, [0, 1, 6, 7]].mean(1)
    assert torch.allclose(projector(tokens)[:, 0], corner, atol=1e-6) and projector(tokens).shape == (2, 6, 8)
    with pytest.raises(ValueError): Projector(8, 8, (3, 4), 2)


def test_likelihoods_of_all_continuations_sum_to_one(vlm, pictures):
    "After a beginning, the next words (or the end) share probability one"
    ids, mask = vlm.encode(["a red"], seen=True)
    with torch.no_grad(): following = vlm(ids, mask, images=pictures[:1])[0, -1].softmax(-1)
    words = [word for word in vlm.tokenizer.vocabulary if not word.startswith("<") and word.isalpha()][:5]
    whole = vlm.caption_log_likelihood(pictures[:1], [f"a red {word}" for word in words])[0]
    parts = []
    for word in words:
        after, real = vlm.encode([f"a red {word}"], seen=True)
        with torch.no_grad(): end = vlm(after, real, images=pictures[:1])[0, -1].softmax(-1)[vlm.tokenizer.eos_id]
        parts.append(following[vlm.tokenizer.vocabulary[word]] * end)
    assert torch.allclose(following.sum(), torch.tensor(1.0)) and torch.allclose((whole - whole[0]).exp(), torch.stack(parts) / parts[0], rtol=1e-3)


def test_scores_do_not_depend_on_the_batch(vlm, pictures):
    captions_ = ["a red circle", "a blue square left of a pink star", "heart", "a black cross above a green triangle"]
    matrix = vlm.caption_log_likelihood(pictures, captions_)
    assert matrix.shape == (4, 4) and torch.allclose(matrix, vlm.caption_log_likelihood(pictures, captions_, batch_size=3), atol=1e-4)
    assert torch.allclose(matrix.diag(), vlm.caption_log_likelihood(pictures, captions_, paired=True), atol=1e-4)
    assert torch.allclose(matrix[2, 1], vlm.caption_log_likelihood(pictures[2:3], captions_[1:2])[0, 0], atol=1e-4)
    assert vlm.caption_log_likelihood(None, captions_).shape == (4,) and (matrix < 0).all()
    assert not torch.allclose(matrix[0], matrix[1], atol=1e-4)  # it looks


def test_text_does_not_see_what_follows(vlm, pictures):
    short, long = (vlm.tokenizer.encode([text], eos=False)[0] for text in ("a red circle", "a red circle above a heart"))
    assert torch.allclose(vlm.logits(pictures[:1], short), vlm.logits(pictures[:1], long)[:, :4], atol=1e-5)


def test_greedy_words_are_the_likeliest(vlm, pictures):
    said = vlm.complete(["a red"], pictures[:1], max_new_tokens=1)[0]
    ids, mask = vlm.encode(["a red"], seen=True)
    with torch.no_grad(): best = int(vlm(ids, mask, images=pictures[:1])[0, -1].argmax())
    assert said == vlm.tokenizer.decode([[best]])[0]


def test_answers_do_not_depend_on_neighbours(vlm, pictures):
    questions = ["how many objects are there ?", "what color is the star ?", "is there a red star ?", "what shape is the red thing ?"]
    together = vlm.answer(pictures, questions)
    assert together == [vlm.answer(pictures[i:i + 1], questions[i])[0] for i in range(4)]
    chances = vlm.yes_probability(pictures, questions)
    assert torch.allclose(chances[1:2], vlm.yes_probability(pictures[1:2], questions[1]), atol=1e-5)


def test_it_learns_to_answer_what_it_sees():
    "Four pictures, one question: the loss falls and the answers come out, so the gradient reaches the projector through the pictures"
    torch.manual_seed(0)
    colors = {"red": (1., 0, 0), "green": (0, .6, 0), "blue": (0, 0, 1.), "black": (0, 0, 0)}
    images = torch.tensor(list(colors.values()))[:, :, None, None].expand(4, 3, 32, 32).contiguous()
    model = SceneVLM([*colors, "what", "color", "?"], **SMALL).attach(make_vision())
    ids, mask = model.encode([f"what color ? {color}" for color in colors], seen=True, eos=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(80):
        logits = model(ids, mask, images=images)
        loss = torch.nn.functional.cross_entropy(logits[:, -3:-1].flatten(0, 1), ids[:, -2:].flatten())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert model.eval().answer(images, "what color ?") == list(colors)
    assert all(p.grad is None for p in model.vision.parameters())


def test_saved_and_loaded_with_its_encoder_beside_it(tmp_path):
    from vugen.encode.contrastive import ContrastiveModel
    torch.manual_seed(0)
    contrastive = ContrastiveModel(world_words(WORLD), patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8).eval()
    contrastive.save_pretrained(tmp_path / "contrastive")
    model = SceneVLM(world_words(WORLD), encoder_fingerprint=fingerprint(contrastive.vision), **SMALL).attach(contrastive.vision).eval()
    model.save_pretrained(tmp_path / "vlm")
    images = batch(WORLD, 0, range(2))["images"]
    loaded = SceneVLM.from_pretrained(tmp_path / "vlm")
    assert torch.equal(loaded.caption_log_likelihood(images, ["a red circle"]), model.caption_log_likelihood(images, ["a red circle"]))
    assert sorted(path.name for path in (tmp_path / "vlm").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not loaded.training and not any(p.requires_grad for p in loaded.vision.parameters())
    ContrastiveModel(world_words(WORLD), patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8).save_pretrained(tmp_path / "contrastive")
    with pytest.raises(UserError, match="fingerprint"): SceneVLM.from_pretrained(tmp_path / "vlm")


def test_files_that_cannot_be_read_are_named(tmp_path, vlm):
    with pytest.raises(UserError, match="nowhere"): SceneVLM.from_pretrained(tmp_path / "nowhere")
    vlm.save_pretrained(tmp_path / "vlm")
    with pytest.raises(UserError, match="contrastive"): SceneVLM.from_pretrained(tmp_path / "vlm")  # its encoder is not beside it
    whole = (tmp_path / "vlm/model.safetensors").read_bytes()
    (tmp_path / "vlm/model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors"): SceneVLM.from_pretrained(tmp_path / "vlm", vision=make_vision())
    config = json.loads((tmp_path / "vlm/config.json").read_text())
    (tmp_path / "vlm/config.json").write_text(json.dumps({**config, "class": "Other"}))
    with pytest.raises(UserError, match="Other"): SceneVLM.from_pretrained(tmp_path / "vlm", vision=make_vision())


def test_unknown_words_and_endless_text_are_refused(vlm, pictures):
    with pytest.raises(UserError, match="elephant"): vlm.caption_log_likelihood(pictures, ["a red elephant"])
    with pytest.raises(UserError, match="longer"): vlm.answer(pictures, "red " * 400)
    wrong = VisionTransformer(image_size=32, patch_size=4, hidden_size=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="grid"): SceneVLM(world_words(WORLD), **SMALL).attach(wrong)
    with pytest.raises(UserError, match="attach"): SceneVLM(world_words(WORLD), **SMALL).image_features(pictures)
