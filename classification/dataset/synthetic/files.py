"""A synthetic image -> an image file, in the formats of the releases. See `dataset.synthetic`.

`SAVERS` holds them by name: functions of (path, picture float32 [H, W], row of the image). But for `hospital`, whose
values go beyond what is displayed, every format shows the same gray values: those of the decoded JPG.
"""

import io

import numpy as np
from PIL import Image


def jpg_bytes(picture):
    buffer = io.BytesIO()
    Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def shown(picture):
    """What the JPG of an image shows: uint8 [H, W]."""
    with Image.open(io.BytesIO(jpg_bytes(picture))) as image:
        return np.asarray(image)


def save_dicom(path, picture, row):
    """Stored values and a window that shows exactly the gray values of the JPG; it has nothing about the patient."""
    ds = header(row.image, row.image)
    ds.PatientSex, ds.PatientAge = row.sex, f"{row.age:03d}Y"
    rng = np.random.default_rng([row.image_seed, 1])
    grey, inverse, bits = shown(picture).astype(int), rng.random() < 0.5, int(rng.choice([12, 14, 16]))
    step = 2 ** (bits - 8)
    ds.WindowCenter, ds.WindowWidth = 255 * step / 2 + 0.5, 255 * step + 1  # PS3.3 C.11.2.1.2: from 0 to 255 steps
    put_pixels(ds, (255 - grey if inverse else grey) * step, inverse, bits)
    _finish(ds, path, rng)


def save_hospital(path, picture, row):
    """The image as a digital X-ray, in one of the forms found in hospitals."""
    rng = np.random.default_rng([row.image_seed, 1])
    ds = header(row.dicom_id, row.study_id)
    ds.PatientID, ds.PatientName, ds.StudyID = str(row.subject_id), "SYNTHETIC^CHEST", str(row.study_id)
    ds.BodyPartExamined, ds.ViewPosition = "CHEST", row.view
    ds.StudyDate, ds.StudyTime = str(row.date), f"{row.time:06d}"
    store_pixels(ds, picture, rng)
    _finish(ds, path, rng)


SAVERS = {
    "jpg": lambda path, picture, row: path.write_bytes(jpg_bytes(picture)),
    "png": lambda path, picture, row: Image.fromarray(shown(picture)).save(path),
    "rgba": lambda path, picture, row: Image.fromarray(shown(picture)).convert("RGBA").save(path),  # opaque
    # 0 to 255 as 0 to 65535: equal to the JPG however it is read back, by its type's range or by its own from black to
    # white (nearly all images have both).
    "png16": lambda path, picture, row: Image.fromarray(shown(picture).astype(np.uint16) * 257).save(path),
    "dicom": save_dicom,
    "hospital": save_hospital,
}


def header(image, study):
    """A DICOM data set with the ids that belong to these names."""
    import pydicom  # here, so that other trees need no pydicom
    from pydicom.uid import generate_uid

    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"  # digital X-ray image, for presentation
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[image])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[image, "series"])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[str(study)])
    ds.Modality = "DX"
    return ds


def _finish(ds, path, rng):
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    kind = rng.random()
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if kind < 0.4 else ExplicitVRLittleEndian
    if kind > 0.9:
        ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def store_pixels(ds, picture, rng):
    """Stored values with photometric interpretation, bit depth and window or VOI LUT by chance. A viewer goes
    stored values -> window or LUT -> inversion for MONOCHROME1; here the values are worked out backwards."""
    inverse, bits = rng.random() < 0.5, int(rng.choice([12, 16]))
    voi, steps, displayed = rng.choice(["window", "lut", "none"], p=[0.5, 0.35, 0.15]), 2**bits, picture
    if inverse:
        displayed = 1 - displayed
    if voi == "window":  # it reaches less far than the values do: what is beyond is clipped on display
        width, centre = int(rng.uniform(0.50, 0.62) * steps), int(rng.uniform(0.46, 0.54) * steps)
        stored = centre - 0.5 + (displayed - 0.5) * (width - 1)
        ds.WindowCenter, ds.WindowWidth = centre, width
    elif voi == "lut":  # an S-shaped curve over 2048 values in the middle of the range, clipped on display as well
        first, t = steps // 2 - 1024, np.linspace(-1, 1, 2048) * rng.uniform(1.0, 1.8)
        lut = np.tanh(t) / np.tanh(t[-1]) * 0.5 + 0.5
        stored = first + np.interp(displayed, lut, np.arange(2048.0)) + 600 * (displayed - np.clip(displayed, 0, 1))
        item = type(ds)()
        item.add_new("LUTDescriptor", "US", [2048, first, 16])
        item.add_new("LUTData", "OW", np.round(lut * 65535).astype("<u2").tobytes())
        ds.VOILUTSequence = [item]
    else:
        stored = np.clip(displayed, 0, 1) * (steps - 1)
    put_pixels(ds, np.clip(np.round(stored), 0, steps - 1), inverse, bits)


def put_pixels(ds, stored, inverse, bits):
    """Stored values [H, W] of so many bits, in words of 16."""
    ds.PhotometricInterpretation = "MONOCHROME1" if inverse else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.Rows, ds.Columns = stored.shape
    ds.add_new("PixelData", "OW", stored.astype("<u2").tobytes())
