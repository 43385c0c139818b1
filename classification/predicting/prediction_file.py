"""The table that predict.py writes: rows as they are made, so that the same command resumes where it was stopped.

Beside a table T are two files: `run.json`, for each table of the folder, by name, the command, checkpoints and versions
it came from; and `T.images`, a line for each image that was looked at, by which one that has changed since is predicted
again. Runs without torch.
"""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
from collections import Counter
from pathlib import Path

from common.errors import UserError
from common.files import read_json

RUN = "run.json"
IMAGES = ".images"  # behind the table's name
BYTES = "surrogateescape"  # a file's name need not be UTF-8
MENDED = 100  # batches predicted again, after which the table is rewritten
ROW, ERROR, NO_ROW = "row", "error", ""  # what the table has of an image


class _Csv:
    """A header, then a line a row."""

    between, tail = b"", b""

    def __init__(self, columns):
        self.columns = columns
        self.head = self._line(columns)

    @staticmethod
    def _line(fields):
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerow(fields)  # so that a name with \r in it is quoted
        return (text.getvalue().removesuffix("\r\n") + "\n").encode(errors=BYTES)

    def row(self, row):
        return self._line([row[c] for c in self.columns])

    def read(self, data):
        """(row, its bytes) of each whole row."""
        end = 0

        def lines():
            nonlocal end
            for line in io.BytesIO(data):  # at \n alone
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield line.decode(errors=BYTES)

        start = 0
        try:
            for fields in csv.reader(lines(), strict=True):
                if start:  # behind the header
                    yield dict(zip(self.columns, fields)), data[start:end]
                start = end
        except csv.Error:  # the last row was cut within quotes
            return


class _Submission(_Csv):
    """The file of a CXR-LT challenge: dicom_id, and a column a label."""

    BESIDE = ("path", "error", "study_id", "subject_id", "view")

    def __init__(self, columns):
        super().__init__([c for c in columns if c not in self.BESIDE])


class _Json:
    """An array of objects, each on a line of its own; whole after every batch."""

    head, between, tail = b"[\n", b",\n", b"\n]\n"

    def __init__(self, columns):
        self.columns = columns

    def row(self, row):
        return json.dumps({c: row[c] for c in self.columns}).encode()

    def read(self, data):
        """(row, its bytes) of each whole row."""
        for line in data[len(self.head) :].split(b"\n"):
            line = line.removesuffix(b",")
            try:
                row = json.loads(line.decode())
            except ValueError:
                return
            if not isinstance(row, dict):
                return
            yield row, line


FORMATS = {"csv": _Csv, "json": _Json, "cxr-lt": _Submission}


class PredictionFile:
    """The table at `path`, new or resumed.

    Args:
        columns: of the table, `path` and `error` among them.
        images: of each image asked for (its `path` in the table, its stamp, see `listing.Listed.stamp`).
        command: dictionary of everything that the values depend on; another one is refused.
        about: dictionary for people, beside the command in run.json.
        batch: rows are kept in whole batches, so that the model sees the same batches as without the interruption.

    `todo` are the ranges of images to predict: those `again` of which one has changed since (`changed` counts these
    images), then the rest.

    UserError: cannot be written, another command began it, or another process writes it.
    """

    def __init__(self, path, columns, images, *, command, about, batch, form="csv"):
        self.path, self.images, self.form = Path(path), images, FORMATS[form](columns)
        if self.path.name == RUN or self.path.name.endswith(IMAGES):
            raise UserError(f"--output {path}: {RUN} and *{IMAGES} are written beside the table; choose another name")
        self.command, self.about = json.loads(json.dumps(command)), about  # as they come back from run.json
        self.beside = self.path.with_name(self.path.name + IMAGES)
        try:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"--output {path} cannot be written (it is no file); choose another file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.before = self._check_command(self._read_run())
            self.file = self._open_locked(self.path)
            self.images_file = open(self.beside, "r+b" if self.beside.exists() else "w+b")
        except OSError as error:
            raise UserError(f"--output {path} cannot be written ({error.strerror}); choose another file") from error
        self._write_run()
        self._resume(batch)

    def _open_locked(self, path):
        """The file, locked: the lock ends with this process, whether its workers do or not."""
        file = open(path, "r+b" if path.exists() else "w+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"--output {self.path} is being written by another process; wait for it") from error
            if path == self.path:
                print(f"note: {path}: its file system has no locks; let no other command write this table meanwhile")
        return file

    def _read_run(self):
        path = self.path.parent / RUN
        return read_json(path, "the file that predict.py writes; choose another folder") if path.exists() else {}

    def _check_command(self, begun):
        """The table's entry of run.json, {} where there is none; raises a UserError where it is of another command."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return {}
        entry = begun.get(self.path.name)
        if not isinstance(entry, dict) or not isinstance(entry.get("command"), dict):
            raise UserError(f"--output {self.path} exists already, and not by predict.py; choose another file")
        then, now = entry["command"], self.command
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                raise UserError(
                    f"--output {self.path} was begun by another command: {key} was {then.get(key)!r}, now "
                    f"{now.get(key)!r}; choose another file, or remove this one"
                )
        return entry

    # ------------------------------------------------------------------------------------- resuming
    def _resume(self, batch):
        """Find what the files hold already: `entries`, one an image, and `texts`, the bytes of its row."""
        data = self.file.read()
        rows = self.form.read(data) if data.startswith(self.form.head) else iter(())
        lines = self.beside.read_bytes().split(b"\n")[:-1] if self.beside.is_file() else []
        entries, texts = [], []
        for (name, stamp), line in zip(self.images, lines):
            try:
                before, _, state = entry = json.loads(line)
            except (ValueError, TypeError):  # the last line was cut
                break
            if before[0] != stamp[0]:
                raise UserError(
                    f"--output {self.path} holds other images than are asked for now (files came or went since it was "
                    "begun); choose another file, or remove this one"
                )
            row, text = next(rows, ({}, b"")) if state != NO_ROW else ({"path": name}, b"")
            if row.get("path", row and name) != name:  # the row was cut; of a submission it has no path
                break
            entries.append(entry)
            texts.append(text)
        whole = len(self.images) if len(entries) == len(self.images) else len(entries) // batch * batch
        self.entries, self.texts = entries[:whole], texts[:whole]
        ranges = [range(k, min(k + batch, len(self.images))) for k in range(0, len(self.images), batch)]
        changed = {k for k in range(whole) if self.entries[k][0] != self.images[k][1]}
        self.changed, self.again = len(changed), [r for r in ranges if changed.intersection(r)]
        self.todo = self.again + [r for r in ranges if r.start >= whole]
        self.mended = 0
        written = [text for text in self.texts if text]
        self.rows, self.end = len(written), len(self.form.head + self.form.between.join(written))
        if not data.startswith(self.form.head):
            self._put(self.file, 0, self.form.head)
        self._put(self.file, self.end, self.form.tail)
        self.images_end = sum(len(line) + 1 for line in lines[:whole])
        self._put(self.images_file, self.images_end, b"")

    def _put(self, file, position, data):
        """Write `data` at `position`, as the new end of the file."""
        try:
            file.seek(position)
            file.write(data)
            file.flush()
            file.truncate()
        except OSError as error:
            raise UserError(
                f"{file.name} could not be written ({error.strerror}); the same command resumes from image "
                f"{len(self.entries) + 1}"
            ) from error

    # -------------------------------------------------------------------------------------- writing
    def add(self, first, found):
        """Store the images from `first` on, a batch of `todo`: of each its row, a dictionary by column (None: it gets
        none), and what it shows instead of a chest radiograph ("" where it is one)."""
        texts = [b"" if row is None else self.form.row(row) for row, _ in found]
        states = [NO_ROW if row is None else ERROR if row["error"] else ROW for row, _ in found]
        entries = [[self.images[first + k][1], content, states[k]] for k, (_, content) in enumerate(found)]
        if first < len(self.entries):
            batch = slice(first, first + len(found))
            self.entries[batch], self.texts[batch] = entries, texts
            self.mended += 1
            if self.mended % MENDED == 0 or self.mended == len(self.again):
                self._rewrite()
            return
        new = [text for text in texts if text]
        data = (self.form.between if self.rows and new else b"") + self.form.between.join(new)
        self._put(self.file, self.end, data + self.form.tail)
        lines = _lines(entries)
        self._put(self.images_file, self.images_end, lines)
        self.end, self.images_end = self.end + len(data), self.images_end + len(lines)
        self.rows += len(new)
        self.entries += entries

    def _rewrite(self):
        """Write both files again, from `entries` and `texts`; each is replaced at once."""
        written = [text for text in self.texts if text]
        body, lines = self.form.head + self.form.between.join(written), _lines(self.entries)
        self.rows, self.end, self.images_end = len(written), len(body), len(lines)
        self.file = self._replaced(self.path, body + self.form.tail)
        self.images_file = self._replaced(self.beside, lines)

    def _replaced(self, path, content):
        temporary = path.with_name(path.name + ".tmp")
        file = self._open_locked(temporary)  # before it has the table's name
        self._put(file, 0, content)
        os.replace(temporary, path)
        return file

    def read(self):
        """The rows of the table, in the order of its images: a dictionary each, None for an image without one."""
        self.file.seek(0)
        rows = self.form.read(self.file.read())
        return [None if state == NO_ROW else next(rows)[0] for _, _, state in self.entries]

    def count(self, *states):
        return sum(state in states for _, _, state in self.entries)

    def contents(self, has_row):
        """Counter of what the images with a row, or those without one, show instead of a chest radiograph."""
        return Counter(content for _, content, state in self.entries if content and (state != NO_ROW) == has_row)

    def _write_run(self):
        entry = {"command": self.command, **self.about}
        temporary = self.path.parent / f"{RUN}.{os.getpid()}.tmp"  # other tables' commands write this file, too
        try:
            temporary.write_text(json.dumps(self._read_run() | {self.path.name: entry}, indent=2) + "\n")
            os.replace(temporary, self.path.parent / RUN)
        except OSError as error:
            raise UserError(f"{self.path.parent / RUN} cannot be written ({error.strerror})") from error

    def finish(self, **figures):
        """Close the table, and add `figures` to its entry in run.json."""
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self.file.fileno())
        self.file.close()
        self.images_file.close()
        self.about = self.about | figures
        self._write_run()


def _lines(entries):
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
