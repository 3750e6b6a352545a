"""tests/conftest.py: under CI a skip is a failure, unless it is for the missing GPU; elsewhere it is only a skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "skip": "import pytest\ndef test_x():\n    pytest.skip('part missing')\n",
    "skipif": "import pytest\n@pytest.mark.skipif(True, reason='no')\ndef test_x():\n    pass\n",
    "importorskip": "import pytest\npytest.importorskip('no_such_module')\ndef test_x():\n    pass\n",
    "gpu": "import pytest\n@pytest.mark.gpu\ndef test_x():\n    import torch\n    assert torch.cuda.is_available()\n",
    "xfail": "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_x():\n    assert False\n",
    "pass": "def test_x():\n    pass\n",
}


@pytest.mark.parametrize(("case", "ci", "fails"), [
    ("skip", True, True), ("skipif", True, True), ("importorskip", True, True), ("gpu", True, False),
    ("xfail", True, False), ("pass", True, False), ("skip", False, False), ("importorskip", False, False)])
def test_skips(tmp_path: Path, case: str, ci: bool, fails: bool):
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_case.py").write_text(CASES[case])
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    environment = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", tmp_path],
                          cwd=tmp_path, env=environment | ({"CI": "true"} if ci else {}), capture_output=True, text=True)
    # pytest: 0 all well, 5 nothing ran (a skipped file), 1 a test failed, 2 a file failed
    assert done.returncode in ((1, 2) if fails else (0, 5)), done.stdout
