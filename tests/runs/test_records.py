"""A run is a record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pe_swap.runs.records import RECORD, environment, fingerprint, flush_denormals, read_record, write_record


def test_a_record_comes_back_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_record(tmp_path / "run", {"status": "running"})
    write_record(tmp_path / "run", {"status": "done", "path": tmp_path})
    assert read_record(tmp_path / "run") == {"status": "done", "path": str(tmp_path)}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RECORD]


def test_a_missing_or_broken_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text('{"status": "do')
    assert read_record(tmp_path) is None


def test_a_fingerprint_is_of_content_and_not_of_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_the_environment_names_versions_commit_and_device() -> None:
    found = environment()
    assert {"python", "torch", "transformers", "pe-swap"} <= found["versions"].keys()
    assert {"commit", "uncommitted_changes", "device"} <= found.keys()
    assert found["flushes_denormals"] is False
    flush_denormals()
    try:
        assert environment()["flushes_denormals"] is True
    finally:
        torch.set_flush_denormal(False)


def test_a_record_is_json_whatever_its_numbers(tmp_path: Path) -> None:
    def refused(name: str) -> None:
        raise AssertionError(name)

    numbers = {"loss": float("nan"), "log": [{"loss": float("inf")}], "pair": (-float("inf"), 1.5)}
    write_record(tmp_path, numbers)
    found = json.loads((tmp_path / RECORD).read_text(), parse_constant=refused)
    assert found == {"loss": None, "log": [{"loss": None}], "pair": [None, 1.5]}


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe"])
def test_a_record_that_is_no_mapping_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(content)
    assert read_record(tmp_path) is None
