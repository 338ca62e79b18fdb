"""`fastdynat pack`: converts extra training images into a store that training memory-maps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError

if TYPE_CHECKING:
    from fastdynat.data.extra_store import ExtraStore
    from fastdynat.terminal.progress import ProgressDisplay


@dataclass(frozen=True, kw_only=True)
class PackCommand:
    """Pack extra images into a store for train --extra-data, or verify one.

    Images are read and written in chunks, so memory use does not depend on their number."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """An .npz file (arrays image, uint8 NHWC, and label), a .pickle (Carmon et al.), a folder of such files,
    or a folder of class folders; several sources are packed as one set, in this order. A store given alone is
    verified by its checksums."""
    out: str | None = None
    """Folder of the store; None is SOURCE.packed, where train --extra-data SOURCE looks for it. Required for
    several sources."""
    image_size: int | None = None
    """Resize and centre-crop the images of a folder to this size; None keeps theirs."""
    overwrite: bool = False
    """Replace an existing store at --out, also one of the same images."""
    messages: MessageFlags = field(default_factory=MessageFlags)


def pack_command(argv: list[str]) -> int:
    """Run `fastdynat pack`."""
    command = parse(PackCommand, argv, "pack").command
    check_values(command)
    if not command.sources:
        raise UserError("pack needs images: fastdynat pack FILE.npz, or a folder")
    if len(command.sources) > 1 and command.out is None:
        raise UserError("pack of several sources needs --out FOLDER for their store")
    from fastdynat.terminal.consoles import AS_IS, error_console, output_console
    from fastdynat.terminal.progress import ProgressDisplay

    console, messages = error_console(), command.messages
    with printed_messages(messages.log_level, console, quiet=messages.quiet):
        from fastdynat.data.extra_store import ExtraStore, is_store

        display = ProgressDisplay(console, quiet=messages.quiet)
        first = Path(command.sources[0])
        if len(command.sources) == 1 and is_store(first):
            store = ExtraStore(first)
            _verify(store, display)
        else:
            store = _packed(command, display)
    output_console().print(_described(store), **AS_IS)
    return 0


def _packed(command: PackCommand, display: "ProgressDisplay") -> "ExtraStore":
    from fastdynat.data.pack_sources import open_sources
    from fastdynat.data.store_writer import default_place, pack

    paths, size = [Path(source) for source in command.sources], command.image_size
    out = default_place(paths[0], size) if command.out is None else Path(command.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent} for the store; make it first")
    sources = open_sources(paths, size)
    again = command.overwrite
    return pack(sources, out, image_size=size, overwrite=again, again=again, display=display)


def _verify(store: "ExtraStore", display: "ProgressDisplay") -> None:
    with display.task(f"verifying {store.folder.name}", len(store), unit="images") as progress:
        for number in store.verify():
            progress.advance(number)


def _described(store: "ExtraStore") -> str:
    facts = store.facts
    sides = "x".join(map(str, facts.shape))
    labels = "no labels" if facts.classes is None else f"labels below {facts.classes}"
    return f"{store.folder}: {facts.count:,} images {sides}, {labels}, checksum {facts.checksum}"
