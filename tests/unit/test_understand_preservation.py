"Two states of a model compared: the test against scipy's, the interval against simulation, bits against a copy with one number moved, and a proof that can fail."
import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from vugen.errors import UserError
from vugen.generate.adapters import load_adapter, save_miniature
from vugen.generate.text_to_image import TextToImage
from vugen.paths import checkpoints_dir
from vugen.understand.preservation import compared, frozen_proof, mcnemar, paired_difference, same_logits
from vugen.understand.vlm_answers import Spoken, TransformersAnswerer, always, oracle, run_questions
from vugen.understand.vlm_benchmarks import Question, QuestionSet


def test_the_exact_test_is_scipys():
    for won in range(0, 30, 3):
        for lost in range(0, 30, 4): assert mcnemar(won, lost) == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1)
    assert mcnemar(200, 900) < 1e-90
    with pytest.raises(UserError): mcnemar(-1, 2)


@pytest.mark.parametrize("win,lose", [(.05, .05), (.2, .1), (.01, .0), (.4, .1)])
def test_the_interval_covers_what_it_promises(win, lose):
    draws = np.random.default_rng(0).multinomial(80, [win, lose, 1 - win - lose], 3000)
    inside = [(found := paired_difference(int(won), int(lost), 80)).low <= win - lose <= found.high for won, lost, _ in draws]
    assert np.mean(inside) > .935


def test_intervals_stay_within_bounds_and_counts_are_checked():
    assert paired_difference(10, 0, 10).high == 1 and paired_difference(0, 10, 10).low == -1 and paired_difference(0, 0, 5).value == 0
    for counts in ((3, 3, 5), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(UserError): paired_difference(*counts)


def records(questions, model): return run_questions(QuestionSet(questions[0].suite, questions), [model])["records"][model.name]


PAIRS = [Question("mme", f"color/{picture}/{number}", "?", (("no", "yes")[number],), ("Yes", "No"), (), task, area, f"{task}/{picture}") for picture in range(20) for number in range(2) for task, area in [("color", "perception") if picture < 12 else ("code_reasoning", "cognition")]]


def rows(found): return {(row["category"], row["metric"]): row for row in found}


def test_changes_are_counted_by_hand():
    slips = Spoken("slips", lambda question: ("Yes" if question.answers[0] == "no" else "No") if question.group == "color/3" and question.key.endswith("/1") else question.answers[0])
    found = rows(compared(records(PAIRS, oracle()), records(PAIRS, slips), "pair"))
    row = found["all", "accuracy_plus difference"]
    assert found["all", "answers changed"]["value"] == pytest.approx(1 / 40) and found["all", "answers changed"]["n"] == 40 and (row["won"], row["lost"], row["n"]) == (0, 1, 20) and row["value"] == pytest.approx(-.05) and row["p"] == 1
    assert found["perception", "accuracy_plus difference"]["lost"] == 1 and found["cognition", "accuracy_plus difference"]["lost"] == 0
    back = rows(compared(records(PAIRS, slips), records(PAIRS, oracle()), "pair"))["all", "accuracy_plus difference"]
    assert (back["won"], back["lost"]) == (1, 0) and back["value"] == -row["value"]


def test_two_models_with_the_same_score_and_other_answers():
    found = rows(compared(records(PAIRS, always("Yes")), records(PAIRS, always("No")), "pair"))
    assert found["all", "answers changed"]["value"] == 1 and found["all", "accuracy_plus difference"]["value"] == 0


def test_groups_that_one_of_them_lacks_are_left_out_and_others_refused():
    one, other = records(PAIRS, oracle()), records(PAIRS, always("Yes"))
    other[0] = {**other[0], "problem": "its picture is broken"}
    assert rows(compared(one, other, "pair"))["all", "accuracy_plus difference"]["n"] == 19
    with pytest.raises(UserError, match="different questions"): compared(one, [{**record, "key": f"other {record['key']}"} for record in other], "pair")
    with pytest.raises(UserError, match="no question"): compared(one, [{**record, "group": f"x{record['group']}"} for record in other], "pair")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preserved")
    for family in ("llava", "qwen2_5_vl"): save_miniature(family, folder / family)
    return folder


def shown(number):
    buffer = io.BytesIO(); Image.new("RGB", (20 + number, 30), "red").save(buffer, "PNG")
    return Question("mme", f"color/{number}/1", "Is it red?", ("yes",), ("Yes", "No"), (buffer.getvalue(),), "color", "perception", f"color/{number}")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_logits_are_the_same_to_the_bit_or_they_are_not(root, family):
    one, questions = TransformersAnswerer.from_pretrained(root / family), [shown(number) for number in range(5)]
    twin, moved = (TransformersAnswerer(copy.deepcopy(one.model), one.processor, "twin") for _ in range(2))
    weight = moved.model.lm_head.weight
    weight.data[3, 3] += 1e-5  # more than the sums of float32 round away, whatever their order
    same, other = rows(same_logits(one, twin, questions, most=3)), rows(same_logits(one, moved, questions, most=3))
    assert same["sample", "logits bit-identical"]["value"] == 1 and same["sample", "largest logit difference"]["value"] == 0 and same["sample", "logits bit-identical"]["n"] == 3
    assert other["sample", "logits bit-identical"]["value"] < 1 and 0 < other["sample", "largest logit difference"]["value"] < 1e-3
    with pytest.raises(UserError, match="compute some"): same_logits(one, oracle(), questions)
    with pytest.raises(UserError, match="no question of the sample"): same_logits(one, twin, [Question("mme", "x", "Is it?", ("yes",), ("Yes", "No"), (b"broken",))])


CLAIMS = ("same fingerprint before", "same logits before", "no shared memory", "the tower moved", "same fingerprint after", "same logits after")


def test_the_embedded_generator_leaves_its_model_alone():
    from vugen.generate.vlm import SceneVLM
    root = checkpoints_dir()
    generator = TextToImage.from_pretrained(root / "generator")
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    proof = frozen_proof(SceneVLM.from_pretrained(root / "vlm"), generator, torch.rand(2, 3, 32, 32), ["a red circle", "is there a blue star ?"])
    assert all(proof[claim] for claim in CLAIMS) and proof["preserved"] and proof["largest logit difference"] == 0
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())  # put back


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_generator_on_a_model_of_transformers_leaves_it_alone(root, family):
    size = {"image_size": 32} if family == "qwen2_5_vl" else {}
    before, own = (load_adapter(root / family, **size) for _ in range(2))
    grown = TextToImage(latent_dim=4, grid=own.vision.grid).attach(own)
    proof = frozen_proof(before, grown, torch.rand(2, 3, 32, 32), ["a red circle", "a blue square"])
    assert all(proof[claim] for claim in CLAIMS) and proof["share of trained tensors that moved"] > .9


def test_the_proof_fails_where_it_should(root):
    before, own = (load_adapter(root / "llava") for _ in range(2))
    prompts, images = ["a red circle", "a blue square"], torch.rand(2, 3, 32, 32)
    grown = TextToImage(latent_dim=4, grid=own.vision.grid).attach(own)
    grown.mixture.tower.layers[0].mlp = grown.mixture.decoder.layers[0].mlp.requires_grad_(True)  # shared in place of copied
    proof = frozen_proof(before, grown, images, prompts)
    assert [claim for claim in CLAIMS if not proof[claim]] == ["no shared memory", "same fingerprint after", "same logits after"] and not proof["preserved"]
    other = load_adapter(save_miniature("llava", root / "other", seed=5))
    proof = frozen_proof(other, TextToImage(latent_dim=4, grid=own.vision.grid).attach(load_adapter(root / "llava")), images, prompts)
    assert not proof["same fingerprint before"] and not proof["same logits before"] and proof["no shared memory"]
