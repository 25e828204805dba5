"""The demo, as a newcomer runs it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import COMMAND

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_demo_reads_a_file_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "my 'own' $orders;.csv"
    shutil.copy(ROOT / "examples" / "orders.csv", file)
    relative = os.path.relpath(file, ROOT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CPAN_BRIDGE_")}
    done = subprocess.run(
        # As it is installed now: --old-file keeps make from installing anything.
        ["make", "--old-file=.venv/.installed", "demo", f"FILE={relative}"],
        cwd=ROOT,
        env=environment | {"PATH": f"{Path(COMMAND).parent}:{environment['PATH']}"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SALES REPORT of {relative}" in done.stdout
    assert "118 orders, 12 rows rejected" in done.stdout
