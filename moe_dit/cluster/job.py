"""What jobs/slurm/job.sh asks: how a run's launcher is started, and what follows from its end.

    python -m moe_dit.cluster.job begin --nodes 4 --ranks-per-node 8 -- --ds FILE --recipe NAME ...
    python -m moe_dit.cluster.job end --began 1764150000 --status 1 --attempt 1 -- --ds FILE ...

Prints for the script, on standard output; for people, on standard error.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from moe_dit.cluster.outcome import decide
from moe_dit.cluster.sizes import check_nodes, node_range
from moe_dit.events import What, record
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say
from moe_dit.training_command import parse_training

EXAMPLES = "  python -m moe_dit.cluster.job begin --nodes 4 --ranks-per-node 8 -- --ds ds_configs/zero2_ep8.json"
EVENT: dict[str, What] = {"again": "restarted", "requeue": "requeued", "give up": "gave up"}
# A job that waits for a node does not come to its first step; after so many whole numbers of nodes it is queued again.


def main() -> None:
    parser = Parser("What a job script asks about a training run.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    begin = commands.add_parser("begin", help="print the least and the most nodes to start the launcher with")
    begin.add_argument("--nodes", type=int, required=True, help="that are alive")
    begin.add_argument("--wanted", type=int, required=True, help="that the run is to use")
    begin.add_argument("--ranks-per-node", type=int, required=True)
    end = commands.add_parser("end", help="print what to do: done, again, requeue or give up")
    end.add_argument("--began", type=float, required=True, help="seconds since 1970")
    end.add_argument("--status", type=int, required=True, help="of the launcher")
    end.add_argument("--attempt", type=int, required=True, help="1 the first time")
    end.add_argument("--leaving", action="store_true", help="the job was told to make room")
    for command in (begin, end):
        command.add_argument("training", nargs=argparse.REMAINDER, help="-- and the training command's arguments")
    args = parser.parse_args()
    asked = parse_training(args.training[1:] if args.training[:1] == ["--"] else args.training)
    recipe = asked.recipe()
    folder = asked.run(recipe)
    if args.command == "begin":
        check_nodes(recipe, asked.ds, args.wanted, args.ranks_per_node)
        span = node_range(recipe, asked.ds, min(args.nodes, args.wanted), args.ranks_per_node)
        if span is None:
            raise InputError(f"{args.nodes} x {args.ranks_per_node} ranks are too few for {asked.ds}")
        if folder.is_dir() and _first_time():
            record(folder, "queued", _job())
        print(*span)
        return
    what, why = decide(folder, args.began, args.status, args.leaving, args.attempt)
    if what in EVENT and folder.is_dir():
        record(folder, EVENT[what], why)
    say(f"{what}: {why}")
    print(what)


def _first_time() -> bool:
    """Whether this job has not been queued again, nor its training command started before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and os.environ.get("ATTEMPT", "1") == "1"


def _job() -> str:
    return f"SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""


def latest_export(run: Path) -> str:
    """The name of a run's newest checkpoint."""
    with suppress(OSError):
        return (run / "checkpoints/latest").read_text().strip()
    raise InputError(f"{run} has no checkpoint to evaluate")


if __name__ == "__main__":
    run(main)
