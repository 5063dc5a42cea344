"Pools of latents: which pictures a block holds, who makes it, and what is kept."
import json

import pytest
import torch

from vugen.data.corpora import lane_of
from vugen.decode.autoencoder import encoder_link
from vugen.encode.latent_cache import LatentCache
from vugen.errors import UserError
from vugen.generate.adapters import linked_encoder
from vugen.generate.text_to_image import TextToImage, vlm_link
from vugen.models.saving import fingerprint
from vugen.paths import checkpoints_dir
from vugen.train.generator import CorpusPool, LanePool, LatentPool
from vugen.train.presets import PRESETS, load_preset, override

PAPERS = [name for name in PRESETS if name.startswith("paper")]
GENERATORS = ("generator", "generator-decoupled", "generator-repa")


def numbers(indices): return torch.tensor(indices).float()[:, None, None]


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("stage", GENERATORS)
def test_the_papers_generators_learn_from_the_whole_corpus(name, stage):
    assert load_preset(name).stage(stage).options["pool"] == 0
    changed = override(load_preset(name), stage, {"options.pool": "40000", "options.pool_block": "100"})
    assert override(changed, stage, {"options.pool": "0"}).stage(stage).options["pool"] == 0 and changed.stage(stage).options["pool_block"] == 100


@pytest.mark.parametrize("lanes,batch_size,block,size", [(1, 4, 3, 0), (2, 8, 3, 0), (4, 8, 5, 0), (3, 6, 4, 22), (8, 8, 200, 30)])
def test_lanes_blocks_hold_every_sample_once_and_one_lane_each(lanes, batch_size, block, size):
    pool, samples = LanePool(numbers, size, block, None, 0, lanes, batch_size), 40
    wanted = list(range(min(samples, size or samples)))
    assert pool[wanted].flatten().tolist() == wanted  # first round: a sample is its own picture
    held = [pool.members(number) for number in pool.share(samples)]
    assert set(wanted) <= {index for each in held for index in each} and len(set(sum(held, []))) == len(sum(held, []))
    assert all(len({lane_of(index, batch_size, lanes)[0] for index in each}) == 1 for each in held)
    assert size or all(len(each) == block for each in held)  # a stream that goes on has no broken blocks
    for world in (1, 2, 3):
        shares = [pool.share(samples, rank, world) for rank in range(world)]
        assert sorted(sum(shares, [])) == pool.share(samples) == sorted(pool.known)
        owners = {lane: rank for rank, share in enumerate(shares) for lane in {number % lanes for number in share}}
        assert all({number % lanes for number in share} == {lane for lane, owner in owners.items() if owner == rank} for rank, share in enumerate(shares))


def test_later_rounds_of_lanes_give_every_picture_once():
    pool = LanePool(numbers, 20, 3, None, 0, 2, 8)
    rounds = [pool[list(range(20 * turn, 20 * turn + 20))].flatten().int().tolist() for turn in range(3)]
    assert all(sorted(each) == list(range(20)) for each in rounds) and rounds[1] != rounds[2]


def test_a_pool_without_memory_makes_what_is_asked_and_nothing_else():
    asked = []
    def make(indices): asked.append(list(indices)); return numbers(indices), [str(index) for index in indices]
    pool = CorpusPool(make, 100, 40, None, 0)
    pool.keeps = False
    found, told = pool.samples([7, 3, 99])
    assert asked == [[7, 3, 99]] and found["latents"].flatten().tolist() == [7, 3, 99] and told == ["7", "3", "99"] and not pool.known
    places = [pool.place(index) for index in (100, 150)]
    assert pool[[100, 150]].flatten().int().tolist() == places  # the same pictures as with a memory


@pytest.mark.parametrize("cached", [False, True])
def test_what_lies_beside_the_latents_comes_along(cached, tmp_path):
    def make(indices): return numbers(indices), [str(index) for index in indices], {"targets": -numbers(indices).half()}
    pool = CorpusPool(make, 10, 4, LatentCache(tmp_path, {"encoder": "aa"}) if cached else None, 0)
    found, told = pool.samples([9, 2])
    assert found["targets"].flatten().tolist() == [-9, -2] and found["targets"].dtype == torch.float16 and told == ["9", "2"]


@pytest.mark.parametrize("size,block", [(10, 0), (-4, 2), (10, 4)])
def test_impossible_pools_are_refused(size, block):
    with pytest.raises(UserError, match="pool"): LatentPool(numbers, size, block)


def test_what_was_saved_before_types_were_recorded_still_matches():
    root = checkpoints_dir("tiny")
    config, link = (json.loads((root / path).read_text()) for path in ("generator/config.json", "decoder/encoder.json"))
    model = TextToImage.from_pretrained(root)
    assert "vlm_dtype" not in config and set(link) == {"encoder", "fingerprint"}
    assert config["vlm_fingerprint"] == fingerprint(model.vlm) == vlm_link(model.vlm)["vlm_fingerprint"] and config["reducer_fingerprint"] == fingerprint(model.reducer)
    assert encoder_link(linked_encoder(root)) == link  # and what is written today for a model of our own is what was written then
