"Options of `vugen experiment` that an action does not look at, and places that cannot be written."
import pytest

from vugen.lab.cli import main


def said(capsys, *words):
    with pytest.raises(SystemExit) as left: main(["experiment", *map(str, words)])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1 and told.endswith(".\n"), told
    return told


@pytest.mark.parametrize("words", [("report", "here", "--arms", "contrastive"), ("report", "here", "--minutes", "3"), ("report", "here", "--device", "cpu"), ("collect", "here", "--seeds", "0"), ("run", "plan.json", "--preset", "small"),
                                   ("run", "plan.json", "--why", "so"), ("run", "plan.json", "--json", "rows.json"), ("plan", "--minutes", "5"), ("plan", "--processes", "2"), ("plan", "--collected", "here"), ("plan", "--json", "rows.json")])
def test_an_option_that_the_action_does_not_look_at_is_refused(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    option = next(word for word in words if word.startswith("--"))
    assert f"{option} goes with" in said(capsys, *words) and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in said(capsys, "collect", tmp_path, "--out", tmp_path / "file")
    assert "file" in said(capsys, "plan", "--preset", "smoke", "--out", tmp_path / "file" / "plan.json")
    assert "/proc" in said(capsys, "plan", "--preset", "smoke", "--arms", "contrastive", "--out", "/proc/vugen-nowhere/plan.json")
