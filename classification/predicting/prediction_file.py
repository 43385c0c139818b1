"""The table that predict.py writes: rows as they are made, so that the same command goes on where it was stopped.

Beside it stands `run.json`: for each table of the folder, by name, the command, checkpoints and versions it came from.
Runs without torch.
"""

import csv
import fcntl
import io
import json
import os
from pathlib import Path

from common.errors import UserError

RUN = "run.json"
BYTES = "surrogateescape"  # a file's name need not be UTF-8


class _Csv:
    """A header, then a line a row."""

    def __init__(self, columns):
        self.columns = columns
        self.head, self.tail = self._lines([columns]), b""

    @staticmethod
    def _lines(rows):
        lines = []
        for row in rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="\r\n").writerow(row)  # so that a name with \r in it is quoted
            lines.append(text.getvalue().removesuffix("\r\n") + "\n")
        return "".join(lines).encode(errors=BYTES)

    def rows(self, rows, first):
        return self._lines([[row[c] for c in self.columns] for row in rows])

    def read(self, data):
        """(row, offset of its end) of each whole row."""
        end = 0

        def lines():
            nonlocal end
            for line in io.BytesIO(data):  # at \n alone
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield line.decode(errors=BYTES)

        try:
            for fields in csv.reader(lines(), strict=True):
                if end > len(self.head):
                    yield dict(zip(self.columns, fields)), end
        except csv.Error:  # the last row was cut within quotes
            return


class _Json:
    """An array of objects, each on a line of its own; whole after every batch."""

    head, tail = b"[\n", b"\n]\n"

    def __init__(self, columns):
        self.columns = columns

    def rows(self, rows, first):
        text = ",\n".join(json.dumps({c: row[c] for c in self.columns}) for row in rows)
        return (text if first else ",\n" + text).encode()

    def read(self, data):
        end = len(self.head)
        for line in data[end:].split(b"\n"):
            try:
                row = json.loads(line.rstrip(b",").decode())
            except ValueError:
                return
            if not isinstance(row, dict):
                return
            end += len(line.rstrip(b","))
            yield row, end
            end += 2


FORMATS = {"csv": _Csv, "json": _Json}


class PredictionFile:
    """The table at `path`, begun or gone on with.

    Args:
        columns: of the table, `path` and `error` among them.
        paths: the images asked for, in the order of the rows.
        command: dictionary of everything that the values depend on; another one is refused.
        about: dictionary for people, beside the command in run.json.
        batch: rows are kept in whole batches, so that the model sees the same batches as without the interruption.

    `done` rows are there already, `errors` of them with an error.

    Raises:
        UserError: cannot be written, another command began it, or another process writes it.
    """

    def __init__(self, path, columns, paths, *, command, about, batch, form="csv"):
        self.path, self.paths, self.form = Path(path), paths, FORMATS[form](columns)
        if self.path.name == RUN:
            raise UserError(f"--output {path}: {RUN} is what stands beside the table; choose another name")
        self.command, self.about = json.loads(json.dumps(command)), about  # as they come back from run.json
        try:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"--output {path} cannot be written (it is no file); choose another file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            begun = self._read_run()
            self._check_command(begun)
            self.file = open(self.path, "r+b" if self.path.exists() else "w+b")
        except OSError as error:
            raise UserError(f"--output {path} cannot be written ({error.strerror}); choose another file") from error
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, its workers or not
        except OSError as error:
            raise UserError(f"--output {path} is being written by another process; wait for it") from error
        self._write_run()
        self._go_on(batch)

    def _read_run(self):
        try:
            content = json.loads((self.path.parent / RUN).read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path.parent / RUN} is not the file that predict.py writes; choose another folder")
        return content

    def _check_command(self, begun):
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        entry = begun.get(self.path.name)
        if not isinstance(entry, dict) or not isinstance(entry.get("command"), dict):
            raise UserError(f"--output {self.path} is there already, and not by predict.py; choose another file")
        then, now = entry["command"], self.command
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                raise UserError(
                    f"--output {self.path} was begun by another command: {key} was {then.get(key)!r}, now "
                    f"{now.get(key)!r}; choose another file, or remove this one"
                )

    def _go_on(self, batch):
        data = self.file.read()
        rows = list(self.form.read(data)) if data.startswith(self.form.head) else []
        if len(rows) < len(self.paths):
            rows = rows[: len(rows) // batch * batch]
        if [row["path"] for row, _ in rows] != self.paths[: len(rows)]:
            raise UserError(
                f"--output {self.path} holds other images than are asked for now (files came or went since it was "
                "begun); choose another file, or remove this one"
            )
        self.done, self.errors = len(rows), sum(bool(row["error"]) for row, _ in rows)
        self.end = rows[-1][1] if rows else len(self.form.head)
        self._put(0, b"" if rows else self.form.head)
        self._put(self.end, self.form.tail)

    def _put(self, position, data):
        try:
            self.file.seek(position)
            self.file.write(data)
            self.file.flush()
            if position:
                self.file.truncate()
        except OSError as error:
            raise UserError(
                f"--output {self.path} could not be written ({error.strerror}); the same command goes on from "
                f"row {self.done + 1}"
            ) from error

    def add(self, rows):
        """Append rows, dictionaries by column, of the next images asked for."""
        data = self.form.rows(rows, first=self.done == 0)
        self._put(self.end, data + self.form.tail)
        self.end += len(data)
        self.done += len(rows)
        self.errors += sum(bool(row["error"]) for row in rows)

    def _write_run(self):
        entry = {"command": self.command, **self.about}
        temporary = self.path.parent / f"{RUN}.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(self._read_run() | {self.path.name: entry}, indent=2) + "\n")
            os.replace(temporary, self.path.parent / RUN)
        except OSError as error:
            raise UserError(f"{self.path.parent / RUN} cannot be written ({error.strerror})") from error

    def finish(self, **figures):
        """Close the table, and add `figures` to its entry in run.json."""
        os.fsync(self.file.fileno())
        self.file.close()
        self.about = self.about | figures
        self._write_run()
