"Readouts of the experiment tell an encoder that binds from a bag of words, and training tells captions from noise."
from dataclasses import replace

import pytest
import torch
from torch import nn

from vugen.data.scenes import CONVERSE, World, batch
from vugen.experiment.arms import PairArm
from vugen.experiment.items import KINDS, item_pictures, make_item, make_items, outcomes
from vugen.experiment.plans import PRESETS, training_batch
from vugen.experiment.readouts import READOUT_SEED, claims, fit_readouts, questions, readout_scores
from vugen.models.seams import Patches
from vugen.models.text import WordTokenizer, scene_words

WORLD = World(**PRESETS["tiny"]["world"])
PICTURES, PER_KIND = 600, 16
AXES = {"left of": "sideways", "right of": "sideways", "above": "stacked", "below": "stacked"}


def key_of(image): return image.numpy().tobytes()


def facts(scene): # of each thing: (name, colour, size, how it stands to the other)
    link = scene.relations[0] if scene.relations else None
    return [(item.name, item.color, item.size, None if link is None else link.name if link.subject == place else CONVERSE[link.name]) for place, item in enumerate(scene.items)]


class Planted(nn.Module):
    "Looks up the scene behind a picture; one token a thing, which says what it is and how it looks and stands"
    def __init__(self, pictures):
        super().__init__()
        self.scenes, self.device = pictures, nn.Parameter(torch.zeros(1))
        self.words = [*WORLD.colors, "small", "large", *CONVERSE]

    def token(self, name, *looks):
        found = torch.zeros(len(WORLD.shapes), 1 + len(self.words))
        found[WORLD.shapes.index(name), [0, *(1 + self.words.index(word) for word in looks if word)]] = 1.0
        return found.flatten()

    def tokens(self, scene): return torch.stack([self.token(*each) for each in facts(scene)])

    def patches(self, images):
        tokens = torch.stack([self.tokens(self.scenes[key_of(image)]) for image in images])
        return Patches(tokens, (1, tokens.shape[1]), tokens.mean(1))


class Bag(Planted):
    "Which shapes, colours, sizes and which axis occur, in every token; not of what"
    def tokens(self, scene):
        occur = {word for name, color, size, relation in facts(scene) for word in (name, color, size, AXES.get(relation))}
        token = torch.tensor([float(word in occur) for word in (*WORLD.shapes, *WORLD.colors, "small", "large", "sideways", "stacked")])
        return token.repeat(2, 1)


@pytest.fixture(scope="module")
def items(): return make_items(WORLD, "seen", PER_KIND, 11)


@pytest.fixture(scope="module")
def looked_up():
    "Picture's bytes → scene, of what the readouts are fitted on and of the items"
    total = PICTURES + PICTURES // 4
    data = batch(replace(WORLD, counts={2: 1.0}, counted=0.0), READOUT_SEED, range(total))
    found = dict(zip(map(key_of, data["images"]), data["scenes"]))
    made = [make_item(WORLD, family, kind, 11, index) for family, kind in KINDS for index in range(PER_KIND)]
    found.update({key_of(picture): scene for item, pictures in zip(made, item_pictures(made, WORLD.image_size)) for scene, picture in zip(item.scenes, pictures)})
    return found


@pytest.fixture(scope="module")
def planted(looked_up):
    encoder = Planted(looked_up)
    return encoder, fit_readouts(encoder, WORLD, PICTURES)


def won(encoder, items, readouts=None): # {(readout, kind): {outcome: share}}
    readouts = readouts or fit_readouts(encoder, WORLD, PICTURES)
    assert set(readouts) == {"linear", "attention"}
    found = {}
    for name, scores in readout_scores(encoder, readouts, WORLD, items).items():
        assert scores.shape == (len(items["captions"]), 4, 2) and (scores <= 0).all()
        said = outcomes(scores)
        for kind in dict.fromkeys(items["kind"]):
            rows = torch.tensor([each == kind for each in items["kind"]])
            found[name, kind] = {key: value[rows].float().mean().item() for key, value in said.items()}
    return found


def test_an_encoder_that_binds_is_read_right(planted, items):
    found = won(planted[0], items, planted[1])
    for (name, kind), shares in found.items():
        for key in ("text", "image", "group", "match", "across"): assert shares[key] >= 0.95, (name, kind, key, shares)


def test_a_bag_of_words_knows_atoms_and_no_binding(looked_up, items):
    found = won(Bag(looked_up), items)
    for name in ("linear", "attention"):
        for kind in ("object", "color", "relation"): assert found[name, kind]["text"] >= 0.9, (name, kind, found[name, kind])
        assert found[name, "size"]["text"] >= 0.4  # "large and small" says nothing of which
        for kind in ("swap color", "swap object", "reverse relation"):
            assert found[name, kind]["text"] <= 0.25 and found[name, kind]["group"] <= 0.2, (name, kind, found[name, kind])


def test_an_encoder_that_sees_nothing_is_read_as_nothing(items):
    class Blind(Planted):
        def patches(self, images): return Patches(torch.ones(len(images), 2, 4), (1, 2), torch.ones(len(images), 4))
    for (name, kind), shares in won(Blind({}), items).items(): assert shares["text"] == 0 and shares["group"] == 0, (name, kind)  # equal pictures, equal scores


def test_captions_dealt_to_other_items_are_read_at_chance(planted, items):
    dealt = {**items, "captions": items["captions"][7:] + items["captions"][:7]}
    found = outcomes(readout_scores(*planted, WORLD, dealt)["linear"])
    assert found["text"].float().mean() < 0.25 + 3 * (0.25 * 0.75 / len(dealt["captions"])) ** 0.5


def test_claims_are_answers_of_the_scene():
    "Every claim of a scene's own caption is the answer that the questions' labels hold for it."
    data = batch(replace(WORLD, counts={2: 1.0}), 3, range(60))
    tasks = questions(WORLD, data["scenes"])
    asked = 0
    for row, (scene, caption) in enumerate(zip(data["scenes"], data["captions"])):
        if len({item.name for item in scene.items}) < 2: continue
        for task, answer in claims(WORLD, caption):
            assert tasks[task].labels[row] == answer, (caption, tasks[task].name)
            asked += 1
    assert asked > 100


# A real training, with and without the captions of its pictures

SIZES = dict(image_size=24, patch_size=6, hidden_size=48, num_layers=2, num_heads=4, text_layers=1, language_layers=1, head_layers=1, projection_dim=32)


def trained(deal, steps=110, size=64):
    torch.manual_seed(0)
    tokenizer, arm = WordTokenizer(scene_words(WORLD)), PairArm(scene_words(WORLD), SIZES)
    optimizer, generator = torch.optim.AdamW(arm.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for step in range(steps):
        data = training_batch(WORLD, tokenizer, 0, list(range(step * size, (step + 1) * size)), size)
        if deal:
            order = torch.randperm(size, generator=generator)
            data.update({key: data[key][order] for key in ("ids", "mask", "groups")})
        loss = arm(**data, generator=generator)[0]
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return arm.eval()


def test_captions_dealt_to_other_pictures_teach_nothing():
    items = make_items(WORLD, "seen", 40, 13)
    atoms = torch.tensor([family == "atom" for family in items["family"]])
    found = {deal: outcomes(trained(deal).score_items(items["images"], items["captions"]))["text"][atoms].float().mean().item() for deal in (False, True)}
    error = (0.25 * 0.75 / int(atoms.sum())) ** 0.5
    assert found[False] > 0.25 + 6 * error and found[True] < 0.25 + 3 * error, found
