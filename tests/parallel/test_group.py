"""Where the processes of a group listen."""

import os
import subprocess
import sys

import pytest

JOIN = """
import sys
from pathlib import Path
import torch
from pellucid.parallel.group import join
group = join(0, 1, Path(sys.argv[1]), torch.device("cpu"))
torch.distributed.all_reduce(x := torch.ones(2))
print(x.sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the name of the loopback interface")
def test_an_interface_that_is_set_for_several_machines_is_not_listened_on(tmp_path):
    """One that does not exist: whoever asked for it would fail."""
    done = subprocess.run([sys.executable, "-c", JOIN, str(tmp_path)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"})
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
