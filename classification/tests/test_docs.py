"""The pages: their commands parse, their links and anchors exist, their options are KNOBS, their examples train."""

import importlib
import json
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest

import config as config_module
from common import published
from conftest import ROOT, epochs, write_checkpoint
from dataset.labels import LABELS

TOP = ROOT.parent
PAGES = [
    *TOP.glob("*.md"),
    *TOP.glob("docs/*.md"),
    ROOT / "README_MIMIC.md",
    ROOT / "benchmarks/README.md",
    ROOT / "ops_dcnv3/README.md",
]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
EXTENDING = (TOP / "docs/extending.md").read_text()


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@BY_NAME
def test_links_and_anchors_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (TOP / "README.md").read_text()))
    assert linked == {f"docs/{path.name}" for path in TOP.glob("docs/*.md")}


@BY_NAME
def test_options_that_are_named_exist(page):
    examples = set(re.findall(r'KNOBS\["([\w.]+)"\]', EXTENDING))
    named = re.findall(r"\b(?:DATA|MODEL|TRAIN|AUG|TEST|LOG)(?:\.[A-Z0-9_]+)+\b", page.read_text())
    assert not {*named} - {*config_module.KNOBS, *config_module.SECTIONS, *published.TABLE} - examples


def test_the_page_of_options_is_generated():
    assert (TOP / "docs/options.md").read_text() == config_module.options_page(), "$PY config.py > ../docs/options.md"


def test_messages_of_the_troubleshooting_exist():
    """Some three words in a row of each message are in the code, whose texts may be cut into several lines."""
    files = [
        *ROOT.glob("*.py"),
        *ROOT.glob("[a-mp]*/**/*.py"),
        *ROOT.glob("training/*"),
        *ROOT.glob("ops_dcnv3/**/*.*"),
    ]
    code = "\n".join(path.read_text() for path in files if path.suffix in (".py", ".yaml", ".cpp", ".h", ".cu"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "README_MIMIC.md").read_text().split("## Troubleshooting")[1], re.MULTILINE
    )
    assert len(rows) > 20
    for row in rows:
        for message in re.findall("`([^`]+)`", row):
            words = message.replace("...", " ").split()
            found = any(" ".join(words[k : k + 3]) in code for k in range(max(1, len(words) - 2)))
            assert found, message


# --------------------------------------------------------------------------------------- commands
def commands(path):
    """The shell commands of a page's blocks and inline code, or of a configuration's head, without comments."""
    text = path.read_text()
    if path.suffix == ".yaml":
        blocks = re.findall(r"^#   (.*)$", text, re.MULTILINE)
        blocks = ["\n".join(blocks)]
    else:
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if not language]
        blocks += re.findall(r"`(\$PY [^`]+)`", without_code(text).replace("\n", " "))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"(^| )# .*| {3,}\(or: .*", "", line)
        words = shlex.split(re.sub(r"^\. \./mimic_settings.sh; ", "", line))
        if words[:1] == ["sbatch"] and "--wrap" in words:
            words = shlex.split(words[words.index("--wrap") + 1])
        yield words


def parse(words):
    """Parse the arguments of one command as the program does; False for what is none of the project's programs."""
    programs = {"main.py", "predict.py", "average.py", "export.py", "report.py", "prepare_mimic.py"} | {
        "download_weights.py"
    }
    program = next((word for word in words if word in programs), None)
    after = words[words.index(program) + 1 :] if program else []
    script = next((k for k, word in enumerate(words) if word.endswith(".sbatch")), None)
    if program == "main.py" or script is not None and words[0] != "sed":
        if program is None:
            assert (ROOT / words[script]).is_file()
            after = words[script + 1 :]
            after = after[1:] if after and not after[0].startswith("-") else after
            after = ["--cfg", "configs/internimage_b_mimic_cxr_224.yaml", *after]
        args = config_module.parse_args(after)
        if (ROOT / args.cfg).is_file():
            args.cfg = str(ROOT / args.cfg)
            read = config_module.get_config(args)
            if program and "internimage_b_mimic" in args.cfg and not args.eval:
                assert read.MODEL.PRETRAINED, "a command that trains InternImage-B names the weights"
        else:
            assert args.cfg in ("FILE", "configs/internimage_b_mimic_cxr_224.yaml") or "output/" in args.cfg
    elif program == "download_weights.py":
        assert all(word == "pretrained" or word.endswith(".pth") for word in after)
    elif program and after != ["--help"]:
        importlib.import_module(program[:-3]).parse_args(after)
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (TOP / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["bash", "setup_mimic_env.sh"]:
        usage = (ROOT / words[1]).read_text().split("TEXT")[1]
        assert all(f" {word} " in usage for word in words if word.startswith("--"))
    else:
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("configs/*.yaml"))], ids=lambda page: page.name)
def test_commands_parse(page):
    if page.parent.name not in ("benchmarks", "ops_dcnv3"):
        parsed = [words for words in commands(page) if words and parse(words)]
        assert parsed or page.name == "extending.md"  # pytest alone


# --------------------------------------------------------------------------------------- examples
def example(title):
    """The blocks of Python of a section of docs/extending.md."""
    section = EXTENDING.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_examples_of_extending_train(run_main, tree, tmp_path, monkeypatch, request):
    """All at once: metric, dataset, backbone, augmentation, mixing, option and policy of the page, with either loss."""
    import dataset
    import models
    import utils_multilabel
    from analysis import metrics
    from dataset import labels, transforms
    from dataset import mixing as mixing_module

    (mixing_option, mixing), (augmentation_option, augmentation) = example("A mixing"), example("An augmentation")
    for module, table, codes in (
        (utils_multilabel, "LOSSES", example("A loss")),
        (metrics, "METRICS", example("A metric")),
        (labels, "POLICIES", example("A label policy")),
        (config_module, "KNOBS", [mixing_option, augmentation_option]),
        (mixing_module, "MIXINGS", [mixing]),
        (transforms, "RADIOGRAPH_AUGMENTATIONS", [augmentation]),
    ):
        value = getattr(module, table)
        before = value.copy()  # restored in place: other modules hold the same table
        request.addfinalizer(
            lambda value=value, before=before: (value.clear(), (getattr(value, "update", None) or value.extend)(before))
        )
        for code in codes:
            exec(code, {**vars(module)})
    for package, name, title in ((dataset, "jsonl", "A dataset"), (models, "small", "A backbone")):
        (tmp_path / package.__name__).mkdir()
        (tmp_path / package.__name__ / f"{name}.py").write_text(example(title)[0])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / package.__name__)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)

    from dataset import mimic_cxr

    table = mimic_cxr.load_table(tree)
    rows = [
        {"path": str(tree / path.decode()), "patient": subject.decode(), "split": ("train", "validate", "test")[split]}
        | {name: value for name, value in zip(LABELS, values.tolist()) if value == value}
        for path, subject, split, values in zip(table.path, table.subject, table.split, table.labels)
    ]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opts = {"DATA__DATASET": "jsonl", "MODEL__TYPE": "small", "MODEL__NAME": "tiny", "DATA__UNCERTAIN": "half"}
    opts |= {"AUG__BLUR": 0.5, "AUG__BLEND": 0.2, "TRAIN__BEST_BY": "mean_brier"}
    loss = {"TRAIN__LOSS": "squared", "TRAIN__LOSS_OPTIONS": "{scale: 2.0}"}
    run = run_main(data=tmp_path, **opts, **loss)
    run_main("--eval", data=tmp_path, **opts)
    assert all(0 < epoch["train_loss"] < 2 for epoch in epochs(run))
    assert epochs(run)[-1]["best_mean_brier"] == min(epoch["mean_brier"] for epoch in epochs(run))
    (written,) = (tmp_path / "out" / "results").glob("*/metrics.json")
    found = json.loads(written.read_text())
    assert 0 < found["mean_brier"] < 1 and found["images"] == int((table.split == 2).sum())
    assert found["dataset"] == "jsonl"
    scaled = run_main(data=tmp_path, out="scaled", TRAIN__LOSS="scaled", TRAIN__EPOCHS=1, **opts)
    assert epochs(scaled)[0]["train_loss"] > 0


def test_the_linear_probe_of_the_readme(tree, tmp_path, monkeypatch):
    """Its commands and its code as printed, in a folder with images.csv and a checkpoint: a report of both labels."""
    from dataset import mimic_cxr

    table = mimic_cxr.load_table(tree)
    images = pd.DataFrame(table.labels == 1, columns=table.label_names).astype(int)
    images["path"] = [str(tree / path.decode()) for path in table.path]
    images["subject_id"] = [subject.decode() for subject in table.subject]
    images["split"] = ["test" if split == 2 else "train" for split in table.split]
    images.to_csv(tmp_path / "images.csv", index=False)
    write_checkpoint(tmp_path / "best_ckpt.pth")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README_MIMIC.md").read_text().split("## Features and a linear probe")[1].split("\n## ")[0]
    first, code, last = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for step in (first, code, last):
        if step is code:
            exec(code, {})
            continue
        words = shlex.split(step, comments=True)
        importlib.import_module(words[1][:-3]).main([*words[2:], *(["-j", "0"] if step is first else [])])
    found = json.loads((tmp_path / "probe" / "report.json").read_text())
    assert list(found["labels"]) == ["Edema", "Pleural Effusion"]
    assert found["bootstrap"]["unit"] == "patient" and found["labels"]["Edema"]["images"] == (table.split == 2).sum()


# ------------------------------------------------------------------------------------ demo on part of the data
def test_a_limit_keeps_whole_patients_of_every_split(tree):
    from dataset import mimic_cxr

    table = mimic_cxr.load_table(tree)
    counts = pd.Series(table.split).value_counts()
    limited = table.limited(9)
    kept = pd.Series(limited.split).value_counts()
    assert all(kept[split] == min(9, counts[split]) for split in counts.index)
    assert sum(limited.left_out.values()) == len(table) - len(limited)
    # Images of one patient are together: only the last patient of a split may be cut.
    for split in counts.index:
        subjects = limited.subject[limited.split == split]
        cut = [s for s in set(subjects) if (subjects == s).sum() < (table.subject == s).sum()]
        assert len(cut) <= 1
    again = table.limited(9)
    assert (again.path == limited.path).all() and set(limited.path) < set(table.limited(12).path)


def test_throughput_names_the_time_of_the_training(run_main, capsys):
    run_main("--throughput", DATA__BATCH_SIZE=2, DATA__LIMIT=60)
    assert re.search(r"TRAIN.EPOCHS 2 of \d+ images: about 0:00:\d\d ", capsys.readouterr().out)


def test_help_of_make_names_the_limit():
    shown = subprocess.run(["make", "-C", TOP, "help"], capture_output=True, text=True, check=True).stdout
    assert "LIMIT=2000" in shown
