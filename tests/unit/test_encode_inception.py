"The FID's Inception against torch-fidelity's own class, with random weights."
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from vugen.encode.inception import PUBLISHED, FIDInception, load_inception, resize_as_tensorflow
from vugen.errors import UserError

REFERENCE = Path(os.environ.get("VUGEN_REFERENCE", Path(sys.prefix) / "reference"))  # installed beside the environment, not in it: see the Makefile


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = FIDInception()
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"): value.normal_(std=0.1)
        if name.endswith("running_var"): value.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def published():
    "torch-fidelity's module, loaded without its package, which would import torchvision."
    if not (REFERENCE / "torch_fidelity").is_dir(): pytest.skip(f"no torch-fidelity in {REFERENCE}: make install puts it there")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(REFERENCE / "torch_fidelity")]
    sys.modules["torch_fidelity"] = package
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        yield FeatureExtractorInceptionV3
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]: del sys.modules[name]


def test_features_equal_those_of_torch_fidelity(weights, published):
    theirs = published("test", ["2048"], feature_extractor_weights_path=str(weights))
    ours, digest = load_inception(weights)
    images = torch.randint(0, 256, (2, 3, 77, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): found = ours(resize_as_tensorflow(images.float(), 299))
    expected = theirs(images)[0]
    assert expected.std() > 0.01 and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len(digest) == 64


def test_a_file_that_is_not_published_does_not_count_as_it(weights):
    from vugen.evaluate.features import build_extractor
    from vugen.evaluate.scores import score_name
    extractor = build_extractor(f"inception:{weights}")
    assert extractor.name.startswith("Inception-") and not extractor.weights.startswith(PUBLISHED)
    assert score_name("fid", extractor) == f"Fréchet-{extractor.name}" and "torch-fidelity" in extractor.resize
    assert build_extractor(f"inception-clean:{weights}").fingerprint != extractor.fingerprint


def test_the_published_file_gives_the_published_names(weights, monkeypatch):
    from vugen.encode import inception
    from vugen.evaluate.features import build_extractor
    from vugen.evaluate.scores import score_name
    monkeypatch.setattr(inception, "PUBLISHED", inception.file_digest(weights)[:8])
    extractor = build_extractor(f"inception:{weights}")
    assert [score_name(metric, extractor) for metric in ("fid", "kid", "rfid", "density")] == ["FID", "KID", "rFID", "density-Inception"]


def test_what_is_no_weights_file_is_refused_and_never_run(tmp_path, weights):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Distrusted(), protocol=2))
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "short.pth").write_bytes(weights.read_bytes()[:5000])
    for name, word in (("evil.pth", "no weights"), ("other.pth", "Conv2d_1a_3x3.conv.weight"), ("short.pth", "no weights"), ("none.pth", "not a file")):
        with pytest.raises(UserError, match=word): load_inception(tmp_path / name)
    assert not Distrusted.ran


class Distrusted:
    ran = False
    def __reduce__(self): return _run, ()


def _run(): Distrusted.ran = True; return {}
