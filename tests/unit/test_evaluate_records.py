"""Records of measurements: the same whoever measures."""
import hashlib
import json

import torch

from vugen.evaluate.records import checkpoint_fingerprints, environment, run_record


def trained(root, weights=b"weights"):
    (root / "vlm").mkdir(parents=True, exist_ok=True)
    (root / "vlm" / "model.safetensors").write_bytes(weights)
    return root


def test_a_record_names_weights_seed_and_versions(tmp_path):
    record = run_record("vugen bind", 4, trained(tmp_path), "cpu", limit=20)
    assert json.loads(json.dumps(record)) == record
    assert record["checkpoints"] == {"vlm": hashlib.sha256(b"model.safetensorsweights").hexdigest()[:16]}
    assert (record["command"], record["seed"], record["limit"], record["device"]) == ("vugen bind", 4, 20, "cpu")
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"] == torch.__version__
    assert checkpoint_fingerprints(trained(tmp_path, b"others")) != record["checkpoints"] and checkpoint_fingerprints(tmp_path / "none") == {}


def test_there_is_one_record_of_measurements_and_one_environment():
    from vugen.lab import cli
    from vugen.train import loop
    from vugen.understand import benchmarks, probes
    assert benchmarks.run_record is probes.run_record is run_record and loop.environment is environment
    one, other = cli.run_record("vugen bind", 4), run_record("vugen bind", 4)
    assert one == other
