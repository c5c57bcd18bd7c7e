"""Image files, DICOM included, to the pixels that a vision tower takes."""
