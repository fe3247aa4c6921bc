"""Checkpoints: resumed training is the same training, names are contents, candidates load where they are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drills import drills, make_backend
from torch import Tensor

from agent_rl.models import ModelError, hash_folder, load_adapter, load_model, load_tokenizer, tensors_checksum
from agent_rl.objectives.divergences import reverse_kl
from agent_rl.training.checkpoints import TrainState, write_checkpoint
from agent_rl.training.torch_backend import TorchBackend


def update(backend: TorchBackend) -> float:
    backend.forward_backward(drills(), lambda rows: reverse_kl(rows.student_NV, rows.teacher_NV))
    return backend.step(1e-3)


@pytest.mark.parametrize(
    ("tuning", "teacher"), [("lora", "frozen"), ("lora", "ema"), ("full", "frozen"), ("full", "ema")]
)
def test_resumed_training_is_bit_for_bit_the_same(tiny_model: Path, tmp_path: Path, tuning: str, teacher: str) -> None:
    backend = make_backend(tiny_model, tuning=tuning, teacher=teacher)
    update(backend), update(backend)
    checkpoint_id = backend.save(tmp_path, None, "p1")
    norm = update(backend)
    expected = tensors_checksum(backend.weights.student)

    resumed = make_backend(tiny_model, tuning=tuning, teacher=teacher)
    resumed.load(tmp_path / checkpoint_id)
    assert resumed.steps == 2
    assert resumed.save(tmp_path, None, "p1") == checkpoint_id  # the same state has the same name
    assert update(resumed) == norm
    assert resumed.steps == 3
    assert tensors_checksum(resumed.weights.student) == expected


def test_going_back_to_the_base_forgets_everything(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    first = update(backend)
    update(backend)
    backend.load(None)
    assert backend.steps == 0
    assert update(backend) == first


def test_the_name_is_the_content_and_the_parent_is_part_of_it(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model)
    update(backend)
    one, other = backend.save(tmp_path, None, "p1"), backend.save(tmp_path, "another parent", "p1")
    foreign = backend.save(tmp_path, None, "p2")  # two policies that learned the same
    assert len({one, other, foreign}) == 3
    assert hash_folder(tmp_path / one) == one
    assert {path.name for path in tmp_path.iterdir()} == {one, other, foreign}  # no drafts are left


def test_a_damaged_checkpoint_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model)
    update(backend)
    folder = tmp_path / backend.save(tmp_path, None, "p1")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match="damaged or changed"):
        backend.load(folder)
    with pytest.raises(ModelError, match="is no checkpoint"):
        backend.load(tmp_path / "nothing")


def test_a_checkpoint_of_the_other_tuning_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model)
    update(backend)
    folder = tmp_path / backend.save(tmp_path, None, "p1")
    with pytest.raises(ModelError, match=r"is of lora tuning and learner\.tuning is full"):
        make_backend(tiny_model, tuning="full").load(folder)


def test_a_crash_while_writing_leaves_nothing_under_a_name(tmp_path: Path) -> None:
    def crash(folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, TrainState(1, None, "lora"), crash, {}, None)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_adapter_is_the_student(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model)
    update(backend)
    checksum = backend.export(tmp_path / "r1")
    config, tensors = load_adapter(tmp_path / "r1")
    assert (config.rank, config.alpha) == (4, 8.0)
    assert tensors_checksum(tensors) == checksum == tensors_checksum(backend.weights.student)


def test_an_exported_model_loads_like_any_other(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model, tuning="full")
    update(backend)
    backend.export(tmp_path / "r1")
    ids = torch.tensor([[1, 70, 71]])
    with torch.no_grad(), backend.weights.using("student") as student:
        expected: Tensor = student(ids).logits
        assert torch.equal(load_model(tmp_path / "r1", "float32")(ids).logits, expected)
    assert load_tokenizer(tmp_path / "r1").chat_template == load_tokenizer(tiny_model).chat_template
