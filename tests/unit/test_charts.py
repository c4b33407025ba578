"""Charts of text: curves are where their values are, and fit."""

from rich.cells import cell_len

from moe_dit.charts import BRAILLE, chart, heat_map


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
