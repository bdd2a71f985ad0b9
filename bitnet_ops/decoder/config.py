"""The shape of a BitNet model, with the field names of the published config.json."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class BitNetConfig:
    """Sizes and constants of a BitNet b1.58 model; the defaults are those of 2B4T.

    Every field is checked, because the numbers may come from a file of unknown origin.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward block.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads; must divide ``hidden_size``.
        num_key_value_heads: number of key and value heads; must divide ``num_attention_heads``.
        max_position_embeddings: longest sequence the model was made for.
        rms_norm_eps: added to the mean square in every norm.
        rope_theta: base of the rotary embedding's wavelengths.
        tie_word_embeddings: whether the head uses the embedding matrix.
        bos_token_id: id that opens a text, or None.
        eos_token_id: id or ids that end a text, or None.
        pad_token_id: id that fills up shorter rows of a batch, or None.
        initializer_range: standard deviation of fresh weights.
        dropout: probability with which training zeroes an activation of the residual branches.
    """

    vocab_size: int = 128256
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int = 5
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"BitNetConfig.{name}: expected a positive int, got {value!r}")
        for name, low, high in (
            ("rms_norm_eps", 0.0, 1.0),
            ("rope_theta", 0.0, 1e12),
            ("initializer_range", 0.0, 1e3),
            ("dropout", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ValueError(f"BitNetConfig.{name}: expected a number in [{low}, {high}), got {value!r}")
        if self.rope_theta == 0:
            raise ValueError("BitNetConfig.rope_theta: expected a number above 0, got 0")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(
                f"BitNetConfig.tie_word_embeddings: expected true or false, got {self.tie_word_embeddings!r}"
            )
        self._check_divides("num_attention_heads", "hidden_size")
        self._check_divides("num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ValueError(
                "BitNetConfig.hidden_size / num_attention_heads (the head size): expected an even number, "
                f"because rotary embedding turns pairs, got {self.head_dim}"
            )
        if isinstance(self.eos_token_id, list):  # as JSON has it; a tuple keeps the config hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            for token in ids:
                if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"BitNetConfig.{name}: expected a token id in [0, {self.vocab_size}), got {token!r}"
                    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, however many the file names."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self, **changes: object) -> "BitNetConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def _check_divides(self, small: str, large: str) -> None:
        if getattr(self, large) % getattr(self, small):
            raise ValueError(
                f"BitNetConfig.{small}: expected a divisor of {large} = {getattr(self, large)}, "
                f"got {getattr(self, small)}"
            )
