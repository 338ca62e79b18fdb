"""Malicious pickles are refused at once, before torch opens them; ordinary ones pass."""

import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdynat.documents import DocumentError, check_pickle, pickles
from fastdynat.documents.tensor_files import read_pickle

ARCHIVE = {"new": {}, "old": {"_use_new_zipfile_serialization": False}}


def shared(levels: int, kind: type = tuple) -> Any:
    """A value that holds the one below it twice, `levels` times: 2**levels values of a few bytes."""
    value: Any = kind()
    for _ in range(levels):
        value = kind((value, value))
    return value


def within_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def as_key(value: Any) -> bytes:
    """The pickle of {value: 1}, made without hashing it here."""
    body = pickle.dumps(value, protocol=2)
    return body[:2] + b"}" + body[2:-1] + b"K\x01s."


BAD = {
    "tuples": pickle.dumps({"a": shared(40)}, protocol=2),
    "a key of tuples": as_key(shared(40)),
    "lists": pickle.dumps([shared(40, list)], protocol=2),
    "lists that grow after they were put in": b"\x80\x02]q\x00]q\x01("
    + b"h\x00" * 2000
    + b"eh\x00("
    + b"N" * 2000
    + b"e.",
    "a value within itself": pickle.dumps(within_itself(), protocol=2),
    "deep": b"\x80\x02" + b")" + b"\x85" * 100_000 + b".",
    "many": b"\x80\x02](" + b"N" * 10_000 + b"e.",
    "a line that never ends": b"c" + b"x" * 3_000_000,
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what in ("many", "a line that never ends"):
        monkeypatch.setattr(pickles, "VALUES", 5000)
        monkeypatch.setattr(pickles, "MAX_BYTES", 2 << 20)
    path = tmp_path / "w.pt"
    path.write_bytes(BAD[what])
    begin = time.process_time()
    with pytest.raises(DocumentError, match=r"any such file (needs|is)$|no such file does$"):
        read_pickle(path, what="weights")
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("archive", ARCHIVE)
def test_shared_values_in_a_file_of_torch_save(archive: str, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"w": torch.zeros(2)}, "extra": [shared(40)]}, tmp_path / "w.pt", **ARCHIVE[archive]
    )
    with pytest.raises(DocumentError, match="expands to more than 1,000,000 values"):
        read_pickle(tmp_path / "w.pt", what="weights")


@pytest.mark.parametrize("archive", ARCHIVE)
def test_what_people_save_opens(archive: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    weight = torch.rand(10)
    stored = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "views": [weight, weight[2:], {"same": weight}],
        "history": [{"epoch": n, "loss": 0.5, "shape": torch.Size([3, 4])} for n in range(1000)],
        "nested": {(1, (2, 3)): ("a", None)},
    }
    torch.save(stored, tmp_path / "w.pt", **ARCHIVE[archive])
    found = read_pickle(tmp_path / "w.pt", what="weights")
    assert found.keys() == stored.keys()
    assert found["nested"] == stored["nested"]
    torch.testing.assert_close(found["views"][1], weight[2:])


@pytest.mark.parametrize("protocol", range(6))
def test_sizes_are_counted_in_full(protocol: int) -> None:
    for levels, fits in ((18, True), (20, False)):
        file = io.BytesIO(pickle.dumps(shared(levels), protocol=protocol))
        if fits:
            check_pickle(file, "w.pt", parts=1)
        else:
            with pytest.raises(DocumentError):
                check_pickle(file, "w.pt", parts=1)


def test_a_zip_that_only_begins_as_one_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[:-40])
    with pytest.raises(DocumentError, match="a damaged zip"):
        read_pickle(tmp_path / "w.pt", what="weights")
