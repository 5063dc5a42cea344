"CLIPScore against torchmetrics' formula and transformers' own logits, on miniatures in the real format."
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from vugen.errors import UserError
from vugen.evaluate.alignment import PREFIX, clip_score, cosines, prompted_pictures, run_clip_score
from vugen.evaluate.judgements import JudgementStore
from vugen.understand.pretrained import TransformersContrastive, save_pair_miniature

PROMPTS = ["a red circle", "a photo of a blue square left of a star", "a heart", "a green star"]


def picture(seed, width=40, height=30): return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for family in ("clip", "siglip"): save_pair_miniature(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def clip(root): return TransformersContrastive.from_pretrained(root / "clip", too_long="cut")


PICTURES = [picture(seed, 40 + seed, 30) for seed in range(4)]


def test_cosines_are_those_behind_the_models_logits(root):
    for family in ("clip", "siglip"):
        model, processor = AutoModel.from_pretrained(root / family), AutoProcessor.from_pretrained(root / family)
        inputs = processor(text=PROMPTS, images=PICTURES, return_tensors="pt", **(dict(padding="max_length", max_length=64, truncation=True) if family == "siglip" else dict(padding=True)))
        with torch.no_grad(): logits = model(**inputs).logits_per_image.diag()
        bias = model.logit_bias.detach() if family == "siglip" else 0
        wanted = (logits - bias) / model.logit_scale.exp().detach()
        found = cosines(TransformersContrastive.from_pretrained(root / family), PICTURES, PROMPTS)
        assert torch.allclose(found.float(), wanted, atol=1e-5), family


def test_the_score_is_torchmetrics_on_the_same_model(root, clip):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    model, processor = AutoModel.from_pretrained(root / "clip"), AutoProcessor.from_pretrained(root / "clip")
    tensors = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in PICTURES]
    reference = cosines(clip, PICTURES, PROMPTS) * 100
    class Plain: # torchmetrics wants tensors from these two
        config = model.config
        def to(self, device): return self
        def get_image_features(self, *inputs): return model.get_image_features(*inputs).pooler_output
        def get_text_features(self, *inputs): return model.get_text_features(*inputs).pooler_output
    with torch.no_grad(): found, _ = _clip_score_update(tensors, PROMPTS, Plain(), processor)
    assert torch.allclose(found.double(), reference, rtol=1e-4, atol=1e-3)
    assert torch.allclose(clip_score(cosines(clip, PICTURES, PROMPTS), 100), found.double().clamp(min=0), rtol=1e-4, atol=1e-3)


def test_every_pair_is_cut_at_zero_before_the_mean():
    assert clip_score(torch.tensor([0.4, -0.4], dtype=torch.float64)).tolist() == [1.0, 0.0] # Hessel et al. 2021, Eq. 1


def save(folder, names=("0.png", "1.png", "2.png", "3.png")):
    folder.mkdir(exist_ok=True)
    for name, each in zip(names, PICTURES): each.save(folder / name)
    return folder


def test_lists_of_pictures_and_prompts_in_every_form(tmp_path):
    folder, wanted = save(tmp_path / "drawn"), list(zip(("0.png", "1.png", "2.png", "3.png"), PROMPTS))
    rows = [{"image": name, "prompt": prompt} for name, prompt in wanted]
    (tmp_path / "a.json").write_text(json.dumps(rows)); (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("file_name,caption\n" + "\n".join(f'{name},"{prompt}"' for name, prompt in wanted))
    for name in ("a.json", "a.jsonl", "a.csv"): assert [(each.key, each.prompt) for each in prompted_pictures(folder, tmp_path / name)[0]] == wanted
    with pytest.raises(UserError, match="does not tell which picture"): prompted_pictures(folder)
    for name, prompt in wanted: (folder / name).with_suffix(".txt").write_text(prompt + "\n")
    assert [(each.key, each.prompt) for each in prompted_pictures(folder)[0]] == wanted
    (folder / "generate.json").write_text(json.dumps({"run": {}, "rows": rows[:2]}))
    assert len(prompted_pictures(folder)[0]) == 2


@pytest.mark.parametrize("name,text,said", [("a.json", '{"rows": 3', "no complete list"), ("a.json", "3", "no list"), ("a.jsonl", '{"image": "a.png"}', "names no prompt"), ("a.csv", "a,b\n1,2\n", "names no picture")])
def test_a_broken_list_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said): prompted_pictures(save(tmp_path / "drawn"), tmp_path / name)


def test_one_spoiled_line_spoils_no_other(tmp_path):
    folder, rows = save(tmp_path / "drawn"), [json.dumps({"image": f"{number}.png", "prompt": prompt}) for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "a.jsonl").write_text("\n".join([rows[0], rows[1][:-5], json.dumps({"image": "2.png"}), rows[3]]))
    shots, notes = prompted_pictures(folder, tmp_path / "a.jsonl")
    assert [each.key for each in shots] == ["0.png", "3.png"] and notes["prompts left out"].startswith("2 pictures or prompts cannot") and "entry 2, is no JSON" in notes["prompts left out"]


def test_prompts_beside_pictures_may_be_spoiled(tmp_path):
    folder = save(tmp_path / "drawn")
    for name, content in (("0", b"a star"), ("1", b"\xff\xfe\x00"), ("2", b" \n")): (folder / f"{name}.txt").write_bytes(content)
    shots, notes = prompted_pictures(folder)
    assert [(each.key, each.prompt) for each in shots] == [("0.png", "a star")] and "1.txt cannot be read as text" in notes["prompts left out"] and notes["prompts left out"].startswith("3 ")
    (folder / "0.txt").unlink()
    with pytest.raises(UserError, match="1.txt cannot be read"): prompted_pictures(folder)


def test_every_kind_of_picture_has_its_prompt_beside_it_and_what_lacks_one_is_told(tmp_path):
    for place, name in enumerate(("a.png", "b.PNG", "c.tif", "d.bmp")):
        PICTURES[place].save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a star")
    PICTURES[0].save(tmp_path / "lonely.png"); (tmp_path / "empty.txt").write_text("a heart")
    shots, notes = prompted_pictures(tmp_path)
    assert [each.key for each in shots] == ["a.png", "b.PNG", "c.tif", "d.bmp"] and notes["prompts left out"].startswith("2 ") and "empty.txt stands beside no picture" in notes["prompts left out"]


def test_a_prompt_without_line_or_pictures_is_told(tmp_path):
    for number, line in enumerate((True, False, True)):
        (folder := tmp_path / f"{number:05d}" / "samples").mkdir(parents=True)
        if line: (folder.parent / "metadata.jsonl").write_text(json.dumps({"prompt": "a photo of a star"}))
        if number < 2: PICTURES[0].save(folder / "00000.png")
    shots, notes = prompted_pictures(tmp_path)
    assert [each.key for each in shots] == ["00000/samples/00000.png"] and notes["prompts left out"].startswith("2 ") and "00001 has no metadata.jsonl" in notes["prompts left out"]


def test_a_name_that_is_not_utf8_is_scored_and_found_again(tmp_path, clip):
    import os
    name = os.fsdecode(b"caf\xe9")
    PICTURES[0].save(tmp_path / f"{name}.png"); (tmp_path / f"{name}.txt").write_text("a star")
    shots, store = prompted_pictures(tmp_path)[0], JudgementStore(tmp_path / "a.parquet")
    assert run_clip_score(shots, clip, store)[0] == run_clip_score(shots, None, store)[0]


def test_an_empty_line_of_geneval_is_named(tmp_path):
    for number, text in enumerate((json.dumps({"prompt": "a photo of a star"}), "")):
        save_in = tmp_path / f"{number:05d}" / "samples"
        save_in.mkdir(parents=True)
        PICTURES[number].save(save_in / "00000.png"); (save_in.parent / "metadata.jsonl").write_text(text)
    shots, notes = prompted_pictures(tmp_path)
    assert [each.key for each in shots] == ["00000/samples/00000.png"] and "00001/metadata.jsonl names no prompt" in notes["prompts left out"]


def test_a_folder_is_scored_and_what_cannot_be_read_is_named(tmp_path, clip):
    folder = save(tmp_path / "drawn")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"image": f"{number}.png", "prompt": prompt}) for number, prompt in enumerate(PROMPTS)))
    shots, store = prompted_pictures(folder, tmp_path / "a.jsonl")[0], JudgementStore(tmp_path / "answers.parquet")
    rows, notes = run_clip_score(shots, clip, store)
    kept = [0, 1, 3]
    wanted = clip_score(cosines(clip, [PICTURES[place] for place in kept], [PROMPTS[place] for place in kept]), 100).mean().item()
    assert rows[0]["value"] == pytest.approx(wanted, rel=1e-6) and rows[0]["n"] == 3 and rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    assert rows[1]["value"] == pytest.approx(wanted / 40, rel=1e-6) and "2.png" in notes["pictures left out"] and rows[0]["backbone"] == "clip"
    class Silent: # nothing is asked again
        name, fingerprint = clip.name, clip.fingerprint
    assert run_clip_score(shots, Silent(), store)[0] == rows and run_clip_score(shots, None, store)[0] == rows
    assert run_clip_score(shots, clip, JudgementStore(tmp_path / "b.parquet"), PREFIX)[0][0]["value"] != rows[0]["value"]


def test_counts_that_differ_are_refused(clip):
    with pytest.raises(UserError, match="one prompt a picture"): cosines(clip, PICTURES, PROMPTS[:2])


def test_four_samples_in_a_file_are_four_pictures(tmp_path, clip):
    parts = [picture(seed, 32, 32) for seed in range(4)]
    board = Image.new("RGB", (64, 64))
    for place, part in enumerate(parts): board.paste(part, (32 * (place % 2), 32 * (place // 2)))
    board.save(tmp_path / "one.png")
    (tmp_path / "generate.json").write_text(json.dumps({"run": {"settings": {"suite": "dpg", "samples": 4}}, "rows": [{"image": "one.png", "prompt": PROMPTS[0]}]}))
    rows, _ = run_clip_score(prompted_pictures(tmp_path)[0], clip, JudgementStore(tmp_path / "a.parquet"))
    assert rows[0]["n"] == 4 and rows[0]["value"] == pytest.approx(clip_score(cosines(clip, parts, PROMPTS[:1] * 4), 100).mean().item(), rel=1e-6)


def test_a_score_that_is_no_number_is_an_error(tmp_path):
    class Broken:
        name, fingerprint = "broken", "b"
        def encode_image(self, images): return torch.full((len(images), 2), float("nan"))
        def encode_text(self, captions): return torch.ones(len(captions), 2)
    save(tmp_path / "drawn")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "a star"}))
    with pytest.raises(UserError, match="broken gave a score that is not a number for 0.png"): run_clip_score(prompted_pictures(tmp_path / "drawn", tmp_path / "a.jsonl")[0], Broken(), JudgementStore(tmp_path / "a.parquet"))
