"""What writes TensorBoard's event files: tensorboardX, imported without torch.

tensorboardX imports torch where it is installed, only to know its tensors by their class. Nothing here gives it one,
and the import of torch takes seconds at the start of a training run and at the end of an evaluation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Lets `import NAME` fail as if the package were not installed, unless it is imported already."""
    is_imported = name in sys.modules
    if not is_imported:
        sys.modules[name] = None
    try:
        yield
    finally:
        if not is_imported:
            del sys.modules[name]


with _without("torch"):
    from tensorboardX import SummaryWriter, summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

__all__ = ["Event", "EventsWriter", "SessionLog", "Summary", "SummaryWriter", "summary"]
