"""The view of runs: what it shows is what their files say, it fits the terminal, and it touches nothing."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from helpers import ENV, ROOT, finish, kill, start_training, wait_for_step
from moe_dit.charts import BRAILLE, chart, heat_map
from moe_dit.watch import picture, read_run

NOW = 1_800_000_000.0
CONFIG = "steps: 1000\nglobal_batch_size: 256\nlooks: {every: 100}\ndata: {path: SHARDS}\n"


def watch(*arguments, width: int = 80, status: int = 0) -> str:
    """The command's output, where it is no terminal."""
    command = [sys.executable, "jobs/watch.py", *map(str, arguments)]
    environment = ENV | {"COLUMNS": str(width)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
        return done.stderr
    assert done.stderr == ""
    assert all(cell_len(line) <= width for line in done.stdout.splitlines())
    return done.stdout


def flat(text: str) -> str:
    """Words with one space between them."""
    return " ".join(text.split())


def shown(*folders, width: int = 80, colours: bool = False, now: float = NOW) -> str:
    """The picture in this process, at a moment of choice; checked to fit."""
    console = Console(width=width, file=open(os.devnull, "w"), force_terminal=colours, record=True, color_system=None)
    console.print(picture([read_run(folder, now) for folder in folders], width, colours))
    text = console.export_text()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def last_record(run) -> dict:
    """The last line that is whole."""
    return json.loads((run / "metrics.jsonl").read_text().split("\n")[-2])


def what_is_there(folder) -> dict:
    """Every name, with size and time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def run(tmp_path):
    """A run of 400 of 1,000 steps, written by hand: it has everything that a run may have."""
    folder = tmp_path / "hand_made"
    folder.mkdir()
    load = [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.5, 0.0]]
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 401):
            record = {"step": step, "loss": 2 - step / 400, "lr": 3e-4, "grad_norm": 0.75, "images_per_second": 128.0}
            record |= {"moe_imbalance": 2.125, "data_wait": 0.03}
            record |= {"held_out_loss": 1.5, "look_fid": 7.25, "held_out_loss_by_time": [1.0]} if step == 400 else {}
            record |= {"dead_experts": 1, "expert_load": load} if step % 50 == 0 else {}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 401, "lo')
    os.utime(folder / "metrics.jsonl", (NOW - 5, NOW - 5))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "errors.jsonl").write_text('{"image": 1}\n' * 3)
    (folder / "config.yaml").write_text(CONFIG.replace("SHARDS", str(shards)))
    (folder / "status.json").write_text(json.dumps({"state": "training", "time": NOW - 7200}))
    happened = [
        (NOW - 90_000, "started", 0, "on 3 ranks"),
        (NOW - 7260, "stopped", 200, "as asked"),
        (NOW - 7200, "started", 200, "on 3 ranks"),
        (NOW - 42, "straggler", 399, "rank 2 (n2) is slow"),
    ]
    with open(folder / "events.jsonl", "w") as file:
        for at, what, step, message in happened:
            file.write(json.dumps({"time": at, "what": what, "step": step, "message": message}) + "\n")
    memory = [{"weights": 1_000_000, "master": 0, "state": 2_000_000 + rank * 500_000} for rank in range(3)]
    (folder / "memory.json").write_text(json.dumps(memory))
    ranks = {"step": 400, "time": NOW - 5, "hosts": ["n1", "n1", "n2"], "seconds": [2.0, 2.0, 2.5]}
    ranks |= {"data": [0.25, 0.5, 0.125], "compute": [0.5, 0.5, 1.25], "exchange": [0.375, 0.5, 0.25]}
    (folder / "ranks.json").write_text(json.dumps(ranks | {"memory_gb": [60.5, 61.0, 60.0]}))
    return folder


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
    (run / "status.json").write_text(json.dumps({"state": "training", "time": NOW - 3}))
    assert re.search("hand_made +starting ", shown(run))  # again, behind step 400
    (run / "metrics.jsonl").unlink()
    text = shown(run)
    assert re.search("hand_made +starting +step 0 / 1,000", text) and "no step yet" in text
    assert "starting, no news for 1 min 17 s" in shown(run, now=NOW + 74)


def test_slow_steps_are_waited_for(run):
    """Of steps of 20 s, ten of them."""
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("128.0", "12.8"))
    os.utime(file, (NOW, NOW))
    assert "no news" not in shown(run, now=NOW + 200) and "no news for 3 min 21 s" in shown(run, now=NOW + 201)


def test_curves_are_where_their_values_are():
    """Of a line that falls evenly from 2 to 1 over 80 steps: a diagonal, a point in each column, bounds beside it."""
    points = [(step, 2 - (step - 1) / 79) for step in range(1, 81)]
    lines = chart("loss", [(points, "", "a")], (1, 80), 88, 22, colours=False).plain.split("\n")
    assert len(lines) == 22 and lines[0] == "loss" and all(cell_len(line) <= 88 for line in lines)
    assert lines[20].split()[0] == "1" and lines[1].split()[0] == "1.975"  # without the first 2% of the steps
    assert lines[21] == " " * 8 + "1" + " " * 72 + "step 80"
    cells = [(row, column) for row in range(20) for column, letter in enumerate(lines[row + 1][8:]) if letter != " "]
    assert {column for _, column in cells} == set(range(80))
    for row, column in cells:
        assert abs(row / 19 - column / 79) < 0.07
    assert all(ord(lines[row + 1][8 + column]) > BRAILLE for row, column in cells)


def test_curves_that_span_decades_are_logarithmic():
    points = [(step, 10.0 ** (-step / 20)) for step in range(1, 81)]
    lines = chart("loss", [(points, "", "a")], (1, 80), 88, 22).plain.split("\n")[1:-1]
    middle = [row for row, line in enumerate(lines) if line[8 + 40] != " "]
    assert middle and all(8 <= row <= 11 for row in middle)


def test_several_curves_have_their_letters_or_colours():
    low, high = [(1, 1.0), (50, 1.0), (100, 1.0)], [(1, 2.0), (50, 2.0)]
    drawn = chart("loss", [(low, "red", "a"), (high, "blue", "b")], (1, 100), 48, 8, colours=False)
    lines = drawn.plain.split("\n")
    assert lines[1][8:].strip() == "b" * 20 and lines[6][8:].strip() == "a" * 40  # b has gone half the way
    drawn = chart("loss", [(low, "red", "a"), (high, "blue", "b")], (1, 100), 48, 8)
    styles = {drawn.plain[span.start] > chr(BRAILLE): str(span.style) for span in drawn.spans if span.style == "blue"}
    assert styles == {True: "blue"}


def test_the_load_of_48_experts_fits_80_columns():
    even = 1 / 48
    load = [[even] * 48 for _ in range(12)]
    load[11][:4] = [0.0, 4 * even, even / 4, even / 2]
    for colours in (False, True):
        lines = heat_map(load, 80, colours).plain.split("\n")
        assert len(lines) == 13 and all(cell_len(line) <= 80 for line in lines)
    lines = heat_map(load, 80, colours=False).plain.split("\n")
    assert lines[0] == " 0 " + "▄" * 48 and lines[11] == "11 x▇▁▃" + "▄" * 44
    folded = heat_map(load, 40, colours=False).plain.split("\n")
    assert folded[0] == " 0 " + "▄" * 24 and folded[11][:5] == "11 x▂" and "2 experts a cell" in folded[12]
    cells = heat_map([[0.25, 0.0, 0.25, 0.5]], 80)
    colours_of = [str(span.style) for span in cells.spans if cells.plain[span.start : span.end] in ("   ", " x ")][:4]
    assert colours_of == [f"bold white on rgb({c})" for c in ("62,66,74", "217,115,26", "62,66,74", "68,100,153")]


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
    (run / name).write_text(content)
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


def test_it_starts_without_torch(run):
    command = [sys.executable, "-X", "importtime", "jobs/watch.py", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rich.table" in imported and not {"torch", "deepspeed", "numpy", "matplotlib"} & imported


def test_a_terminal_sees_news_until_it_is_left(run):
    """On a terminal of 80 columns it draws again and again; Ctrl-C leaves the last picture, and no traceback."""
    import pty
    import signal

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, as these tests may be, ignore it
        environment = ENV | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"}
        os.execve(sys.executable, [sys.executable, "jobs/watch.py", str(run), "--every", "0.2"], environment)
    seen = ""

    def read_until(word: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while word not in seen and time.monotonic() < deadline:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
        assert word in seen

    read_until("400 / 1,000")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 777, "loss": 0.5}\n')
    read_until("777 / 1,000")
    os.kill(pid, signal.SIGINT)
    try:
        while more := os.read(terminal, 1 << 16).decode(errors="replace"):
            seen += more
    except OSError:  # the terminal's other side is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "Traceback" not in seen and "\x1b[?1049l" in seen  # back on the usual screen
    assert "777 / 1,000" in seen[seen.rindex("\x1b[?1049l") :]


def test_a_run_is_watched_while_it_trains_killed_and_done(latents, tmp_path):
    run = tmp_path / "live"
    small = ["--set", "model.depth=2", "--set", "global_batch_size=8", "--set", "checkpoint.every=10"]
    process = start_training(1, "zero1_ep1", latents, run, *small, "--steps", "100000")
    try:
        wait_for_step(run, 3, process)
        before = last_record(run)["step"]
        text = flat(watch(run))
        after = last_record(run)["step"]
        step = int(re.search(r"live training step ([\d,]+) / 100,000", text)[1].replace(",", ""))
        assert before <= step <= after and "left at the recent speed" in text
        wait_for_step(run, 12, process)
    finally:
        kill(process)
    last = last_record(run)
    text = flat(watch(run))
    assert f"step {last['step']:,} / 100,000" in text and f"loss {last['loss']:.4g} " in text
    assert "training, no news for 12 min " in shown(run, now=time.time() + 720)
    finish(start_training(1, "zero1_ep1", latents, run, *small, "--steps", str(last["step"] + 2)), run)
    text = flat(watch(run))
    last = last_record(run)
    assert f"live done step {last['step']:,} / {last['step']:,}" in text and f"loss {last['loss']:.4g} " in text
    assert "for the 2nd time" in text and re.search("started step [1-9]0: digits on 1 rank", text)
