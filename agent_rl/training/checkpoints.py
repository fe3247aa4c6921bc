"""Checkpoints on disk: a folder of safetensors and one JSON file, named by the hash of its content.

    adapter_model.safetensors + adapter_config.json  |  weights.safetensors     the student, fp32
    optimizer.safetensors                            AdamW's moments: first.<name>, second.<name>
    ema.safetensors                                  where the teacher is an EMA
    state.json                                       step, parent, what was tuned, for which policy

There is no generator to keep: dropout is off, and what is drawn (replays) is drawn by seed and step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from agent_rl.models import ModelError, hash_folder, new_folder


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps since the policy's birth
    parent: str | None  # checkpoint id
    tuning: str  # lora | full
    policy: str = ""  # two policies that learn the same have two checkpoints


def write_checkpoint(
    root: Path,
    state: TrainState,
    save_student: Callable[[Path], None],
    moments: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
) -> str:
    """Write a checkpoint to `root` / its hash and return the hash; a crash leaves nothing under such a name."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=root) as name:
        draft = Path(name)
        save_student(draft)
        _save(draft / "optimizer.safetensors", moments)
        if ema is not None:
            _save(draft / "ema.safetensors", ema)
        (draft / "state.json").write_text(json.dumps(asdict(state), indent=1))
        checkpoint_id = hash_folder(draft)
        with new_folder(root / checkpoint_id) as folder:
            for path in draft.iterdir():
                path.rename(folder / path.name)
    return checkpoint_id


def read_state(folder: Path, tuning: str) -> TrainState:
    """Raises ModelError where the folder is no whole checkpoint of this kind of tuning."""
    try:
        state = TrainState(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} is no checkpoint: {error}") from error
    if hash_folder(folder) != folder.name:
        raise ModelError(f"the content of checkpoint {folder} is not what its name says; it was damaged or changed")
    if state.tuning != tuning:
        raise ModelError(f"checkpoint {folder} is of {state.tuning} tuning and learner.tuning is {tuning}; set it so")
    return state


def read_moments(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "optimizer.safetensors"))


def read_ema(folder: Path) -> dict[str, Tensor] | None:
    path = folder / "ema.safetensors"
    return load_file(str(path)) if path.exists() else None


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path))
