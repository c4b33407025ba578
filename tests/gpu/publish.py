"""Takes a run's results into the docs: python tests/gpu/publish.py OUT

docs/gpu/DATE-GPU-COMMIT.md gets the summary, and between their markers docs/performance.md the figures of speed and
README.md what has run on a GPU and what not. A dry run is not published.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

from results import SECONDS, Line, facts, failures, read, states, summary

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- made by tests/gpu/publish.py -->", "<!-- end -->"
# The figures of a case that performance.md shows.
SHOWN = ("a step", "speed", "share of the sheet's 989 TFLOP/s", "ours is faster", "memory at its peak")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="what tests/gpu.sh wrote")
    args = parser.parse_args()
    lines = read(args.out)
    known = facts(lines)
    missing = [key for key in ("gpu", "date", "torch", "commit", "command") if key not in known]
    if missing:
        print(
            f"error: {args.out / 'results.jsonl'} does not say its {missing[0]}; give a run's folder", file=sys.stderr
        )
        return 2
    runs = {(line.value, line.note) for line in lines if line.part == "run"}
    if "--dry" in known["command"] or any(note == "dry" for _, note in runs):
        print(f"error: {args.out} holds a dry run, which says nothing of a GPU", file=sys.stderr)
        return 2
    if len(runs) > 1:
        print(f"error: {args.out} holds results of several states of the code; give a folder of one", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", f"{known['date']} {known['gpu']} {known['commit'][:8]}".lower()).strip("-")
    page = ROOT / "docs" / "gpu" / f"{name}.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"# {known['gpu']}, {known['date']}\n\n{summary(lines)}")
    replace(ROOT / "docs" / "performance.md", performance(lines, page))
    replace(ROOT / "README.md", box(lines, page))
    print(f"{page}, docs/performance.md, README.md")
    return 0


def replace(file: Path, text: str) -> None:
    """Put text between the markers of a file."""
    before, rest = file.read_text().split(BEGIN)
    _, after = rest.split(END)
    file.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def performance(lines: list[Line], page: Path) -> str:
    """The table of docs/performance.md: a row a case."""
    known = facts(lines)
    cases: dict[str, dict[str, Line]] = {}
    for line in lines:
        case, _, figure = line.name.rpartition(": ")
        if line.part in ("speed", "3b") and figure in SHOWN and isinstance(line.value, float):
            cases.setdefault(case, {})[figure] = line
    text = f"{where(known)}; `{known['command']}`.\n"
    text += f"All results: [gpu/{page.name}](gpu/{page.name}).\n\n"
    text += "| | a step | images/s | of 989 TFLOP/s | beside the published form (TF32) | memory |\n"
    text += "|---|---|---|---|---|---|\n"
    for case, figures in cases.items():
        cells = [
            f"{figures[key].value * (100 if unit == '%' else 1):,.{digits}f}{unit}" if key in figures else ""
            for key, unit, digits in zip(SHOWN, (" ms", "", "%", " times", " GB"), (1, 0, 1, 2, 1), strict=True)
        ]
        text += f"| {case} | {' | '.join(cells)} |\n"
    return text


def where(known: dict[str, str]) -> str:
    """On what, when, and with which code."""
    return f"{known['gpu']}, {known['date']}, torch {known['torch']}, commit {known['commit'][:12]}"


def box(lines: list[Line], page: Path) -> str:
    """The paragraph of README.md."""
    known, ended = facts(lines), states(lines)
    checks = [line for line in lines if line.ok is not None]
    done = [part for part in SECONDS if part in ended and ended[part].value == "done"]
    others = [part for part in SECONDS if part not in done]
    text = f"Run on a GPU: {where(known)}: `tests/gpu.sh`, "
    text += f"parts {', '.join(done)}; {len(checks) - len(failures(lines))} of {len(checks)} checks hold"
    text += f" ([results](docs/gpu/{page.name})"
    text += ", [what became of the others](docs/gpu/README.md))." if failures(lines) else ")."
    skipped = [line.name for line in lines if line.value == "skipped" and line.name != "state"]
    text += f" Skipped there: {'; '.join(skipped)}." if skipped else ""
    text += f" Not done there: {', '.join(others)}." if others else ""
    quoted = {"initial_indent": "> ", "subsequent_indent": "> "}
    return textwrap.fill(text, 120, **quoted, break_long_words=False, break_on_hyphens=False) + "\n> "


if __name__ == "__main__":
    sys.exit(main())
