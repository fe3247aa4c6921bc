"""Continuous batching: requests join and leave the batch at any step.

Rows 0:decoding hold answers that get a token in every step; the rows behind them are still reading their prompts, in
chunks between the steps, so that a long prompt does not stall the others. Whoever leaves is replaced by the last row.
Scoring a prompt is reading it with the logprobs kept. Everything here belongs to one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from agent_rl.models import ModelError
from agent_rl.types import BASE_RELEASE
from server.engines.contract import ABORTED, Busy, PauseMode, Refused, failed, length_reached
from server.engines.kv import PrefixCache, Space
from server.engines.runner import Part, Runner
from server.engines.sampling import Drawn, sample, score
from server.engines.work import Work

log = logging.getLogger("agent_rl.engine")

MAX_CHUNK = 512  # prompt tokens read in one forward
MAX_CHUNK_BETWEEN = 128  # the same while answers wait for their next token


@dataclass(frozen=True, slots=True)
class Adapter:
    checksum: str
    wanted: bool = True  # False: no new requests; it goes when its last answer is done


@dataclass(frozen=True, slots=True)
class Swap:
    """Full weights that wait for running answers to end."""

    folder: Path
    version: str
    done: Future[None]


class Scheduler:
    def __init__(self, runner: Runner, *, max_queue: int, prefix_cache_bytes: int) -> None:
        self.runner = runner
        self.max_queue = max_queue
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self.version = BASE_RELEASE
        self.adapters: dict[str, Adapter] = {}  # replaced, never changed: other threads read it
        self.works: dict[str, Work] = {}  # all of them by rid
        self.waiting: list[Work] = []
        self.rows: list[Work] = []
        self.decoding = 0
        self.arrivals = 0
        self.paused = False
        self.swap: Swap | None = None

    # ------------------------------------------------------------------------------------------------ requests

    def submit(self, work: Work) -> None:
        """Raises Refused or Busy."""
        request = work.request
        if request.rid in self.works:
            raise Refused(f"a request {request.rid} is being answered already")
        if work.adapter is not None and not self._serves(work.adapter):
            raise Refused(f"Got LoRA adapter that has never been loaded: {work.adapter}")
        queue = sum(other.internal == work.internal for other in self.waiting)  # users are not crowded out by our own
        if queue >= self.max_queue:
            raise Busy(f"{queue} requests wait already; engine.max_queue is {self.max_queue}")
        self.arrivals += 1
        work.order = self.arrivals
        work.ids = list(request.input_ids)
        work.random.seed(request.sampling_params.sampling_seed)
        self.works[request.rid] = work
        self.waiting.append(work)

    def abort(self, rid: str) -> None:
        if work := self.works.get(rid):
            self._finish(work, ABORTED)

    def give_up(self, work: Work) -> None:
        """Nobody waits for this answer any more; it may have ended, or never have been taken in."""
        if self.works.get(work.request.rid) is work:
            self._finish(work, ABORTED)

    def abort_all(self) -> None:
        for rid in list(self.works):
            self.abort(rid)

    # ------------------------------------------------------------------------------------------------- weights

    def load_adapter(self, name: str, folder: Path) -> None:
        """Raises Refused."""
        if self.swap:
            raise Refused(f"the base is about to become {self.swap.version}; load adapters of it afterwards")
        try:
            if known := self.adapters.get(name):
                checksum = self.runner.checksum(folder)
                if checksum != known.checksum:
                    raise Refused(f"adapter {name} is loaded already, with other weights than {folder} holds")
            else:
                checksum = self.runner.add_adapter(name, folder)
        except ModelError as error:
            raise Refused(str(error)) from error
        self.adapters = {**self.adapters, name: Adapter(checksum)}

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for it. Raises Refused."""
        if not self._serves(name):
            raise Refused(f"LoRA adapter {name} is not loaded")
        self.adapters = {**self.adapters, name: Adapter(self.adapters[name].checksum, wanted=False)}
        self._drop_unwanted(name)

    def _serves(self, name: str) -> bool:
        return name in self.adapters and self.adapters[name].wanted

    def _drop_unwanted(self, name: str | None) -> None:
        if name is None or self._serves(name) or any(work.adapter == name for work in self.works.values()):
            return
        self.adapters = {n: adapter for n, adapter in self.adapters.items() if n != name}
        self.runner.lora.remove(name)
        self.prefixes.forget(name)

    def plan_swap(self, swap: Swap, abort: bool) -> None:
        """Full weights from disk, once no answer runs, or at once where sampling is paused. Raises Refused."""
        if self.adapters:
            raise Refused(f"adapters {sorted(self.adapters)} belong to the weights that serve; unload them first")
        if self.swap:
            raise Refused(f"weights {self.swap.version} are being loaded already")
        if abort:
            self.abort_all()
        self.swap = swap

    def _swap_if_due(self) -> None:
        if self.swap is None or (self.rows and not self.paused):
            return
        swap, self.swap = self.swap, None
        if not swap.done.set_running_or_notify_cancel():  # whoever asked has gone
            return
        try:
            self.runner.replace(swap.folder)
        except Exception as error:  # whatever a folder can have wrong; the old weights still serve
            swap.done.set_exception(Refused(str(error)))
            return
        self.version = swap.version
        self.prefixes.forget()
        for work in self.rows:
            work.kv_mixed = True
        swap.done.set_result(None)

    def pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode == "abort":
            self.abort_all()
        if mode == "retract":
            for work in list(self.rows):
                self._retract(work)

    def resume(self) -> None:
        self.paused = False

    # ------------------------------------------------------------------------------------------------ stepping

    @property
    def idle(self) -> bool:
        """True where a step would do nothing until somebody asks for something."""
        can_swap = self.swap is not None and (self.paused or not self.rows)
        return not can_swap and (self.paused or not (self.rows or self.waiting))

    def step(self) -> None:
        """A chunk of prompts and one token for everybody."""
        self._swap_if_due()
        if self.paused:
            return
        self._admit()
        if self.decoding < len(self.rows):
            self._guarded(self._next_readers(), self._read)
        if self.decoding:
            self._guarded(self.rows[: self.decoding], self._decode)

    def _guarded(self, works: list[Work], act: Callable[[list[Work]], None]) -> None:
        """An error ends the requests of this forward and no others."""
        try:
            act(works)
        except Exception as error:
            log.exception("a forward over %d requests failed", len(works))
            for work in works:
                if work.row is not None:
                    self._finish(work, failed(f"the engine failed: {error}"))

    def _admit(self) -> None:
        """Fill the rows, users first; where users wait, internal requests give up what they hold beyond half."""
        if self.swap:
            return
        total = self.runner.slab.rows
        users = sum(not work.internal for work in self.waiting)
        internal = [work for work in self.rows if work.internal]
        spare = min(users - (total - len(self.rows)), len(internal) - total // 2)
        for work in sorted(internal, key=lambda work: work.order)[len(internal) - max(spare, 0) :]:
            self._retract(work)
        self.waiting.sort(key=lambda work: work.urgency)
        while self.waiting and len(self.rows) < total:
            self._seat(self.waiting.pop(0))

    def _seat(self, work: Work) -> None:
        """Give it a row, with the KV of whatever beginning is known."""
        work.row = len(self.rows)
        work.read = 0
        work.kv_mixed = False
        work.prompt_logprobs = []
        self.rows.append(work)
        needed = work.request.logprob_start_len if work.request.logprob_start_len >= 0 else len(work.ids) - 1
        known = self.prefixes.longest(self._space(work), work.ids[:needed])
        if known is not None:
            self.runner.slab.write(work.row, known)
            work.read = known.shape[3]
        if not work.retractions:
            work.cached = work.read

    def _next_readers(self) -> list[Work]:
        """The most urgent reader, brought to the front of its kind, and those behind it that fit beside it."""
        first = min(self.rows[self.decoding :], key=lambda work: work.urgency)
        self._exchange(first, self.decoding)
        budget = MAX_CHUNK_BETWEEN if self.decoding else MAX_CHUNK
        width, chosen = min(len(first.ids) - first.read, budget), [first]
        for work in self.rows[self.decoding + 1 :]:
            wider = max(width, len(work.ids) - work.read)
            if wider * (len(chosen) + 1) > budget:
                break
            width = wider
            chosen.append(work)
        return chosen

    def _read(self, works: list[Work]) -> None:
        budget = MAX_CHUNK_BETWEEN if self.decoding else MAX_CHUNK
        parts = []
        for work in works:
            ids = work.ids[work.read : work.read + budget]
            parts.append(Part(ids, work.read, work.adapter, work.wanted_logits(len(ids))))
        logits = self.runner.forward(self.decoding, parts)
        offset, last = 0, {}
        for work, part in zip(works, parts, strict=True):
            mine = slice(offset, offset + len(part.picks))
            offset += len(part.picks)
            work.read += len(part.ids)
            if work.request.scores and part.picks:
                targets = [work.ids[part.start + pick + 1] for pick in part.picks]
                work.prompt_logprobs += score(logits[mine], targets)
            if work.read == len(work.ids):
                last[work] = mine.stop - 1
        done = [work for work in last if not work.request.scores]
        for work in last:
            if work.request.scores:
                if not all(map(isfinite, work.prompt_logprobs)):
                    self._forget_kv(work)
                self._finish(work, length_reached(0), keep=False)
            else:
                self._exchange(work, self.decoding)
                self.decoding += 1
        if done:
            self._draw(done, logits[[last[work] for work in done]])

    def _decode(self, works: list[Work]) -> None:
        parts = [Part((work.ids[-1],), work.read, work.adapter, (0,)) for work in works]
        logits = self.runner.forward(0, parts)
        for work in works:
            work.read += 1
        self._draw(works, logits)

    def _draw(self, works: Sequence[Work], logits: Any) -> None:
        for work, drawn in zip(works, sample(logits, [work.draw() for work in works]), strict=True):
            if drawn is None and work.matcher and (error := work.matcher.error):
                self._finish(work, failed(error))
            elif drawn is None:
                self._forget_kv(work)
                self._finish(work, failed("the model's logits are not finite"), keep=False)
            else:
                finish = work.append(drawn.token)
                if finish:
                    self._finish(work, finish, drawn)
                else:
                    work.emit(work.piece(self.version, None, drawn))

    def _forget_kv(self, work: Work) -> None:
        """Of a row that is not finite, and everything that may have come of it."""
        assert work.row is not None
        self.runner.slab.clear(work.row)
        self.prefixes.forget(self._release(work))

    # ---------------------------------------------------------------------------------------------------- rows

    def _finish(self, work: Work, finish: dict[str, Any], drawn: Drawn | None = None, *, keep: bool = True) -> None:
        work.emit(work.piece(self.version, finish, drawn))
        if work.row is None:
            self.waiting.remove(work)
        else:
            self._leave(work, keep=keep and not work.internal)
        del self.works[work.request.rid]
        self._drop_unwanted(work.adapter)

    def _retract(self, work: Work) -> None:
        """Back into the queue with what it has; its KV is made anew later."""
        self._leave(work, keep=True)
        work.retractions += 1
        self.waiting.append(work)

    def _leave(self, work: Work, *, keep: bool) -> None:
        """Free a row: the last of its kind takes it, and the last reader the hole behind that."""
        assert work.row is not None
        if keep and work.read and not work.kv_mixed:
            kv = self.runner.slab.read(work.row, work.read)
            self.prefixes.add(self._space(work), work.ids[: work.read], kv)
        hole = work.row
        if hole < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, hole)
            hole = self.decoding
        self._move(len(self.rows) - 1, hole)
        self.rows.pop()
        work.row = None

    def _move(self, source: int, target: int) -> None:
        if source != target:
            moved = self.rows[source]
            self.runner.slab.copy(source, target, moved.read)
            self.rows[target], moved.row = moved, target

    def _exchange(self, work: Work, row: int) -> None:
        assert work.row is not None
        if work.row != row:
            other, mine = self.rows[row], self.runner.slab.read(work.row, work.read)
            self._move(row, work.row)
            self.runner.slab.write(row, mine)
            assert other.row is not None
            self.rows[row], work.row = work, row

    def _release(self, work: Work) -> str:
        return work.adapter or self.version

    def _space(self, work: Work) -> Space:
        return self._release(work), work.request.extra_key
