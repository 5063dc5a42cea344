"DPG-Bench's rule on cases computed by hand, its list with everything that can be wrong, and runs that are killed."
import csv
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vugen.errors import UserError
from vugen.evaluate.dpg_bench import COLUMNS, DPGItem, Question, check_order, dpg_rows, orphans, question_scores, read_dpg, run_dpg, samples_of
from vugen.evaluate.judgements import JudgementStore

ROWS = [("dog", 1, "0", "entity", "Is there a dog?"), ("dog", 2, "0", "entity", "Is there a cat?"), ("dog", 3, "1", "attribute", "Is the dog brown?"), ("dog", 4, "1, 2", "relation", "Is the dog left of the cat?"),
        ("sky", 1, "0", "global", "Is it a painting?"), ("sky", 2, "1", "attribute", "Is it blue?")]


def write(path, rows=ROWS, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for key, number, parents, broad, question in rows:
            cells = dict(item_id=key, text=f"a picture of {key}, with commas", keywords="", proposition_id=number, dependency=parents, category_broad=broad, category_detailed=f"{broad} detail", tuple=f"{broad} - detail ({number})", question_natural_language=question)
            writer.writerow([cells[name] for name in columns])
    return path


def item_of(parents): return DPGItem("item", "", tuple(Question(number, f"{number}?", tuple(above), "entity", "whole") for number, above in parents.items()))


CASES = [ # parents, answers, scores
    ({1: (), 2: (1,)}, {1: 1, 2: 1}, {1: 1, 2: 1}), ({1: (), 2: (1,)}, {1: 0, 2: 1}, {1: 0, 2: 0}), ({1: (), 2: (1,)}, {1: 1, 2: 0}, {1: 1, 2: 0}),
    ({1: (), 2: (1,), 3: (2,), 4: (3,)}, {1: 0, 2: 1, 3: 1, 4: 1}, {1: 0, 2: 0, 3: 0, 4: 0}), # nested, four deep
    ({4: (3,), 3: (2,), 2: (1,), 1: ()}, {1: 0, 2: 1, 3: 1, 4: 1}, {1: 0, 2: 0, 3: 0, 4: 0}), # children told first
    ({1: (), 2: (), 3: (1, 2), 4: (3,)}, {1: 1, 2: 0, 3: 1, 4: 1}, {1: 1, 2: 0, 3: 0, 4: 0}), # one of two parents
    ({1: (), 2: (), 3: (1,), 4: (1, 3), 5: ()}, {1: 1, 2: 0, 3: 1, 4: 1, 5: 1}, {1: 1, 2: 0, 3: 1, 4: 1, 5: 1}),
    ({2: (1,)}, {2: 1}, {2: 1})] # a proposition that the item lacks


@pytest.mark.parametrize("parents,answers,wanted", CASES)
def test_the_dependency_rule_by_hand(parents, answers, wanted):
    assert question_scores(item_of(parents), {number: bool(answer) for number, answer in answers.items()}) == wanted


@pytest.mark.parametrize("parents", [{1: (1,)}, {1: (2,), 2: (1,)}, {1: (), 2: (1, 4), 3: (2,), 4: (3,)}])
def test_circles_are_refused(parents):
    with pytest.raises(UserError, match="depend on each other in a circle"): check_order(item_of(parents))


def test_a_circle_in_the_list_names_file_and_item(tmp_path):
    write(tmp_path / "loop.csv", [("dog", 1, "2", "entity", "?"), ("dog", 2, "1", "entity", "?")])
    with pytest.raises(UserError, match="loop.csv: the questions 1, 2 of dog"): read_dpg(tmp_path / "loop.csv")


def test_the_list_is_read_as_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    table, items = pandas.read_csv(write(tmp_path / "list.csv")), read_dpg(tmp_path / "list.csv")
    for item, (key, group) in zip(items, table.groupby("item_id", sort=False), strict=True):
        assert item.key == key and item.text == group.text.iloc[0] and [question.text for question in item.questions] == group.question_natural_language.tolist()
        assert [question.number for question in item.questions] == group.proposition_id.tolist()
        assert [question.parents for question in item.questions] == [tuple(int(part) for part in str(cell).split(",") if int(part)) for cell in group.dependency]


def test_the_published_loop_skips_the_first_row(tmp_path):
    whole, cut = read_dpg(write(tmp_path / "list.csv")), read_dpg(tmp_path / "list.csv", published=True)
    assert [len(item.questions) for item in whole] == [4, 2] and [len(item.questions) for item in cut] == [3, 2]
    assert orphans(whole[0]) == [] and orphans(cut[0]) == [3, 4]


@pytest.mark.parametrize("change,said", [
    (lambda text: text.replace("dependency", "depends", 1), "no column 'dependency'"), (lambda text: text.replace("dog,", "", 1), "line 2, has"), (lambda text: text.replace(",0,entity", ",zero,entity", 1), "the dependency 'zero'"),
    (lambda text: text.replace("Is there a dog?", ""), "no question_natural_language"), (lambda text: text.replace(",2,0,", ",1,0,", 1), "line 3, has the proposition 1 of dog for the second time"), (lambda text: text + 'sky,"unfinished', "breaks off"),
    (lambda text: text.splitlines()[0] + "\n", "holds no question"), (lambda text: text.replace("dog,", "../dog,"), "cannot hold a path"), (lambda text: text.rstrip("\n") + ",more\n", "more cells")])
def test_a_broken_list_is_named(tmp_path, change, said):
    path = write(tmp_path / "list.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=said) as error: read_dpg(path)
    assert "list.csv" in str(error.value)


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("a.csv", "nowhere.csv"):
        with pytest.raises(UserError, match=f"{name} cannot be read"): read_dpg(tmp_path / name)


COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}


def board(colors, side=16):
    image = Image.new("RGB", (2 * side, 2 * side))
    for place, color in enumerate(colors): image.paste(COLORS[color], (side * (place % 2), side * (place // 2), side * (place % 2 + 1), side * (place // 2 + 1)))
    return image


class Painted:
    "Answers by the colour of a sample: red says yes to all, blue no to question 1, white no to all, black no to question 2"
    name, fingerprint = "painted", "p"
    asked = 0

    def __call__(self, image, questions):
        self.asked += len(questions)
        low, high = np.array(image.getextrema())[:, 0], np.array(image.getextrema())[:, 1]
        assert (low == high).all() # one sample, cut along its border
        color = {value: name for name, value in COLORS.items()}[tuple(int(value) for value in low)]
        no = {"red": (), "blue": ("dog?", "painting?"), "white": ("?",), "black": ("cat?", "blue?")}[color]
        return [0.2 if any(word in question for word in no) else 0.9 for question in questions]


def drawn(folder):
    folder.mkdir()
    board(["red", "blue", "white", "black"]).save(folder / "dog.png")
    board(["red", "red", "black", "blue"]).save(folder / "sky.png")
    return folder


def test_a_folder_by_hand(tmp_path):
    rows, notes = run_dpg(write(tmp_path / "list.csv"), drawn(tmp_path / "drawn"), answerer := Painted(), JudgementStore(tmp_path / "a.parquet"))
    dog, sky = (4 / 4 + 1 / 4 + 0 + 2 / 4) / 4, (1 + 1 + 1 / 2 + 0) / 4 # blue: only the cat is there; black: the dog and that it is brown
    table = {(row["category"], row.get("level")): row for row in rows}
    assert table["all", None]["value"] == pytest.approx((dog + sky) / 2) and table["all", None]["n"] == 2 and notes == {} and answerer.asked == 24
    assert table["entity", "broad"]["value"] == pytest.approx((2 + 1 + 0 + 1) / 8) and table["attribute", "broad"]["value"] == pytest.approx((1 + 0 + 0 + 1 + 1 + 1 + 0 + 0) / 8)
    assert table["relation detail", "detailed"]["value"] == 1 / 4 and table["all", None]["rule"] == "every row" and table["all", None]["low"] <= (dog + sky) / 2


def test_the_published_loop_by_hand(tmp_path):
    "The first item fails in it; categories are the answers to the last sample, before the rule"
    rows, notes = run_dpg(write(tmp_path / "list.csv"), drawn(tmp_path / "drawn"), Painted(), JudgementStore(tmp_path / "a.parquet"), published=True)
    table = {(row["category"], row.get("level")): row for row in rows}
    assert table["all", None]["value"] == pytest.approx((1 + 1 + 1 / 2 + 0) / 4) and "dog" in notes["first row"] and table["all", None]["rule"] == "published loop"
    assert table["global", "broad"]["value"] == 0 and table["attribute", "broad"]["value"] == 1 # blue: no painting, but blue


def test_answers_are_kept_and_replayed_without_a_model(tmp_path):
    path, folder, store = write(tmp_path / "list.csv"), drawn(tmp_path / "drawn"), JudgementStore(tmp_path / "a.parquet")
    rows = run_dpg(path, folder, Painted(), store)[0]
    again = Painted()
    assert run_dpg(path, folder, again, store)[0] == rows and again.asked == 0 and run_dpg(path, folder, None, store)[0] == rows
    board(["white"] * 4).save(folder / "sky.png")
    with pytest.raises(UserError, match="8 of 24 things .first: sky/0/1."): run_dpg(path, folder, None, store)
    run_dpg(path, folder, again, store)
    assert again.asked == 8 # of the picture that has changed
    assert {"item", "sample", "proposition_id", "question", "yes", "answer"} <= set(store.read()[0])


def test_missing_broken_and_ungridded_pictures(tmp_path):
    path, folder = write(tmp_path / "list.csv", [*ROWS, ("odd", 1, "0", "entity", "?"), ("cut", 1, "0", "entity", "?"), ("gone", 1, "0", "entity", "?")]), drawn(tmp_path / "drawn")
    Image.new("RGB", (31, 32)).save(folder / "odd.png")
    board(["red"] * 4).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    rows, notes = run_dpg(path, folder, Painted(), JudgementStore(tmp_path / "a.parquet"))
    assert rows[0]["n"] == 2 and "1 of 5 (first: gone.png)" in notes["missing pictures"] and notes["pictures left out"].startswith("2 of 4") and "odd.png: a picture of 31×32 pixels is no grid" in notes["pictures left out"]
    for name in ("dog", "sky", "odd"): (folder / f"{name}.png").unlink()
    with pytest.raises(UserError, match="no picture could be used: cut.png"): run_dpg(path, folder, Painted(), JudgementStore(tmp_path / "b.parquet"))
    (folder / "cut.png").unlink()
    with pytest.raises(UserError, match="holds no picture of the list .first wanted: dog.png."): run_dpg(path, folder, Painted(), JudgementStore(tmp_path / "c.parquet"))


def test_single_samples_and_impossible_numbers(tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    Image.new("RGB", (31, 32), "red").save(folder / "dog.png")
    rows, _ = run_dpg(write(tmp_path / "list.csv"), folder, Painted(), JudgementStore(tmp_path / "a.parquet"), samples=1)
    assert rows[0]["value"] == 1 and rows[0]["samples"] == 1
    with pytest.raises(UserError, match="3 samples"): samples_of(Image.new("RGB", (4, 4)), 3)


def test_unknown_parents_are_passed_over_and_told(tmp_path):
    folder, path = tmp_path / "drawn", write(tmp_path / "list.csv", [("dog", 2, "7", "entity", "Is there a tail?")])
    folder.mkdir(); board(["red"] * 4).save(folder / "dog.png")
    rows, notes = run_dpg(path, folder, Painted(), JudgementStore(tmp_path / "a.parquet"))
    assert rows[0]["value"] == 1 and "1 of 1 items" in notes["dependencies"]


def test_the_interval_is_over_pictures_not_questions():
    items = [DPGItem(str(number), "", item_of({1: (), 2: (), 3: (), 4: ()}).questions) for number in range(40)]
    records = [{"item": item.key, "sample": 0, "proposition_id": number, "answer": int(item.key) % 2 == 0} for item in items for number in (1, 2, 3, 4)]
    row = dpg_rows(items, records)[1]
    assert row["n"] == 160 and row["high"] - row["low"] > 1.7 * 2 * 1.96 * 0.5 / 160**0.5 # all questions of a picture agree


SLOW = """
import sys, time
from vugen.evaluate.dpg_bench import run_dpg
from vugen.evaluate.judgements import JudgementStore
class Slow:
    name, fingerprint = "painted", "p"
    def __call__(self, image, questions):
        with open(sys.argv[4], "a") as log: log.write("x" * len(questions))
        time.sleep(0.3)
        return [0.9] * len(questions)
run_dpg(sys.argv[1], sys.argv[2], Slow(), JudgementStore(sys.argv[3]), batch_size=2)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path, folder, log = write(tmp_path / "list.csv"), drawn(tmp_path / "drawn"), tmp_path / "log"
    run = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, (path, folder, tmp_path / "a.parquet", log))])
    while not (log.is_file() and len(log.read_text()) >= 6) and run.poll() is None: time.sleep(0.05)
    run.kill(); run.wait()
    kept = len(JudgementStore(tmp_path / "a.parquet").read())
    assert 4 <= kept < 24
    answerer = Painted()
    run_dpg(path, folder, answerer, store := JudgementStore(tmp_path / "a.parquet"))
    assert answerer.asked == 24 - kept and len(store.read()) == 24


@pytest.mark.parametrize("share", [float("nan"), 1.5])
def test_a_probability_that_is_none_is_an_error(tmp_path, share):
    class Broken:
        name, fingerprint = "broken", "b"
        def __call__(self, image, questions): return [share] * len(questions)
    with pytest.raises(UserError, match="broken gave"): run_dpg(write(tmp_path / "list.csv"), drawn(tmp_path / "drawn"), Broken(), JudgementStore(tmp_path / "a.parquet"))
