"""Sinks that fail."""

import time

from moe_dit import sinks
from moe_dit.recipe_file import load_recipe


def test_a_sink_that_fails_is_told_of_once_and_opened_anew_after_a_minute(tmp_path, monkeypatch, capsys):
    now, broken, got = [1000.0], [True], []

    class Table:
        def __init__(self, run, first_step, recipe):
            got.append(("open", first_step))

        def numbers(self, values, step):
            if broken[0]:
                raise ConnectionError("the server is away")
            got.append((values["loss"], step))

        def close(self):
            got.append("closed")

    monkeypatch.setitem(sinks.SINKS, "table", Table)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = sinks.Sinks(load_recipe("digits", ["metrics.sinks=[table]"]), tmp_path, 4)
    for step in range(5, 8):
        kept.numbers({"loss": 1.0}, step)
    assert got == [("open", 4)]
    now[0] += 61
    kept.numbers({"loss": 2.0}, 8)
    assert got == [("open", 4), ("open", 7)]
    broken[0] = False
    now[0] += 61
    kept.numbers({"loss": 3.0}, 9)
    kept.close()
    assert got[2:] == [("open", 8), (3.0, 9), "closed"]
    told = "cannot write table: ConnectionError: the server is away; goes on without it\n"
    assert capsys.readouterr().err == told
