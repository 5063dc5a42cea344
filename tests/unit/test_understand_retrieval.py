"A million captions, three ways to search them, and what a second reader makes of the shortlist."
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vugen.data.scenes import Facts, Relation, World, batch, caption_of, facts, holds, named_attributes, parse, relation_holds, sample_scenes
from vugen.errors import UserError
from vugen.understand import retrieval
from vugen.understand.denoisers import Cost
from vugen.understand.retrieval import (CaptionIndex, CaptionSpace, chance_recall, choice_loss, complete_captions, denoiser_of, distinct_captions, embed_captions, embed_images, embed_to_folder,
                                        engine_path, fit_weight, gallery, hits_of, import_faiss, measure_retrieval, mixed_scores, nested_plan, pareto, plain_caption, query_gflops, read_captions,
                                        relevant_rows, rerank, retrieve_pictures, shortlist_errors, shuffled, things_of)
from vugen.understand.schedules import Racing
from vugen.understand.scorers import Parts, PerfectScorer, RandomScorer, load_scorers

TINY = World(shapes=("circle", "star"), colors=("red", "blue"), relations=("left of", "below", "inside"))


@pytest.fixture(scope="module")
def parts(): return Parts()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Words:
    "A tower that needs no training: every caption and picture has a vector drawn from its own bytes."
    fingerprint = "0123456789abcdef"

    def __init__(self, dim=16): self.dim, self.read = dim, []

    def encode_text(self, captions):
        self.read += captions
        return torch.stack([self._vector(caption.encode()) for caption in captions])

    def encode_image(self, images): return torch.stack([self._vector(image.numpy().tobytes()) for image in images])

    def _vector(self, data): return F.normalize(torch.from_numpy(np.random.default_rng(list(data[:4000])).standard_normal(self.dim)).float(), dim=0)


def captions_of(number): return [f"caption {place}" for place in range(number)]


# ---- captions ---------------------------------------------------------------------------------------------------------------


def every_fact(world):
    "All facts of one to three different things that a scene of this world can state, listed the slow way."
    things, names, found = things_of(world), ("above", "inside", "left of"), set()
    for number in (1, 2, 3):
        for objects in itertools.combinations(things, number):
            edges = [Relation(name, *pair) for pair in itertools.permutations(range(number), 2) for name in names]
            links = [()] if number == 1 else [(edge,) for edge in edges]
            if number == 3:  # the first two things are related by anything, the third to one of them from side to side or up and down
                links += [(first, second) for first, second in itertools.permutations(edges, 2) if {first.subject, first.object} != {second.subject, second.object} and second.name != "inside"]
            found |= {Facts(objects, told).canonical() for told in links}
    return found


def test_the_space_of_captions_is_what_can_be_told():
    space, known = CaptionSpace(TINY), every_fact(TINY)
    texts = list(distinct_captions(space))
    assert len(space) == len(texts) == len(set(texts)) == len(known)
    assert {parse(text) for text in texts} == known and all(caption_of(parse(text)) == text for text in texts)
    things, states = 4, 2 * 3
    assert len(space) == things + math.comb(things, 2) * states + math.comb(things, 3) * (3 * states + 3 * (states**2 - 2**2))


@pytest.mark.parametrize("world", [World(relations=()), World(fills=("solid", "striped"), attributes_per_object=3, emoji=("dog", "cat")), World(attributes_per_object=0), World(shapes=(), emoji=("dog", "cat", "fish"))])
def test_other_worlds_have_spaces_too(world):
    space = CaptionSpace(world)
    texts = list(distinct_captions(space, 3, stop=min(len(space), 3000))) + space.block(3, range(0, space.sizes[2], max(space.sizes[2] // 50, 1)))
    assert len(set(texts)) == len({parse(text) for text in texts}) and all(caption_of(parse(text)) == text for text in texts)


def test_the_embedded_world_holds_a_million(parts):
    space = CaptionSpace(parts.world)
    assert len(space) == 1_042_320
    last = list(distinct_captions(space, 0, 999_990, 1_000_000))
    assert len(set(last)) == 10 and all(len(parse(text).objects) == 3 for text in last)
    with pytest.raises(UserError, match="1,042,320"): list(distinct_captions(space, 0, 0, 1_042_321))


def test_scenes_state_what_the_space_holds(parts):
    world = World.from_dict({**parts.world.asdict(), "counts": {"1": .2, "2": .3, "3": .5}})
    space = CaptionSpace(world)
    for scene in sample_scenes(world, 5, range(60)):
        told = parse(plain_caption(scene, world))
        things = sorted(space.things.index(thing) for thing in told.objects)
        forms, place = space.templates[len(things) - 1], sum(math.comb(thing, number) for number, thing in enumerate(things, 1))  # the number of a set of things
        assert caption_of(told) in space.block(len(things), range(place * len(forms), (place + 1) * len(forms)))


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 4512])
def test_shuffles_are_permutations_that_the_seed_decides(size):
    orders = [tuple(shuffled(np.arange(size), size, seed)) for seed in range(4)]
    assert all(sorted(order) == list(range(size)) for order in orders) and (size < 64 or len(set(orders)) == 4)


def test_any_piece_of_the_stream_is_a_piece_of_the_whole():
    whole = list(distinct_captions(TINY, 7))
    for start, stop in ((0, 3), (2, 9), (50, 51), (100, len(whole))): assert list(distinct_captions(TINY, 7, start, stop, chunk=4)) == whole[start:stop]
    assert whole != list(distinct_captions(TINY, 8)) and sorted(whole) == sorted(distinct_captions(TINY, 8))


def test_a_gallery_holds_the_scenes_and_nothing_twice():
    scenes = sample_scenes(World.from_dict({**TINY.asdict(), "counts": {"3": 1.0}}), 1, range(12))
    own = {plain_caption(scene, TINY) for scene in scenes}
    for number in (len(own), 40, len(CaptionSpace(TINY))):
        texts = gallery(TINY, number, scenes)
        assert len(texts) == len(set(texts)) == number and own <= set(texts)
    for number in (0, len(own) - 1, len(CaptionSpace(TINY)) + 1):
        with pytest.raises(UserError): gallery(TINY, number, scenes)


def test_files_of_captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red circle\r\n\n  a café\na red circle\n", encoding="utf-8")
    assert read_captions(path) == ["a red circle", "a café"]
    path.write_bytes(b"\xff\xfe\x00")
    for wrong in (path, tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match="one caption a line"): read_captions(wrong)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no caption"): read_captions(path)


# ---- what counts ------------------------------------------------------------------------------------------------------------


def test_relevant_captions_are_those_that_hold_and_leave_nothing_out():
    world = World.from_dict({**TINY.asdict(), "relations": ["left of", "above"], "counts": {"1": .2, "2": .4, "3": .4}})
    texts = list(distinct_captions(world))
    for scene in sample_scenes(world, 2, range(25)):
        own = facts(scene, named_attributes(world))
        slow = {text for text in texts if holds(scene, (told := parse(text))) and len(told.objects) == len(scene.items) and len(told.relations) >= len(own.relations)}
        quick = complete_captions(scene, world)
        assert {texts[row] for row in relevant_rows(texts, [quick])[0]} == slow and plain_caption(scene, world) in slow


def test_every_true_relation_is_among_the_relevant():
    world = World.from_dict({**TINY.asdict(), "relations": ["left of", "above"], "counts": {"3": 1.0}})
    scene = sample_scenes(world, 4, [0])[0]
    most = max((parse(text) for text in complete_captions(scene, world)), key=lambda told: len(told.relations))
    true = sum(relation_holds(first, second, name) for first, second in itertools.permutations(scene.items, 2) for name in ("left of", "above"))
    assert len(most.relations) == true


def test_other_words_for_the_same_are_found():
    texts = ["a dog barks", "the star is to the right of the red circle", "under a red circle is a blue star", "a blue star right of a red circle"]
    assert relevant_rows(texts, [["a red circle left of a blue star"], ["a red circle above a blue star"]], plain=False)[0].tolist() == [3]
    assert relevant_rows(texts, [["a red circle above a blue star"]], plain=False)[0].tolist() == [2]
    assert relevant_rows(["a red circle", "a red circle"], [["a red circle"]])[0].tolist() == [0, 1]


# ---- the index --------------------------------------------------------------------------------------------------------------


def test_length_and_batches_change_no_vector(parts):
    texts = list(distinct_captions(parts.world, 0, 4000, 4100))
    alone = embed_captions(parts.contrastive, texts, batch_size=1)
    assert torch.allclose(embed_captions(parts.contrastive, texts, batch_size=33), alone, atol=2e-6)
    scores = load_scorers(parts, "contrastive")["contrastive"].score(batch(parts.world, 0, range(3))["images"], texts)
    assert torch.allclose(embed_images(parts.contrastive, batch(parts.world, 0, range(3))["images"]) @ alone.T, scores, atol=1e-5)


@pytest.mark.parametrize("dtype, off", [("float32", 1e-6), ("float16", 1e-3)])
def test_a_killed_build_goes_on_where_it_was(tmp_path, dtype, off):
    texts, tower = captions_of(50), Words()

    def kill(what, done, total):
        if done >= 20: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): embed_to_folder(tmp_path / "index", texts, tower, dtype, chunk=10, progress=kill)
    with pytest.raises(UserError, match="20 of 50"): CaptionIndex.load(tmp_path / "index")
    assert len(tower.read) == 20
    index = CaptionIndex.build(texts, tower, tmp_path / "index", dtype=dtype, chunk=10)
    assert len(tower.read) == 50 and sorted(tower.read) == sorted(texts) and str(index.vectors.dtype) == dtype
    assert np.allclose(index.vectors, embed_captions(Words(), texts), atol=off) and index.captions == texts
    CaptionIndex.build(texts, tower, tmp_path / "index", dtype=dtype)
    assert len(tower.read) == 50  # nothing is embedded twice


def test_a_process_that_is_killed_loses_one_chunk_at_most(tmp_path):
    code = ("import os, signal\nfrom tests_words import Words\nfrom vugen.understand.retrieval import embed_to_folder\n"
            "def kill(what, done, total):\n    if done >= 30: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"embed_to_folder({str(tmp_path / 'index')!r}, [f'caption {{place}}' for place in range(50)], Words(), chunk=10, progress=kill)\n")
    (tmp_path / "tests_words.py").write_text("import sys\nsys.path.insert(0, %r)\nfrom test_understand_retrieval import Words\n" % os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}, cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    tower = Words()
    index = CaptionIndex.build(captions_of(50), tower, tmp_path / "index", chunk=10)
    assert len(tower.read) == 20 and np.allclose(index.vectors, embed_captions(Words(), captions_of(50)), atol=1e-6)


def test_other_captions_models_and_folders_are_refused(tmp_path):
    folder, other = tmp_path / "index", Words()
    CaptionIndex.build(captions_of(30), Words(), folder)
    other.fingerprint = "f" * 16
    with pytest.raises(UserError, match="another model"): CaptionIndex.load(folder, other)
    with pytest.raises(UserError, match="another model"): CaptionIndex.build(captions_of(30), other, folder)
    with pytest.raises(UserError, match="other captions"): CaptionIndex.build(captions_of(31), Words(), folder)
    with pytest.raises(UserError, match="no caption index"): CaptionIndex.load(tmp_path / "nowhere")
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty"): CaptionIndex.build(captions_of(3), Words(), tmp_path / "full")
    with pytest.raises(UserError, match="no caption to search"): CaptionIndex.build([], Words())
    with pytest.raises(TypeError, match="fingerprint"): retrieval.encoder_fingerprint(type("Bare", (), {})())


@pytest.mark.parametrize("file", [retrieval.NOTE, retrieval.VECTORS, retrieval.TEXTS])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_files_are_named(tmp_path, file, damage):
    CaptionIndex.build(captions_of(30), Words(), tmp_path)
    path = tmp_path / file
    if damage == "gone": path.unlink()
    else: path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=file): CaptionIndex.load(tmp_path, Words())


def test_flat_is_the_matrix_product():
    index, queries = CaptionIndex.build(captions_of(700), Words()), F.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    for k in (1, 25, 700):
        best = (queries @ torch.from_numpy(index.vectors).T).topk(k, dim=1)
        found = index.use("flat").search(3 * queries, k)  # length does not matter
        assert torch.allclose(found.cosines, best.values, atol=1e-5) and torch.equal(found.ids, best.indices) and found.comparisons == 700


def test_near_searches_find_most_and_compare_less():
    vectors = F.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    index, queries = CaptionIndex(captions_of(4000), vectors.numpy(), "x"), F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    truth = index.use("flat").search(queries, 10).ids
    share = lambda found: (found.ids[:, :, None] == truth[:, None]).any(2).float().mean().item()
    few, many, all_ = (index.use("ivf", nlist=32, nprobe=nprobe).search(queries, 10) for nprobe in (2, 8, 32))
    assert share(few) < share(many) <= share(all_) == 1 and few.comparisons < many.comparisons < all_.comparisons == 4000 + 32
    graph = index.use("hnsw", neighbors=16, ef_search=64).search(queries, 10)
    assert share(graph) > .9 and graph.comparisons < 4000
    assert torch.allclose(graph.cosines[:, 0], (queries * vectors[graph.ids[:, 0]]).sum(1), atol=1e-5)


def test_a_shortlist_is_never_shorter_than_asked_for():
    index = CaptionIndex.build(captions_of(400), Words()).use("ivf", nlist=40, nprobe=1)
    queries = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    found = index.search(queries, 300)
    assert (found.ids >= 0).all() and all(len(set(row)) == 300 for row in found.ids.tolist())
    assert index.engine.nprobe == index.options["nprobe"] == 1  # the next search is as narrow as asked for


def test_indexes_are_written_read_and_checked(tmp_path):
    index, queries = CaptionIndex.build(captions_of(500), Words(), tmp_path), F.normalize(torch.randn(5, 16), dim=1)
    for kind, options in (("ivf", {"nlist": 8, "nprobe": 3}), ("hnsw", {"neighbors": 8})):
        first = index.use(kind, **options).search(queries, 7)
        path = engine_path(tmp_path, kind, index.options)
        stamp = path.stat().st_mtime_ns
        again = CaptionIndex.load(tmp_path, Words()).use(kind, **options).search(queries, 7)
        assert torch.equal(first.ids, again.ids) and path.stat().st_mtime_ns == stamp
        whole = path.read_bytes()
        for content, why in ((whole[:len(whole) // 3], "damaged"), (b"", "damaged"), (_written(tmp_path, 499, kind, options), "499 vectors"), (_written(tmp_path, 500, kind, options, shift=1), "other captions")):
            path.write_bytes(content)
            with pytest.raises(UserError, match=why): CaptionIndex.load(tmp_path).use(kind, **options)
        path.write_bytes(whole)
    assert not engine_path(tmp_path, "flat", {}) and index.use("flat").search(queries, 7).comparisons == 500


def _written(folder, number, kind, options, shift=0):
    "Bytes of the file of an index over other vectors."
    other = CaptionIndex([f"caption {place + shift}" for place in range(number)], embed_captions(Words(), [f"caption {place + shift}" for place in range(number)]).numpy(), "x").use(kind, **options)
    retrieval.write_engine(folder / "other.faiss", other.engine)
    return (folder / "other.faiss").read_bytes()


def test_impossible_searches_are_refused(monkeypatch):
    index = CaptionIndex.build(captions_of(30), Words())
    for k in (0, 31):
        with pytest.raises(UserError, match="from 1 to 30"): index.search(torch.randn(2, 16), k)
    with pytest.raises(UserError, match="different models"): index.search(torch.randn(2, 17), 3)
    with pytest.raises(UserError, match="flat, ivf, hnsw"): index.use("tree")
    with pytest.raises(UserError, match="no option 'nlist'"): index.use("hnsw", nlist=3)
    with pytest.raises(UserError, match="nprobe is 0"): index.use("ivf", nprobe=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"): import_faiss()


@pytest.mark.parametrize("first, second", [("torch", "faiss"), ("faiss", "torch")])
def test_two_openmps_in_one_process(first, second):
    code = (f"import {first}, {second}\nimport torch, numpy as np\ntorch.set_num_threads(2)\n"
            "from vugen.understand.retrieval import CaptionIndex, import_faiss\n"
            "vectors = torch.nn.functional.normalize(torch.randn(3000, 32), dim=1)\nindex = CaptionIndex(list(map(str, range(3000))), vectors.numpy(), 'x')\n"
            "for kind in ('flat', 'ivf', 'hnsw'):\n"
            "    index.use(kind)\n"
            "    for turn in range(5): (vectors @ vectors.T).sum(); found = index.search(vectors[:64], 5)\n"
            "    assert (found.ids[:, 0] == torch.arange(64)).float().mean() > .9\n"
            "assert import_faiss().omp_get_max_threads() == 2 == torch.get_num_threads()\nprint('whole')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "whole", done.stderr


def test_importing_needs_no_faiss():
    code = "import sys\nimport vugen.understand.retrieval, vugen.lab.cli, vugen.lab.bench_retrieval\nassert not {'faiss', 'matplotlib', 'diffusers', 'gradio'} & set(sys.modules), sorted(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ---- reading again ----------------------------------------------------------------------------------------------------------


def test_chance_is_the_hypergeometric_one():
    rows = [np.arange(3), np.array([7]), np.array([], int)]
    by_hand = [1 - math.comb(17, 5) / math.comb(20, 5), 5 / 20, 0]
    assert math.isclose(chance_recall(rows, 20, 5), sum(by_hand) / 3) and math.isclose(chance_recall(rows[:2], 20, 20), 1)


def test_hits_by_hand():
    hits = hits_of(torch.tensor([[4, 2, 9], [1, 2, 3]]), [np.array([9, 2]), np.array([], int)])
    assert hits.tolist() == [[False, True, True], [False, False, False]]


def test_the_front_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    for _ in range(50):
        costs, values = generator.integers(0, 6, 12).tolist(), generator.integers(0, 6, 12).tolist()
        front = pareto(costs, values)
        for place, (cost, value) in enumerate(zip(costs, values)):
            beaten = any((a <= cost and b >= value) and (a, b) != (cost, value) for a, b in zip(costs, values))
            assert front[place] == (not beaten)
        kept = sorted((cost, value) for cost, value, best in zip(costs, values, front) if best)
        assert all(a[0] < b[0] and a[1] < b[1] or a == b for a, b in zip(kept, kept[1:]))


def test_the_mixture_follows_the_better_reader():
    generator = torch.Generator().manual_seed(0)
    right = torch.zeros(200, 8, dtype=torch.bool).scatter(1, torch.randint(8, (200, 1), generator=generator), True)
    noisy = lambda size: right.float() + size * torch.randn(200, 8, generator=generator)
    good, bad = noisy(.3), noisy(3)
    assert fit_weight(bad, -good[..., None], right) > fit_weight(good, -bad[..., None], right)
    equal = noisy(.8), noisy(.8)
    weight = fit_weight(equal[0], -10 * equal[1][..., None], right)
    assert .03 < weight < .3  # the second one's numbers are ten times as large
    accuracy = lambda scores: right.gather(1, scores.argmax(1, keepdim=True)).float().mean()
    assert accuracy(mixed_scores(equal[0], -10 * equal[1][..., None], weight=weight)) > max(accuracy(each) for each in equal)
    assert math.isinf(fit_weight(good, -bad[..., None], right & False))
    assert math.isclose(choice_loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[True, False]])), math.log(4), rel_tol=1e-6)


def test_errors_of_a_shortlist_are_those_of_the_scorer(parts, tmp_path):
    scorer, images = load_scorers(parts, "denoising")["denoising"], batch(parts.world, 9, range(3))["images"]
    short = [list(distinct_captions(parts.world, 0, start, start + 4)) for start in (100, 200, 4600)]
    errors, cost = shortlist_errors(scorer, images, short, 3, seed=5, folder=tmp_path / "errors")
    assert errors.shape == (3, 4, 3) and cost.calls == 3 * 4 * 3 and cost.flops > 1e9
    plan = nested_plan(3, seed=5)
    model, noise = parts.generator, plan.noises((64, 8))
    with torch.no_grad():
        latents, cache = model.encode_images(images[1:2]).expand(4, -1, -1), model.prompt_cache(short[1])
        for place in range(3):
            t = plan.times[place].float()
            noisy = t * latents + (1 - t) * noise[place]
            by_hand = (model.velocity(noisy, t.expand(4), cache) - (latents - noise[place])).double().square().sum((1, 2))
            assert torch.allclose(errors[1, :, place], by_hand, rtol=1e-3)
    again, spent = shortlist_errors(scorer, images, short, 3, seed=5, folder=tmp_path / "errors")
    assert torch.equal(errors, again) and spent.calls == 0
    fewer, spent = shortlist_errors(scorer, images, short, 2, seed=5, folder=tmp_path / "errors")
    assert torch.equal(errors[..., :2], fewer) and spent.calls == 0  # the plan of two samples begins that of three
    with pytest.raises(UserError, match="zebra"): shortlist_errors(scorer, images[:1], [["a zebra"]], 1)


def test_a_perfect_reader_reaches_the_cap_and_a_blind_one_does_not():
    images, scenes = batch(TINY, 3, range(30))["images"], sample_scenes(TINY, 3, range(30))
    texts = gallery(TINY, 150, scenes)
    index = CaptionIndex.build(texts, Words()).use("flat")
    found = index.search(embed_images(Words(), images), 60)
    hits = hits_of(found.ids, relevant_rows(texts, [complete_captions(scene, TINY) for scene in scenes]))
    short = [[texts[row] for row in rows] for rows in found.ids.tolist()]
    errors, cost = shortlist_errors(PerfectScorer(images, scenes), images, short)
    assert torch.equal(hits.gather(1, errors[..., 0].argmin(1, keepdim=True))[:, 0], hits.any(1)) and cost == Cost(calls=1800, pictures=30)
    blind, _ = shortlist_errors(RandomScorer(0), images, short)
    assert hits.gather(1, blind[..., 0].argmin(1, keepdim=True)).sum() < hits.any(1).sum() / 3


class Table:
    "Errors that are known, and how many were asked for."
    def __init__(self, errors): self.table, self.cost, (self.candidates, self.samples) = errors, Cost(), errors.shape
    def errors(self, candidates, samples): self.cost += Cost(calls=len(candidates) * len(samples)); return self.table[candidates][:, samples].double()


def test_a_fixed_budget_and_a_schedule():
    errors = torch.tensor([[3., 0.], [2., 5.], [1., 9.]])
    cosines = torch.tensor([.9, .5, .7])
    assert rerank(Table(errors), cosines, 1).order.tolist() == [2, 1, 0] and rerank(Table(errors), cosines).order.tolist() == [0, 1, 2]
    assert rerank(Table(errors), cosines, 1, weight=0.0).order.tolist() == [0, 2, 1] and rerank(Table(errors), cosines, 1).cost.calls == 3


def test_a_race_spends_less_and_finds_the_same():
    generator = torch.Generator().manual_seed(0)
    errors = 3 * torch.arange(6.)[:, None] + 5 * torch.rand(1, 40, generator=generator) + .5 * torch.randn(6, 40, generator=generator)  # paired: what a sample adds, it adds to all
    source = Table(errors)
    early = rerank(source, torch.zeros(6), decide=Racing(0.05).decide)
    assert early.order[0] == 0 and early.cost.calls < 120 and sorted(early.order.tolist()) == list(range(6))
    assert rerank(Table(errors), torch.zeros(6)).order.tolist() == list(range(6))


def test_costs_add_up():
    prices = {"picture": 10, "comparison": 2, "latents": 100, "text": 1000, "call": 10_000}
    assert query_gflops(prices, 7) == 24e-9 and math.isclose(query_gflops(prices, 7, 3, 2), (24 + 100 + 3 * (1000 + 2 * 10_000)) / 1e9)


def test_only_denoisers_have_a_denoiser(parts):
    scorers = load_scorers(parts, "denoising, contrastive, bag-of-words")
    assert denoiser_of(scorers["denoising"]).name == "denoising" and denoiser_of(scorers["contrastive"]) is None and denoiser_of(RandomScorer(0)) is None


# ---- the whole --------------------------------------------------------------------------------------------------------------


def test_the_hybrid_beats_the_search_and_stays_below_the_cap(parts, tmp_path):
    found = measure_retrieval(parts, 24, 4600, shortlists=(2, 6), budgets=(1, 2), folder=tmp_path)
    rows = [row for row in found["rows"] if row["images"] == "all"]
    value = lambda metric, **want: next(row for row in rows if row["metric"] == metric and all(row[name] == mine for name, mine in want.items()))
    search, cap = value("recall@1", budget=0)["value"], value("recall@2", budget=0)["value"]
    for category, k, budget in itertools.product(("denoising", "cosine + denoising"), (2, 6), (1, 2)):
        row = value("recall@1", category=category, shortlist=k, budget=budget)
        assert row["n"] == 18 and row["calls"] == k * budget and (k > 2 or row["value"] <= cap) and row["low"] <= row["value"] <= row["high"]
    assert value("recall@1", category="denoising", shortlist=6, budget=2)["value"] > search
    assert value("recall@1", category="denoising, racing 0.05", shortlist=6)["calls"] <= 12
    assert found["run"]["cost"]["calls"] == 24 * 6 * 2 and json.dumps(found) and str(tmp_path) not in json.dumps(found)
    again = measure_retrieval(parts, 24, 4600, shortlists=(2, 6), budgets=(1, 2), folder=tmp_path)
    assert again["rows"] == found["rows"] and again["run"]["cost"]["calls"] == 0  # everything came from the folder


def test_scorers_that_answer_once_and_files_of_captions(parts, tmp_path):
    world = parts.world
    scenes = sample_scenes(world, 1_000_003, range(8))
    (tmp_path / "captions.txt").write_text("\n".join({plain_caption(scene, world) for scene in scenes} | {"a red circle right of a blue star", "an orange heart"}))
    found = measure_retrieval(parts, 8, tmp_path / "captions.txt", shortlists=(3,), budgets=(2, 4), scorer="likelihood", folder=tmp_path / "index")
    assert {row["budget"] for row in found["rows"]} == {0, 1} and found["run"]["scorer"] == "likelihood"
    (tmp_path / "foreign.txt").write_text("an orange heart\n")
    with pytest.raises(UserError, match="None of the captions"): measure_retrieval(parts, 8, tmp_path / "foreign.txt", shortlists=(1,), folder=tmp_path / "other")
    (tmp_path / "strange.txt").write_text("a zebra\n")
    with pytest.raises(UserError, match="zebra"): measure_retrieval(parts, 8, tmp_path / "strange.txt", shortlists=(1,), folder=tmp_path / "third")


def test_pictures_of_several_sizes(parts):
    scorers = load_scorers(parts, "denoising, contrastive")
    index = CaptionIndex.build(gallery(parts.world, 200), parts.contrastive).use("flat")
    image = batch(parts.world, 1_000_003, [1])["images"][0]
    large = F.interpolate(image[None], scale_factor=2)[0]
    rows = retrieve_pictures(index, parts.contrastive, scorers["denoising"], [image, large], ["a", "b"], shortlist=5, budget=1, top=3)
    assert [(row["images"], row["rank"]) for row in rows] == [(name, rank) for name in "ab" for rank in (1, 2, 3)]
    assert all(row["value"] == row["denoising"] for row in rows) and rows[0]["value"] >= rows[1]["value"] >= rows[2]["value"]
    searched = retrieve_pictures(index, parts.contrastive, scorers["denoising"], [image], ["a"], shortlist=5, budget=1, weight=0.0)
    assert [row["search_rank"] for row in searched] == [1, 2, 3, 4, 5]


def test_published_towers_search_and_published_pipelines_read_again(parts, tmp_path):
    from vugen.understand.pipelines import tiny_pipeline
    from vugen.understand.pretrained import save_pair_miniature
    save_pair_miniature("clip", tmp_path / "clip")
    tiny_pipeline("epsilon").save_pretrained(tmp_path / "sd")
    found = measure_retrieval(parts, 8, 300, "hnsw", shortlists=(3,), budgets=(1, 2), encoder=f"clip:{tmp_path / 'clip'}", scorer=f"diffusion:{tmp_path / 'sd'}", folder=tmp_path / "index")
    assert (found["run"]["encoder"], found["run"]["scorer"]) == ("clip:clip", "diffusion:sd") and found["run"]["cost"]["calls"] == 8 * 3 * 2 and str(tmp_path) not in json.dumps(found)
    assert {row["category"] for row in found["rows"]} == {"hnsw", "diffusion:sd", "cosine + diffusion:sd", "diffusion:sd, racing 0.05"}
    save_pair_miniature("clip", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another model"): measure_retrieval(parts, 8, 300, shortlists=(3,), budgets=(1,), encoder=f"clip:{tmp_path / 'other'}", folder=tmp_path / "index")
