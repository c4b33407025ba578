"""What jobs/slurm/evaluate.sbatch asks: which checkpoint of a run is meant. A run's files may be a stranger's.

    python -m moe_dit.cluster.newest RUN

Prints its name for the script, on standard output; for people, on standard error.
"""

from pathlib import Path

from moe_dit.cluster.submit import check_run
from moe_dit.runtime.command import Parser, run

EXAMPLES = "  python -m moe_dit.cluster.newest runs/dsmoe_s_e16"


def main() -> None:
    parser = Parser("Print the name of the newest checkpoint of a run that can be read.", EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    print(check_run(parser.parse_args().run).name)


if __name__ == "__main__":
    run(main)
