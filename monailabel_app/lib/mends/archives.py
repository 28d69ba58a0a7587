"""MONAI Label unpacks uploaded archives whatever they grow to; until test_mends.py::test_archives.

Here their whole size is known before anything is unpacked, so that they cannot fill the disk.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile

from lib.mends.errors import Refused
from lib.mends.limits import upload_limit

MAX_FILES = 100_000


def install() -> None:
    """Put ``unpack`` in the place of the standard library's unpackers, which ``shutil.unpack_archive`` chooses from."""
    for name, extensions, _ in shutil.get_unpack_formats():
        shutil.unregister_unpack_format(name)
        shutil.register_unpack_format(name, extensions, unpack)


def unpack(archive: str, folder: str) -> None:
    """Unpack a zip or tar file; members that would leave the folder are refused or renamed by the standard library.

    Raises:
        Refused: its content is larger than ``upload_limit`` allows.
        shutil.ReadError: it is no archive, or damaged.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                _add_up(member.file_size for member in content.infolist())
                content.extractall(folder)
            return
        with tarfile.open(archive) as content:
            _add_up(member.size for member in content)
            content.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise shutil.ReadError(type(error).__name__) from error  # its text may name the server's folders


def _add_up(sizes) -> None:
    """Stops at the first member too many, so that a bomb is not even read to its end."""
    limit, total = upload_limit(), 0
    for count, size in enumerate(sizes, start=1):
        total += max(0, size)
        if total > limit or count > MAX_FILES:
            raise Refused(
                f"the archive unpacks to more than {limit >> 20} MB or {MAX_FILES} files: send less at a time"
            )
