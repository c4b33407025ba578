"""A run of eight steps that an earlier version of the project made, recorded after the third (tests/golden)."""

import json
import shutil
from pathlib import Path

from helpers import ROOT

OLD = ROOT / "tests/golden/run_format_1"
SHARDS = OLD / "shards"  # 96 of the digits
# The flags that the old command was given; its config.yaml says the same.
FLAGS = [
    "model.depth=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.moe.expert_width=16",
    "global_batch_size=16",
]
FLAGS += ["checkpoint.every=3", "optimizer.warmup_steps=4", "balance.rate=0.01", "optimizer.clip_grad_norm=1.0"]
FLAGS += ["ema.second_decay=0.9"]


def taken_back(folder: Path) -> Path:
    """FOLDER/run: it at step 3, which `latest` names, with a checkpoint of step 9 left over from before."""
    run = shutil.copytree(OLD / "run", folder / "run")
    left = shutil.copytree(run / "checkpoints/step_00000003", run / "checkpoints/step_00000009")
    description = json.loads((left / "state.json").read_text())
    description |= {"step": 9, "recipe": description["recipe"] | {"name": "left"}}
    (left / "state.json").write_text(json.dumps(description))
    assert (run / "checkpoints/latest").read_text() == "step_00000003\n"
    return run
