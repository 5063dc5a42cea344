"A wheel carries every module and every embedded checkpoint, and nothing of a run in progress."
import subprocess
import sys
import zipfile
from pathlib import Path

from vugen.lab.docs import project_root

ROOT = project_root(Path(__file__).parent)


def tracked(folder, pattern):
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else [p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()]
    return {name for name in names if name.endswith(pattern)}


def test_wheel_holds_modules_and_checkpoints(tmp_path):
    run = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, "."], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    modules = tracked("vugen", ".py")
    launch = {"vugen/_" + name for name in tracked("data/accelerate", ".yaml")}
    weights = {"vugen/_" + name for name in tracked("data/checkpoints", (".safetensors", ".json"))}
    assert modules and weights and launch and modules | weights | launch <= inside
    assert not [name for name in inside if "/.state-" in name or name.endswith(".tmp")]
