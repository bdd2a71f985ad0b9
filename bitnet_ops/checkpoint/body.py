"""What only the names of tensors say: a body without a head, and norms inside projections.

A model that was saved as transformers' base class (Qwen3Model, Gemma3TextModel), as embedding models are, has
no head and calls its modules without the prefix ``model.``::

    ours                                         such a file's
    model.embed_tokens                           embed_tokens
    model.layers.0.self_attn.q_proj              layers.0.self_attn.q_proj
    model.norm                                   norm

BitNet-embedding-0.6B (a Qwen3) and -270M (a Gemma 3; arXiv:2606.25674, converters in microsoft/BitNet) have a
norm inside every projection besides, with the epsilon of the others and without Gemma's offset. Their weights
are float masters, though config.json need not say it::

    model.layers.0.self_attn.q_proj.norm         layers.0.self_attn.q_proj.norm
    model.layers.0.self_attn.q_proj.linear       layers.0.self_attn.q_proj

Such a norm is another thing than "use_rms_norm" of "quantization_config": that is ``rms_norm`` in files.
"""

from dataclasses import dataclass, replace

from ..decoder.config import DecoderConfig
from .tensor_source import TensorSource
from .weights import BODY_PREFIX, WeightReader

NORM_NAMES = (("_proj.linear", "_proj"), ("_proj.norm", "_proj.norm"))
"""Endings of our names and of the files', as in `Family.published`."""


@dataclass(frozen=True)
class Body:
    """What the names say.

    Attributes:
        is_bare: whether they lack the prefix.
        has_head: whether there is a head of its own.
        has_norms: whether there are norms inside projections, as in BitNet-embedding.
    """

    is_bare: bool
    has_head: bool
    has_norms: bool

    def fit(self, config: DecoderConfig, weights: WeightReader) -> DecoderConfig:
        """Tells the reader about names, and gives the configuration of what is there.

        Args:
            config: as config.json has it.
            weights: reads a published layout; changed in place.
        """
        weights.is_bare = self.is_bare
        if self.has_norms:
            others = [pair for pair in weights.family.published if not pair[0].startswith("_proj.")]
            weights.family = replace(weights.family, published=(*NORM_NAMES, *others))
            config = config.replace(projection_norms=True, projection_norm_eps=config.rms_norm_eps)
        if self.is_bare and not self.has_head:
            # Nobody asks a body for scores; the embedding takes no room that is not taken.
            config = config.replace(tie_word_embeddings=True)
        return config


def find_body(files: TensorSource) -> Body:
    """Looks at the names of the tensors."""
    names = files.tensors
    is_bare = "embed_tokens.weight" in names and f"{BODY_PREFIX}embed_tokens.weight" not in names
    prefix = "" if is_bare else BODY_PREFIX
    return Body(
        is_bare=is_bare,
        has_head="lm_head.weight" in names,
        has_norms=f"{prefix}layers.0.self_attn.q_proj.norm.weight" in names,
    )
