"""Tables that are mapped files: rows are read from the file, and what was written to memory counts."""

import copy
import gc
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_ops import ops
from bitnet_ops.checkpoint.mapped_file import MappedFile
from bitnet_ops.decoder.head import ScreenedHead
from bitnet_ops.layers.embedding import Embedding

VOCABULARY, FEATURES = 5000, 576  # rows of 1152 bytes; some lie in one page, some in two
OFFSET = 256  # of the table in the file, as behind a header

needs_page_map = pytest.mark.skipif(
    not os.path.exists("/proc/self/pagemap"), reason="the system does not say which pages are in memory"
)


def make_table(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(VOCABULARY, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)


def mapped(tmp_path: Path, table: Tensor, *, sparing: bool = False) -> Tensor:
    """The same table in a file's memory, none of whose pages has been looked at."""
    file = tmp_path / "table"
    file.write_bytes(bytes(OFFSET) + table.view(torch.uint8).numpy().tobytes())
    with file.open("rb") as handle:
        memory = MappedFile(handle.fileno(), sparing=sparing)
    in_file = memory.tensor(table.dtype, table.numel(), OFFSET).view(table.shape)
    memory.forget(in_file)
    return in_file


def resident_pages(tensor: Tensor) -> int:
    first = tensor.data_ptr() // mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE - first + 1
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(8 * first)
        data = pages.read(8 * count)
    return sum(data[8 * i + 7] >> 7 for i in range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 7, 500])  # from 32 on the whole table is looked at once
def test_rows(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    table = make_table(dtype)
    in_file = mapped(tmp_path, table)
    ids = torch.randint(VOCABULARY, (count, 2), generator=torch.Generator().manual_seed(2))
    assert torch.equal(ops.embedding(ids, in_file), table[ids])
    in_file[ids[: count // 2]].sum()  # now some pages are in memory
    assert torch.equal(ops.embedding(ids, in_file), table[ids])


@needs_page_map
@pytest.mark.parametrize("k", [1, 50])
def test_the_table_stays_out_of_memory(tmp_path: Path, k: int) -> None:
    table = make_table()
    in_file = mapped(tmp_path, table)
    before = resident_pages(in_file)  # perhaps a page that the header shares
    head, expected = ScreenedHead(in_file, ops.screen_lm_head(table)), ScreenedHead(table)
    ids = torch.arange(0, VOCABULARY, 3)
    x = torch.randn(3, FEATURES)
    assert torch.equal(ops.embedding(ids, in_file), table[ids])
    assert all(map(torch.equal, head.top_k(x, k), expected.top_k(x, k)))
    assert resident_pages(in_file) == before
    in_file.float().sum()
    assert resident_pages(in_file) > 300  # as a mapping does


@needs_page_map
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("how", ["lm_head", "lm_head_top_k"])
def test_a_sparing_mapping_leaves_most_of_the_table_in_the_file(
    tmp_path: Path, tokens: int, how: str
) -> None:
    """Scores of all tokens, again and again: three eighths stay, and with many tokens nothing."""
    rows = 28000  # 32 MB
    table = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(5)).bfloat16()
    in_file = mapped(tmp_path, table, sparing=True)
    x = torch.randn(tokens, FEATURES)

    def scores(weight: Tensor) -> tuple[Tensor, ...]:
        return (ops.lm_head(x, weight),) if how == "lm_head" else ops.lm_head_top_k(x, weight, 20)

    for _ in range(3):
        assert all(map(torch.equal, scores(in_file), scores(table)))
    share = resident_pages(in_file) * mmap.PAGESIZE / in_file.nbytes
    assert share < 0.45 if tokens == 1 else share < 0.01
    for changed in (table, in_file):
        changed.data[[3, 12345, rows - 1]] = 2.0
    assert all(map(torch.equal, scores(in_file), scores(table)))


@needs_page_map
def test_a_sparing_mapping_of_a_file_made_shorter_is_an_error(tmp_path: Path) -> None:
    in_file = mapped(tmp_path, make_table(), sparing=True)
    os.truncate(tmp_path / "table", OFFSET + 100 * FEATURES * 2)
    with pytest.raises(RuntimeError, match="made shorter"):
        ops.lm_head(torch.randn(9, FEATURES), in_file)


@pytest.mark.parametrize("count", [3, 400])
def test_what_is_written_counts(tmp_path: Path, count: int) -> None:
    """Also by way of `.data`, which no version counter sees."""
    table = make_table()
    in_file = mapped(tmp_path, table)
    for changed in (table, in_file):
        changed.data[5] = 2.0
        changed[11] *= 3
    ids = torch.arange(count) + 4
    assert torch.equal(ops.embedding(ids, in_file), table[ids])
    x = torch.full((FEATURES,), 0.5)
    copied = ops.screen_lm_head(table)
    given, expected = (ops.lm_head_top_k(x, weight, 9, *copied)[:2] for weight in (in_file, table))
    assert expected[1][0] == 5
    assert all(map(torch.equal, given, expected))


def test_a_changed_parameter_of_a_module(tmp_path: Path) -> None:
    table = make_table()
    module = Embedding.from_pretrained(mapped(tmp_path, table)).eval()
    ids = torch.tensor([[0, 7], [4999, 7]])
    assert torch.equal(module(ids), table[ids])
    module.weight.data[7] = 1.0
    assert torch.equal(module(ids)[:, 1], torch.ones(2, FEATURES).bfloat16())


@needs_page_map
def test_a_file_made_shorter_is_an_error(tmp_path: Path) -> None:
    """And not the end of the process, as through a mapping."""
    table = make_table()
    in_file = mapped(tmp_path, table)
    copied = ops.screen_lm_head(table)
    os.truncate(tmp_path / "table", OFFSET + 100 * FEATURES * 2)
    assert torch.equal(ops.embedding(torch.tensor([99]), in_file), table[99:100])
    for ids in (torch.tensor([2000]), torch.arange(2000, 2100)):
        with pytest.raises(RuntimeError, match="made shorter"):
            ops.embedding(ids, in_file)
    with pytest.raises(RuntimeError, match="made shorter"):
        ops.lm_head_top_k(torch.randn(FEATURES), in_file, 50, *copied)


def test_a_file_that_was_replaced_is_still_read(tmp_path: Path) -> None:
    table = make_table()
    in_file = mapped(tmp_path, table)
    (tmp_path / "other").write_bytes(bytes(100))
    os.replace(tmp_path / "other", tmp_path / "table")
    ids = torch.arange(1000, 1100)
    assert torch.equal(ops.embedding(ids, in_file), table[ids])


def test_copies_are_apart_from_the_file(tmp_path: Path) -> None:
    table = make_table()
    in_file = mapped(tmp_path, table)
    ids = torch.tensor([3])
    for other in (in_file.clone(), copy.deepcopy(in_file), pickle.loads(pickle.dumps(in_file))):
        other[3] = 0
        assert not ops.embedding(ids, other).any()
    assert torch.equal(ops.embedding(ids, in_file), table[ids])


def test_the_file_is_closed_with_the_last_tensor(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{name}") == str(tmp_path / "table") for name in names())

    def names() -> list[str]:
        return os.listdir("/proc/self/fd")

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the system does not list open files")
    in_file = mapped(tmp_path, make_table())
    part = in_file[10:20]
    del in_file
    gc.collect()
    assert open_files() > 0
    assert part.shape == (10, FEATURES)
    del part
    gc.collect()
    assert open_files() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_looks_at_its_own_memory(tmp_path: Path) -> None:
    """The parent's page table says of a page that the child has written to that it is not in memory."""
    table = make_table()
    in_file = mapped(tmp_path, table)
    assert torch.equal(ops.embedding(torch.tensor([1]), in_file), table[1:2])
    child = os.fork()
    if child == 0:
        in_file.data[2000] = 7.0
        right = ops.embedding(torch.tensor([2000]), in_file).eq(7.0).all()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ops.embedding(torch.tensor([2000]), in_file), table[2000:2001])


@pytest.mark.parametrize(
    ("ids", "weight", "expected"),
    [
        (torch.tensor([4]), torch.ones(4, 3), "'ids': expected ids from 0 to 3 .* got 4"),
        (torch.tensor([0, -1]), torch.ones(4, 3), "'ids': expected ids from 0 to 3 .* got -1"),
        (torch.tensor([0]), torch.ones(0, 3), "'ids': expected ids"),
        (torch.tensor([0], dtype=torch.int32), torch.ones(4, 3), "'ids': expected a CPU tensor int64"),
        (torch.tensor([0]), torch.ones(4), "'weight': expected shape"),
        (torch.tensor([0]), torch.ones(4, 3).double(), "'weight': expected .* float32, bfloat16 or float16"),
    ],
)
def test_errors(ids: Tensor, weight: Tensor, expected: str) -> None:
    with pytest.raises(RuntimeError, match=f"bitnet_ops::embedding: argument {expected}"):
        ops.embedding(ids, weight)


def test_a_module_has_gradients_where_they_are_wanted() -> None:
    module = Embedding.from_pretrained(torch.randn(5, 4), freeze=False)
    for mode in (True, False):
        module.train(mode).zero_grad()
        module(torch.tensor([1, 1])).sum().backward()
        assert module.weight.grad is not None
        assert torch.equal(module.weight.grad[1], torch.full((4,), 2.0))


@pytest.mark.parametrize("layout", ["tile16", "row", "column", "tile16_base3"])
@pytest.mark.parametrize("place", [None, 0, 16383, 16384, 99_999])
def test_find_bad_byte(layout: str, place: int | None) -> None:
    base3 = layout == "tile16_base3"
    bytes_: Any = torch.randint(243, (100_000,), dtype=torch.uint8)
    if not base3:
        codes = torch.randint(3, (100_000, 4))
        bytes_ = (codes << torch.tensor([0, 2, 4, 6])).sum(1).to(torch.uint8)
    assert int(ops.find_bad_byte(bytes_.view(100, -1), layout)) == -1
    if place is not None:
        bytes_[place] = 243 if base3 else 0b01_11_00_10
        bytes_[-1] = 255
        assert int(ops.find_bad_byte(bytes_, layout)) == place


def test_find_bad_byte_knows_every_byte() -> None:
    for byte in range(256):
        packed = torch.tensor([byte], dtype=torch.uint8)
        codes = [byte >> shift & 3 for shift in (0, 2, 4, 6)]
        assert int(ops.find_bad_byte(packed)) == (0 if 3 in codes else -1)
        assert int(ops.find_bad_byte(packed, "tile16_base3")) == (0 if byte >= 3**5 else -1)
    assert int(ops.find_bad_byte(torch.empty(0, dtype=torch.uint8))) == -1


def test_a_program_may_end_with_a_mapped_file(tmp_path: Path) -> None:
    """Its modules are emptied before what they hold is let go."""
    file = tmp_path / "table"
    file.write_bytes(bytes(5000))
    code = "import sys; from bitnet_ops.checkpoint.mapped_file import MappedFile; "
    code += "file = open(sys.argv[1], 'rb'); kept = MappedFile(file.fileno())"
    command = [sys.executable, "-c", code, str(file)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


def test_importing_the_package_does_not_import_the_compiler() -> None:
    """Which takes 70 MB and more than a second."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import bitnet_ops; "
    code += "sys.exit('torch._dynamo' in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
