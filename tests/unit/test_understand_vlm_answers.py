"Vision–language models asked: against transformers' own logits and greedy loop; answerers of which the score is known; stores that were killed, halved or belong elsewhere."
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vugen.errors import UserError
from vugen.generate.adapters import load_adapter, save_miniature
from vugen.understand.vlm_answers import (AnswerStore, SeamAnswerer, Spoken, TransformersAnswerer, always, ask, asked_parts, frequent, given, guesser, load_answerer, oracle, question_digest, rows_from_answers, run_questions)
from vugen.understand.vlm_benchmarks import Question, QuestionSet

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "janus")


def png(color, size=(40, 30)):
    buffer = io.BytesIO(); Image.new("RGB", size, color).save(buffer, "PNG"); return buffer.getvalue()


def mme(number=0, color="red", **more):
    return Question("mme", f"color/{number}/1", f"Is é{number} red? Please answer yes or no.", ("yes",), ("Yes", "No"), (png(color),), "color", "perception", f"color/{number}", **more)


def choice(number=0, count=3, **more): return Question("mmbench", str(number), "Which one?", ("B",), ("red", "blue", "green")[:count], (png("blue"),), "c", "a", str(number), **more)


def puzzle(number=0, pictures=2): return Question("mmmu", f"validation_Math_{number}", "Is <image 1> like <image 2>?" if pictures > 1 else "<image 1>?", ("A",), ("yes", "no"), tuple(png(color) for color in ("red", "blue")[:pictures]), "Math", "Science", str(number))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    for family in FAMILIES: save_miniature(family, folder / family)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def answerer(root, request): return TransformersAnswerer.from_pretrained(root / request.param)


@pytest.fixture(scope="module")
def llava(root): return TransformersAnswerer.from_pretrained(root / "llava")


def pictures(question): return [Image.open(io.BytesIO(each)).convert("RGB") for each in question.pictures]


def own_likelihood(answerer, parts, answer, shown): # one row, one call, transformers alone
    turns = [{"role": "user", "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    processor = answerer.processor
    text, bare = processor.apply_chat_template(turns, continue_final_message=True), processor.tokenizer
    inputs = processor(text=[text], images=shown, add_special_tokens=not (bare.bos_token and text.startswith(bare.bos_token)), return_tensors="pt")
    count = len(bare(text, add_special_tokens=False)["input_ids"]) - next(place for place, (one, other) in enumerate(zip(*(bare(each, add_special_tokens=False)["input_ids"] + [-1] for each in (text, text[:-len(answer)])))) if one != other)
    with torch.no_grad(): logits = answerer.model(**inputs).logits.double().log_softmax(-1)
    return logits[0, -count - 1:-1].gather(1, inputs["input_ids"][0, -count:, None]).sum().item()


@pytest.mark.parametrize("question", [mme(), choice(), puzzle()], ids=lambda each: each.suite)
def test_scores_are_the_likelihoods_of_transformers(answerer, question):
    parts, order = asked_parts(question)
    reply = answerer.reply(question, pictures(question))
    answers = question.options if question.suite == "mme" else question.letters
    wanted = [own_likelihood(answerer, parts, answer, [pictures(question)[place] for place in order]) for answer in answers]
    assert reply.scores == pytest.approx(wanted, abs=2e-4) and reply.said == answers[wanted.index(max(wanted))] and parts.count(None) == len(question.pictures)


def test_free_words_are_a_greedy_loop(answerer):
    question, free = mme(), TransformersAnswerer(answerer.model, answerer.processor, "free", free=True, max_new_tokens=5)
    free.model.generation_config.repetition_penalty = 1.7  # a habit that is not taken over
    said = free.reply(question, pictures(question))
    free.model.generation_config.repetition_penalty = None
    tokenizer, processor = free.processor.tokenizer, free.processor
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}], add_generation_prompt=True)
    inputs = dict(processor(text=[text], images=pictures(question), add_special_tokens=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)), return_tensors="pt"))
    start, ids = inputs["input_ids"].shape[1], inputs["input_ids"]
    for _ in range(5):
        extra = {key: torch.cat([value, value.new_zeros(1, ids.shape[1] - value.shape[1])], 1) for key, value in inputs.items() if key == "mm_token_type_ids"}
        with torch.no_grad(): token = answerer.model(**{**inputs, **extra, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
        if token == tokenizer.eos_token_id: break
    assert said.said == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip() and said.choice is None and said.scores == ()


def test_the_picture_counts_and_blind_it_does_not(root, llava):
    red, blue = mme(), mme(color="blue")
    assert llava.reply(red, pictures(red)).scores != llava.reply(blue, pictures(blue)).scores
    blind = load_answerer(f"blind:{root / 'llava'}")
    assert blind.reply(red, []) == blind.reply(blue, []) and blind.name == "blind:llava" and blind.fingerprint != llava.fingerprint
    assert blind.reply(red, []).scores[0] == pytest.approx(own_likelihood(blind, [red.text], "Yes", None), abs=2e-4)


def test_an_answer_does_not_depend_on_its_neighbours(llava):
    alone = ask(choice(3), llava)
    questions = [mme(1), choice(3), puzzle(2), choice(4, 2)]
    assert [ask(each, llava) for each in questions][1] == alone and [ask(each, llava) for each in questions[::-1]][2] == alone


def test_options_as_text_need_no_letters(root):
    by_text = TransformersAnswerer.from_pretrained(root / "llava", by="text")
    assert asked_parts(choice(), False)[0] == [None, "Which one?"]
    first, turned = by_text.reply(choice(), pictures(choice())), by_text.reply(replace(choice(), options=("blue", "green", "red")), pictures(choice()))
    assert sorted(first.scores) == pytest.approx(sorted(turned.scores), abs=1e-4) and first.said == turned.said
    pictured = replace(puzzle(), options=("<image 1>", "<image 2>"), text="Which?")
    assert by_text.listed(pictured) and by_text.reply(pictured, pictures(pictured)).said in "AB"
    with pytest.raises(UserError, match="letter or text"): TransformersAnswerer(by_text.model, by_text.processor, by="sound")


def test_what_cannot_be_asked_is_counted_and_named(llava):
    questions = [mme(1), mme(2), mme(3), mme(4), mme(5)]
    questions[1] = replace(questions[1], pictures=(b"no picture at all",))
    questions[2] = replace(questions[2], text="Is <image> here?")
    questions[3] = replace(questions[3], text="very " * 400 + "long?")
    found = run_questions(QuestionSet("mme", questions), [llava])
    note = found["notes"]["vlm, not asked" if "vlm, not asked" in found["notes"] else f"{llava.name}, not asked"]
    assert note.startswith("3 of 5 questions") and {row["n"] for row in found["rows"]} == {2} and "\n" not in note
    problems = [record["problem"] for record in found["records"][llava.name]]
    assert "image" in problems[1] and "special token" in problems[2] and "256 tokens" in problems[3] and not problems[0]
    with pytest.raises(UserError, match="no question could be asked"): run_questions(QuestionSet("mme", questions[1:4]), [llava])


def test_a_probability_that_is_no_number_stops_the_run(root):
    broken = TransformersAnswerer.from_pretrained(root / "qwen2_5_vl")
    broken.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not a number"): run_questions(QuestionSet("mme", [mme()]), [broken])


def test_a_tie_is_no_answer():
    class Tied(Spoken):
        def reply(self, question, shown):
            from vugen.understand.vlm_answers import Reply, _chosen
            return Reply("", (-1.0, -1.0), _chosen((-1.0, -1.0)))
    record = ask(mme(), Tied("tied", None))
    assert not record["right"] and record["read"] == "" and record["scores"] == [-1.0, -1.0]


# answerers of which the score is known

QUESTIONS = [replace(choice(number, 2), key=f"{number}+{turn}" if turn else str(number), turn=turn, answers=("AB"[(number + turn) % 2],)) for number in range(300) for turn in range(2)]


def accuracy(rows, name, metric): return next(row for row in rows if row["scorer"] == name and row["category"] == "all" and row["metric"] == metric)


def test_oracle_guesser_frequent_and_always():
    rows = run_questions(QuestionSet("mmbench", QUESTIONS), [oracle(), guesser(4), frequent(QUESTIONS), always("B")])["rows"]
    assert accuracy(rows, "oracle", "circular_accuracy")["value"] == 1 and accuracy(rows, "most frequent", "accuracy")["value"] == .5 and accuracy(rows, "always B", "circular_accuracy")["value"] == 0
    for metric in ("accuracy", "circular_accuracy"):
        row = accuracy(rows, "random 4", metric)
        assert row["low"] < row["chance"] < row["high"]
    assert frequent([mme(), replace(mme(), answers=("no",)), replace(mme(), answers=("no",))]).reply(mme(), []).said == "no"


def test_answers_of_the_file_are_scored_without_a_model():
    told = [replace(each, said="Answer: A." if each.turn == 0 else None) for each in QUESTIONS[:4]]
    found = run_questions(QuestionSet("mmbench", [each for each in told if each.turn == 0]), [given()])
    assert accuracy(found["rows"], "answers of the file", "accuracy")["value"] == .5
    assert ask(told[1], given())["problem"].startswith("the file holds no answer")


# the seam

def test_the_seam_agrees_with_transformers(root):
    adapter = load_adapter(root / "llava")
    question, seam = mme(), SeamAnswerer(adapter, by="letter")
    side = adapter.vision.image_size
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    shown = Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy())
    reply = seam.reply(question, [shown])
    ids, mask = adapter.encode([f"{question.text} yes"])
    seen = adapter.logits(torch.from_numpy(__import__("numpy").array(shown)).permute(2, 0, 1)[None] / 255, ids, mask).double().log_softmax(-1)
    start = adapter.encode([question.text])[0].shape[1]
    assert reply.scores[0] == pytest.approx(seen[0, start - 1:-1].gather(1, ids[0, start:, None]).sum().item(), abs=1e-4)
    for question, why in ((puzzle(), "one picture"), (replace(mme(), suite="mmmu", options=()), "has none")):
        assert why in ask(question, seam)["problem"]


# the store

class Counting(Spoken):
    asked = 0
    def reply(self, question, shown):
        self.asked += 1
        if self.asked == getattr(self, "dies", None): raise KeyboardInterrupt
        return super().reply(question, shown)


def test_a_killed_run_goes_on(tmp_path):
    suite, store = QuestionSet("mmbench", QUESTIONS[:40]), AnswerStore(tmp_path / "answers.parquet")
    dying = Counting("one", lambda question: "A"); dying.dies = 23
    with pytest.raises(KeyboardInterrupt): run_questions(suite, [dying], store, batch_size=10)
    assert len(store.read()) == 20 and store.parts.is_dir()
    again = Counting("one", lambda question: "A")
    found = run_questions(suite, [again], store, batch_size=10)
    assert again.asked == 20 and not store.parts.exists() and found["rows"] == run_questions(suite, [Counting("one", lambda question: "A")])["rows"] == rows_from_answers(store.path)["rows"]


def test_only_what_changed_is_asked_again(tmp_path):
    store, questions = AnswerStore(tmp_path / "answers.parquet"), QUESTIONS[:10]
    asked = lambda questions, name="one": (run_questions(QuestionSet("mmbench", questions), [made := Counting(name, lambda question: "A")], store), made.asked)[1]
    assert asked(questions) == 10 and asked(questions) == 0
    changed = [replace(questions[0], pictures=(png("pink"),)), replace(questions[1], text="Other?"), *questions[2:]]
    assert asked(changed) == 2 and asked(questions[:4]) == 2 and asked(questions[2:], "two") == 8 and asked(questions) == 0  # a shorter run throws nothing away, nor does another model
    assert question_digest(questions[0]) != question_digest(replace(questions[0], hint="Look.")) != question_digest(replace(questions[0], options=("a", "b")))


def test_stores_that_do_not_belong(tmp_path):
    path = tmp_path / "answers.parquet"
    run_questions(QuestionSet("mmbench", QUESTIONS[:4]), [oracle()], AnswerStore(path))
    with pytest.raises(UserError, match="holds answers to MMBench, not to MME"): run_questions(QuestionSet("mme", [mme()]), [oracle()], AnswerStore(path))
    (tmp_path / "half.parquet").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="half.parquet is no complete"): run_questions(QuestionSet("mmbench", QUESTIONS[:4]), [oracle()], AnswerStore(tmp_path / "half.parquet"))
    with pytest.raises(UserError, match="does not exist"): rows_from_answers(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="parquet"): AnswerStore(tmp_path / "answers.csv")


@pytest.mark.parametrize("name,why", [("llava:x", "no kind 'llava'"), ("likelihood", "names no model"), ("likelihood: ", "names no model"), ("frequent:x", "no kind"), ("likelihood:./no/such/folder", "no/such/folder")])
def test_names_that_name_nobody(name, why):
    with pytest.raises(UserError, match=why) as error: load_answerer(name)
    assert "\n" not in str(error.value)
