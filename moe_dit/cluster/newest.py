"""What jobs/slurm/evaluate.sbatch asks: which checkpoint of a run is meant. A run's files may be a stranger's.

    python -m moe_dit.cluster.newest RUN

Prints two lines for the script, on standard output: its name, and the SHA-256 of its state.json, which is another for
another checkpoint of that name (after going back, say). What is for people goes to standard error.
"""

import hashlib
from pathlib import Path

from moe_dit.checkpoint_files import STATE
from moe_dit.cluster.submit import check_run
from moe_dit.runtime.command import Parser, run

EXAMPLES = "  python -m moe_dit.cluster.newest runs/dsmoe_s_e16"


def main() -> None:
    parser = Parser("Print the name and a checksum of the newest checkpoint of a run that can be read.", EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    checkpoint = check_run(parser.parse_args().run)
    print(checkpoint.name, hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest(), sep="\n")


if __name__ == "__main__":
    run(main)
