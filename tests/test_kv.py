"""The KV slab and the prefix cache on their own."""

from __future__ import annotations

import torch

from server.engines.kv import KVShape, PrefixCache, Slab


def kv(length: int) -> torch.Tensor:
    """Of `length` positions, 8 bytes each; position i holds i."""
    return torch.arange(length, dtype=torch.float32).expand(1, 2, 1, length)[..., None].clone()


def test_the_longest_beginning_is_found_under_its_own_release() -> None:
    cache = PrefixCache(max_bytes=1000)
    cache.add(("r1", None), [1, 2, 3, 4], kv(4))
    cache.add(("r1", None), [1, 2, 9], kv(3))
    assert [
        found.shape[3]
        for found in [cache.longest(("r1", None), [1, 2, 3, 5]), cache.longest(("r1", None), [1, 2, 9, 9])]
    ] == [
        3,
        3,
    ]
    assert cache.longest(("r2", None), [1, 2, 3]) is None
    assert cache.longest(("r1", "tenant"), [1, 2, 3]) is None
    assert cache.longest(("r1", None), [7]) is None


def test_what_was_least_recently_used_goes_first() -> None:
    cache = PrefixCache(max_bytes=10 * 8)
    cache.add(("r", None), [1, 1, 1, 1], kv(4))
    cache.add(("r", None), [2, 2, 2, 2], kv(4))
    cache.longest(("r", None), [1])
    cache.add(("r", None), [3, 3, 3, 3], kv(4))
    assert cache.longest(("r", None), [2]) is None
    assert cache.longest(("r", None), [1]) is not None
    assert cache.bytes == 8 * 8
    cache.add(("r", None), [4] * 11, kv(11))  # larger than the cache
    assert cache.longest(("r", None), [4]) is None
    assert cache.bytes == 8 * 8


def test_a_longer_conversation_replaces_its_beginning() -> None:
    cache = PrefixCache(max_bytes=1000)
    cache.add(("r", None), [1, 2], kv(2))
    cache.add(("r", None), [1, 2, 3], kv(3))
    assert cache.bytes == 3 * 8
    cache.add(("other", "tenant"), [1, 2], kv(2))
    cache.forget("other")
    assert cache.bytes == 3 * 8
    cache.forget()
    assert (cache.bytes, cache.longest(("r", None), [1])) == (0, None)


def test_a_slab_moves_rows() -> None:
    slab = Slab(KVShape(layers=1, heads=1, size=1, dtype=torch.float32), rows=2, capacity=4, device="cpu")
    slab.write(0, kv(3))
    slab.copy(0, 1, 2)
    assert slab.read(1, 4).flatten().tolist() == [0, 1, 0, 0] * 2
    slab.clear(0)
    assert slab.read(0, 4).abs().sum() == 0
