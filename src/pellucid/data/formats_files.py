"""A dataset's files, wherever they are, as a stream of typed records.

    data = open_data("pairs.jsonl")                       one file
    data = open_data("data/ultrafeedback", split="test")  a folder as the Hub has it (or `datasets` saved it)
    data = open_data("trl-lib/ultrafeedback_binarized")   a Hub id: its files are fetched once and kept
    print(data.format)                                    preference, conversational (the columns chosen, rejected; ...)
    for record in data: ...

Files are read as they are iterated over, again each time; nothing is held but the current piece of a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pellucid import events
from pellucid.data.formats import FORMS, Format, Kind, Record, convert, recognise, record_of
from pellucid.data.records import records_of
from pellucid.errors import BadInput
from pellucid.messages import add, three_parts

add({
    "error.no_data": ("there is no file or folder {path}", "没有文件或目录 {path}"),
    "error.no_data.next": ("check the path given to --data, or give a Hub id such as trl-lib/tldr",
                           "检查 --data 的路径，或给出 Hub id，如 trl-lib/tldr"),
})
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".arrow")
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation"),
          "validation": ("validation", "valid", "val", "dev")}  # the words by which the Hub knows them
LOOKED_AT = 64  # rows by which a format is recognised
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json", "config.json", "dataset_infos.json"}


@dataclass
class DataFound(events.Event):
    """What a dataset was found to be."""

    kind = "data_found"
    source: str
    format: str
    why: str
    files: int


class Data:
    """A dataset: `format`, and its records, streamed anew for each loop over it.

    bad: what happens to a row that is not as it should be: "refuse" stops with BadInput that names file, row, what is
    wrong and what is expected; "skip" leaves it out, counts it in `skipped` and says so at the end.
    """

    def __init__(self, files: list[Path], name: str, wanted: Kind | None = None, bad: Literal["refuse", "skip"] = "refuse"):
        self.files, self.name, self.bad, self.skipped = files, name, bad, 0
        self.found = self._recognise()
        list(convert((), self.found, wanted or self.found.kind))  # what cannot be converted is refused here
        self.wanted: Kind = wanted or self.found.kind

    @property
    def format(self) -> Format:
        """The format that was found; the records are in `wanted`."""
        return self.found

    def __iter__(self) -> Iterator[Record]:
        self.skipped = 0
        for file in self.files:
            for place, row in _rows(file):
                try:
                    yield from convert([record_of(row, self.found)], self.found, self.wanted)
                except BadInput:
                    raise
                except ValueError as error:
                    self._bad_row(file, place, error)
        if self.skipped:
            events.note(f"{self.name}: {self.skipped} rows left out", "warning")

    def _bad_row(self, file: Path, place: str, error: ValueError) -> None:
        what = f"{file}, {place}: {error}"
        if self.bad == "refuse":
            raise BadInput(what, f"the dataset is {self.found}", f"a row is {FORMS[self.found.kind]}; mend it, or leave "
                           "such rows out with bad='skip'") from None
        self.skipped += 1
        if self.skipped == 1:
            events.note(f"{what}; such rows are left out", "warning")

    def _recognise(self) -> Format:
        """From the first rows together: a column may be null in one of them."""
        columns: dict[str, Any] = {}
        rows = list(islice((row for file in self.files for _, row in _rows(file)), LOOKED_AT))
        for row in rows:
            if isinstance(row, dict):
                columns = {**{name: value for name, value in row.items() if value is not None}, **columns}
        if not rows:
            raise BadInput(f"{self.name} is empty", f"{len(self.files)} files hold no row", "give at least one row")
        try:
            found = recognise(columns)
        except ValueError as error:
            forms = "".join(f"\n        {kind}: {form}" for kind, form in FORMS.items())
            raise BadInput(f"the format of {self.name} cannot be told", str(error), f"a row is one of{forms}") from None
        events.emit(DataFound(self.name, found.kind, found.why, len(self.files)))
        events.note(f"{self.name}: {found}")
        return found


def open_data(source: str | Path, split: str = "train", *, config: str | None = None, wanted: Kind | None = None,
              bad: Literal["refuse", "skip"] = "refuse") -> Data:
    """The dataset at a file, a folder or a Hub id (downloaded once; offline mode is respected).

    split: which part of a folder; files that name no split are "train".  config: which subset, where a folder holds
    several.  wanted: the format that the records shall come in (a preference pair can be unpaired, ...).
    Errors: BadInput for what is missing, ambiguous, of no known format, or not convertible.
    """
    path = Path(source)
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise BadInput(f"{path} is no data file", f"its name ends in {path.suffix or 'nothing'}",
                           f"known are {', '.join(SUFFIXES)}")
        return Data([path], path.name, wanted, bad)
    folder = path if path.is_dir() else _from_hub(str(source))
    return Data(files_of_split(folder, split, config, str(source)), str(source), wanted, bad)


def files_of_split(folder: Path, split: str, config: str | None, name: str) -> list[Path]:
    """The data files of one split and subset of a dataset's folder, in order of their names."""
    files = sorted(f for f in folder.rglob("*") if f.name.lower().endswith(SUFFIXES) and f.is_file()
                   and f.name not in NOT_DATA and not any(part.startswith(".") for part in f.relative_to(folder).parts))
    if not files:
        raise BadInput(f"{name} holds no data files", f"none ends in {', '.join(SUFFIXES)}", "give another folder or file")
    by_config: dict[str, list[Path]] = {}
    for file in files:
        by_config.setdefault(_config_of(file.relative_to(folder)), []).append(file)
    if config is None and len(by_config) > 1:
        raise BadInput(f"{name} holds several datasets", f"they are {', '.join(sorted(by_config))}", "choose one with config=")
    if config is not None and config not in by_config:
        raise BadInput(f"{name} has no subset {config!r}", f"there are {', '.join(sorted(by_config))}", "choose one of these")
    by_split: dict[str, list[Path]] = {}
    for file in files if config is None else by_config[config]:
        by_split.setdefault(_split_of(file.relative_to(folder).as_posix(), split), []).append(file)
    if split not in by_split:
        raise BadInput(f"{name} has no split {split!r}", f"there are {', '.join(sorted(by_split))}", "choose one of these")
    chosen = by_split[split]
    kinds = {file.suffix for file in chosen}
    if len(kinds) > 1 and ".parquet" in kinds:  # the same rows twice: as uploaded, and as the Hub converted them
        events.note(f"{name}: of its {', '.join(sorted(kinds))} files, the .parquet ones are read")
        chosen = [file for file in chosen if file.suffix == ".parquet"]
    return chosen


def _split_of(path: str, wanted: str) -> str:
    """The split that a path names: NAME in the Hub's own NAME-00000-of-00003.parquet, else the last word that is known
    as a split (or is the wanted one), else "train"."""
    known = {word: split for split, synonyms in SPLITS.items() for word in synonyms}
    shard = re.search(r"(\w+)-\d{5}-of-\d{5}", path)
    if shard and shard[1] != "data":
        return known.get(shard[1].lower(), shard[1])
    if re.search(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9])", path, re.IGNORECASE):
        return wanted
    return next((known[word] for word in re.findall(r"[a-z0-9]+", path.lower())[::-1] if word in known), "train")


def _config_of(relative: Path) -> str:
    """The folders above a file that name neither a split nor just `data`."""
    plain = {"data", *(word for words in SPLITS.values() for word in words)}
    return "/".join(part for part in relative.parts[:-1] if part.lower() not in plain) or "default"


def _from_hub(name: str) -> Path:
    looks_local = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") != 1 or name.endswith(SUFFIXES)
    if looks_local:
        raise BadInput(*three_parts("error.no_data", path=name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"no folder {name!r} here, and the Hub gave no dataset", str(error).split("\n")[0],
                       "check the name and the network, or give a local file or folder") from error


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from records_of(file)
    except OSError as error:
        raise BadInput(f"cannot read {file}", error.strerror or str(error), "check the file and its rights") from error
