"""The view of runs: what it shows is what their files say, it fits the terminal, and it touches nothing."""

import json
import os
import re
from xml.etree import ElementTree

import pytest

from helpers.watching import NOW, flat, hand_made, shown, watch


@pytest.fixture
def run(tmp_path):
    return hand_made(tmp_path)


def what_is_there(folder) -> dict:
    """Every name, with size and time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_what_is_shown_is_what_the_files_say(run):
    text = flat(shown(run))
    for piece in (
        "hand_made training step 400 / 1,000",
        "20 min 0 s left at the recent speed · started 2 h 0 min ago, for the 2nd time",  # 600 steps of 256 / 128 s
        "loss 1 learning rate 0.0003 gradient norm 0.75 images/s 128 waiting for data 3.0% imbalance 2.125",
        "look at step 400 held-out loss 1.5 fid 7.25",
        "a rank's memory weights 1.0 MB state 2.0 MB to 3.0 MB",
        "images skipped while encoding 3",
        "1 d 1 h ago started step 0: on 3 ranks 2 h 1 min ago stopped step 200: as asked",
        "42 s ago straggler step 399: rank 2 (n2) is slow",
        "3 ranks median most a step 2 s 2.5 s rank 2 (n2) waiting for data 0.25 s 0.5 s rank 1 (n1)",
        "computing, until the first collective 0.5 s 1.25 s rank 2 (n2)",
        "exchanging tokens 0.375 s 0.5 s rank 1 (n1) memory 60.5 GB 61 GB rank 1 (n1)",
        "experts' share of tokens, a line a layer 1 got none",
        # Twice, once, half and half an even share; even, even, twice, none.
        "0 ▅▅▅▄▄▄▃▃▃▃▃▃ 1 ▄▄▄▄▄▄▅▅▅ x ",
    ):
        assert piece in text, piece
    assert "no news" not in text and "master" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_width_is_kept(run, width):
    for colours in (False, True):
        assert "hand_made" in shown(run, width=width, colours=colours)
        assert shown(run, run, run, width=width, colours=colours)


def test_states_are_told_honestly(run):
    assert "training, no news for 12 min 5 s" in shown(run, now=NOW + 720)  # it was killed, perhaps
    assert "no news" not in shown(run, now=NOW + 14) and "no news for 1 min 1 s" in shown(run, now=NOW + 56)
    for state, words in (
        ("stopping", "stopping"),
        ("stopped", "stopped 2 h 0 min ago"),
        ("done", "done 2 h 0 min ago"),
    ):
        (run / "status.json").write_text(json.dumps({"state": state, "time": NOW - 7200}))
        text = shown(run)
        assert words in text and "left at" not in text
    (run / "status.json").write_text(
        json.dumps({"state": "failed", "time": NOW - 60, "message": "Stop: the loss is nan"})
    )
    assert "failed 1 min 0 s ago" in shown(run) and "Stop: the loss is nan" in shown(run)
    (run / "status.json").write_text(json.dumps({"state": "training", "time": NOW - 3, "start": "another"}))
    assert re.search("hand_made +starting ", shown(run))  # again, behind step 400
    (run / "metrics.jsonl").unlink()
    text = shown(run)
    assert re.search("hand_made +starting +step 0 / 1,000", text) and "no step yet" in text
    assert "starting, no news for 1 min 17 s" in shown(run, now=NOW + 74)


def test_clocks_that_differ_are_told_of(run):
    """What came last counts, whatever its time: here the clock was set back by a day behind the start."""
    day = 24 * 3600
    (run / "status.json").write_text(json.dumps({"state": "training", "time": NOW + day, "start": "a"}))
    started = {"time": NOW + day, "what": "started", "step": 200, "start": "a"}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    assert re.search("hand_made +training +step 400", shown(run))
    assert "started 1 d 0 h ahead" in shown(run) and "training, no news for 12 min 5 s" in shown(run, now=NOW + 720)
    os.utime(run / "metrics.jsonl", (NOW + day, NOW + day))
    assert "training, by a clock 1 d 0 h ahead of this one" in shown(run)


def test_slow_steps_are_waited_for(run):
    """Of steps of 20 s, ten of them."""
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("128.0", "12.8"))
    os.utime(file, (NOW, NOW))
    assert "no news" not in shown(run, now=NOW + 200) and "no news for 3 min 21 s" in shown(run, now=NOW + 201)


def test_several_runs_stand_in_one_table_and_one_chart(run, tmp_path):
    other = tmp_path / "another"
    other.mkdir()
    (other / "config.yaml").write_text("steps: 50\n")
    (other / "status.json").write_text(json.dumps({"state": "done", "time": NOW}))
    lines = "".join(f'{{"step": {step}, "loss": 1.25, "images_per_second": 64.0}}\n' for step in range(1, 51))
    (other / "metrics.jsonl").write_text(lines)
    text = shown(run, other)
    assert "a hand_made training 400 / 1,000 1 128 20 min 0 s b another done 50 / 50 1.25 64" in flat(text)
    assert re.search(r"b{4,6} {3}", text) and "aaaaaa" in text  # 50 of 400 steps
    assert "hand_made ───" in text and "another ───" in text


@pytest.mark.parametrize(
    "name", ["config.yaml", "status.json", "memory.json", "ranks.json", "events.jsonl", "metrics.jsonl"]
)
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "[1, 2]",
        "\x00" * 100,
        "[" * 3_000,
        '{"state": [], "time": "x", "steps": -1, "step": 1, "loss": NaN, "hosts": [1], "seconds": ["x"], "data": 3}',
        '{"state": "\\u001b[2J", "time": 1e999, "steps": 1e999, "step": 2, "loss": "x", "expert_load": [[], 1]}',
        '{"what": "\\u001b[2J", "time": 1, "step": 99999999999999999999}\n{"what": 1, "time": -1e80, "message": {}}',
        '{"step": 3, "loss": 9e9, "images_per_second": 0, "expert_load": [[-1, 9e9], [0]]}\n{"step": -3, "loss": -9e9}',
        '[{"weights": -5, "master": 1e99, "state": 100000000000000000000000000000000000}]',
    ],
)
def test_damaged_files_do_no_harm(run, name, content):
    # YAML's scanner takes seconds for thousands of brackets, and is beyond Python's depth with a few hundred.
    (run / name).write_text(content[:600] if name == "config.yaml" else content)
    text = shown(run)
    assert "hand_made" in text and "\x1b" not in text
    assert shown(run, run, colours=True)


def test_what_is_missing_is_left_out(run):
    for name in ("status.json", "config.yaml", "memory.json", "ranks.json", "events.jsonl"):
        (run / name).unlink()
        assert "hand_made" in shown(run)
    assert "state unknown" in shown(run) and re.search("step 400$", shown(run).split("\n")[0].rstrip())


@pytest.mark.parametrize("make", ["nothing", "file", "empty"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, make):
    if make == "file":
        (tmp_path / "run").write_text("x")
    elif make == "empty":
        (tmp_path / "run").mkdir()
    assert f"{tmp_path / 'run'} is no run of jobs/train.py" in watch(tmp_path / "run", status=2)
    assert "--every 0: it should be" in watch(tmp_path, "--every", "0", status=2)


def test_a_run_of_any_name_is_drawn_as_text(run, tmp_path):
    """A stranger's folder: no element of the picture, and nothing that XML cannot hold."""
    stranger = run.rename(tmp_path / "x\x1b<script>&\n")
    watch(stranger, "--svg", tmp_path / "now.svg")
    drawing = ElementTree.parse(tmp_path / "now.svg")
    assert "x?<script>&?" in "".join(drawing.getroot().itertext()).replace("\xa0", " ")
    assert not drawing.findall(".//{*}script")


def test_the_command_prints_once_and_touches_nothing(run, tmp_path):
    before = what_is_there(run)
    text = watch(run)
    assert "hand_made" in text and "\x1b" not in text
    assert "training, no news for" in watch(run, "--once", width=120) or "training" in text
    watch(run, run, "--svg", tmp_path / "now.svg")
    assert what_is_there(run) == before
    drawing = (tmp_path / "now.svg").read_text()
    assert "hand_made" in drawing and "http" not in drawing.replace("http://www.w3.org/2000/svg", "")
    watch(run, "--svg", tmp_path / "now.svg")  # its own file is replaced, another's is not
    (tmp_path / "other.svg").write_text("<svg>")
    assert "this command did not write it" in watch(run, "--svg", tmp_path / "other.svg", status=2)
