"What `vugen evaluate` measures beside the pictures that it is given."
import json

import torch

from vugen.data.scenes import World
from vugen.evaluate import scene_parser
from vugen.lab import evaluate


class Parser:
    image_size = 32
    def to(self, device): return self


def test_the_parser_is_judged_on_what_is_held_out(tmp_path, monkeypatch):
    world, asked = World(held_out=("red circle",)), []
    (tmp_path / "parser").mkdir()
    (tmp_path / "parser" / "run.json").write_text(json.dumps({"world": world.asdict()}))
    monkeypatch.setattr(scene_parser.SceneParser, "from_pretrained", lambda folder: Parser())
    monkeypatch.setattr(scene_parser, "prompt_accuracy", lambda *rest, **columns: [])
    monkeypatch.setattr(scene_parser, "parser_accuracy", lambda parser, world, *rest, **columns: asked.append(world) or [])
    monkeypatch.setattr(evaluate, "read_images", lambda paths, size, progress=None: torch.zeros(len(paths), 3, size, size))
    evaluate.prompt_rows(tmp_path, {"one.png": "a red circle"}, tmp_path, "cpu")
    assert asked == [World(held_out=("red circle",), split="test")]
