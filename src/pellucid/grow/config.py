"""What a person may set of the main job. One dial, `minutes`; everything else is derived from it and the machine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pellucid.errors import BadInput
from pellucid.grow import words  # noqa: F401  (its messages)
from pellucid.messages import default_language, three_parts

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
            raise BadInput(*three_parts("error.minutes", asked=f"{self.minutes:g}", least=SHORTEST, most=LONGEST))
        for name, path in (("--corpus", self.corpus), ("--data", self.data)):
            if path is not None and not path.exists():
                raise BadInput(*three_parts("error.missing", option=name, path=path))
        if self.data is not None and self.data.is_dir():
            raise BadInput(*three_parts("error.data_folder", path=self.data))

    @property
    def settings(self) -> list[str]:
        """The options that decide what the job is; a resumed job must have the same."""
        asked = f"{self.minutes:g}" if float(f"{self.minutes:g}") == self.minutes else repr(self.minutes)
        given = [("--minutes", asked), ("--out", self.out), ("--seed", self.seed), ("--model", self.model),
                 ("--corpus", self.corpus), ("--data", self.data)]
        return [word for option, value in given if value is not None for word in (option, str(value))]

    @property
    def command(self) -> str:
        """The command line that repeats this job, to be pasted into a shell: also how to run it, where that was asked for."""
        how = {"--threads": self.threads, "--device": None if self.device == "auto" else self.device,
               "--lang": None if self.lang == default_language() else self.lang}
        asked = [word for option, value in how.items() if value is not None for word in (option, str(value))]
        return shlex.join(["pellucid", "grow", *self.settings, *asked])
