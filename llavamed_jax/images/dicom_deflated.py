"""Bounds DICOM files that are deflated as a whole: pydicom inflates them without a limit."""

from __future__ import annotations

import itertools
import zlib
from typing import BinaryIO

from llavamed_jax.errors import UserError

MAX_DEFLATED, MAX_INFLATED = 2**20, 2**28  # bytes of such a file, and of what it inflates to


def check_deflated(file: BinaryIO, name: str) -> None:
    """Raises UserError for a deflated file that is too large, or would be: pydicom inflates such files as a whole.

    The file's beginning is read as `dcmread` reads it (pydicom 3.0), so that the syntax is found wherever it stands.
    """
    from pydicom import filereader, uid

    def read_group(number, is_implicit):
        return filereader.read_dataset(file, is_implicit, True, stop_when=lambda tag, *_: tag >> 16 != number)

    file.seek(0)
    filereader.read_preamble(file, force=True)
    begin = file.tell()
    meta = read_group(2, is_implicit=False)
    try:
        for element in itertools.islice(meta.elements(), 1):
            meta[element.tag]  # decodes it
    except NotImplementedError:  # `dcmread` then takes the elements for implicit ones
        file.seek(begin)
        meta = read_group(2, is_implicit=True)
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return
    read_group(0, is_implicit=True)
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
