"""tests/gpu.sh without a GPU: every part runs, and what hangs, raises or dies stops no other."""

import json
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
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1600)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line.endswith("}")]


def ended(out: Path) -> dict[str, str]:
    return {line["part"]: line["value"] for line in lines(out) if line["name"] == "state" and line["part"] in PARTS}


@pytest.mark.long
def test_every_part_reports(tmp_path):
    done = gpu("--dry", "--seconds", "1500", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-3000:]
    assert ended(tmp_path) == dict.fromkeys(PARTS, "done")
    found = lines(tmp_path)
    assert {line["part"] for line in found if line["ok"] is not None} >= {"correctness", "training", "speed", "3b"}
    assert all(line["ok"] for line in found if line["bound"] is not None)
    text = (tmp_path / "summary.md").read_text()
    assert all(f"### {part}\n" in text for part in PARTS) and "**off**" not in text


@pytest.mark.long
def test_a_part_that_hangs_or_raises_or_dies_stops_no_other(tmp_path):
    broken = {"BREAK_PARTS": "raise:machine,hang:products,die:profile"}
    flags = ["--dry", "--seconds", "180", "--only", "machine,products,profile,sampling", str(tmp_path)]
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
    done = gpu("--dry", "--only", "products", str(tmp_path), BREAK_PARTS="broken:products")
    assert done.returncode == 1
    assert ended(tmp_path) == {"machine": "done", "products": "failed", "profile": "failed", "sampling": "done"}
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


@pytest.mark.long
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
