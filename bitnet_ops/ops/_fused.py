"""Several steps of a decoder layer, or all layers, in one operator. Inference only."""

from collections.abc import Sequence

from torch import Tensor

from ._registry import OPS, batch_rows, check_device, fake_kernel, without_gradient


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    out_features: list[int],
    layout: str = "tile16",
) -> list[Tensor]:
    """``rms_norm``, then ``ternary_linear`` with each of several matrices: the same bits in one call.

    Inference only: it has no gradient, and going back through it is an error.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        packed: matrices from ``pack_ternary(w, layout)``, [N_i, K] each.
        weight_scale: float32 [N_i] each.
        out_features: N_i.
        layout: as in ``pack_ternary``.

    Returns:
        One [..., N_i] a matrix, in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    result: list[Tensor] = without_gradient(
        OPS.norm_linears.default, x, norm_weight, eps, packed, weight_scale, out_features, layout
    )
    return result


@fake_kernel("norm_linears")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    out_features: list[int],
    layout: str = "tile16",
) -> list[Tensor]:
    for matrix, scale in zip(packed, weight_scale, strict=True):
        check_device("norm_linears", x, norm_weight=norm_weight, packed=matrix, weight_scale=scale)
    return [x.new_empty((*x.shape[:-1], size)) for size in out_features]


batch_rows("norm_linears")


def norm_linear_add(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    weight_scale: Tensor,
    layout: str,
    residual: Tensor,
) -> Tensor:
    """``residual + ternary_linear(rms_norm(x))``: the same bits in one call. Inference only.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        packed: from ``pack_ternary(w, layout)``, [N, K].
        weight_scale: float32 [N].
        layout: as in ``pack_ternary``.
        residual: [..., N] in the dtype of ``x``.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    result: Tensor = without_gradient(
        OPS.norm_linear_add.default, x, norm_weight, eps, packed, weight_scale, layout, residual
    )
    return result


@fake_kernel("norm_linear_add")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    weight_scale: Tensor,
    layout: str,
    residual: Tensor,
) -> Tensor:
    check_device(
        "norm_linear_add",
        x,
        norm_weight=norm_weight,
        packed=packed,
        weight_scale=weight_scale,
        residual=residual,
    )
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


batch_rows("norm_linear_add", 6)  # residual


def norm_squared_relu_glu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    gate_scale: Tensor,
    gate_layout: str,
    up: Tensor,
    up_scale: Tensor,
    up_layout: str,
) -> Tensor:
    """``relu(gate(n))^2 * up(n)`` with ``n = rms_norm(x)``: the same values in one call. Inference only.

    With ``up_layout="row"`` and up to four tokens, rows of ``up`` whose gate is closed are not read.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        gate: from ``pack_ternary(w, gate_layout)``, [N, K].
        gate_scale: float32 [N].
        gate_layout: as in ``pack_ternary``.
        up: from ``pack_ternary(w, up_layout)``, [N, K].
        up_scale: float32 [N].
        up_layout: as in ``pack_ternary``.

    Returns:
        [..., N] in the dtype of ``x``. Where the gate is closed it is +0, where the parts may give -0.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    result: Tensor = without_gradient(
        OPS.norm_squared_relu_glu.default,
        x,
        norm_weight,
        eps,
        gate,
        gate_scale,
        gate_layout,
        up,
        up_scale,
        up_layout,
    )
    return result


@fake_kernel("norm_squared_relu_glu")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    gate_scale: Tensor,
    gate_layout: str,
    up: Tensor,
    up_scale: Tensor,
    up_layout: str,
) -> Tensor:
    check_device(
        "norm_squared_relu_glu",
        x,
        norm_weight=norm_weight,
        gate=gate,
        gate_scale=gate_scale,
        up=up,
        up_scale=up_scale,
    )
    return x.new_empty((*x.shape[:-1], gate_scale.shape[0]))


batch_rows("norm_squared_relu_glu")


def decoder_layers(
    x: Tensor,
    norm_weight: Sequence[Tensor],
    eps: float,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    layouts: Sequence[str],
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """The layers of a BitNet decoder over a cache, one after another.

    For each layer, with its part of every list::

        q, k, v = norm_linears(x, norm_weight[0], eps, [q_proj, k_proj, v_proj])
        y = cached_attention(q, k, v, cos, sin, start, keys, values, key_scale, value_scale)
        x = norm_linear_add(y, norm_weight[1], eps, o_proj, x)
        y = norm_squared_relu_glu(x, norm_weight[2], eps, gate_proj, up_proj)
        x = norm_linear_add(y, norm_weight[3], eps, down_proj, x)

    Has no gradients.

    Args:
        x: float32 [B, T, hidden_size].
        norm_weight: float32, four a layer: input, attn_sub, post_attention, ffn_sub.
        eps: of all norms.
        packed: seven a layer: q, k, v, o, gate, up, down; each as in `ternary_linear`.
        weight_scale: float32 [out_features], seven a layer.
        layouts: seven a layer.
        cos: as in `cached_attention`.
        sin: likewise.
        start: likewise.
        keys: as in `cached_attention` with an axis in front, the layers, of which there may be more; changed
            in place.
        values: likewise; changed in place.
        key_scale: likewise, None where the cache is not int8; changed in place.
        value_scale: likewise; changed in place.

    Returns:
        float32 [B, T, hidden_size].

    Raises:
        RuntimeError: if numbers of tensors, dtypes or shapes do not fit together.
    """
    result: Tensor = without_gradient(
        OPS.decoder_layers.default,
        x,
        norm_weight,
        eps,
        packed,
        weight_scale,
        layouts,
        cos,
        sin,
        start,
        keys,
        values,
        key_scale,
        value_scale,
    )
    return result


@fake_kernel("decoder_layers")
def _(
    x: Tensor,
    norm_weight: list[Tensor],
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    layouts: list[str],
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    check_device("decoder_layers", x, cos=cos, sin=sin, start=start, keys=keys, values=values)
    return x.new_empty(x.shape)
