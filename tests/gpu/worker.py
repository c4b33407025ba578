"""Runs parts of tests/gpu.sh one after another in one process, as long as its CUDA context lives."""

import argparse
import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from results import AHEAD, Line, share, write

ROOT = Path(__file__).parents[2]
MODULES = {"3b": "largest"}  # where it is not called as the part
BREAK = "BREAK_PARTS"  # of the environment, for the script's test: "hang:PART,raise:PART,die:PART,broken:PART"
END = 5.0  # seconds that parts leave for what comes after them
BROKEN = 70  # this process's status where its CUDA context can no longer be used


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("parts")
    parser.add_argument("todo", help="these parts and all that follow, which share the time that is left")
    parser.add_argument("deadline", type=float)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    # Where run.py is killed, this process goes too: Linux's PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if args.dry:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    from parts.context import Broken, Context, first_line

    todo = args.todo.split(",")
    for part in args.parts.split(","):
        left = args.deadline - END - time.time()
        seconds = left if part == AHEAD else share(part, todo, left)
        context = Context(part, args.out, time.time() + seconds, args.dry)
        print(f"== {part}, {seconds:.0f} s", flush=True)
        write(args.out, Line(part, "state", "begun"))
        began = time.time()
        state, note = "done", ""
        try:
            break_as_asked(part)
            importlib.import_module("parts." + MODULES.get(part, part)).run(context)
            context.tell_memory()
        except Exception as error:
            traceback.print_exc()
            state, note = "failed", first_line(error)
            write(args.out, Line(part, "the part", "ends", bound="by itself", ok=False, note=note))
            if isinstance(error, Broken) or not context.alive():
                write(args.out, Line(part, "state", state, note=note))
                os._exit(BROKEN)
        spent = f"{time.time() - began:.0f} s"
        write(args.out, Line(part, "state", state, note=f"{spent}, {note}" if note else spent))
        sys.stdout.flush()
    os._exit(0)  # what is left, DeepSpeed's groups among it, would take seconds to put away


def break_as_asked(part: str) -> None:
    """Fail as :data:`BREAK` asks for."""
    from parts.context import Broken

    for asked in os.environ.get(BREAK, "").split(","):
        if asked == f"hang:{part}":
            while True:
                time.sleep(1)
        elif asked == f"raise:{part}":
            raise RuntimeError("broken as asked")
        elif asked == f"broken:{part}":
            raise Broken("as asked")
        elif asked == f"die:{part}":
            os.abort()


if __name__ == "__main__":
    main()
