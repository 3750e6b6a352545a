"""The threads that share out a step (ops/native/team.cpp), by a program of their own: what is late or asleep shows only beside real work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pellucid.ops.native import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler was found")

PROGRAM = """
#include <unistd.h>
#include <atomic>
#include <cstdio>
#include "team.h"
using namespace pellucid;

int main() {
    auto job = [](const void*, const Crew& crew) {
        for (int part = 0; part < 4; part++) {
            // A long piece and a short one: whoever has the short one finds no work for far longer than it waits.
            crew.each(2, [](int64_t i, int) { usleep(i ? 100 : 60000); });
            std::atomic<int> pieces[3] = {};
            crew.each(60, [&](int64_t, int rank) { usleep(1000); pieces[rank]++; });
            std::printf("%d %d %d\\n", pieces[0].load(), pieces[1].load(), pieces[2].load());
        }
    };
    return run(3, 64, job, nullptr) ? 0 : 1;
}
"""


def test_who_has_slept_through_a_long_piece_helps_with_the_next_part(tmp_path: Path):
    """Helpers that slept until the next step left long prompts to one core."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    subprocess.run([build.compiler(), *build.FLAGS, f"-I{build.HERE}", str(tmp_path / "main.cpp"), str(build.HERE / "team.cpp"), "-o",
                    str(tmp_path / "team"), "-lpthread"], check=True, timeout=120)
    done = subprocess.run([tmp_path / "team"], capture_output=True, text=True, check=True, timeout=60)
    for line in done.stdout.splitlines():
        pieces = [int(n) for n in line.split()]
        assert sum(pieces) == 60 and min(pieces) > 0, done.stdout
    assert len(done.stdout.splitlines()) == 4
