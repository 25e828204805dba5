"""Large requests that wait are in a file without a name, as far as there can be one."""

import os
from pathlib import Path

import pytest
from running_out import no_descriptors

from cpanbridge.workers.client import spool as spool_module
from cpanbridge.workers.client.spool import LARGE, spool, unspool


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FOLDER", str(tmp_path))
    data = os.urandom(LARGE + 1)
    file = spool(data)
    assert file is not None
    assert not list(tmp_path.iterdir())
    assert unspool(file) == data
    assert file.closed


def test_what_is_small_or_can_have_no_file_stays_in_memory() -> None:
    assert spool(bytes(LARGE - 1)) is None
    with no_descriptors():
        assert spool(bytes(LARGE)) is None
