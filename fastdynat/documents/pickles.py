"""Size and depth of the values in a pickle, found from its opcodes before anything is built.

A few bytes can stand for endless work: a tuple of two references to a tuple of two references, forty deep,
takes 2**40 steps to hash as a key of a dictionary, or to print in an error message."""

import pickletools
from collections.abc import Iterable
from typing import IO

from fastdynat.documents.files import MIB, DocumentError

MAX_BYTES = 256 * MIB  # of the part of a torch.save file that is not tensors
VALUES = 1_000_000  # a shared one counts wherever it is referred to; a large training state has 10**5
DEPTH = 200
PARTS = 5  # pickles at the beginning of a file in the format of torch before 1.6
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_MUTATORS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MARK, _LEAF = -1, 0


class _Limited:
    """A file limited to MAX_BYTES in all reads, regardless of the lengths that opcodes claim."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name, self._left = file, name, MAX_BYTES

    def read(self, size: int) -> bytes:
        return self._count(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def tell(self) -> int:
        return self._file.tell()

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise DocumentError(
                f"{self._name} has over {MAX_BYTES // MIB} MiB besides tensors, more than any such file needs"
            )
        return data


def check_pickle(file: IO[bytes], name: str, parts: int = PARTS) -> None:
    """Refuse pickles at the beginning of `file` that would become too large.

    Data that is no pickle, or is damaged, passes from there on: the library that reads it will refuse it.

    Args:
        name: the file's name, for messages.
        parts: number of pickles that may follow each other.

    Raises:
        DocumentError: more than 1,000,000 values, shared ones counted in full; nested more than 200 deep; a
            value that holds itself.
    """
    limited = _Limited(file, name)
    for _ in range(parts):
        graph = _Graph(name)
        try:
            for opcode, argument, _ in pickletools.genops(limited):  # type: ignore[arg-type]
                graph.step(opcode, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # damaged from here on
            if isinstance(error, DocumentError):
                raise
            graph.check()
            return
        graph.check()


class _Graph:
    """The values of a pickle as nodes with references; all values without references are one node."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, 0
        self.children: list[list[int]] = [[]]
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Apply `opcode` to the nodes as it would apply to the values."""
        name, stack = opcode.name, self._stack
        self.steps += 1
        if self.steps > VALUES:
            raise self._too_much()
        if name in _PUTS or name == "MEMOIZE":
            key = len(self._memo) if name == "MEMOIZE" else int(argument)  # type: ignore[call-overload]
            self._memo[key] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[int(argument)])  # type: ignore[call-overload]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = self._take(opcode)
            if name in _MUTATORS:
                self.children[taken[0]] += taken[1:] if taken[0] != _LEAF else ()
                stack.append(taken[0])
            else:
                empty = name.startswith("EMPTY_")
                stack += [self._node(taken) if taken or empty else _LEAF for _ in opcode.stack_after]

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Take the operands of the opcode from the stack, without the mark."""
        before, stack = opcode.stack_before, self._stack
        count = len(before)
        if pickletools.markobject in before:
            mark = len(stack) - 1 - stack[::-1].index(_MARK)
            count = len(stack) - mark + before.index(pickletools.markobject)
        if count > len(stack):
            raise IndexError(opcode.name)
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return [node for node in taken if node != _MARK]

    def _node(self, children: Iterable[int]) -> int:
        self.children.append(list(children))
        return len(self.children) - 1

    def _too_much(self) -> DocumentError:
        return DocumentError(
            f"{self.name} expands to more than {VALUES:,} values, more than any such file needs"
        )

    def check(self) -> None:
        """Raise DocumentError where a node expands to too many values, or is nested too deep."""
        sizes, depths, entered = {_LEAF: 1}, {_LEAF: 0}, set[int]()
        for root in range(1, len(self.children)):
            path = [root]
            while path:
                node, inner = path[-1], self.children[path[-1]]
                if node in sizes:
                    path.pop()
                elif node not in entered:
                    entered.add(node)
                    open_ones = {child for child in inner if child not in sizes}
                    if open_ones & entered:
                        raise DocumentError(
                            f"{self.name} has a value that contains itself, which no such file does"
                        )
                    path += open_ones
                else:
                    sizes[node] = 1 + sum(sizes[child] for child in inner)
                    depths[node] = 1 + max((depths[child] for child in inner), default=0)
                    if sizes[node] > VALUES:
                        raise self._too_much()
                    if depths[node] > DEPTH:
                        raise DocumentError(
                            f"{self.name} is nested more than {DEPTH} deep, more than any such file is"
                        )
