"""Several processes as one: a rank's part of a model, collectives, and messages between processes."""

from pellucid.parallel.group import ALONE, Group
from pellucid.parallel.launch import Processes, RankDied
from pellucid.parallel.rounded import check_groups
from pellucid.parallel.split import Slice, check_split, part_spec
from pellucid.parallel.tensor import DecoderPart, load_part
from pellucid.parallel.wire import Channel, Gone, in_three

__all__ = ["ALONE", "Channel", "DecoderPart", "Gone", "Group", "Processes", "RankDied", "Slice", "check_groups", "check_split", "in_three", "load_part", "part_spec"]
