"""The model behind the engine: its weights, its adapters, and one forward over any rows of the KV slab.

Any causal language model of full attention and one shape of KV runs; that the forward here gives what the model's own
gives is proven when weights are loaded, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agent_rl.models import Dtype, Lora, ModelError, load_adapter, load_model, tensors_checksum
from server.engines.kv import KVShape, Slab, SlabCache

PROOF_LENGTHS = (5, 17)  # prompts of the proof: short, of unlike length …
PROOF_CUTS = (3, 4)  # … and cut into unlike chunks, each with something of both


@dataclass(frozen=True, slots=True)
class Part:
    """What one row does in a forward."""

    ids: Sequence[int]  # new tokens
    start: int  # the position of the first
    adapter: str | None
    picks: Sequence[int]  # indices into `ids` whose logits are wanted


class PickRows(nn.Module):
    """An output head for the rows that are asked for: most of a prompt needs no logits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.index: Tensor | None = None  # into [n · c]; None: all

    def forward(self, hidden: Tensor) -> Tensor:
        picked: Tensor = self.head(hidden if self.index is None else hidden.flatten(0, 1)[self.index])
        return picked


class Runner:
    """One model on one device. Belongs to one thread."""

    def __init__(self, folder: Path, *, dtype: Dtype, device: str, rows: int, max_context: int, max_chunk: int) -> None:
        """Raises ModelError where the folder holds no model that can run here."""
        self.dtype, self.device = dtype, device
        model: Any = load_model(folder, dtype, device)
        config = model.config.get_text_config()
        self.max_context = min(max_context, int(config.max_position_embeddings))
        self.vocab_size = int(config.vocab_size)
        _check_attention(config, self.max_context)
        self.folder = folder
        self.architecture = _architecture(model)
        self._install(model)
        self.slab = Slab(self.shape, rows, self.max_context + max_chunk, device)  # a chunk's padding may lie behind

    def _install(self, model: Any) -> None:
        self.model = model
        self.lora = Lora(model)
        self.shape = kv_shape(model, self.device)
        self.pick = PickRows(model.get_output_embeddings())
        model.set_output_embeddings(self.pick)
        self._prove()

    @property
    def eos_ids(self) -> frozenset[int]:
        for source in (getattr(self.model, "generation_config", None), self.model.config):
            eos = getattr(source, "eos_token_id", None)
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
        return frozenset()

    def replace(self, folder: Path) -> None:
        """Other weights of the same architecture. Raises ModelError, and goes on with what it has."""
        model: Any = load_model(folder, self.dtype, self.device)
        there = _architecture(model)
        if odd := sorted(k for k in there.keys() | self.architecture if there.get(k) != self.architecture.get(k)):
            raise ModelError(f"{folder} has another architecture than the model that serves: {odd[:4]} differ")
        before = self.model, self.lora, self.shape, self.pick
        try:
            self._install(model)
        except BaseException:
            self.model, self.lora, self.shape, self.pick = before
            raise
        self.folder = folder

    def add_adapter(self, name: str, folder: Path) -> str:
        """Load an adapter; its checksum. Raises ModelError on a misfit."""
        config, tensors = load_adapter(folder)
        self.lora.add(name, config, tensors)
        return tensors_checksum(tensors)

    def checksum(self, folder: Path) -> str:
        """Of an adapter on disk. Raises ModelError."""
        return tensors_checksum(load_adapter(folder)[1])

    @torch.inference_mode()
    def forward(self, first: int, parts: Sequence[Part], slab: Slab | None = None) -> Tensor:
        """Run rows first:first+n; logits in fp32 of all picks, row by row, [picks, V]."""
        width = max(len(part.ids) for part in parts)
        padded = [[*part.ids, *[0] * (width - len(part.ids))] for part in parts]
        starts = torch.tensor([part.start for part in parts], device=self.device)
        written = starts[:, None] + torch.arange(width, device=self.device)  # [n, c]
        lasts = torch.tensor([part.start + len(part.ids) - 1 for part in parts], device=self.device)
        positions = torch.minimum(written, lasts[:, None])  # padding must not look like a longer context
        length = max(part.start for part in parts) + width
        visible = torch.arange(length, device=self.device) <= written[:, :, None]  # [n, c, length]
        mask = torch.zeros(visible.shape, dtype=self.shape.dtype, device=self.device)
        mask.masked_fill_(~visible, torch.finfo(self.shape.dtype).min)
        index = [row * width + pick for row, part in enumerate(parts) for pick in part.picks]
        self.pick.index = torch.tensor(index, dtype=torch.long, device=self.device)
        with self.lora.routing(self._routes([part.adapter for part in parts])):
            out = self.model(
                input_ids=torch.tensor(padded, device=self.device),
                attention_mask=mask[:, None],
                position_ids=positions,
                past_key_values=SlabCache(slab or self.slab, first, written, length),
                use_cache=True,
            )
        logits: Tensor = out.logits.float()
        return logits

    def _routes(self, adapters: Sequence[str | None]) -> list[tuple[str, Tensor | None]]:
        names = sorted({name for name in adapters if name is not None})
        if len(names) == 1 and None not in adapters:
            return [(names[0], None)]
        rows = {name: [row for row, at in enumerate(adapters) if at == name] for name in names}
        return [(name, torch.tensor(rows[name], device=self.device)) for name in names]

    def _prove(self) -> None:
        """Compare with the model's own forward, rows side by side and prompts in chunks. Raises ModelError."""
        step = max(1, self.vocab_size // 97)
        prompts = [[(7 + i * step) % self.vocab_size for i in range(n)] for n in PROOF_LENGTHS]
        slab = Slab(self.shape, len(prompts), max(PROOF_LENGTHS) + PROOF_CUTS[-1], self.device)
        for begin, end in pairwise((0, *PROOF_CUTS, max(PROOF_LENGTHS))):
            news = [p[begin:end] for p in prompts]
            got = self.forward(0, [Part(new, begin, None, (len(new) - 1,)) for new in news], slab)
        with torch.inference_mode():
            self.pick.index = None
            want = [self.model(torch.tensor([p], device=self.device)).logits[0, -1].float() for p in prompts]
        for ours, own in zip(got, want, strict=True):
            off = ((ours - own).abs().max() / own.abs().max()).item()
            if not off <= (1e-3 if self.shape.dtype == torch.float32 else 0.1):
                name = type(self.model).__name__
                raise ModelError(f"{name} cannot be served here: its batched forward is off its own by {off:.2g}")


def _architecture(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@torch.inference_mode()
def kv_shape(model: Any, device: str) -> KVShape:
    """Found by asking: one token through the model's own cache. Raises ModelError where layers differ."""
    cache = model(torch.tensor([[1]], device=device), use_cache=True).past_key_values
    shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ModelError(f"keys and values of unlike shapes cannot be served here: {sorted(shapes)}")
    _, heads, _, size = shapes.pop()
    return KVShape(len(cache.layers), heads, size, cache.layers[0].keys.dtype)


def _check_attention(config: Any, max_context: int) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = "sliding_attention" in kinds or (window and getattr(config, "use_sliding_window", True))
    if slides and window and window < max_context:
        raise ModelError(f"attention slides over {window} tokens: set engine.max_context to at most that")
    if odd := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layers of {sorted(odd)} cannot be served here; full attention can")
