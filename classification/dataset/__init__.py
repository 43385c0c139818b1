"""Data sets. Only what is asked for is imported: tables can be read without torch."""


def __getattr__(name):
    if name != "MIMICCXRDataset":
        raise AttributeError(f"module 'dataset' has no attribute {name!r}")
    from dataset.mimic_cxr import MIMICCXRDataset

    return MIMICCXRDataset
