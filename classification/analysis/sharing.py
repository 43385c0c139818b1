"""Reports that may be passed on: without images, ids of images, studies and patients, and paths of this machine."""

import re
from pathlib import PurePath

# A path of two parts or more that begins with /, a drive, ~, . or .., in a sentence; its last part. Not a web address.
PART = r"[^\s\\/:;,'\"()<>]+"
PATH = re.compile(rf"(?<![\w./:-])(?:[A-Za-z]:)?(?:(?:~\w*|\.{{1,2}})[\\/]|[\\/]{PART}[\\/])(?:{PART}[\\/])*({PART})")
KEYS = {"checkpoint", "checkpoints", "root", "path", "DATA_PATH", "CSV", "PRETRAINED", "RESUME", "OUTPUT", "RESULTS"}


def _paths_in(content, of_path=False):
    """The values below KEYS in a nested content."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _paths_in(value, of_path or key in KEYS)
    elif isinstance(content, list):
        for value in content:
            yield from _paths_in(value, of_path)
    elif of_path and isinstance(content, str):
        yield content


def without_paths(content, evaluations, tables=()):
    """`content`, nested dictionaries and lists, with every path in its texts and keys cut to its last part.

    evaluations: those of the report, whose paths may be relative or have blanks; tables: further files.
    """
    known = {str(t) for t in tables}
    for e in evaluations:
        known |= {e.given, str(e.path), str(e.test.path), str(e.path.resolve()), *_paths_in(e.metrics)}
        known |= {str(e.validate.path)} if e.validate is not None else set()
        known |= set(e.metrics.get("ensemble") or [])
    known = sorted((k for k in known if re.search(r"[\\/]", k) and PurePath(k).name), key=len, reverse=True)
    names = {path: PurePath(path.replace("\\", "/")).name for path in known}

    def cut(text):
        for path, name in names.items():
            text = text.replace(path, name)
        return PATH.sub(r"\1", text)

    def walk(value):
        if isinstance(value, dict):
            found = {}
            for key, v in value.items():
                name = cut(key)
                found[name if name not in found else f"{name} ({len(found) + 1})"] = walk(v)
            return found
        return [walk(v) for v in value] if isinstance(value, list) else cut(value) if isinstance(value, str) else value

    return walk(content)
