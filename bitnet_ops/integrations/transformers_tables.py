"""Embeddings and heads of models that transformers has loaded: rows of mapped files, and ternary matrices."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.mapped_file import MappedFile
from ..checkpoint.read_at import read_at
from ..decoder.head import LEAST_BYTES
from ..layers.embedding import TernaryEmbedding
from ..layers.linear import BitLinear

COMPARED_BYTES = 8 << 20


class TernaryHead(BitLinear):
    """A head that is a ternary matrix of its own: float32 scores."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., hidden_size] to float32 [..., vocab_size]."""
        return super().forward(x.float())


class TiedTernaryHead(nn.Module):
    """A head that is the ternary embedding: float32 scores. It has no weights of its own."""

    def __init__(self, table: TernaryEmbedding) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, or it would be a submodule, and be moved and saved twice

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., hidden_size] to float32 [..., vocab_size]."""
        return self._table[0].product(x.float())


TERNARY_HEADS = (TernaryHead, TiedTernaryHead)


class Tables:
    """Maps the large tables of a model anew, so that operators read rows from the files (docs/memory.md).

    Attributes:
        files: the mappings of ours, by path.
        mapped: the tables in them.
    """

    def __init__(self) -> None:
        self.files: dict[str, MappedFile] = {}
        self.mapped: list[Tensor] = []

    def map_anew(self, model: Any) -> None:
        """Has embedding and head of a model lie in mappings of ours, where safetensors has mapped them.

        Only for a model that has just been loaded, with tables that nobody has written to.
        """
        if sys.platform != "linux":
            return
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(m.weight): m.weight for m in modules if hasattr(m, "weight")}.values():
            if weight.nbytes >= LEAST_BYTES and weight.is_cpu and weight.is_contiguous():
                mapped = self._mapped(weight.detach())
                if mapped is not None:
                    weight.data = mapped
                    self.mapped.append(mapped)

    def forget(self, rows: Tensor) -> None:
        """Takes rows of a table that `map_anew` has mapped out of this process' memory."""
        for file in self.files.values():
            if file.holds(rows):
                file.forget(rows)

    def forget_all(self) -> None:
        """The same for all of them: looking at one page may have brought many before it, up to 2 MB."""
        for table in self.mapped:
            self.forget(table)

    def _mapped(self, table: Tensor) -> Tensor | None:
        """The same numbers in a mapping of ours; None where they are not in a file."""
        place = file_place(table.data_ptr())
        if place is None or not os.path.isfile(place[0]):
            return None
        path, offset = place
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # A name may have been given to another file since, and the inode need not be the one of the maps
            # (overlay file systems).
            if not _holds(descriptor, offset, table):
                return None
            file = self.files.get(path)
            if file is None:
                file = self.files[path] = MappedFile(descriptor, sparing=True)
            return file.tensor(table.dtype, table.numel(), offset).view(table.shape)
        finally:
            os.close(descriptor)


def file_place(address: int) -> tuple[str, int] | None:
    """The path of the file that is mapped at an address, and the place in it; None for other memory."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, _, offset, _, inode, *path = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return None if inode == "0" or not path else (path[0], int(offset, 16) + address - begin)
    return None


def _holds(descriptor: int, offset: int, table: Tensor) -> bool:
    """Whether a file has the bytes of a table from some place on."""
    data = table.view(torch.uint8).flatten()
    if offset % table.element_size() or offset + len(data) > os.fstat(descriptor).st_size:
        return False
    room = bytearray(COMPARED_BYTES)
    begin = 0
    while begin < len(data):
        count = read_at(descriptor, offset + begin, memoryview(room)[: len(data) - begin])
        piece = data[begin : begin + count]
        same = torch.equal(torch.frombuffer(room, dtype=torch.uint8)[:count], piece)
        forget_file_pages(piece)
        if count == 0 or not same:
            return False
        begin += count
    return True


def forget_file_pages(tensor: Tensor) -> None:
    """Takes a tensor's pages of a mapped file out of this process' memory; a later access gets them back.

    For tensors just read from safetensors files, which nobody has written to.
    """
    # Elsewhere safetensors may read instead of mapping.
    if sys.platform != "linux" or file_place(tensor.data_ptr()) is None:
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED)
        )
