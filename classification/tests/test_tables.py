"""Tables as people have them: ids that are names, other kinds of CSV, and what the tools make of own tables."""

import gzip
import resource

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import prepare_mimic
from common.errors import UserError
from conftest import edit_csv
from dataset import tables
from dataset.mimic_cxr import MIMICCXRDataset, load_table


@pytest.fixture
def own(tmp_path):
    """own(frame or text, ...) -> a folder with six images and this table: train 0 to 3, validate 4, test 5."""
    root = tmp_path / "own"
    (root / "im").mkdir(parents=True)
    for k in range(6):
        Image.fromarray(np.full((40, 40), 40 * k, np.uint8)).save(root / "im" / f"{k}.png")

    def make(text, name="mine.csv", encoding="utf-8"):
        for path in root.glob("*.?sv"):
            path.unlink()
        (root / name).write_bytes(text.encode(encoding))
        return root

    return make


def rows(header, line, separator=","):
    """A table with `header` and for image k the line that `line(k, split)` gives."""
    splits = ["train"] * 4 + ["validate", "test"]
    lines = [separator.join(map(str, line(k, split))) for k, split in enumerate(splits)]
    return "\n".join([separator.join(header), *lines]) + "\n"


PLAIN = rows(["path", "split", "A", "B"], lambda k, split: (f"im/{k}.png", split, k % 2, 1 - k % 2))


# -------------------------------------------------------------------------------------------- ids
IDS = {
    "36 digits": lambda k: 216840111366964012819207061112010281093053754 * 10 + k,
    "20 digits": lambda k: 18446744073709551616 + k,
    "above 2^53": lambda k: 9007199254740992 + k,
    "negative": lambda k: -7 - k,
    "with a dash": lambda k: f"anon-{k}",
    "CheXpert's": lambda k: f"patient{k:05d}",
    "leading zeros": lambda k: f"00{k}",
    "hexadecimal": lambda k: f"1e{k}",
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_an_own_table_are_names(own, name):
    """Six patients are six; one who is in train and test is found, whatever the ids look like."""
    ids = [str(IDS[name](k)) for k in range(6)]
    line = lambda ids: lambda k, split: (f"im/{k}.png", split, ids[k], k % 2)  # noqa: E731
    root = own(rows(["path", "split", "subject_id", "A"], line(ids)))
    table = load_table(root)
    assert [subject.decode() for subject in table.subject] == ids
    assert MIMICCXRDataset(root, "test").ids()["subject_id"] == [ids[5]]
    leaked = [*ids[:5], ids[0]]
    root = own(rows(["path", "split", "subject_id", "A"], line(leaked)))
    with pytest.raises(UserError, match=f"1 patient.s. are in more than one split, such as subject_id {ids[0]} in"):
        load_table(root)


def test_ids_that_differ_in_zeros_or_fractions_are_other_patients(own):
    """1, 01 and 1.0 are three names; the same name in two splits is found beside them."""
    ids = ["1", "01", "1.0", "1.00", "001", "0001"]
    root = own(rows(["path", "split", "subject_id", "A"], lambda k, split: (f"im/{k}.png", split, ids[k], k % 2)))
    assert len(np.unique(load_table(root).subject)) == 6


def test_the_official_layout_wants_integers(own_tree):
    edit_csv(own_tree, "split", lambda f: f.assign(subject_id="anon-" + f.subject_id))
    with pytest.raises(UserError, match="subject_id is 'anon-.*' in data row 1; expected an integer id"):
        load_table(own_tree)


# ---------------------------------------------------------------------------------- forms of a CSV
@pytest.mark.parametrize(
    "change, options",
    [
        (lambda text: text, {}),
        (lambda text: text.replace(",", ";"), {}),
        (lambda text: text.replace(",", "\t"), {"name": "mine.tsv"}),
        (lambda text: text, {"encoding": "utf-16"}),
        (lambda text: text, {"encoding": "utf-8-sig"}),
        (lambda text: text.replace("path,split", "path ,split").replace("A,B", " A , B"), {}),
        (lambda text: "\n".join(line + "," for line in text.splitlines()), {}),  # every row, and the header
        (lambda text: text.replace("\n", ",\n").replace("A,B,", "A,B", 1), {}),  # every row, but not the header
        (lambda text: text.replace("\n", "\r\n"), {}),
        (lambda text: text.replace("train", " train ").replace("validate", "val"), {}),
        (lambda text: text.replace("im/0.png", '"im/0.png"'), {}),
        (lambda text: "\n" + text + ",,,\n,,,\n", {}),  # as spreadsheets end
        (lambda text: "sep=;\n" + text.replace(",", ";"), {}),
    ],
    ids=[
        "plain",
        "semicolons",
        "tabs",
        "UTF-16",
        "mark",
        "spaces",
        "commas",
        "shifted",
        "CRLF",
        "alias",
        "quotes",
        "blank rows",
        "separator named",
    ],
)
def test_the_same_table_in_other_forms(own, change, options):
    root = own(change(PLAIN), **options)
    table = load_table(root, label_names=("A", "B"))
    assert [p.decode() for p in table.path] == [f"im/{k}.png" for k in range(6)]
    assert table.labels.tolist() == [[k % 2, 1 - k % 2] for k in range(6)]
    assert table.split.tolist() == [0, 0, 0, 0, 1, 2]


def test_values_beyond_the_columns_are_named(own):
    for more, row in ((",9", "data row 3"), (",9,9", "data row 3"), (",9,9,9", "data row 3")):
        root = own(PLAIN.replace("im/2.png,train,0,1", "im/2.png,train,0,1" + more))
        with pytest.raises(UserError, match=f"mine.csv: {row} has more values than there are columns .4.: a value"):
            load_table(root, label_names=("A",))
    root = own(PLAIN.replace("\n", ",,\n").replace("A,B,,", "A,B", 1))  # every row alike
    with pytest.raises(UserError, match="mine.csv: .* has more values than there are columns .4.: a value"):
        load_table(root, label_names=("A",))


def test_a_table_that_cannot_be_read_is_named_with_its_fault(own):
    """Also where it was not asked for by name: it may be the one that is meant."""
    with pytest.raises(UserError, match="mine.csv: cannot be read as CSV .it is not UTF-8 text; save it as such"):
        load_table(own(PLAIN.replace("A,B", "Ä,B"), encoding="latin-1"))
    with pytest.raises(UserError, match="no other table there has the columns path and split .*mine.csv has Path,"):
        load_table(own(PLAIN.replace("path", "Path")))


def test_an_image_named_in_two_ways_is_one(own):
    """Else it could lie in two splits unseen."""
    with pytest.raises(UserError, match="image im/0.png has more than one row"):
        load_table(own(PLAIN.replace("im/5.png", "./im//0.png")))


def test_what_the_tools_write_is_no_table_of_images(own):
    """Their tables name images by path too, and may lie in the data folder."""
    root = own(PLAIN)
    (root / "bad_images.csv").write_text("path,fault\nim/1.png,broken\n")
    (root / "audit.csv").write_text("problem,path,detail\nmissing,im/1.png,\n")
    (root / "predictions.csv").write_text("dicom_id,path,A_target\n1,im/1.png,1\n")
    assert len(load_table(root)) == 6


def test_an_own_table_without_labels_asked_for_gives_its_own(own):
    table = load_table(own(PLAIN))
    assert table.label_names == ("A", "B")
    assert "labels: A, B: the columns of mine.csv that hold 1, 0 or -1" in table.with_targets().summary()


def test_no_finding_may_clear_the_others(own):
    """Blank findings of a healthy image become 0, but not its devices; 1 and -1 stay, and so do other images."""
    header = ["path", "split", "Edema", "Pneumonia", "Support Devices", "No Finding"]
    lines = [
        ("", "", "", "1"),
        ("1", "-1", "", "1"),
        ("", "", "", ""),
        ("", "0", "1", "0"),
        ("", "", "", ""),
        ("",) * 4,
    ]
    root = own(rows(header, lambda k, split: (f"im/{k}.png", split, *lines[k])))
    labels = load_table(root, label_names=tuple(header[2:]), no_finding_clears=True).labels
    nan = np.nan
    expected = [[0, 0, nan, 1], [1, -1, nan, 1], [nan] * 4, [nan, 0, 1, 0], [nan] * 4, [nan] * 4]
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(load_table(root, label_names=tuple(header[2:])).labels[0], [nan, nan, nan, 1])


# ------------------------------------------------------------------------------------ trees, tools
def test_a_small_part_of_a_tree_is_found(own_tree):
    """All but one of the images are gone: with DATA.ALLOW_MISSING the one is found, wherever it lies."""
    images = sorted((own_tree / "files").rglob("*.jpg"))
    kept = images[37]
    for path in images:
        if path != kept:
            path.unlink()
    table = load_table(own_tree, allow_missing=True)
    assert [own_tree / p.decode() for p in table.path] == [kept]


def test_the_audit_follows_links_without_running_in_circles(own_tree, tmp_path):
    first = sorted((own_tree / "files").iterdir())[0]
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(own_tree / "files")
    problems = prepare_mimic.auditing.audit(own_tree, tmp_path / "audit", workers=1, log=lambda *_: None)
    assert set(problems["problem"]) <= {"extra", "duplicate pixels"} and "missing" not in set(problems["problem"])


def test_two_images_that_would_become_one_are_refused(own, tmp_path):
    """Before anything is written."""
    root = own(PLAIN.replace("im/1.png", "im/0.jpg"))
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(root / "im" / "0.jpg")
    with pytest.raises(UserError, match="im/0.jpg and im/0.png would both become im/0.jpg"):
        prepare_mimic.main(["build", "--data-path", str(root), "--output", str(tmp_path / "copy")])
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.replace("path,", "path ,", 1)])
def test_own_tables_go_through_every_tool(own, tmp_path, capsys, change):
    """Audit and copy, with labels of its own; the copy trains as the tree does."""
    root = own(change(PLAIN))
    assert prepare_mimic.main(["labels", "--data-path", str(root)]) == 0
    assert capsys.readouterr().out.split() == ["A", "B"]
    prepare_mimic.main(["audit", "--data-path", str(root), "--output", str(tmp_path / "audit"), "--workers", "1"])
    found = pd.read_csv(tmp_path / "audit" / "audit.csv")
    assert set(found["problem"]) <= {"constant"} and "6 rows" in (tmp_path / "audit" / "audit.txt").read_text()
    assert prepare_mimic.main(["build", "--data-path", str(root), "--output", str(tmp_path / "copy")]) == 0
    copy = load_table(tmp_path / "copy")
    assert copy.label_names == ("A", "B") and len(copy) == 6
    assert copy.labels.tolist() == load_table(root).labels.tolist()


def test_a_partial_tree_is_copied_when_asked(own, tmp_path):
    root = own(PLAIN)
    (root / "im" / "3.png").unlink()
    argv = ["build", "--data-path", str(root), "--output", str(tmp_path / "copy")]
    with pytest.raises(UserError, match="image missing: .*3.png .*--allow-missing"):
        prepare_mimic.main(argv)
    assert prepare_mimic.main([*argv, "--allow-missing"]) == 0
    assert len(load_table(tmp_path / "copy", allow_missing=True)) == 5


@pytest.mark.parametrize("flags", [[], ["--zip"]], ids=["files", "zip"])
def test_a_copy_without_its_bad_images_trains_as_advised(own, tmp_path, capsys, flags):
    root = own(PLAIN)
    (root / "im" / "3.png").write_bytes(b"no image")
    argv = ["build", "--data-path", str(root), "--output", str(tmp_path / "copy"), "--skip-bad", *flags]
    assert prepare_mimic.main(argv) == 0
    assert "DATA.ALLOW_MISSING True" in capsys.readouterr().out
    copy = load_table(tmp_path / "copy", allow_missing=True, in_zip=bool(flags))
    assert [p.decode() for p in copy.path] == [f"im/{k}.jpg" for k in (0, 1, 2, 4, 5)]


def test_metadata_without_views_matter_only_where_views_are_asked_for(own_tree):
    edit_csv(own_tree, "metadata", lambda f: f.drop(columns="ViewPosition"))
    assert load_table(own_tree).view is None
    with pytest.raises(UserError, match="metadata.csv.gz: column 'ViewPosition' is missing"):
        load_table(own_tree, views="PA")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["build", "--output", "x", "--quality", "101"], "--quality is 101; it must lie between 1 and 100"),
        (["build", "--output", "x", "--quality", "0"], "--quality is 0; it must lie between 1 and 100"),
        (["audit", "--workers", "0"], "--workers is 0; it must lie between 1 and"),
        (["audit", "--wrokers", "2"], r"unknown argument --wrokers"),
    ],
)
def test_numbers_out_of_range(tree, argv, message):
    with pytest.raises(UserError, match=message):
        prepare_mimic.main([*argv, "--data-path", str(tree)])


def test_reading_is_one_function_for_all(own):
    """Its columns are texts: nothing is made a number on the way."""
    root = own("path,split,A\nim/0.png,train,007\n")
    assert tables.read_csv(root / "mine.csv", ("path",)).iloc[0].tolist() == ["im/0.png", "train", "007"]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.replace(",", ";").replace(".", ",").encode("utf-8-sig"),
        lambda text: ("sep=;\n" + text.replace(",", ";")).encode("utf-16"),
        lambda text: text.replace(",", "\t").encode("utf-16-le"),
        lambda text: gzip.compress(text.replace("\n", "\r\n").encode()),
    ],
)
def test_predictions_are_read_in_the_forms_of_other_tables(tmp_path, encode):
    from analysis.evaluation import read_predictions
    from analysis.groups import read_table

    path, ages = tmp_path / "predictions.csv", tmp_path / "ages.csv"
    path.write_bytes(encode("dicom_id,subject_id,Edema_target,Edema_probability\na,1,1,0.25\nb,2,,0.5\nc,2,0,1e-3\n"))
    found = read_predictions(path)
    np.testing.assert_array_equal(found.targets[:, 0], [1, np.nan, 0])
    assert found.probabilities[:, 0].tolist() == [0.25, 0.5, 0.001] and found.ids["subject_id"].tolist() == [
        "1",
        "2",
        "2",
    ]
    ages.write_bytes(encode("subject_id,age\n1,30\n2,85\n"))
    assert read_table(ages, found)["age band"][0].tolist() == ["18-39", "80 and over", "80 and over"]


@pytest.mark.parametrize("value", ["2", "True", "yes", "0.5", "positive"])
@pytest.mark.parametrize("label", ["Edema", "Hernia"])
def test_a_bad_cell_of_a_label_is_named_and_the_label_is_not_lost(own, label, value):
    text = "path,split,male,note,LABEL\n" + "".join(f"im/{k}.png,train,{k % 2},x{k},{k % 2}\n" for k in range(6))
    root = own(text.replace("LABEL", label))
    table = load_table(root)
    assert table.label_names == ("male", label)
    assert (
        table.notes[0].startswith(f"labels: male, {label}: the columns of mine.csv")
        and "columns: note" in table.notes[0]
    )
    (root / "mine.csv").write_text(text.replace("LABEL", label).replace("x2,0", f"x2,{value}"))
    with pytest.raises(UserError, match=rf"label '{label}' is '{value}' in data row 3; .*DATA.LABELS"):
        load_table(root)
    assert load_table(root, label_names=("male",)).label_names == ("male",)


@pytest.mark.parametrize("value", ["2.16840E+35", "1e+05", "1,2E+12"])
def test_ids_that_a_spreadsheet_rounded_are_refused(own, value):
    text = "path,split,subject_id,A\n" + "".join(f"im/{k}.png,train,{k},1\n" for k in range(6))
    with pytest.raises(UserError, match="subject_id is '.*' in data row 5: a spreadsheet has rounded it"):
        load_table(own(text.replace("train,4", f'train,"{value}"')))
    assert load_table(own(text.replace("train,4", "train,5e12"))).subject[4] == b"5e12"  # not of a spreadsheet


def test_number_of_labels_is_told_with_its_remedy(own, run_main):
    root = own(
        "path,split,A,B\n" + "".join(f"im/{k}.png,{s},1,0\n" for k, s in enumerate(["train"] * 4 + ["validate"] * 2))
    )
    with pytest.raises(
        UserError, match=r"NUM_CLASSES is 14, but the data has 2 labels \(A, B\); set MODEL.NUM_CLASSES 2"
    ):
        run_main(data=root)
    with pytest.raises(UserError, match="DATA.LABELS is .*; A is in it twice"):
        run_main(data=root, DATA__LABELS="[A, B, A]")
    with pytest.raises(UserError, match=f"DATA.CSV: {root / 'im'} is a folder; name the table in it"):
        run_main(data=root, DATA__CSV="im")
    for content, fault in (
        (b"PK\3\4 and so on", "it is a zip file, or the workbook"),
        (gzip.compress(b"path,split\n" * 99)[:-12], ""),
    ):
        (root / "mine.csv").write_bytes(content)
        with pytest.raises(UserError, match=f"mine.csv: cannot be read as CSV .{fault}"):
            run_main(data=root, DATA__CSV="mine.csv")


@pytest.mark.parametrize("command", ["audit", "build"])
def test_tools_try_their_output_first(tree, tmp_path, command, monkeypatch):
    from dataset.tools import audit, cache

    for module in (audit, cache):
        monkeypatch.setattr(module, "in_processes", None)  # work begins
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/below", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"--output {output} cannot be written"):
            prepare_mimic.main([command, "--data-path", str(tree), "--output", str(output)])


def test_a_disk_that_is_full_meanwhile_is_one_line(tree, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large; mend it and run again"):
            prepare_mimic.main(
                ["build", "--data-path", str(tree), "--output", str(tmp_path / "copy"), "--zip", "--workers", "1"]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_views_of_the_audit(own_tree, tmp_path, capsys):
    path = edit_csv(own_tree, "metadata", lambda f: f.assign(ViewPosition=["", " ", "nan"] + ["PA"] * (len(f) - 3)))
    prepare_mimic.main(["audit", "--data-path", str(own_tree), "--output", str(tmp_path / "audit"), "--workers", "1"])
    assert f"views: PA {len(pd.read_csv(path)) - 3:,}, unknown 3\n" in capsys.readouterr().out
