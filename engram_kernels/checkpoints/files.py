"""safetensors files on disk: which tensors a checkpoint has, in which file, and where their bytes lie.

    8 bytes     length of the header, little-endian
    header      JSON, {name: {"dtype", "shape", "data_offsets"}}, at most 100 MB
    data        the tensors' bytes, without holes: data_offsets count from here

The library checks headers and gives small tensors. Rows are read here, by byte range: the library maps whole files, so
that what was read counts as memory of the process, and a file that shrinks while it is read ends the process (SIGBUS).
Source: https://github.com/huggingface/safetensors, "Format".
"""

import io
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .opening import JSON_LIMIT, CheckpointError, file_of_index, naming, open_regular, parse_json, read_json, unreadable
from .parallel import FileReads

Paths = str | os.PathLike | Sequence[str | os.PathLike]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_OPENED = 128  # files of an index that are opened at once
_ATTEMPTS = 100  # at a folder that saves change while it is read
#: Texts in headers, JSON: what save_safetensors says of a table, of an optimizer's state, and of some rows.
TABLE_KEY, OPTIMIZER_KEY, ROWS_KEY = "engram_table", "row_optimizer", "table_rows"
#: A file that save_safetensors writes where there are several.
PART = re.compile(rf"(?P<stem>.*)-[0-9a-f]{{8}}-\d{{5}}-of-\d{{5}}{re.escape(SUFFIX)}")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; its bytes are ``[offset, offset + nbytes)`` of it."""

    name: str
    dtype: str  #: as the format calls it: "F8_E4M3", "BF16"
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


class Checkpoint:
    """The tensors of some files: of one file, of several, of a folder, or of an index.

    Headers are read when a tensor is asked for where an index says which file has it, so that of a checkpoint only
    the files in question need to be there. Files stay open: what was checked is what is read, whatever takes its name.
    """

    def __init__(self, paths: Paths, where: str):
        self.where = where
        #: Of the files whose header was read: the open file, tensors, and the texts in the header; and reads of it.
        self._files: dict[Path, tuple[io.FileIO, dict[str, StoredTensor], dict[str, str]]] = {}
        self._reads: dict[Path, FileReads] = {}
        self._path_of: dict[str, Path] = {}
        #: The files that were given, in a folder or by name, where no index tells which there are.
        self.given: list[Path] = []
        given = _checked(paths, where)
        for attempt in range(_ATTEMPTS):
            before = _listed(given)
            try:
                self._add_all(paths)
                return
            except FileNotFoundError:
                self.close()
                if attempt == _ATTEMPTS - 1 or _listed(given) == before:
                    raise
            except BaseException:
                self.close()
                raise

    @property
    def names(self) -> list[str]:
        return list(self._path_of)

    @property
    def paths(self) -> list[Path]:
        """All files that hold a tensor, whether they have been opened or not."""
        return list(dict.fromkeys(self._path_of.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._path_of

    def path(self, name: str) -> Path:
        """The file that holds ``name``."""
        return self._path_of[name]

    def tensor(self, name: str) -> StoredTensor:
        """Where the tensor called ``name`` lies."""
        path = self._path_of[name]
        found = self._header(path).get(name)
        if found is None:
            raise self.error(f"the index places {name} in {path}, which does not hold it")
        return found

    def metadata(self, path: Path) -> dict[str, str]:
        """The texts in the header of a file."""
        self._header(path)
        return self._files[path][2]

    def check(self, path: Path) -> None:
        """Raise CheckpointError unless ``path`` is a whole safetensors file with the tensors that were said of it."""
        self._header(path)
        for name, holder in self._path_of.items():
            if holder == path:
                self.tensor(name)

    def read_into(self, tensor: StoredTensor, start: int, view: memoryview) -> None:
        """Fill ``view`` with the tensor's bytes from ``start`` on. Any number of threads may do so."""
        offset = tensor.offset + start
        try:
            done = self._reads[tensor.path].fill(view, offset)
        except OSError as error:
            raise unreadable(tensor.path, self.where, error) from None
        if done < len(view):
            size, end = os.fstat(self.open_fd(tensor.path)).st_size, tensor.offset + tensor.nbytes
            raise self.error(
                f"{tensor.path} ended at byte {size:,} while it was read, before the end of {tensor.name} at {end:,}: "
                "it has shrunk since its header was checked"
            )

    def read(self, tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        """A small tensor as ``dtype``, which is as wide as what is stored."""
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")
        content = bytearray(tensor.nbytes)
        self.read_into(tensor, 0, memoryview(content))
        return torch.frombuffer(content, dtype=dtype).reshape(tensor.shape)

    def open_fd(self, path: Path) -> int:
        """The descriptor of a file whose header was read; it stays this object's own."""
        return self._files[path][0].fileno()

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}")

    def close(self) -> None:
        for file in [*self._reads.values(), *(file for file, *_ in self._files.values())]:
            file.close()
        self._reads.clear()
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _add_all(self, paths: Paths) -> None:
        self._path_of.clear()
        self.given.clear()
        found = _given(paths, self.where)
        for path in found:
            self._add(path, alone=len(found) == 1)
        if len(found) > 1 and not self._path_of:
            others = f"{found[0]} and {len(found) - 1} more files"
            raise self.error(f"{others} hold states of optimizers or overlays alone")

    def _add(self, path: Path, alone: bool) -> None:
        """Take the tensors of a file or an index; beside others, none of an optimizer or an overlay."""
        if path.name.endswith(".json"):
            found = weight_map(path, self.where)
            files = set(found.values())
            # Opened now where they are few: a save may soon replace them. What is not needed may be absent.
            for file in files if len(files) <= _OPENED else ():
                try:
                    self._header(file)
                except FileNotFoundError:
                    if weight_map(path, self.where) != found:
                        raise
        elif not alone and not {OPTIMIZER_KEY, ROWS_KEY}.isdisjoint(self.metadata(path)):
            return
        else:
            self.given.append(path)
            found = dict.fromkeys(self._header(path), path)
        for name, holder in found.items():
            other = self._path_of.setdefault(name, holder)
            if other != holder:
                raise self.error(f"two files hold {name}: {other} and {holder}")

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._files:
            file = open_regular(path, self.where)
            try:
                with naming(path):
                    self._files[path] = file, *_checked_header(path, file.fileno(), self.where)
                self._reads[path] = FileReads(file.fileno())
            except BaseException:
                file.close()
                raise
        return self._files[path][1]


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """All tensors of a checkpoint by name, loaded by the library as they are asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._checkpoint:
            raise KeyError(name)
        fd = self._checkpoint.open_fd(self._checkpoint.tensor(name).path)
        safetensors = library(self._checkpoint.where)
        with safetensors.safe_open(f"/proc/self/fd/{fd}", framework="pt") as file:
            try:
                return file.get_tensor(name)
            except safetensors.SafetensorError as error:  # a dtype that torch has not
                raise self._checkpoint.error(f"{self._checkpoint.tensor(name)} cannot be read: {error}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)


def library(where: str):
    """The safetensors package, which is an extra."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"{where}: safetensors files need the extra 'hf': pip install 'engram_kernels[hf]' ({error})"
        ) from None
    return safetensors


def _checked(paths: Paths, where: str) -> Sequence[str | os.PathLike]:
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(given, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in given):
        raise TypeError(f"{where}: paths must be a file, a folder, an index, or a list of them, got {paths!r}"[:200])
    if not given:
        raise ValueError(f"{where}: paths must name at least one file, got none")
    return given


def _given(paths: Paths, where: str) -> list[Path]:
    """The files and indices that ``paths`` stands for."""
    found: list[Path] = []
    for path in map(Path, _checked(paths, where)):
        found += _of_folder(path, where) if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def _listed(paths: Sequence[str | os.PathLike]) -> list[tuple[str, int, int]]:
    """Name, number and time of all files in the folders that are given, or that hold what is."""
    folders = {path if path.is_dir() else path.parent for path in map(Path, paths)}
    found = []
    for folder in folders:
        for entry in os.scandir(folder) if folder.is_dir() else ():
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                found.append((entry.path, stat.st_ino, stat.st_mtime_ns))
    return sorted(found)


def _of_folder(folder: Path, where: str) -> list[Path]:
    """A folder's index; without one, all its files."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    named = folder / f"model{INDEX_SUFFIX}"
    if named in indices or len(indices) == 1:
        return [named if named in indices else indices[0]]
    if indices:
        names = ", ".join(path.name for path in indices)
        raise CheckpointError(f"{where}: {folder} has more than one index ({names}): name the one to read")
    names = {path.name for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")}
    # Beside the one file of a table, parts without an index are of a save that has just begun, or of one before.
    parts = {name for name in names if (match := PART.fullmatch(name)) and f"{match['stem']}{SUFFIX}" in names}
    files = [folder / name for name in sorted(names - parts)]
    if not files:
        raise CheckpointError(f"{where}: {folder} holds no {SUFFIX} file")
    return files


def weight_map(path: Path, where: str) -> dict[str, Path]:
    """An index's map from a tensor's name to its file."""
    content = read_json(path, where)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{where}: {path} has no 'weight_map' from tensor names to files")
    files = {name: file_of_index(path, name, where) for name in dict.fromkeys(found.values())}
    return {name: files[file] for name, file in found.items()}


def _checked_header(path: Path, fd: int, where: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors, texts) of one file, after the library has found its header valid and the file as long as it says."""
    safetensors = library(where)
    try:
        with safetensors.safe_open(f"/proc/self/fd/{fd}", framework="numpy") as file:  # that file, whatever its name
            names = set(file.keys())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{where}: {path} {_diagnosis(fd)} ({error})") from None
    begin = 8 + int.from_bytes(_bytes_at(fd, 0, 8), "little")
    header = parse_json(_bytes_at(fd, 8, begin - 8), path, where)
    texts = header.pop("__metadata__", None) or {}
    if set(header) != names:
        raise CheckpointError(f"{where}: {path} was replaced while its header was read")
    tensors = {
        name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, begin + first, end - first)
        for name, entry in header.items()
        for first, end in [entry["data_offsets"]]
    }
    return tensors, texts


def _bytes_at(fd: int, offset: int, count: int) -> bytes:
    """``count`` bytes from ``offset`` on, fewer at the end of the file; a call of the system may give fewer too."""
    found = b""
    while len(found) < count and (more := os.pread(fd, count - len(found), offset + len(found))):
        found += more
    return found


def _diagnosis(fd: int) -> str:
    """What is wrong with a file whose header the library refused."""
    size, head = os.fstat(fd).st_size, os.pread(fd, 64, 0)
    if head.startswith(_LFS_POINTER):
        return "is a Git LFS pointer, not the file itself: git lfs pull fetches it"
    length = int.from_bytes(head[:8], "little")
    if size < 10 or length > JSON_LIMIT or head[8:9] != b"{":
        return f"is no safetensors file, in {size:,} bytes"
    if 8 + length > size:
        return f"is truncated: its header takes {8 + length:,} bytes, and it has {size:,}"
    try:
        header = json.loads(os.pread(fd, length, 8))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        end = operator.index(max(ends, default=0))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "has a header that cannot be read"
    if 8 + length + end > size:
        return f"is truncated: its header tells of {8 + length + end:,} bytes, and it has {size:,}"
    if 8 + length + end < size:
        return f"has {size - 8 - length - end:,} bytes behind the last tensor"
    return "has a header that contradicts itself"
