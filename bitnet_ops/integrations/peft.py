"""LoRA adapters (arXiv:2106.09685) beside packed layers, with the `peft` library.

`peft` knows by their class which layers it can adapt. `adapt_packed_layers` tells a config about `BitLinear`:

    config = adapt_packed_layers(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(bitnet_ops.from_pretrained(folder), config)
    ...                                                      # train, with any loop
    model.save_pretrained("adapter")

    config = adapt_packed_layers(PeftConfig.from_pretrained("adapter"))
    model = PeftModel.from_pretrained(bitnet_ops.from_pretrained(folder), "adapter", config=config)

In models with norms inside their projections ("use_rms_norm") the layers are called "q_proj.linear".
"""

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from ..layers.linear import BitLinear


def adapt_packed_layers(config: LoraConfig) -> LoraConfig:
    """Lets adapters of this config stand beside `BitLinear` layers as well.

    Args:
        config: changed in place. Its file does not keep this, so call it for a loaded config too.

    Returns:
        The config.

    Raises:
        TypeError: ``config`` is of another kind of adapter.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"adapt_packed_layers: config: expected a peft.LoraConfig, got {type(config).__name__}"
        )
    config._register_custom_module({BitLinear: LoraBitLinear})
    return config


class LoraBitLinear(lora.Linear):
    """``BitLinear(x) + lora_B(lora_A(dropout(x))) * scaling``.

    The packed layer stays as it is, and quantises its input as ever; the adapter computes in its own float
    dtype. They cannot be merged: what an adapter adds is not ternary.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        """Is called by peft, for the first adapter of a layer."""
        with warnings.catch_warnings():
            # peft's words about every layer that is not in its own list.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, config, **options)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only: DoRA and its like change float weights, and peft refuses them by this list."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any
    ) -> None:
        """Is called by peft for every adapter of a layer.

        Raises:
            ValueError: the adapter is to start from float weights.
        """
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                "LoRA of packed layers: init_lora_weights: expected True, False or 'gaussian', since there "
                f"are no float weights to start from, got {config.init_lora_weights!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises RuntimeError."""
        raise RuntimeError(
            "LoRA adapters of packed layers cannot be merged, since what they add is not ternary: keep them "
            "beside the layers (unload() takes them away), or merge into the float weights before pack()"
        )
