"""The router `language`: the experts of a language are its own, as far as there are enough."""

import pytest
import torch
from support.reference_routers import smallest

from fairseq_sparsemixer.moe import build_router


def experts_of(experts, languages, tokens=400):
    """By language, those that its tokens reach."""
    router = build_router("language", embed_dim=4, num_experts=experts, num_languages=languages)
    found = []
    for language in range(languages):
        ids = language + languages * torch.arange(tokens)
        index = router(torch.randn(tokens, 4), token_ids=ids).expert_index
        assert index.shape == (tokens, 1)
        found.append(sorted(set(index.flatten().tolist())))
    return found


@pytest.mark.parametrize(
    ("experts", "languages", "expected"),
    [
        (4, 4, [[0], [1], [2], [3]]),
        (2, 5, [[0], [0], [0], [1], [1]]),
        (3, 4, [[0], [0], [1], [2]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (7, 3, [[0, 1], [2, 3], [4, 5, 6]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_languages_share_experts_or_experts_a_language(experts, languages, expected):
    assert experts_of(experts, languages) == expected


def test_within_a_language_it_is_a_hash_of_the_token():
    token_ids, x = torch.arange(1000), torch.randn(1000, 4)
    of_one = build_router("language", embed_dim=4, num_experts=5)
    by_hash = build_router("hash", embed_dim=4, num_experts=5)
    expected = by_hash(x, token_ids=token_ids)
    found = of_one(x, token_ids=token_ids)
    assert torch.equal(found.expert_index, expected.expert_index)
    assert torch.equal(found.gate, expected.gate)
    two = build_router("language", embed_dim=4, num_experts=10, num_languages=2)
    for language in (0, 1):
        index = two(x, token_ids=language + 2 * token_ids).expert_index
        assert torch.equal(index, 5 * language + expected.expert_index)


def test_what_it_cannot_do_without():
    with pytest.raises(ValueError, match="router 'language' needs token_ids"):
        smallest("language")(torch.randn(3, 8))
    with pytest.raises(ValueError, match="num_languages must be at least 1, not 0"):
        build_router("language", embed_dim=4, num_experts=2, num_languages=0)
