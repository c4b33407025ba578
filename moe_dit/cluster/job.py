"""What jobs/slurm/job.sh asks: how a run's launcher is started, and what follows from its end.

    python -m moe_dit.cluster.job begin --nodes 4 --wanted 4 --ranks-per-node 8 --attempt 1 -- --ds FILE ...
    python -m moe_dit.cluster.job end --run RUN --status 1 --attempt 1

Prints for the script, on standard output; for people, on standard error.
"""

import argparse
import os
from pathlib import Path

from moe_dit.cluster.outcome import decide, note_begin
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError, Stop
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python -m moe_dit.cluster.job begin --nodes 4 --wanted 4 --ranks-per-node 8 --attempt 1 -- --ds FILE.json
  python -m moe_dit.cluster.job end --run runs/dsmoe_s_e16 --status 1 --attempt 1"""


def main() -> None:
    parser = Parser("What a job script asks about a training run.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    begin = commands.add_parser(
        "begin", help="print the least and the most nodes for the launcher, and the run's folder"
    )
    begin.add_argument("--nodes", type=int, required=True, help="that are alive")
    begin.add_argument("--wanted", type=int, required=True, help="that the run is to use")
    begin.add_argument("--ranks-per-node", type=int, required=True)
    begin.add_argument("--attempt", type=int, required=True, help="1 the first time")
    begin.add_argument("training", nargs=argparse.REMAINDER, help="-- and the training command's arguments")
    end = commands.add_parser("end", help="print what to do: done, again, requeue or give up")
    end.add_argument("--run", type=Path, required=True, help="the run's folder")
    end.add_argument("--began", type=float, default=0.0, help="not used")
    end.add_argument("--status", type=int, required=True, help="of the launcher")
    end.add_argument("--attempt", type=int, required=True, help="1 the first time")
    end.add_argument("--leaving", action="store_true", help="the job was told to make room")
    args = parser.parse_args()
    if args.command == "begin":
        begin_training(args)
        return
    what, why = decide(args.run, args.began, args.status, args.leaving, args.attempt, note=True)
    say(f"{what}: {why}")
    print(what)


def begin_training(args: argparse.Namespace) -> None:
    """Print how a run's launcher is started, and note the start in the run's events; refused beside another run."""
    # They bring in the networks' libraries, which the end of a run need not wait for.
    from moe_dit.cluster.sizes import check_nodes, node_range
    from moe_dit.run_folder import check_run_folder
    from moe_dit.training_command import parse_training

    asked = parse_training(args.training[1:] if args.training[:1] == ["--"] else args.training)
    recipe = asked.recipe()
    folder = asked.run(recipe)
    check_nodes(recipe, asked.ds, args.wanted, args.ranks_per_node)
    span = node_range(recipe, asked.ds, min(args.nodes, args.wanted), args.ranks_per_node)
    if span is None:
        raise (InputError if args.attempt == 1 else Stop)(  # with the nodes that were lost it did
            f"{args.nodes} x {args.ranks_per_node} ranks are left, and {asked.ds} and the batch do not divide by them"
        )
    check_run_folder(folder)
    queued = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    note_begin(folder, args.attempt, queued, f"SLURM job {os.environ.get('SLURM_JOB_ID', '')}".strip())
    print(*span, folder, sep="\n")


if __name__ == "__main__":
    run(main)
