"""Folders, hashes and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import make_adapter
from torch import Tensor, nn

from agent_rl.models import (
    Lora,
    LoraConfig,
    ModelError,
    base_hash,
    hash_folder,
    load_adapter,
    load_model,
    new_folder,
    save_adapter,
    tensors_checksum,
)


class Two(nn.Module):
    """y = x · diag(1, 2), then nothing: small enough for hand arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.diag(torch.tensor([1.0, 2.0])))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def pair(a: list[float], b: list[float]) -> dict[str, Tensor]:
    return {"proj.lora_A.weight": torch.tensor([a]) * 1.0, "proj.lora_B.weight": torch.tensor([[x] for x in b]) * 1.0}


RANK_1 = LoraConfig(rank=1, alpha=2, targets=("proj",))  # scale 2


def test_rows_answer_under_their_own_adapters() -> None:
    model = Two()
    lora = Lora(model)
    lora.add("sum", RANK_1, pair([1, 1], [1, 0]))  # adds 2 (x0 + x1) to the first output
    lora.add("copy", RANK_1, pair([1, 0], [0, 1]))  # adds 2 x0 to the second
    x = torch.tensor([[1.0, 3.0]] * 3)
    with lora.routing([("sum", torch.tensor([0])), ("copy", torch.tensor([2]))]):
        assert model(x).tolist() == [[9, 6], [1, 6], [1, 8]]
    with lora.using("sum"):
        assert model(x).tolist() == [[9, 6]] * 3
    assert model(x).tolist() == [[1, 6]] * 3
    lora.remove("sum")
    with lora.using("sum"):
        assert model(x).tolist() == [[1, 6]] * 3


def test_an_adapter_that_does_not_fit_leaves_nothing_behind() -> None:
    lora = Lora(Two())
    with pytest.raises(ModelError, match=r"layer proj: shapes \(\(1, 3\), \(2, 1\)\); expected \(\(1, 2\), \(2, 1\)\)"):
        lora.add("odd", RANK_1, pair([1, 1, 1], [1, 0]))
    with pytest.raises(ModelError, match=r"lora_B.weight'.* are missing or not wanted"):
        lora.add("odd", RANK_1, {"proj.lora_A.weight": torch.ones(1, 2)})
    with pytest.raises(ModelError, match=r"no linear layer of this model is called any of \['q'\]"):
        lora.add("odd", LoraConfig(1, 1, ("q",)), {})
    assert (lora.tensors("odd"), lora.configs) == ({}, {})


def test_an_adapter_is_the_same_as_merged_weights(tiny_model: Path, tmp_path: Path) -> None:
    config, tensors = load_adapter(make_adapter(tmp_path / "a", tiny_model, seed=3))
    merged, adapted = load_model(tiny_model, "float32"), load_model(tiny_model, "float32")
    with torch.no_grad():
        for name in (n.removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n):
            delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            merged.get_parameter(f"{name}.weight").add_(delta, alpha=config.scale)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    plain = adapted(ids).logits
    lora = Lora(adapted)
    lora.add("a", config, tensors)
    with lora.using("a"):
        ours = adapted(ids).logits
    assert torch.allclose(ours, merged(ids).logits, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=0.1)
    assert torch.equal(adapted(ids).logits, plain)


def test_a_fresh_adapter_changes_nothing_and_is_seeded(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32")
    ids = torch.tensor([[1, 5, 6]])
    plain = model(ids).logits
    lora = Lora(model)
    config = LoraConfig(4, 8, ("q_proj",))
    fresh = lora.new_adapter(config, seed=0)
    lora.add("fresh", config, fresh)
    with lora.using("fresh"):
        assert torch.equal(model(ids).logits, plain)
    assert tensors_checksum(fresh) == tensors_checksum(lora.new_adapter(config, seed=0))
    assert tensors_checksum(fresh) != tensors_checksum(lora.new_adapter(config, seed=1))


def test_adapters_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    tensors = pair([1, 2], [3, 4])
    save_adapter(tmp_path / "a", RANK_1, tensors)
    config, loaded = load_adapter(tmp_path / "a")
    assert config == RANK_1
    assert tensors_checksum(loaded) == tensors_checksum(tensors)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="is no adapter folder"):
        load_adapter(tmp_path / "a")


def test_checksums_see_names_dtypes_shapes_and_bytes() -> None:
    tensors = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.int32)}]
    sums = {tensors_checksum(t) for t in [tensors, *others, {"a": torch.ones(2, 3)}]}
    assert len(sums) == 5


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "whole") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "whole").exists()
    assert (tmp_path / "whole" / "file").read_text() == "x"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "never") as folder:
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_hashes_are_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "README").write_text("words")
    before = base_hash(tmp_path), hash_folder(tmp_path)
    (tmp_path / "README").write_text("other words")
    assert base_hash(tmp_path) == before[0]
    assert hash_folder(tmp_path) != before[1]
    (tmp_path / "model.safetensors").write_text("other weights")
    assert base_hash(tmp_path) != before[0]


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match=r"holds no .safetensors weights"):
        load_model(tmp_path)
