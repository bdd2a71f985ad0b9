r"""The names in ``tokenizer.ggml.pre``: how a byte-level tokenizer cuts text before it merges.

Byte-level BPE merges inside "words" only. GGUF stores neither the expression that finds the words nor the
normalizer, but a name; each is built here as the tokenizer.json of its models has it:

    name                                      words             first    a word that is a token   BOS
    llama-bpe, llama3, falcon3, falcon_e ...  Llama 3's         -        is not merged            yes
    smaug-bpe, dbrx                           Llama 3's         -        is merged like others    no
    qwen2                                     Qwen 2's          NFC      is merged like others    no
    gpt-2                                     GPT-2's           -        is merged like others    no
    olmo                                      GPT-2's           NFC      is merged like others    no
    smollm                                    digits, GPT-2's   -        is merged like others    no

"BOS": whether a text begins with it where the file has no ``add_bos_token``. llama.cpp has the same columns
(src/llama-vocab.cpp), except that it never normalizes: it gives other tokens than Qwen 2's own tokenizer to
a letter and a combining accent. ``falcon_e`` is microsoft/BitNet's name for Falcon-E.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """What one name of ``tokenizer.ggml.pre`` stands for.

    Attributes:
        names: the first is the one that is written.
        words: the expression that finds words; None for GPT-2's, which `tokenizers` has built in.
        digits: whether each digit is a word of its own.
        nfc: whether text is first brought into Unicode's composed form.
        whole_words: whether a word that is a token stays whole, even if no merges lead to it.
        adds_bos: whether a text begins with the BOS token where the file does not say.
    """

    names: tuple[str, ...]
    words: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """The steps as tokenizer.json has them, without what changes offsets only."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.words is not None:
            pattern = {"Regex": self.words}
            steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": self.words is None})
        return steps

    def set(self, tokenizer: Tokenizer) -> None:
        """Gives a tokenizer this pre-tokenizer and its normalizer."""
        steps: list[Any] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.words is not None:
            steps.append(pre_tokenizers.Split(Regex(self.words), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.words is None))
        tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()


PRE_TOKENIZERS = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e", "falcon-h1", "lfm2"),
        words=_LLAMA3,
        whole_words=True,
        adds_bos=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx"), words=_LLAMA3),
    PreTokenizer(("qwen2",), words=_QWEN2, nfc=True),
    PreTokenizer(("gpt-2",)),
    PreTokenizer(("olmo",), nfc=True),
    PreTokenizer(("smollm",), digits=True),
)

BY_NAME = {name: kind for kind in PRE_TOKENIZERS for name in kind.names}


def recognize(data: dict[str, Any]) -> PreTokenizer | None:
    """The entry that a tokenizer is an instance of.

    Args:
        data: tokenizer.json.

    Returns:
        The entry; or None, if GGUF has no name for this pre-tokenizer, or not with this normalizer.
    """
    normalizer = data["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    given = data["pre_tokenizer"]
    if given is None:
        return None
    steps = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    whole_words = bool(data["model"].get("ignore_merges"))
    for kind in PRE_TOKENIZERS:
        if kind.steps() == steps and kind.nfc == (normalizer is not None) and kind.whole_words == whole_words:
            return kind
    return None
