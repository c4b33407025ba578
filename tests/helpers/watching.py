"""A run as the view of runs shows it, and one that is written by hand."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from rich.cells import cell_len
from rich.console import Console

from helpers import call
from moe_dit.watch import picture, read_run

NOW = 1_800_000_000.0
CONFIG = "steps: 1000\nglobal_batch_size: 256\nlooks: {every: 100}\ndata: {path: SHARDS}\n"


def watch(*arguments, width: int = 80, status: int = 0) -> str:
    """The command's output, where it is no terminal."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=str(width)), redirect_stdout(out), redirect_stderr(err):
        assert call("jobs/watch.py", *arguments) == status
    told, complaint = out.getvalue(), err.getvalue()
    if status:
        assert told == "" and complaint.count("\n") == 1 and complaint.startswith("error: ")
        return complaint
    assert complaint == ""
    assert all(cell_len(line) <= width for line in told.splitlines())
    return told


def flat(text: str) -> str:
    """Words with one space between them."""
    return " ".join(text.split())


def shown(*folders, width: int = 80, colours: bool = False, now: float = NOW) -> str:
    """The picture in this process, at a moment of choice; checked to fit."""
    console = Console(width=width, file=open(os.devnull, "w"), force_terminal=colours, record=True, color_system=None)
    console.print(picture([read_run(folder, now) for folder in folders], width, colours))
    text = console.export_text()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def hand_made(tmp_path: Path) -> Path:
    """A run of 400 of 1,000 steps, written by hand: it has everything that a run may have."""
    folder = tmp_path / "hand_made"
    folder.mkdir()
    load = [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.5, 0.0]]
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 401):
            record = {"step": step, "loss": 2 - step / 400, "lr": 3e-4, "grad_norm": 0.75, "images_per_second": 128.0}
            record |= {"moe_imbalance": 2.125, "data_wait": 0.03}
            record |= {"held_out_loss": 1.5, "look_fid": 7.25, "held_out_loss_by_time": [1.0]} if step == 400 else {}
            record |= {"dead_experts": 1, "expert_load": load} if step % 50 == 0 else {}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 401, "lo')
    os.utime(folder / "metrics.jsonl", (NOW - 5, NOW - 5))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "errors.jsonl").write_text('{"image": 1}\n' * 3)
    (folder / "config.yaml").write_text(CONFIG.replace("SHARDS", str(shards)))
    (folder / "status.json").write_text(json.dumps({"state": "training", "time": NOW - 7200}))
    happened = [
        (NOW - 90_000, "started", 0, "on 3 ranks"),
        (NOW - 7260, "stopped", 200, "as asked"),
        (NOW - 7200, "started", 200, "on 3 ranks"),
        (NOW - 42, "straggler", 399, "rank 2 (n2) is slow"),
    ]
    with open(folder / "events.jsonl", "w") as file:
        for at, what, step, message in happened:
            file.write(json.dumps({"time": at, "what": what, "step": step, "message": message}) + "\n")
    memory = [{"weights": 1_000_000, "master": 0, "state": 2_000_000 + rank * 500_000} for rank in range(3)]
    (folder / "memory.json").write_text(json.dumps(memory))
    ranks = {"step": 400, "time": NOW - 5, "hosts": ["n1", "n1", "n2"], "seconds": [2.0, 2.0, 2.5]}
    ranks |= {"data": [0.25, 0.5, 0.125], "compute": [0.5, 0.5, 1.25], "exchange": [0.375, 0.5, 0.25]}
    (folder / "ranks.json").write_text(json.dumps(ranks | {"memory_gb": [60.5, 61.0, 60.0]}))
    return folder
