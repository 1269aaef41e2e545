"""Looks through the archive that torch.save writes, before anything is made of its pickle."""

import io
import itertools
import os
import stat
import struct
import zipfile
from collections import Counter
from pathlib import Path

from srepa_ds.documents.pickle_check import NoWeightsError, check_length, check_pickle
from srepa_ds.errors import listed

_END, _ZIP64_END, _ZIP64_LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_IN_ZIP64 = 0xFFFFFFFF
# The record with the longest comment, and the locator before it.
_LONGEST_END = 20 + 22 + 0xFFFF


def check_archive(path: Path, size: int) -> None:
    """Raises NoWeightsError unless a zip archive of `size` bytes is torch.save's, and of weights.

    It may raise whatever zipfile and pickletools raise for damage.
    """
    with zipfile.ZipFile(path) as archive:
        entries, begin = archive.infolist(), archive.start_dir
    if _stated_begin(path, size) != begin:
        # Then torch would read another list of entries than is looked at here.
        raise NoWeightsError("it is damaged or malicious: its archive has two lists of entries")
    _check_entries(entries, size)
    by_name = {entry.filename: entry for entry in entries}
    folder = entries[0].filename.partition("/")[0]
    if (pickled := by_name.get(f"{folder}/data.pkl")) is None:
        raise NoWeightsError(f"it is a zip archive of other files ({listed(by_name, most=3)})")
    check_length(pickled.file_size)
    for key, claimed in check_pickle(io.BytesIO(_content_of(path, pickled))).items():
        record = by_name.get(f"{folder}/data/{key}")
        if record is not None and record.file_size != claimed:
            raise NoWeightsError(
                f"it is damaged or malicious: its tensors claim {claimed:,} bytes of the storage "
                f"'{key[:40]}', which has {record.file_size:,}"
            )


def _stated_begin(path: Path, size: int) -> int | None:
    """Returns where the list of entries begins by the record at the end of the file, or None.

    zipfile takes the list that lies right before the record instead.
    """
    with path.open("rb") as file:
        file.seek(max(size - _LONGEST_END, 0))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            return None
        (begin,) = struct.unpack_from("<L", tail, place + 16)
        if begin != _IN_ZIP64:
            return begin
        locator = place - 20
        if locator < 0 or tail[locator : locator + 4] != _ZIP64_LOCATOR:
            return None
        (record,) = struct.unpack_from("<Q", tail, locator + 8)
        file.seek(record)
        found = file.read(56)
        is_whole = len(found) == 56 and found[:4] == _ZIP64_END
        return struct.unpack_from("<Q", found, 48)[0] if is_whole else None


def _content_of(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """Returns an entry that is not compressed; its checksum may be left out, as torch allows."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
        file.seek(name + extra, os.SEEK_CUR)
        return file.read(entry.file_size)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Raises NoWeightsError for entries that torch.save does not write."""
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise NoWeightsError(
            "it is a TorchScript archive; load it with torch.jit.load, save its state_dict"
        )
    if any(name.endswith(".npy") for name in names):
        raise NoWeightsError("it is a NumPy archive, not a state_dict")
    if not any(name.endswith("/data.pkl") for name in names):
        raise NoWeightsError(f"it is a zip archive of other files ({listed(names, most=3)})")
    # Compressed entries would be unpacked in memory, a thousand times larger than the file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise NoWeightsError("it is a compressed zip archive, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > size:
        raise NoWeightsError("it is damaged: its entries are larger than the file")
    faults = (fault for entry in entries if (fault := _fault_of_entry(entry)))
    # torch may look for names whatever the case of their letters.
    spellings = Counter(name.lower() for name in names)
    twice = (f"the entry '{name[:80]}' twice" for name, count in spellings.items() if count > 1)
    folders = sorted({name.partition("/")[0] for name in names})
    several = [f"several folders ({listed(folders, most=3)})"] if len(folders) > 1 else []
    if fault := next(itertools.chain(faults, twice, several), None):
        raise NoWeightsError(f"its archive has {fault}, which torch.save never writes")


def _fault_of_entry(entry: zipfile.ZipInfo) -> str | None:
    name = entry.filename
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return f"an entry that leads out of it ({name[:80]!r})"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return f"a link ({name[:80]!r})"
    return None
