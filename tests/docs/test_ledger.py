"""The ledger says what is true now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_ledger_is_up_to_date():
    script = Path(__file__).resolve().parents[2] / "docs" / "make_ledger.py"
    found = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr + "run: python docs/make_ledger.py"
