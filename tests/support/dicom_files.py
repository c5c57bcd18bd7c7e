"""DICOM files of known values, uncompressed, in memory."""

import io

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom, the extra [medical], is not installed")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage  # noqa: E402

from llavamed_jax.images.load import load_image  # noqa: E402

RAMP = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)
HOUNSFIELD = dict(RescaleSlope=1, RescaleIntercept=-1024)


def dataset(values, interpretation="MONOCHROME2", bits=None, frames=None, syntax=ExplicitVRLittleEndian, **elements):
    """An uncompressed image of the stored values [H,W], [H,W,3] or [frames,H,W]; an element None is present and empty."""
    values = np.asarray(values)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = Dataset()
    ds.file_meta, ds.SOPClassUID, ds.SOPInstanceUID = meta, SecondaryCaptureImageStorage, "1.2.3"
    shape = values.shape[1:] if frames else values.shape
    ds.Rows, ds.Columns, ds.SamplesPerPixel = shape[0], shape[1], shape[2] if len(shape) == 3 else 1
    if ds.SamplesPerPixel > 1:
        ds.PlanarConfiguration = 0
    if frames:
        ds.NumberOfFrames = frames
    ds.PhotometricInterpretation, ds.BitsAllocated = interpretation, 8 * values.dtype.itemsize
    if values.dtype.kind == "f":
        keyword = {32: "FloatPixelData", 64: "DoubleFloatPixelData"}[ds.BitsAllocated]
        setattr(ds, keyword, values.tobytes())
    else:
        ds.PixelRepresentation, ds.BitsStored = int(values.dtype.kind == "i"), bits or ds.BitsAllocated
        ds.HighBit = ds.BitsStored - 1
        order = values.dtype.newbyteorder("<" if syntax.is_little_endian else ">")
        ds.PixelData = values.astype(order).tobytes() + b"\0" * (values.nbytes % 2)
        ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 and not syntax.is_implicit_VR else "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def encoded(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def shown(ds, frame=None):
    """What is shown of a data set or of an encoded file, as grey int [H,W]."""
    return np.asarray(load_image(ds if isinstance(ds, bytes) else encoded(ds), frame))[..., 0].astype(int)
