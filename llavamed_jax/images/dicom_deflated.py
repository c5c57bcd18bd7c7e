"""Bounds DICOM files that are deflated as a whole: pydicom inflates them without a limit."""

from __future__ import annotations

import zlib
from typing import BinaryIO

from llavamed_jax.errors import UserError

MAX_DEFLATED, MAX_INFLATED = 2**20, 2**28  # bytes of such a file, and of what it inflates to


def check_deflated(file: BinaryIO, name: str) -> None:
    """Raises UserError for a deflated file that is too large, or would be: pydicom inflates such files as a whole.

    The functions with which `dcmread` reads a file's beginning (pydicom 3.0) find the syntax wherever it stands.
    """
    from pydicom import filereader, uid

    file.seek(0)
    filereader.read_preamble(file, force=True)
    syntax = filereader._read_file_meta_info(file).get("TransferSyntaxUID")
    if syntax != uid.DeflatedExplicitVRLittleEndian:
        return
    filereader._read_command_set_elements(file)
    start, size = file.tell(), file.seek(0, 2)
    if size > MAX_DEFLATED:
        raise UserError(f"{name} is a deflated file of {size} bytes; at most {MAX_DEFLATED} were expected")
    file.seek(start)
    inflater, deflated, count = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), 0
    while deflated and not inflater.eof:
        count += len(inflater.decompress(deflated, 2**20))
        deflated = inflater.unconsumed_tail
        if count > MAX_INFLATED:
            raise UserError(f"{name} is a deflated file of more than {MAX_INFLATED} bytes; at most these were "
                            "expected")
