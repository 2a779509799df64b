"""`python -m phi_c.evaluate`: the command line of lm-evaluation-harness with the model "phi-c" registered."""

import importlib
import importlib.util
import sys

from phi_c.errors import PhiError


def main() -> None:
    """Run lm_eval. A PhiError is printed as one line with exit code 1."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("phi-c: error: lm-evaluation-harness is not installed: pip install 'phi-c[eval]'")
    importlib.import_module("phi_c.evaluate.harness")
    try:
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except PhiError as error:
        sys.exit(f"phi-c: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
