"""Parts of tests/gpu.sh that need neither a GPU nor a process."""

import json
import math

import pytest

from helpers import ROOT, call


@pytest.fixture
def gpu(monkeypatch):
    """Modules of tests/gpu can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))


def test_a_context_that_is_broken_ends_its_process(tmp_path, monkeypatch, gpu):
    """As after a sticky CUDA error: every call fails from there on, those that clear up too."""
    from parts.context import Broken, Context

    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("synchronize", "empty_cache", "memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", fails)
    context = Context("speed", tmp_path, 0.0, dry=False)
    with pytest.raises(Broken, match="a case: RuntimeError: CUDA error"), context.attempt("a case"):
        fails()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["name"], line["ok"]) for line in lines] == [("a case", False)]


def test_no_number_is_worse_than_any(gpu):
    from parts.context import worst

    assert worst({"a": 0.1, "b": 0.3, "c": 0.2}) == ("b", 0.3)
    assert worst({"a": 0.1, "b": math.nan, "c": 0.2})[0] == "b"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--only", "speeed"], "--only speeed: choose of machine, "),
        (["--seconds", "0"], "--seconds 0"),
        ([ROOT / "README.md"], "README.md cannot be written: File exists"),
    ],
)
def test_wrong_flags_are_named(gpu, capsys, flags, line):
    assert call("tests/gpu/run.py", "--dry", *flags) == 2
    assert line in capsys.readouterr().err
