"""`BitNet`: a language model with all that users do with one: load it, save it, write text."""

from __future__ import annotations

import os

from torch import nn

from . import checkpoint
from .decoder.model import LanguageModel
from .embedding.mixin import EmbeddingMixin
from .generation.mixin import GenerationMixin
from .layers.linear import BitLinear


class BitNet(GenerationMixin, EmbeddingMixin, LanguageModel):
    """A ternary language model: BitNet b1.58 2B4T, a Llama, or any other that `DecoderConfig` describes.

    Calling it gives scores; `generate`, `stream` and `encode` write text; `embed` makes vectors of texts.

    Args:
        config: what it is made of; `BitNetConfig` for the architecture of 2B4T.
        linear: makes the projections. `BitLinear` (packed, inference) by default, `BitLinearQAT` to train.

    Attributes:
        tokenizer: from text to ids and back, or None. This and the next three come from the checkpoint's
            folder; the forward pass does not look at them.
        chat_template: Jinja text that turns a conversation into a prompt, or None.
        generation_config: the checkpoint's defaults for `generate`, as generation_config.json has them, or
            None.
        embedding_settings: how the model makes a vector of a text, where it was trained for that, or None.

    Example:
        >>> model = BitNet(BitNetConfig(vocab_size=256, hidden_size=64, ...), BitLinearQAT)
        >>> logits = model(torch.randint(256, (1, 10)))     # [1, 10, 256]
    """

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a packed model to a folder; see `bitnet_ops.save_pretrained`."""
        checkpoint.save_pretrained(self, folder)


def from_pretrained(
    folder: str | os.PathLike[str], *, linear: type[nn.Module] = BitLinear, mmap: bool | None = None
) -> BitNet:
    """Loads a model from a local folder; nothing is ever downloaded.

    Understands the published layouts of BitNet b1.58 2B4T and of Llama-class models whose
    ``quantization_config`` is "bitnet" (Llama3-8B-1.58, Falcon3-1.58bit, Falcon-E): packed, ternary floats,
    or master weights, which are quantised here. And what `save_pretrained` and ``bitnet-ops convert`` write.
    What a family's config.json may say is in bitnet_ops/families. Weights come from model.safetensors, or
    from several files with model.safetensors.index.json. Peak memory stays near the size of the packed
    model: tensors are packed one at a time, or used where they lie in the file. A bar shows the progress on
    a terminal.

    Args:
        folder: holds config.json and the safetensors files; may hold tokenizer.json,
            generation_config.json, and chat_template.jinja or tokenizer_config.json.
        linear: the class of projections: `BitLinear`, or `torch.nn.Linear` for a model that is not ternary,
            whose projections are then float32.
        mmap: use tensors where they lie in the files: no time, no second copy, and processes share them. The
            files must then not be rewritten in place while the model lives, or the system ends the process;
            replacing them is fine. None does so with what `save_pretrained` wrote, which replaces files.

    Returns:
        The model in eval mode and without gradients. The embedding keeps its stored dtype, norms are
        float32. ``model.tokenizer`` (a tokenizers.Tokenizer or None), ``model.chat_template`` (str or None)
        and ``model.generation_config`` (dict) are what the folder has.

    Raises:
        CheckpointError: a ValueError that names the file and the tensor or field at fault.

    Example:
        >>> model = bitnet_ops.from_pretrained("bitnet-2b4t")
        >>> model(torch.tensor([model.tokenizer.encode("The sea").ids])).shape
        torch.Size([1, 3, 128256])
    """
    return checkpoint.load(folder, BitNet, linear=linear, mmap=mmap)
