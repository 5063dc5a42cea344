"The store of scores: what is kept, what goes, and who may write at the same time."
import os
import subprocess
import sys
import time

import pytest

from vugen.errors import UserError
from vugen.understand.score_store import ScoreStore, file_digest, held

WRITER = """
import sys, time
from pathlib import Path
from vugen.understand.score_store import ScoreStore
path, name, other = sys.argv[1:]
record = {"suite": "s", "scorer": name, "fingerprint": "f", "digest": "d", "category": "c", "group": "", "slot": "", "captions": ["a", "b"], "pictures": 1, "scores": [1., 0.], "problem": "", "one_way": False}
Path(f"{path}.{name}").touch()
while not Path(f"{path}.{other}").exists(): time.sleep(.001)
made = []
for place in range(40):  # finishes again and again, while the other writes
    made.append({**record, "key": str(place), "place": place})
    ScoreStore(path).add(made[-1:])
    if place % 8 == 7: ScoreStore(path).finish(made, {"suite": "s", "items": len(made)})
"""


def test_finishing_while_another_writes_loses_nothing(tmp_path):
    path = tmp_path / "i.parquet"
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), *names], stderr=subprocess.PIPE, text=True) for names in (("x", "y"), ("y", "x"))]
    for each in running: assert (each.communicate()[1], each.returncode) == ("", 0)
    found = [(record["scorer"], record["key"]) for record in ScoreStore(path).read()]
    assert sorted(found) == sorted((name, str(place)) for name in "xy" for place in range(40)) and sorted(each.name for each in tmp_path.iterdir()) == ["i.parquet", "i.parquet.x", "i.parquet.y"]


def test_a_lock_goes_with_its_process(tmp_path):
    script = "import os, sys; from pathlib import Path; from vugen.understand.score_store import held\nwith held(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "i.parquet")]).returncode == -9 and (tmp_path / ".i.parquet.lock").exists()
    with held(tmp_path / "i.parquet"): pass
    assert not list(tmp_path.iterdir())


def test_half_a_part_of_a_killed_run_goes_and_a_file_of_an_earlier_version_is_read(tmp_path):
    import pyarrow.parquet
    store = ScoreStore(tmp_path / "i.parquet")
    record = {"suite": "s", "scorer": "x", "fingerprint": "f", "key": "1", "digest": "d", "category": "c", "group": "", "slot": "", "place": 0, "captions": ["a", "b"], "pictures": 1, "scores": [1., 0.], "problem": ""}
    store.add([record])
    (store.parts / f".{time.time_ns()}.tmp.parquet").write_bytes(b"half")
    store.finish(store.read(), {"suite": "s"})
    assert not store.parts.exists() and store.read() == [{**record, "one_way": False}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), store.path)  # no column that came later
    assert store.read() == [{**record, "one_way": False}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"score": 1}]), store.path)
    with pytest.raises(UserError, match="lacks the column 'suite'"): store.read()


def test_a_file_is_known_by_its_bytes(tmp_path):
    path, seen = tmp_path / "a", []
    for content in (b"red", b"tea", b"red"):
        path.write_bytes(content); os.utime(path, ns=(len(seen), len(seen)))
        seen.append(file_digest(path))
    assert seen[0] == seen[2] != seen[1] and file_digest(tmp_path / "b") == ""


def test_parts_of_another_run_are_kept_and_only_parts_that_were_read_go(tmp_path):
    store, other = ScoreStore(tmp_path / "i.parquet"), ScoreStore(tmp_path / "i.parquet")
    make = lambda scorer, key, fingerprint="f": {"suite": "s", "scorer": scorer, "fingerprint": fingerprint, "key": key, "digest": "d", "category": "c", "group": "", "slot": "", "place": 0, "captions": ["a", "b"], "pictures": 1, "scores": [1., 0.], "problem": "", "one_way": False}
    store.add([make("x", "1")]); other.add([make("y", "1"), make("x", "1", "g")]); store.add([make("x", "2")])
    assert len(list(store.parts.iterdir())) == 3
    store.finish([make("x", "1"), {**make("x", "2"), "place": 1}], {"suite": "s", "items": 2})
    assert [(record["scorer"], record["key"], record["fingerprint"], record["place"]) for record in store.read()] == [("x", "1", "f", 0), ("x", "2", "f", 1), ("y", "1", "f", 2), ("x", "1", "g", 3)]
