"""What a person may set of the main job. One dial, `minutes`; everything else is derived from it and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pellucid.errors import BadInput

SHORTEST, LONGEST = 1.0, 24 * 60.0  # minutes


@dataclass(frozen=True)
class GrowConfig:
    """The resolved settings of a job. The command line (cli/grow.py) and Python fill the same fields."""

    minutes: float = 8.0
    out: Path = Path("runs/grow")
    model: str | None = None
    corpus: Path | None = None
    data: Path | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    resume: bool = False
    lang: str = "en"

    def __post_init__(self) -> None:
        if not SHORTEST <= self.minutes <= LONGEST:
            raise BadInput(f"--minutes {self.minutes:g} is not possible", f"the job needs {SHORTEST:g} to {LONGEST:g}",
                           "leave it out for 8 minutes")
        for name, path in (("--corpus", self.corpus), ("--data", self.data)):
            if path is not None and not path.exists():
                raise BadInput(f"{name} {path} does not exist", next="check the path, or leave it out")
        if self.data is not None and self.data.is_dir():
            raise BadInput(f"--data {self.data} is a folder", "it must be one JSONL file of conversations",
                           "give raw text with --corpus, conversations with --data")

    @property
    def command(self) -> str:
        """The command line that repeats this job."""
        options = [f"--minutes {self.minutes:g}", f"--out {self.out}", f"--seed {self.seed}"]
        options += [f"--model {self.model}"] if self.model else []
        options += [f"--corpus {self.corpus}"] if self.corpus else []
        options += [f"--data {self.data}"] if self.data else []
        return " ".join(["pellucid grow", *options])
