"""Keys and values: one slab with a row per running answer, and a cache of what finished conversations left behind.

Y layers, B rows, H key/value heads, C positions of a row, D head size, n rows in this forward, c new tokens each
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache


@dataclass(frozen=True, slots=True)
class KVShape:
    layers: int
    heads: int
    size: int
    dtype: torch.dtype


class Slab:
    """KV of all rows, [Y, 2, B, H, C, D]. Running answers fill rows 0:n, so that a batch is a view and not a copy.

    It starts as zeros, and stays finite: a masked position is multiplied by 0, and 0 · NaN is NaN.
    """

    def __init__(self, shape: KVShape, rows: int, capacity: int, device: str) -> None:
        self.rows = rows
        size = shape.layers, 2, rows, shape.heads, capacity, shape.size
        self.data = torch.zeros(size, dtype=shape.dtype, device=device)

    def read(self, row: int, length: int) -> Tensor:
        """A copy of a row's first positions, [Y, 2, H, length, D]."""
        return self.data[:, :, row, :, :length].clone()

    def write(self, row: int, kv: Tensor) -> None:
        self.data[:, :, row, :, : kv.shape[3]] = kv

    def copy(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def clear(self, row: int) -> None:
        self.data[:, :, row] = 0


class SlabCache(Cache):
    """The slab as transformers' cache for one forward over rows first:first+n. New keys are written in place, each
    row's at its own positions; what comes back is a view of the rows up to `length`, masked by the caller."""

    def __init__(self, slab: Slab, first: int, positions: Tensor, length: int) -> None:
        super().__init__(layers=[])
        count, new = positions.shape
        self.kv = slab.data[:, :, first : first + count]
        self.length = length
        start = int(positions[0, 0])
        self.at: tuple[Any, ...] = (slice(None), slice(None), slice(start, start + new))
        self.scattered = count > 1
        if self.scattered:
            self.at = (torch.arange(count, device=positions.device)[:, None], slice(None), positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.kv[layer_idx]
        if self.scattered:  # an index beside a slice puts the slice last: [n, c, H, D]
            key_states, value_states = key_states.transpose(1, 2), value_states.transpose(1, 2)
        keys[self.at], values[self.at] = key_states, value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


Space = tuple[str, str | None]  # release, extra_key


class PrefixCache:
    """KV of finished conversations, least recently used out first: the next turn begins where one ended.

    Each release and each `extra_key` has a space of its own: what one holds neither shows nor speeds up another's.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: OrderedDict[tuple[Space, bytes], tuple[NDArray[np.int64], Tensor]] = OrderedDict()

    def longest(self, space: Space, ids: Sequence[int]) -> Tensor | None:
        """KV of the longest known beginning of `ids` in this space, [Y, 2, H, length, D]."""
        wanted = np.asarray(ids, dtype=np.int64)
        best, length = None, 0
        for key, (known, _) in self.entries.items():
            shared = _shared(known, wanted) if key[0] == space else 0
            if shared > length:
                best, length = key, shared
        if best is None:
            return None
        self.entries.move_to_end(best)
        return self.entries[best][1][:, :, :, :length]

    def add(self, space: Space, ids: Sequence[int], kv: Tensor) -> None:
        """Keep the KV of `ids`; what it continues need not be kept beside it."""
        known = np.asarray(ids, dtype=np.int64)
        for key, (before, _) in list(self.entries.items()):
            if key[0] == space and len(before) <= len(known) and _shared(before, known) == len(before):
                self._drop(key)
        if kv.nbytes > self.max_bytes:
            return
        self.entries[space, known.tobytes()] = known, kv
        self.bytes += kv.nbytes
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self.entries)))

    def forget(self, release: str | None = None) -> None:
        """Drop what one release left, or everything."""
        for key in [key for key in self.entries if release in (None, key[0][0])]:
            self._drop(key)

    def _drop(self, key: tuple[Space, bytes]) -> None:
        self.bytes -= self.entries.pop(key)[1].nbytes


def _shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
