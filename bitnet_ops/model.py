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
        tokenizer: from text to ids and back, or None. This and the next three come from the checkpoint;
            the forward pass does not look at them.
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
    model: str | os.PathLike[str],
    *,
    linear: type[nn.Module] = BitLinear,
    activation_bits: int | None = None,
    revision: str | None = None,
    arm_i2_s: bool = False,
    mmap: bool | None = None,
) -> BitNet:
    """Loads a model from a folder, a GGUF file, or the Hugging Face hub.

    docs/models.md lists the models and formats. What a family's settings may be is in bitnet_ops/families.
    Peak memory stays near the size of the packed model: tensors are packed one at a time, or used where they
    lie in the file. A bar shows the progress on a terminal. ``bitnet-ops convert`` writes a folder that loads
    at once.

    Args:
        model: a folder in the Hugging Face layout: config.json and model.safetensors, or several files with
            model.safetensors.index.json. It may hold tokenizer.json, generation_config.json, and
            chat_template.jinja or tokenizer_config.json. What `save_pretrained` wrote is such a folder.
            Or a .gguf file, which holds settings, tokenizer and chat template as well.
            Or a name on the Hugging Face hub, a string: "owner/repo", "owner/repo@revision" or
            "owner/repo:file.gguf". The files that are needed are downloaded into the cache of
            huggingface_hub, and the revision is printed on stderr. Nothing is downloaded for a model on disk.
        linear: the class of projections: `BitLinear`, or `torch.nn.Linear` for a model that is not ternary,
            whose projections are then float32. Packed folders have no such projections.
        activation_bits: of models with group scales, which were trained with float activations, such as
            Ternary-Bonsai: 16 (one scale a token), or 8 (a scale for each group of inputs, "8-bit blocks"),
            which is faster and rounds more; docs/numerics.md says how much. None for what the files say,
            which is 16 for published models. The width belongs to the loaded model: `save_pretrained` and
            `save_gguf` write it down. Models with one scale a row have the width that they were made for.
        revision: branch, tag or commit of a name on the hub; "owner/repo@revision" says the same.
        arm_i2_s: a GGUF file's type I2_S is that of an ARM build of bitnet.cpp (since November 2025), which
            orders weights otherwise. Nothing in the file says so; read wrongly, a model writes nonsense.
        mmap: use tensors where they lie in the files: no time, no second copy, and processes share them. The
            files must then not be rewritten in place while the model lives, or the system ends the process;
            replacing them is fine. None does so with what `save_pretrained` wrote, which replaces files, but
            for what every token reads as a whole (projections and the head's copy): from memory of its own,
            in larger pages, that is read faster.

    Returns:
        The model in eval mode and without gradients. The embedding keeps its stored dtype, norms are
        float32. ``model.tokenizer`` (a tokenizers.Tokenizer or None), ``model.chat_template`` (str or None)
        and ``model.generation_config`` (dict) are what the checkpoint has.

    Raises:
        CheckpointError: a ValueError that names the file and the tensor or field at fault, or says how to get
            a model that is not there.
        ValueError: an argument does not fit the model.

    Example:
        >>> model = bitnet_ops.from_pretrained("microsoft/bitnet-b1.58-2B-4T")
        >>> model(torch.tensor([model.tokenizer.encode("The sea").ids])).shape
        torch.Size([1, 3, 128256])
    """
    return checkpoint.load(
        model,
        BitNet,
        linear=linear,
        activation_bits=activation_bits,
        revision=revision,
        arm_i2_s=arm_i2_s,
        mmap=mmap,
    )
