"""A run of eight steps that an earlier version of the project made, recorded after the third (tests/golden)."""

from helpers import ROOT

OLD = ROOT / "tests/golden/run_format_1"
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
