"MME, MMBench and MMMU in the files that their authors publish: what is read, what is refused, and scores worked out by hand or by scikit-learn."
import base64
import csv
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score

from vugen.errors import UserError
from vugen.understand.vlm_benchmarks import (MME_TASKS, MMMU_SUBJECTS, Question, judge, literal_list, open_picture, open_right, question_rows, read_choice, read_letter, read_mmbench, read_mme, read_mmmu, read_open,
                                             read_questions, read_yes_no, record_of, rotated, score_notes)

TASKS = [task for tasks in MME_TASKS.values() for task in tasks]
SPLIT = ("artwork", "celebrity", "landmark", "posters", "scene")  # pictures and texts in folders of their own


def png(color, side=10):
    buffer = io.BytesIO(); Image.new("RGB", (side, side), color).save(buffer, "PNG"); return buffer.getvalue()


def one_sentence(error): return "\n" not in str(error.value) and len(str(error.value)) < 700


def told(questions, says): return [record_of(each, said := says(each), judge(each, said)) for each in questions]


def values(records, scorer="x"): return {(row["category"], row["metric"]): row for row in question_rows(records, scorer)}


# MME

def mme_folder(root, pictures=3, tasks=TASKS):
    for task in tasks:
        images, texts = ((root / task / "images", root / task / "questions_answers_YN") if task in SPLIT else (root / task, root / task))
        for folder in (images, texts): folder.mkdir(parents=True, exist_ok=True)
        for number in range(pictures):
            (images / f"bild_ü{number}.jpg").write_bytes(png((number, 0, 0)))
            (texts / f"bild_ü{number}.txt").write_bytes(f"Is this a café number {number}? Please answer yes or no.\tYes\r\nIs this {number + 1}? Please answer yes or no.\tNo\r\n\r\n".encode())
    return root


def test_mme_in_both_layouts_from_any_height(tmp_path):
    mme_folder(tmp_path / "MME_Benchmark_release_version" / "MME_Benchmark")
    for place in (tmp_path, tmp_path / "MME_Benchmark_release_version", tmp_path / "MME_Benchmark_release_version/MME_Benchmark"):
        found = read_mme(place)
        assert len(found) == 14 * 3 * 2 and not found.notes and {each.category for each in found.questions} == set(TASKS)
    first = found.questions[0]
    assert first.text == "Is this a café number 0? Please answer yes or no." and first.answers == ("yes",) and first.key == "existence/bild_ü0/1" and open_picture(first.pictures[0]).size == (10, 10)


def test_an_oracle_reaches_the_published_maxima(tmp_path):
    found = values(told(read_mme(mme_folder(tmp_path)).questions, lambda each: each.answers[0]))
    assert found["perception", "score"]["value"] == 2000 and found["cognition", "score"]["value"] == 800 and found["all", "score"]["value"] == 2800
    assert found["perception", "score"]["chance"] == 750 and found["cognition", "score"]["chance"] == 300 and found["perception", "score"]["n"] == 30
    assert "anchors" in found["perception", "score"] and found["perception", "score"]["low"] < 2000


def test_always_yes_has_half_and_never_both(tmp_path):
    found = values(told(read_mme(mme_folder(tmp_path)).questions, lambda each: "Yes, of course"))
    assert all(found[task, "score"]["value"] == 50 and found[task, "accuracy_plus"]["value"] == 0 for task in TASKS)


def test_scores_are_those_of_sklearn_and_a_plain_loop(tmp_path):
    questions, dice = read_mme(mme_folder(tmp_path, 7)).questions, random.Random(3)
    records = told(questions, lambda each: dice.choice(["Yes", "no", "NO.", "perhaps", "yes it is"]))
    found, total = values(records), 0
    for task in TASKS:
        mine = [record for record in records if record["category"] == task]
        accuracy = accuracy_score([record["answer"] for record in mine], [record["read"] or "other" for record in mine])
        plus = sum(mine[place]["right"] and mine[place + 1]["right"] for place in range(0, 14, 2)) / 7
        assert found[task, "accuracy"]["value"] == pytest.approx(accuracy) and found[task, "accuracy_plus"]["value"] == pytest.approx(plus) and found[task, "score"]["value"] == pytest.approx(100 * (accuracy + plus))
        total += found[task, "score"]["value"]
    assert found["all", "score"]["value"] == pytest.approx(total) and found["all", "score"]["low"] < total < found["all", "score"]["high"]
    assert "count as wrong" in score_notes(records, "x")["x, not read"]


@pytest.mark.parametrize("said,read", [("Yes", "yes"), (" NO ", "no"), ("no.", "no"), ("A: Yes", "other"), ("Nope", "no"), ("none", "no"), ("yes and no", "yes"), ("The answer is yes", "other"), ("", "other")])
def test_yes_and_no_are_read_from_the_first_four_characters(said, read): assert read_yes_no(said) == read


def test_broken_mme_rows_take_their_picture_with_them(tmp_path):
    mme_folder(tmp_path, 6, ["count"])
    (tmp_path / "count/bild_ü0.jpg").unlink()
    (tmp_path / "count/bild_ü1.txt").write_text("One?\tYes\n")
    (tmp_path / "count/bild_ü2.txt").write_text("One?\tYes\nTwo?\tmaybe\n")
    (tmp_path / "count/bild_ü3.txt").write_text("One? Yes\nTwo?\tNo\n")
    (tmp_path / "count/bild_ü4.txt").write_bytes("Zäh?\tYes\nZwei?\tNo\n".encode("latin-1"))
    found = read_mme(tmp_path)
    assert [each.group for each in found.questions] == ["count/bild_ü5"] * 2 and found.notes["broken rows"].startswith("5 rows are left out") and "bild_ü0.txt has no picture" in found.notes["broken rows"]


def test_results_of_the_authors_tool_are_scored(tmp_path):
    (tmp_path / "OCR.txt").write_text("1.png\tIs it A?\tYes\tYes\n1.png\tIs it B?\tNo\tno\tit is A\n2.png\tIs it A?\tYes\tno\n2.png\tIs it C?\tNo\tNo\n", encoding="utf-8")
    for place in (tmp_path, tmp_path / "OCR.txt"):
        found = read_mme(place)
        assert values(told(found.questions, lambda each: each.said))["OCR", "score"]["value"] == 125 and found.questions[1].said == "no\tit is A"
    (tmp_path / "OCR.txt").write_text("1.png\tIs it A?\tYes\n")
    with pytest.raises(UserError, match="line 1.*fourth") as error: read_mme(tmp_path)
    assert one_sentence(error)
    (tmp_path / "mine.txt").write_text("1.png\tIs it A?\tYes\tYes\n")
    with pytest.raises(UserError, match="no task"): read_mme(tmp_path / "mine.txt")


@pytest.mark.parametrize("reader", [read_mme, read_mmbench, read_mmmu])
def test_nothing_there_is_one_sentence(tmp_path, reader):
    for place in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match=str(place)) as error: reader(place)
        assert one_sentence(error)


# MMBench

HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]


def tsv(path, rows, head=HEAD):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, head, delimiter="\t", extrasaction="ignore"); writer.writeheader(); writer.writerows(rows)
    return path


def row(index, options, answer, image=None, **more):
    letters = dict(zip("ABCD", options))
    return {"index": index, "question": f"哪个 {index}?", **letters, "answer": answer, "category": "ocr", "l2-category": "finegrained_perception", "split": "dev", "image": base64.b64encode(png((index % 255 if isinstance(index, int) else 7, 9, 9))).decode() if image is None else image, **more}


def test_rotations_of_the_file_and_rotations_made_here_are_the_same(tmp_path):
    options = ["red", "None", "NA", "a \"quoted\"\tword"]
    alone = read_mmbench(tsv(tmp_path / "dev.tsv", [row(5, options, "D", hint="Look well.")])).questions
    circle = [row(1_000_000 * turn + 5, options[turn:] + options[:turn], "ABCD"[3 - turn], None if not turn else "5", hint="Look well.") for turn in range(4)]
    whole = read_mmbench(tsv(tmp_path / "circle.tsv", circle)).questions
    assert [(each.options, each.answers, each.turn, each.group, each.hint) for each in alone] == [(each.options, each.answers, each.turn, each.group, each.hint) for each in whole]
    assert alone[0].options[1:3] == ("None", "NA") and whole[3].pictures[0] is whole[0].pictures[0] and alone[0].text == "哪个 5?"
    assert {each.options[each.letters.index(each.answers[0])] for each in alone} == {options[3]} and {each.answers[0] for each in alone} == set("ABCD")


def test_circular_accuracy_by_hand(tmp_path):
    questions = read_mmbench(tsv(tmp_path / "dev.tsv", [row(1, ["red", "blue"], "A"), row(2, ["red", "blue", "pink"], "C"), row(3, ["red", "blue"], "B", category="count")])).questions
    assert len(questions) == 7
    wrong = {"2+2"}  # one rotation of the second
    found = values(told(questions, lambda each: "Z" if each.key in wrong else each.answers[0]))
    assert found["all", "circular_accuracy"]["value"] == pytest.approx(2 / 3) and found["all", "accuracy"]["value"] == 1 and found["ocr", "circular_accuracy"]["value"] == .5 and found["all", "circular_accuracy"]["n"] == 3
    assert found["all", "circular_accuracy"]["chance"] == pytest.approx((1 / 4 + 1 / 27 + 1 / 4) / 3) and found["all", "accuracy"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert values(told(questions, lambda each: "A"))["all", "circular_accuracy"]["value"] == 0


def test_guessing_is_punished_as_chance_says(tmp_path):
    questions, dice = read_mmbench(tsv(tmp_path / "dev.tsv", [row(index, ["red", "blue"], "A") for index in range(400)])).questions, random.Random(1)
    found = values(told(questions, lambda each: dice.choice("AB")))
    for metric in ("circular_accuracy", "accuracy"): assert found["all", metric]["low"] < found["all", metric]["chance"] < found["all", metric]["high"]


def test_parquet_with_pictures_as_bytes_or_text(tmp_path):
    rows = [dict(row("frage/ä", ["red", "blue"], "B"), C="nan", D="nan", hint="nan"), row("two", ["x", "y", "z"], "A")]
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = [name if name != "l2-category" else "L2-category" for name in HEAD if name != "image"]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    cells = [{**{name: each.get(name.replace("L2", "l2")) for name in names}, "image": {"bytes": base64.b64decode(each["image"]), "path": None}} for each in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells, schema.append(pyarrow.field("image", image))), tmp_path / "dev-00000-of-00001.parquet")
    found = read_mmbench(tmp_path)
    assert [each.key for each in found.questions] == ["frage/ä", "frage/ä+1", "two", "two+1", "two+2"] and found.questions[0].options == ("red", "blue") and found.questions[0].hint == "" and found.questions[0].area == "finegrained_perception"
    assert open_picture(found.questions[0].pictures[0]).getpixel((0, 0)) == (7, 9, 9)
    cells = [{**cell, "image": each["image"]} for cell, each in zip(cells, rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells, schema.append(pyarrow.field("image", pyarrow.string()))), tmp_path / "text.parquet")
    assert open_picture(read_mmbench(tmp_path / "text.parquet").questions[0].pictures[0]).getpixel((0, 0)) == (7, 9, 9)


def test_what_is_wrong_in_a_row_is_counted_and_named(tmp_path):
    rows = [row(1, ["red", "blue"], "A"), row(2, ["red", "blue"], "A", "%%%" * 40), row(3, ["red", "blue"], "E"), row(4, ["red"], "A"), row(5, ["red", "blue"], "A", "77"), row(6, ["red", "", "blue"], "A"), row(7, ["red", "blue"], ""), row("", ["a", "b"], "A")]
    path = tsv(tmp_path / "dev.tsv", rows)
    found = read_mmbench(path)
    assert [each.key for each in found.questions] == ["1", "1+1"] and found.notes["broken rows"].startswith("7 rows are left out") and f"{path}, line 3 holds a picture that is no base64" in found.notes["broken rows"]
    path.write_text(path.read_text(encoding="utf-8") + "9\tMore?\t\tx\ty\t\t\tA\tocr\t1\t\t\t\tdev\textra\n10\tCut sho", encoding="utf-8")
    assert read_mmbench(path).notes["broken rows"].startswith("9 rows are left out")


def test_a_circle_with_a_gap_is_left_out(tmp_path):
    rows = [row(1, ["red", "blue"], "A"), row(1_000_001, ["blue", "red"], "B"), row(2, ["red", "blue", "pink"], "A"), row(1_000_002, ["blue", "pink", "red"], "C")]
    found = read_mmbench(tsv(tmp_path / "dev.tsv", rows))
    assert {each.group for each in found.questions} == {"1"} and "2 of the 3 rotations" in found.notes["broken rows"]


@pytest.mark.parametrize("name", ["index", "question", "A", "image", "answer"])
def test_a_missing_column_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"dev.tsv has no column '{name}'") as error: read_mmbench(tsv(tmp_path / "dev.tsv", [row(1, ["red", "blue"], "A")], [each for each in HEAD if each != name]))
    assert one_sentence(error) and ("test split" in str(error.value)) == (name == "answer")


def test_an_index_twice_and_two_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 2 and .*line 3 have the same index '1'") as error: read_mmbench(tsv(tmp_path / "dev.tsv", [row(1, ["red", "blue"], "A")] * 2))
    assert one_sentence(error)
    tsv(tmp_path / "other.tsv", [row(1, ["red", "blue"], "A")]); tsv(tmp_path / "dev.tsv", [row(1, ["red", "blue"], "B")])
    assert read_mmbench(tmp_path).questions[0].answers == ("B",)  # dev is chosen where there is one
    (tmp_path / "dev.tsv").unlink(); tsv(tmp_path / "more.tsv", [row(1, ["red", "blue"], "A")])
    with pytest.raises(UserError, match="2 tables"): read_mmbench(tmp_path)


def test_fields_of_megabytes_and_the_limit_of_csv_stays(tmp_path):
    before = csv.field_size_limit()
    noise = random.Random(0).randbytes(3 * 400 * 400)
    buffer = io.BytesIO(); Image.frombytes("RGB", (400, 400), noise).save(buffer, "PNG")
    found = read_mmbench(tsv(tmp_path / "dev.tsv", [row(1, ["red", "blue"], "A", base64.b64encode(buffer.getvalue()).decode())]))
    assert open_picture(found.questions[0].pictures[0]).size == (400, 400) and csv.field_size_limit() == before


@pytest.mark.parametrize("said,read", [("B", "B"), ("b", ""), ("(C)", "C"), ("Answer: D.", "D"), ("A", "A"), ("It is a dog", "A"), ("A dog or a cat", ""), ("The cat.", "B"), ("Option A is right", ""), ("B C", ""), ("none of these", "D"), ("", "")])
def test_a_letter_or_an_options_own_words(said, read): assert read_letter(said, ("dog", "cat", "horse", "none")) == read


# MMMU

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXTS = ("id", "question", "options", "explanation", "answer", "question_type", "subfield", "topic_difficulty", "img_type")
SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in TEXTS] + [(f"image_{place}", IMAGE) for place in range(1, 8)])


def mmmu_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{name: each.get(name) for name in SCHEMA.names} for each in rows], SCHEMA), path, row_group_size=2)
    return path


def ask(subject, number, answer="A", options="['one', 'two']", **more):
    kind = "multiple-choice" if options != "[]" else "open"
    return {"id": f"validation_{subject}_{number}", "question": "What is <image 1>?", "options": options, "answer": answer, "question_type": kind, "topic_difficulty": "Medium", "image_1": {"bytes": png((number, 1, 1)), "path": None}, **more}


def test_subjects_disciplines_and_means_by_hand(tmp_path):
    mmmu_table(tmp_path / "Math/validation-00000-of-00001.parquet", [ask("Math", number) for number in range(1, 4)])
    mmmu_table(tmp_path / "Art_Theory/validation-00000-of-00001.parquet", [ask("Art_Theory", 1), ask("Art_Theory", 2, "3.14", "[]", topic_difficulty="Hard")])
    mmmu_table(tmp_path / "Math/dev-00000-of-00001.parquet", [ask("Math", 99)])
    found = read_mmmu(tmp_path)
    assert len(found) == 5 and "1 tables of other splits" in found.notes["other splits"] and open_picture(found.questions[-1].pictures[0]).getpixel((0, 0)) == (3, 1, 1)
    right = {"validation_Math_1", "validation_Math_2", "validation_Art_Theory_1"}
    rows = values(told(found.questions, lambda each: each.answers[0] if each.key in right else "B" if each.options else "7"))
    assert rows["all", "accuracy"]["value"] == .6 and rows["Math", "accuracy"]["value"] == pytest.approx(2 / 3) and rows["Art and Design", "accuracy"]["value"] == .5 and rows["kind: open", "accuracy"]["value"] == 0
    assert rows["all", "macro_subjects"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2) and rows["level: Hard", "accuracy"]["n"] == 1 and rows["all", "accuracy"]["chance"] == pytest.approx(4 * .5 / 5)


def test_there_are_thirty_subjects_in_six_disciplines():
    assert len(MMMU_SUBJECTS) == 6 and len({subject for subjects in MMMU_SUBJECTS.values() for subject in subjects}) == 30


def test_options_are_never_run(tmp_path):
    mark = tmp_path / "was_run"
    code = f"[open({str(mark)!r}, 'w')]"
    path = mmmu_table(tmp_path / "Math.parquet", [ask("Math", 1, options=code), ask("Math", 2, options="['a'] + ['b']"), ask("Math", 3), ask("Math", 4, options="["), ask("Math", 5, options="['a', ['b']]"), ask("Math", 6, "['x'", "[]")])
    found = read_mmmu(path)
    assert not mark.exists() and [each.key for each in found.questions] == ["validation_Math_3", "validation_Math_6"] and found.notes["broken rows"].startswith("4 rows") and f"{path}, row 0" in found.notes["broken rows"]
    assert found.questions[1].answers == ("['x'",)  # no list, so the words themselves
    for text in ("[" * 90_000, "['a'] * 10", "f'{1}'", "['a', True]", "[None]", "('a', 'b')", ""):
        with pytest.raises(UserError): literal_list(text)
    assert literal_list("['\\u00e9', 1.5, \"it's\"]") == ["é", "1.5", "it's"]


def test_pictures_belong_to_their_marks(tmp_path):
    rows = [ask("Math", 1, question="<image 1> beside <image 3>", image_3={"bytes": png("blue"), "path": None}), ask("Math", 2, question="<image 2>?"), ask("Math", 3, options="['<image 1>', '<image 2>']", image_2={"bytes": png("red"), "path": "x.png"})]
    found = read_mmmu(mmmu_table(tmp_path / "Math.parquet", rows))
    assert found.questions[0].text == "<image 1> beside <image 2>" and open_picture(found.questions[0].pictures[1]).getpixel((0, 0)) == (0, 0, 255)
    assert len(found.questions) == 2 and "marks <image 2>" in found.notes["broken rows"] and len(found.questions[1].pictures) == 2


def test_half_a_table_duplicates_and_hidden_answers(tmp_path):
    path = mmmu_table(tmp_path / "Math.parquet", [ask("Math", 1), ask("Math", 2, "?"), ask("Math", 3, "Z"), ask("Math", 4, options="[]", question_type="multiple-choice")])
    assert [each.key for each in read_mmmu(path).questions] == ["validation_Math_1"]
    (tmp_path / "half.parquet").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="half.parquet is no complete Parquet") as error: read_mmmu(tmp_path / "half.parquet")
    assert one_sentence(error)
    with pytest.raises(UserError, match="row 0 and .*row 1 have the same id") as error: read_mmmu(mmmu_table(tmp_path / "twice.parquet", [ask("Math", 1)] * 2))
    assert one_sentence(error)
    with pytest.raises(UserError, match="kept by the authors") as error: read_mmmu(mmmu_table(tmp_path / "test.parquet", [ask("Math", 1, "?")]))
    assert one_sentence(error)


def test_json_lists_with_files_base64_and_nothing(tmp_path):
    (tmp_path / "images").mkdir(); (tmp_path / "images/é.png").write_bytes(png("red"))
    plain = lambda number, image, **more: {**ask("Physics", number), "image_1": image, "options": ["one", "two"], **more}
    rows = [plain(1, "é.png"), plain(2, {"bytes": base64.b64encode(png((1, 2, 3), 40)).decode() + " " * 200}), plain(3, "gone.png"), plain(4, "../secret.png"), plain(5, 7), plain(6, "é.png", id=17)]
    (tmp_path / "validation.json").write_text(json.dumps(rows), encoding="utf-8")
    found = read_mmmu(tmp_path)
    assert [each.key for each in found.questions] == ["validation_Physics_1", "validation_Physics_2", "17"] and open_picture(found.questions[1].pictures[0]).getpixel((0, 0)) == (1, 2, 3) and found.questions[2].category == "unknown"
    assert found.notes["broken rows"].startswith("3 rows") and "gone.png" in found.notes["broken rows"]
    (tmp_path / "validation.json").write_text('[{"id": "1"', encoding="utf-8")
    with pytest.raises(UserError, match="no complete JSON"): read_mmmu(tmp_path)


@pytest.mark.parametrize("said,read", [("B", "B"), ("(B)", "B"), ("B.", "B"), ("The answer is (C), not (A)", "A"), ("A or B", "B"), ("one", ""), ("I think that it must be TWO", "B"), ("one and then two is what I say", "B"), ("", "")])
def test_a_choice_is_the_last_that_is_named(said, read): assert read_choice(said, ("one", "two", "three")) == read


@pytest.mark.parametrize("said,answers,right", [
    ("The result is 3.141", ("3.14",), True), ("3.149", ("3.14",), False), ("-5", ("5",), False), ("x = -5", ("-5",), True), ("1,000,000", ("1000000",), True), ("1e3 volts", ("1000",), True), ("It is the Mitochondria.", ("mitochondria",), True),
    ("so b", ("b",), True), ("bob", ("b",), False), ("a b c", ("b",), True), ("nothing", ("mitochondria",), False), ("0.5", ("0.50",), True), (".5", ("0.50",), False), ("between 3 and 4", ("4",), True), ("", ("4",), False)])
def test_open_answers(said, answers, right): assert open_right(said, answers) is right


def test_an_open_answer_keeps_its_key_part_and_all_numbers(): assert read_open("Thus the current is 2.50 A or 2,500 mA") == ["2.50 a or 2,500 ma", 2500.0, 2.5, 500.0]


def test_unreadable_choices_are_drawn_the_same_way_each_time():
    questions = [Question("mmmu", f"id_{number}", "?", ("A",), ("one", "two", "three", "four"), category="Math", area="Science") for number in range(800)]
    first, second = (told(questions, lambda each: "???") for _ in range(2))
    row = values(first)["all", "accuracy"]
    assert first == second and row["low"] < .25 < row["high"] and all(record["guessed"] for record in first) and "drawn" in score_notes(first, "x")["x, drawn"]


def test_limits_take_whole_groups(tmp_path):
    mme_folder(tmp_path / "mme", 4, ["count", "scene"])
    assert [each.group for each in read_questions("mme", tmp_path / "mme", 2).questions] == ["count/bild_ü0"] * 2 + ["count/bild_ü1"] * 2 + ["scene/bild_ü0"] * 2 + ["scene/bild_ü1"] * 2
    found = read_questions("mmbench", tsv(tmp_path / "dev.tsv", [row(number, ["a", "b", "c"], "A") for number in range(5)]), 2)
    assert len(found) == 6 and rotated(found.questions[0], 2) == found.questions[2]


def test_a_member_that_could_not_be_asked_takes_its_group():
    questions = [Question("mme", f"color/{picture}/{number}", "?", ("yes",), ("Yes", "No"), category="color", area="perception", group=f"color/{picture}") for picture in "ab" for number in "12"]
    records = [record_of(each, "Yes", judge(each, "Yes"), "" if each.key != "color/a/2" else "its picture is broken") for each in questions]
    assert values(records)["color", "accuracy"]["n"] == 1 and "1 of 4 questions" in score_notes(records, "x")["x, not asked"]
    with pytest.raises(UserError, match="broken"): question_rows([{**record, "problem": "it is broken"} for record in records], "x")


def test_a_response_need_not_be_a_text(tmp_path):
    row = {**ask("Math", 1), "response": 5, "image_1": base64.b64encode(png((1, 1, 1))).decode() + " " * 200}
    (tmp_path / "validation.json").write_text(json.dumps([row, {**row, "id": "validation_Math_2", "response": None}]))
    assert [each.said for each in read_mmmu(tmp_path / "validation.json").questions] == ["5", None]
