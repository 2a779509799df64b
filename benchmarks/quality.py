"""What quantised arithmetic costs in quality: an engine's logits on a file against float32 on the same weights.

    python benchmarks/quality.py smollm2 --tier avx512 --tier avx2 --python llama-cpp-python=/path/to/its/python
    python benchmarks/quality.py smollm2 --outliers 20      # the same model with outlier channels in its activations
    python benchmarks/quality.py smollm2 --k-quants         # the same model as a Q4_K_M file (needs libgguf)

Float32 is phi-c on the file's float32 expansion, which the tests hold against NumPy; llama.cpp may be asked to confirm
it (--control). So what a file has lost already does not count, only how activations are rounded and products summed.
The text is English from Python's own language reference (pydoc_data), in windows spread evenly over it.

The table has the mean of KL(float32 || engine) and its standard error over the windows, the KL that 99 % of the tokens
stay below, how often the likeliest token is the same, and the perplexity over float32's.
Exit status 1: phi-c's mean KL is above llama.cpp's by more than two standard errors of their difference; or, when
llama.cpp was not measured and the model's activations are its own, above --limit.

Everything is in memory as float32 once, and on disk beside the logits: for models of up to a billion weights.
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
_N_CHANNELS = 4  # of each layer's norms and of its gated product
_MAX_OFF = 1e-3  # of perplexities


@dataclass(frozen=True)
class Found:
    """A row of the table."""

    label: str
    kl: Doubles  # nats, [n_windows, n_tokens]
    top1_agreement: npt.NDArray[np.bool_]  # [n_windows, n_tokens]
    nll: Doubles  # nats, [n_windows, n_tokens - 1]
    reference_nll: Doubles  # the same

    @property
    def perplexity_ratio(self) -> float:
        """The perplexity over float32's."""
        return math.exp((self.nll - self.reference_nll).mean())


def main() -> None:
    options = _parser().parse_args()
    try:
        sys.exit(_measure_all(options))
    except PhiError as error:
        raise SystemExit(f"quality.py: error: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help="path or preset (smollm2)")
    parser.add_argument("--windows", type=int, default=16, metavar="N")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of each window")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--tier", action="append", help="phi-c's instruction set, a row each; the best by default")
    parser.add_argument("--outliers", type=float, metavar="FACTOR", help="plant outlier channels, so much larger")
    parser.add_argument("--k-quants", action="store_true", help="quantise the model anew as a Q4_K_M file")
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text")
    parser.add_argument("--limit", type=float, default=0.0030, metavar="KL", help="llama.cpp's on SmolLM2 Q4_1")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="its interpreter")
    parser.add_argument("--control", action="store_true", help="also run llama.cpp on the float32 expansion")
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
        windows = cut(path, text, options.windows, options.tokens)
        task = Task(str(path), windows, options.threads, metrics.__file__, str(folder / "reference.npy"))
        _run("reference", sys.executable, replace(task, model=str(expansion)))
        found = []
        for tier in options.tier or [None]:
            label = f"phi-c, {tier}" if tier else "phi-c"
            found.append(_row(label, _run("phi-c", sys.executable, task, tier)))
        if has_peer:
            found.append(_row("llama.cpp", _run(_PEER, python, task)))
            if options.control:
                on_expansion = _run(_PEER, python, replace(task, model=str(expansion)))
                found.append(_row("llama.cpp, float32 expansion", on_expansion))
    _print_table(_title(options, source), found)
    limit = None if options.outliers else options.limit
    return 1 if print_goals(found, limit) else 0


def _title(options: argparse.Namespace, source: Path) -> str:
    parts = [source.name]
    if options.k_quants:
        parts.append("quantised anew as Q4_K_M")
    if options.outliers:
        parts.append(f"outlier channels of {options.outliers:g}")
    text = options.text.name if options.text else f"Python {sys.version_info[0]}.{sys.version_info[1]}'s reference"
    return f"{', '.join(parts)}; {options.windows} windows of {options.tokens} tokens, {text}"


def prepare(source: Path, folder: Path, outliers: float | None, k_quants: bool) -> Path:
    """Return the file to measure: the source itself, or what is made of it in the folder.

    Outlier channels without K-quants take Q8_0: columns that are a twentieth of their neighbours vanish in four bits.
    """
    if outliers is None and not k_quants:
        return source
    weights = quality_files.read(source)
    if k_quants:
        quality_files.pad_to_super_blocks(weights)
    if outliers is not None:
        quality_files.plant(weights, outliers, _N_CHANNELS)
    types = quality_files.k_quants(weights) if k_quants else quality_files.all_q8_0(weights)
    return quality_files.write(weights, folder / "changed.gguf", types)


def english() -> str:
    """Return the prose of Python's language reference: paragraphs, without examples, grammar and headings."""
    from pydoc_data.topics import topics

    paragraphs = []
    for topic in topics.values():
        for block in re.split(r"\n\s*\n", topic):
            is_prose = block[:1].isalpha() and block.rstrip()[-1:] in ".:" and not re.search("\n {2,}", block)
            if is_prose and len(block) > 80:
                paragraphs.append(" ".join(block.split()).replace("*", "").replace('"', ""))
    return "\n\n".join(dict.fromkeys(paragraphs))  # a few topics share paragraphs


def cut(path: Path, text: str, n_windows: int, n_tokens: int) -> list[list[int]]:
    """Return windows of token ids spread evenly over the text, each with a BOS if the model wants one.

    Raises SystemExit when the text is too short.
    """
    with GGUFFile(path) as file:
        tokenizer = load_tokenizer(file.metadata)
    ids = tokenizer.encode(text, add_bos=False)
    n_own = n_tokens - len(tokenizer.with_bos([]))
    if len(ids) < n_windows * n_own:
        raise SystemExit(f"quality.py: error: the text has {len(ids)} tokens, expected {n_windows * n_own}")
    starts = [i * (len(ids) - n_own) // max(n_windows - 1, 1) for i in range(n_windows)]
    return [tokenizer.with_bos(ids[start : start + n_own]) for start in starts]


def _has_module(python: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        return subprocess.run([python, "-c", probe], check=False).returncode == 0
    except OSError:  # no such interpreter
        return False


def _run(worker: str, python: str, task: Task, tier: str | None = None) -> dict[str, list[list[float]]]:
    """Return what a worker found; raises SystemExit with its complaint when it fails."""
    # A script of its own, for a peer's interpreter has neither phi_c nor gguf.
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


def _row(label: str, found: dict[str, list[list[float]]]) -> Found:
    return Found(label, **{name: np.asarray(values) for name, values in found.items()})


def standard_error(values: npt.NDArray[Any]) -> float:
    """Return that of the mean of [n_windows, n_tokens]."""
    return metrics.standard_error(values.sum(1, dtype=np.float64), [values.shape[1]] * len(values))


def _print_table(title: str, found: list[Found]) -> None:
    perplexity = math.exp(found[0].reference_nll.mean())
    print(f"\n{title}; perplexity of float32 {perplexity:.3f}\n")
    print("| engine | mean KL | 99 % | same top token | perplexity |")
    print("|---|---:|---:|---:|---:|")
    for row in found:
        change = row.nll - row.reference_nll
        print(
            f"| {row.label} | {row.kl.mean():.5f} ± {standard_error(row.kl):.5f} | {np.quantile(row.kl, 0.99):.4f} "
            f"| {row.top1_agreement.mean():.2%} | x {row.perplexity_ratio:.4f} ± {standard_error(change):.4f} |"
        )


def print_goals(found: list[Found], limit: float | None) -> bool:
    """Say of each goal whether it is met; return whether the one of mean KL is missed.

    No worse than llama.cpp: not by more than two standard errors of the difference, window by window.
    """
    peer = next((row for row in found if row.label == "llama.cpp"), None)
    missed = False
    print()
    for row in found:
        if not row.label.startswith("phi-c"):
            continue
        kl = float(row.kl.mean())
        if peer is not None:
            missed |= not _no_worse(row, "mean KL", row.kl - peer.kl, "+.5f")
            _no_worse(row, "share of other top tokens", peer.top1_agreement - row.top1_agreement.astype(float), "+.2%")
            off = row.perplexity_ratio / peer.perplexity_ratio - 1
            _say(row, f"perplexity {off:+.2%} beside llama.cpp's, at most {_MAX_OFF:+.1%}", off <= _MAX_OFF)
        elif limit is not None:
            missed |= kl > limit
            _say(row, f"mean KL {kl:.5f}, at most {limit:.5f}", kl <= limit)
        off = row.perplexity_ratio - 1
        _say(row, f"perplexity {off:+.2%} beside float32's, within {_MAX_OFF:.1%}", abs(off) <= _MAX_OFF)
    return missed


def _no_worse(row: Found, what: str, excess: Doubles, form: str) -> bool:
    """Say and return whether the mean of excess, [n_windows, n_tokens], is not above 0 for certain."""
    mean, error = float(excess.mean()), standard_error(excess)
    is_met = mean <= (0.0 if math.isnan(error) else 2 * error)
    _say(row, f"{what} {mean:{form}} ± {error:{form[1:]}} beside llama.cpp's", is_met)
    return is_met


def _say(row: Found, text: str, is_met: bool) -> None:
    print(f"{'met' if is_met else 'NOT MET'}: {row.label}: {text}")


if __name__ == "__main__":
    main()
