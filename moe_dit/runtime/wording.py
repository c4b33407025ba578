"""Numbers and names as people read them."""


def printable(text: str) -> str:
    """A name as text that can be drawn: what no page or terminal can show becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shortened(value: object, most: int = 80) -> str:
    """A value as text of at most so many letters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def duration(seconds: float) -> str:
    """Two units, rounded down: "3 d 4 h", "2 h 5 min", "4 min 10 s", "40 s"."""
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // small:.0f} {small_name}"
    return f"{seconds:.0f} s"
