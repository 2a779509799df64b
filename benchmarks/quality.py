"""Measure the quality loss of an engine's arithmetic: its logits on a file against float32 on the same weights.

    python benchmarks/quality.py smollm2 --tier avx512 --tier avx2 --python llama-cpp-python=/path/to/its/python
    python benchmarks/quality.py smollm2 --outliers 20      # the same model with outlier channels
    python benchmarks/quality.py smollm2 --k-quants         # the same model as Q4_K_M (needs libgguf)

The reference is phi-c on the file dequantised to float32; the tests check it against NumPy, and --control checks it
against llama.cpp. So the loss from quantising the weights does not count, only the rounding of activations and sums.
The text is English, from Python's language reference (pydoc_data), in windows spread evenly over it.

The table has the mean KL divergence KL(float32 || engine) with its standard error over the windows, the 99th percentile
of KL, top-1 agreement, and the perplexity divided by that of float32.
Exit status 1: phi-c's mean KL exceeds llama.cpp's by more than two standard errors of the difference; or, if llama.cpp
was not measured and no outliers were planted, exceeds --limit.

The float32 model must fit in memory, and on disk together with the logits: suitable for up to a billion weights.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import quality_files
from phi_c import hub
from phi_c.errors import PhiError
from phi_c.evaluate import metrics
from phi_c.gguf.reader import GGUFFile
from phi_c.text.tokenizer import load_tokenizer
from quality_workers import Task

Doubles = npt.NDArray[np.float64]

_PEER, _MODULE = "llama-cpp-python", "llama_cpp"
_INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python'
_N_CHANNELS = 4  # outlier channels per layer and matrix input
_MAX_PERPLEXITY_CHANGE = 1e-3  # relative


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    label: str
    kl: Doubles  # nats, [n_windows, n_tokens]
    top1_agreement: npt.NDArray[np.bool_]  # [n_windows, n_tokens]
    nll: Doubles  # nats, [n_windows, n_tokens - 1]
    reference_nll: Doubles  # nats, [n_windows, n_tokens - 1]

    @property
    def perplexity_ratio(self) -> float:
        """The perplexity divided by that of float32."""
        return math.exp((self.nll - self.reference_nll).mean())


def main() -> None:
    options = _parser().parse_args()
    try:
        sys.exit(_measure_all(options))
    except PhiError as error:
        raise SystemExit(f"quality.py: error: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help="GGUF file or preset (smollm2).")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="Number of windows (16).")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="Window size in tokens (512).")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="Number of threads (2).")
    parser.add_argument(
        "--tier", action="append", metavar="TIER", help="phi-c's tier (the best); repeat it for several rows."
    )
    parser.add_argument(
        "--outliers", type=float, metavar="FACTOR", help="Plant outlier channels, larger by this factor."
    )
    parser.add_argument("--k-quants", action="store_true", help="Requantise the model as Q4_K_M.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="Text file to use instead.")
    parser.add_argument(
        "--limit", type=float, default=0.0030, metavar="KL", help="Maximum mean KL without llama.cpp (0.0030)."
    )
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="Python of an engine.")
    parser.add_argument("--control", action="store_true", help="Also run llama.cpp on the float32 expansion.")
    return parser


def _measure_all(options: argparse.Namespace) -> int:
    source = hub.resolve(options.model)
    python = dict(item.split("=", 1) for item in options.python).get(_PEER, sys.executable)
    has_peer = _has_module(python)
    if not has_peer:
        print(f"{_PEER} is not installed: {_INSTALL}")
    with tempfile.TemporaryDirectory(prefix="phi-c-") as name:
        folder = Path(name)
        path = prepare(source, folder, options.outliers, options.k_quants)
        expansion = quality_files.expand(path, folder / "float32.gguf")
        text = options.text.read_text(encoding="utf-8") if options.text else english()
        windows = split_windows(path, text, options.windows, options.tokens)
        task = Task(str(path), windows, options.threads, metrics.__file__, str(folder / "reference.npy"))
        _run("reference", sys.executable, replace(task, model=str(expansion)))
        rows = []
        for tier in options.tier or [None]:
            label = f"phi-c, {tier}" if tier else "phi-c"
            rows.append(_row(label, _run("phi-c", sys.executable, task, tier)))
        if has_peer:
            rows.append(_row("llama.cpp", _run(_PEER, python, task)))
            if options.control:
                on_expansion = _run(_PEER, python, replace(task, model=str(expansion)))
                rows.append(_row("llama.cpp, float32 expansion", on_expansion))
    _print_table(_title(options, source), rows)
    limit = None if options.outliers else options.limit
    return 1 if print_goals(rows, limit) else 0


def _title(options: argparse.Namespace, source: Path) -> str:
    parts = [source.name]
    if options.k_quants:
        parts.append("requantised as Q4_K_M")
    if options.outliers:
        parts.append(f"outlier channels x {options.outliers:g}")
    text = (
        options.text.name if options.text else f"Python {sys.version_info[0]}.{sys.version_info[1]} language reference"
    )
    return f"{', '.join(parts)}; {options.windows} windows of {options.tokens} tokens, {text}"


def prepare(source: Path, folder: Path, outliers: float | None, k_quants: bool) -> Path:
    """Return the file to measure: the source itself, or a modified copy in the folder.

    With outlier channels but without K-quants the copy is Q8_0: in four bits, columns that are a twentieth of their
    neighbours would round to zero.
    """
    if outliers is None and not k_quants:
        return source
    weights = quality_files.read(source)
    if k_quants:
        quality_files.pad_to_super_blocks(weights)
    if outliers is not None:
        quality_files.plant_outliers(weights, outliers, _N_CHANNELS)
    types = quality_files.k_quants(weights) if k_quants else quality_files.all_q8_0(weights)
    return quality_files.write(weights, folder / "modified.gguf", types)


def english() -> str:
    """Return the prose of Python's language reference: paragraphs without examples, grammar and headings."""
    from pydoc_data.topics import topics

    paragraphs = []
    for topic in topics.values():
        for block in re.split(r"\n\s*\n", topic):
            is_prose = block[:1].isalpha() and block.rstrip()[-1:] in ".:" and not re.search("\n {2,}", block)
            if is_prose and len(block) > 80:
                paragraphs.append(" ".join(block.split()).replace("*", "").replace('"', ""))
    return "\n\n".join(dict.fromkeys(paragraphs))  # a few topics share paragraphs


def split_windows(path: Path, text: str, n_windows: int, n_tokens: int) -> list[list[int]]:
    """Return windows of token ids spread evenly over the text, each beginning with BOS if the model uses it.

    Raises SystemExit if the text is too short.
    """
    with GGUFFile(path) as file:
        tokenizer = load_tokenizer(file.metadata)
    ids = tokenizer.encode(text, add_bos=False)
    n_text_tokens = n_tokens - len(tokenizer.with_bos([]))
    if len(ids) < n_windows * n_text_tokens:
        raise SystemExit(
            f"quality.py: error: the text has {len(ids)} tokens, expected at least {n_windows * n_text_tokens}"
        )
    starts = [i * (len(ids) - n_text_tokens) // max(n_windows - 1, 1) for i in range(n_windows)]
    return [tokenizer.with_bos(ids[start : start + n_text_tokens]) for start in starts]


def _has_module(python: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        return subprocess.run([python, "-c", probe], check=False).returncode == 0
    except OSError:  # no such interpreter
        return False


def _run(worker: str, python: str, task: Task, tier: str | None = None) -> dict[str, list[list[float]]]:
    """Run a worker and return its result. Raises SystemExit with the last line of its stderr if it fails."""
    # A separate script, since the other engine's interpreter has neither phi_c nor gguf.
    done = subprocess.run(
        [python, str(Path(__file__).with_name("quality_workers.py")), worker],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **({"PHI_C_ISA": tier} if tier else {})},
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"quality.py: error: {worker} failed: {lines[-1]}")
    result: dict[str, list[list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _row(label: str, result: dict[str, list[list[float]]]) -> Row:
    return Row(label, **{name: np.asarray(values) for name, values in result.items()})


def standard_error(values: npt.NDArray[Any]) -> float:
    """Return the standard error of the mean of values, [n_windows, n_tokens]."""
    return metrics.standard_error(values.sum(1, dtype=np.float64), [values.shape[1]] * len(values))


def _print_table(title: str, rows: list[Row]) -> None:
    perplexity = math.exp(rows[0].reference_nll.mean())
    print(f"\n{title}; float32 perplexity {perplexity:.3f}\n")
    print("| engine | mean KL, nats | 99 % KL, nats | top-1 agreement | perplexity / float32 |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        change = row.nll - row.reference_nll
        print(
            f"| {row.label} | {row.kl.mean():.5f} ± {standard_error(row.kl):.5f} | {np.quantile(row.kl, 0.99):.4f} "
            f"| {row.top1_agreement.mean():.2%} | {row.perplexity_ratio:.4f} ± {standard_error(change):.4f} |"
        )


def print_goals(rows: list[Row], limit: float | None) -> bool:
    """Print for each goal whether it is met. Return whether the mean-KL goal is missed.

    "No worse than llama.cpp" means: the mean difference over the windows is at most two of its standard errors.
    """
    peer = next((row for row in rows if row.label == "llama.cpp"), None)
    missed = False
    print()
    for row in rows:
        if not row.label.startswith("phi-c"):
            continue
        kl = float(row.kl.mean())
        if peer is not None:
            missed |= not _check_no_worse(row, "mean KL", row.kl - peer.kl, "+.5f")
            _check_no_worse(row, "top-1 disagreement", peer.top1_agreement - row.top1_agreement.astype(float), "+.2%")
            change = row.perplexity_ratio / peer.perplexity_ratio - 1
            _report(
                row,
                f"perplexity {change:+.2%} relative to llama.cpp, at most {_MAX_PERPLEXITY_CHANGE:+.1%}",
                change <= _MAX_PERPLEXITY_CHANGE,
            )
        elif limit is not None:
            missed |= kl > limit
            _report(row, f"mean KL {kl:.5f}, at most {limit:.5f}", kl <= limit)
        change = row.perplexity_ratio - 1
        _report(
            row,
            f"perplexity {change:+.2%} relative to float32, within {_MAX_PERPLEXITY_CHANGE:.1%}",
            abs(change) <= _MAX_PERPLEXITY_CHANGE,
        )
    return missed


def _check_no_worse(row: Row, what: str, excess: Doubles, form: str) -> bool:
    """Print and return whether the mean of excess, [n_windows, n_tokens], is not significantly above 0."""
    mean, error = float(excess.mean()), standard_error(excess)
    is_met = mean <= (0.0 if math.isnan(error) else 2 * error)
    _report(row, f"{what} {mean:{form}} ± {error:{form[1:]}} relative to llama.cpp", is_met)
    return is_met


def _report(row: Row, text: str, is_met: bool) -> None:
    print(f"{'met' if is_met else 'NOT MET'}: {row.label}: {text}")


if __name__ == "__main__":
    main()
