"""BitLinear: the ternary linear layer, packed for inference or with float weights for training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, packing, reference


class BitLinear(nn.Module):
    """A linear layer with packed ternary weights: ``y = x_int8 @ w.T * (x_scale * weight_scale) + bias``.

    Inference only; it takes 2 bits a weight and runs on the CPU kernels. Activations are quantised to
    int8 per token inside (see `bitnet_ops.reference.ternary_linear` for the exact formula). A fresh
    layer holds zero weights: fill it with `from_linear`, `from_ternary` or ``load_state_dict``.

    Attributes:
        packed_weight: uint8, the weights in the layout drawn in `bitnet_ops.packing`.
        weight_scale: float32 [out_features]. Stays float32 when the module is cast to another dtype.
        bias: float32 [out_features] or None. Stays float32 likewise.

    Example:
        >>> layer = BitLinear.from_linear(nn.Linear(2560, 6912, bias=False))
        >>> layer(torch.randn(4, 2560)).shape
        torch.Size([4, 6912])
    """

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a layer of zero weights.

        Args:
            in_features: K, size of the last axis of the input.
            out_features: N, size of the last axis of the output.
            bias: whether a bias is added.
            device: where the buffers live; ``"meta"`` to fill them later.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        shape = packing.packed_shape(out_features, in_features)
        self.register_buffer(
            "packed_weight", torch.full(shape, packing.zero_byte("tile16"), dtype=torch.uint8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_ternary(cls, w: Tensor, weight_scale: Tensor | float, bias: Tensor | None = None) -> "BitLinear":
        """Packs weights that are ternary already.

        Args:
            w: int8 [out_features, in_features] with values in {-1, 0, 1}.
            weight_scale: the multiplier, a number or a tensor that broadcasts to [out_features].
            bias: float [out_features] or None.

        Raises:
            ValueError: ``w`` is not ternary, or a shape does not fit.
        """
        if w.dim() != 2:
            raise ValueError(f"BitLinear.from_ternary: w: expected 2 dimensions [N, K], got {w.dim()}")
        out_features, in_features = w.shape
        layer = cls(in_features, out_features, bias=bias is not None, device="meta")
        scale = torch.as_tensor(weight_scale, dtype=torch.float32).detach()
        try:
            layer.weight_scale = scale.expand(out_features).contiguous()
        except RuntimeError:
            raise ValueError(
                f"BitLinear.from_ternary: weight_scale: expected a shape that broadcasts to "
                f"[{out_features}], got {list(scale.shape)}"
            ) from None
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(
                    f"BitLinear.from_ternary: bias: expected shape [{out_features}], got {list(bias.shape)}"
                )
            layer.bias = bias.detach().float().clone()
        layer.packed_weight = ops.pack_ternary(w)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "BitLinear":
        """Quantises the float weights of a linear layer (absmean, see `reference.quantize_weight`)."""
        w, scale = reference.quantize_weight(linear.weight.detach())
        layer = cls.from_ternary(w, scale, linear.bias)
        return layer.train(linear.training)

    def unpack(self) -> Tensor:
        """The ternary weights, int8 [out_features, in_features]."""
        return ops.unpack_ternary(self.packed_weight, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        return ops.ternary_linear(
            x, self.packed_weight, self.weight_scale, self.bias, out_features=self.out_features
        )

    def extra_repr(self) -> str:
        """The sizes, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "BitLinear":
        # model.to(torch.bfloat16) must not round the scales: they are numbers of the format, not activations.
        kept = {"weight_scale": self.weight_scale, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


class BitLinearQAT(nn.Linear):
    """An nn.Linear that trains ternary weights: quantisation-aware, with the straight-through estimator.

    The forward pass quantises the float weights (absmean) and the activations (absmax, int8) and gives
    what `BitLinear.from_linear` of this layer gives: both sides of the product are small integers, so in
    float32 the sum is exact for any order up to 2^24 / 128 = 131072 inputs. The backward pass treats both
    quantisers as the identity, i.e. uses the quantised values in the chain rule of a plain linear layer.

    Plain PyTorch, on any device. Under ``torch.autocast`` the products run in the autocast dtype; the
    quantised operands are exact in bfloat16 too, the result is rounded once more.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        y: Tensor = _StraightThroughLinear.apply(x, self.weight)
        return y if self.bias is None else (y.float() + self.bias).to(y.dtype)


class _StraightThroughLinear(torch.autograd.Function):
    """The product of `reference.ternary_linear` with the gradient of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        device = x.device.type
        ctx.compute_dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        )
        q, x_scale = reference.quantize_activations(x)
        w, weight_scale = reference.quantize_weight(weight)
        ctx.save_for_backward(q, x_scale, w, weight_scale)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        with torch.autocast(device, enabled=False):
            acc = F.linear(q.to(ctx.compute_dtype), w.to(ctx.compute_dtype))
            return (acc.float() * (x_scale.unsqueeze(-1) * weight_scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        q, x_scale, w, weight_scale = ctx.saved_tensors
        dtype = ctx.compute_dtype
        grad_x = grad_weight = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = ((grad_y.to(dtype) @ w.to(dtype)).float() * weight_scale).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                rows = (grad_y.float() * x_scale.unsqueeze(-1)).reshape(-1, w.shape[0]).to(dtype)
                grad_weight = (rows.T @ q.reshape(-1, w.shape[1]).to(dtype)).to(ctx.weight_dtype)
        return grad_x, grad_weight


def pack(model: nn.Module) -> nn.Module:
    """Turns every `BitLinearQAT` of a trained model into a packed `BitLinear`, in place.

    Returns:
        The model (a new layer, if ``model`` itself is a `BitLinearQAT`), with the same outputs and the
        float master weights gone. A layer that is used in several places stays one layer.
    """
    if isinstance(model, BitLinearQAT):
        return BitLinear.from_linear(model)
    packed: dict[nn.Module, BitLinear] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BitLinearQAT):
                if child not in packed:
                    packed[child] = BitLinear.from_linear(child)
                setattr(parent, name, packed[child])
    return model
