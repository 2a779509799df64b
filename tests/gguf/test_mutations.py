"""A corrupt model file raises a PhiError or runs; it never raises another exception or crashes."""

from collections import Counter
from pathlib import Path

import pytest

from mutate import mutations, small_counts
from one_token import run_one_token
from phi_c.gguf.reader import GGUFFile
from tiny_gguf import write_tiny


@pytest.mark.parametrize(
    ("architecture", "weight_type"),
    [
        ("phi3", "Q8_0"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("phi3", "F32"), ("llama", "F16"), ("llama", "Q8_0"))
        ),
    ],
)
def test_500_corrupt_files_raise_phi_error_or_run(tmp_path: Path, architecture: str, weight_type: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, architecture=architecture, weight_type=weight_type, seed=1)
    assert run_one_token(path) == "ran"
    with GGUFFile(path) as file:
        header_bytes = file.data_offset
    corrupt = tmp_path / "corrupt.gguf"
    outcomes: Counter[str] = Counter()
    for i, data in enumerate(mutations(path.read_bytes(), header_bytes, seed=7, n=500)):
        corrupt.write_bytes(data)
        try:
            outcomes[run_one_token(corrupt)] += 1
        except Exception as error:
            saved = tmp_path / f"mutation-{i}.gguf"
            saved.write_bytes(data)
            raise AssertionError(f"mutation {i} ({saved}) raised {error!r}") from error
    # Both outcomes occur: corruption that is detected, and corruption of names and tokens that is not.
    assert outcomes["ModelFileError"] > 100
    assert outcomes["UnsupportedModelError"] > 0
    assert outcomes["ran"] > 10


class TestMutate:
    DATA = bytes(range(1, 201)) + (5).to_bytes(8, "little") + bytes(range(200)) * 3

    def test_the_same_seed_gives_the_same_copies(self) -> None:
        first = list(mutations(self.DATA, 208, seed=1, n=40))
        assert first == list(mutations(self.DATA, 208, seed=1, n=40))
        assert first != list(mutations(self.DATA, 208, seed=2, n=40))
        assert len(first) == 40

    def test_only_the_header_is_changed(self) -> None:
        copies = list(mutations(self.DATA, 208, seed=3, n=400))
        whole = [copy for copy in copies if len(copy) == len(self.DATA)]
        assert len(whole) == 300
        assert all(copy[208:] == self.DATA[208:] for copy in whole)
        assert sum(copy != self.DATA for copy in whole) > 290
        cut = [copy for copy in copies if len(copy) < len(self.DATA)]
        assert all(self.DATA.startswith(copy) for copy in cut)
        assert any(len(copy) > 208 for copy in cut) and any(len(copy) < 208 for copy in cut)

    def test_small_counts_are_found(self) -> None:
        assert small_counts(self.DATA, 208) == [
            199,
            200,
        ]  # from 199 the byte before the count makes another small number
