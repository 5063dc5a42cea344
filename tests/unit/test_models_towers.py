"Seams, layers, vision and text towers."
import pytest
import torch

from vugen.errors import UserError
from vugen.models.layers import Attention, TransformerBlock, attend, attention_mask, count_parameters, sincos_2d, timestep_embedding
from vugen.models.seams import Decoder, Generator, Patches, Reducer, Scorer, VisionEncoder
from vugen.models.text import TextTransformer, WordTokenizer, scene_tokenizer
from vugen.models.vit import AttentionPool, VisionTransformer, patchify, resize

WORDS = "a an the red blue green circle square star left right of above below to".split()


def test_patches_refuse_a_wrong_grid():
    with pytest.raises(ValueError, match="3×3"): Patches(torch.zeros(1, 8, 4), (3, 3), torch.zeros(1, 4))


def test_patches_map_is_row_major():
    tokens = torch.arange(6.)[None, :, None]
    assert Patches(tokens, (2, 3), torch.zeros(1, 1)).as_map()[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_plain_module_is_no_part():
    plain = torch.nn.Linear(2, 2)
    assert not any(isinstance(plain, seam) for seam in (VisionEncoder, Reducer, Decoder, Generator, Scorer))


def test_attention_matches_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4).double(), torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).data
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 16, dtype=torch.float64)
    real = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, context, attention_mask(real, 7)), theirs(x, context, context, key_padding_mask=~real)[0])


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_training_attention_is_the_fused_kernel(kind):
    "The plain formula that trains on a CPU gives the kernel's values and gradients."
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7)]
    mask = {"none": None, "bool": torch.rand(2, 1, 5, 7) < .6, "float": torch.randn(2, 1, 5, 7, dtype=torch.float64)}[kind]
    if kind == "bool": mask[..., 0] = True
    ours, theirs = attend(*parts, mask, .3), torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=.3)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for one, two in zip(torch.autograd.grad((ours * weight).sum(), parts), torch.autograd.grad((theirs * weight).sum(), parts)): torch.testing.assert_close(one, two)


def test_attention_wants_divisible_heads():
    with pytest.raises(ValueError, match="not divisible"): Attention(10, 4)


def test_causal_gradient_never_reaches_the_future():
    block, x = TransformerBlock(8, 2, causal=True), torch.randn(1, 6, 8, requires_grad=True)
    block(x)[0, 2].sum().backward()
    assert x.grad[0, 3:].abs().max() == 0 and x.grad[0, :3].abs().min() > 0


def test_embeddings_tell_apart():
    times = timestep_embedding(torch.linspace(0, 1, 101), 64)
    assert torch.pdist(times).min() > .1
    assert torch.pdist(sincos_2d(16, 16, 64)).min() > .1
    with pytest.raises(ValueError): timestep_embedding(torch.zeros(1), 7)
    with pytest.raises(ValueError): sincos_2d(2, 2, 6)


def test_timestep_embedding_is_float32_whatever_comes_in():
    assert timestep_embedding(torch.ones(2, dtype=torch.float64), 8).dtype == torch.float32


def test_parameters_are_counted_once():
    layer = torch.nn.Linear(3, 3, bias=False)
    assert count_parameters(torch.nn.Sequential(layer, layer)) == 9
    layer.requires_grad_(False)
    assert count_parameters(layer, trainable_only=True) == 0


@pytest.mark.parametrize("pool", ["mean", "attention", "cls"])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_vit_saves_and_loads(pool, position, tmp_path):
    torch.manual_seed(0)
    vit, images = VisionTransformer(16, 4, 16, 1, 2, pool=pool, position=position).eval(), torch.rand(2, 3, 16, 16)
    vit.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).pooled, vit(images).pooled) and torch.equal(loaded(images).tokens, vit(images).tokens)


def test_vit_resizes_inside():
    vit = VisionTransformer(16, 4, 16, 1, 2).eval()
    large = torch.rand(1, 3, 64, 48)
    torch.testing.assert_close(vit(large).tokens, vit(resize(large, 16)).tokens)


def test_vit_knows_where_patches_are():
    vit, image = VisionTransformer(16, 4, 16, 2, 2).eval(), torch.rand(1, 3, 16, 16)
    assert not torch.allclose(vit(image).pooled, vit(image.flip(3)).pooled, atol=1e-4)


@pytest.mark.parametrize("bad", [dict(image_size=30), dict(pool="max"), dict(position="rope")])
def test_vit_refuses(bad):
    with pytest.raises(ValueError): VisionTransformer(**{**dict(image_size=32, patch_size=4, hidden_size=16, num_layers=1, num_heads=2), **bad})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="shape"): resize(torch.zeros(shape), 16)


def test_patchify_round_trip():
    image = torch.rand(2, 3, 8, 12)
    cut = patchify(image, 4)
    back = cut.view(2, 2, 3, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 12)
    assert torch.equal(back, image)


def test_attention_pool_gets_a_gradient():
    pool = AttentionPool(8, 2)
    pool(torch.randn(2, 4, 8)).sum().backward()
    assert pool.query.grad is not None


def test_tokenizer_round_trip():
    tokenizer = WordTokenizer(WORDS)
    captions = ["a red circle to the left of a blue square", "The GREEN star"]
    ids, mask = tokenizer.encode(captions)
    assert tokenizer.decode(ids) == [caption.lower() for caption in captions]
    assert ids[:, 0].eq(tokenizer.bos_id).all() and ids[mask][-1] == tokenizer.eos_id and ids[~mask].eq(tokenizer.pad_id).all()


def test_tokenizer_does_not_depend_on_the_order_of_words():
    assert WordTokenizer(WORDS).vocabulary == WordTokenizer(reversed([word.upper() for word in WORDS])).vocabulary


@pytest.mark.parametrize("word", ["elephant", "dog.", "ред", "<image>"])
def test_unknown_word_is_named(word):
    with pytest.raises(UserError) as error: WordTokenizer(WORDS).encode(["a red circle", f"a {word} circle"])
    assert word.rstrip(".").strip("<>") in str(error.value) or "<" in str(error.value)


def test_special_tokens_can_be_added():
    tokenizer = WordTokenizer(WORDS, extra_special=("<image>",))
    ids, _ = tokenizer.encode(["<image> a red circle"])
    assert ids[0, 1] == tokenizer.vocabulary["<image>"] and tokenizer.decode(ids) == ["a red circle"]


def test_long_captions_are_refused():
    with pytest.raises(UserError, match="longer than the 8"): WordTokenizer(WORDS).encode(["red " * 20], max_length=8)
    tower = TextTransformer(40, 16, 1, 2, context_length=8)
    with pytest.raises(UserError, match="longer than the 8"): tower(torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9))


def test_empty_captions():
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.encode([""])[0].tolist() == [[tokenizer.bos_id, tokenizer.eos_id]]
    assert tokenizer.encode([])[0].shape == (0, 0)
    with pytest.raises(TypeError): tokenizer.encode("a red circle")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "[]"])
def test_broken_tokenizer_files(content, tmp_path):
    with pytest.raises(UserError, match="missing"): WordTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"): WordTokenizer.load(tmp_path)


def test_foreign_tokenizer_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not written by vugen"): WordTokenizer.load(tmp_path)


def test_as_transformers_survives_its_own_saving(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = WordTokenizer(WORDS, ("<image>",))
    tokenizer.as_transformers().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a red star", add_special_tokens=False)["input_ids"] == tokenizer.encode(["a red star"], False, False)[0][0].tolist()
    assert again.pad_token_id == tokenizer.pad_id and again.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("pool,causal", [("mean", False), ("last", True)])
def test_padding_leaves_no_trace(pool, causal):
    torch.manual_seed(0)
    tokenizer, tower = WordTokenizer(WORDS), TextTransformer(40, 16, 2, 2, causal=causal, pool=pool).eval()
    captions = ["a red circle", "a red circle to the left of a blue square"]
    alone = torch.cat([tower(*tokenizer.encode([caption]))[1] for caption in captions])
    torch.testing.assert_close(tower(*tokenizer.encode(captions))[1], alone, atol=1e-5, rtol=1e-5)


def test_text_tower_saves_and_loads(tmp_path):
    tower = TextTransformer(40, 16, 1, 2, causal=True, pool="last").eval()
    tower.save_pretrained(tmp_path)
    ids, mask = torch.randint(4, 40, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(TextTransformer.from_pretrained(tmp_path)(ids, mask)[1], tower(ids, mask)[1])


def test_digits_are_read_as_the_caption_grammar_reads_them():
    from vugen.data.scenes import World, parse
    tokenizer = scene_tokenizer(world=World())
    for number, name in enumerate(("two", "three", "four", "five", "six"), 2):
        digit, word = f"{number} red circles", f"{name} red circles"
        assert parse(digit) == parse(word) and all(torch.equal(*pair) for pair in zip(tokenizer.encode([digit]), tokenizer.encode([word])))
    with pytest.raises(UserError, match="'12'"): tokenizer.encode(["12 red circles"])
    assert WordTokenizer(["2", "two"]).encode(["2"])[0].tolist() != WordTokenizer(["2", "two"]).encode(["two"])[0].tolist()
