"""findings.json: what was computed for a report, by all that it depends on."""

import json
from pathlib import Path
from typing import Any

from fastdynat.errors import UserError
from fastdynat.runs.files import write_text

FORMAT = "fastdynat-findings/1"


class Cache:
    """Findings by key; the file is whole at every moment.

    Raises:
        UserError: the file is damaged or another program's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            doc = json.loads(path.read_text(encoding="utf-8"))
            if doc["format"] != FORMAT:
                raise ValueError
            self._entries = {self._name(e["key"]): {k: e[k] for k in ("key", "value")} for e in doc["findings"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged or not a report's; remove it to compute its findings again") from None

    @staticmethod
    def _name(key: dict[str, Any]) -> str:
        return json.dumps(key, sort_keys=True)

    def get(self, key: dict[str, Any]) -> Any:
        """The finding under `key`; None where there is none."""
        entry = self._entries.get(self._name(key))
        return None if entry is None else entry["value"]

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Store a finding, on disk too."""
        self._entries[self._name(key)] = {"key": key, "value": value}
        write_text(self.path, json.dumps({"format": FORMAT, "findings": list(self._entries.values())}) + "\n")
