"The rooms of the house: each imports from the rooms before it and from none above."
import ast
from pathlib import Path

import pytest

import vugen
from vugen.lab.docs import ROOMS

PACKAGE = Path(vugen.__file__).parent
FREE = {"errors", "paths", "lab.docs"}  # for everybody
MAY_IMPORT = {  # room: the rooms that it may import from, itself apart
    "data": (),
    "models": ("data",),
    "encode": ("data", "models"),
    "decode": ("data", "models", "encode"),
    "generate": ("data", "models", "encode", "decode"),
    "evaluate": ("data", "models", "encode", "decode", "generate"),
    "understand": ("data", "models", "encode", "decode", "generate", "evaluate"),
    "train": ("data", "models", "encode", "decode", "generate", "evaluate", "understand"),
    "experiment": ("data", "models", "encode", "decode", "generate", "evaluate", "understand", "train"),
    "lab": ("data", "models", "encode", "decode", "generate", "evaluate", "understand", "train", "experiment"),
}


def imported(source, package):
    "Dotted names below `vugen` that a module of `package` (such as vugen.data) imports, inside functions too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else: continue
        yield from (name.removeprefix("vugen.") for name in names if name.startswith("vugen."))


def breaches(source, room):
    "What a module of this room imports and may not."
    allowed = {room, *MAY_IMPORT[room]}
    return [name for name in imported(source, f"vugen.{room}")
            if name.split(".")[0] not in allowed and not any(name == free or name.startswith(f"{free}.") for free in FREE)]


def modules(): return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def test_every_module_lives_in_a_known_room():
    assert len(modules()) > 30 and {path.relative_to(PACKAGE).parts[0] for path in modules()} <= set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_from_the_rooms_before_them(room):
    found = {path.name: breaches(path.read_text(encoding="utf-8"), room) for path in modules() if path.relative_to(PACKAGE).parts[0] == room}
    assert not {name: names for name, names in found.items() if names}


def test_the_site_lists_the_rooms_in_the_order_of_the_walls():
    assert ROOMS == tuple(MAY_IMPORT)
    assert all(set(below) == set(ROOMS[:place]) for place, below in enumerate(MAY_IMPORT.values()))


@pytest.mark.parametrize("line", ["from ..train.loop import main", "from vugen.train import loop", "import vugen.train.loop", "from .. import train", "from vugen import train",
                                  "def later():\n    from vugen.train.loop import main", "if True:\n    from ..lab import cli"])
def test_a_breach_is_seen(line):
    assert breaches(line, "understand") and (not breaches(line, "train") or "lab" in line)


def test_what_is_free_is_free():
    for line in ("from ..errors import UserError", "from vugen.paths import atomic_path", "from ..lab.docs import execute", "from vugen.lab import docs", "import torch", "from .scenes import World"):
        assert not breaches(line, "data")
