"""Runs an installed wheel under every tier of the machine and checks the output. Exit status 1 if a tier differs.

    python check_wheel.py --tiers scalar,neon

Each tier continues a prompt with SmolLM2 (93 MB, downloaded once), greedily. Prints one line per tier.
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
    parser.add_argument("--tiers", help="exact list of tiers that the machine must have, separated by commas")
    arguments = parser.parse_args()
    tiers = _core.tiers()
    python = f"{sys.implementation.name} {platform.python_version()} on {platform.machine()}"
    print(f"{python}: {_core.__file__}")
    if arguments.tiers and tiers != arguments.tiers.split(","):
        print(f"the machine has tiers {','.join(tiers)}; expected {arguments.tiers}", file=sys.stderr)
        return 1
    for tier in tiers:
        with phi_c.load("smollm2", n_ctx=64, tier=tier) as llm:
            text = llm.generate(PROMPT, raw=True, temperature=0, max_tokens=2).text
        print(f"{tier}: {PROMPT}{text}")
        if text != EXPECTED:
            print(f"{tier}: expected {EXPECTED!r}, got {text!r}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
