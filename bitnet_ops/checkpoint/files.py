"""Files of a checkpoint folder: JSON objects, and named tensors spread over safetensors files.

Nothing in here trusts a file. A header is checked in full before any data is looked at, and every way to
fail ends in a `CheckpointError`.
"""

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .mapped_file import MappedFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is parsed. The index of a 405-billion-weight model has 0.1 MB, Llama 3's
tokenizer_config.json 55 KB; the limit only keeps a hostile file from filling the memory."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
TORCH_DTYPE = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""The dtypes of the formats that are read here."""
"""The float types that a checkpoint may use, by their safetensors names."""


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path, or an error that says how to get one."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"folder: expected a local folder with a checkpoint, got {os.fspath(folder)!r}, which "
            f"{'is a file' if path.exists() else 'does not exist'}. bitnet_ops downloads nothing by itself; "
            "to get a model from the Hugging Face hub run, for example, "
            "`hf download microsoft/bitnet-b1.58-2B-4T --local-dir bitnet-2b4t` and pass 'bitnet-2b4t'"
        )
    return path


def read_bytes(file: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """A whole file of at most ``most`` bytes."""
    try:
        # Before opening, because opening a named pipe would wait for ever.
        if not file.is_file():
            raise CheckpointError.at(
                file, "file", "a file", "something else" if file.exists() else "no such file"
            )
        size = file.stat().st_size
        if size > most:
            raise CheckpointError.at(file, "file", f"at most {most} bytes", f"{size}")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError.at(file, "file", "a readable file", f"{error}") from None


def read_text(file: Path) -> str:
    """A small UTF-8 text file as a string, its line ends as they are."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError.at(file, "file", "UTF-8 text", f"{error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        value = json.loads(read_text(file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # malformed; a number of too many digits; nested too deeply
        raise CheckpointError.at(file, "file", "valid JSON", f"{error}") from None
    if not isinstance(value, dict):
        raise CheckpointError.at(file, "file", "a JSON object", type(value).__name__)
    return value


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without NumPy, which is not a dependency."""
    if tensor.nbytes == 0:  # its address may be null
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says about it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of a folder: model.safetensors, or several files with their index.

    Opening reads headers only. Use it as a context manager; the files stay open inside, and mapped as long
    as one of their tensors lives.

    Attributes:
        tensors: what the headers say, by tensor name.
        total_bytes: size of all the files.
    """

    def __init__(self, folder: Path, *, mmap: bool = True) -> None:
        """Opens the files.

        Args:
            folder: where they lie.
            mmap: give tensors whose memory is the file, where the system can; otherwise read them.

        Raises:
            CheckpointError: there is none, or not a valid one.
        """
        self.tensors: dict[str, StoredTensor] = {}
        self.total_bytes = 0
        self._descriptors: dict[Path, int] = {}
        self._header_digests: dict[Path, bytes] = {}
        self._mmap = mmap
        self._mappings: dict[Path, MappedFile] = {}
        self._stack = ExitStack()
        try:
            # With both present the single file counts, as in transformers: it is the one that a later
            # save into a folder of several files leaves behind.
            if (folder / SINGLE_FILE).exists() or not (folder / INDEX_FILE).exists():
                self._open(folder / SINGLE_FILE)
            else:
                self._open_index(folder / INDEX_FILE)
        except BaseException:
            self._stack.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mappings.clear()
        self._stack.close()

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """Checks that the headers have a tensor with one of the dtypes and one of the shapes.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        expected = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        stored = self.tensors.get(name)
        if stored is None:
            where = ", ".join(sorted({str(file) for file in self._descriptors}))
            raise CheckpointError(f"{where}: tensor {name!r}: expected {expected}, got no such tensor")
        if stored.dtype not in dtypes or stored.shape not in shapes:
            raise self.error(name, expected, f"{stored.dtype} {list(stored.shape)}")
        return stored

    def tensor(self, name: str, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's data: mapped, or read into memory that ``empty(shape, dtype=...)`` gives."""
        stored, dtype = self.tensors[name], self._dtype(name)
        mapping = self._mappings.get(stored.file)
        count = math.prod(stored.shape)
        # A header may place a tensor at any byte; a number across two places of its size is read instead.
        if mapping is None or count == 0 or stored.offset % dtype.itemsize:
            return self.read(name, empty)
        try:
            return mapping.tensor(dtype, count, stored.offset).view(stored.shape)
        except ValueError as error:  # the file shrank since its header was checked
            raise self.error(name, "readable data", f"{error}") from None

    def forget(self, tensor: Tensor) -> None:
        """Takes an unchanged tensor's pages out of memory until they are needed; see `MappedFile`."""
        for mapping in self._mappings.values():
            if mapping.holds(tensor):
                mapping.forget(tensor)

    def read(self, name: str, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's data, in memory that belongs to the caller."""
        stored = self.tensors[name]
        out = empty(stored.shape, dtype=self._dtype(name))
        room = tensor_bytes(out)
        done = 0
        try:
            while done < len(room):
                count = os.preadv(self._descriptors[stored.file], [room[done:]], stored.offset + done)
                if count == 0:
                    raise OSError("the file ends before the tensor does")
                done += count
        except OSError as error:  # the file shrank, or the disk failed, since it was opened
            raise self.error(name, "readable data", f"{error}") from None
        return out

    def part(self, name: str, begin: int, count: int) -> bytes:
        """Bytes of a tensor from ``begin`` on: ``count``, or fewer at its end. They are read, not mapped."""
        stored = self.tensors[name]
        count = min(count, stored.nbytes - begin)
        try:
            data = os.pread(self._descriptors[stored.file], count, stored.offset + begin)
        except OSError as error:
            raise self.error(name, "readable data", f"{error}") from None
        if len(data) < count:
            raise self.error(name, "readable data", "a file that ends before the tensor does")
        return data

    def header_digest(self, name: str) -> bytes:
        """SHA-256 of the header of the file that a tensor is in, as it stands there."""
        return self._header_digests[self.tensors[name].file]

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.tensors[name].dtype
        if dtype not in TORCH_DTYPE:
            raise self.error(name, f"dtype {' or '.join(TORCH_DTYPE)}", dtype)
        return TORCH_DTYPE[dtype]

    def error(self, name: str, expected: str, given: str) -> CheckpointError:
        """The error to raise when a tensor's content is wrong."""
        return CheckpointError.at(self.tensors[name].file, f"tensor {name!r}", expected, given)

    def _open(self, file: Path) -> None:
        # is_file comes first: opening a named pipe would wait for ever.
        if not file.is_file():
            others = [
                found.name for found in file.parent.iterdir() if found.suffix in (".bin", ".gguf", ".pt")
            ]
            hint = f" (formats like {others[0]} are not supported)" if others else ""
            raise CheckpointError.at(file, "file", "a safetensors file", f"no such file{hint}")
        try:
            # safe_open checks the header against the size of the file. It would map the file too, but with
            # tensors that keep the whole of it, read-only and without a way to let go of pages.
            with safe_open(file, framework="pt", backend="pread"):
                pass
            handle = self._stack.enter_context(file.open("rb"))
            header_bytes = int.from_bytes(handle.read(8), "little")
            text = handle.read(header_bytes)
            header = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError.at(file, "file", "a valid safetensors file", f"{error}") from None
        self.total_bytes += os.fstat(handle.fileno()).st_size
        self._descriptors[file] = handle.fileno()
        self._header_digests[file] = hashlib.sha256(text).digest()
        if self._mmap:
            with suppress(OSError, ValueError):  # a file system without mapping: read instead
                self._mappings[file] = MappedFile(handle.fileno())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self.tensors:
                raise CheckpointError.at(
                    file,
                    f"tensor {name!r}",
                    "each tensor in one file",
                    f"it in {self.tensors[name].file} too",
                )
            begin, end = entry["data_offsets"]
            offset = 8 + header_bytes + begin
            self.tensors[name] = StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), offset, end - begin
            )

    def _open_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError.at(
                index, "weight_map", "an object from tensor names to file names", f"{weight_map!r:.80}"
            )
        for name, file in weight_map.items():
            # A plain name only: the index must not lead out of the folder. The characters are those of
            # every system, because the same folder is read on all of them.
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or file.startswith(".")
                or any(character in file for character in "/\\:\0")
            ):
                raise CheckpointError.at(
                    index,
                    f"weight_map[{name!r:.200}]",
                    "the plain name of a .safetensors file",
                    f"{file!r:.200}",
                )
        for file in sorted(set(weight_map.values())):
            self._open(index.parent / file)
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError.at(
                    index.parent / file,
                    f"tensor {name!r:.200}",
                    f"it here as {index.name} says",
                    "no such tensor",
                )
