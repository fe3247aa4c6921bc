"""What is trained, and under which weights a forward pass runs: an adapter over a frozen base, or everything.

Both kinds keep three sets: "student", "base" and, once it is begun, "ema". Masters are fp32, whatever the model
computes in; a base is never written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agent_rl.models import Dtype, Lora, LoraConfig, load_adapter, load_model, save_adapter, tensors_checksum

Tensors = dict[str, Tensor]


class Weights(Protocol):
    student: Tensors  # fp32 leaves: the optimizer reads their gradients and writes them
    ema: Tensors | None

    def load(self, student: Mapping[str, Tensor] | None, ema: Mapping[str, Tensor] | None) -> None:
        """Take copies of these values; None: those of birth, and no EMA."""

    def using(self, name: str) -> AbstractContextManager[nn.Module]:
        """The model, computing under the set `name` as long as the context lasts."""

    def collect(self) -> None:
        """Add what the last backward pass left to the masters' gradients, in fp32."""

    def changed(self) -> None:
        """The student's masters were updated: compute with them from now on."""

    def track(self, rate: float) -> None:
        """ema ← ema + rate · (student − ema); an EMA that there is not begins at the student."""

    def save(self, folder: Path) -> None:
        """The student's masters, in full precision."""

    def read(self, folder: Path) -> Tensors:
        """What `save` wrote."""

    def export(self, folder: Path) -> str:
        """The student as it is served; returns the checksum of the tensors in it."""


class LoraWeights:
    """An fp32 adapter; the base beside it is the frozen teacher for nothing."""

    def __init__(self, folder: Path, config: LoraConfig, dtype: Dtype, device: str, seed: int) -> None:
        self.model = load_model(folder, dtype, device).requires_grad_(False)
        self.lora = Lora(self.model)
        self.config = config
        self.seed = seed
        self.load(None, None)

    def load(self, student: Mapping[str, Tensor] | None, ema: Mapping[str, Tensor] | None) -> None:
        self.student = self._put("student", student or self.lora.new_adapter(self.config, self.seed))
        for tensor in self.student.values():
            tensor.requires_grad_()
        self.ema = None if ema is None else self._put("ema", ema)

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        with self.lora.using(None if name == "base" else name):
            yield self.model

    def collect(self) -> None:
        pass  # the masters are what computes

    def changed(self) -> None:
        pass

    def track(self, rate: float) -> None:
        if self.ema is None:
            self.ema = self._put("ema", self.student)
        _lerp(self.ema, self.student, rate)

    def save(self, folder: Path) -> None:
        save_adapter(folder, self.config, self.student)

    def read(self, folder: Path) -> Tensors:
        return load_adapter(folder)[1]

    def export(self, folder: Path) -> str:
        save_adapter(folder, self.config, self.student)
        return tensors_checksum(load_adapter(folder)[1])

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> Tensors:
        self.lora.add(name, self.config, {n: t.detach().float().clone() for n, t in tensors.items()})
        return self.lora.tensors(name)


class FullWeights:
    """fp32 masters beside a working copy in the model's own precision; other sets live in a second model."""

    def __init__(self, folder: Path, dtype: Dtype, device: str) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.model = load_model(folder, dtype, device)
        self.others: dict[str, nn.Module] = {}  # base and EMA, as they are asked for
        self.load(None, None)

    def load(self, student: Mapping[str, Tensor] | None, ema: Mapping[str, Tensor] | None) -> None:
        born = student or dict(load_model(self.folder, self.dtype, self.device).named_parameters())
        self.student = _masters(born, self.device)
        for tensor in self.student.values():
            tensor.requires_grad_()
        self.ema = None if ema is None else _masters(ema, self.device)
        self.others.pop("ema", None)
        self.changed()

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        if name == "student":
            yield self.model
            return
        if name not in self.others:
            self.others[name] = load_model(self.folder, self.dtype, self.device).requires_grad_(False)
            if name == "ema":
                assert self.ema is not None, "the EMA begins with `track`"
                _copy(self.others[name], self.ema)
        yield self.others[name]

    def collect(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                master = self.student[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def changed(self) -> None:
        _copy(self.model, self.student)

    def track(self, rate: float) -> None:
        if self.ema is None:
            self.ema = _masters(self.student, self.device)
        _lerp(self.ema, self.student, rate)
        if "ema" in self.others:
            _copy(self.others["ema"], self.ema)

    def save(self, folder: Path) -> None:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in self.student.items()}, str(folder / "weights.safetensors")
        )

    def read(self, folder: Path) -> Tensors:
        return load_file(str(folder / "weights.safetensors"))

    def export(self, folder: Path) -> str:
        model: Any = self.model
        model.save_pretrained(folder)
        for path in self.folder.iterdir():  # tokenizer, template, generation settings
            if path.is_file() and not (folder / path.name).exists() and ".safetensors" not in path.name:
                shutil.copy(path, folder / path.name)
        tensors: Tensors = {}
        for shard in folder.glob("*.safetensors"):
            tensors |= load_file(str(shard))
        return tensors_checksum(tensors)


def _masters(tensors: Mapping[str, Tensor], device: str) -> Tensors:
    return {name: tensor.detach().to(device, torch.float32, copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


@torch.no_grad()
def _lerp(into: Tensors, towards: Tensors, rate: float) -> None:
    for name, tensor in into.items():
        tensor.lerp_(towards[name], rate)
