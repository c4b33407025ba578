"""tests/gpu.sh without a GPU: every part runs, what hangs, raises or dies stops no other, and results become docs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PARTS = ["machine", "correctness", "training", "products", "speed", "profile", "3b", "sampling"]


def gpu(*flags: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", "tests/gpu.sh", "--here", *flags]
    env = ENV | {"PATH": PATH} | more
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line.endswith("}")]


def ended(out: Path) -> dict[str, str]:
    return {line["part"]: line["value"] for line in lines(out) if line["name"] == "state" and line["part"] in PARTS}


def test_every_part_reports(tmp_path):
    done = gpu("--dry", "--seconds", "500", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-3000:]
    assert ended(tmp_path) == dict.fromkeys(PARTS, "done")
    found = lines(tmp_path)
    assert {line["part"] for line in found if line["ok"] is not None} >= {"correctness", "training", "speed", "3b"}
    assert all(line["ok"] for line in found if line["bound"] is not None)
    text = (tmp_path / "summary.md").read_text()
    assert all(f"### {part}\n" in text for part in PARTS) and "**off**" not in text


def test_a_part_that_hangs_or_raises_or_dies_stops_no_other(tmp_path):
    broken = {"BREAK_PARTS": "raise:machine,hang:products,die:profile"}
    flags = ["--dry", "--seconds", "90", "--only", "machine,products,profile,sampling", str(tmp_path)]
    done = gpu(*flags, **broken)
    assert done.returncode == 1
    want = {"machine": "failed", "products": "hung", "profile": "failed", "sampling": "done"}
    assert ended(tmp_path) == want
    text = (tmp_path / "summary.md").read_text()
    assert "- machine: failed, 0 s, RuntimeError: broken as asked" in text
    assert "- products: hung, it did not end by itself" in text
    assert "- profile: failed, its process ended with status -6" in text
    assert "| VAE, float32 |" in text
    # A part that is repeated counts by its last run; a CUDA context that broke ends its process, and no other part.
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"part": "machine", "na')  # as a full disk leaves it
    done = gpu("--dry", "--only", "machine,products,profile", str(tmp_path), BREAK_PARTS="broken:products")
    assert done.returncode == 1
    assert ended(tmp_path) == {"machine": "done", "products": "failed", "profile": "done", "sampling": "done"}
    text = (tmp_path / "summary.md").read_text()
    assert "broken as asked" not in text and "- products: failed, Broken: as asked" in text
    assert "| VAE, float32 |" in text


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_the_status_says_so(tmp_path):
    done = gpu(str(tmp_path / "out"))
    assert done.returncode == 3 and "there is no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()
    for flags in (["--frobnicate"], ["--only", "speeed", "x"]):
        assert gpu(*flags).returncode == 2
    assert "--seconds" in gpu("--help").stdout
    for flags, line in (
        (["--only", "speeed"], "--only speeed: choose of machine, "),
        (["--seconds", "0"], "--seconds 0"),
        ([str(ROOT / "README.md")], "README.md cannot be written: File exists"),
    ):
        done = gpu("--dry", *flags)
        assert done.returncode == 2 and line in done.stderr


def test_a_context_that_is_broken_ends_its_process(tmp_path, monkeypatch):
    """As after a sticky CUDA error: every call fails from there on, those that clear up too."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    from parts.context import Broken, Context

    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("synchronize", "empty_cache", "memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", fails)
    context = Context("speed", tmp_path, 0.0, dry=False)
    with pytest.raises(Broken, match="a case: RuntimeError: CUDA error"), context.attempt("a case"):
        fails()
    assert [(line["name"], line["ok"]) for line in lines(tmp_path)] == [("a case", False)]


def test_no_number_is_worse_than_any(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    from parts.context import worst

    assert worst({"a": 0.1, "b": 0.3, "c": 0.2}) == ("b", 0.3)
    assert worst({"a": 0.1, "b": math.nan, "c": 0.2})[0] == "b"


def test_a_gpu_that_torch_does_not_see_is_a_failure(tmp_path):
    """As where torch is of another CUDA than the driver, or cannot be imported."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    smi.chmod(0o755)
    done = gpu(
        str(tmp_path / "out"),
        PATH=f"{tmp_path}:{PATH}",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1 and "torch does not see it" in done.stderr


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
        return subprocess.run(command, cwd=copy, capture_output=True, text=True)

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
