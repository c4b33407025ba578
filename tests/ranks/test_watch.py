"""The view of a run that trains is what its files say."""

import json
import re
import time
from pathlib import Path

from helpers import finish, kill, start_training, wait_for, wait_for_step
from helpers.watching import flat, shown, watch


def last_record(run) -> dict:
    """The last line that is whole."""
    return json.loads((run / "metrics.jsonl").read_text().split("\n")[-2])


def test_a_run_is_watched_while_it_trains_killed_and_done(latents, tmp_path):
    run = tmp_path / "live"
    small = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "global_batch_size=8", "checkpoint.every=10"]
    small = [flag for change in small for flag in ("--set", change)]
    process = start_training(1, "zero1_ep1", latents, run, *small, "--steps", "100000")
    try:
        wait_for_step(run, 3, process)
        before = last_record(run)["step"]
        text = flat(watch(run))
        after = last_record(run)["step"]
        step = int(re.search(r"live training step ([\d,]+) / 100,000", text)[1].replace(",", ""))
        assert before <= step <= after and "left at the recent speed" in text
        wait_for_step(run, 12, process)
        wait_for((run / "checkpoints/latest").exists, "a checkpoint", Path(f"{run}.log"))
    finally:
        kill(process)
    last = last_record(run)
    text = flat(watch(run))
    assert f"step {last['step']:,} / 100,000" in text and f"loss {last['loss']:.4g} " in text
    assert "training, no news for 12 min " in shown(run, now=time.time() + 720)
    finish(start_training(1, "zero1_ep1", latents, run, *small, "--steps", str(last["step"] + 2)), run)
    text = flat(watch(run))
    last = last_record(run)
    assert f"live done step {last['step']:,} / {last['step']:,}" in text and f"loss {last['loss']:.4g} " in text
    assert "for the 2nd time" in text and re.search("started step [1-9][0-9,]*0: digits on 1 rank", text)
