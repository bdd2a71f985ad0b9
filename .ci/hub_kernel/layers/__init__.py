"""Forward passes for ``kernels.kernelize``: each takes its tensors from the layer that adopts it.

    BitLinear, AutoBitLinear   layers of the same names in transformers.integrations.bitnet
    RMSNorm                    norms of transformers ("RMSNorm"): ``weight`` and ``variance_epsilon``
    PackedBitLinear            `BitLinear` of this kernel, and of an installed bitnet_ops

Results are those of bitnet_ops, bit for bit. From what transformers' layers gave they differ by the rounding
of sums in float32; in bfloat16 and float16 they are more exact (`bitnet_ops.accelerate`).
"""

from torch import Tensor, nn

from .. import ops
from .matrix import TernaryMatrix
from .repacked import repacked_linear


class BitLinear(nn.Module):
    """``transformers.integrations.bitnet.BitLinear``, of "bitlinear" checkpoints."""

    can_torch_compile = True
    has_backward = False

    out_features: int
    weight: Tensor  # uint8 [out_features / 4, in_features]
    weight_scale: Tensor
    bias: Tensor | None
    rms_norm: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``input``."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return repacked_linear(
            input, self.weight, self.weight_scale, self.bias, "bitlinear", self.out_features
        )


class AutoBitLinear(nn.Module):
    """``transformers.integrations.bitnet.AutoBitLinear``, of "autobitlinear" checkpoints, for inference."""

    can_torch_compile = True
    has_backward = False

    out_features: int
    weight: Tensor  # float [out_features, in_features]
    weight_scale: Tensor  # where online_quant is False
    bias: Tensor | None
    rms_norm: nn.Module | None
    online_quant: bool

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``input``."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        if self.online_quant:
            return repacked_linear(input, self.weight, None, self.bias, "online", self.out_features)
        return repacked_linear(input, self.weight, self.weight_scale, self.bias, "offline", self.out_features)


class RMSNorm(nn.Module):
    """The norm that transformers' models mark as "RMSNorm"; rounded once, where theirs rounds twice."""

    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape and dtype of ``hidden_states``."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class PackedBitLinear(nn.Module):
    """`BitLinear` with packed weights. Gradients are straight-through, as in `ternary_linear`."""

    can_torch_compile = True

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    out_features: int
    layout: str
    activation_bits: int
    group_size: int

    forward = TernaryMatrix.product


__all__ = ["AutoBitLinear", "BitLinear", "PackedBitLinear", "RMSNorm"]
