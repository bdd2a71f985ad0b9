"""Files of a checkpoint folder: JSON objects, and named tensors spread over safetensors files.

Nothing in here trusts a file. A header is checked in full before any data is looked at, and every way to
fail ends in a `CheckpointError`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .tensor_source import StoredTensor, TensorSource

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is parsed. The index of a 405-billion-weight model has 0.1 MB, Llama 3's
tokenizer_config.json 55 KB; the limit only keeps a hostile file from filling the memory."""


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


def read_json_value(file: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # malformed; a number of too many digits; nested too deeply
        raise CheckpointError.at(file, "file", "valid JSON", f"{error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    value = read_json_value(file)
    if not isinstance(value, dict):
        raise CheckpointError.at(file, "file", "a JSON object", type(value).__name__)
    return value


class TensorFiles(TensorSource):
    """The tensors of a folder: model.safetensors, or several files with their index.

    Opening reads headers only.
    """

    def __init__(self, folder: Path, *, mmap: bool = True) -> None:
        """Opens the files.

        Args:
            folder: where they lie.
            mmap: give tensors whose memory is the file, where the system can; otherwise read them.

        Raises:
            CheckpointError: there is none, or not a valid one.
        """
        super().__init__(mmap=mmap)
        self._header_digests: dict[Path, bytes] = {}
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

    def header_digest(self, name: str) -> bytes:
        """SHA-256 of the header of the file that a tensor is in, as it stands there."""
        return self._header_digests[self.tensors[name].file]

    def _open(self, file: Path) -> None:
        # is_file comes first: opening a named pipe would wait for ever.
        if not file.is_file():
            others = [
                found.name for found in file.parent.iterdir() if found.suffix in (".bin", ".gguf", ".pt")
            ]
            hint = f" (formats like {others[0]} are not supported)" if others else ""
            if others and others[0].endswith(".gguf"):
                hint = f" (to load {others[0]}, pass the file instead of the folder)"
            raise CheckpointError.at(file, "file", "a safetensors file", f"no such file{hint}")
        try:
            # safe_open checks the header against the size of the file. It would map the file too, but with
            # tensors that keep the whole of it, read-only and without a way to let go of pages.
            with safe_open(file, framework="pt", backend="pread"):
                pass
            handle = file.open("rb")
            self._add_file(file, handle)
            header_bytes = int.from_bytes(handle.read(8), "little")
            text = handle.read(header_bytes)
            header = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError.at(file, "file", "a valid safetensors file", f"{error}") from None
        self._header_digests[file] = hashlib.sha256(text).digest()
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
