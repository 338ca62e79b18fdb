"""Arrays in a pickled dictionary, found without running code from it and without reading them into memory.

Only what numpy writes for plain arrays is understood: each array is known by its place in the file.
"""

import codecs
import pickletools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from fastdynat.documents.files import DocumentError, open_file

LARGE = 2**16  # bytes from which a string stays in the file
MOST_STEPS, MOST_BYTES = 10_000, 2**22  # opcodes, and bytes beside the large strings
NUMPY = ("numpy.core", "numpy._core")
# Opcodes of strings whose length stands before them: the format of the length, and whether it is text.
STRINGS = {
    "BINBYTES": ("<I", False),
    "BINBYTES8": ("<Q", False),
    "BYTEARRAY8": ("<Q", False),
    "BINSTRING": ("<I", False),
    "BINUNICODE": ("<I", True),
    "BINUNICODE8": ("<Q", True),
}
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Region:
    """A large string in the file. text: it is UTF-8 of the Latin-1 characters that are the bytes."""

    start: int
    length: int
    text: bool


@dataclass(frozen=True)
class _Global:
    name: str


class _Type:
    """A dtype: its code, such as "i8", and its byte order."""

    def __init__(self, code: object) -> None:
        self.code, self.order = str(code), "="

    def dtype(self) -> np.dtype:
        if self.code[:1] not in ("i", "u", "f", "b") or len(self.code) > 3:
            raise ValueError(self.code)
        found = np.dtype(self.code)
        return found.newbyteorder(">") if self.order == ">" else found


class PickledArray:
    """An array in a pickle.

    Attributes:
        shape, dtype: of the array.
        fortran: it is stored column after column.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype, self.fortran = np.dtype(np.uint8), False
        self._data: bytes | _Region = b""
        self._path = Path()

    def fill(self, shape: Any, kind: Any, fortran: Any, data: Any) -> None:
        """Take over the parts of numpy's state of an array."""
        if not (isinstance(kind, _Type) and isinstance(data, bytes | _Region)):
            raise ValueError("an array of objects")
        self.shape, self.dtype = tuple(int(size) for size in shape), kind.dtype()
        self.fortran, self._data = bool(fortran), data

    def place(self, path: Path) -> "PickledArray":
        """This array of the file at `path`."""
        self._path = path
        return self

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], bytes]]:
        """A function that reads the next bytes of the array, fewer only at its end."""
        if isinstance(self._data, bytes):
            data, at = self._data, [0]

            def rest(size: int) -> bytes:
                at[0] += size
                return data[at[0] - size : at[0]]

            yield rest
            return
        with open_file(self._path) as file:
            file.seek(self._data.start)
            yield _reader(file, self._data)


def _reader(file: BufferedReader, region: _Region) -> Callable[[int], bytes]:
    left = [region.length]

    def plain(size: int) -> bytes:
        data = file.read(min(size, left[0]))
        left[0] -= len(data)
        return data

    if not region.text:
        return plain
    decoder, held = codecs.getincrementaldecoder("utf-8")(), [b""]

    def decoded(size: int) -> bytes:
        while len(held[0]) < size and (data := plain(size)):
            held[0] += decoder.decode(data).encode("latin-1")
        found, held[0] = held[0][:size], held[0][size:]
        return found

    return decoded


def read_array_pickle(path: Path) -> dict[str, Any]:
    """The dictionary pickled in `path`, its arrays as `PickledArray`; other objects are opaque.

    Raises:
        DocumentError: not a pickle of a dictionary with text as keys, or one that needs code to be read.
    """
    with open_file(path) as file:
        try:
            found = _Machine(file, path).run()
        except DocumentError:
            raise
        except Exception as error:  # damaged: the machine runs into it in any way
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise DocumentError(f"{path} cannot be read as a pickle of plain arrays ({reason})") from None
    if not isinstance(found, dict):
        raise DocumentError(f"{path} is a pickle of something else than a dictionary of arrays")
    return {key: v.place(path) if isinstance(v, PickledArray) else v for key, v in found.items()}


class _Machine:
    """The part of pickle's stack machine that dictionaries of arrays need; it calls nothing."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self._file, self._path = file, path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._bytes = 0

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            opcode = OPCODES[self._file.read(1).decode("latin-1")]
            argument = self._argument(opcode)
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise DocumentError(f"{self._path} has more values than a dictionary of arrays needs")

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        if opcode.name in STRINGS:
            form, text = STRINGS[opcode.name]
            (length,) = struct.unpack(form, self._file.read(struct.calcsize(form)))
            start = self._file.tell()
            if length >= LARGE:
                self._file.seek(0, 2)
                if start + length > self._file.tell():
                    raise ValueError("it is truncated")
                self._file.seek(start + length)
                return _Region(start, length, text)
            data = self._file.read(length)
            return data.decode() if text else data
        if opcode.arg is None:
            return None
        start = self._file.tell()
        number = opcode.arg.n == pickletools.TAKEN_FROM_ARGUMENT4  # of any size
        if number and int.from_bytes(self._file.peek(4)[:4], "little") > LARGE:
            raise ValueError("a number of that size")
        value = opcode.arg.reader(self._file)
        self._bytes += self._file.tell() - start
        if self._bytes > MOST_BYTES:
            raise ValueError("it holds much besides arrays")
        return value

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name == "MARK":
            self._marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._global(argument))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._called(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._set_state(stack[-1], state)
        else:
            self._container(name, argument)

    def _container(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in TUPLES:
            count = TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("EMPTY_TUPLE", "TUPLE"):
            stack.append(() if name == "EMPTY_TUPLE" else tuple(self._marked()))
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append([] if name == "EMPTY_LIST" else self._marked())
        elif name in ("EMPTY_DICT", "DICT"):
            stack.append({} if name == "EMPTY_DICT" else self._items(self._marked()))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            stack[-1].update(self._items(items))
        elif name in ("APPEND", "APPENDS"):
            added = [stack.pop()] if name == "APPEND" else self._marked()
            stack[-1].extend(added)
        elif name == "POP":
            stack.pop()
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif argument is not None:
            stack.append(argument)
        else:
            raise ValueError(f"it has a {name}")

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def _items(self, flat: list[Any]) -> dict[str, Any]:
        keys = [key.decode("latin-1") if isinstance(key, bytes) else key for key in flat[::2]]
        if not all(isinstance(key, str) for key in keys):  # whose hash may take for ever
            raise ValueError("a key is no text")
        return dict(zip(keys, flat[1::2], strict=True))

    def _global(self, argument: Any) -> _Global:
        if argument is None:
            name = self._stack.pop()
            module = self._stack.pop()
        else:
            module, name = str(argument).split(" ")
        return _Global(f"{module}.{name}")

    def _called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """The value that a call of numpy's stands for; nothing is called."""
        name = function.name if isinstance(function, _Global) else "a value"
        if name == "numpy.dtype":
            code = arguments[0]
            return _Type(code.decode("latin-1") if isinstance(code, bytes) else code)
        if name == "_codecs.encode" and arguments[1] in ("latin1", "latin-1"):
            value = arguments[0]
            return value.encode("latin-1") if isinstance(value, str) else value
        for package in NUMPY:
            if name == f"{package}.multiarray._reconstruct":
                return PickledArray()
            if name == f"{package}.multiarray.scalar":
                return None
            if name == f"{package}.numeric._frombuffer":
                data, kind, shape, order = arguments
                array = PickledArray()
                array.fill(shape, kind, order == "F", data)
                return array
        raise DocumentError(
            f"{self._path} calls {name}: only pickles of plain numpy arrays are read, because others may run "
            "any code; save the arrays as an .npz file"
        )

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, PickledArray):
            target.fill(*state[1:])
        elif isinstance(target, _Type):
            order = state[1]
            target.order = order.decode("latin-1") if isinstance(order, bytes) else str(order)
        else:
            raise ValueError("an object")
