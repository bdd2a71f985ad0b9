"""Files of a checkpoint folder: JSON objects, and named tensors spread over safetensors files.

Nothing in here trusts a file. A header is checked in full before any data is read, data is read with
pread into memory of its own, and every way to fail ends in a `CheckpointError`.
"""

import json
import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is parsed. The index of a 405-billion-weight model has 0.1 MB, Llama 3's
tokenizer_config.json 55 KB; the limit only keeps a hostile file from filling the memory."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says about it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of a folder: model.safetensors, or several files with their index.

    Opening reads headers only. Use it as a context manager; the files stay open inside.

    Attributes:
        tensors: what the headers say, by tensor name.
        total_bytes: size of all the files.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.total_bytes = 0
        self._handles: dict[Path, Any] = {}  # of safe_open, whose methods have no types
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
        self._stack.close()

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """Checks that the headers have a tensor with one of the dtypes and one of the shapes.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        expected = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        stored = self.tensors.get(name)
        if stored is None:
            where = ", ".join(sorted({str(file) for file in self._handles}))
            raise CheckpointError(f"{where}: tensor {name!r}: expected {expected}, got no such tensor")
        if stored.dtype not in dtypes or stored.shape not in shapes:
            raise self.error(name, expected, f"{stored.dtype} {list(stored.shape)}")
        return stored

    def read(self, name: str) -> Tensor:
        """A tensor's data, in memory that belongs to the caller."""
        stored = self.tensors[name]
        try:
            tensor: Tensor = self._handles[stored.file].get_tensor(name)
        except (
            SafetensorError,
            OSError,
        ) as error:  # the file shrank, or the disk failed, since it was opened
            raise self.error(name, "readable data", f"{error}") from None
        return tensor

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
            self.total_bytes += file.stat().st_size
            # pread and not mmap: mapped pages count as memory beside the copy that is kept, and a file
            # that shrinks while it is mapped ends the process with SIGBUS instead of an exception.
            handle = self._stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            names = handle.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError.at(file, "file", "a valid safetensors file", f"{error}") from None
        self._handles[file] = handle
        for name in names:
            if name in self.tensors:
                raise CheckpointError.at(
                    file,
                    f"tensor {name!r}",
                    "each tensor in one file",
                    f"it in {self.tensors[name].file} too",
                )
            header = handle.get_slice(name)
            self.tensors[name] = StoredTensor(file, header.get_dtype(), tuple(header.get_shape()))

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
