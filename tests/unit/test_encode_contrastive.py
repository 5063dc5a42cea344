"Contrastive losses against loops, duplicates, several processes, and the model's own promises."
import math
import os

import pytest
import torch
import torch.nn.functional as F

from vugen.encode.contrastive import SAME_CAPTION, ContrastiveModel, caption_groups, gather_with_gradient, info_nce, retrieval_accuracy, same_group, sigmoid_loss
from vugen.errors import UserError
from vugen.models.seams import Scorer, VisionEncoder

WORDS = "a the red blue green circle square left right of to".split()
SMALL = dict(image_size=16, hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2, projection_dim=8)


def small(**changes):
    torch.manual_seed(0)
    return ContrastiveModel(WORDS, **{**SMALL, **changes}).eval()


def loop_info_nce(logits, groups, same_caption):
    "Definition, one picture and one caption at a time, in Python floats."
    size, total = len(logits), 0.
    for rows in (logits.tolist(), logits.T.tolist()):
        for i in range(size):
            equal = [j for j in range(size) if groups[i] == groups[j]]
            right = equal if same_caption == "positive" else [i]
            left_out = [j for j in equal if j != i] if same_caption == "mask" else []
            below = sum(math.exp(rows[i][j]) for j in range(size) if j not in left_out)
            total -= sum(math.log(math.exp(rows[i][j]) / below) for j in right) / len(right)
    return total / (2 * size)


def loop_sigmoid(logits, groups, same_caption):
    size, total = len(logits), 0.
    for i in range(size):
        for j in range(size):
            equal = groups[i] == groups[j]
            if same_caption == "mask" and equal and i != j: continue
            sign = 1 if i == j or (same_caption == "positive" and equal) else -1
            total += math.log1p(math.exp(-sign * logits[i][j].item()))
    return total / size


@pytest.mark.parametrize("same_caption", SAME_CAPTION)
@pytest.mark.parametrize("loss,loop", [(info_nce, loop_info_nce), (sigmoid_loss, loop_sigmoid)])
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [7, 7, 7, 7, 7]])
def test_losses_match_their_definition(loss, loop, same_caption, groups):
    logits = 3 * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert math.isclose(loss(logits, torch.tensor(groups), same_caption).item(), loop(logits, groups, same_caption), rel_tol=1e-9, abs_tol=1e-12)


def test_without_duplicates_it_is_cross_entropy():
    logits = torch.randn(6, 6, dtype=torch.float64)
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    for option in SAME_CAPTION:
        torch.testing.assert_close(info_nce(logits, torch.arange(6), option), want)
        torch.testing.assert_close(info_nce(logits, None, option), want)


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_duplicates_do_not_push_apart(loss):
    "Masked, the score of a picture with the equal caption of another sample has no gradient; as a positive it is pulled up, as a negative pushed down."
    groups, gradient = torch.tensor([0, 1, 0]), {}
    for option in SAME_CAPTION:
        logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        loss(logits, groups, option).backward()
        assert logits.grad.isfinite().all()
        gradient[option] = logits.grad[0, 2].item()
    assert gradient["mask"] == 0 and gradient["positive"] < 0 < gradient["negative"]


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="same_caption"): info_nce(torch.zeros(2, 2), None, "ignore")
    with pytest.raises(UserError, match="'triplet'"): small(loss="triplet")


def test_groups_are_the_same_everywhere():
    "Python's own hash of a string differs from process to process; these numbers must not."
    assert caption_groups(["a red circle"]).tolist() == [-8304831058511548363]
    assert caption_groups(["a", "b", "a"])[0] == caption_groups(["a"])[0] != caption_groups(["b"])[0]


def test_retrieval_counts_equal_captions_as_right():
    logits = torch.tensor([[0., 1., 5.], [0., 9., 0.], [5., 0., 1.]])
    assert retrieval_accuracy(logits) == pytest.approx(1 / 3) and retrieval_accuracy(logits, torch.tensor([4, 5, 4])) == 1


def test_same_group_is_an_equivalence():
    same = same_group(torch.tensor([1, 2, 1, 3, 2]), 5)
    assert torch.equal(same, same.T) and same.diagonal().all() and torch.equal((same.float() @ same.float()) > 0, same)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_one_batch_can_be_learned(loss):
    torch.manual_seed(0)
    model, images = small(loss=loss).train(), torch.rand(4, 3, 16, 16)
    captions = ["a red circle", "a blue circle", "a red square left of a blue circle", "a red circle left of a blue square"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = None
    for _ in range(120):
        value, metrics = model(images, *model.tokenize(captions), caption_groups(captions))
        first = first or value.item()
        value.backward(); optimizer.step(); optimizer.zero_grad()
    assert value < .2 * first and metrics["accuracy"] == 1
    assert (model.score(images, captions).argmax(1) == torch.arange(4)).all()


def test_every_parameter_gets_a_gradient():
    for loss in ("infonce", "siglip"):
        model = small(loss=loss)
        model(torch.rand(3, 3, 16, 16), *model.tokenize(["a red circle", "the blue square", "a square"]))[0].backward()
        without = [name for name, value in model.named_parameters() if value.grad is None]
        assert not without


def test_seams():
    model = small()
    assert isinstance(model, Scorer) and isinstance(model.vision, VisionEncoder)
    patches = model.vision(torch.rand(2, 3, 40, 24))
    assert patches.tokens.shape == (2, 16, 16) and patches.grid == model.vision.grid == (4, 4) and model.vision.hidden_size == 16


def test_scores_are_cosines_whatever_the_batching():
    model, images = small(), torch.rand(5, 3, 16, 16)
    captions = ["a red circle", "a red square to the left of the blue circle", "green", "square"]
    scores = model.score(images, captions)
    assert scores.shape == (5, 4) and scores.abs().max() <= 1 + 1e-6 and not scores.requires_grad
    torch.testing.assert_close(model.score(images, captions, batch_size=2), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.score_pairs(images[:4], captions, batch_size=3), scores[:4].diag(), atol=1e-5, rtol=0)


def test_siglip_logits_carry_their_bias():
    model, unit = small(loss="siglip"), torch.eye(8)[:2]
    torch.testing.assert_close(model.logits(unit, unit), torch.tensor([[0., -10.], [-10., 0.]]))


def test_scale_is_limited():
    model = small()
    model.log_scale.data.fill_(50.)
    assert model.logits(torch.ones(1, 1), torch.ones(1, 1)).item() == pytest.approx(100)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_saved_models_score_the_same(loss, tmp_path):
    model, images = small(loss=loss), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = ContrastiveModel.from_pretrained(tmp_path)
    assert loaded.loss_name == loss and torch.equal(loaded.score(images, ["a red circle"]), model.score(images, ["a red circle"]))


def test_bad_captions_are_named():
    model = small()
    with pytest.raises(UserError, match="'elephant'"): model.encode_text(["a red elephant"])
    with pytest.raises(UserError, match="longer than the 64"): model.encode_text(["red " * 100])


def _rank(rank, port, folder):
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, data = small(), torch.load(folder / "data.pt", weights_only=True)
    part = slice(2 * rank, 2 * rank + 2)
    loss, metrics = model(data["images"][part], data["ids"][part], data["mask"][part], data["groups"][part])
    loss.backward()
    for value in model.parameters(): # what DDP does
        dist.all_reduce(value.grad)
        value.grad /= 2
    if rank == 0: torch.save({"loss": loss.detach(), "accuracy": metrics["accuracy"], **{name: value.grad for name, value in model.named_parameters()}}, folder / "two.pt")
    dist.barrier() # no process leaves while another still talks to it
    dist.destroy_process_group()
    os._exit(0) # gloo's threads may outlive the group, and a process that tears them down aborts now and then


def test_two_processes_are_one_batch(tmp_path):
    "Loss and gradients of two processes with half a batch each are those of one process with the whole batch."
    import socket

    import torch.multiprocessing as mp
    model = small()
    captions = ["a red circle", "a blue circle", "a red circle", "a red circle left of a blue square"]
    ids, mask = model.tokenize(captions)
    data = {"images": torch.rand(4, 3, 16, 16), "ids": ids, "mask": mask, "groups": caption_groups(captions)}
    torch.save(data, tmp_path / "data.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, tmp_path), nprocs=2)
    loss, metrics = model(**data)
    loss.backward()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two["loss"], loss.detach())
    assert two["accuracy"] == metrics["accuracy"]
    for name, value in model.named_parameters(): torch.testing.assert_close(two[name], value.grad, atol=1e-6, rtol=1e-4)


def test_one_process_gathers_nothing():
    x = torch.ones(2)
    assert gather_with_gradient(x) is x
