"""Draw a terminal session as SVG: each command is run, and what it prints is drawn as rich shows it.

    python benchmarks/screenshot.py docs/images/terminal.svg

The commands are those below, on the preset smollm2 with a fixed seed.
"""

import argparse
import io
import shlex
import subprocess

from rich.console import Console
from rich.text import Text

COMMANDS = (
    'phi-c generate -m smollm2 --repeat-penalty 1.1 --temperature 0.5 --seed 3 "Write a haiku about ice hockey"',
    'phi-c generate -m smollm2 --raw --temperature 0 -n 24 --stats "The capital of France is"',
    'phi-c score -m smollm2 "The capital of France is" " Paris" " London"',
    "phi-c bench -m smollm2 --batch 1,8 --repeat 3",
)
WIDTH = 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.svg")
    file = parser.parse_args().file
    console = Console(record=True, width=WIDTH, force_terminal=True, color_system="truecolor", file=io.StringIO())
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        done = subprocess.run(
            shlex.split(command), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        console.print(Text(done.stdout.rstrip()))
        console.print()
    console.save_svg(file, title="phi-c")


if __name__ == "__main__":
    main()
