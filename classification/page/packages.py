"""The packages of npm that the page needs, taken from npm or from the user's disk; none of them is in this project."""

import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from common.errors import UserError, reason

RUNTIME = "onnxruntime-web"
FIRST = (1, 30)  # of it with the operator DeformConv
WASM = "dist/ort-wasm-simd-threaded"
# Package -> (version that was tried, its files here, what is read by them).
PACKAGES = {
    RUNTIME: ("1.30.0", ["dist/ort.wasm.min.js", f"{WASM}.mjs", f"{WASM}.wasm"], ""),
    "dicom-parser": ("1.8.21", ["dist/dicomParser.min.js"], "DICOM"),
    "@cornerstonejs/codec-openjpeg": ("1.3.6", [f"dist/openjpegwasm_decode.{e}" for e in ("js", "wasm")], "JPEG 2000"),
    "@cornerstonejs/codec-charls": ("1.2.7", [f"dist/charlswasm_decode.{e}" for e in ("js", "wasm")], "JPEG-LS"),
    "jpeg-lossless-decoder-js": ("2.1.2", ["release/lossless-min.js"], "JPEG Lossless"),
}
NAMED = " ".join(f"{name}@{version}" for name, (version, _, _) in PACKAGES.items())
LICENCE = Path(__file__).parents[2] / "LICENSE"  # the text of MIT, with a holder of its own


def take_packages(sources):
    """{path in the folder: bytes} of the packages' files and licences, and the names of the packages that are missing.

    sources: folders and tarballs that hold packages; empty: they are downloaded by npm.

    Raises:
        UserError: no npm, no network, or a source without a fitting onnxruntime-web.
    """
    if sources:
        return _collect([path for source in sources for path in _places(Path(source))], sources)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", *NAMED.split()], cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", "") or "").splitlines()
            why = next((line for line in lines if "code" in line), reason(error))
            raise UserError(
                f"npm cannot download the packages of the page ({why}): install Node.js, or run `npm pack {NAMED}` "
                "on a machine with npm and a network, and give the folder of its files with --runtime"
            ) from error
        return _collect(sorted(Path(folder).glob("*.tgz")), ["npm"])


def _places(source):
    """Where packages may be in a source: it and its subfolders, of a package its neighbours as well, and tarballs."""
    if not source.exists():
        raise UserError(f"--runtime {source} does not exist; give a folder or tarball of npm's {RUNTIME}")
    folders = [source, source.parent] if (source / "package.json").exists() else [source]
    patterns = ("", "*", "@*/*", "node_modules/*", "node_modules/@*/*")
    return [
        path for folder in folders for pattern in patterns for path in (folder.glob(pattern) if pattern else [folder])
    ]


def _open(path):
    """{name in the package: bytes} of the files that are of use; {} for what is no package."""
    wanted = {file for _, files, _ in PACKAGES.values() for file in files}
    top = re.compile(r"(package\.json|README.*|(LICEN[SC]E|NOTICE|ThirdParty).*)", re.IGNORECASE)
    if path.is_dir():
        if not (path / "package.json").is_file():
            return {}
        files = [p for p in (*path.iterdir(), *(path / f for f in wanted)) if p.is_file()]
        return {n: p.read_bytes() for p in files if (n := p.relative_to(path).as_posix()) in wanted or top.fullmatch(n)}
    try:
        with tarfile.open(path) as tar:
            members = {m.name.partition("/")[2]: m for m in tar if m.isfile()}
            return {n: tar.extractfile(m).read() for n, m in members.items() if n in wanted or top.fullmatch(n)}
    except (OSError, tarfile.TarError):
        return {}


def _collect(places, sources):
    found = {}
    for content in map(_open, places):
        about = json.loads(content.get("package.json", "{}"))
        name = about.get("name")
        if name not in PACKAGES or name in found or set(PACKAGES[name][1]) - set(content):
            continue
        if name == RUNTIME and tuple(int(part) for part in about["version"].split(".")[:2]) < FIRST:
            raise UserError(f"--runtime: {RUNTIME} {about['version']} has no DeformConv; give 1.30 or later")
        folder = f"runtime/{name.rpartition('/')[2]}"
        found[name] = {f"{folder}/{Path(file).name}": content.pop(file) for file in PACKAGES[name][1]}
        content = {n: data for n, data in content.items() if "/" not in n}
        if not any(n.upper().startswith("LICEN") for n in content):
            content["LICENSE"] = _licence(about, found[name]).encode()
        found[name] |= {f"{folder}/{n}": data for n, data in content.items()}
    if RUNTIME not in found:
        raise UserError(
            f"--runtime {' '.join(map(str, sources))} holds no {RUNTIME}; give the folder or tarball of npm's package"
        )
    return {path: data for files in found.values() for path, data in files.items()}, [
        n for n in PACKAGES if n not in found
    ]


def _licence(about, files):
    """The licence of a package that names MIT without its text: the holder by its own file, or its package.json."""
    text = next(iter(files.values())).decode(errors="replace")
    holder = re.search(r"Copyright \(c\) [^\n*]+", text)
    holder = holder[0].strip() if holder else f"Copyright (c) the authors of {about.get('homepage') or about['name']}"
    head = f"{about['name']} {about['version']}: licence {about.get('license')}, by its package.json\n\n{holder}\n\n"
    return head + LICENCE.read_text().partition("Permission")[1] + LICENCE.read_text().partition("Permission")[2]
