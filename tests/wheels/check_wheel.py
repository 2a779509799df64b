"""Runs an installed wheel under every tier: one line each; exit status 1 where a tier writes something else.

    python check_wheel.py --tiers scalar,neon

What the tiers write is SmolLM2's greedy text (93 MB, downloaded once). `--tiers`: the machine must have exactly these.
"""

import argparse
import platform
import sys

import phi_c
from phi_c import _core

PROMPT, EXPECTED = "The capital of France is", " Paris."


def main() -> int:
    """Generate under each tier; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", help="separated by commas")
    arguments = parser.parse_args()
    tiers = _core.tiers()
    where = f"{sys.implementation.name} {platform.python_version()} on {platform.machine()}"
    print(f"{where}: {_core.__file__}")
    if arguments.tiers and tiers != arguments.tiers.split(","):
        print(f"tiers {tiers}, expected {arguments.tiers}", file=sys.stderr)
        return 1
    for tier in tiers:
        with phi_c.load("smollm2", n_ctx=64, tier=tier) as llm:
            text = llm.generate(PROMPT, raw=True, temperature=0, max_tokens=2).text
        print(f"{tier}: {PROMPT}{text}")
        if text != EXPECTED:
            print(f"expected{EXPECTED}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
