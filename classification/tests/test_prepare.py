"""The small copy and the audit: planted faults are found, a killed build ends as an uninterrupted one."""

import gzip
import hashlib
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

import prepare_mimic
from common.errors import UserError
from conftest import SHARED, edit_csv
from dataset.files.images import decode
from dataset.tools import cache, processes


def contents(folder):
    """path -> hash of all files."""
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def build(tree, out, *flags):
    return prepare_mimic.main(["build", "--data-path", str(tree), "--output", str(out), "--size", "32", *flags])


@pytest.mark.parametrize("flags", [[], ["--zip"]], ids=["folder", "zip"])
def test_a_copy_reads_as_the_release(tree, tmp_path, flags):
    from dataset.mimic_cxr import MIMICCXRDataset

    before = contents(tree)
    assert build(tree, tmp_path / "c", *flags) == 0
    assert contents(tree) == before
    for split in ("train", "validate", "test"):
        large = MIMICCXRDataset(tree, split)
        small = MIMICCXRDataset(tmp_path / "c", split, in_zip=bool(flags))
        assert small.ids()["dicom_id"] == large.ids()["dicom_id"]
        np.testing.assert_array_equal(small.targets, large.targets)
    image, original = small[3][0], large[3][0]
    assert min(image.size) == 32
    resized = np.asarray(original.resize(image.size, Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(image, float) - resized).mean() < 3


@pytest.mark.parametrize("flags", [[], ["--zip"]], ids=["folder", "zip"])
def test_a_killed_build_ends_as_an_uninterrupted_one(tree, tmp_path, flags, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_IMAGES", 50)
    assert build(tree, tmp_path / "whole", *flags) == 0
    whole, suffix, wanted = contents(tmp_path / "whole"), *(("*.zip", 1) if flags else ("*.jpg", 40))
    encode = cache.small_jpeg

    def encode_or_die(*arguments, **options):
        """Slowed down, so that not all images are under way; all processes die when a part of the copy is there."""
        if len(list((tmp_path / "killed").rglob(suffix))) >= wanted:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.02)
        return encode(*arguments, **options)

    def build_and_die():
        os.setsid()
        build(tree, tmp_path / "killed", *flags)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "small_jpeg", encode_or_die)
        process = multiprocessing.get_context("fork").Process(target=build_and_die)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    there = [p for p in contents(tmp_path / "killed").items() if p[0].suffix in (".jpg", ".zip")]
    assert len(there) < sum(p.suffix in (".jpg", ".zip") for p in whole)
    assert all(whole[path] == digest for path, digest in there)  # what has its name is whole
    assert build(tree, tmp_path / "killed", *flags) == 0
    after = {path: digest for path, digest in contents(tmp_path / "killed").items() if path.suffix != ".part"}
    assert after == whole


def test_two_recipes_are_not_mixed(tree, tmp_path):
    build(tree, tmp_path / "c")
    with pytest.raises(UserError, match="recipe.json: the copy there was made with quality 95, now 80; use another"):
        build(tree, tmp_path / "c", "--quality", "80")
    with pytest.raises(UserError, match="lie in each other"):
        build(tree, tree / "small")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not empty and holds no recipe.json"):
        build(tree, tmp_path / "other")


@pytest.mark.parametrize("flags", [[], ["--zip"]], ids=["folder", "zip"])
def test_a_bad_image_is_named_and_can_be_mended(own_tree, tmp_path, flags, capsys):
    path = sorted(own_tree.rglob("*.jpg"))[5]
    good = path.read_bytes()
    path.write_bytes(good[:500])
    assert build(own_tree, tmp_path / "c", *flags) == 1
    assert str(path) in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "c" / "bad_images.csv")["path"].tolist() == [path.relative_to(own_tree).as_posix()]
    path.write_bytes(good)
    assert build(own_tree, tmp_path / "c", *flags) == 0
    assert not (tmp_path / "c" / "bad_images.csv").exists()


def test_a_table_of_the_users_own(tree, tmp_path, monkeypatch):
    from dataset.mimic_cxr import MIMICCXRDataset

    own = tmp_path / "own"
    own.mkdir()
    for k, path in enumerate(sorted(tree.rglob("*.jpg"))[:3]):
        Image.open(path).save(own / f"{k}.png")
    (own / "my.csv").write_text("path,split,Edema\n0.png,train,1\n1.png,validate,0\n2.png,test,1\n")
    from dataset import mimic_cxr

    monkeypatch.setitem(mimic_cxr.load_table.__kwdefaults__, "label_names", ("Edema",))
    assert build(own, tmp_path / "c") == 0
    small = MIMICCXRDataset(tmp_path / "c", "test")
    assert small.ids()["dicom_id"] == ["2.jpg"] and min(small[0][0].size) == 32


def found(tree, tmp_path):
    prepare_mimic.main(["audit", "--data-path", str(tree), "--output", str(tmp_path / "audit")])
    table = pd.read_csv(tmp_path / "audit" / "audit.csv", keep_default_na=False)
    return {problem: list(zip(rows["path"], rows["detail"])) for problem, rows in table.groupby("problem")}


def test_nothing_is_wrong_with_the_synthetic_tree(tree, tmp_path, capsys):
    problems = found(tree, tmp_path)
    assert not problems, problems
    assert "nothing is wrong" in capsys.readouterr().out


def test_planted_faults_are_all_found(own_tree, tmp_path, capsys):
    files = sorted(own_tree.rglob("*.jpg"))
    name = {p: p.relative_to(own_tree).as_posix() for p in files}
    noise = np.random.default_rng(0).integers(0, 255, (70, 70, 3), np.uint8)
    planted = {}

    def plant(problem, path):
        planted.setdefault(problem, []).append(path)

    files[0].unlink()
    plant("missing", name[files[0]].removesuffix(".jpg"))
    shutil.copy(files[1], files[1].with_name("extra.jpg"))
    plant("extra", name[files[1]].replace(files[1].name, "extra.jpg"))
    plant("duplicate pixels", name[files[1]].replace(files[1].name, "extra.jpg"))
    for k, data in ((2, b""), (3, files[3].read_bytes()[:300]), (4, b"a text")):
        files[k].write_bytes(data)
        plant("unreadable", name[files[k]])
    Image.fromarray(noise[..., 0]).save(files[5], "PNG")
    plant("wrong suffix", name[files[5]])
    Image.fromarray(noise).save(files[6])
    plant("colour", name[files[6]])
    Image.fromarray(noise[:1, :1, 0]).save(files[7])
    plant("odd size", name[files[7]])
    plant("constant", name[files[7]])
    Image.fromarray(np.full((80, 90), 7, np.uint8)).save(files[8])
    plant("constant", name[files[8]])
    digest = hashlib.sha256(b"another file").hexdigest()
    (own_tree / "SHA256SUMS.txt").write_text(
        f"{digest} {name[files[9]]}\n{hashlib.sha256(files[10].read_bytes()).hexdigest()} {name[files[10]]}\n"
    )
    plant("wrong checksum", name[files[9]])

    def damage(frame):
        frame = pd.concat([frame, frame.iloc[[20]]])
        first = frame["subject_id"].iloc[30]
        frame.loc[(frame["subject_id"] == first) & (frame["study_id"] == frame["study_id"].iloc[30]), "split"] = "test"
        outside = frame.iloc[[40]].assign(dicom_id="../../../../x", study_id="50000001", subject_id="10000001")
        nameless = frame.iloc[[41]].assign(study_id="none")
        return pd.concat([frame, outside, nameless])[["split", "subject_id", "dicom_id", "study_id"]]

    split = pd.read_csv(next(own_tree.glob("*-split.csv.gz")), dtype=object)
    moved = split["subject_id"].iloc[30]
    edit_csv(own_tree, "split", damage)
    path = next(own_tree.glob("*-chexpert.csv.gz"))
    labels = pd.read_csv(path, dtype=object)
    labels.loc[3, "Edema"] = "2.0"
    labels = pd.concat([labels.drop(index=[5]), labels.iloc[[6]], labels.iloc[[7]].assign(study_id="59999999")])
    with gzip.open(path, "wt", encoding="utf-8-sig", newline="") as file:  # a BOM, CRLF
        labels.to_csv(file, index=False, lineterminator="\r\n")

    problems = found(own_tree, tmp_path)
    for problem, paths in planted.items():
        assert sorted(p for p, _ in problems[problem]) == sorted(paths), problem
    details = {problem: [d for _, d in rows] for problem, rows in problems.items()}
    assert {f"dicom_id {split['dicom_id'][20]}", f"study_id {labels['study_id'].iloc[5]}"} == set(
        details["duplicate row"]
    )
    assert details["bad label"] == ["Edema: '2.0' in 1 rows"]
    assert any(f"subject_id {moved} in" in d for d in details["two splits"])
    assert details["outside"] == ["dicom_id ../../../../x"] and len(details["bad id"]) == 1
    assert "study_id 59999999" in details["no image"] and details["no label row"]
    text = capsys.readouterr().out
    assert all(problem in text for problem in planted)


def test_faulty_dicoms_are_found(tmp_path):
    from dataset.synthetic.tree import write_tree

    tree = tmp_path / "d"
    write_tree(tree, patients=12, size=64, image_format="dicom", progress=False)
    files = sorted(tree.rglob("*.dcm"))
    for path, tag, value in ((files[0], "NumberOfFrames", 3), (files[1], "Rows", 60000), (files[2], "PixelData", None)):
        ds = pydicom.dcmread(path)
        if value is None:
            del ds[tag]
        else:
            setattr(ds, tag, value)
        ds.save_as(path)
    problems = found(tree, tmp_path)
    assert [p for p, _ in problems["unreadable"]] == [p.relative_to(tree).as_posix() for p in files[:3]]
    files[3].write_bytes(files[4].read_bytes())
    assert len(found(tree, tmp_path)["duplicate pixels"]) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared X-rays are not here")
def test_the_real_sample_passes_through(tmp_path):
    problems = found(SHARED / "cxr_sample", tmp_path)
    assert not set(problems) & {"missing", "extra", "unreadable", "bad id", "bad label", "two splits", "outside"}
    assert build(SHARED / "cxr_sample", tmp_path / "c") == 0
    path = next((tmp_path / "c").rglob("*.jpg"))
    assert min(decode(path.read_bytes(), str(path)).shape) == 32


def _kill_me(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line():
    """Its images would be waited for without end."""
    with pytest.raises(UserError, match="a process that reads images was killed.* fewer --workers"):
        list(processes.in_processes(_kill_me, [1, 2], workers=2))
