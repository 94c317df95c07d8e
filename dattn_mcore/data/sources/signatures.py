"""What a file is by its first bytes, where its name says something else."""

from __future__ import annotations

from pathlib import Path

from dattn_mcore.errors import DataError

_TAR = 257  # where a tar's first header says so
_LOOKED_AT = 512
_PACKED = {b"\x1f\x8b": ("gzip", ".gz"), b"\x28\xb5\x2f\xfd": ("zstd", ".zst")}
_FOREIGN = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
# The last is a stream's: a continuation mark, which neither text nor a tar begins with.
_CONTAINERS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}


def check_signature(path: Path, called: Path, wanted: str) -> None:
    """Refuses a file whose first bytes are those of another container than it is read as.

    Args:
        path: The file, or the unpacked copy of a compressed one.
        called: The file as the user named it.
        wanted: Container that it is read as: `json`, `tar`, `parquet` or `arrow`.

    Raises:
        DataError: Says what it is, and how to name it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_LOOKED_AT)
    except OSError:
        return  # said where it is opened
    found = next((kind for magic, kind in _CONTAINERS.items() if head.startswith(magic)), None)
    if head[_TAR : _TAR + 5] == b"ustar":  # it begins with a member's name, whatever that is
        found, head = "tar", b""
    verb = "is" if path == called else "holds"
    for magic, (kind, ending) in _PACKED.items():
        if head.startswith(magic):
            way = f"name it '{called.name}{ending}'" if path == called else "unpack it once"
            raise DataError(f"'{called}' {verb} a {kind} file; {way}")
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"'{called}' {verb} a {kind} file; unpack it, or use gzip or zstd")
    if found is not None and found != wanted:
        outer = "" if path == called else called.suffix
        name = f"{path.stem}.{found}{outer}"
        article = "an Arrow" if found == "arrow" else f"a {found}"
        raise DataError(
            f"'{called}' {verb} {article} file; name it '{name}', or set format: {found} of its "
            "source"
        )
