"""A GGUF file, opened and checked: all there is to know before weights are read."""

from pathlib import Path

from ..opened import OpenCheckpoint
from .header import MAGIC, GgufFile
from .settings import architecture_of, read_settings
from .text import chat_template, embedding_settings, generation_config, with_pre_tokenizer
from .tokenizer import read_tokenizer
from .weights import GgufWeights

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or its first bytes."""
    try:
        if not path.is_file():  # a pipe would have no end
            return False
        if path.suffix == SUFFIX:
            return True
        with path.open("rb") as handle:
            return handle.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(file: Path, *, dense: bool, mmap: bool | None, arm_i2_s: bool = False) -> OpenCheckpoint:
    """Reads everything but the weights.

    Args:
        file: a GGUF file.
        dense: whether projections are wanted as they are, and not ternary.
        mmap: use tensors where they lie in the file; None means so.
        arm_i2_s: read type I2_S as bitnet.cpp writes it on ARM.

    Raises:
        CheckpointError: something is missing, damaged or not supported.
    """
    files = GgufFile(file, mmap=GgufWeights.maps_files if mmap is None else mmap)
    if arm_i2_s:
        files.take_i2_s_for_arm()
    try:
        architecture = architecture_of(files)
        config = read_settings(files)
        tokenizer = read_tokenizer(with_pre_tokenizer(files, architecture.name), file, config.vocab_size)
        return OpenCheckpoint(
            file,
            config,
            files,
            GgufWeights(architecture, config, dense=dense),
            tokenizer,
            chat_template(files, architecture.name),
            generation_config(files, config),
            embedding_settings(files, architecture.name, config),
        )
    except BaseException:
        files.__exit__(None, None, None)
        raise
