"""Sixty-four and 512 ranks on one machine, simulated one at a time; test_tree.py has real ones."""

import json
import sys

import pytest

from helpers import ENV, ROOT, forks

SIMULATED = """\
import json, sys
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe
from moe_dit.simulate import simulate
name, ds, ranks, rank, *changes = sys.argv[1:]
recipe = load_recipe(name, ["precision=bf16", *changes])
seen = simulate(recipe, load_parallelism(f"ds_configs/{ds}.json", recipe, int(ranks)), int(rank))
of = lambda counts: {f"{kind} {ranks}": n for (kind, ranks), n in counts.items()}
found = {"held": seen.held, "made": seen.made, "groups": seen.groups, "memory": seen.memory}
found |= {"calls": of(seen.step.calls), "sent": of(seen.step.sent), "begins": of(seen.beginning.calls)}
print(json.dumps(found | {"begins_sent": of(seen.beginning.sent)}))
"""


def simulated(*arguments) -> dict:
    """A process that is one rank: what it held, made and sent."""
    command = [sys.executable, "-c", SIMULATED, *map(str, arguments)]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Of the digits' network: weights that all ranks share, in 71 tensors; and one expert in each of three layers, three
# matrices of 128 x 128.
SHARED, EXPERT = 1_626_528, 3 * 3 * 128 * 128


@pytest.mark.parametrize("rank", [0, 63])
def test_a_step_sends_what_arithmetic_says(rank):
    """The digits' network on 64 ranks, EP 8, ZeRO 2: an image a rank, 16 tokens, 2 experts of 8, 3 layers."""
    seen = simulated("digits", "zero2_ep8", 64, rank)
    assert SHARED + EXPERT * 8 == 2_806_176
    assert seen["held"] == {"weights": 2 * (SHARED + EXPERT), "master": 175_392, "state": 3 * 175_392}
    # a sixty-fourth of the shared weights, padded to 128 elements; an eighth of the expert's, for 8 ranks hold each
    assert 4 * (-(-SHARED // 128) * 128 // 64 + EXPERT // 8) == 175_392
    # all ranks twice (DeepSpeed's copy); 8 groups that share experts and 8 that hold the same ones
    assert (seen["made"], seen["groups"]) == (18, [64, 64, 8, 8])
    # every weight from the first of those that hold it, in bf16
    assert seen["begins"] == {"broadcast 64": 71, "broadcast 8": 9}
    assert seen["begins_sent"] == {"broadcast 64": 2 * SHARED, "broadcast 8": 2 * EXPERT}
    calls, sent = seen["calls"], seen["sent"]
    # counts, tokens out and back, gradients out and back, in each layer
    assert calls["all-to-all 8"] == 3 * (1 + 4)
    # of 32 rows a layer those for other ranks: between none and all, and the counts, 4 or 8 bytes to each of 7 others
    rows = (sent["all-to-all 8"] - 3 * 7 * 4) / (2 * 128)
    assert 0 < rows <= 4 * 3 * 32
    # float32 gradients over a ring, twice; beside them the report and the norm
    reduced = 2 * 4 * (SHARED * 63 / 64 + EXPERT * 7 / 8)
    assert reduced == 13_841_100
    assert 0 <= sent["all-reduce 64"] + sent["all-reduce 8"] - reduced < 400
    # weights in bf16, with the padding
    assert sent["all-gather 64"] == 2 * 63 * (-(-SHARED // 128) * 128 // 64)
    assert sent["all-gather 8"] == 2 * 7 * EXPERT // 8
    assert set(calls) == {"all-to-all 8", "all-reduce 64", "all-reduce 8", "all-gather 64", "all-gather 8"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "rank", "depth", "weights", "master"),
    [
        (64, 0, 6, 624_726_176, 39_045_392),
        (512, 511, 30, 3_101_669_024, 24_231_792),  # 8 GB and a minute: the whole network
    ],
)
def test_the_3b_network_on_many_ranks(ranks, rank, depth, weights, master):
    """An image a rank."""
    changes = [f"model.depth={depth}", f"global_batch_size={ranks}"]
    seen = simulated("dsmoe_3b_e16", "zero2_ep8", ranks, rank, *changes)
    mixtures = depth // 2
    shared, expert = weights - mixtures * 16 * 3 * 1152 * 2880, mixtures * 2 * 3 * 1152 * 2880
    assert seen["held"] == {"weights": 2 * (shared + expert), "master": master, "state": 3 * master}
    assert master == pytest.approx(4 * (shared / ranks + expert / (ranks / 8)), rel=1e-4)
    assert (seen["made"], seen["groups"]) == (ranks // 8 + 8 + 2, [ranks, ranks, *sorted([8, ranks // 8])[::-1]])
    assert seen["calls"]["all-to-all 8"] == mixtures * 5
    assert seen["memory"] < 10e9


def test_the_command_shows_what_a_rank_sends():
    command = [sys.executable, "jobs/plan.py", "--recipe", "digits", "--ds", "ds_configs/zero1_ep8.json"]
    command += ["--gpus", "16", "--simulate", "--rank", "15"]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits, rank 15 of 16, ZeRO 1, EP 8" in " ".join(done.stdout.split())
    assert "groups: 12 made, a call each; this rank is in 4, of 16, 16, 8, 2 ranks" in done.stdout
