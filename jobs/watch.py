"""Watch runs while they train: python jobs/watch.py RUN..."""

import io
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_text
from moe_dit.runtime.wording import printable
from moe_dit.watch import picture, read_run

EXAMPLES = """\
  python jobs/watch.py runs/dsmoe_s_e16
  python jobs/watch.py runs/lr_1e-4 runs/lr_3e-4 --every 10
  python jobs/watch.py runs/dsmoe_s_e16 --once              one picture, for scripts
  python jobs/watch.py runs/dsmoe_s_e16 --svg now.svg"""
# rich's own page has fonts of a server in it.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg"><style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style><defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>{chrome}<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def main() -> None:
    parser = Parser("Show runs while they train, or afterwards, from their files alone.", EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of jobs/train.py")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="print one picture, as where the output is no terminal")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write one picture")
    args = parser.parse_args()
    if not 0.1 <= args.every <= 86400:
        raise InputError(f"--every {args.every:g}: it should be 0.1 to 86400 seconds")
    console = Console(highlight=False)

    def frame(console: Console):
        return picture([read_run(run, time.time()) for run in args.runs], console.width, bool(console.color_system))

    if args.svg is not None:
        check_new_file(args.svg, lambda file: file.read_bytes().startswith(SVG[:26].encode()))
        drawn = Console(
            file=io.StringIO(), record=True, width=console.width, color_system="truecolor", force_terminal=True
        )
        drawn.print(frame(drawn))
        title = printable(f"python jobs/watch.py {' '.join(map(str, args.runs))}")
        with explained(str(args.svg)):
            write_text(args.svg, drawn.export_svg(title=title, code_format=SVG))
    elif args.once or not console.is_terminal:
        console.print(frame(console))
    else:
        last = frame(console)
        try:
            with Live(last, console=console, screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(args.every)
                    last = frame(console)
                    live.update(last, refresh=True)
        except KeyboardInterrupt:
            console.print(last)  # stays on the terminal


if __name__ == "__main__":
    run(main)
