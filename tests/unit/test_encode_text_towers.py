"""MiniLM: pooling, invariances, the cosines that the bench relies on, and bad input."""
import pytest
import torch

from vugen.encode.text_towers import MiniLM, check_texts, mean_pool
from vugen.errors import UserError


@pytest.fixture(scope="module")
def tower(): return MiniLM()


def test_unit_vectors_independent_of_batch_and_padding(tower):
    texts = ["a dog", "a red circle left of a blue square on a table with many other words", "rain"]
    together, alone = tower.encode(texts, batch_size=2), torch.cat([tower.encode([text]) for text in texts])
    assert together.shape == (3, 384)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    assert tower.encode([]).shape == (0, 384)


def test_swapped_colours_are_nearly_invisible(tower):
    first, swapped, replaced, other = tower.encode(["a red circle left of a blue square", "a blue circle left of a red square",
                                                    "a green circle left of a blue square", "the minister resigned on Friday"])
    assert 0.985 < float(first @ swapped) < 0.9999 and float(first @ replaced) < float(first @ swapped) and float(first @ other) < 0.3


def test_frozen(tower):
    assert not any(parameter.requires_grad for parameter in tower.parameters()) and not tower.train().training
    assert not tower.encode(["a dog"]).requires_grad


def test_mean_pool_ignores_padding_whatever_it_holds():
    states, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    changed = states.clone()
    changed[0, 2:] = 1e6
    torch.testing.assert_close(mean_pool(states, mask), mean_pool(changed, mask))


@pytest.mark.parametrize("texts, words", [(["a", ""], "empty text"), ("a dog", "list of texts"), ([" \n"], "empty text"), (["x" * 10_001], "10,001 characters"), ([None], "empty text")])
def test_bad_texts(texts, words):
    with pytest.raises(UserError, match=words): check_texts(texts)


def test_long_text_is_cut_not_refused(tower):
    assert tower.encode(["dog " * 2000]).shape == (1, 384)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no readable sentence encoder"): MiniLM(tmp_path)
