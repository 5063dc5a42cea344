"""What is written takes its place whole, and never the place of something of another kind."""
import pytest

from vugen.errors import UserError
from vugen.paths import atomic_path


def test_a_file_never_replaces_a_folder(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    (target / "old.json").write_text("a month's work")
    with pytest.raises(UserError, match="results is a folder: name a file"), atomic_path(target) as temporary: temporary.write_text("[]")
    assert (target / "old.json").read_text() == "a month's work" and [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_never_replaces_a_file(tmp_path):
    target = tmp_path / "results"
    target.write_text("a month's work")
    with pytest.raises(UserError, match="results is a file: name a folder"), atomic_path(target) as temporary: (temporary / "deep").mkdir(parents=True)
    assert target.read_text() == "a month's work" and [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_that_is_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/old.txt").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new.txt").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"] and (tmp_path / "real/old.txt").read_text() == "old"
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["new.txt"]


@pytest.mark.parametrize("name", [".", "/", ""])
def test_what_has_no_name_is_refused(name):
    with pytest.raises(UserError, match="no name of a file or folder"), atomic_path(name): raise AssertionError("nothing may be written")
