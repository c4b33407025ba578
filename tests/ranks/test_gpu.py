"""What tests/gpu.sh found becomes docs."""

import json
import subprocess
import sys

from helpers import ROOT, forks


def test_results_become_docs(tmp_path):
    """The page, the table and README's box, in a copy of the files that they stand in."""
    copy = tmp_path / "tree"
    (copy / "tests" / "gpu").mkdir(parents=True)
    (copy / "docs").mkdir()
    for name in ("tests/gpu/publish.py", "tests/gpu/results.py", "docs/performance.md", "README.md"):
        (copy / name).write_text((ROOT / name).read_text())
    out = tmp_path / "out"
    out.mkdir()

    def write(*found: dict) -> None:
        empty = {"unit": "", "bound": None, "ok": None, "note": "", "time": 0.0}
        (out / "results.jsonl").write_text("".join(json.dumps(empty | line) + "\n" for line in found))

    def publish() -> subprocess.CompletedProcess:
        command = [sys.executable, "tests/gpu/publish.py", str(out)]
        return forks.run(command, cwd=copy, capture_output=True, text=True)

    facts = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-27", "torch": "2.11.0", "commit": "0123456789abcdef"}
    told = [{"part": "machine", "name": name, "value": value} for name, value in facts.items()]
    command = {"part": "machine", "name": "command", "value": "bash tests/gpu.sh --dry out"}
    write(*told)
    assert publish().returncode == 2
    write(*told, command)
    assert publish().returncode == 2
    told += [{"part": "run", "name": "code", "value": "0f"}]
    write(*told, command | {"value": "bash tests/gpu.sh out"}, told[-1] | {"value": "0e"})
    assert "several states of the code" in publish().stderr
    write(*told, command | {"value": "bash tests/gpu.sh out"}, told[-1] | {"note": "dry"})
    assert "a dry run" in publish().stderr
    rows = [
        command | {"value": "bash tests/gpu.sh out"},
        {"part": "machine", "name": "state", "value": "done"},
        {"part": "speed", "name": "S, 64 images: a step", "value": 14.04, "unit": "ms"},
        {"part": "speed", "name": "S, 64 images: speed", "value": 4558.4, "unit": "images/s"},
        {"part": "speed", "name": "S, 64 images: share of the sheet's 989 TFLOP/s", "value": 0.1934},
        {"part": "speed", "name": "a check", "value": 3.0, "bound": "<= 1", "ok": False},
        {"part": "speed", "name": "state", "value": "done"},
    ]
    for _ in range(2):  # again: what was there is replaced
        write(*told, *rows)
        done = publish()
        assert done.returncode == 0, done.stderr
    page = "2026-11-27-nvidia-h100-80gb-hbm3-01234567.md"
    assert "- OFF speed: a check: 3 (<= 1)" in (copy / "docs" / "gpu" / page).read_text()
    assert (copy / "docs" / "performance.md").read_text().count("| S, 64 images | 14.0 ms | 4,558 | 19.3% |  |  |") == 1
    readme = (copy / "README.md").read_text()
    made = readme.split("<!-- made by tests/gpu/publish.py -->\n")[1].split("> <!-- end -->")[0].splitlines()
    box = " ".join(line.removeprefix("> ") for line in made)
    assert box.count(f"parts machine, speed; 0 of 1 checks hold ([results](docs/gpu/{page}), ") == 1
    assert "Not done there: correctness, training, products, profile, 3b, sampling." in box
    assert all(line.startswith("> ") and (len(line) <= 120 or len(line.split()) < 4) for line in made)
