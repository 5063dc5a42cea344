"""`vugen figure`: nothing is painted twice, what is missing is named with its command, and the stored files draw the figure again."""
import json
import shutil

import pytest
import torch

from vugen.evaluate.figures import draw_stored, read_stored, stored_figures
from vugen.lab import paper
from vugen.lab.cli import main
from vugen.lab.paper import PAINTERS, Figure, Maker, Piece, ablation_rows, pieces_of, table1_rows, table2_rows
from vugen.paths import checkpoints_dir
from vugen.train import ablations
from vugen.train.presets import load_preset

ROOT = checkpoints_dir()


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    "The program, its exit code and what it said; no ablations but those of the package."
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    def run(*words):
        with pytest.raises(SystemExit) as left: main([str(word) for word in words])
        return left.value.code or 0, capsys.readouterr()
    return run


@pytest.fixture
def fake(monkeypatch):
    "Painters that cost nothing; the pieces that they were asked for."
    asked = []
    def paint(piece, preset, root, seed, device):
        asked.append((piece.name, seed))
        number = len(piece.settings.get("prompts", [0, 1])) * piece.settings.get("each", 1)
        return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), [{"row": piece.name, "column": str(place), "right": True} for place in range(number)], []
    for kind in PAINTERS: monkeypatch.setitem(PAINTERS, kind, paint)
    return asked


def never(*words, **more): raise AssertionError("painted again")


def test_a_figure_of_pictures_from_end_to_end(call, monkeypatch, tmp_path):
    out = tmp_path / "figures"
    code, said = call("figure", "fig9", "--preset", "smoke", "--root", ROOT, "--out", out, "--json", tmp_path / "rows.json")
    assert code == 0 and "fig9" in said.out
    stored = read_stored(out / "fig9")
    assert len(stored.cells) == 48 and {(cell["row"], cell["column"]) for cell in stored.cells} == {(color, shape) for color in load_preset("smoke").world["colors"] for shape in load_preset("smoke").world["shapes"]}
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [{"figure": "fig9", **cell} for cell in stored.cells]
    from vugen.generate.text_to_image import TextToImage
    model = TextToImage.from_pretrained(ROOT)
    own = model.images([stored.cells[5]["prompt"]], seed=0, first=5, num_inference_steps=2)[0]
    assert (own - stored.pictures[5]).abs().max() <= 0.51 / 255  # picture 5 is a function of the seed and its place
    before = (out / "fig9/pieces/vugen.png").read_bytes()
    for kind in PAINTERS: monkeypatch.setitem(PAINTERS, kind, never)
    code, said = call("figure", "fig9", "--preset", "smoke", "--root", ROOT, "--out", out)
    assert code == 0 and (out / "fig9/pieces/vugen.png").read_bytes() == before
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json")) and str(ROOT) not in "".join(path.read_text() for path in out.rglob("*.json"))
    assert draw_stored(read_stored(out / "fig9")).axes


def test_pieces_are_painted_once_and_anew_for_another_seed_or_other_weights(call, fake, monkeypatch, tmp_path):
    words = ("figure", "fig9", "--preset", "smoke", "--root", ROOT, "--out", tmp_path / "figures")
    for more in ((), (), ("--seed", 3), ("--seed", 3)): assert call(*words, *more)[0] == 0
    assert fake == [("VUGEN", 0), ("VUGEN", 3)]
    monkeypatch.setattr(Maker, "weights", lambda self, piece: {"generator": "other"})
    assert call(*words, "--seed", 3)[0] == 0 and len(fake) == 3
    assert call("figure", "fig9", "--preset", "smoke", "--seed", 3, "--out", tmp_path / "figures")[0] == 0 and len(fake) == 3  # without --root any weights serve


def test_a_kill_between_pictures_and_record_leaves_no_piece(call, fake, monkeypatch, tmp_path):
    words = ("figure", "fig4", "--preset", "smoke", "--root", ROOT, "--out", tmp_path / "figures")
    monkeypatch.setattr(paper, "write_json", lambda path, content: (_ for _ in ()).throw(KeyboardInterrupt) if path.parent.name == "pieces" else None)
    assert call(*words)[0] == 130 and (tmp_path / "figures/fig4/pieces/vugen.png").is_file()
    monkeypatch.undo()
    for kind in PAINTERS: monkeypatch.setitem(PAINTERS, kind, lambda piece, *rest: fake.append(piece.name) or (torch.zeros(6, 3, 8, 8), [{"row": piece.name, "column": str(place)} for place in range(6)], []))
    assert call(*words)[0] == 0 and fake[-1] == "VUGEN"


@pytest.mark.parametrize("path, content", [("vugen.png", b"\x89PNG\r\n"), ("vugen.png", b""), ("vugen.json", b"[1, 2]"), ("vugen.json", b"{"), ("vugen.json", b'{"spec": 3}')])
def test_a_damaged_piece_is_painted_again(call, fake, tmp_path, path, content):
    words = ("figure", "fig4", "--preset", "smoke", "--root", ROOT, "--out", tmp_path / "figures")
    assert call(*words)[0] == 0
    before = len(fake)
    (tmp_path / "figures/fig4/pieces" / path).write_bytes(content)
    assert call(*words)[0] == 0 and fake[before:] == [("VUGEN", 0)] and read_stored(tmp_path / "figures/fig4").cells


@pytest.mark.parametrize("content", ["{}", "[]", '{"ablation": "ratio"}', "{"])
def test_a_plan_of_something_else_is_one_sentence(call, tmp_path, content):
    (tmp_path / "runs/guidance").mkdir(parents=True)
    (tmp_path / "runs/guidance/plan.json").write_text(content)
    code, said = call("figure", "fig10", "--runs", tmp_path / "runs", "--out", tmp_path / "figures")
    assert code == 2 and "runs/guidance" in said.err and said.err.count("\n") == 1 and "--out" not in said.err


def test_what_a_root_lacks_is_named_with_its_command(call, fake, tmp_path):
    out = tmp_path / "figures"
    code, said = call("figure", "fig4", "--preset", "smoke", "--root", ROOT, "--out", out)
    assert code == 0 and "vugen train generator-decoupled" in said.out and "vugen train generator-repa" in said.out and [name for name, _ in fake] == ["VUGEN"]
    notes = json.loads((out / "fig4/rows.json").read_text())["notes"]
    assert set(notes) == {"Decoupled", "REPA"} and str(ROOT) not in json.dumps(notes)
    code, said = call("figure", "fig2", "--preset", "smoke", "--root", ROOT, "--out", out)
    assert code == 2 and said.err.count("\n") == 1 and "model.ratio=1" in said.err and "decoder-full" in said.err
    (tmp_path / "empty").mkdir()
    for name in ("fig5", "fig9", "table3"):
        code, said = call("figure", name, "--preset", "smoke", "--root", tmp_path / "empty", "--out", out)
        assert code == 2 and said.err.count("\n") == 1 and "vugen train" in said.err, name


def test_stored_pictures_serve_where_the_root_lacks_the_model(call, monkeypatch, tmp_path):
    for kind in PAINTERS: monkeypatch.setitem(PAINTERS, kind, never)
    code, said = call("figure", "fig4", "--out", tmp_path / "figures")
    assert code == 0 and {cell["row"] for cell in read_stored(tmp_path / "figures/fig4").cells} == {"VUGEN", "Decoupled", "REPA"}
    for path in (stored_figures() / "fig4/pieces").iterdir(): assert (tmp_path / "figures/fig4/pieces" / path.name).read_bytes() == path.read_bytes()


def test_missing_ablations_and_points_are_named(call, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "stored_rows", lambda *words: None)
    code, said = call("figure", "fig7", "--out", tmp_path / "figures")
    assert code == 2 and said.err.count("\n") == 1 and "`vugen ablate ratio --preset tiny` makes it" in said.err
    monkeypatch.undo()
    whole = ablations.stored_rows("ratio", "tiny")
    monkeypatch.setattr(ablations, "stored_rows", lambda *words: {**whole, "rows": [row for row in whole["rows"] if row["variant"] not in ("r = 4", "r = 32")]})
    rows, _, notes = ablation_rows("ratio", "tiny")
    (what,) = notes
    assert what.startswith("2 of 7 variants") and "r = 4, r = 32" in what and {row["x"] for row in rows} == {1, 2, 8, 16}
    code, said = call("figure", "fig7", "--out", tmp_path / "figures")
    assert code == 0 and "r = 4, r = 32" in said.out and json.loads((tmp_path / "figures/fig7/rows.json").read_text())["notes"] == notes


def test_an_ablation_in_a_named_folder_goes_before_the_packages(call, tmp_path):
    runs, whole = tmp_path / "runs", ablations.stored_rows("ratio", "tiny")
    (runs / "ratio/points/a").mkdir(parents=True)
    (runs / "ratio/plan.json").write_text(json.dumps({"ablation": "ratio"}))
    point = {"seconds": 1.0, "trained": {}, "environment": {}, "rows": [row for row in whole["rows"] if row["variant"] == "r = 2"]}
    (runs / "ratio/points/a/generation-seed-0.json").write_text(json.dumps(point))
    code, said = call("figure", "fig7", "--runs", runs, "--out", tmp_path / "figures")
    assert code == 0 and {row["x"] for row in read_stored(tmp_path / "figures/fig7").rows} == {2} and "6 of 7 variants" in said.out
    assert call("figure", "fig7", "--runs", tmp_path / "nowhere", "--out", tmp_path / "figures")[0] == 2


def test_all_draws_what_it_can_and_says_what_it_cannot(call, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "stored_rows", lambda name, *words, known=ablations.stored_rows: None if name == "curves" else known(name, *words))
    code, said = call("figure", "all", "--out", tmp_path / "figures", "--json", tmp_path / "rows.json")
    assert code == 0 and "vugen ablate curves" in said.out and not fake
    drawn = {path.parent.name for path in (tmp_path / "figures").glob("*/figure.png")}
    assert drawn == {"fig2", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "table1", "table2", "table3"} == {row["figure"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}


def test_wrong_words_are_one_sentence(call, tmp_path):
    (tmp_path / "file").write_text("")
    for words in (("fig1",), ("fig9", "--seed", -1), ("fig9", "--preset", "paper-imagenet"), ("fig9", "--out", tmp_path / "file"), ("fig9", "--root", tmp_path / "no")):
        code, said = call("figure", *words)
        assert code == 2 and said.err.count("\n") == 1 and "Traceback" not in said.err, words


def test_prompts_of_the_figures_are_held_out_and_differ():
    preset = load_preset("tiny")
    four, eight, other = (pieces_of(name, preset, seed)[0].settings["prompts"] for name, seed in (("fig4", 0), ("fig8", 0), ("fig4", 1)))
    assert len({*four, *eight}) == 16 and four != other and [piece.optional for piece in pieces_of("fig4", preset, 0)] == [False, True, True]
    assert all(isinstance(piece, Piece) for name in ("fig2", "fig5", "fig6") for piece in pieces_of(name, preset, 0)) and not pieces_of("table1", preset, 0)


def summary(variant, group, x, metric, value): return {"variant": variant, "group": group, "x": x, "category": "two objects", "metric": metric, "value": value, "low": None, "high": None, "n": 7}


def test_tables_take_equal_steps_and_the_best_guidance_of_each_metric():
    rows = [summary(f"VUGEN, {x}", "VUGEN", x, metric, value) for x, right, distance in ((1.0, 0.2, 9.0), (2.0, 0.5, 5.0), (8.0, 0.7, 30.0)) for metric, value in (("all", right), ("Fréchet-x", distance))]
    rows += [summary("REPA, 1", "REPA", 1.0, "all", 0.9)]
    found = {(row["method"], row["metric"]): (row["value"], row["at"]) for row in table2_rows(rows, {}, "tiny")}
    assert found == {("VUGEN, guidance 2", "prompts drawn right ↑"): (0.5, ""), ("VUGEN, best guidance for each (chosen on these prompts)", "prompts drawn right ↑"): (0.7, "guidance 8"),
                     ("VUGEN, guidance 2", "Fréchet-x ↓"): (5.0, ""), ("VUGEN, best guidance for each (chosen on these prompts)", "Fréchet-x ↓"): (5.0, "guidance 2")}
    work = [{"variant": "REPA", "trained": {"generator-repa": {"stage": "generator-repa", "steps": 3000}}}]
    (row,) = table1_rows([summary("REPA", "", None, "all", 0.5), summary("REPA", "", None, "count", 0.6)], {"work": work}, "tiny")
    assert row["model"] == "tiny; generator-repa 3,000 steps" and row["metric"] == "prompts drawn right ↑" and row["n"] == 7


def test_another_language_model_is_not_called_unchanged(tmp_path):
    from vugen.errors import UserError
    root = tmp_path / "root"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("decoder-*", "lit", "distill", "vae"))
    assert paper.table3_rows(root, "tiny")[-1]["value"] == 1.0
    from safetensors.torch import load_file, save_file
    weights = load_file(root / "vlm/model.safetensors")
    name = next(iter(weights)); weights[name] = weights[name] + 1e-3
    save_file(weights, root / "vlm/model.safetensors")
    with pytest.raises(UserError): paper.table3_rows(root, "tiny")  # the generator refuses it


def test_the_verb_can_be_called_from_a_notebook(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    Figure("fig9", tmp_path / "figures", root=ROOT, preset="smoke")("vugen figure fig9")
    assert "fig9" in capsys.readouterr().out and len(fake) == 1


def test_table_1_stands_in_the_papers_order_with_density_and_coverage():
    rows = [summary(variant, "", None, metric, 0.5) for variant in ("VUGEN", "Decoupled", "REPA") for metric in ("all", "density-x", "coverage-x")]
    found = table1_rows(rows, {"ablation": "checkpoints"}, "tiny")
    assert list(dict.fromkeys(row["method"] for row in found)) == [f"{name}, finished checkpoint (25 sampler steps)" for name in ("Decoupled", "REPA", "VUGEN")] and {row["metric"] for row in found} == {"prompts drawn right ↑", "density-x ↑", "coverage-x ↑"}
    assert not paper.lacks_balls(found, "tiny") and "REPA" in next(iter(paper.lacks_balls(found[:3] + [row for row in found[3:] if "coverage" not in row["metric"]], "tiny")))


def test_table_1_holds_density_and_coverage_of_ours_with_intervals(call, tmp_path):
    assert call("figure", "table1", "--out", tmp_path / "figures")[0] == 0
    stored = read_stored(tmp_path / "figures/table1")
    for method in ("VUGEN, finished checkpoint (25 sampler steps)", "VUGEN", "Decoupled", "REPA"):
        own = {row["metric"]: row for row in stored.rows if row["method"] == method and row["by"] == "ours"}
        assert all(own[name]["low"] < own[name]["value"] < own[name]["high"] for name in ("density-efficientnet-lite0/16 ↑", "coverage-efficientnet-lite0/16 ↑", "Fréchet-efficientnet-lite0/16 ↓")), method
    assert not any("density, coverage" in what for what in stored.notes)


def test_the_spread_of_samples_is_that_of_the_stored_pictures():
    from vugen.evaluate.fidelity import extract_features
    from vugen.encode.encoders import EfficientNetLite0
    from scipy.spatial.distance import pdist
    stored = read_stored(stored_figures() / "fig5")
    for row in (stored.rows[0], stored.rows[-1]):
        pictures = [picture for cell, picture in zip(stored.cells, stored.pictures) if cell["row"] == row["group"]]
        features = extract_features(EfficientNetLite0(), torch.stack(pictures))
        leave = [pdist(features[[other for other in range(8) if other != place]]).mean() for place in range(8)]
        error = (7 / 8 * sum((each - sum(leave) / 8) ** 2 for each in leave)) ** 0.5
        assert row["value"] == pytest.approx(pdist(features).mean(), rel=1e-4) and row["high"] - row["value"] == pytest.approx(2.364624 * error, rel=1e-3)
