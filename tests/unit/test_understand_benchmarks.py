"The rules of the binding benchmarks against brute force and scorers of known ability; suites, rows and files."
import itertools
import json

import pytest
import torch

from vugen.data.foils import FOIL_KINDS
from vugen.data.scenes import World
from vugen.errors import UserError
from vugen.understand.benchmarks import CHANCE, ONE_WAY, BindingItem, Pivot, Suite, SuiteResult, plot_rows, run_bind, run_suite, save_records, scene_suite, winoground_scores
from vugen.understand.scorers import BagOfWordsScorer, PairScorer, PerfectScorer, RandomScorer, WordSpotter, word_shuffled


def slow_rules(item):
    "The rules of FACTS section 3, written out one number at a time"
    (c0i0, c1i0), (c0i1, c1i1) = item  # item[image][caption]
    text = c0i0 > c1i0 and c1i1 > c0i1
    image = c0i0 > c0i1 and c1i1 > c1i0
    return {"text": text, "image": image, "group": text and image, "pair": c0i0 > c1i0, "group_match": c0i0 + c1i1 > c1i0 + c0i1}


def test_every_order_of_four_scores():
    "All 4^4 items over four values, ties included"
    items = [[[a, b], [c, d]] for a, b, c, d in itertools.product(range(4), repeat=4)]
    found = winoground_scores(items)
    for name in CHANCE: assert found[name].tolist() == [slow_rules(item)[name] for item in items]


def test_chance_levels_are_those_of_all_orders_without_ties():
    items = [[[a, b], [c, d]] for a, b, c, d in itertools.permutations(range(4))]
    found = winoground_scores(items)
    for name in ("text", "image", "group", "pair"): assert found[name].double().mean().item() == pytest.approx(CHANCE[name])


def test_group_match_chance_is_half():
    noise = torch.randn(40_000, 2, 2, generator=torch.Generator().manual_seed(1))
    assert winoground_scores(noise)["group_match"].double().mean().item() == pytest.approx(.5, abs=.01)


def test_mean_of_items_is_not_mean_of_comparisons():
    "Averaging the two comparisons of an item would report 50 for a random scorer"
    noise = torch.randn(20_000, 2, 2, generator=torch.Generator().manual_seed(2))
    averaged = ((noise[:, 0, 0] > noise[:, 0, 1]).double() + (noise[:, 1, 1] > noise[:, 1, 0]).double()) / 2
    assert averaged.mean().item() == pytest.approx(.5, abs=.01) and winoground_scores(noise)["text"].double().mean().item() == pytest.approx(.25, abs=.01)


@pytest.mark.parametrize("shape", [(4,), (3, 2, 3), (2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="n, 2, 2"): winoground_scores(torch.zeros(shape))


def test_a_score_that_is_not_a_number_is_refused():
    matrix = torch.zeros(3, 2, 2)
    matrix[1, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="item 1"): winoground_scores(matrix)


def test_infinite_scores_are_ordered():
    assert winoground_scores([[[0., -float("inf")], [-float("inf"), 0.]]])["group"].item()


@pytest.fixture(scope="module")
def suite(): return scene_suite(n=12, seed=3)


def planted(kind, suite):
    known = [(picture, scene) for index, scenes in enumerate(suite.scenes) for picture, scene in zip(suite.pictures([index])[0], scenes) if scene]
    return kind(torch.stack([picture for picture, _ in known]), [scene for _, scene in known])


def test_suite_is_a_pure_function(suite):
    again = scene_suite(n=12, seed=3)
    assert again.items == suite.items and torch.equal(again.pictures([5, 50]), suite.pictures([5, 50]))
    assert scene_suite(n=12, seed=4).items != suite.items
    longer = scene_suite(n=14, seed=3)
    assert [item for item in longer.items if int(item.key.split("/")[-1]) < 12] == suite.items


def test_the_two_pictures_and_captions_differ(suite):
    assert {item.category for item in suite.items} == set(FOIL_KINDS)
    for index, item in enumerate(suite.items):
        first, second = suite.pictures([index])[0]
        assert item.captions[0] != item.captions[1]
        assert torch.equal(first, second) == (suite.scenes[index][1] is None)
        assert item.one_way or not torch.equal(first, second)


def test_perfect_scorer_wins_everything(suite):
    rows = run_suite(planted(PerfectScorer, suite), suite, batch_size=7).rows()
    assert all(row["value"] == 1 and row["high"] == 1 and row["low"] > .5 for row in rows)
    assert {row["category"] for row in rows} == {*FOIL_KINDS, "all"}
    assert {row["metric"] for row in rows if row["category"] in (*ONE_WAY, "shuffle")} == {"pair"}


def test_word_spotter_cannot_bind(suite):
    value = {(row["category"], row["metric"]): row["value"] for row in run_suite(planted(WordSpotter, suite), suite).rows()}
    assert all(value[kind, "pair"] == 0 for kind in ("swap-attribute", "swap-object", "replace-relation", "shuffle"))
    assert value["replace-object", "pair"] > .5 and value["replace-attribute", "pair"] > .5


def test_blind_scorers_win_no_text_image_or_group(suite):
    blind = BagOfWordsScorer([caption for item in suite.items for caption in item.captions])
    rows = run_suite(blind, suite).rows()
    assert all(row["value"] == 0 for row in rows if row["metric"] in ("text", "image", "group", "group_match"))
    value = {(row["category"], row["metric"]): row["value"] for row in rows}
    assert value["add-object", "pair"] == 1  # the longer caption is less likely: no picture needed
    assert value["swap-object", "pair"] == 0  # the same words tie, and a tie is no win


def test_sorted_words_lose_all_swaps(suite):
    class Length(PairScorer):
        "Reads captions in full, order included, and hashes them: different text, different score"
        name = "hash"
        def score_pairs(self, images, captions): return torch.tensor([float(sum(place * ord(letter) for place, letter in enumerate(caption))) for caption in captions])
    swaps = Suite("swaps", [item for item in suite.items if item.category == "swap-object"], lambda indices: torch.zeros(len(indices), 2, 3, 4, 4))
    open_eyed, deaf = (run_suite(scorer, swaps).matrix for scorer in (Length(), word_shuffled(Length())))
    same_words = [sorted(item.captions[0].split()) == sorted(item.captions[1].split()) for item in swaps.items]
    assert any(same_words) and not any(deaf[index, 0, 0] != deaf[index, 0, 1] for index, same in enumerate(same_words) if same)
    assert (open_eyed[:, 0, 0] != open_eyed[:, 0, 1]).any()


def test_batches_do_not_matter(suite):
    scorer = planted(WordSpotter, suite)
    seen = []
    whole, parts = run_suite(scorer, suite, batch_size=1000), run_suite(scorer, suite, batch_size=5, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(whole.matrix, parts.matrix)
    assert seen[-1] == (len(suite), len(suite)) and len(seen) == -(-len(suite) // 5)


def test_rows_have_the_agreed_columns_and_intervals(suite):
    rows = run_suite(RandomScorer(), suite).rows()
    for row in rows:
        assert list(row) == ["scorer", "suite", "category", "metric", "value", "low", "high", "n", "chance"]
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1 and row["n"] in (12, 60)
    json.dumps(rows)


def test_records_can_be_judged_again(suite, tmp_path):
    result = run_suite(RandomScorer(), suite)
    records = json.loads(result.save(tmp_path / "deep" / "items.json").read_text())
    matrix = [[[record[f"score_image{image}_caption{caption}"] for caption in range(2)] for image in range(2)] for record in records]
    for name, won in winoground_scores(matrix).items():
        assert all(record[name] in (None, bool(value)) for record, value in zip(records, won))
    assert all((record["text"] is None) == item.one_way for record, item in zip(records, suite.items))
    import pyarrow.parquet
    assert pyarrow.parquet.read_table(result.save(tmp_path / "items.parquet")).to_pylist() == records


def test_nothing_half_written(tmp_path):
    with pytest.raises(UserError, match="csv"): save_records([{"a": 1}], tmp_path / "items.csv")
    with pytest.raises(TypeError): save_records([{"a": object()}], tmp_path / "items.json")
    assert not list(tmp_path.iterdir())


def test_pivot_shows_every_cell_and_survives_gaps():
    rows = [dict(scorer=name, suite="s", category=category, metric="text", value=.5, low=.4, high=.6, n=9, chance=.25) for name, category in (("a", "x"), ("a", "y"), ("b", "x"))]
    lines = str(Pivot(rows)).splitlines()
    assert len(lines) == 4 and lines[0].count("|") == lines[3].count("|") == 5 and "50.0 [40, 60]" in lines[2]


def test_plot_has_a_bar_for_every_row():
    import matplotlib
    matplotlib.use("Agg")
    rows = SuiteResult("r", "s", [BindingItem(kind, str(index), ("a", "b")) for index, kind in enumerate("xxy")], torch.rand(3, 2, 2)).rows()
    axis = plot_rows(rows, "group")
    assert len(axis.patches) == 3  # x, y and all
    matplotlib.pyplot.close(axis.figure)


@pytest.mark.parametrize("arguments, words", [({"suite": "aro"}, "'aro'"), ({"limit": 0}, "limit is 0"), ({"scorers": "clip"}, "'clip'"), ({"root": "/nowhere/at/all"}, "/nowhere/at/all")])
def test_bad_requests_are_one_sentence(arguments, words, tmp_path):
    root = {"root": tmp_path} if "root" not in arguments else {}
    with pytest.raises(UserError, match=words): run_bind(**{**root, **arguments})


def test_bind_puts_scorers_on_the_device_and_records_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    from vugen.understand import benchmarks
    from vugen.understand.scorers import RandomScorer
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "vlm" / "run.json").write_text(json.dumps({"world": World().asdict()}))
    asked = []
    monkeypatch.setattr(benchmarks, "load_scorers", lambda parts, names, device: asked.append(str(device)) or {"random": RandomScorer()})
    run = run_bind(root=tmp_path, limit=1, seed=4, device=torch.device("cpu"), command="vugen bind")["run"]
    assert asked == ["cpu"] and run["device"] == "cpu" and run["command"] == "vugen bind" and run["seed"] == 4
    assert list(run["checkpoints"]) == ["vlm"] and "weights" not in run and "torch" in run["versions"]


def test_a_world_that_allows_no_swap_is_refused():
    with pytest.raises(UserError): scene_suite(World(shapes=("circle",), colors=("red",), counts={1: 1.}), kinds=["swap-attribute"], n=1)


def test_bind_asks_about_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    from vugen.data.scenes import holds, parse
    from vugen.understand import benchmarks
    made, world = [], World(held_out=("red circle",))
    (tmp_path / "contrastive").mkdir()
    (tmp_path / "contrastive" / "run.json").write_text(json.dumps({"world": world.asdict()}))
    monkeypatch.setattr(benchmarks, "load_scorers", lambda parts, names, device: {"random": RandomScorer()})
    monkeypatch.setattr(benchmarks, "scene_suite", lambda *rest, **options: made.append(scene_suite(*rest, **options)) or made[-1])
    found = run_bind(root=tmp_path, scorers="random", limit=4)
    assert len(made[0]) == 4 * len(FOIL_KINDS) and all(holds(first, parse("red circle")) for first, _ in made[0].scenes)
    assert found["run"]["world"]["split"] == "test"


SCRIPT = """
import os, signal
from vugen.understand import benchmarks
from vugen.understand.scorers import BagOfWordsScorer
class Mortal(BagOfWordsScorer):
    asked = 0
    def score_items(self, images, captions):
        self.asked += 1
        if self.asked > int(deaths):
            assert __name__ == "__main__", "what is known was asked again"  # not the process of the tests
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score_items(images, captions) * images.mean((2, 3, 4))[:, :, None]
load, benchmarks.load_scorers = benchmarks.load_scorers, lambda parts, names, device: {"mortal": Mortal(["a red circle"], "mortal")}
try: rows = benchmarks.run_bind(root=root, limit=20, seed=4, items=items or None)["rows"]
finally: benchmarks.load_scorers = load
"""


def world_folder(root, **dials):
    (root / "contrastive").mkdir(parents=True, exist_ok=True)
    (root / "contrastive" / "run.json").write_text(json.dumps({"world": World(**dials).asdict()}))
    return root


@pytest.mark.parametrize("named", [True, False])
def test_a_killed_run_on_scenes_ends_with_the_same_numbers(named, tmp_path, monkeypatch):
    import subprocess
    import sys
    from vugen.understand.published import rows_from_items
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    root, items = world_folder(tmp_path / "root"), str(tmp_path / "i.parquet") if named else ""
    def here(items, deaths):
        names = {"root": str(root), "items": str(items), "deaths": deaths, "__name__": "here"}
        exec(SCRIPT, names)
        return names["rows"]
    killed = subprocess.run([sys.executable, "-c", f"import sys; root, items, deaths = sys.argv[1:]\n{SCRIPT}", str(root), items, "2"])
    assert killed.returncode == -9 and not (tmp_path / "i.parquet").exists()
    resumed, whole = here(items, 1), here(tmp_path / "whole.parquet", 3)  # 160 items are three batches
    file = tmp_path / "i.parquet" if named else next((tmp_path / "cache" / "bind").glob("scenes-*.parquet"))
    assert resumed == whole == rows_from_items(file)["rows"] == rows_from_items(tmp_path / "whole.parquet")["rows"] and len(whole) > 20
    assert [each for each in sorted(file.parent.iterdir()) if "part" in each.suffix or each.name.startswith(".")] == []


def test_rows_of_stored_scenes_are_those_of_a_suite_run_at_once(tmp_path, monkeypatch):
    from vugen.understand import benchmarks
    from vugen.understand.published import rows_from_items
    root = world_folder(tmp_path)
    words = BagOfWordsScorer(["a red circle left of a blue square"])
    class Seeing(PairScorer):
        name = "seeing"
        def score_pairs(self, images, captions): return words.score_pairs(None, captions) * images.flatten(1).var(1)
    monkeypatch.setattr(benchmarks, "load_scorers", lambda parts, names, device: {"seeing": Seeing(), "bag-of-words": words})
    found = run_bind(root=root, limit=6, seed=3, items=tmp_path / "i.parquet")
    suite = scene_suite(benchmarks.replace(World(), split="test"), n=6, seed=3)
    assert found["rows"] == [row for scorer in (Seeing(), words) for row in run_suite(scorer, suite).rows()] == rows_from_items(tmp_path / "i.parquet")["rows"]
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    run_bind(root=root, limit=2, seed=3, items=tmp_path / "i.json")
    assert len(json.loads((tmp_path / "i.json").read_text())) == 2 * 2 * len(FOIL_KINDS)
    monkeypatch.setattr(Seeing, "score_pairs", None)  # nothing is asked a second time
    assert run_bind(root=root, limit=6, seed=3, items=tmp_path / "i.parquet")["rows"] == found["rows"]
    small = run_bind(root=root, limit=2, seed=3, items=tmp_path / "i.parquet")
    assert small["rows"][0]["n"] == 2 and rows_from_items(tmp_path / "i.parquet")["rows"] == small["rows"] and run_bind(root=root, limit=6, seed=3, items=tmp_path / "i.parquet")["rows"] == found["rows"]


def test_scenes_of_another_world_or_seed_are_scored_again(tmp_path, monkeypatch):
    from vugen.understand import benchmarks
    asked = []
    class Counts(RandomScorer):
        def score_pairs(self, images, captions): asked.append(len(captions)); return super().score_pairs(images, captions)
    monkeypatch.setattr(benchmarks, "load_scorers", lambda parts, names, device: {"random": Counts()})
    for dials, seed, fresh in (({}, 1, True), ({}, 1, False), ({}, 2, True), ({"image_size": 16}, 2, True), ({"image_size": 16}, 2, False)):
        asked.clear()
        run_bind(root=world_folder(tmp_path, **dials), limit=2, seed=seed, items=tmp_path / "i.parquet")
        assert bool(asked) == fresh


def test_a_score_that_is_not_a_number_names_scorer_and_item(tmp_path, monkeypatch):
    from vugen.understand import benchmarks
    class Broken(PairScorer):
        name = "broken"
        def score_pairs(self, images, captions): return torch.full((len(captions),), float("nan"))
    monkeypatch.setattr(benchmarks, "load_scorers", lambda parts, names, device: {"broken": Broken()})
    with pytest.raises(UserError, match="'broken'.*swap-attribute/3/0"): run_bind(root=world_folder(tmp_path), limit=1, seed=3, items=tmp_path / "i.parquet")
