"""The files of a report in its folder; files of others are neither replaced nor removed."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastdynat.documents import read_bytes, read_json
from fastdynat.documents.files import MIB
from fastdynat.documents.numbers import FileName, Sha256
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import write_bytes, write_text

LARGEST = 256 * MIB  # of a page with all its pictures
RECORD, FORMAT = ".fastdynat-report.json", "fastdynat-report-files/1"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The record."""

    files: dict[FileName, list[Sha256]]


class ReportFiles:
    """The files that reports wrote into `folder`, by name with their sha256, as a file in it remembers them.

    findings: name of the file of findings; where there is one but no record, an earlier version made the
    folder.
    """

    def __init__(self, folder: Path, findings: str) -> None:
        self.folder = folder
        self._known: dict[str, list[str]] = {}  # two while one is being replaced by the other
        with suppress(UserError):  # without it, no file here is the report's
            self._known = read_json(
                folder / RECORD, _Stored, what="a report's record", format=FORMAT, limit=MIB
            ).files
        self._old = not self._known and (folder / findings).is_file()
        self._written: set[str] = set()

    def check(self, names: Iterable[str]) -> None:
        """Raise UserError where one of `names` is a file that no report wrote, or that was changed since."""
        record = self.folder / RECORD
        if os.path.lexists(record) and not record.is_file():
            raise UserError(
                f"{record} is not a file, as a report's record must be: choose another --out, or move it away"
            )
        for name in names:
            path = self.folder / name
            if path.exists() and not self._old and not self._is_ours(name):
                raise UserError(
                    f"{path} is there and is not this report's: choose another --out, or move it away"
                )

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the report. Raises WriteError."""
        self.check([name])
        digest = hashlib.sha256(content).hexdigest()
        self._known[name] = [*self._known.get(name, [])[-1:], digest]
        self._save()
        write_bytes(self.folder / name, content)
        self._known[name] = [digest]
        self._written.add(name)

    def drop_others(self) -> None:
        """Remove what earlier reports wrote and this one did not, unless it was changed since."""
        for name in sorted(self._known.keys() - self._written):
            if self._is_ours(name):
                (self.folder / name).unlink()
            del self._known[name]
        self._save()

    def _is_ours(self, name: str) -> bool:
        path = self.folder / name
        if "/" in name or path.is_symlink() or not path.is_file():
            return False
        try:
            digest = hashlib.sha256(read_bytes(path, limit=LARGEST)).hexdigest()
        except UserError:  # no report wrote what is so large or may not be read
            return False
        return digest in self._known.get(name, [])

    def _save(self) -> None:
        write_text(
            self.folder / RECORD, json.dumps({"format": FORMAT, "files": self._known}, indent=1) + "\n"
        )
