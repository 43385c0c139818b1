"""Fetches published InternImage weights: `python download_weights.py FOLDER [FILE]`. Resumable and checked."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

from common.errors import UserError, reason, run_command
from common.files import sha256
from config import Parser

REPOSITORY = "OpenGVLab/InternImage"


def _checksum(path):
    with open(path, "rb") as file:
        return sha256(file)


def download(folder, name="internimage_b_1k_224.pth"):
    """The path of the file in `folder`, fetched if it is missing and compared with the publisher's SHA-256.

    UserError: a folder that cannot be written, no connection, or another checksum.
    """
    url = hf_hub_url(REPOSITORY, name)
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}); choose another one") from error
    try:
        expected = get_hf_file_metadata(url).etag  # of large files the store's etag is the SHA-256
        if not (path.exists() and _checksum(path) == expected):
            hf_hub_download(REPOSITORY, name, local_dir=folder)  # resumes an earlier try
    except Exception as error:  # of the network, of HTTP, of the disk: one remedy for all
        raise UserError(
            f"{url} cannot be downloaded ({reason(error)}); fetch it on a machine with a network and put it into "
            f"{folder}"
        ) from error
    if (found := _checksum(path)) != expected:
        path.unlink()
        raise UserError(f"{path} has the checksum {found}, expected {expected}; it was removed: download it again")
    return path


def main(argv=None):
    parser = Parser(description="Fetches published InternImage weights.")
    parser.add_argument("folder", help="where to put the file, such as pretrained")
    parser.add_argument(
        "file", nargs="?", default="internimage_b_1k_224.pth", help="its name (internimage_b_1k_224.pth)"
    )
    args = parser.parse_args(argv)
    print(f"setup: weights in {download(args.folder, args.file)}")


if __name__ == "__main__":
    run_command(main)
