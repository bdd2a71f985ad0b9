"""From a text file to token ids: paragraphs, chapters, held-out chapters, a tokenizer."""

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
"""The only special token: it stands before every chapter and ends the last one."""

CHAPTER_PATTERN = r"^[ \t]*(?:CHAPTER|Chapter)\b.*$"
"""A line that opens a chapter."""

FEWEST_CHAPTERS = 10
"""A text with fewer chapters is cut at paragraphs into `PIECES` equal parts instead."""

PIECES = 100


@dataclass
class Split:
    """Whole chapters of one part of a corpus.

    Attributes:
        chapters: their texts.
        ids: int64 [tokens], `END_OF_TEXT` before each chapter and after the last.
    """

    chapters: list[str]
    ids: Tensor

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of the chapters, the denominator of bits per byte."""
        return sum(len(chapter.encode()) for chapter in self.chapters)


@dataclass
class Corpus:
    """A tokenised text in three parts.

    Validation chapters choose the settings and the moment to stop; the loss that is reported comes from
    test chapters, which nothing was chosen by.
    """

    tokenizer: Tokenizer
    train: Split
    validation: Split
    test: Split


def read_corpus(
    path: Path,
    *,
    vocab_size: int,
    held_out: float = 0.04,
    seed: int = 0,
    chapter_pattern: str = CHAPTER_PATTERN,
    keep_lines: bool = False,
) -> Corpus:
    """Reads, splits and tokenises a text file.

    Args:
        path: a UTF-8 text.
        vocab_size: size of the tokenizer to train, a byte-level BPE on the training chapters only.
        held_out: share of the text, in whole chapters, that goes to validation; as much again to test.
        seed: picks the held-out chapters.
        chapter_pattern: regular expression for a line that opens a chapter.
        keep_lines: keep the line breaks inside paragraphs instead of joining the lines.

    Raises:
        ValueError: the file is no UTF-8 text, or too short to hold anything out.
    """
    text = read_text(path)
    chapters = split_chapters(normalise(text, keep_lines=keep_lines), chapter_pattern)
    parts = hold_out(chapters, held_out, seed)
    if not all(parts):
        raise ValueError(
            f"{path}: expected enough chapters or paragraphs to hold out {held_out:.0%} twice, "
            f"got {len(chapters)} chapters in {len(text)} characters"
        )
    tokenizer = train_tokenizer(parts[0], vocab_size)
    return Corpus(tokenizer, *(Split(part, encode(tokenizer, part)) for part in parts))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got a byte that is none at {error.start}") from None


def normalise(text: str, *, keep_lines: bool) -> str:
    """Strips trailing space and, unless ``keep_lines``, joins the lines of each paragraph with one space."""
    paragraphs = re.split(r"\n[ \t]*(?:\n[ \t]*)+", text.replace("\r\n", "\n"))
    if keep_lines:
        return "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if paragraph.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def split_chapters(text: str, pattern: str) -> list[str]:
    """Cuts before every line that opens a chapter, or into equal pieces where there are few such lines."""
    starts = [match.start() for match in re.finditer(pattern, text, flags=re.MULTILINE)]
    if len(starts) < FEWEST_CHAPTERS:
        breaks = [match.end() for match in re.finditer(r"\n\n", text)]
        size = len(text) / PIECES
        starts = []
        for place in breaks:
            if place >= (len(starts) + 1) * size:
                starts.append(place)
    bounds = [0, *(start for start in starts if start), len(text)]
    chapters = (text[low:high].strip() for low, high in itertools.pairwise(bounds))
    return [chapter for chapter in chapters if chapter]


def hold_out(chapters: list[str], share: float, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Draws whole chapters for validation and test; every part keeps the order of the text."""
    wanted = share * sum(map(len, chapters))
    order = list(range(len(chapters)))
    random.Random(seed).shuffle(order)
    part_of = dict.fromkeys(order, 0)
    for part in (1, 2):
        taken = 0
        while taken < wanted and order:
            index = order.pop()
            part_of[index] = part
            taken += len(chapters[index])
    train, validation, test = (
        [chapters[i] for i in range(len(chapters)) if part_of[i] == p] for p in range(3)
    )
    return train, validation, test


def train_tokenizer(chapters: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and decoding gives it back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    # A prompt begins the way a chapter does in training.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> Tensor:
    """Token ids of all chapters, int64 [tokens]."""
    ids = [token for encoding in tokenizer.encode_batch(chapters) for token in encoding.ids]
    return torch.tensor([*ids, tokenizer.token_to_id(END_OF_TEXT)])
