"Probes against scikit-learn and planted features; questions against the scenes; controls."
import dataclasses

import numpy as np
import pytest
import torch

from vugen.data.scenes import CONVERSE, World, batch, holds, parse
from vugen.errors import UserError
from vugen.models.seams import Patches
from vugen.understand.probes import (PROBE_SEED, AttentionProbe, ProbeTask, above_chance, attention_probe, binding_tasks, chance_level, compare, extract, fit_logistic, hits, joint_loss, linear_probe,
                                     load_encoder, plot_compare, probe_data, probe_encoder, probe_tasks, run_probe, scene_tasks, shuffled, standardise)


def problem(n, features, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    return x, (x @ torch.randn(features, classes, generator=generator) + torch.randn(n, classes, generator=generator)).argmax(1)


@pytest.mark.parametrize("classes, penalty", [(3, .1), (5, .003)])
def test_logistic_is_scikit_learns(classes, penalty):
    from sklearn.linear_model import LogisticRegression
    x, y = problem(300, 10, classes, classes)
    weight, bias = fit_logistic(x, [ProbeTask("q", tuple("abcde"[:classes]), y)], penalty, tolerance=1e-7, max_iter=300)
    reference = LogisticRegression(C=1 / (300 * penalty), tol=1e-9, max_iter=5000).fit(x.numpy(), y.numpy())
    assert np.abs((x @ weight + bias).softmax(1).numpy() - reference.predict_proba(x.numpy())).max() < 2e-3
    assert np.abs(weight.T.numpy() - reference.coef_).max() < 2e-2


def test_questions_do_not_disturb_each_other():
    "Solved together or alone; where one question does not apply, its scenes do not count"
    (x, first), (_, second) = problem(200, 6, 3, 0), problem(200, 6, 4, 1)
    second[50:] = -1
    tasks = [ProbeTask("first", tuple("abc"), first), ProbeTask("second", tuple("abcd"), second)]
    weight, bias = fit_logistic(x, tasks, .01, tolerance=1e-7, max_iter=300)
    for task, columns in zip(tasks, (slice(0, 3), slice(3, 7))):
        rows = task.labels >= 0
        alone, offset = fit_logistic(x[rows], [task.select(rows)], .01, tolerance=1e-7, max_iter=300)
        assert torch.allclose((x @ weight + bias)[:, columns].softmax(1), (x @ alone + offset).softmax(1), atol=5e-3)


def test_joint_loss_ignores_what_does_not_apply():
    logits = torch.randn(4, 3)
    nobody = ProbeTask("nobody", ("a", "b", "c"), torch.full((4,), -1))
    assert joint_loss(logits, [nobody]).item() == 0
    some = ProbeTask("some", ("a", "b", "c"), torch.tensor([0, -1, 2, -1]))
    assert torch.allclose(joint_loss(logits, [some]), torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([0, 2])))


def test_standardise_uses_the_training_set_only():
    train, test = torch.randn(50, 4, 3) * 5 + 2, torch.randn(20, 4, 3)
    scaled, other = standardise(train, test)
    assert torch.allclose(scaled.flatten(0, 1).mean(0), torch.zeros(3), atol=1e-5) and torch.allclose(scaled.flatten(0, 1).std(0), torch.ones(3), atol=1e-4)
    assert torch.allclose(other * train.flatten(0, 1).std(0) + train.flatten(0, 1).mean(0), test, atol=1e-4)
    assert torch.isfinite(standardise(torch.ones(5, 2), torch.full((3, 2), 9.))[1]).all()


def test_linear_probe_finds_what_is_linear_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(900, 12, generator=generator), torch.randn(12, generator=generator)
    tasks = [ProbeTask("linear", ("no", "yes"), (x @ direction > 0).long()), ProbeTask("noise", ("no", "yes"), torch.randint(2, (900,), generator=generator))]
    cut = (slice(0, 500), slice(500, 600), slice(600, 900))
    linear, noise = linear_probe([x[part] for part in cut], [[task.select(part) for task in tasks] for part in cut])
    assert linear.double().mean() > .95 and abs(noise.double().mean() - .5) < .1 and len(linear) == 300


def test_attention_probe_trains_questions_as_if_alone():
    "Adam treats every parameter by itself, so the weights of one question do not depend on the presence of another"
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(120, 5, 8, generator=generator), torch.randint(3, (120,), generator=generator)
    tokens[torch.arange(120), torch.randint(5, (120,), generator=generator), labels] += 4
    one = ProbeTask("one", tuple("abc"), labels)
    two = ProbeTask("two", tuple("ab"), torch.randint(2, (120,), generator=generator))
    together = AttentionProbe(8, [3, 2], num_queries=1)
    alone = AttentionProbe(8, [3], num_queries=1)
    with torch.no_grad(): alone.query.copy_(together.query[:1])
    for probe, tasks in ((together, [one, two]), (alone, [one])):
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad(); joint_loss(probe(tokens), tasks).backward(); optimizer.step()
    assert torch.allclose(together(tokens)[:, :3], alone(tokens), atol=1e-3)
    assert hits(alone(tokens), [one])[0].double().mean() > .8


def test_attention_probe_is_a_function_of_its_seed():
    tokens, labels = torch.randn(60, 4, 6), torch.randint(2, (60,))
    arguments = [tokens[:30], tokens[30:40], tokens[40:]], [[ProbeTask("q", ("a", "b"), labels[part])] for part in (slice(0, 30), slice(30, 40), slice(40, 60))]
    assert torch.equal(attention_probe(*arguments, epochs=2, seed=1)[0], attention_probe(*arguments, epochs=2, seed=1)[0])


@pytest.mark.parametrize("world", [World(), World(shapes=("circle", "star", "ring"), colors=("red", "blue", "green"), relations=("left of", "inside", "on top of", "bigger than"), fills=("solid", "outlined"))])
def test_binding_questions_are_answered_from_the_scene(world):
    scenes = batch(world, 3, range(120))["scenes"]
    tasks = binding_tasks(world, scenes)
    asked = 0
    for task in tasks:
        kind, _, rest = task.name.partition(" of the ")
        name = rest.removesuffix(" one")
        for scene, label in zip(scenes, task.labels.tolist()):
            mine = [item for item in scene.items if name in (item.name, item.color)]
            if label < 0: continue
            asked += 1
            assert len(scene.items) == 2 and len(mine) == 1
            answer = task.classes[label]
            if kind == "color": assert answer == mine[0].color
            elif kind == "shape": assert answer == mine[0].name
            else:
                link = scene.relations[0]
                expected = link.name if scene.items[link.subject] is mine[0] else CONVERSE[link.name] or f"{link.name} (other way)"
                assert answer == expected
    eligible = [scene for scene in scenes if len(scene.items) == 2 and scene.items[0].name != scene.items[1].name and scene.items[0].color != scene.items[1].color]
    assert asked == 6 * len(eligible) and len(eligible) > 20


def test_single_questions_apply_to_single_objects_only():
    scenes = batch(World(), 3, range(80))["scenes"]
    for number in (1, 2):
        for task in scene_tasks(scenes, number): assert ((task.labels >= 0) == torch.tensor([len(scene.items) == number for scene in scenes])).all()
    assert scene_tasks([scene for scene in scenes if len(scene.items) == 2], 1) == []


def test_parts_are_disjoint_and_repeatable():
    data = probe_data(World(), 60, 40, seed=2)
    keys = [{image.numpy().tobytes() for image in part} for part in data.split(data.images)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert torch.equal(data.images, probe_data(World(), 60, 40, seed=2).images) and not torch.equal(data.images, probe_data(World(), 60, 40, seed=3).images)


def test_probes_learn_from_the_training_split_and_are_tested_on_the_other():
    world = World(held_out=("red circle",))
    data, parts = probe_data(world, 60, 40, seed=2), [dict(split="train"), dict(split="train"), dict(split="test")]
    for part, images, dials in zip(data.parts, data.split(data.images), parts):
        drawn = batch(dataclasses.replace(world, **dials), PROBE_SEED + 2, range(part.start, part.stop))
        assert torch.equal(images, drawn["images"])
        assert {holds(scene, parse("red circle")) for scene in drawn["scenes"]} == {dials["split"] == "test"}
    plain = probe_data(World(), 60, 40, seed=2)
    assert torch.equal(plain.images, batch(World(), PROBE_SEED + 2, range(115))["images"])


def test_dealt_labels_keep_their_counts_and_the_test_set():
    data = probe_data(World(), 80, 40)
    dealt = shuffled(data, seed=1)
    moved = 0
    for before, after in zip(data.tasks, dealt.tasks):
        for part in data.parts[:2]:
            assert before.labels[part].sort().values.equal(after.labels[part].sort().values) and (before.labels[part] >= 0).equal(after.labels[part] >= 0)
        assert before.labels[data.parts[2]].equal(after.labels[data.parts[2]])
        moved += (before.labels != after.labels).sum().item()
    assert moved > 100


SMALL = World(counts={1: 1.}, shapes=("circle", "square", "star"), colors=("red", "green", "blue"))  # few questions


class Colors:
    "Four tokens of mean color; pooled repeats the mean token"
    name, hidden_size, grid, image_size = "colors", 3, (2, 2), 32
    def __call__(self, images):
        tokens = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)
        return Patches(tokens, self.grid, tokens.mean(1))


def test_probe_encoder_rows():
    data = probe_data(SMALL, 200, 100)
    rows = probe_encoder(Colors(), data=data, vectors={"brightness": lambda images: images.mean((1, 2, 3))[:, None]})
    assert {row["readout"] for row in rows} == {"linear on the pooled vector", "linear on the brightness", "attention on the tokens"}  # the mean token is the pooled vector: not told twice
    for row in rows:
        assert list(row) == ["encoder", "target", "readout", "value", "low", "high", "n", "chance"] and row["low"] <= row["value"] <= row["high"] and row["n"] == 100
    value = {(row["readout"], row["target"]): row["value"] for row in rows}
    assert value["linear on the pooled vector", "color"] > .95 and value["linear on the brightness", "color"] < .7


def test_extract_in_batches():
    images = torch.rand(7, 3, 32, 32)
    whole, parts = extract(Colors(), images), extract(Colors(), images, batch_size=2)
    assert all(torch.allclose(whole[name], parts[name]) for name in whole) and whole["tokens"].shape == (7, 4, 3)


def test_chance_is_the_commonest_training_answer():
    assert chance_level(torch.tensor([2, 2, 0, -1]), torch.tensor([2, 0, 0, 0, -1])) == .25


def test_compare_takes_the_best_readout_and_scales():
    probes = [dict(encoder="e", target=target, readout=readout, value=value, chance=.5) for target, readout, value in (("color", "linear", .6), ("color", "attention", .9), ("unknown", "linear", 1.))]
    suite = [dict(scorer="s", category=category, metric=metric, value=.5, chance=.25) for category in ("replace-attribute", "other") for metric in ("text", "image")]
    table = compare(probes, suite)
    assert len(table) == 1 and table[0]["keeps"] == pytest.approx(.8) and table[0]["uses"] == pytest.approx(1 / 3) and table[0]["readout"] == "attention"
    assert above_chance(.25, .5) == -.5
    import matplotlib
    matplotlib.use("Agg")
    assert len(plot_compare(table).patches) == 2


def test_run_probe_on_a_saved_encoder(tmp_path):
    import json
    from vugen.encode.contrastive import ContrastiveModel
    from vugen.generate.vlm import world_words
    world = SMALL
    torch.manual_seed(5)
    ContrastiveModel(world_words(world), patch_size=8, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, projection_dim=8).save_pretrained(tmp_path / "contrastive")
    (tmp_path / "contrastive" / "run.json").write_text(json.dumps({"world": world.asdict()}))
    told = []
    found = run_probe("contrastive", root=tmp_path, limit=80, seed=1, progress=lambda *words: told.append(words), command="vugen probe")
    json.dumps(found)
    assert {row["encoder"] for row in found["rows"]} == {"contrastive ViT", "contrastive ViT, labels shuffled", "contrastive ViT, untrained"}
    assert any(row["readout"] == "linear on the score's own vector" for row in found["rows"]) and found["run"]["seed"] == 1
    assert {what.split(", ", 1)[1] for what, _, _ in told if what.startswith("contrastive ViT, ")} >= {"pictures", "linear on the pooled vector", "attention on the tokens"}
    assert {(done, total) for what, done, total in told if what == "contrastive ViT, pictures"} == {(128, 140), (140, 140)} and all(0 < done <= total for _, done, total in told)
    assert found["run"]["command"] == "vugen probe" and list(found["run"]["checkpoints"]) == ["contrastive"] and found["run"]["device"] == "cpu"
    placed, _, other = load_encoder("contrastive", tmp_path, torch.device("meta"))
    assert {part.device.type for model in (placed, other) for part in model.parameters()} == {"meta"}
    trained, _, twin = load_encoder("contrastive", tmp_path)
    assert not torch.equal(trained.patch_embedding.weight, twin.vision.patch_embedding.weight)
    with pytest.raises(UserError, match="40"): run_probe(root=tmp_path, limit=10)


def test_unknown_encoder_is_refused(tmp_path):
    with pytest.raises(UserError): run_probe(str(tmp_path / "nothing"), root=tmp_path, limit=50)


def test_speed_of_linear_probes():
    "All questions of the tiny world on one readout of width 128, 2,000 scenes, one thread: well under 20 s of processor time"
    import time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scenes = batch(World(), 9, range(2700))["scenes"]
        x, tasks = torch.randn(2700, 128, generator=torch.Generator().manual_seed(0)), probe_tasks(World(), scenes)
        cut = (slice(0, 2000), slice(2000, 2200), slice(2200, 2700))
        start = time.process_time()
        linear_probe([x[part] for part in cut], [[task.select(part) for task in tasks] for part in cut])
        assert time.process_time() - start < 20
    finally: torch.set_num_threads(threads)
