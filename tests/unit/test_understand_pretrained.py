"Pretrained scorers on miniatures in the real formats: against transformers' own logits and losses, one sample at a time, and everything that can be wrong with a checkpoint."
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vugen.data.images import to_pil
from vugen.errors import UserError
from vugen.generate.adapters import save_miniature
from vugen.models.seams import Scorer
from vugen.understand.pretrained import (QUESTION, Conversation, TransformersContrastive, TransformersLikelihood, TransformersYes, clip_scorer, folder_fingerprint, information_scorer, likelihood_scorer,
                                         load_pretrained, save_pair_miniature, yes_scorer)
from vugen.understand.published import ScoreStore, item_scores, load_published, run_published
from vugen.understand.scorers import load_scorers, score_items, scorer_names, table_names, word_shuffled

PAIRS, VLMS = ("clip", "siglip", "siglip2"), ("llava", "qwen2_5_vl", "qwen3_vl", "janus")
CAPTIONS = ["a red circle", "A photo of a blue square left of a green star", "un café à gauche", "a heart"]


def picture(seed, width, height): return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype(np.uint8))


PICTURES = [picture(0, 40, 30), picture(1, 33, 61), picture(2, 40, 30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    for family in PAIRS: save_pair_miniature(family, folder / family)
    for family in VLMS: save_miniature(family, folder / family)
    return folder


@pytest.fixture(scope="module", params=PAIRS)
def pair(root, request): return load_pretrained(root / request.param, "clip")[:2]


@pytest.fixture(scope="module", params=VLMS)
def vlm(root, request): return load_pretrained(root / request.param, "vlm")[:2]


@pytest.fixture(scope="module")
def llava(root): return load_pretrained(root / "llava", "vlm")[:2]


def near(one, other, tolerance=1e-4):
    "Equal to a small part of what they are: probabilities of untrained models are tiny"
    one, other = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * other.abs().mean()).all())


def one_sentence(error): return "\n" not in str(error.value) and len(str(error.value)) < 500


# two towers

def reference(model, processor, pictures, captions):
    inputs = processor(text=captions, images=pictures, padding="max_length", max_length=model.config.text_config.max_position_embeddings, return_tensors="pt")
    with torch.no_grad(): return model(**inputs).logits_per_image.double()


def test_logits_are_the_models_own(pair):
    model, processor = pair
    scorer = TransformersContrastive(model, processor, batch_size=2)
    ours, theirs = scorer.score(PICTURES, CAPTIONS), reference(model, processor, PICTURES, CAPTIONS)
    assert isinstance(scorer, Scorer) and ours.dtype == torch.float64 and torch.allclose(ours, theirs, atol=2e-5) and theirs.std() > 1e-2
    assert torch.allclose(ours[1:2, 2:3], reference(model, processor, PICTURES[1:2], CAPTIONS[2:3]), atol=2e-5)


def test_clip_padded_to_its_longest_is_clip_padded_to_the_end(root):
    model, processor = load_pretrained(root / "clip", "clip")[:2]
    assert TransformersContrastive(model, processor).text_inputs(CAPTIONS)["input_ids"].shape[1] < 77
    inputs = processor(text=CAPTIONS, images=PICTURES, padding=True, return_tensors="pt")
    assert torch.allclose(TransformersContrastive(model, processor).score(PICTURES, CAPTIONS), model(**inputs).logits_per_image.double(), atol=2e-5)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_siglip_is_padded_to_the_length_that_it_was_trained_at(root, family):
    model, processor = load_pretrained(root / family, "clip")[:2]
    scorer = TransformersContrastive(model, processor)
    assert scorer.text_inputs(CAPTIONS[:1])["input_ids"].shape == (1, 64)
    right = scorer.score(PICTURES, CAPTIONS[:1])
    scorer = TransformersContrastive(model, processor)
    scorer.padding = "longest"  # the famous mistake
    assert (scorer.score(PICTURES, CAPTIONS[:1]) - right).abs().max() > 1e-2


@pytest.fixture(params=["clip", "likelihood", "yes"])
def scorer(root, request):
    return {"clip": lambda: clip_scorer(root / "siglip"), "likelihood": lambda: information_scorer(root / "qwen2_5_vl", batch_size=3), "yes": lambda: yes_scorer(root / "llava", batch_size=5)}[request.param]()


def test_matrix_pairs_items_and_blocks_agree(scorer):
    matrix = scorer.score(PICTURES, CAPTIONS)
    assert matrix.shape == (3, 4) and near(scorer.score_pairs(PICTURES, CAPTIONS[:3]), matrix[:, :3].diag())
    order = [3, 1, 1, 0]
    assert near(scorer.score(PICTURES[::-1], [CAPTIONS[place] for place in order]), matrix.flip(0)[:, order])
    items = score_items(scorer, [PICTURES[:2], PICTURES[1:]], [CAPTIONS[:2], CAPTIONS[2:]])
    assert near(items, torch.stack([matrix[:2, :2], matrix[1:, 2:]]))
    ragged = item_scores(scorer, [PICTURES[:1], PICTURES[1:2]], [CAPTIONS, CAPTIONS[:2]])
    assert [part.shape for part in ragged] == [(1, 4), (1, 2)] and near(ragged[1], matrix[1:2, :2])
    sorted_words = word_shuffled(scorer)
    assert sorted_words.picture_size == "original" and near(item_scores(sorted_words, [PICTURES[:1]], [["circle red a", "heart a"]])[0], scorer.score(PICTURES[:1], ["a circle red", "a heart"]))


def test_tensors_are_the_pictures_that_they_came_from(scorer):
    images = torch.stack([torch.from_numpy(np.array(PICTURES[place])).permute(2, 0, 1).float() / 255 for place in (0, 2)])
    assert torch.equal(scorer.score(images, CAPTIONS[:2]), scorer.score([PICTURES[0], PICTURES[2]], CAPTIONS[:2]))
    with pytest.raises(UserError, match="shape"): scorer.score(images[0], CAPTIONS[:1])


def test_every_part_is_read_once(root):
    scorer, seen = clip_scorer(root / "clip"), {"pictures": 0, "captions": 0}
    inner = scorer.processor
    class Counting:
        tokenizer = inner.tokenizer
        def __call__(self, text=None, images=None, **options):
            seen["pictures"] += len(images or []); seen["captions"] += len(text or [])
            return inner(text=text, images=images, **options) if text else inner(images=images, **options)
    scorer.processor = Counting()
    scorer.score_pairs([PICTURES[0], PICTURES[1], PICTURES[0].copy()], [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]])
    assert seen == {"pictures": 2, "captions": 2}
    scorer.score(PICTURES, CAPTIONS)
    assert seen["captions"] == 4  # those of the first call are known


@pytest.mark.parametrize("family", PAIRS)
def test_captions_beyond_the_tower_are_refused_or_counted(root, family):
    endless, fits = "a red circle left of " * 40 + "a star", "a b " * 8
    strict = TransformersContrastive.from_pretrained(root / family)
    with pytest.raises(UserError, match=f"at most {strict.limit} tokens") as error: strict.score(PICTURES[:1], [endless])
    assert one_sentence(error) and strict.score(PICTURES[:1], [fits]).isfinite().all() and strict.remarks([fits]) is None
    cutting = clip_scorer(root / family)
    inputs = cutting.processor(text=[endless], images=PICTURES[:1], padding="max_length", truncation=True, max_length=cutting.limit, return_tensors="pt")
    assert torch.allclose(cutting.score(PICTURES[:1], [endless]), cutting.model(**inputs).logits_per_image.double(), atol=2e-5)
    assert cutting.remarks([fits, endless, endless]).startswith("1 of 2 different captions do not fit into the")
    with pytest.raises(UserError, match="refuse or cut"): clip_scorer(root / family, too_long="ignore")


# vision–language models

def spoken_loss(model, processor, question, answer, picture=None):
    "log p(answer) of one conversation alone, as the processor's own chat template and the model's own loss have it"
    content = [{"type": "image", "image": picture}] * (picture is not None) + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", continue_final_message=True)
    labels = inputs["input_ids"].clone()
    count = next(count for count in range(1, labels.shape[1]) if processor.tokenizer.decode(labels[0, -count:]).strip() == answer)  # a blank before the answer may belong to its first token
    labels[:, :-count] = -100
    with torch.no_grad(): return -model(**inputs, labels=labels).loss.double().item() * count, count


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("reuse", [True, False])
def test_likelihood_is_the_models_own_loss(vlm, batch_size, reuse):
    model, processor = vlm
    scorer = TransformersLikelihood(model, processor, batch_size=batch_size, reuse=reuse)
    theirs = torch.tensor([[spoken_loss(model, processor, scorer.prompt, caption, picture)[0] for caption in CAPTIONS] for picture in PICTURES])
    assert torch.allclose(scorer.score(PICTURES, CAPTIONS), theirs.double(), rtol=1e-5, atol=1e-3)
    assert scorer.reuse_note == "" and scorer.proven == (reuse and scorer.reuse)
    assert (theirs[:, 0] - theirs[0, 0]).abs().max() > 1e-3  # the picture is seen


def test_likelihood_a_token_and_information(vlm):
    model, processor = vlm
    mean, gained = TransformersLikelihood(model, processor, per_token=True), TransformersLikelihood(model, processor, prior=1.)
    seen, blind = (torch.tensor([spoken_loss(model, processor, mean.prompt, caption, shown)[0] for caption in CAPTIONS]).double() for shown in (PICTURES[1], None))
    counts = torch.tensor([spoken_loss(model, processor, mean.prompt, caption)[1] for caption in CAPTIONS])
    assert torch.allclose(mean.score(PICTURES[1:2], CAPTIONS)[0], seen / counts, atol=1e-3) and torch.allclose(gained.score(PICTURES[1:2], CAPTIONS)[0], seen - blind, atol=2e-3)
    assert torch.allclose(TransformersLikelihood(model, processor, prior=.5).score(PICTURES[1:2], CAPTIONS)[0], seen - blind / 2, atol=2e-3)


def test_yes_is_a_plain_forward(vlm):
    model, processor = vlm
    scorer = TransformersYes(model, processor)
    theirs = torch.tensor([[np.exp(spoken_loss(model, processor, QUESTION.replace("{caption}", caption), "Yes", picture)[0]) for caption in CAPTIONS] for picture in PICTURES])
    assert torch.allclose(scorer.score(PICTURES, CAPTIONS), theirs, rtol=1e-3, atol=0) and (theirs > 0).all()


def test_yes_of_one_token_is_read_off_the_prompt(root, tmp_path):
    """The prompt alone, up to where the answer would begin, and the probability of its next token"""
    shutil.copytree(root / "qwen2_5_vl", tmp_path / "one")
    tokenizer = load_pretrained(root / "qwen2_5_vl", "vlm")[1].tokenizer
    tokenizer.add_tokens(["Yes"]); tokenizer.save_pretrained(tmp_path / "one")
    model, processor = load_pretrained(tmp_path / "one", "vlm")[:2]
    turns = [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": QUESTION.replace("{caption}", CAPTIONS[0])}]}]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    assert processor.tokenizer("Yes")["input_ids"] == [yes]
    with torch.no_grad(): theirs = model(**inputs).logits[0, -1].double().softmax(0)[yes]
    assert near(TransformersYes(model, processor).score(PICTURES[:1], CAPTIONS[:1])[0, 0], theirs)


def test_spellings_of_yes_add_up_and_may_not_begin_each_other(llava):
    one, other, both = (TransformersYes(*llava, answers=answers).score(PICTURES[:2], CAPTIONS) for answers in (["Yes"], ["yes"], ["Yes", "yes"]))
    assert near(both, one + other) and not near(one, other)
    with pytest.raises(UserError, match="'Ye' is the beginning of 'Yes'"): TransformersYes(*llava, answers=["Yes", "Ye"])
    for wrong in ("Yes", []):
        with pytest.raises(UserError, match="spellings"): TransformersYes(*llava, answers=wrong)
    with pytest.raises(UserError, match=r"\{caption\}"): TransformersYes(*llava, template="Is it true?")
    assert not near(TransformersYes(*llava, template='"{caption}": yes or no?').score(PICTURES[:2], CAPTIONS), one)


def test_token_ids_are_those_of_the_processor(vlm):
    model, processor = vlm
    row, seen = Conversation(processor).row("Is it?", "Yes it is", PICTURES[1])
    turns = [{"role": "user", "content": [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "Is it?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "Yes it is"}]}]
    theirs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", continue_final_message=True)
    assert torch.equal(row.ids, theirs["input_ids"][0]) and {"input_ids", "attention_mask", *row.extras, *seen} == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in seen.items()) and processor.tokenizer.decode(row.ids[row.start:]) == "Yes it is"


def test_a_start_token_is_not_written_twice(llava):
    from tokenizers.processors import TemplateProcessing
    processor = copy.deepcopy(llava[1])
    start = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)])
    assert processor.tokenizer("x")["input_ids"][0] == start
    assert (Conversation(processor).row("Is it?", "Yes", PICTURES[0])[0].ids == start).sum() == 1  # the template writes it
    assert (Conversation(processor, raw="USER: <image> {question} ASSISTANT: ").row("Is it?", "Yes", PICTURES[0])[0].ids == start).sum() == 1  # the tokenizer does


def test_the_answer_is_the_token_that_follows_in_the_conversation():
    """Llama's tokens carry the blank before them: after 'ASSISTANT:' comes '▁Yes', and 'Yes' glued to the colon would be another token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<image>", "▁USER:", "▁Is", "▁it?", "▁ASSISTANT:", "▁Yes", "Yes", "▁", "▁No", ":"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    class Processor:
        tokenizer, chat_template, image_token = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "", "<image>"
        def __call__(self, text, add_special_tokens, return_tensors): return self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors=return_tensors)
    row, seen = Conversation(Processor(), raw="USER: {question} ASSISTANT: ").row("Is it?", "Yes")
    assert [words[token] for token in row.ids[row.start:]] == ["▁Yes"] and words[row.ids[row.start - 1]] == "▁ASSISTANT:" and not seen


def test_pictures_of_many_sizes_go_together(root):
    """Qwen counts positions by the picture's rows and columns; each picture's own must hold, kept or not."""
    scorer = likelihood_scorer(root / "qwen3_vl", batch_size=8)
    shown = [picture(seed, width, height) for seed, (width, height) in enumerate([(40, 40), (80, 24), (24, 80), (40, 40)])]
    whole = TransformersLikelihood(scorer.model, scorer.processor, reuse=False)
    assert torch.allclose(scorer.score(shown, CAPTIONS[:2]), torch.cat([whole.score([one], CAPTIONS[:2]) for one in shown]), atol=1e-4) and scorer.proven
    assert torch.allclose(scorer.score_pairs(shown, CAPTIONS), whole.score(shown, CAPTIONS).diag(), atol=1e-4)


def test_a_picture_is_processed_once_for_all_captions(llava):
    model, processor = llava
    calls, inner = [], processor.image_processor
    class Counting:
        def __getattr__(self, name): return getattr(inner, name)
        def __call__(self, *arguments, **options): calls.append(1); return inner(*arguments, **options)
    processor = copy.copy(processor); processor.image_processor = Counting()
    TransformersYes(model, processor).score(PICTURES, CAPTIONS)
    assert len(calls) == 3


def test_what_is_kept_of_the_picture_is_only_used_where_it_is_the_same(llava, monkeypatch):
    scorer, whole = TransformersYes(*llava), TransformersYes(*llava, reuse=False).score(PICTURES, CAPTIONS)
    other, right = TransformersYes(*llava), scorer.listener.read_on
    monkeypatch.setattr(scorer.listener, "read_on", lambda jobs: right(jobs) + .1)
    assert near(scorer.score(PICTURES, CAPTIONS), whole) and not scorer.reuse and "differ by 0.1" in scorer.reuse_note
    def cannot(jobs): raise NotImplementedError("no cache")
    monkeypatch.setattr(other.listener, "read_on", cannot)
    assert near(other.score(PICTURES, CAPTIONS), whole) and not other.reuse and "no cache" in other.reuse_note


def test_a_decoder_with_a_short_memory_is_read_right(root, tmp_path):
    """Mistral's layers forget what lies further back than their window, kept or not"""
    from transformers import AutoConfig, AutoModelForImageTextToText
    shutil.copytree(root / "llava", tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    config["text_config"] = {**config["text_config"], "model_type": "mistral", "sliding_window": 12}
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "short")).save_pretrained(tmp_path / "short")
    model, processor = load_pretrained(tmp_path / "short", "vlm")[:2]
    scorer = TransformersLikelihood(model, processor)
    theirs = torch.tensor([[spoken_loss(model, processor, scorer.prompt, caption, picture)[0] for caption in CAPTIONS] for picture in PICTURES])
    assert near(scorer.score(PICTURES, CAPTIONS), theirs) and scorer.proven and model.config.text_config.sliding_window == 12


def test_the_language_model_reads_the_picture_once(llava):
    model, processor = llava
    scorer, read = TransformersYes(model, processor, batch_size=8), []
    handle = model.model.language_model.register_forward_hook(lambda module, arguments, options, output: read.append(output.last_hidden_state.shape[0] * output.last_hidden_state.shape[1]), with_kwargs=True)
    try:
        scorer.score(PICTURES[:2], CAPTIONS); read.clear()
        scorer.score(PICTURES[:2], CAPTIONS); kept = sum(read); read.clear()
        TransformersYes(model, processor, batch_size=8, reuse=False).score(PICTURES[:2], CAPTIONS)
    finally: handle.remove()
    assert kept < .85 * sum(read)


def test_half_precision_is_near(root):
    exact, half = (yes_scorer(root / "llava", dtype=dtype).score(PICTURES, CAPTIONS) for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.float64 and torch.allclose(exact.log(), half.log(), atol=1.) and not torch.equal(exact, half)


def test_special_tokens_and_empty_captions_are_refused(root, scorer):
    for caption, words in (("  ", "empty"), (f"a {scorer.processor.tokenizer.eos_token} b", "special token")):
        with pytest.raises(UserError, match=words) as error: scorer.score(PICTURES[:1], ["a star", caption])
        assert scorer.name in str(error.value) and one_sentence(error)
    assert scorer.score(PICTURES[:1], ["1 < 2"]).isfinite().all()


def test_a_conversation_beyond_the_context_is_refused(llava):
    with pytest.raises(UserError, match="at most 256 tokens"): TransformersYes(*llava).score(PICTURES[:1], ["a red circle left of " * 60])


def test_without_a_chat_template_a_raw_one_is_asked_for(root, tmp_path):
    shutil.copytree(root / "llava", tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template") as error: yes_scorer(tmp_path / "mute")
    assert one_sentence(error)
    raw = yes_scorer(tmp_path / "mute", raw="<s>USER: <image>{question} ASSISTANT: ")
    assert near(raw.score(PICTURES, CAPTIONS), yes_scorer(root / "llava").score(PICTURES, CAPTIONS))  # the template's own words
    likelihood_scorer(tmp_path / "mute", raw="<s>USER: <image>{question} ASSISTANT: ", prior=1.).score(PICTURES[:1], CAPTIONS[:1])
    with pytest.raises(UserError, match=r"\{question\}"): yes_scorer(tmp_path / "mute", raw="USER: ")
    (tmp_path / "mute/chat_template.json").write_text(json.dumps({"chat_template": (root / "llava/chat_template.jinja").read_text()}))  # where older folders keep it
    assert near(yes_scorer(tmp_path / "mute").score(PICTURES, CAPTIONS), raw.score(PICTURES, CAPTIONS))
    (tmp_path / "mute/chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content + '!' }}"}))
    with pytest.raises(UserError, match="chat template cannot write"): yes_scorer(tmp_path / "mute")


def test_a_processor_saved_in_the_newest_format_is_read(root, tmp_path):
    """One processor_config.json, in which the pixels lie too"""
    for family, loader, captions in (("clip", clip_scorer, CAPTIONS), ("llava", yes_scorer, CAPTIONS)):
        scorer = loader(root / family)
        scorer.model.save_pretrained(tmp_path / family); scorer.processor.save_pretrained(tmp_path / family)
        assert not (tmp_path / family / "preprocessor_config.json").exists() and near(loader(tmp_path / family).score(PICTURES, captions), scorer.score(PICTURES, captions))


# what can be wrong with a checkpoint

@pytest.fixture
def spoiled(root, tmp_path):
    def make(family, spoil):
        shutil.copytree(root / family, tmp_path / "spoiled")
        spoil(tmp_path / "spoiled")
        return tmp_path / "spoiled"
    return make


def without(*names): return lambda folder: [(folder / name).unlink() for name in names if (folder / name).exists()]
def cut(folder): (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
def pickled(folder): torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"); (folder / "model.safetensors").unlink()
def torn(folder): (folder / "config.json").write_text("{")
def lacking(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "k_proj.weight" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
def foreign_code(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoModelForImageTextToText")}}))


@pytest.mark.parametrize("family, loader", [("clip", clip_scorer), ("llava", yes_scorer)])
@pytest.mark.parametrize("spoil, words", [(without("config.json"), "config.json is missing"), (torn, "config.json"), (cut, "no readable safetensors"), (lacking, "lacks weights.*k_proj"), (without("model.safetensors"), "no safetensors weights"),
                                          (pickled, "pytorch_model.bin, a pickle, is never read"), (without("preprocessor_config.json", "processor_config.json"), "processor"), (without("tokenizer.json", "tokenizer_config.json"), "processor"), (foreign_code, "never run")])
def test_a_spoiled_folder_is_told_in_one_sentence(spoiled, family, loader, spoil, words):
    folder = spoiled(family, spoil)
    with pytest.raises(UserError, match=words) as error: loader(folder)
    assert one_sentence(error) and str(folder) in str(error.value)


def test_other_models_are_refused_before_their_weights_are_read(root, tmp_path):
    from transformers import BertConfig, CLIPVisionConfig, LlamaConfig, T5Config
    for config, loader, words in ((BertConfig(), clip_scorer, "bert model, which has no two towers"), (CLIPVisionConfig(), clip_scorer, "no two towers"), (BertConfig(), yes_scorer, "reads no pictures"), (LlamaConfig(), likelihood_scorer, "reads no pictures"), (T5Config(), yes_scorer, "t5")):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=words) as error: loader(tmp_path)
        assert one_sentence(error)
    with pytest.raises(UserError, match="llava model, which has no two towers"): clip_scorer(root / "llava")
    with pytest.raises(UserError, match="clip model, which reads no pictures with its words"): yes_scorer(root / "clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "florence2", "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="florence2 model, an encoder with a decoder"): yes_scorer(tmp_path)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub
    asked = []
    def offline(name, allow_patterns): asked.append((name, allow_patterns)); raise OSError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="owner/model is neither a folder here nor a hub model that can be reached") as error: clip_scorer("owner/model")
    assert one_sentence(error) and {"*.safetensors", "*.jinja", "*.txt", "*.model"} <= set(asked[0][1]) and not any("bin" in pattern or "py" in pattern for pattern in asked[0][1])
    with pytest.raises(UserError, match="not a folder"): yes_scorer("/no/such/folder")


def test_a_picture_that_no_processor_takes(root):
    with pytest.raises(UserError, match="cannot read a picture of 2×900 pixels") as error: yes_scorer(root / "qwen2_5_vl").score([picture(0, 2, 900)], CAPTIONS[:1])
    assert one_sentence(error)


# names, fingerprints, stores

def test_fingerprints_know_what_a_score_depends_on(root, tmp_path):
    shutil.copytree(root / "llava", tmp_path / "copy")
    first = yes_scorer(root / "llava")
    assert yes_scorer(tmp_path / "copy", name="another name").fingerprint == first.fingerprint
    others = [yes_scorer(root / "llava", template="{caption}?"), yes_scorer(root / "llava", answers=["yes"]), yes_scorer(root / "llava", dtype=torch.bfloat16), likelihood_scorer(root / "llava"), information_scorer(root / "llava"),
              likelihood_scorer(root / "llava", prompt="What is it?"), likelihood_scorer(root / "llava", per_token=True)]
    (tmp_path / "copy/chat_template.jinja").write_text("{{ bos_token }}" + (root / "llava/chat_template.jinja").read_text())
    others.append(yes_scorer(tmp_path / "copy"))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    weights = load_file(root / "clip/model.safetensors")
    shutil.copytree(root / "clip", tmp_path / "clip")
    weights["logit_scale"] += 1e-3
    save_file(weights, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(tmp_path / "clip") != folder_fingerprint(root / "clip") and clip_scorer(root / "clip", batch_size=1).fingerprint == clip_scorer(root / "clip").fingerprint


def test_scorers_of_one_checkpoint_share_its_weights(root):
    one, other = likelihood_scorer(root / "llava"), yes_scorer(root / "llava")
    assert one.model is other.model and one.processor is not other.processor


def test_names_on_the_command_line(root):
    names = f"clip:{root / 'clip'}, vqascore:{root / 'llava'},contrastive"
    assert list(table_names(scorer_names(names)).values()) == ["clip:clip", "vqascore:llava", "contrastive"]
    assert table_names(["clip:/a/x/last", "clip:/b/x/last", "clip:owner/last"]) == {"clip:/a/x/last": "clip:a/x/last", "clip:/b/x/last": "clip:b/x/last", "clip:owner/last": "clip:owner/last"}
    for wrong, words in (("clap:x", "clip, likelihood"), ("clip:", "names no model"), ("soup", "KIND:FOLDER")):
        with pytest.raises(UserError, match=words): scorer_names(wrong)
    loaded = load_scorers(names=[f"clip:{root / 'siglip'}", f"likelihood:{root / 'llava'}", f"likelihood-pmi:{root / 'llava'}", "bag-of-words"])
    assert list(loaded) == ["clip:siglip", "likelihood:llava", "likelihood-pmi:llava", "bag-of-words"] and [loaded[name].name for name in list(loaded)[:3]] == list(loaded)[:3]
    assert (loaded["likelihood:llava"].prior, loaded["likelihood-pmi:llava"].prior) == (0, 1)


def sugarcrepe(folder):
    (folder / "val2017").mkdir(parents=True)
    for number, one in enumerate(PICTURES[:2]): one.save(folder / f"val2017/{number}.png")
    rows = {str(number): {"filename": f"{number % 2}.png", "caption": f"a red star {number}", "negative_caption": f"a star, red {number}"} for number in range(5)}
    for kind in ("swap_obj", "replace_att"): (folder / f"{kind}.json").write_text(json.dumps(rows))
    return folder


def test_pictures_come_at_their_own_sizes(tmp_path):
    class Sizes(TransformersContrastive):
        def __init__(self): self.name, self.seen = "sizes", []
        def score_blocks(self, images, captions): self.seen += [one.size for shown in images for one in shown]; return [torch.tensor([[2., 1.]])] * len(images)
        def remarks(self, captions): return "something was cut"
    suite, scorer = load_published("sugarcrepe", sugarcrepe(tmp_path / "sc"), size=8), Sizes()
    found = run_published(suite, {"sizes": scorer}, ScoreStore(tmp_path / "i.parquet"))
    assert set(scorer.seen) == {(40, 30), (33, 61)} and found["notes"]["sizes"] == "something was cut"
    assert suite.shown([0]).shape == (1, 1, 3, 8, 8) and suite.shown([0], 16).shape == (1, 1, 3, 16, 16)


def test_scenes_are_drawn_larger_for_those_who_ask():
    from vugen.understand.benchmarks import scene_suite
    suite = scene_suite(n=1)
    small, large = suite.pictures([0]), suite.shown([0], "original")[0]
    assert large[0].size == (256, 256) and suite.shown([0], 64).shape == (1, 2, 3, 64, 64) and torch.equal(suite.shown([0]), small)
    near = np.array(large[0].resize((32, 32), Image.Resampling.BOX)).astype(float) - np.array(to_pil(small[0, 0])).astype(float)
    assert np.abs(near).mean() < 25  # the same scene


def test_bind_from_the_command_line_goes_on_and_knows_a_changed_model(root, tmp_path, capsys, monkeypatch):
    from vugen.lab.cli import main
    from vugen.understand import pretrained, published
    benchmark, models = sugarcrepe(tmp_path / "sc"), tmp_path / "models"
    for family in ("clip", "llava"): shutil.copytree(root / family, models / family)
    def call(*words):
        with pytest.raises(SystemExit) as left: main(["bind", "--suite", "sugarcrepe", "--root", str(benchmark), "--items", str(tmp_path / "i.parquet"), "--device", "cpu", "--scorer", f"clip:{models / 'clip'},vqascore:{models / 'llava'}", *map(str, words)])
        return left.value.code
    asked = []
    judge = pretrained.PretrainedScorer._asked
    def counted(self, pictures, captions, pairs): asked.append((self.name, len(pairs))); return judge(self, pictures, captions, pairs)
    monkeypatch.setattr(pretrained.PretrainedScorer, "_asked", counted)
    def killed(self, records): raise KeyboardInterrupt
    keep = published.ScoreStore.add
    monkeypatch.setattr(published.ScoreStore, "add", lambda self, records: killed(self, records) if records[0]["scorer"].startswith("vqascore") else keep(self, records))
    assert call() == 130 and asked == [("clip:clip", 20), ("vqascore:llava", 20)]
    monkeypatch.setattr(published.ScoreStore, "add", keep); asked.clear()
    assert call("--json", tmp_path / "a.json") == 0 and asked == [("vqascore:llava", 20)]
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert "clip:clip" in out and "CLIP L/14 60.2%" in out and {row["scorer"] for row in found["rows"]} == {"clip:clip", "vqascore:llava"} and {row["category"] for row in found["rows"]} == {"swap_obj", "replace_att", "all"}
    assert str(tmp_path) not in (tmp_path / "a.json").read_text() and "--scorer clip:clip,vqascore:llava" in found["run"]["command"] and set(found["run"]["pretrained"]) == {"clip:clip", "vqascore:llava"}
    asked.clear()
    assert call("--json", tmp_path / "b.json") == 0 and not asked and json.loads((tmp_path / "b.json").read_text())["rows"] == found["rows"]
    save_pair_miniature("clip", models / "clip", seed=5)
    assert call("--json", tmp_path / "c.json") == 0 and asked == [("clip:clip", 20)]
    changed = json.loads((tmp_path / "c.json").read_text())
    assert changed["run"]["pretrained"]["clip:clip"] != found["run"]["pretrained"]["clip:clip"] and changed["run"]["pretrained"]["vqascore:llava"] == found["run"]["pretrained"]["vqascore:llava"]
    (models / "clip/model.safetensors").unlink()
    assert call() == 2 and "no safetensors weights" in capsys.readouterr().err


def test_classify_from_the_command_line(root, tmp_path, capsys):
    from vugen.lab.cli import main
    PICTURES[1].save(tmp_path / "one.png")
    with pytest.raises(SystemExit) as left: main(["classify", str(tmp_path / "one.png"), "--captions", *CAPTIONS[:2], "--scorer", f"clip:{root / 'siglip2'}", "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert left.value.code == 0 and np.allclose([row["value"] for row in rows], clip_scorer(root / "siglip2").score(PICTURES[1:2], CAPTIONS[:2])[0], atol=1e-5) and {row["scorer"] for row in rows} == {"clip:siglip2"}


def test_perception_lm_says_what_its_processor_lacks(tmp_path):
    """transformers has no Pillow processor for it; with torchvision it is read as the others are."""
    from transformers.utils import is_torchvision_available
    save_miniature("perception_lm", tmp_path)
    if is_torchvision_available(): assert yes_scorer(tmp_path).score(PICTURES[:1], CAPTIONS[:1]).isfinite().all()
    else:
        with pytest.raises(UserError, match="torchvision") as error: yes_scorer(tmp_path)
        assert one_sentence(error)
