"""A rank's own log."""

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
