"""The LiT-style pair: shapes, frozen towers, saving, and the functions of its training stage."""
import pytest
import torch

from vugen.data.scenes import World, batch
from vugen.data.sprites import EMOJI
from vugen.encode.lit import LiTPair, Projection, region_features
from vugen.errors import UserError
from vugen.models.saving import fingerprint
from vugen.models.seams import Scorer
from vugen.train import lit as stage_module


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return LiTPair(projection_dim=16, image_size=64, regions=2).eval()


@pytest.fixture(scope="module")
def scenes(): return batch(World(image_size=64, emoji=("dog", "car", "rock")), 0, range(6))


def test_is_a_scorer_for_any_text_and_picture(pair, scenes):
    assert isinstance(pair, Scorer) and pair.name == "lit"
    scores = pair.score(scenes["images"], ["a dog", "the parliament was dissolved", "日本", "x" * 9000])
    assert scores.shape == (6, 4) and torch.isfinite(scores).all() and scores.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(pair.score(scenes["images"], scenes["captions"]).diagonal(), pair.score_pairs(scenes["images"], scenes["captions"]), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(pair, scenes):
    whole = pair.score(scenes["images"], scenes["captions"])
    torch.testing.assert_close(pair.score(scenes["images"][2:3], scenes["captions"][1:2]), whole[2:3, 1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair.score(scenes["images"], scenes["captions"], batch_size=4), whole, rtol=1e-4, atol=1e-5)


def test_only_projections_and_temperature_are_trained(pair, scenes):
    trained = {name for name, parameter in pair.named_parameters() if parameter.requires_grad}
    assert trained == {"log_scale"} | {f"{side}_projection.layers.1.{kind}" for side in ("image", "text") for kind in ("weight", "bias")}
    loss, metrics = pair.train()(pair.image_features(scenes["images"]), pair.text_features(scenes["captions"]))
    loss.backward()
    assert not pair.image_tower.training and not pair.text_tower.training and 0 <= metrics["accuracy"] <= 1
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in pair.parameters())
    pair.zero_grad(), pair.eval()


def test_regions_tell_left_from_right():
    left, right = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    left[..., :2], right[..., 2:] = 1, 1
    assert torch.equal(region_features(left), region_features(right)) and not torch.equal(region_features(left, 2), region_features(right, 2))
    assert region_features(left, 3).shape == (1, 30)


def test_saving_leaves_the_frozen_towers_out(pair, scenes, tmp_path):
    pair.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1e6
    again = LiTPair.from_pretrained(tmp_path)
    assert torch.equal(again.score(scenes["images"], scenes["captions"]), pair.score(scenes["images"], scenes["captions"]))


def test_bad_input(pair):
    with pytest.raises(UserError, match="multiple of 32"): LiTPair(image_size=100)
    with pytest.raises(UserError, match="empty text"): pair.encode_text([""])
    with pytest.raises(UserError, match=r"\[B, 3, H, W\]"): pair.encode_image(torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="At least two"): Projection(4, 2).fit_statistics(torch.zeros(1, 4))


def test_constant_channels_do_not_blow_up():
    features = torch.cat([torch.randn(50, 3), torch.full((50, 2), 7.0)], 1)
    assert torch.isfinite(Projection(5, 4).fit_statistics(features)(features + 1e-3)).all()


def test_held_out_names_never_appear_in_training():
    world, kept, unseen = stage_module.lit_worlds(dict(world=dict(image_size=64)))
    assert len(unseen) == 20 and len(kept) == len(EMOJI) - 20 and stage_module.lit_worlds({})[2] == unseen
    data = batch(world, 0, range(300))
    assert not {item.name for scene in data["scenes"] for item in scene.items} & set(unseen)
    with pytest.raises(UserError, match="cannot be held out"): stage_module.split_names(("dog", "cat"), 2)


@pytest.mark.parametrize("count", [7, 100])
def test_every_pass_shows_every_cached_picture_once(count):
    for epoch in (0, 3):
        rows = stage_module.cached_rows(range(epoch * count, (epoch + 1) * count), count, 5)
        assert sorted(rows.tolist()) == list(range(count))
    first, second = (stage_module.cached_rows(range(epoch * count, (epoch + 1) * count), count, 5) for epoch in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first[2:4], stage_module.cached_rows([2, 3], count, 5))


def test_foil_rows_of_a_perfect_and_a_reversed_scorer(monkeypatch):
    "Planted answers: right everywhere gives 1, reversed gives 0, indifferent gives 0 (a tie is no success)."
    def planted(world, kind, seed, indices):
        count = len(indices)
        return {"images_0": torch.zeros(count, 3, 8, 8), "images_1": torch.ones(count, 3, 8, 8), "captions_0": ["zero"] * count, "captions_1": ["one"] * count}
    monkeypatch.setattr(stage_module, "foil_batch", planted)
    class Planted:
        def __init__(self, right): self.right = right
        def encode_image(self, images): return torch.nn.functional.one_hot((images.mean((1, 2, 3)) > 0.5).long(), 2).float()
        def encode_text(self, captions): return self.right * torch.nn.functional.one_hot(torch.tensor([int(caption == "one") for caption in captions]), 2).float()
    for right, expected in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        rows = stage_module.foil_rows(Planted(right), World(image_size=64), 0, 5, ("swap-object",))
        assert [row["value"] for row in rows] == [expected] * 3 and [row["chance"] for row in rows] == [0.25, 0.25, 1 / 6]


def test_naming_rows_of_a_scorer_that_never_looks():
    "A scorer that always gives the same answer is right by chance, and the row says so."
    names, world = ("dog", "car", "rock", "apple"), World(image_size=64)
    class Constant:
        def score(self, images, captions): return torch.arange(len(captions)).float().expand(len(images), -1)
    row = stage_module.naming_rows(Constant(), world, names, 3, 80, "constant")[0]
    assert row["low"] < 0.25 < row["high"] and row["chance"] == 0.25 and stage_module.article("owl") == "an owl"


def test_names_are_asked_in_worlds_that_hold_out_shapes():
    "Compositions of things that single emoji cannot show are left out of that question, not refused."
    class Constant:
        def score(self, images, captions): return torch.arange(len(captions)).float().expand(len(images), -1)
    world = World(image_size=64, emoji=("dog", "car"), held_out=("red circle", "dog left of car"))
    assert stage_module.naming_rows(Constant(), world, ("dog", "car"), 3, 10, "constant")[0]["n"] == 10
    assert stage_module.shapes_for(world, "swap-attribute").held_out == ("red circle",)


def test_training_is_a_pure_function_of_its_seed():
    "Two builds give the same cache and the same weights."
    from vugen.train.presets import Preset, Recipe, StagePreset
    from vugen.train.loop import seed_everything
    options = dict(pictures=12, held_out_names=1, world=dict(image_size=64, emoji=["dog", "car", "rock"]))
    preset = Preset("test", {}, {"lit": StagePreset(dict(image_size=64, projection_dim=8), Recipe(steps=2, batch_size=4), options)})
    made = []
    for _ in range(2):
        seed_everything(3)
        stage = stage_module.LiTStage(preset, ".")
        made.append((fingerprint(stage.build()), stage.batch([0, 5, 17])))
    assert made[0][0] == made[1][0] and all(torch.equal(made[0][1][key], made[1][1][key]) for key in made[0][1])


def test_embedded_pair_is_what_its_record_says():
    "The checkpoint of the tiny preset names new pictures about as well as its run.json claims."
    import json
    from vugen.paths import checkpoints_dir
    folder = checkpoints_dir("tiny") / "lit"
    record = json.loads((folder / "run.json").read_text())
    world, names, _ = stage_module.lit_worlds(record["options"])
    claimed = record["rows"][0]
    found = stage_module.naming_rows(LiTPair.from_pretrained(folder), world, names, 77, 60, "again")[0]
    assert claimed["category"] == "emoji of training, new layouts" and claimed["chance"] == pytest.approx(1 / len(names))
    assert found["low"] <= claimed["high"] and found["high"] >= claimed["low"] and found["value"] > 0.8
