"""What a decoder is made of: sizes, optional parts, and constants, checked.

Every ternary model in use is the same four steps with optional parts::

    q, k, v = projections(norm(x))              q, k = norm(q), norm(k)        qk_norm
    x = x + o_proj(norm(attention(q, k, v)))                                   sub_norms, post_norms
    g = activation(gate_proj(m)) * up_proj(m)   with m = norm(x)
    x = x + down_proj(norm(g))                                                 sub_norms, post_norms

`DecoderConfig` says which parts a model has; bitnet_ops/families/ says it for each family.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from .checks import check_number, check_sizes
from .rope_scaling import RopeScaling as RopeScaling

ACTIVATIONS = ("relu2", "silu", "gelu_tanh")
"""Of the gate; formulas in `bitnet_ops.reference.glu`."""


Config = TypeVar("Config", bound="DecoderConfig")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes, parts and constants of a decoder.

    Every field is checked, because the numbers may come from a file of unknown origin.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward block.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; must divide ``num_attention_heads``.
        max_position_embeddings: longest sequence the model was made for.
        head_dim: width of one attention head; None for ``hidden_size / num_attention_heads``. Even.
        rms_norm_eps: added to the mean square in every norm.
        activation: of the gate: "relu2", "silu" or "gelu_tanh".
        sub_norms: a norm ("subln") in front of ``o_proj`` and of ``down_proj``.
        qk_norm: a norm over each head of the queries and of the keys.
        post_norms: a norm behind the attention and behind the feed-forward block.
        projection_norms: a norm of its own inside every projection, in front of its weights.
        projection_norm_eps: added to the mean square in these; None for ``rms_norm_eps``.
        attention_bias: a bias in ``q_proj``, ``k_proj``, ``v_proj``.
        attention_output_bias: a bias in ``o_proj``; None for that of the others.
        mlp_bias: a bias in ``gate_proj``, ``up_proj``, ``down_proj``.
        activation_bits: 8, or 16 for models that were not trained with 8-bit activations.
        group_size: 0 for one weight scale a row; 64, 128 or 256 inputs that share one.
        ternary_embedding: whether the embedding is ternary, with scales of such groups.
        ternary_head: likewise the head, which multiplies with ``activation_bits``; where it is the embedding,
            None or the same.
        rope_theta: base of the rotary embedding's wavelengths.
        rope_scaling: how they are stretched, or None.
        local_rope_theta: base in local layers; None for ``rope_theta``. Not stretched.
        window: positions that a token of a local layer sees, its own included; 0 for no local layers.
        local_layers: numbers of the local layers.
        query_scale: multiplies the scores of attention; None for ``head_dim ** -0.5``.
        embedding_scale: multiplies embeddings.
        residual_scale: multiplies what a block adds to the residual stream.
        logit_scale: multiplies the hidden states that the head turns into scores.
        tie_word_embeddings: whether the head uses the embedding matrix.
        bos_token_id: id that opens a text, or None.
        eos_token_id: id or ids that end a text, or None.
        pad_token_id: id that fills up shorter rows of a batch, or None.
        initializer_range: standard deviation of fresh weights.
        dropout: probability with which training zeroes an activation of the residual branches.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int = None  # type: ignore[assignment]  # None stands for a size that follows from the others
    rms_norm_eps: float = 1e-5
    activation: str = "silu"
    sub_norms: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    projection_norms: bool = False
    projection_norm_eps: float = None  # type: ignore[assignment]  # likewise, a number
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    activation_bits: int = 8
    group_size: int = 0
    ternary_embedding: bool = False
    ternary_head: bool = None  # type: ignore[assignment]  # likewise
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    window: int = 0
    local_layers: tuple[int, ...] = ()
    query_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
        self._resolve("num_key_value_heads", "num_attention_heads")
        if self.head_dim is None:
            self._resolve("num_attention_heads", "hidden_size")
            self._set(head_dim=self.hidden_size // self.num_attention_heads)
        check_sizes(self, "head_dim")
        if self.head_dim % 2:
            self._refuse("head_dim", "an even number, because rotary embedding turns pairs")
        if self.projection_norm_eps is None:
            self._set(projection_norm_eps=self.rms_norm_eps)
        for name, low, high in (
            ("rms_norm_eps", 0.0, 1.0),
            ("projection_norm_eps", 0.0, 1.0),
            ("initializer_range", 0.0, 1e3),
            ("dropout", 0.0, 1.0),
        ):
            check_number(self, name, low, high)
        for name in ("rope_theta", "local_rope_theta", "query_scale"):
            if getattr(self, name) is not None or name == "rope_theta":
                check_number(self, name, 0.0, 1e12, above=True)
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            check_number(self, name, 0.0, 1e6, above=True)
        if self.attention_output_bias is None:
            self._set(attention_output_bias=self.attention_bias)
        if self.ternary_head is None:
            self._set(ternary_head=self.tie_word_embeddings and self.ternary_embedding)
        for field in dataclasses.fields(self):
            if field.type in (bool, bool | None) and not isinstance(getattr(self, field.name), bool):
                self._refuse(field.name, "true or false")
        if self.activation not in ACTIVATIONS:
            self._refuse("activation", " or ".join(map(repr, ACTIVATIONS)))
        # The type as well: `in` would take 8.0 for 8.
        if type(self.activation_bits) is not int or self.activation_bits not in (8, 16):
            self._refuse("activation_bits", "8 or 16")
        if type(self.group_size) is not int or self.group_size not in (0, 64, 128, 256):
            self._refuse("group_size", "0, 64, 128 or 256")
        if self.tie_word_embeddings and self.ternary_head != self.ternary_embedding:
            self._refuse(
                "ternary_head",
                f"ternary_embedding = {self.ternary_embedding}, for tie_word_embeddings makes them one",
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            self._refuse("rope_scaling", "a RopeScaling or None")
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)
        if type(self.window) is not int or not 0 <= self.window < 2**31:
            self._refuse("window", "an int in [0, 2^31)")
        if isinstance(self.local_layers, (list, range)):  # a list, as JSON has it
            self._set(local_layers=tuple(self.local_layers))
        if not isinstance(self.local_layers, tuple) or not all(
            type(n) is int and 0 <= n < self.num_hidden_layers for n in self.local_layers
        ):
            self._refuse("local_layers", f"numbers of layers in [0, {self.num_hidden_layers})")
        if bool(self.local_layers) != bool(self.window):
            self._refuse("local_layers", "some where window is not 0, none where it is")
        if isinstance(self.eos_token_id, list):  # as JSON has it; a tuple keeps the config hashable
            self._set(eos_token_id=tuple(self.eos_token_id))
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            for token in ids:
                if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"{type(self).__name__}.{name}: expected a token id in [0, {self.vocab_size}), "
                        f"got {token!r}"
                    )

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """What multiplies the scores of attention."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, however many the file names."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self: Config, **changes: Any) -> Config:
        """A copy with some fields changed.

        What None stands for follows the other fields where it did before: ``head_dim``,
        ``attention_output_bias``, ``projection_norm_eps`` and ``ternary_head``.
        """
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            changes.setdefault("head_dim", None)
        if self.attention_output_bias == self.attention_bias:
            changes.setdefault("attention_output_bias", None)
        if self.projection_norm_eps == self.rms_norm_eps:
            changes.setdefault("projection_norm_eps", None)
        if self.ternary_head == (self.tie_word_embeddings and self.ternary_embedding):
            changes.setdefault("ternary_head", None)
        return dataclasses.replace(self, **changes)

    def _check_scaling(self, scaling: RopeScaling) -> None:
        if scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"{type(self).__name__}.rope_scaling: expected head_dim / 2 = {self.head_dim // 2} factors, "
                f"got {len(scaling.factors)}"
            )
        # The number of turns is a logarithm to this base.
        if scaling.kind == "yarn" and self.rope_theta <= 1:
            self._refuse("rope_theta", "a number above 1, because rope_scaling is 'yarn'")

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}")

    def _resolve(self, small: str, large: str) -> None:
        if getattr(self, large) % getattr(self, small):
            self._refuse(small, f"a divisor of {large} = {getattr(self, large)}")


@dataclass(frozen=True)
class BitNetConfig(DecoderConfig):
    """`DecoderConfig` with the sizes and parts of BitNet b1.58 2B4T (arXiv:2504.12285) as defaults."""

    vocab_size: int = 128256
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int = 5
    max_position_embeddings: int = 4096
    activation: str = "relu2"
    sub_norms: bool = True
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001
