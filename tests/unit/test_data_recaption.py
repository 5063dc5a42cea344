"Recaptioning with untrained miniatures of four families, saved to a folder in their real format."
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig, BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor, CLIPImageProcessorPil, CLIPVisionConfig, Florence2Config,
    Florence2ForConditionalGeneration, Florence2Processor, GitConfig, GitForCausalLM, GitProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast)

from vugen.data.corpora import ImageFolder, open_corpus
from vugen.data.images import load_image
from vugen.data.recaption import Captioner, main, read_lines, recaption, recaption_shards
from vugen.errors import UserError
from vugen.train.presets import corpus_of

WORDS = "a red blue circle square star on the table describe this image in one sentence user assistant what does with paragraph is shown".split()
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def word_tokenizer(*special):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS]
    backend = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})
    return made, len(tokens)


def bert(folder):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(folder / "vocab.txt")), 5 + len(WORDS)


def make_blip(folder):
    tokenizer, size = bert(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    text = dict(SMALL, vocab_size=size, encoder_hidden_size=16, bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0, max_position_embeddings=64)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=dict(SMALL, image_size=32, patch_size=8)))


def make_git(folder):
    tokenizer, size = bert(folder)
    GitProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return GitForCausalLM(GitConfig(vision_config=dict(SMALL, image_size=32, patch_size=8), **SMALL, vocab_size=size, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0))


def make_llava(folder):
    tokenizer, size = word_tokenizer("<image>")
    LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    text = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=size, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1))


def make_florence(folder):
    tokenizer, size = word_tokenizer("<image>")
    processor = Florence2Processor(CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, crop_size={"height": 64, "width": 64}), tokenizer, num_additional_image_tokens=1)
    processor.image_processor.image_seq_length = 5
    processor.save_pretrained(folder)
    text = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=size, max_position_embeddings=64,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    vision = dict(embed_dim=[8, 8, 16, 16], num_heads=[2] * 4, num_groups=[2] * 4, depths=[1] * 4, window_size=2, projection_dim=16, max_temporal_embeddings=4, max_position_embeddings=16)
    return Florence2ForConditionalGeneration(Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")))


FAMILIES = {"blip": make_blip, "git": make_git, "llava": make_llava, "florence2": make_florence}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family, make in FAMILIES.items():
        torch.manual_seed(0)
        make(folder / family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(5): Image.fromarray(np.full((40 + number, 30, 3), 50 * number, np.uint8)).save(folder / ("more" if number == 4 else ".") / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder / "0.txt").write_text("as it came")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_captions_beside_its_pictures(root, pictures, family, capsys):
    before = {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()}
    main([str(pictures), "--model", str(root / family), "--max-new-tokens", "5", "--batch-size", "2"])
    rows = {row["file_name"]: row["caption"] for row in read_lines(pictures / f"captions-{family}.jsonl")}
    assert set(rows) == {"0.png", "1.png", "2.png", "3.png", "more/4.png"} and all(len(text.split()) <= 5 for text in rows.values())
    assert all(path.read_bytes() == content for path, content in before.items())
    record = json.loads((pictures / f"captions-{family}.json").read_text())
    assert record["captions"] == 5 and list(record["skipped"]) == ["broken.png"] and "broken.png" in capsys.readouterr().out
    told = ImageFolder(pictures, metadata=f"captions-{family}.jsonl")
    assert told.caption([told.name(number) for number in range(6)].index("0.png")) == rows["0.png"]


@pytest.mark.parametrize("family", ["llava", "florence2", "git"])
def test_captions_are_what_the_model_itself_generates(root, pictures, family):
    captioner = Captioner(str(root / family), max_new_tokens=6)
    picture = load_image(pictures / "3.png")
    words = {"text": [captioner.prompt]} if captioner.prompt else {}
    inputs = captioner.processor(images=[picture], return_tensors="pt", **words)
    made = captioner.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    if family == "llava": made = made[inputs["input_ids"].shape[1]:]
    assert captioner([picture, picture]) == 2 * [captioner.processor.decode(made, skip_special_tokens=True).strip()]
    assert {"llava": "USER: <image>", "florence2": "<MORE_DETAILED_CAPTION>", "git": "None"}[family] in str(captioner.prompt)


def test_a_killed_run_goes_on_with_the_next_picture_and_refuses_another_model(pictures):
    seen = []
    def caption(images):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(len(images))
        return ["said"] * len(images)
    with pytest.raises(KeyboardInterrupt): recaption(pictures, caption, {"model": "one", "prompt": "a"}, batch_size=2)
    assert not (pictures / "captions-one.jsonl").exists()
    with pytest.raises(UserError, match="captions-one"): recaption(pictures, caption, {"model": "one", "prompt": "b"}, batch_size=2)
    asked = []
    file, report = recaption(pictures, lambda images: [asked.append(len(images)), ["later"] * len(images)][1], {"model": "one", "prompt": "a"}, batch_size=2)
    rows = read_lines(file)
    assert sum(seen) + sum(asked) == 5 == len(rows) and [row["caption"] for row in rows].count("said") == sum(seen) and not list(pictures.glob(".*"))
    Image.new("RGB", (8, 8)).save(pictures / "new.png")
    assert recaption(pictures, lambda images: ["new"] * len(images), {"model": "one", "prompt": "a"})[1]["captions"] == 6  # pictures that came later
    assert [row["caption"] for row in read_lines(file)].count("new") == 1


def test_what_is_no_model_is_refused_in_a_sentence(pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left: main([str(pictures), "--model", str(tmp_path / "empty")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and len(said.strip().splitlines()) == 1 and "empty" in said


# ---- pictures of several sizes, missing packages, shards and parts ------------------------------------------------------------

def make_llava_next(folder):
    "A model whose pictures have as many tokens as their shape asks for."
    tokenizer, size = word_tokenizer("<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
    LlavaNextProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    text = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=size, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, projection_dim=16)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, image_grid_pinpoints=grids))


def test_pictures_of_several_sizes_are_told_together_as_alone(tmp_path):
    torch.manual_seed(1)
    model = make_llava_next(tmp_path)
    for value in model.parameters(): torch.nn.init.normal_(value, std=0.3)  # answers that differ
    model.save_pretrained(tmp_path)
    captioner = Captioner(str(tmp_path), max_new_tokens=6)
    pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)) for seed, shape in enumerate([(40, 30), (30, 90), (64, 64), (90, 30)])]
    lengths = {captioner.processor(images=[picture], text=[captioner.prompt], return_tensors="pt")["input_ids"].shape[1] for picture in pictures}
    alone = [captioner([picture])[0] for picture in pictures]
    assert len(lengths) > 1 and captioner(pictures) == alone and len(set(alone)) > 1


def test_a_missing_package_is_a_sentence(pictures, monkeypatch, capsys):
    from transformers import AutoProcessor
    def lacking(*_, **__): raise ImportError("\nThis model requires the following packages that were not found: timm.\nRun `pip install timm`")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(SystemExit) as left: main([str(pictures), "--model", "owner/florence"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "timm" in said and "owner/florence" in said


def make_shards(folder, each=5, torn=True):
    "Three nested tar shards; the last breaks off, a picture of the first is broken."
    for shard in range(3):
        place = folder / str(shard % 2) / f"{shard:03d}.tar"
        place.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(place, "w") as archive:
            for number in range(each):
                stream = io.BytesIO()
                Image.new("L", (12, 10), 40 * number + shard).save(stream, format="PNG")
                for name, data in ((f"{number:04d}.png", b"broken" if (shard, number) == (0, 3) else stream.getvalue()), (f"{number:04d}.txt", b"as it came")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    if torn: place.write_bytes(place.read_bytes()[:2 * 2048 + 512 + 40])
    return folder


def level(images): return [f"level {np.asarray(image)[0, 0, 0]}" for image in images]


def corpus_on(shards, **more): return open_corpus(corpus_of({"kind": "webdataset", "path": str(shards), "held_out": 0.0, "block": 2, **more}), 8, batch_size=3, part="train")


def test_shards_get_captions_beside_them_and_a_corpus_reads_them(tmp_path):
    shards = make_shards(tmp_path / "set")
    with pytest.raises(UserError, match="3 of 3 shards .* have no captions"): corpus_on(shards, metadata="captions-one.jsonl")
    plain, asked = corpus_on(shards).fingerprint(), []
    def caption(images): asked.append(len(images)); return level(images)
    _, report = recaption_shards(shards, caption, {"model": "one", "prompt": "a"}, batch_size=2)
    assert report["captions"] == 4 + 5 + 2 == sum(asked) and {name.split(":")[0] for name in report["skipped"]} == {"000.tar", "002.tar"}
    rows = {row["file_name"]: row["caption"] for row in read_lines(shards / "1/001.captions-one.jsonl")}
    assert rows == {f"{number:04d}": f"level {40 * number + 1}" for number in range(5)}
    corpus = corpus_on(shards, metadata="captions-one.jsonl")
    images, told = corpus.samples(range(30))
    for image, words in zip(images, told): assert words == f"level {round(float(image[0, 0, 0]) * 255)}"
    assert sorted(caption.split()[0] for caption in corpus.told(12)) == ["as"] + 11 * ["level"]  # the broken picture has no line, and keeps its own words
    assert corpus_on(shards).told(1) == ["as it came"] and corpus.fingerprint() != plain
    recaption_shards(shards, caption, {"model": "one", "prompt": "a"})
    assert sum(asked) == 11  # nothing is done twice
    with pytest.raises(UserError, match="was made with"): recaption_shards(shards, caption, {"model": "one", "prompt": "b"})
    make_shards(shards, torn=False)  # mended: what was missing is made, and nothing else
    for sidecar in shards.rglob("*.jsonl"): os.utime(sidecar, (0, 0))
    assert recaption_shards(shards, caption, {"model": "one", "prompt": "a"})[1]["captions"] == 14 and sum(asked) == 14


def test_a_killed_shard_goes_on_and_parts_share_the_shards(tmp_path):
    shards, calls = make_shards(tmp_path / "set", torn=False), []
    def killed(images):
        if len(calls) == 1: raise KeyboardInterrupt
        calls.append(len(images)); return level(images)
    with pytest.raises(KeyboardInterrupt): recaption_shards(shards, killed, {"model": "one"}, batch_size=2, part="1/2")
    asked = []
    for part in ("1/2", "2/2"): recaption_shards(shards, lambda images: [asked.append(len(images)), level(images)][1], {"model": "one"}, batch_size=2, part=part)
    assert sum(calls) + sum(asked) == 14 and len(list(shards.rglob("*.captions-one.jsonl"))) == 3 and not list(shards.rglob(".*.part"))
    with pytest.raises(UserError, match="fewer"): recaption_shards(shards, level, {"model": "one"}, part="4/4")
    for wrong in ("0/2", "3/2", "1", "a/b", ""):
        with pytest.raises(UserError, match="--part"): recaption_shards(shards, level, {"model": "one"}, part=wrong)


def test_parts_of_a_folder_are_joined_by_the_last(pictures):
    made = {"model": "one", "prompt": "a"}
    reports = [recaption(pictures, level, made, part=f"{number}/2")[1] for number in (1, 2)]
    whole = pictures / "captions-one.jsonl"
    assert sum(report["captions"] for report in reports) == 5 == len(read_lines(whole)) and all(report["captions"] for report in reports)
    assert recaption(pictures, lambda images: 1 / 0, made)[1]["captions"] == 5  # all are known
    Image.new("RGB", (8, 8), (9, 9, 9)).save(pictures / "new.png")
    for number in (1, 2): recaption(pictures, level, made, part=f"{number}/2")
    assert len(read_lines(whole)) == 6


def test_the_program_takes_shards(root, tmp_path, capsys):
    shards = make_shards(tmp_path / "set")
    main([str(shards), "--model", str(root / "blip"), "--max-new-tokens", "3", "--part", "1/1"])
    said = capsys.readouterr().out
    assert "captions-blip.jsonl: 11 captions" in said and "shards/s" in said and "could not be read" in said
    for words in (["--part", "2/1"], ["--out", str(tmp_path / "elsewhere"), "--part", "9/9"]):
        with pytest.raises(SystemExit) as left: main([str(shards / "*/*.tar"), "--model", str(root / "blip"), *words])
        assert left.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("recaption: ")
