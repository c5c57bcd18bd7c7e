"""What writes TensorBoard's event files: tensorboardX, imported without what it needs for other purposes.

Where they are installed, tensorboardX imports torch, only to know its tensors by their class, and clients of S3 and of
Google's storage, to write to a bucket. Nothing here gives it a tensor of torch, and folders of events lie on a disk.
These imports would take seconds at the start of a training run and at the end of an evaluation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_NOT_NEEDED = ("torch", "boto3", "google.cloud.storage")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Lets imports of the packages fail as if they were not installed, unless they are imported already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _without(*_NOT_NEEDED):
    from tensorboardX import SummaryWriter, summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

__all__ = ["Event", "EventsWriter", "SessionLog", "Summary", "SummaryWriter", "summary"]
