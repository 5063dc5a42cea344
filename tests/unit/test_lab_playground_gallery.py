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
