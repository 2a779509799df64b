"""Damaged model files end in a PhiError or run; nothing else comes out, whatever was hit."""

from collections import Counter
from pathlib import Path

import pytest

from mutate import mutations, small_counts
from one_token import run_one_token
from phi_c.gguf.reader import GGUFFile
from tiny_gguf import write_tiny


@pytest.mark.parametrize(
    ("architecture", "weight_type"), [("phi3", "F32"), ("phi3", "Q8_0"), ("llama", "F16"), ("llama", "Q8_0")]
)
def test_500_damaged_files(tmp_path: Path, architecture: str, weight_type: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, architecture=architecture, weight_type=weight_type, seed=1)
    assert run_one_token(path) == "ran"
    with GGUFFile(path) as file:
        header_bytes = file.data_offset
    damaged = tmp_path / "damaged.gguf"
    outcomes: Counter[str] = Counter()
    for i, data in enumerate(mutations(path.read_bytes(), header_bytes, seed=7, n=500)):
        damaged.write_bytes(data)
        try:
            outcomes[run_one_token(damaged)] += 1
        except Exception as error:
            kept = tmp_path / f"mutation-{i}.gguf"
            kept.write_bytes(data)
            raise AssertionError(f"mutation {i} ({kept}) raised {error!r}") from error
    # Both sides of the reader were tried: damage that shows, and damage to names and tokens that does not.
    assert outcomes["ModelFileError"] > 100
    assert outcomes["UnsupportedModelError"] > 0
    assert outcomes["ran"] > 10


class TestMutate:
    DATA = bytes(range(1, 201)) + (5).to_bytes(8, "little") + bytes(range(200)) * 3

    def test_same_seed_same_copies(self) -> None:
        first = list(mutations(self.DATA, 208, seed=1, n=40))
        assert first == list(mutations(self.DATA, 208, seed=1, n=40))
        assert first != list(mutations(self.DATA, 208, seed=2, n=40))
        assert len(first) == 40

    def test_damage_stays_in_the_header(self) -> None:
        copies = list(mutations(self.DATA, 208, seed=3, n=400))
        whole = [copy for copy in copies if len(copy) == len(self.DATA)]
        assert len(whole) == 300
        assert all(copy[208:] == self.DATA[208:] for copy in whole)
        assert sum(copy != self.DATA for copy in whole) > 290
        cut = [copy for copy in copies if len(copy) < len(self.DATA)]
        assert all(self.DATA.startswith(copy) for copy in cut)
        assert any(len(copy) > 208 for copy in cut) and any(len(copy) < 208 for copy in cut)

    def test_counts_are_found(self) -> None:
        assert small_counts(self.DATA, 208) == [199, 200]  # with the byte before, it reads as a number too
