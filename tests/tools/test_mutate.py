"""The list of mutations: every edit still applies and names a test, and what is said of an edit is true."""

import ast
import subprocess

import pytest

from helpers import ROOT
from tools.mutate import MUTATIONS, Copy, Mutation, chosen, judge


def test_names_are_told_apart():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert chosen(["flow-sign"])[0].file == "moe_dit/flow.py" and chosen(None) == MUTATIONS
    with pytest.raises(SystemExit, match="no mutation flow-sine"):
        chosen(["flow-sine"])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_edit_applies(mutation):
    """The text is there once, the edited file is Python (or Bash, as job scripts are), and the test exists."""
    content = (ROOT / mutation.file).read_text()
    assert content.count(mutation.text) == 1
    edited = content.replace(mutation.text, mutation.replacement)
    if mutation.file.endswith(".py"):
        assert ast.dump(ast.parse(edited)) != ast.dump(ast.parse(content))
    else:
        assert edited != content
        subprocess.run(["bash", "-n"], input=edited, text=True, check=True)
    file, _, test = mutation.test.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert test.partition("[")[0] in functions


def test_what_is_said_of_an_edit(tmp_path):
    copy = Copy(tmp_path / "project")
    for mutation in chosen(["warm-up-off-by-one", "average-of-the-other-weight"]):
        assert judge(copy, mutation) == (True, "killed")
    file, test = "moe_dit/schedule.py", "tests/unit/test_optimizer.py::test_the_rate_of_each_step"
    before = (copy.folder / file).read_text()
    harmless = Mutation("harmless", file, "The rate of one step.", "The rate of a step.", test)
    assert judge(copy, harmless) == (False, "SURVIVED")
    assert judge(copy, Mutation("gone", file, "no such text", "", test)) == (False, "text not found")
    assert judge(copy, Mutation("twice", file, "step", "", test)) == (False, "text not found")
    killed, verdict = judge(copy, Mutation("no test", file, "The rate of one step.", "", f"{test}_or_not"))
    assert not killed and verdict.startswith("no test ran")
    assert (copy.folder / file).read_text() == before == (ROOT / file).read_text()
