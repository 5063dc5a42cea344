"States of the widgets, without a browser: what is chosen, changed and refused, and that it is right."
import base64
import io
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from sklearn.decomposition import PCA

from vugen.data.scenes import render, scene_from_caption
from vugen.encode.reducers import narrowing
from vugen.errors import UserError
from vugen.generate.text_to_image import generate
from vugen.lab.side_by_side import through
from vugen.lab.widgets import BindingBoard, DenoisingFilm, Gallery, GuidanceExplorer, LatentInspector, Panel, ReducerExplorer, scene_gallery
from vugen.lab.widgets_binding import altered, choices, inside, retold, truths
from vugen.lab.widgets_latents import bench_of, decode_alike, draw_legend, edited_latents, in_frame, load_autoencoder, selection_counts, word_colors
from vugen.lab.widgets_sampling import LatentSource, PixelSource, load_samples, missing, quick_decode
from vugen.lab.widgets_view import SCRIPT, STYLE, Cancelled, State, bundle, data_uri, entry, finish, handle, kept, static_bundle


@pytest.fixture(scope="module")
def gallery(): return scene_gallery(24)


@pytest.fixture(scope="module")
def model(): return load_autoencoder()


@pytest.fixture
def inspector(gallery, model): return finish(LatentInspector(gallery, model, neighbours=4))


@pytest.fixture(scope="module")
def generator(): return bench_of(None).generator


# the panel

class Counter(State):
    "Work in five parts, which a test can hold"
    label, actions = "counter", ("set", "fail")
    def __init__(self): self.value, self.done, self.gate, self.started = 0, [], threading.Event(), threading.Event()
    def on_set(self, value): self.value = value
    def on_fail(self, value): raise RuntimeError("the disk is on fire\nwith a second line")
    def blocks(self): return {"told": {"kind": "text", "lines": [str(self.value), str(len(self.done))]}, "still": {"kind": "text", "lines": ["never changes"]}}
    def work(self):
        value = self.value
        for part in range(5):
            self.started.set()
            self.gate.wait(10)
            yield "Counting", part + 1, 5
        self.done.append(value)
    def picture(self): return Image.new("RGB", (20, 10), "red")
    def alt(self): return f'a "quoted" value of {self.value}'


def test_newer_wishes_stop_older_work():
    panel = Panel(Counter())
    panel.act("set", 1)
    panel.state.started.wait(10)
    panel.act("set", 2)
    panel.state.gate.set()
    assert panel.wait(20) and panel.state.done == [2] and panel.busy == {} and panel.message == ""
    assert panel.block_told["lines"] == ["2", "1"]


def test_cancel_stops_work_and_says_so():
    panel = Panel(Counter())
    panel.act("set", 1)
    panel.state.started.wait(10)
    panel.act("cancel")
    panel.state.gate.set()
    assert panel.wait(20) and panel.state.done == [] and panel.message.startswith("Cancelled") and panel.busy == {}
    panel.act("set", 3)
    assert panel.wait(20) and panel.state.done == [3] and panel.message == ""


def test_only_what_changed_is_sent():
    panel, sent = Panel(Counter()), []
    panel.state.gate.set()
    panel.observe(lambda change: sent.append(change["name"]))
    panel.act("set", 7)
    panel.wait(20)
    assert "block_told" in sent and "block_still" not in sent


def test_an_error_in_a_callback_is_one_sentence_and_the_widget_lives_on():
    panel = Panel(Counter())
    panel.state.gate.set()
    panel.act("fail")
    assert "RuntimeError" in panel.message and "\n" not in panel.message
    panel.act("no such thing", {"odd": [1]})
    assert "no action" in panel.message
    panel.act("set", 4)
    assert panel.wait(20) and panel.message == "" and panel.state.done == [4]


def test_an_error_in_work_is_one_sentence_too():
    class Broken(Counter):
        def work(self):
            yield "Trying", 0, 1
            raise UserError("The model is missing: train it.")
    panel = Panel(Broken())
    panel.act("set", 1)
    assert panel.wait(20) and panel.message == "The model is missing: train it." and panel.busy == {}


def test_messages_from_the_browser_reach_the_state():
    panel = Panel(Counter())
    panel.state.gate.set()
    panel._handle_custom_msg({"name": "set", "value": 9}, [])
    assert panel.wait(20) and panel.state.value == 9


def test_the_static_picture_has_an_alternative_text():
    panel = Panel(Counter())
    data, _ = bundle(panel)
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size == (20, 10)
    assert data["text/plain"] == 'a "quoted" value of 0'
    assert 'alt="a &quot;quoted&quot; value of 0"' in static_bundle(panel)["text/html"]


def test_the_script_asks_for_nothing_outside():
    assert "http" not in (SCRIPT + STYLE).replace("http://www.w3.org/2000/svg", "") and not any(word in SCRIPT for word in ("import(", "import {", "fetch(", "innerHTML", "eval("))


def test_pictures_travel_unharmed():
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    back = Image.open(io.BytesIO(base64.b64decode(data_uri(image).partition(",")[2])))
    assert np.array_equal(np.asarray(back), (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert entry(image, "title")["alt"] == "title"


# latents

def test_the_map_is_that_of_sklearn(inspector):
    found = np.array(inspector.points)
    wanted = PCA(2).fit_transform(inspector.latents.flatten(1).double().numpy())
    wanted = np.array(in_frame(wanted))
    flips = [np.abs(found - wanted * np.array([x, y])).max() for x in (1, -1) for y in (1, -1)]
    assert min(flips) < 1e-3 and np.abs(found).max() <= 1


def test_neighbours_are_the_nearest_by_cosine_and_not_the_picture_itself(inspector):
    rows = inspector.latents.flatten(1).double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    order = [n for n in np.argsort(-unit @ unit[0]) if n != 0][:4]
    assert [n for n, _ in inspector.sight["near"]] == order
    assert np.allclose([likeness for _, likeness in inspector.sight["near"]], (unit @ unit[0])[order], atol=1e-5)


def test_selection_counts_attributes(inspector):
    inspector.select([3, 1, 3, 2])
    assert inspector.selected == [1, 2, 3]
    for name, counts in selection_counts(inspector).items():
        assert sum(counts.values()) == 3
        assert counts[inspector.gallery.attributes[name][1]] >= 1
    handle(inspector, "select", [])
    assert inspector.selected == [] and "Nothing is selected" in inspector.blocks()["selection"]["lines"][1]


@settings(deadline=None, max_examples=30)
@given(channel=some.integers(0, 7), value=some.floats(-8, 8), patches=some.sets(some.integers(0, 63)), partner=some.integers(0, 23), what=some.sampled_from(["nothing", "all", "channel"]))
def test_changes_touch_the_wanted_latents_alone(gallery, model, channel, value, patches, partner, what):
    state = LatentInspector(gallery, model)
    state.latents = torch.randn(24, 64, 8, generator=torch.Generator().manual_seed(1))
    state.perturb(channel, value, patches)
    state.swap(partner, what)
    wanted = state.latents[0].double().numpy().copy()
    for row in patches or range(64):
        for column in range(8):
            if what == "all" or (what == "channel" and column == channel): wanted[row, column] = state.latents[partner, row, column]
            if column == channel: wanted[row, column] += value
    assert np.allclose(edited_latents(state).numpy(), wanted, atol=1e-5)


def test_the_static_picture_tells_what_the_colours_mean(inspector):
    inspector.on_color_by("relation")
    legend = draw_legend("relation", list(word_colors(inspector.gallery.attributes["relation"]).items()))
    assert np.array_equal(np.asarray(inspector.picture())[300:300 + legend.height, :legend.width], np.asarray(legend)) and np.asarray(legend).std() > 0
    assert draw_legend("shape", [("star", "red")]).tobytes() != draw_legend("relation", [("star", "red")]).tobytes() != draw_legend("relation", [("heart", "red")]).tobytes()


def test_a_change_is_decoded_and_undone(inspector):
    assert torch.equal(inspector.sight["decoded"], inspector.sight["edited"])
    inspector.perturb(2, 4.0)
    finish(inspector)
    assert (inspector.sight["decoded"] - inspector.sight["edited"]).abs().max() > 0.1
    handle(inspector, "reset")
    finish(inspector)
    assert torch.equal(inspector.sight["decoded"], inspector.sight["edited"])


def test_decoding_alike_uses_one_noise(model, inspector):
    twice = decode_alike(model.decoder, inspector.latents[:1].expand(2, -1, -1))
    assert torch.allclose(twice[0], twice[1], atol=1e-5)
    assert torch.allclose(twice[:1], model.decode(inspector.latents[:1]), atol=1e-5)


@pytest.mark.parametrize("name, value", [("choose", 24), ("choose", "x"), ("choose", 1.5), ("select", [99]), ("method", "tsne"), ("color_by", "taste"), ("channel", 8),
                                         ("perturb", float("nan")), ("perturb", 9), ("patches", [64]), ("partner", -1), ("swap", "everything"), ("choose", None)])
def test_the_inspector_refuses_with_a_sentence(gallery, model, name, value):
    with pytest.raises(UserError, match=r"."): handle(LatentInspector(gallery, model), name, value)


def test_a_gallery_of_own_pictures(model):
    pictures = [Image.new("RGB", (50, 40), color) for color in ("red", "green", "blue", "white")]
    state = finish(LatentInspector(Gallery(pictures), model, neighbours=10))
    assert len(state.sight["near"]) == 3 and state.gallery.captions[2] == "picture 2" and state.picture().width > 300
    with pytest.raises(UserError, match="at least 3"): Gallery(pictures[:2])
    with pytest.raises(UserError, match="5 entries for 4"): Gallery(pictures, attributes={"taste": ["sweet"] * 5})


def test_the_explorer_decodes_every_width_once(gallery):
    state = finish(ReducerExplorer(gallery, bench_of(None).autoencoders, num_inference_steps=1))
    assert len(state.frames) == 8 and state.channels == 8 and list(state.work()) == []
    handle(state, "channels", 0)
    assert state.channels == 1 and state.frame["PCA"]["ratio"] == 128
    assert state.frames[7]["learned"]["psnr"] > state.frames[0]["learned"]["psnr"]
    film = state.blocks()["film"]
    assert len(film["frames"]) == len(film["ticks"]) == len(film["notes"]) == 8 and len(film["frames"][0]) == film["columns"] == 5
    assert state.blocks()["film"]["frames"] is film["frames"] # encoded once
    with pytest.raises(UserError, match="from 0 to 7"): handle(state, "channels", 8)


@pytest.mark.parametrize("name", ["PCA", "learned"])
def test_the_explorer_and_the_playground_narrow_alike(gallery, name):
    model = bench_of(None).autoencoders[name]
    state = finish(ReducerExplorer(gallery, {name: model}, num_inference_steps=1))
    way = narrowing(model.reducer, model.encode(gallery.images))
    shown = [through(model, name, gallery.images[:1], way, kept, num_inference_steps=1) for kept in (1, 4, 8)]
    assert [each.psnr for each in shown] == pytest.approx([state.frames[kept - 1][name]["psnr"] for kept in (1, 4, 8)], abs=0.01)


def test_models_trained_at_each_width_take_the_place_of_narrowing(gallery, model):
    state = finish(ReducerExplorer(gallery, {"one": {8: model}, "two": model}, num_inference_steps=1))
    assert state.widths == [8] and torch.allclose(state.frames[0]["one"]["image"], state.frames[0]["two"]["image"], atol=1e-4)
    with pytest.raises(UserError, match="in common"): ReducerExplorer(gallery, {"one": {99: model}, "two": model})


# sampling

def test_the_film_ends_in_what_the_generator_samples(generator):
    prompt, decode = "a red circle left of a blue square", lambda latents: latents.unflatten(1, (8, 8)).permute(0, 3, 1, 2)[:, :3]
    state = finish(DenoisingFilm(LatentSource(generator, decode), prompt, number=2, num_inference_steps=4, seed=5))
    wanted = generate(generator, [prompt] * 2, num_inference_steps=4, seed=5)
    assert len(state.frames) == 5 and torch.allclose(state.frames[-1][1], decode(wanted), atol=1e-4)
    assert [t for t, *_ in state.frames] == sorted(t for t, *_ in state.frames) and state.frames[-1][0] == 1


def test_the_film_of_a_decoder_ends_in_its_picture(gallery):
    model = load_autoencoder(name="decoder")
    state = finish(DenoisingFilm(PixelSource(model, gallery), 3, number=1, num_inference_steps=3))
    wanted = model.decode(model.encode(gallery.images[3:4]), 3)
    assert torch.allclose(state.frames[-1][2], wanted, atol=1e-4)
    with pytest.raises(UserError, match="does not paint in steps"): PixelSource(load_autoencoder(name="decoder-feedforward"), gallery)


def test_a_film_is_made_once_and_keeps_running_while_another_is_made(generator):
    state = finish(DenoisingFilm(LatentSource(generator, quick_decode()), "a red circle", number=1, num_inference_steps=2))
    first = state.frames
    handle(state, "seed", 3)
    assert state.frames is first # until the new one is there
    finish(state)
    assert state.frames is not first and list(state.work()) == []
    handle(state, "seed", 0)
    assert list(state.work()) == [] and state.frames is first
    handle(state, "step", 2)
    assert "t = 1.00" in state.alt()


@pytest.mark.parametrize("name, value", [("step", 5), ("subject", ""), ("subject", "a florble"), ("subject", "<bos>"), ("seed", -1), ("guidance", "much"), ("steps", 0)])
def test_the_film_refuses_with_a_sentence_and_stays(generator, name, value):
    state = DenoisingFilm(LatentSource(generator), "a red circle", number=1, num_inference_steps=2)
    before = state.key
    with pytest.raises(UserError): handle(state, name, value)
    assert state.key == before


def test_guidance_samples_are_those_of_the_generator_and_drawn_once(generator, tmp_path):
    decode, counted = lambda latents: latents[:, :1, :3, None].expand(-1, 1, 3, 1).permute(0, 2, 1, 3).sigmoid(), []
    def make(**options): return GuidanceExplorer(generator, ["a red circle", "a blue square"], scales=(1, 3), seeds=2, num_inference_steps=2, decode=lambda latents: counted.append(len(latents)) or decode(latents), cache=tmp_path / "cache.safetensors", **options)
    state = finish(make())
    assert counted == [4, 4]
    wanted = decode(generate(generator, ["a blue square"], 3.0, 2, seed=1))[0]
    assert torch.allclose(state.samples["a blue square", 3.0, 1], wanted, atol=1e-4)
    handle(state, "first_seed", 1)
    assert {scale: [seed for _, seed in pairs] for scale, pairs in missing(state).items()} == {3.0: [2, 2], 1.0: [2, 2]}
    assert list(finish(make()).samples) == list(make().samples) and counted == [4, 4] # from the file
    assert load_samples(tmp_path / "cache.safetensors", "another generator") == {}
    (tmp_path / "cache.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="cache.safetensors"): make()


def test_half_done_guidance_shows_what_is_there(generator):
    state = GuidanceExplorer(generator, ["a red circle"], scales=(1, 2), seeds=1, num_inference_steps=1, decode=lambda latents: torch.zeros(len(latents), 3, 8, 8))
    work = state.work()
    while not state.samples: next(work)
    work.close()
    assert sum(map(len, missing(state).values())) == 1
    titles = [frame[0]["title"] for frame in state.blocks()["film"]["frames"]]
    assert sorted("not drawn" in title for title in titles) == [False, True]
    with pytest.raises(UserError, match="one to six"): handle(state, "prompts", "\n".join(f"a {color} circle" for color in ("red", "blue", "green", "pink", "black", "orange", "purple")))


# the board

class Oracle:
    "Knows the scene from its picture's mean colour in the left half: red there means red is left"
    name, asked = "oracle", 0
    def score(self, images, captions):
        Oracle.asked += 1
        left = images[:, :, :, : images.shape[-1] // 2].mean((2, 3))
        red_left = bool(left[0, 0] > left[0, 2])
        return torch.tensor([[float(("red circle left of" in c) == red_left) for c in captions]] * len(images))


class Deaf:
    name = "deaf"
    def score(self, images, captions): raise UserError("deaf reads no captions: give it another.")


@pytest.fixture
def board(): return finish(BindingBoard({"oracle": Oracle(), "deaf": Deaf()}))


def test_the_board_knows_what_is_true_after_a_move(board):
    assert truths(board)[0] is True and retold(board.scene) == "a red circle left of a blue square"
    square = board.scene.items[1]
    board.move(0, 0.9, square.y), board.move(1, 0.1, square.y)
    assert truths(board)[0] is False and retold(board.scene) == "a red circle right of a blue square"
    assert board.blocks()["verdict"]["rows"][0][1]["text"] == "…" # not asked yet
    finish(board)
    assert board.notes["deaf"].startswith("deaf reads") and set(board.scores) == {"oracle"}
    handle(board, "retell")
    assert board.captions[0] == "a red circle right of a blue square" and truths(board)[0] is True


def test_scorers_are_asked_once_about_a_scene(board):
    before = Oracle.asked
    finish(board)
    assert Oracle.asked == before
    board.nudge(0, 0.1, 0)
    assert len(finish(board).scores["oracle"]) == len(board.captions) and Oracle.asked == before + 1


@given(x=some.floats(-1, 2), y=some.floats(-1, 2), size=some.sampled_from(["small", "large"]))
def test_things_stay_inside_of_the_picture(x, y, size):
    item = inside(altered(scene_from_caption("a red circle").items[0], "size", size), x, y)
    assert item.scale / 2 <= item.x <= 1 - item.scale / 2 and item.scale / 2 <= item.y <= 1 - item.scale / 2


def test_things_can_be_turned_added_and_removed(board):
    handle(board, "turn", [0, "color", 1])
    assert board.scene.items[0].color == "orange"
    handle(board, "turn", [0, "color", -1])
    assert board.scene.items[0].color == "red"
    for number in range(3): handle(board, "add")
    assert len(board.scene.items) == 5 and len({(item.name, item.color) for item in board.scene.items}) == 5
    with pytest.raises(UserError, match="at most 5"): handle(board, "add")
    for number in range(4): handle(board, "remove", 0)
    with pytest.raises(UserError, match="last thing"): handle(board, "remove", 0)
    assert board.active == 0 and render(board.scene, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("name, value", [("move", [5, 0, 0]), ("move", [0, float("nan"), 0]), ("turn", [0, "smell", 1]), ("alter_color", "beige"), ("alter_name", "florble"), ("caption", ""), ("caption", "a florble"), ("caption", "a red circle " * 60), ("activate", "x")])
def test_the_board_refuses_with_a_sentence_and_stays(board, name, value):
    scene, captions = board.scene, list(board.captions)
    with pytest.raises(UserError): handle(board, name, value)
    assert board.scene == scene and board.captions == captions


def test_foils_of_ones_own(board):
    handle(board, "foils", "a blue circle left of a red square\n\na cat")
    assert board.captions == ["a red circle left of a blue square", "a blue circle left of a red square", "a cat"]
    assert truths(board) == [True, False, False]
    handle(board, "caption", "something outside of the grammar")
    assert board.captions[0].startswith("something") and truths(board)[0] is None
    finish(board)
    assert choices(board)["oracle"][1] in (None, False) and board.picture().width > 200
    handle(board, "caption", "a red circle left of a blue square")
    handle(board, "foils", "")
    assert len(board.captions) > 5


def test_kept_values_are_made_again_only_for_another_key():
    state, made = Counter(), []
    for key in (1, 1, 2, 2, 1): kept(state, "name", key, lambda: made.append(key))
    assert made == [1, 2, 1] and issubclass(Cancelled, Exception)
