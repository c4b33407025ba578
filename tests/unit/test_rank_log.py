"""A rank's own log."""

import faulthandler
import os
import re
from pathlib import Path

import pytest
import torch

from moe_dit.runtime import rank_log
from moe_dit.runtime.rank_log import RankLog

CPU = torch.device("cpu")


def test_a_rank_s_log_keeps_errors_and_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "logs/rank_00003.log"
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, CPU) as log:
        log.write("first")
        raise ZeroDivisionError("by nothing")
    with RankLog(tmp_path, CPU):
        pass
    text = path.read_text()
    assert re.search(r"\n\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ first\n.*Z end: Traceback .*\n", text)
    assert "ZeroDivisionError: by nothing\n" in text and text.endswith("Z end\n")
    assert not Path(f"{path}.old").exists()
    monkeypatch.setattr(rank_log, "MOST_BYTES", len(text) - 1)
    with RankLog(tmp_path, CPU):
        pass
    assert Path(f"{path}.old").read_text() == text and len(path.read_text()) < len(text)


def test_stacks_do_not_hold_other_threads_up(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    written = []
    dump = faulthandler.dump_traceback

    def dump_to(file, all_threads):
        # All threads stand still for this, so it must be no file of a disk that may not answer.
        written.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        dump(file, all_threads=all_threads)

    with RankLog(tmp_path, CPU) as log:
        monkeypatch.setattr(faulthandler, "dump_traceback", dump_to)
        log.stacks("it stands")
    assert [name.split(":")[0] for name in written] == ["/memfd"]
    text = (tmp_path / "logs/rank_00000.log").read_text()
    # Other tests' threads stand there too, one of them perhaps before it has begun.
    assert re.search(r"Z it stands\n(Current t|T)hread 0x\w+ .*\n  (File |<)", text) and "test_rank_log.py" in text
