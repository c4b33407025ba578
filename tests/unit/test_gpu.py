"""Parts of tests/gpu.sh that need neither a GPU nor a process."""

import ast
import json
import math
import sys
from importlib.metadata import packages_distributions

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


def test_it_needs_no_package_of_the_suite():
    """Where it runs there is what the project itself requires, and neither pytest nor what else tests are made with."""
    files = [*(ROOT / "tests" / "gpu").rglob("*.py"), ROOT / "tests" / "kernels.py"]
    required = {line.split("[")[0].split("=")[0].split(">")[0] for line in (ROOT / "requirements.txt").open()}
    there = {name for name, sources in packages_distributions().items() if required.intersection(sources)}
    there |= sys.stdlib_module_names | {"moe_dit", "eval", "data_prep", "jobs", "parts", *(file.stem for file in files)}
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        assert {name.split(".")[0] for name in named} <= there, file


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
