"""Measurements survive interruptions, and are never taken for those of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lichen.errors import StoreError
from lichen.quant.ledger import Ledger, digest


def test_numbers_are_there_again(tmp_path: Path) -> None:
    Ledger(tmp_path, "a").put("kl x", 0.25)
    assert Ledger(tmp_path, "a").get("kl x") == 0.25
    assert Ledger(tmp_path, "b").get("kl x") is None


def test_without_a_folder_they_are_in_memory(tmp_path: Path) -> None:
    ledger = Ledger(None, "a")
    ledger.put("kl x", 0.25)
    assert ledger.get("kl x") == 0.25
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rest", ['["kl y", 0.', '["kl y"]', "[1, 2]", '["kl y", NaN]', "{}", '"', '["k", {}]']
)
def test_a_damaged_line_is_passed_over_and_spoils_no_other(tmp_path: Path, rest: str) -> None:
    Ledger(tmp_path, "a").put("kl x", 0.25)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + rest)
    Ledger(tmp_path, "a").put("kl z", 0.5)
    again = Ledger(tmp_path, "a")
    assert (again.get("kl x"), again.get("kl y"), again.get("kl z")) == (0.25, None, 0.5)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    Ledger(tmp_path, "a").put("kl x", 0.25)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match="Remove it"):
        Ledger(tmp_path, "a")


def test_parts_of_a_digest_do_not_run_into_each_other() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", b"c") == digest(b"ab", "c")
