"""The set-up script's options and mistakes; what it installs is shown by these tests running at all."""

import re
import subprocess

from conftest import ROOT


def setup(*options):
    command = ["bash", str(ROOT / "setup_mimic_env.sh"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_help_names_every_option():
    cases = re.findall(r"^ +((?:--[a-z-]+(?: \| )?)+)\)", (ROOT / "setup_mimic_env.sh").read_text(), re.MULTILINE)
    options = {option for case in cases for option in case.split(" | ")}
    assert {"--yes", "--data-path"} <= options
    done = setup("--help")
    assert done.returncode == 0 and all(option in done.stdout for option in options)


def test_mistakes_are_named():
    for options, message in (
        (["--nonsense"], "unknown option --nonsense"),
        (["--env-name"], "--env-name needs a value"),
        (["--data-path", "/does/not/exist"], "--data-path /does/not/exist is not a folder"),
        (
            ["--env-dir", "/does/not/exist", "--python", "/bin/false"],
            "--python /bin/false is not a Python 3.10 to 3.13",
        ),
    ):
        done = setup(*options)
        assert done.returncode == 2 and message in done.stderr, (options, done.stderr)
