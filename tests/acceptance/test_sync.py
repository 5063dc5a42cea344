"Notebooks, package, README and sidebar say the same; every module imports alone and lightly."
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vugen.lab.docs import notebooks, project_root, readme_pages, sidebar

ROOT = project_root(Path(__file__).parent)
NOTEBOOKS = [p.relative_to(ROOT / "nbs").as_posix() for p in notebooks(ROOT)]
MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "vugen").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
HEAVY = ("gradio", "umap", "captum", "diffusers", "datasets", "faiss", "matplotlib", "sklearn", "pandas", "torchvision", "transformers")


def book(name):
    return json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_cleaning_and_exporting_leaves_no_difference(tmp_path):
    for name in ("nbs", "vugen"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    binaries = Path(sys.executable).parent
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(binaries / command)], cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
    tracked = [p.relative_to(ROOT) for name in ("nbs", "vugen") for p in (ROOT / name).rglob("*")
               if p.is_file() and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts]
    changed = [str(p) for p in tracked if not (tmp_path / p).exists() or not filecmp.cmp(ROOT / p, tmp_path / p, shallow=False)]
    made = [str(p.relative_to(tmp_path)) for p in (tmp_path / "vugen").rglob("*.py") if not (ROOT / p.relative_to(tmp_path)).exists()]
    assert not changed and not made, "run `make export` and commit: " + ", ".join(changed + made)


def test_readme_is_made_from_the_index():
    stale = [name for name, content in readme_pages(book("index.ipynb")).items() if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != content]
    assert not stale, "run `make readme` and commit: " + ", ".join(stale)


def test_sidebar_lists_every_notebook():
    assert (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8") == sidebar(ROOT), "run `python -m vugen.lab.docs sidebar` and commit"


def test_every_module_has_its_notebook():
    named = {re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, book(n)["cells"])), re.MULTILINE) for n in NOTEBOOKS}
    exported = {f"vugen.{found[1]}" for found in named if found}
    assert exported == set(MODULES)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_import_cells_stand_alone(name):
    "The site's builder runs a cell that imports, so nothing else may stand in it."
    for cell in book(name)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "#| export" in source or source.lstrip().startswith("%"): continue
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body]
        assert all(imports) or not any(imports), source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_executed_small_and_speaks_of_no_machine(name):
    path = ROOT / "nbs" / name
    text = path.read_text(encoding="utf-8")
    cells = [c for c in book(name)["cells"] if c["cell_type"] == "code"]
    errors = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors and path.stat().st_size < 1_500_000
    assert not re.findall(r"/(?:root|home|tmp|Users|work)/[\w.]+", text), "an output shows a path of one machine"
    shows = [c for c in cells if not re.search(r"^#\|\s*(export|hide|default_exp|eval: false)", source(c), re.MULTILINE)]
    assert not shows or any(c["outputs"] for c in shows), "commit the notebook executed (`make notebooks`)"


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if "/" in n])
def test_notebook_has_title_subtitle_and_checks(name):
    cells = book(name)["cells"]
    first = next(source(c) for c in cells if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n+> \S", first), "begin with '# Title' and a '> subtitle'"
    assert any("assert" in source(c) for c in cells if c["cell_type"] == "code")


FORKS = """
import importlib, json, os, sys
import torch, numpy  # what nearly every module needs is loaded once; each module is then imported in a process of its own
for module in sys.argv[2:]:
    read, write = os.pipe()
    if not (child := os.fork()):
        try: importlib.import_module(module); told = [m for m in json.loads(sys.argv[1]) if m in sys.modules]
        except BaseException as error: told = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(told).encode()); os._exit(0)
    os.waitpid(child, 0); os.close(write)
    print(json.dumps([module, json.loads(os.read(read, 100_000) or '"it ended without a word"')]), flush=True); os.close(read)
"""


def _import_each(modules):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", FORKS, json.dumps(HEAVY), *modules], capture_output=True, text=True, timeout=900, env=env)
    assert not run.returncode, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_module_imports_alone_and_lightly():
    with ThreadPoolExecutor(2) as pool: found = [each for part in pool.map(_import_each, (MODULES[::2], MODULES[1::2])) for each in part]
    assert sorted(module for module, _ in found) == sorted(MODULES)
    assert not {module: told for module, told in found if told}


def test_a_module_that_fails_or_is_heavy_is_named(tmp_path, monkeypatch):
    for name, text in (("broken_one", "import nothing_of_this_name"), ("heavy_one", "import csv")): (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(sys.modules[__name__], "HEAVY", ("gradio", "heavy_one"))
    told = dict(_import_each(["broken_one", "heavy_one"]))
    assert "ModuleNotFoundError" in told["broken_one"] and told["heavy_one"] == ["heavy_one"]


def test_no_module_reads_pickles_or_stars():
    text = {p: p.read_text(encoding="utf-8") for p in (ROOT / "vugen").rglob("*.py")}
    bad = [str(p.relative_to(ROOT)) for p, t in text.items()
           if re.search(r"import \*|import pickle|pickle\.load|weights_only=False|trust_remote_code=True|allow_pickle=True", t)]
    assert not bad
