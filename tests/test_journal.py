"""The journal keeps what it acknowledged, whatever happens to the process or the disk."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nouns import make_feedback, make_turn

from agent_rl.experience import journal as journals
from agent_rl.experience.codec import decode, encode
from agent_rl.experience.journal import Journal, JournalDamaged, JournalFull, open_journal

MB = 2**20


async def write(folder: Path, *turn_ids: str, segment_bytes: int = MB) -> None:
    journal = Journal(folder, segment_bytes=segment_bytes)
    for turn_id in turn_ids:
        await journal.append(make_turn(turn_id))
    await journal.close()


async def read(folder: Path, after: int = 0) -> list[tuple[int, str | None]]:
    journal = Journal(folder, segment_bytes=MB)
    found = [(arrival.seq, arrival.body.turn_id) for arrival in journal.replay(after)]
    await journal.close()
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def test_records_come_back_as_they_were() -> None:
    turn, said = make_turn("t1", behavior_logprobs=(None, -0.5)), make_feedback(value=-1.0)
    assert decode(encode(turn)) == turn
    assert decode(encode(said)) == said
    with pytest.raises(ValueError, match="unknown kind 'x', expected one of"):
        decode(b"\x92\xa1x\x80")
    with pytest.raises(ValueError, match="this is no record"):
        decode(encode(turn)[:-1])


async def test_appended_records_are_replayed_in_order_after_reopening(tmp_path: Path) -> None:
    await write(tmp_path, "t1", "t2")
    identity = (tmp_path / "id").read_text()
    await write(tmp_path, "t3")
    assert await read(tmp_path) == [(1, "t1"), (2, "t2"), (3, "t3")]
    assert await read(tmp_path, after=2) == [(3, "t3")]
    assert (tmp_path / "id").read_text() == identity


async def test_what_arrives_during_one_sync_shares_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    real = os.fdatasync
    monkeypatch.setattr(journals.os, "fdatasync", lambda descriptor: (syncs.append(1), real(descriptor)))
    journal = Journal(tmp_path, segment_bytes=MB)
    arrivals = await asyncio.gather(*(journal.append(make_turn(f"t{n}")) for n in range(200)))
    assert sorted(arrival.seq for arrival in arrivals) == list(range(1, 201))
    assert len(syncs) < 100
    await journal.close()


async def test_segments_below_the_watermark_go_and_seqs_go_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1)  # one record each
    for n in range(1, 5):
        await journal.append(make_turn(f"t{n}"))
    assert [int(path.stem) for path in segments(tmp_path)] == [1, 2, 3, 4]
    journal.trim(0)
    assert len(segments(tmp_path)) == 4
    journal.trim(2)
    assert [int(path.stem) for path in segments(tmp_path)] == [3, 4]
    assert [arrival.seq for arrival in journal.replay(2)] == [3, 4]
    journal.trim(4)
    await journal.close()
    await write(tmp_path, "t5")
    assert await read(tmp_path) == [(4, "t4"), (5, "t5")]


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 50])
async def test_a_torn_tail_is_cut_on_opening(tmp_path: Path, cut: int) -> None:
    await write(tmp_path, "t1", "t2")
    (path,) = segments(tmp_path)
    whole = path.stat().st_size
    await write(tmp_path, "t3")
    os.truncate(path, whole + cut)
    assert await read(tmp_path) == [(1, "t1"), (2, "t2")]
    assert path.stat().st_size == whole
    await write(tmp_path, "t4")
    assert await read(tmp_path) == [(1, "t1"), (2, "t2"), (3, "t4")]


@pytest.mark.parametrize("garbage", [b"\0" * 64, b"\xff" * 64, os.urandom(64)])
async def test_garbage_after_the_last_record_is_cut(tmp_path: Path, garbage: bytes) -> None:
    await write(tmp_path, "t1")
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes() + garbage)
    assert await read(tmp_path) == [(1, "t1")]


async def test_a_damaged_record_before_the_end_is_no_torn_tail(tmp_path: Path) -> None:
    await write(tmp_path, "t1", "t2", segment_bytes=1)
    first = segments(tmp_path)[0]
    data = bytearray(first.read_bytes())
    data[20] ^= 1
    first.write_bytes(data)
    with pytest.raises(JournalDamaged, match="readable up to byte 0"):
        Journal(tmp_path, segment_bytes=MB)


async def test_one_process_has_a_journal_and_the_next_takes_the_next(tmp_path: Path) -> None:
    first = open_journal(tmp_path, segment_bytes=MB)
    with pytest.raises(BlockingIOError):
        Journal(tmp_path / "0", segment_bytes=MB)
    second = open_journal(tmp_path, segment_bytes=MB)
    assert (tmp_path / "1" / "id").read_text() == second.journal_id != first.journal_id
    await first.close()
    third = open_journal(tmp_path, segment_bytes=MB)
    assert third.journal_id == first.journal_id
    await second.close()
    await third.close()
    with pytest.raises(RuntimeError, match="is closed"):
        await third.append(make_turn())


FILLER = """
import asyncio, resource, sys
from pathlib import Path
from nouns import make_turn, user
from agent_rl.experience.journal import Journal, JournalFull

async def main(folder, limit):
    journal = Journal(Path(folder), segment_bytes=2**30)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    big = user("x" * 20_000)
    n = 0
    try:
        while True:
            await journal.append(make_turn(f"t{n + 1}", messages=(big,)))
            n += 1
    except JournalFull as full:
        print(n, full, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seqs = [arrival.seq for arrival in journal.replay(0)]
    assert seqs == list(range(1, n + 1)), seqs
    small = await journal.append(make_turn("small"))  # it goes on as soon as there is room
    assert small.seq == n + 1
    await journal.close()

asyncio.run(main(*sys.argv[1:]))
"""


def run_filler(folder: Path, limit: int) -> str:
    tests = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", FILLER, str(folder), str(limit or "")]
    return subprocess.run(command, env=tests, check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_file_that_may_not_grow_is_a_full_journal_that_stays_readable(tmp_path: Path) -> None:
    out = run_filler(tmp_path, 110_000)
    assert out.startswith("5 ")
    assert "takes no more: File too large" in out
    assert [seq for seq, _ in asyncio.run(read(tmp_path))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_full_disk_is_a_full_journal_that_stays_readable(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        out = run_filler(tmp_path, 0)
        assert "No space left on device" in out
        kept = int(out.split()[0])
        assert 1 <= kept < 7
        assert [seq for seq, _ in asyncio.run(read(tmp_path))] == list(range(1, kept + 2))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_full_journal_says_so_to_everybody_in_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, segment_bytes=MB)
    await journal.append(make_turn("t1"))

    def full(descriptor: int, data: bytes, offset: int) -> int:
        os.lseek(descriptor, offset, os.SEEK_SET)
        os.write(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "pwrite", full)
        outcomes = await asyncio.gather(*(journal.append(make_turn(f"x{n}")) for n in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [JournalFull] * 3
    assert (await journal.append(make_turn("t2"))).seq == 2
    await journal.close()
    assert await read(tmp_path) == [(1, "t1"), (2, "t2")]


WRITER = """
import asyncio, sys
from pathlib import Path
from nouns import make_turn
from agent_rl.experience.journal import Journal

async def main(folder):
    journal = Journal(Path(folder), segment_bytes=20_000)
    async def client(name):
        n = 0
        while True:
            arrival = await journal.append(make_turn(f"{name}-{n}", response_ids=tuple(range(n % 300))))
            print(arrival.seq, arrival.body.turn_id, flush=True)
            n += 1
    await asyncio.gather(*(client(name) for name in "abcdefgh"))

asyncio.run(main(sys.argv[1]))
"""


def test_kill_9_loses_no_acknowledged_record(tmp_path: Path) -> None:
    for after_lines in (1, 57, 300):
        tests = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        acknowledged: dict[int, str] = {}
        with subprocess.Popen(command, env=tests, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(after_lines):
                seq, turn_id = process.stdout.readline().split()
                acknowledged[int(seq)] = turn_id
            process.send_signal(signal.SIGKILL)
            for line in process.stdout.read().splitlines(keepends=True):
                if line.endswith("\n"):
                    acknowledged[int(line.split()[0])] = line.split()[1]
        found = dict(asyncio.run(read(tmp_path)))
        assert sorted(found) == list(range(1, len(found) + 1))
        assert {seq: found.get(seq) for seq in acknowledged} == acknowledged
        assert len(acknowledged) >= after_lines


async def test_turned_over_in_the_middle_records_keep_their_numbers_and_the_old_segment_can_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=2**20)
    work = (journal.append(make_turn("a")), journal.turn_over(), journal.append(make_turn("b")))
    first, _, second = await asyncio.gather(*work)
    await journal.turn_over()
    await journal.turn_over()  # nothing new: no further segment
    third = await journal.append(make_turn("c"))
    assert [first.seq, second.seq, third.seq] == [1, 2, 3]
    journal.trim(2)
    assert [arrival.seq for arrival in journal.replay(0)] == [3]
    assert len(list(tmp_path.glob("*.segment"))) == 1
    await journal.close()
    with pytest.raises(RuntimeError, match="closed"):
        await journal.turn_over()
