"""Saving by itself: what a save writes, by which thread, and what it says where it fails."""

import threading
import time
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
import torch.distributed.checkpoint as dcp

from moe_dit.checkpoint import Checkpointer, FlatSlice, _host_memory, _Writer
from moe_dit.engine import Piece
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import Stop
from moe_dit.runtime.files import wait_until_seen
from moe_dit.runtime.pace import Pace
from moe_dit.runtime.ranks import World


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_of(device: torch.device) -> SimpleNamespace:
    """As much of an engine as is saved: nothing, of a recipe."""
    topology = SimpleNamespace(world_size=1, ep_size=1, zero_stage=1)
    pieces, buffers = (lambda owned_only: iter([])), dict
    made = {"device": device, "recipe": load_recipe("digits"), "bf16": False, "parallelism": topology}
    return SimpleNamespace(**made, pieces=pieces, buffers=buffers)


def test_a_save_has_failed_until_it_is_done(one_rank, tmp_path, monkeypatch, capsys):
    """Even where it ends in the middle of its own handling of an error; that error is told too."""
    monkeypatch.setattr("moe_dit.checkpoint.cause_of", lambda error: 1 / 0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cpu")), 3)  # a checkpoint without tensors is not complete
    with pytest.raises(Stop, match=r"step_00000003 was not written to its end"):
        checkpointer.wait()
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert checkpointer.failed()
    with pytest.raises(Stop, match="was not written"):
        checkpointer.save(engine_of(torch.device("cpu")), 4)


def test_a_save_that_nobody_waits_for_tells_of_its_failure(one_rank, tmp_path, monkeypatch, capsys):
    """A run that ends for another reason closes what saves, and no more."""
    monkeypatch.setattr("moe_dit.checkpoint.cause_of", lambda error: 1 / 0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cpu")), 3)
    checkpointer.close()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_checkpoint_at_a_pace_has_the_same_bytes(one_rank, tmp_path):
    slept: list[float] = []
    for name, pace in (("free", None), ("paced", Pace(1e6, lambda: 0.0, slept.append))):
        (tmp_path / name).mkdir()
        state = {"weight/a": FlatSlice(torch.arange(5000.0), 0, 5000)}
        dcp.save(state, storage_writer=_Writer(tmp_path / name, pace))
    free, paced = (tmp_path / name / "__0_0.distcp" for name in ("free", "paced"))
    assert free.read_bytes() == paced.read_bytes() and free.stat().st_size > 20_000
    # by a clock that stands still, the last wait is for all that was written
    written = sum(path.stat().st_size for path in (tmp_path / "paced").iterdir())
    assert slept[-1] == pytest.approx(written / 1e6)


def test_ranks_share_a_bandwidth(one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_dit.checkpoint.world", lambda: World(1, 1, 4))
    monkeypatch.setattr("moe_dit.checkpoint._connect", lambda group: None)
    rates = []
    monkeypatch.setattr("moe_dit.checkpoint.Pace", rates.append)
    Checkpointer(tmp_path, 1, write_gb_per_second=2.0)
    assert rates == [0.5e9]
    Checkpointer(tmp_path, 1)
    assert rates == [0.5e9]


def test_the_checkpoint_thread_works_on_its_ranks_gpu(one_rank, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((threading.current_thread(), device)))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(engine_of(torch.device("cuda", 3)), 1)
    with pytest.raises(Stop):
        checkpointer.wait()
    ((thread, device),) = calls
    assert thread is not threading.main_thread() and device == torch.device("cuda", 3)


def test_all_saves_are_of_one_thread(one_rank, tmp_path):
    """glibc gives a new thread memory that does not go back (ten thousand steps show it)."""
    threads = []
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer._publish = lambda *arguments: threads.append(threading.current_thread())
    for step in (1, 2, 3):
        checkpointer.save(engine_of(torch.device("cpu")), step)
    checkpointer.wait()
    assert len(threads) == 3 and set(threads) == {threads[0]} and threads[0] is not threading.main_thread()


def test_saves_right_after_each_other_do_not_mix(one_rank, tmp_path, monkeypatch):
    """Each overwrites the host memory of the one before, and training the state, while that one would be written."""
    monkeypatch.setattr("moe_dit.checkpoint.BLOCK", 1000)
    lengths = {"a": 300, "b": 500, "c": 4000, "d": 600}  # two in a block, one that is larger, and one
    state = {name: {kind: torch.zeros(n // 2) for kind in "xy"} for name, n in lengths.items()}
    engine = engine_of(torch.device("cpu"))
    engine.pieces = lambda owned_only: iter(Piece(name, 5000, 3, tensors) for name, tensors in state.items())
    checkpointer, blocks, prepare = Checkpointer(tmp_path, keep=1), [], _Writer.prepare_local_plan
    checkpointer._publish = lambda description, temporary, final: temporary.rename(final)
    monkeypatch.setattr(_Writer, "prepare_local_plan", lambda self, plan: time.sleep(0.3) or prepare(self, plan))

    def value(step: int, name: str, kind: str) -> torch.Tensor:
        return torch.arange(len(state[name][kind])) + float(crc32(f"{step}{name}{kind}".encode()) % 1_000_000)

    for step in (1, 2, 3):
        for name, tensors in state.items():
            for kind, tensor in tensors.items():
                tensor.copy_(value(step, name, kind))
        checkpointer.save(engine, step)
        blocks.append([copy.untyped_storage().data_ptr() for copy in checkpointer._staging.copies])
    for tensors in state.values():
        torch._foreach_zero_(list(tensors.values()))
    checkpointer.wait()
    assert blocks[0] == blocks[1] == blocks[2] and len(set(blocks[0])) == 4
    for step in (1, 2, 3):
        for name, tensors in state.items():
            for kind, tensor in tensors.items():
                target = {f"{kind}/{name}": FlatSlice(torch.zeros(len(tensor)), 3, 5000)}
                dcp.load(target, checkpoint_id=tmp_path / "checkpoints" / f"step_{step:08d}")
                assert torch.equal(target[f"{kind}/{name}"].data_1d, value(step, name, kind)), (step, name, kind)


def test_what_writes_a_checkpoint_does_not_wait_for_a_gpu(one_rank, tmp_path, monkeypatch):
    """As torch's loader of tensors on GPUs would, for the stream in which training computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dcp.filesystem, "_OverlappingCpuLoader", lambda *arguments, **options: 1 / 0)
    dcp.save({"weight/a": FlatSlice(torch.arange(5.0), 0, 5)}, storage_writer=_Writer(tmp_path, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can pin memory")
def test_memory_that_cannot_be_pinned_is_plain_and_told_once(monkeypatch, capsys):
    monkeypatch.setattr("moe_dit.checkpoint.BLOCK", 10)
    memory = list(_host_memory([4, 6, 7, 20], pinned=True))
    assert [len(part) for part in memory] == [4, 6, 7, 20]
    assert len({part.untyped_storage().data_ptr() for part in memory}) == 3
    assert capsys.readouterr().err.count("no pinned host memory") == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_checkpoint_thread_does_not_touch_the_first_gpu(one_rank, tmp_path):
    seen = []
    engine = engine_of(torch.device("cuda", 1))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer._publish = lambda *arguments: seen.append(torch.cuda.current_device())
    checkpointer.save(engine, 1)
    checkpointer.wait()
    assert seen == [1]


def test_what_is_never_seen_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"x was written by another rank, but after 0 s it is not there for this one"):
        wait_until_seen(tmp_path / "x", seconds=0)
    (tmp_path / "x").write_bytes(b"123")
    wait_until_seen(tmp_path / "x", 3, seconds=0)
    with pytest.raises(OSError, match=r"x was written by another rank, but after 0 s it has 3 bytes of 4 for this one"):
        wait_until_seen(tmp_path / "x", 4, seconds=0)
