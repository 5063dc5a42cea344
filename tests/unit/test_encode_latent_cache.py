"The latent cache: refused for other models or data, whole after a kill, the same bits as without."
import json

import pytest
import torch

from vugen.encode.latent_cache import LatentCache, build
from vugen.errors import UserError
from vugen.train.generator import CorpusPool, LatentPool

KEY = {"encoder": "aa", "reducer": "bb", "world": "cc", "preprocessing": "none", "pool_block": 3}


@pytest.mark.parametrize("name", KEY)
def test_a_cache_of_other_models_or_data_is_refused_by_name(name, tmp_path):
    LatentCache(tmp_path / "cache", KEY)
    with pytest.raises(UserError, match=f"{name}.*latent_cache"): LatentCache(tmp_path / "cache", {**KEY, name: "other"})
    with pytest.raises(UserError, match=name): LatentCache(tmp_path / "cache", {other: value for other, value in KEY.items() if other != name})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"): LatentCache(tmp_path, KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_block_or_key_is_named(tmp_path):
    cache = LatentCache(tmp_path / "cache", KEY)
    cache.write(0, torch.randn(3, 2, 2))
    cache.path(0).write_bytes(cache.path(0).read_bytes()[:40])
    with pytest.raises(UserError, match="block-00000000"): LatentCache(tmp_path / "cache", KEY).latents(0, 1)
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json"): LatentCache(tmp_path / "cache", KEY)


def test_building_is_resumed_and_shared_between_processes(tmp_path):
    calls = []
    def make(number):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(number)
        return torch.full((3, 1, 1), float(number)), [str(number)] * 3
    cache = LatentCache(tmp_path / "cache", KEY)
    with pytest.raises(KeyboardInterrupt): build(cache, make, 7, rank=0, world=2)
    assert calls == [0, 2, 4] and not [path for path in cache.folder.iterdir() if path.name.startswith(".")]
    def go_on(number): calls.append(number); return torch.full((3, 1, 1), float(number)), [str(number)] * 3
    assert [build(LatentCache(tmp_path / "cache", KEY), go_on, 7, rank, 2) for rank in (0, 1)] == [1, 3] and sorted(calls) == list(range(7))
    assert all(cache.latents(number, 2).item() == number and cache.caption(number, 1) == str(number) for number in range(7))


@pytest.mark.parametrize("kind", [LatentPool, CorpusPool])
def test_a_pool_gives_the_same_bits_with_and_without_a_cache(kind, tmp_path):
    counted = []
    def make(indices): counted.append(indices); return torch.tensor(indices).float().sin()[:, None, None].expand(-1, 4, 2), [str(index) for index in indices]
    def pool(cache): return kind(make, 8, 4, cache) if kind is LatentPool else kind(make, 8, 3, cache, seed=1)
    asked = [[0, 1, 7], [3, 20, 8], [15, 9, 2]]
    plain = pool(None)
    expected = [(plain[indices], plain.captions(indices)) for indices in asked]
    for turn in range(2):  # the second time everything is there
        counted.clear()
        kept = pool(LatentCache(tmp_path / "cache", KEY))
        for indices, (latents, captions) in zip(asked, expected): assert torch.equal(kept[indices], latents) and kept.captions(indices) == captions
        assert bool(counted) == (turn == 0)
    assert json.loads((tmp_path / "cache/cache.json").read_text()) == KEY
