"Arms of the experiment: masks, gradients, scores, costs and statistics against rules written out by hand."
import math

import numpy as np
import pytest
import torch

from vugen.data.scenes import World
from vugen.experiment.arms import ARMS, PRETRAINING, JepaArm, draw_blocks, make_arm, needs_vae, normality, places_of, suffix_mask
from vugen.experiment.items import make_items
from vugen.experiment.parts import PrefixLM, Sizes, prefix_mask
from vugen.experiment.plans import PRESETS, load_plan_vae, training_batch, training_flops
from vugen.models.text import WordTokenizer, scene_words

WORLD = World(**PRESETS["smoke"]["world"])
WORDS = scene_words(WORLD)
SIZES = dict(image_size=24, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, text_layers=1, language_layers=2, head_layers=1, projection_dim=8, latent_dim=4)
EVERY = [*ARMS, *PRETRAINING]


@pytest.fixture(scope="module")
def vae(): return load_plan_vae({"arms": {"show-o2": {}}, "vae": "vae"})


@pytest.fixture(scope="module")
def data(): return training_batch(WORLD, WordTokenizer(WORDS), 0, list(range(32)), 32)


def arm_of(name, vae, awake=True, **settings):
    "A seeded arm; `awake`: layers that begin at zero are drawn, so that a gradient or an input shows wherever it gets through."
    torch.manual_seed(5)
    arm = make_arm(name, WORDS, SIZES, settings, vae if needs_vae(name) else None)
    for key, value in arm.named_parameters():
        if awake and not value.any(): value.data.normal_(std=0.1, generator=torch.Generator().manual_seed(sum(key.encode())))
    return arm


def gradients(arm, data, seed=0):
    arm.train()(**data, generator=torch.Generator().manual_seed(seed))[0].backward()
    return {name: value.grad for name, value in arm.named_parameters()}


# Masks of attention

def test_prefix_mask_follows_its_rule():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    for prefix in (0, 1, 3):
        found = prefix_mask(prefix, mask)[:, 0]
        for row, real in enumerate(mask.tolist()):
            for asks in range(prefix + 4):
                for seen in range(prefix + 4):
                    image = seen < prefix
                    word = seen >= prefix and asks >= seen and real[seen - prefix]
                    assert found[row, asks, seen] == (image or word), (prefix, row, asks, seen)


def test_suffix_mask_follows_its_rule():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    for count in (1, 3):
        found = suffix_mask(mask, count)[:, 0]
        for row, real in enumerate(mask.tolist()):
            for asks in range(4 + count):
                for seen in range(4 + count):
                    if asks < 4: expected = seen <= asks and real[seen]  # words: the words before them, never the image
                    else: expected = seen >= 4 or real[seen]  # image tokens: each other and all words
                    assert found[row, asks, seen] == expected, (count, row, asks, seen)


def padded(ids, mask, more=5): # columns that no mask shows, filled with real words
    noise = torch.randint(4, len(WORDS), (len(ids), more), generator=torch.Generator().manual_seed(3))
    return torch.cat([ids, noise], 1), torch.cat([mask, mask.new_zeros(len(mask), more)], 1)


def test_a_word_knows_neither_later_words_nor_padding():
    torch.manual_seed(0)
    model = PrefixLM(len(WORDS) + 4, Sizes(**SIZES)).eval()
    prefix, ids, mask = torch.randn(3, 9, 16), torch.randint(4, len(WORDS), (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    for given in (prefix, None):
        whole = model(given, ids, mask)
        for place in range(6):
            changed = ids.clone()
            changed[:, place + 1:] = (changed[:, place + 1:] - 3) % len(WORDS) + 4
            other = model(given, changed, mask)
            assert torch.allclose(other[:, : place + 1], whole[:, : place + 1], atol=1e-5)
            assert not torch.allclose(other[:, place + 1:], whole[:, place + 1:], atol=1e-2)
        assert torch.allclose(model(given, *padded(ids, mask))[:, :7], whole, atol=1e-5)
    assert not torch.allclose(model(prefix.flip(1) * 2, ids, mask), model(prefix, ids, mask), atol=1e-2)  # the picture is heard


GENERATIVE = ["contrastive+pixels", "contrastive+vae", "contrastive+semantic", "diffusion", "show-o2", "janus", "vugen"]


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_velocity_does_not_depend_on_padding_and_does_on_words(name, vae, data):
    arm = arm_of(name, vae).eval()
    with torch.no_grad():
        latents, t = arm.latents(data["images"][:6]), torch.linspace(0.1, 0.9, 6)
        ids, mask = data["ids"][:6], data["mask"][:6]
        assert not mask.all()  # captions of several lengths
        plain = arm.velocity(latents, t, arm.condition(ids, mask))
        more = arm.velocity(latents, t, arm.condition(*padded(ids, mask)))
        other = arm.velocity(latents, t, arm.condition(ids.roll(1, 0), mask.roll(1, 0)))
        alone = torch.cat([arm.velocity(latents[[row]], t[[row]], arm.condition(ids[[row], : mask[row].sum()], mask[[row], : mask[row].sum()])) for row in range(6)])
    assert torch.allclose(more, plain, atol=1e-5) and torch.allclose(alone, plain, atol=1e-5)
    assert (other - plain).abs().flatten(1).amax(1).min() > 1e-4


# Gradients

NOTHING = {  # beginnings of the parameters that one backward pass leaves without a gradient, or with zeros
    "contrastive+sham": ("head.into", "null"), "llava-frozen": ("encoder",), "i-jepa": ("encoder",), "lejepa": ("encoder",),
    "diffusion": ("encoder.patch_embedding",), "vugen": ("encoder", "projector", "language", "reduction")}


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_what_should_learn_and_nothing_else(name, vae, data):
    arm = arm_of(name, vae, **({"reduction_steps": 0} if name == "vugen" else {}))
    found = gradients(arm, data, seed=1)
    silent = {key for key, value in found.items() if value is None or not value.any()}
    assert silent == {key for key in found if key.startswith(NOTHING.get(name, ("-",)))}
    assert all(value is None or value.isfinite().all() for value in found.values())
    frozen = {key for key, value in arm.named_parameters() if not value.requires_grad}
    assert frozen == ({key for key in found if key.startswith(NOTHING[name]) and not key.startswith("reduction")} if name in ("llava-frozen", "i-jepa", "lejepa", "vugen") else set())


def test_vugen_learns_its_reduction_first_and_alone(vae, data):
    found = gradients(arm_of("vugen", vae), {**data, "step": 0})
    assert {key.split(".")[0] for key, value in found.items() if value is not None} == {"reduction"}


def test_a_sham_head_gives_encoder_and_text_tower_the_gradients_of_none(vae, data):
    plain, sham, real = (gradients(arm_of(name, vae), data) for name in ("contrastive", "contrastive+sham", "contrastive+pixels"))
    assert all(torch.equal(sham[key], value) for key, value in plain.items())
    assert all(not torch.equal(real[key], plain[key]) for key in plain if key.startswith(("encoder.blocks", "text.blocks")))
    own = [key for key in sham if key.startswith(("head.blocks", "head.norm", "head.out", "head.gate", "head.time"))]
    assert own and all(sham[key].any() for key in own)
    assert all(torch.equal(sham[key], real[key]) for key in own if not key.startswith("head.time"))  # it learns as the real one does


@pytest.mark.parametrize("name", ["contrastive+vae", "show-o2", "janus"])
def test_a_vae_is_no_part_of_an_arm(name, vae, data):
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    gradients(arm_of(name, vae), data)
    assert all(value.grad is None for value in vae.parameters()) and all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


def test_the_targets_of_a_head_give_the_encoder_no_gradient(vae, data):
    "A semantic target is the encoder's own: were it not held still, the loss would fall by making it empty."
    arm = arm_of("contrastive+semantic", vae)
    arm.latents(data["images"]).square().sum().backward()
    assert all(value.grad is None for value in arm.encoder.parameters()) and any(value.grad is not None and value.grad.any() for value in arm.space.reduction.parameters())


# Scores

@pytest.fixture(scope="module")
def items(): return make_items(WORLD, "seen", 1, 7)


@pytest.mark.parametrize("name", list(ARMS))
def test_scores_of_an_item_do_not_depend_on_its_neighbours(name, vae, items):
    arm = arm_of(name, vae).eval()
    assert arm.scores or name == "contrastive+sham"
    for how in arm.scores:
        one, all_of_them = (arm.score_items(items["images"], items["captions"], how, batch_size=size) for size in (1, 8))
        assert one.shape == (7, 4, 2) and one.isfinite().all()
        assert torch.allclose(one, all_of_them, atol=2e-5), how
        swapped = arm.score_items(items["images"], [pair[::-1] for pair in items["captions"]], how)
        assert torch.allclose(swapped.flip(2), one, atol=2e-5), how  # nor on the order of the captions
        assert one.std() > 1e-5


# Operations, by hand

def linear(rows, into, out): return 2 * rows * into * out


def block(batch, length, width):
    "Query, key and value, output; scores and mixture; two linear layers to 4 D and back."
    return linear(batch * length, width, width) * 4 + 2 * (2 * batch * length * length * width) + linear(batch * length, width, 4 * width) * 2


def test_operations_of_the_contrastive_arm_by_hand(vae, data):
    batch, length, tokens, width = 32, data["ids"].shape[1], 36, 16
    patches = linear(batch * tokens, 3 * 4 * 4, width)
    forward = patches + 2 * block(batch, tokens, width) + block(batch, length, width) + 2 * linear(batch, width, 8) + linear(batch, 8, batch)
    assert training_flops(arm_of("contrastive", vae), data) == 3 * forward - patches  # the first layer's input needs no gradient


def test_operations_of_the_captioner_by_hand(vae, data):
    batch, length, tokens, width, words = 32, data["ids"].shape[1], 36, 16, len(WordTokenizer(WORDS))
    patches = linear(batch * tokens, 3 * 4 * 4, width)
    forward = patches + 2 * block(batch, tokens, width) + 2 * linear(batch * tokens, width, width) + 2 * block(batch, tokens + length, width) + linear(batch * length, width, words)
    assert training_flops(arm_of("captioner", vae), data) == 3 * forward - patches


def test_a_frozen_encoder_costs_its_forward_pass_alone(vae, data):
    batch, length, tokens, width, words = 32, data["ids"].shape[1], 36, 16, len(WordTokenizer(WORDS))
    encoder, first = linear(batch * tokens, 3 * 4 * 4, width) + 2 * block(batch, tokens, width), linear(batch * tokens, width, width)
    rest = 2 * first + 2 * block(batch, tokens + length, width) + linear(batch * length, width, words)
    assert training_flops(arm_of("llava-frozen", vae), data) == encoder + 3 * rest - first


def test_a_sham_head_costs_what_a_real_one_does(vae, data):
    assert training_flops(arm_of("contrastive+sham", vae), data) == training_flops(arm_of("contrastive+pixels", vae), data)


# The statistic of normality

def by_direct_sums(values, directions):
    "Epps–Pulley on 17 points between -5 and 5, every sum written out."
    found, points = [], np.linspace(-5, 5, 17)
    for direction in (directions / np.linalg.norm(directions, axis=0)).T:
        along, heights = values @ direction, []
        for t in points:
            empirical = sum(np.exp(1j * t * x) for x in along) / len(along)
            heights.append(abs(empirical - np.exp(-t * t / 2)) ** 2 * np.exp(-t * t / 2))
        found.append(len(along) * sum((heights[i] + heights[i + 1]) / 2 * (points[i + 1] - points[i]) for i in range(16)))
    return np.mean(found)


def test_normality_is_its_direct_sum():
    for seed, make in enumerate((torch.randn, torch.rand)):
        values = make(40, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        directions = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
        assert normality(values, torch.Generator().manual_seed(9), slices=6).item() == pytest.approx(by_direct_sums(values.numpy(), directions.double().numpy()), rel=1e-6)


def test_normality_of_gaussians_has_the_expectation_of_theory():
    "The squared distance of characteristic functions is (1 - exp(-t²)) / n on average, whatever n."
    theory = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    for number, dim, seed in ((50, 4, 0), (400, 16, 1)):
        generator = torch.Generator().manual_seed(seed)
        found = torch.stack([normality(torch.randn(number, dim, generator=generator), generator) for _ in range(300)])
        assert abs(found.mean() - theory) < 4 * found.std() / math.sqrt(300) + 0.001


def test_normality_grows_away_from_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    base, many = torch.randn(400, 8, generator=generator), torch.randn(1600, 8, generator=generator)
    def asked(values): return normality(values, torch.Generator().manual_seed(1)).item()
    scales, shifts = [asked(base * scale) for scale in (1.0, 1.3, 1.7, 2.5)], [asked(base + shift) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert scales == sorted(scales) and shifts == sorted(shifts) and scales[1] > 2 and shifts[1] > 2
    assert asked(torch.zeros(400, 8)) > 100 and asked(torch.cat([base[:, :1]] * 8, 1)) > 10  # collapsed to a point, to a line
    assert asked(many * 1.3) > 3 * asked(base * 1.3)  # evidence grows with n
    assert normality(base.requires_grad_(), generator).isfinite()


# Blocks of I-JEPA

def corners(block): # [rows, columns] bool → top, left, height, width; it must be one full rectangle
    rows, columns = block.any(1).nonzero().flatten(), block.any(0).nonzero().flatten()
    top, left, height, width = int(rows[0]), int(columns[0]), len(rows), len(columns)
    assert block[top : top + height, left : left + width].all() and block.sum() == height * width
    return top, left, height, width


@pytest.mark.parametrize("scale, aspect", [((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))])
def test_blocks_have_the_published_sizes(scale, aspect):
    generator, side, seen = torch.Generator().manual_seed(0), 64, set()
    for _ in range(60):
        blocks = draw_blocks((side, side), 3, scale, aspect, generator).view(3, side, side)
        found = [corners(block) for block in blocks]
        assert len({(height, width) for _, _, height, width in found}) == 1  # one size for all pictures
        *_, height, width = found[0]
        seen.add((height, width))
        assert (scale[0] - 0.02) * side ** 2 <= height * width <= (scale[1] + 0.02) * side ** 2
        assert aspect[0] - 0.05 <= height / width <= aspect[1] + 0.05
    shares, ratios = [height * width / side ** 2 for height, width in seen], [height / width for height, width in seen]
    assert max(shares) - min(shares) > 0.8 * (scale[1] - scale[0]) and max(ratios) - min(ratios) >= 0.8 * (aspect[1] - aspect[0])  # the whole range is used


def test_blocks_lie_anywhere_with_equal_chances():
    from scipy.stats import chisquare
    blocks = draw_blocks((8, 8), 6000, (0.15, 0.2), (0.75, 1.5), torch.Generator().manual_seed(3)).view(-1, 8, 8)
    *_, height, width = corners(blocks[0])
    tops, lefts = blocks.any(2).int().argmax(1), blocks.any(1).int().argmax(1)
    counts = torch.zeros(9 - height, 9 - width).index_put_((tops, lefts), torch.ones(6000), accumulate=True)
    assert counts.sum() == 6000 and chisquare(counts.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("side", [6, 8, 14])
def test_a_context_never_shows_a_target(side):
    arm = JepaArm(WORDS, {**SIZES, "image_size": 4 * side})
    for seed in range(30):
        context, targets = arm.masks(16, torch.Generator().manual_seed(seed))
        assert len(targets) == 4 and len({tuple(target.sum(1).tolist()) for target in targets}) == 1
        for target in targets:
            assert not (context & target).any()
            for each in target.view(-1, side, side): corners(each)


def test_places_are_those_that_are_set():
    generator = torch.Generator().manual_seed(0)
    for share in (0.2, 0.5, 0.9):
        kept = torch.rand(20, 36, generator=generator) < share
        places, least = places_of(kept), int(kept.sum(1).min())
        assert places.shape == (20, least) and kept.gather(1, places).all()
        assert all(len(set(row)) == least for row in places.tolist())
        assert all(row == kept[number].nonzero().flatten().tolist()[:least] for number, row in enumerate(places.tolist()))
        assert places_of(kept, 1).shape == (20, 1)
