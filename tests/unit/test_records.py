"""metrics.jsonl read in pieces: what is found equals a full parse, and of a million steps little is read for it."""

import json
import os
import random
import re
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil
import pytest

from eval import report
from eval.report import read_metrics
from helpers import call
from moe_dit import load_recipe, records
from moe_dit.metrics import Metrics
from moe_dit.records import Records

STEPS = 1_000_000
EVERY = {50: ', "dead_experts": 0, "expert_load": [[0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]]'}
EVERY[10_000] = EVERY[50] + ', "look_fid": 12.5'


def line(step: int) -> str:
    """A record as training writes it, of about 200 bytes; the loss is 1 / step and the speed step + 1000."""
    more = EVERY.get(50 if step % 10_000 else 10_000, "") if step % 50 == 0 else ""
    return (
        f'{{"step": {step}, "loss": {1 / step!r}, "lr": 0.0001, "grad_norm": 0.123456789012345678, '
        f'"images_per_second": {step + 1000}.0, "moe_imbalance": 1.2345, "data_wait": 0.0012, "mse": 0.5{more}}}\n'
    )


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """A run's metrics.jsonl of a million steps."""
    file = tmp_path_factory.mktemp("long") / "metrics.jsonl"
    with open(file, "w") as out:
        out.writelines(line(step) for step in range(1, STEPS + 1))
    assert 180e6 < file.stat().st_size < 300e6
    yield file
    file.unlink(missing_ok=True)


@contextmanager
def reading_at_most(count: int):
    """The system's own count of the bytes that this process reads in the block."""
    before = psutil.Process().io_counters().read_chars
    yield
    assert psutil.Process().io_counters().read_chars - before < count


def test_of_a_million_steps_little_is_read(million):
    with Records(million) as found:
        with reading_at_most(70_000):
            assert [record["step"] for record in found.last(3)] == [999_998, 999_999, 1_000_000]
        with reading_at_most(70_000):
            assert found.newest("expert_load", 1 << 16)["step"] == 1_000_000
        with reading_at_most(4_000_000):
            assert found.newest("look_fid", 1 << 20)["step"] == 1_000_000
            assert found.newest("look_kid", 1 << 20) is None
        for step in (1, 2, 49_999, 500_000, 789_012, 999_999):
            with reading_at_most(200_000):
                assert found.at(step)["images_per_second"] == step + 1000
        with reading_at_most(200_000):
            assert found.behind(2 * STEPS) == million.stat().st_size
        with reading_at_most(200_000):
            assert found.at(2 * STEPS) is None and found.behind(0) == 0
        with reading_at_most(1_000_000):
            curve = found.thinned(100, neighbours=8)
    assert [round(point["step"], 1) for point in curve[:1] + curve[-1:]] == [4.5, 999_996.5]
    assert len(curve) == 100
    for i, point in enumerate(curve):
        assert point["images_per_second"] == point["step"] + 1000 and point["lr"] == pytest.approx(1e-4)
        assert point["step"] == pytest.approx(i * STEPS / 99, abs=0.005 * STEPS)  # long lines are spread evenly


def test_rare_records_are_all_found(million):
    with Records(million) as found:
        assert [record["step"] for record in found.having("look_", "no_such")] == list(range(10_000, STEPS + 1, 10_000))


def test_the_report_of_a_million_steps_is_small(million, tmp_path):
    assert call("eval.report", "--run", million.parent, "--out", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 500_000
    facts = dict(re.findall("<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert facts["steps"] == "1,000,000"
    assert float(facts["images per second (median)"].replace(",", "")) == pytest.approx(501_000, rel=0.005)
    assert float(facts["loss, last 2%"]) == pytest.approx(1 / 990_000, rel=0.01)
    # Loss for desks and phones, its part, rate, norm, speed, imbalance, waits, FID of the looks, load of the experts.
    assert text.count("<svg") == 10 and "Thin: single steps." in text
    assert "MoE layer 1, expert 0: 40.00% of the tokens" in text and "at step 1,000,000" in text
    found = read_metrics(million.parent)
    assert [record["look_fid"] for record in found if "look_fid" in record] == [12.5] * 100
    steps = [record["step"] for record in found]
    assert steps[:300] == list(range(1, 301)) and 4000 < len(steps) < 5000
    assert max(after - before for before, after in pairwise(steps)) < 1000
    assert max(after / before for before, after in pairwise(steps[300:])) < 1.02


def test_times_count_the_steps_that_were_not_read(tmp_path, monkeypatch):
    """Of 5,000 steps of 1,000 images, half at 10 a second and then half at 40: 62.5 s a thousand, in the median 40."""
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 5001):
            file.write(f'{{"step": {step}, "loss": 1.0, "images_per_second": {10 if step <= 2400 else 40}}}\n')
    (tmp_path / "config.yaml").write_text("global_batch_size: 1000\n")
    monkeypatch.setattr(report, "EVEN", 100)
    for whole in (1 << 20, 0):
        monkeypatch.setattr(report, "WHOLE", whole)
        summary = dict(report._summary(tmp_path, read_metrics(tmp_path), {"global_batch_size": 1000}))
        assert summary["images per second (median)"] == "40"
        assert summary["training time"] == "3 d 12 h"  # 240,000 + 65,000 s


def made_file(seed: int) -> tuple[bytes, list[dict]]:
    """A short file with steps left out, lines that are none and a cut end; and its records, by a parse of all lines."""
    chosen = random.Random(seed)
    lines, step = [], 0
    for _ in range(chosen.randrange(60)):
        step += chosen.choice((1, 1, 1, 0, 7))
        pad = "x" * chosen.choice((0, 10, 300))
        lines.append(f'{{"step": {step}, "loss": {step}.5, "pad": "{pad}"}}')
        if chosen.random() < 0.1:
            lines.append(chosen.choice(("", "\x00" * 40, "[1, 2]", '{"loss": 1.0}', '{"step": "3"}', '{"step": true}')))
    text = "\n".join(lines) + chosen.choice(("\n", "", '\n{"step": 3, "lo')) if lines else ""
    found = []
    for part in text.split("\n"):
        try:
            record = json.loads(part)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append(record)
    return text.encode(), found


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_short_files_read_as_a_full_parse(tmp_path, monkeypatch, block):
    """In blocks far smaller than the real ones, so that every way through the file is gone."""
    monkeypatch.setattr(records, "BLOCK", block)
    monkeypatch.setattr(records, "LINE", min(block, 100))
    file = tmp_path / "metrics.jsonl"
    for seed in range(25):
        data, truth = made_file(seed)
        file.write_bytes(data)
        with Records(file) as found:
            assert list(found.all()) == truth
            assert found.last(4) == truth[-4:] and found.last(1000) == truth
            assert found.following(0, 3) == truth[:3]
            assert list(found.having("loss")) == truth and list(found.having("los", "pa")) == truth
            for step in (*range(-1, 12), *range(12, 80, 9)):
                earlier = [record for record in truth if record["step"] <= step]
                place = found.behind(step)
                kept, rest = data[:place], data[place:]
                assert kept in (b"", data) or kept.endswith(b"\n")
                got = [records.parse(part) for part in kept.split(b"\n")]
                assert [record for record in got if record] == earlier
                assert place == 0 or (got[-1] or got[-2]) == earlier[-1]  # what is no record stays behind the place
                assert all((records.parse(part) or {"step": step + 1})["step"] > step for part in rest.split(b"\n"))
                assert found.at(step) == next((record for record in truth if record["step"] == step), None)
            assert found.newest("pad", 1 << 20) == (truth[-1] if truth else None)
            assert found.newest("pa", 1 << 20) is None


def test_a_short_curve_has_every_record_in_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": NaN, "fid": 7}\n{"step": 3, "loss": 1.0, "list": [1]}\n'
        '{"step": 4, "loss": 3.0, "up": true}\n{"step": 5, "loss": 1e999}\n'
    )
    with Records(tmp_path / "metrics.jsonl") as found:
        assert found.thinned(2) == [{"step": 1.5, "loss": 4.0, "fid": 7.0}, {"step": 4.0, "loss": 2.0}]
        whole = found.thinned(100)
    assert whole == [
        {"step": 1, "loss": 4.0},
        {"step": 2, "fid": 7},
        {"step": 3, "loss": 1.0},
        {"step": 4, "loss": 3.0},
        {"step": 5},
    ]
    (tmp_path / "metrics.jsonl").write_text("")
    with Records(tmp_path / "metrics.jsonl") as found:
        assert found.thinned(2) == found.last() == [] and found.behind(3) == 0


def test_what_follows_far_behind_is_given_up(tmp_path):
    """A hole of a megabyte and more, as some file systems leave after a crash, is not read again and again."""
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(b'{"step": 1}\n' + b"\x00" * (5 << 20) + b'\n{"step": 2}\n')
    with Records(tmp_path / "metrics.jsonl") as found:
        assert [record["step"] for record in found.all()] == [1, 2]
        with reading_at_most(2 << 20):
            assert found.following(100, 1) == []
        assert found.behind(1) == 12 and found.at(2) == {"step": 2}


# --- set aside when a run continues -----------------------------------------------------------------------------------


RECIPE = load_recipe("digits", ["metrics.sinks=[]"])


def cut(run, step: int) -> None:
    """What a start does with the records that are there when it continues behind a step."""
    Metrics(run, step, RECIPE, step).close()


def split(data: bytes, step: int) -> tuple[bytes, bytes]:
    """What stays and what is set aside, by a parse of every line: all up to the last record of ``step`` stays."""
    lines = data.splitlines(keepends=True)
    last = -1
    for i, part in enumerate(lines):
        with suppress(ValueError, TypeError, KeyError):
            last = i if json.loads(part)["step"] <= step else last
    return b"".join(lines[: last + 1]), b"".join(lines[last + 1 :])


@pytest.mark.parametrize("step", [0, 1, 700, 999, 1000])
@pytest.mark.parametrize("end", ["", '{"step": 1001, "lo', "\x00\x00\n", '{"step": 1001}'])
def test_a_start_sets_later_records_aside(tmp_path, capsys, step, end):
    data = "".join(map(line, range(1, 1001))).encode() + end.encode()
    (tmp_path / "metrics.jsonl").write_bytes(data)
    kept, aside = split(data, step)
    cut(tmp_path, step)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    other = tmp_path / "metrics_superseded.jsonl"
    assert other.exists() == bool(aside) and (not aside or other.read_bytes() == aside)
    said = " ".join(capsys.readouterr().err.split())
    if not aside:
        assert said == ""
    elif step == 1000 and end != '{"step": 1001}':
        assert said.startswith("a line that is no record moved from ")
    else:
        last = 1001 if end == '{"step": 1001}' else 1000
        assert said.startswith(f"the records of steps {step + 1} to {last} moved from ")


def test_lines_that_are_not_ended_are_joined_to_nothing(tmp_path):
    """A record without its line's end stays, and what is added stands on lines of its own in both files."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    (tmp_path / "metrics_superseded.jsonl").write_text('{"step": 2, "lo')
    cut(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    cut(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == '{"step": 2, "lo\n{"step": 2}\n'


def test_a_million_steps_are_cut_without_reading_them(million, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    os.rename(million, run / "metrics.jsonl")  # cut in place: the last test of this file
    with reading_at_most(1_000_000):
        cut(run, STEPS - 1000)
    with Records(run / "metrics.jsonl") as found:
        assert found.last()[0]["step"] == STEPS - 1000
    aside = (run / "metrics_superseded.jsonl").read_text()
    assert aside == "".join(map(line, range(STEPS - 999, STEPS + 1)))
