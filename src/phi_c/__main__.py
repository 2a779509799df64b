"""`python -m phi_c` is `phi-c`."""

from phi_c.cli import main

if __name__ == "__main__":
    main()
