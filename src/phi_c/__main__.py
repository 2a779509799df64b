"""Entry point of `python -m phi_c`, the same program as `phi-c`."""

from phi_c.cli import main

if __name__ == "__main__":
    main()
