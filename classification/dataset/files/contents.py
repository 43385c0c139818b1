"""What a DICOM shows, by its header alone: a chest radiograph, as far as it says, something else, or no image.

SOP class, Modality and BodyPartExamined decide; a header that names none of them is given the benefit of the doubt.
"""

import io
import re
import warnings

import pydicom
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.uid import UID

from dataset.files.images import sniff

NO_IMAGE, NOT_CHEST = "no image", "not a chest radiograph"

# PS3.3 C.7.3.1.1.1
RADIOGRAPHS = {"CR", "DX", "DR", "RG", "XR", "RX", "OT", "SC"}  # other, secondary capture: it may well be one
WITHOUT_PIXELS = set(
    "ANN AR ASMT AU CFM DMS DOC ECG EEG EMG EOG EPS FID HD IOL KER KO LEN M3D OAM OPV OSS PLAN POS PR REG RESP RTDOSE "
    "RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SMR SR SRF STAIN TEXTUREMAP VA".split()
)
_RADIOGRAPH_CLASS = re.compile(r"^(Computed Radiography|Digital X-Ray) Image|Secondary Capture Image")
VIDEO = tuple(f"1.2.840.10008.1.2.4.10{k}" for k in range(9))  # transfer syntaxes: MPEG-2, MPEG-4, HEVC
DEFLATED = b"1.2.840.10008.1.2.1.99"  # 261 kB of it can inflate to 268 MB, and the decoder refuses it
_CHEST = re.compile(r"CHEST|TH?[OÓ]RA[XC]|LUNG|PULMON|CXR")
_ELSEWHERE = re.compile(r"SPINE|BREAST")
_UNKNOWN = ("", "UNKNOWN", "OTHER", "NONE", "N/A")


def read_header(data):
    """The elements of a DICOM that the functions here and `dataset.tools.listing` read; None for any other file."""
    if sniff(data) != "dcm":
        return None
    if DEFLATED in data[:1000]:
        return pydicom.Dataset()
    try:
        # The content is known to be DICOM; force: the preamble may be missing.
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True, specific_tags=TAGS)
    except Exception:  # whatever pydicom raises: reading the image reports it better
        return pydicom.Dataset()


TAGS = """
SOPClassUID SOPInstanceUID StudyID PatientID Modality BodyPartExamined AnatomicRegionSequence NumberOfFrames
ViewPosition ViewCodeSequence PerformedProcedureStepDescription
""".split()


def text_of(header, name):
    """An element as text; empty where it is absent, or its length or kind makes no sense."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = header.get(name)
            if isinstance(value, Sequence):
                return text_of(value[0], "CodeMeaning") if value else ""
    except Exception:  # whatever pydicom raises
        return ""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "").strip(" \0")


def find_content(header):
    """(NO_IMAGE, NOT_CHEST or "", what there is instead) by the header of a DICOM."""
    meta = getattr(header, "file_meta", {})
    uid = UID(text_of(header, "SOPClassUID") or text_of(meta, "MediaStorageSOPClassUID"))
    kind = re.sub(r" Storage( - .*)?$", "", uid.name) if uid.name != uid else ""
    modality = text_of(header, "Modality").upper()
    part = text_of(header, "BodyPartExamined").upper()
    if part in _UNKNOWN:
        part = text_of(header, "AnatomicRegionSequence").upper()
    elsewhere = part not in _UNKNOWN and (_ELSEWHERE.search(part) or not _CHEST.search(part))
    what = [kind] if kind and not _RADIOGRAPH_CLASS.search(kind) else []
    what += [f"Modality {modality}"] if modality and not RADIOGRAPHS & set(modality.split("\\")) else []
    what += [f"BodyPartExamined {part}"] if elsewhere else []
    frames = text_of(header, "NumberOfFrames")
    if kind.startswith("Video") or text_of(meta, "TransferSyntaxUID") in VIDEO:
        return NO_IMAGE, "a video"
    if what and frames not in ("", "0", "1"):
        return NO_IMAGE, f"several frames, {what[0]}"
    if (kind and not re.search(r"\bImage\b", kind)) or modality in WITHOUT_PIXELS:
        return NO_IMAGE, what[0]
    return (NOT_CHEST, what[0]) if what else ("", "")
