"What the playground keeps: whole or not at all, bounded, and readable again."
import json

import pytest
from PIL import Image

from vugen.errors import UserError
from vugen.lab.playground_gallery import MOST, Shelf, contact, picture_of, png_of, stored, tiles

RED = Image.new("RGB", (8, 8), "red")


def test_results_survive_the_process(tmp_path):
    shelf = Shelf({"versions": {"torch": "2"}, "checkpoints": {"decoder": "ab"}}, tmp_path / "kept")
    made = shelf.add([], "Reconstruct", "a dog", {"ratio": "16", "seed": 4}, [{"psnr": 3.5}], RED, [RED, RED], [RED] * 11)
    assert shelf.begin()[0].pictures == made[0].pictures == (png_of(RED),) * 11
    assert [each.as_dict() for each in shelf.begin()] == [each.as_dict() for each in made] and list(picture_of(shelf.begin()[0].picture).getdata()) == list(RED.getdata())


def test_what_is_torn_or_foreign_is_named_and_left_out(tmp_path, capsys):
    shelf = Shelf({}, tmp_path)
    shelf.add([], "Bind", "a dog", {}, {})
    for name, text in (("torn", '{"tab": "Bi'), ("foreign", json.dumps({"tab": "../x", "title": "", "settings": {}, "numbers": 1})), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    bad = tmp_path / "picture"
    bad.mkdir()
    (bad / "result.json").write_text(json.dumps({"tab": "Bind", "title": "", "settings": {}, "numbers": 1, "when": ""}))
    (bad / "shown.png").write_bytes(b"no picture")
    assert [each.title for each in stored(tmp_path)] == ["a dog"]
    said = capsys.readouterr().out
    assert all(name in said for name in ("torn", "foreign", "list", "picture")) and said.count("move it away") == 4


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"): Shelf({}, tmp_path / "file").add([], "Bind", "", {}, {})


def test_pictures_of_the_page_are_saved_as_png():
    from vugen.lab.playground_fields import picture_strip
    strip = picture_strip()
    for shown in (picture_strip([(RED, "red")]).value[0]["image"]["path"], strip.postprocess([(RED, "red")]).root[0].image.path):
        with Image.open(shown) as saved: assert saved.format == "PNG" and shown.endswith(".png")


def test_the_shelf_and_its_words_are_bounded():
    results = []
    for number in range(MOST + 5): results = Shelf({}).add(results, "Generate", "x" * 500, {"seed": number}, {}, shown=[RED])
    assert len(results) == MOST and all(len(words) < 120 for _, words in tiles(results)) and len(png_of(contact([RED] * 9))) < 5000


def test_an_answer_that_cannot_be_kept_is_shown_all_the_same(tmp_path):
    from vugen.lab.playground import keeps
    from vugen.lab.playground_tabs import Answer
    (tmp_path / "file").write_text("")
    def on_count(word): yield Answer((len(word),), {"letters": len(word)}, word)
    (shown, download, results, gallery), = keeps(Shelf({}, tmp_path / "file"), "Classify", ("word",), on_count)("dog", [])
    assert shown == 3 and results[0].numbers == {"letters": 3} and len(gallery) == 1


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(tmp_path):
    from vugen.lab.playground import launch
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/kept cannot be written"): launch(open_browser=False, block=False, keep=tmp_path / "file" / "kept")


def test_a_kept_result_without_its_picture_or_with_odd_settings_does_not_hide_the_others(tmp_path, capsys):
    import gradio
    from vugen.lab.playground import restored
    from vugen.lab.playground_tabs import Panel
    shelf = Shelf({}, tmp_path)
    for title in ("whole", "bare", "odd"): shelf.add([], "Generate", title, {"prompt": "a red circle", "seed": 3}, {}, RED, [RED])
    for path in tmp_path.glob("*/result.json"):
        found = json.loads(path.read_text())
        if found["title"] == "bare": (path.parent / "shown.png").unlink()
        if found["title"] == "odd": path.write_text(json.dumps({**found, "settings": {"prompt": "a red circle", "seed": [1], "drawn": {"caption": 3}}}))
    results = stored(tmp_path)
    assert {each.title for each in results} == {"whole", "odd"} and "move it away" in capsys.readouterr().out and all(picture for picture, _ in tiles(results))
    with gradio.Blocks(analytics_enabled=False): panel = Panel("Generate", {"prompt": gradio.Textbox(), "seed": gradio.Number(precision=0)}, [], None)
    back = restored(next(each for each in results if each.title == "odd"), [panel])
    assert back[4]["value"] == "a red circle" and "value" not in back[5]
