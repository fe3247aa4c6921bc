"""Updates in plain torch on one device.

The body of the model runs once per micro-batch and side and gives hidden states; the vocabulary is met only on the
response rows, a chunk at a time. Each chunk's loss is differentiated down to its hidden states at once and its logits
are let go, so no [tokens, vocabulary] array larger than a chunk is ever held, and nothing is computed twice.

    N  response tokens    D  hidden    V  vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agent_rl.models import LoraConfig, ModelError, new_folder
from agent_rl.objectives.aggregation import normalise, weighted_sum
from agent_rl.objectives.divergences import entropy, reverse_kl
from agent_rl.objectives.rows import Rows
from agent_rl.settings import LearnerSettings
from agent_rl.training.backend import Loss, Mismatch, NotFinite, Score
from agent_rl.training.batch import Batch, Side, micro_batches
from agent_rl.training.checkpoints import TrainState, read_ema, read_moments, read_state, write_checkpoint
from agent_rl.training.weights import FullWeights, LoraWeights, Weights
from agent_rl.types import Sample

CHUNK = 128  # rows whose logits are held at once
MICRO_TOKENS = {"cpu": 2048}  # padded tokens of a micro-batch
MICRO_TOKENS_ACCELERATOR = 16384


class Teacher(Protocol):
    def begin(self, weights: Weights) -> None: ...

    def scoring(self, weights: Weights) -> AbstractContextManager[nn.Module]: ...

    def after_step(self, weights: Weights) -> None: ...


class TorchBackend:
    """See `agent_rl.training.backend.Backend`. Not thread-safe: one worker at a time."""

    def __init__(
        self, folder: Path, settings: LearnerSettings, teacher: Teacher, *, micro_tokens: int | None = None
    ) -> None:
        self.settings = settings
        self.teacher = teacher
        self.device = settings.device
        self.micro_tokens = micro_tokens or MICRO_TOKENS.get(self.device, MICRO_TOKENS_ACCELERATOR)
        self.weights = _weights(folder, settings)
        self.load(None)
        _check_head(self.weights, self.device)

    # ------------------------------------------------------------------------------------------- state
    def load(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.steps = 0
            self.weights.load(None, None)
        else:
            self.steps = read_state(checkpoint, self.settings.tuning).step
            self.weights.load(self.weights.read(checkpoint), read_ema(checkpoint))
        self.optimizer = torch.optim.AdamW(
            self.weights.student.values(),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=self.settings.weight_decay,
        )
        if checkpoint is not None:
            self._restore(read_moments(checkpoint))
        self.tokens = 0  # with a loss, since the last step
        self.teacher.begin(self.weights)

    def save(self, root: Path, parent: str | None, policy: str) -> str:
        state = TrainState(self.steps, parent, self.settings.tuning, policy)
        return write_checkpoint(root, state, self.weights.save, self._moments(), self.weights.ema)

    def export(self, folder: Path) -> str:
        with new_folder(folder) as draft:
            return self.weights.export(draft)

    def _moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for name, tensor in self.weights.student.items():
            state = self.optimizer.state.get(tensor)
            if state:
                moments[f"first.{name}"], moments[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return moments

    def _restore(self, moments: dict[str, Tensor]) -> None:
        for name, tensor in self.weights.student.items():
            if f"first.{name}" in moments:
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(self.steps)),
                    "exp_avg": moments[f"first.{name}"].to(tensor.device),
                    "exp_avg_sq": moments[f"second.{name}"].to(tensor.device),
                }

    # ----------------------------------------------------------------------------------------- updates
    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> list[Score]:
        scores: dict[int, Score] = {}
        for batch in micro_batches(samples, self.micro_tokens, self.device):
            scores |= self._measure(batch, *self._hidden(batch))
        return [scores[i] for i in range(len(samples))]

    def forward_backward(self, samples: Sequence[Sample], loss: Loss, min_gap: float = 0.0) -> list[Score]:
        scores: dict[int, Score] = {}
        for batch in micro_batches(samples, self.micro_tokens, self.device):
            student_ND, teacher_ND = self._hidden(batch)
            with torch.no_grad():
                measured = self._measure(batch, student_ND, teacher_ND)
            learned = [not measured[i].reverse_kl < min_gap for i in batch.samples]  # NaN is no weak signal
            rows = torch.tensor(learned, device=self.device)[batch.student.sample_N].nonzero().squeeze(-1)
            loss_N = self._backward(batch, student_ND, teacher_ND, rows, loss)
            for b, i in enumerate(batch.samples):
                of_sample = batch.student.sample_N[rows] == b
                scores[i] = replace(measured[i], loss=loss_N[of_sample].sum().item()) if learned[b] else measured[i]
        return [scores[i] for i in range(len(samples))]

    def step(self, lr: float) -> float:
        assert self.tokens, "a step needs a `forward_backward` that learned from something"
        tensors = [t for t in self.weights.student.values() if t.grad is not None]
        normalise((t.grad for t in tensors if t.grad is not None), self.tokens)
        self.tokens = 0
        norm = nn.utils.clip_grad_norm_(tensors, self.settings.grad_clip).item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NotFinite(f"the gradient's norm is {norm} at step {self.steps + 1}; the step was left out")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.weights.changed()
        self.teacher.after_step(self.weights)
        return norm

    # ----------------------------------------------------------------------------------------- forward
    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the response tokens, student's with gradient and teacher's, each [N, D]."""
        with self.weights.using("student") as model:
            student_ND = _body(model, batch.student)
        with torch.no_grad(), self.teacher.scoring(self.weights) as model:
            teacher_ND = _body(model, batch.teacher)
        return student_ND, teacher_ND

    def _rows(self, batch: Batch, student_ND: Tensor, teacher_ND: Tensor, chunk: Tensor) -> Rows:
        temperature = batch.temperature_N[chunk]
        with self.weights.using("student") as model:
            student_NV = _logprobs(model, student_ND[chunk], temperature)
        with torch.no_grad(), self.teacher.scoring(self.weights) as model:
            teacher_NV = _logprobs(model, teacher_ND[chunk], temperature)
        return Rows(student_NV, teacher_NV, batch.token_N[chunk], batch.behavior_N[chunk], batch.by_teacher_N[chunk])

    def _backward(self, batch: Batch, student_ND: Tensor, teacher_ND: Tensor, rows: Tensor, loss: Loss) -> Tensor:
        """Gradients of the summed loss of `rows`; returns their weighted losses."""
        if not len(rows):
            return rows.new_zeros(0, dtype=torch.float32)
        leaf_ND = student_ND.detach().requires_grad_()
        losses = []
        for chunk in torch.split(rows, CHUNK):
            loss_N = loss(self._rows(batch, leaf_ND, teacher_ND, chunk))
            weighted_sum(loss_N, batch.weight_N[chunk]).backward()  # type: ignore[no-untyped-call]
            losses.append((loss_N * batch.weight_N[chunk]).detach())
        student_ND.backward(leaf_ND.grad)  # type: ignore[no-untyped-call]
        self.weights.collect()
        self.tokens += len(rows)
        return torch.cat(losses)

    def _measure(self, batch: Batch, student_ND: Tensor, teacher_ND: Tensor) -> dict[int, Score]:
        """Scores by place in the list of samples."""
        columns = []
        for chunk in torch.split(torch.arange(len(batch.token_N), device=self.device), CHUNK):
            rows = self._rows(batch, student_ND, teacher_ND, chunk)
            columns.append(
                torch.stack(
                    [
                        reverse_kl(rows.student_NV, rows.teacher_NV),
                        rows.teacher_N - rows.student_N,
                        entropy(rows.student_NV),
                        entropy(rows.teacher_NV),
                        rows.student_N,
                    ]
                )
            )
        values_5N = torch.cat(columns, dim=1)
        scores = {}
        for b, i in enumerate(batch.samples):
            of_sample = batch.student.sample_N == b
            divergence, advantage, student_entropy, teacher_entropy, _ = values_5N[:, of_sample].mean(1).tolist()
            mismatch = _mismatch(batch.behavior_N[of_sample], values_5N[4, of_sample])
            tokens = int(of_sample.sum())
            scores[i] = Score(tokens, divergence, advantage, student_entropy, teacher_entropy, mismatch)
        return scores


def _weights(folder: Path, settings: LearnerSettings) -> Weights:
    if settings.tuning == "full":
        return FullWeights(folder, settings.dtype, settings.device)
    lora = LoraConfig(settings.lora.rank, settings.lora.alpha, settings.lora.targets)
    return LoraWeights(folder, lora, settings.dtype, settings.device, settings.seed)


def _body(model: Any, side: Side) -> Tensor:
    output = model.base_model(input_ids=side.ids_BL, attention_mask=side.mask_BL, use_cache=False)
    return output.last_hidden_state[side.sample_N, side.position_N]  # type: ignore[no-any-return]


def _logprobs(model: Any, hidden_ND: Tensor, temperature_N: Tensor) -> Tensor:
    logits_NV: Tensor = model.get_output_embeddings()(hidden_ND).float()
    return (logits_NV / temperature_N.unsqueeze(-1)).log_softmax(-1)


@torch.no_grad()
def _check_head(weights: Weights, device: str) -> None:
    """Some models scale or cap their logits after the head; what this backend computes would not be what they serve."""
    ids = torch.tensor([[1, 2, 3, 4]], device=device)
    with weights.using("base") as anything:
        model: Any = anything
        whole = model(input_ids=ids, use_cache=False).logits
        parts = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ModelError(
            "this model changes its logits after the output embeddings; the torch backend does not train it"
        )


def _mismatch(behavior_N: Tensor, student_N: Tensor) -> Mismatch | None:
    known = ~behavior_N.isnan()
    if not known.any():
        return None
    behavior, student = behavior_N[known], student_N[known]
    log_ratio = student - behavior
    return Mismatch(
        tokens=int(known.sum()),
        k1=-log_ratio.mean().item(),
        k3=(log_ratio.exp() - 1 - log_ratio).mean().item(),
        max_dp=(student.exp() - behavior.exp()).abs().max().item(),
    )
