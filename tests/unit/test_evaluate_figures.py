"""What a figure shows is what its rows and pictures say; the Pareto front is that of brute force."""
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vugen.errors import UserError
from vugen.evaluate.figures import (FIGURES, Stored, by_group, color_of, draw_stored, footer_of, frechet_of, known_of, line_figure, markdown_table, pack_pictures, pair_up, paper_rows, pareto_front, picture_grid, read_stored, said,
                                    stored_figures, unpack_pictures, wide_table)

TWO, FRECHET = "two objects", "Fréchet-x/16"


def row(group, x, metric, value, category=TWO, spread=0.1, n=50):
    return {"group": group, "x": x, "category": category, "metric": metric, "value": value, "low": None if spread is None else value - spread, "high": None if spread is None else value + spread, "n": n}


def rows_of(metrics, groups=("VUGEN", "REPA"), places=(4, 1, 2), category=TWO):
    random = np.random.default_rng(0)
    return [row(group, x, metric, float(random.uniform(0.2, 0.8)), category, None if metric == FRECHET else 0.1) for metric in metrics for group in groups for x in places]


def drawn(axis): return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def wanted(rows, metric, category=TWO):
    "{group: (x, value)} by x, read from the rows another way."
    found = {}
    for x, group, value in sorted((each["x"], each["group"], each["value"]) for each in rows if each["metric"] == metric and each["category"] == category):
        found.setdefault(group, ([], []))[0].append(x); found[group][1].append(value)
    return found


# ---- lines ------------------------------------------------------------------------------------------------------------------

def test_lines_and_bars_are_the_rows():
    rows = rows_of(("all", FRECHET))
    figure = line_figure(rows, [(TWO, "all", "right"), (TWO, "missing", "nowhere"), (TWO, FRECHET, "distance")], "steps")
    assert [axis.get_title() for axis in figure.axes] == ["right", "distance"] and figure.axes[0].get_xlabel() == "steps"
    assert drawn(figure.axes[0]) == wanted(rows, "all") and drawn(figure.axes[1]) == wanted(rows, FRECHET)
    bars = sorted((segment[0][0], segment[0][1], segment[1][1]) for collection in figure.axes[0].collections for segment in collection.get_segments())
    assert np.allclose(bars, sorted((each["x"], each["low"], each["high"]) for each in rows if each["metric"] == "all"))
    assert not [segment for collection in figure.axes[1].collections for segment in collection.get_segments()]  # nothing is claimed where nothing is known
    with pytest.raises(UserError, match="missing"): line_figure(rows, [(TWO, "missing", "nowhere")], "steps")


def test_a_model_has_its_colour_in_every_figure():
    rows = rows_of(("all",), ("REPA", "VUGEN"))
    lines = {line.get_label(): line.get_color() for line in line_figure(rows, [(TWO, "all", "right")], "steps").axes[0].lines}
    assert lines == {"REPA": color_of("REPA"), "VUGEN": color_of("VUGEN")} and list(by_group(rows)) == ["REPA", "VUGEN"]


@pytest.mark.parametrize("name,metrics", [("fig3", ("all", "colors", "unexplained velocity", FRECHET))])
def test_figure_3_shows_every_metric_over_training(name, metrics):
    rows = rows_of(metrics, ("VUGEN", "Decoupled", "REPA"), (250, 500, 3000))
    figure = draw_stored(Stored(name, rows, run={"scale": "here", "seeds": [0]}))
    assert [drawn(axis) for axis in figure.axes] == [wanted(rows, metric) for metric in (FRECHET, "all", "colors", "unexplained velocity")]
    assert "here" in figure.get_supxlabel() and FRECHET in figure.get_supxlabel() and "Figure 3" in figure.get_suptitle()


def test_figure_7_tells_reconstruction_from_generation_and_doubles_from_tick_to_tick():
    rows = rows_of((FRECHET,), ("",), (1, 2, 4, 32), "scenes") + rows_of((FRECHET, "colors", "unexplained velocity"), ("", "dimension shift"), (1, 2, 4, 32))
    figure = draw_stored(Stored("fig7", rows))
    first, second = figure.axes[:2]
    assert drawn(first) == {"time shift of the preset": wanted(rows, FRECHET, "scenes")[""]} and drawn(second)["dimension shift"] == wanted(rows, FRECHET)["dimension shift"]
    assert first.get_xscale() == "log" and [label.get_text() for label in first.get_xticklabels()] == ["1", "2", "4", "32"]
    assert any("dimension shift" in [text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes if axis.get_legend())


def test_figure_6_has_pictures_above_and_curves_below():
    rows = rows_of((FRECHET,), ("joint", "PCA"), (1, 2), "scenes") + rows_of((FRECHET,), ("joint", "PCA"), (1, 2))
    cells = [{"row": name, "column": "scene 1", "psnr": 20.0} for name in ("original", "PDD, PCA")]
    pictures = [torch.rand(3, 4, 4) for _ in cells]
    figure = draw_stored(Stored("fig6", rows, cells, pictures))
    (shown,) = [axis for axis in figure.axes if axis.images]
    assert [np.allclose(image.get_array(), picture.permute(1, 2, 0)) for image, picture in zip(shown.images, pictures, strict=True)] == [True, True]
    assert [drawn(axis) for axis in figure.axes if axis.lines] == [wanted(rows, FRECHET, "scenes"), wanted(rows, FRECHET)]
    assert len(draw_stored(Stored("fig6", [], cells, pictures)).axes[0].images) == 2 and not [axis for axis in draw_stored(Stored("fig6", rows)).axes if axis.images]


def test_distances_of_two_extractors_do_not_share_an_axis():
    with pytest.raises(UserError, match="several extractors"): frechet_of([row("VUGEN", 1, FRECHET, 1.0), row("VUGEN", 1, "Fréchet-other", 1.0)], TWO)


def test_the_footer_tells_extractor_n_and_seeds():
    text = footer_of([row("VUGEN", 1, FRECHET, 1.0, spread=None, n=200), row("VUGEN", 1, "all", 1.0)], {"scale": "tiny scale", "seeds": [0, 1]})
    assert all(part in text for part in ("tiny scale", FRECHET, "n = 200", "seeds 0, 1", "95% intervals")) and footer_of([], {}) == ""
    assert "spread: mean distance, some-network" in footer_of([row("VUGEN", 1, "mean distance, some-network", 1.0)], {})


# ---- the front --------------------------------------------------------------------------------------------------------------

def front_by_brute_force(points):
    def beaten(mine, other): return other[0] <= mine[0] and other[1] >= mine[1] and (other[0] < mine[0] or other[1] > mine[1])
    return {place for place, mine in enumerate(points) if not any(beaten(mine, other) for other in points)}


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14))
def test_the_pareto_front_is_that_of_brute_force(points):
    front = pareto_front(points)
    assert set(front) == front_by_brute_force(points) and len(set(front)) == len(front)
    assert [points[place] for place in front] == sorted((points[place] for place in front), key=lambda point: point[0])


def test_figure_10_rings_the_front():
    rows = rows_of(("all", FRECHET), ("VUGEN", "Decoupled", "REPA"), (1, 2, 5, 8))
    figure = draw_stored(Stored("fig10", rows))
    assert drawn(figure.axes[0]) == wanted(rows, "all") and drawn(figure.axes[1]) == wanted(rows, FRECHET)
    points = pair_up(rows, (TWO, FRECHET), (TWO, "all"))
    places = front_by_brute_force([(point["realism"], point["consistency"]) for point in points])
    ringed = drawn(figure.axes[2])["Pareto front"]
    assert sorted(zip(*ringed)) == sorted((points[place]["realism"], points[place]["consistency"]) for place in places)
    assert sorted(text.get_text() for text in figure.axes[2].texts) == sorted(["1", "2", "5", "8"] * 3)
    x, y = drawn(figure.axes[2])["REPA"]
    assert (x, y) == (wanted(rows, FRECHET)["REPA"][1], wanted(rows, "all")["REPA"][1])


def test_points_that_one_measure_lacks_are_left_out():
    rows = [row("VUGEN", 1, "all", 0.5), row("VUGEN", 1, FRECHET, 10.0, spread=None), row("VUGEN", 2, "all", 0.6)]
    assert [(point["x"], point["realism"], point["low"]) for point in pair_up(rows, (TWO, FRECHET), (TWO, "all"))] == [(1, 10.0, 0.4)]


# ---- pictures ---------------------------------------------------------------------------------------------------------------

def test_every_picture_stands_where_its_cell_says():
    cells = [{"row": row, "column": column, **more} for row, column, more in (("b", "x", {"psnr": 20.06}), ("a", "y", {"right": False}), ("b", "y", {"right": True}))]
    pictures = [torch.rand(3, 5, 5) for _ in cells]
    axis = picture_grid(cells, pictures).axes[0]
    words = {text.get_text(): text.get_position() for text in axis.texts}
    assert {*words} == {"x", "y", "a", "b", "20.1 dB", "✗", "✓"} and words["x"][0] < words["y"][0] and words["b"][1] > words["a"][1]
    for cell, picture, image in zip(cells, pictures, axis.images, strict=True):
        left, right, low, high = image.get_extent()
        assert np.allclose(image.get_array(), picture.permute(1, 2, 0)) and left < words[cell["column"]][0] < right and low < words[cell["row"]][1] < high
        assert words[known_of(cell)] == pytest.approx(((left + right) / 2, low - 0.02))
    assert [known_of(cell) for cell in cells] == ["20.1 dB", "✗", "✓"]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
def test_a_sheet_keeps_pictures_bit_for_bit(number, size, seed):
    pictures = (torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255
    assert torch.equal(unpack_pictures(pack_pictures(pictures)), pictures)


def test_sheets_that_are_none_are_refused():
    with pytest.raises(UserError, match="no row of square"): unpack_pictures(Image.new("RGB", (7, 3)))
    with pytest.raises(UserError, match="no picture"): pack_pictures(torch.zeros(0, 3, 4, 4))


def test_a_damaged_stored_figure_names_the_file(tmp_path):
    with pytest.raises(UserError, match="rows.json cannot be read"): read_stored(tmp_path)
    content = {"figure": "fig9", "rows": [], "run": {}, "notes": {}, "cells": [{"sheet": "vugen", "place": 1, "row": "a", "column": "b"}]}
    (tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="vugen.png cannot be read"): read_stored(tmp_path)
    (tmp_path / "pieces").mkdir()
    pack_pictures(torch.zeros(1, 3, 4, 4)).save(tmp_path / "pieces/vugen.png")
    with pytest.raises(UserError, match="not in its pieces"): read_stored(tmp_path)


# ---- tables -----------------------------------------------------------------------------------------------------------------

def test_the_papers_numbers_are_its_tables_not_its_abstracts():
    found = {(each["method"], each["metric"]): each["value"] for each in paper_rows("table1")}
    assert [found["VUGEN", f"{name}, StockMix"] for name in ("FID ↓", "CLIP ↑", "DPG ↑", "GenEval ↑")] == [9.07, 27.45, 74.15, 56.81]
    assert [found["REPA", f"{name}, ImageNet"] for name in ("FID ↓", "CLIP ↑", "density ↑", "coverage ↑")] == [5.40, 25.89, 72.12, 17.14]
    assert {each["value"] for each in paper_rows("table2") if each["method"].startswith("VUGEN")} == {9.07, 0.57, 74.15, 6.77, 0.61, 76.97}
    assert {each["value"] for each in paper_rows("table3") if each["method"] == "VUGEN"} == {1546.2, 75.8, 32.1}
    assert [len(paper_rows(name)) for name in ("table1", "table2", "table3")] == [24, 43, 43] and all(each["source"].startswith("VUGEN, table") for each in paper_rows("table2"))
    with pytest.raises(UserError, match="no table 'table9'"): paper_rows("table9")


def test_ours_stand_in_lines_and_columns_of_their_own():
    mine = {"by": "ours", "source": "s", "method": "VUGEN", "model": "tiny", "metric": FRECHET, "value": 215.702, "low": 200.0, "high": 230.0, "n": 1200}
    lines = wide_table(paper_rows("table3") + [mine])
    assert [*lines[0]] == ["by", "method", "model", "MME-P ↑", "MMB ↑", "MMMU ↑", FRECHET] and sum(line["by"] == "ours" for line in lines) == 1
    assert said(mine) == "215.7 [200, 230] (n = 1,200)" and lines[-1]["MMB ↑"] == "" and all(line[FRECHET] == "" for line in lines[:-1])
    assert markdown_table([mine]).count("\n") == 2 and markdown_table([]) == "No rows." and "| 0.80 |" in markdown_table(paper_rows("table2"))
    cells = {place: cell.get_text().get_text() for place, cell in draw_stored(Stored("table3", paper_rows("table3") + [mine])).axes[0].tables[0].get_celld().items()}
    assert cells[len(lines), 0] == "ours" and " ".join(cells[len(lines), 6].split()) == said(mine) and cells[1, 4] == "75.2"


# ---- what came with the package -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(FIGURES))
def test_stored_figures_can_be_drawn_without_a_model(name):
    stored = read_stored(stored_figures() / name)
    assert stored.name == name and (stored.rows or stored.cells) and len(stored.pictures) == len(stored.cells)
    assert draw_stored(stored).axes and (stored_figures() / name / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert all(np.isfinite(each["value"]) for each in stored.rows)


def test_stored_figures_are_small():
    assert sum(path.stat().st_size for path in stored_figures().rglob("*") if path.is_file()) < 2_000_000


# ---- what a foot says is true of what is drawn -------------------------------------------------------------------------------

def test_no_bars_are_claimed_where_none_are_drawn():
    rows = rows_of((FRECHET,), ("joint", "PCA"), (1, 2), "scenes") + rows_of((FRECHET, "all"), ("joint", "PCA"), (1, 2))  # "all" has intervals and is not in figure 6
    def foot(name, rows, **more): return draw_stored(Stored(name, rows, run={"seeds": [0]}, **more))._supxlabel.get_text().replace("\n", " ")
    assert "bars" not in foot("fig6", rows) and "without an interval" in foot("fig6", rows) and "equal n" in foot("fig6", rows)
    assert "bars: 95% intervals over items, of one training" in foot("fig3", rows)
    known = [{**each, "low": each["value"] - 0.1, "high": each["value"] + 0.1} for each in rows]
    assert "bars" in foot("fig6", known) and "without an interval" not in foot("fig6", known)
    assert "missing here: LDM, PCA" in foot("fig6", rows, notes={"LDM, PCA": "train it"})


def test_headings_of_tables_keep_words_whole():
    figure = draw_stored(read_stored(stored_figures() / "table1"))
    heads = " ".join(cell.get_text().get_text() for (row, _), cell in figure.axes[0].tables[0].get_celld().items() if row == 0).split()
    assert "efficientnet-" in heads and not any(head.endswith("effi") for head in heads)


def test_the_foot_of_figure_6_lies_below_its_axes():
    figure = draw_stored(read_stored(stored_figures() / "fig6"))
    figure.savefig(io.BytesIO())  # lays it out
    top = figure._supxlabel.get_window_extent().y1
    assert all(axis.xaxis.label.get_window_extent().y0 >= top for axis in figure.axes if axis.lines)


def test_figure_5_claims_brackets_and_has_them():
    figure = draw_stored(read_stored(stored_figures() / "fig5"))
    assert "brackets: 95% intervals" in figure._supxlabel.get_text().replace("\n", " ") and sum("[" in text.get_text() for axis in figure.axes for text in axis.texts) == 6
