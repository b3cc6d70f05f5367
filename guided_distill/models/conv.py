"""The convolution of the networks here: XLA's own, with gradients that keep their speed on the CPU.

XLA hands a convolution to its fast CPU kernels only in the layout NHWC x HWIO -> NHWC. The weight gradient that JAX
derives is in another layout, which XLA rewrites outside loops but not inside `lax.scan` or `lax.fori_loop`: there it
falls to a scalar loop of 1-2 GFLOP/s. Written in the fast layout from the start it reaches 40-90 GFLOP/s on one core,
in a loop or outside; nine matmuls over shifted slices took more core time at every shape tried (jax 0.10.2).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = lax.ConvDimensionNumbers(lhs_spec=(0, 3, 1, 2), rhs_spec=(3, 2, 0, 1), out_spec=(0, 3, 1, 2))


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
):
    """Stands in for `lax.conv_general_dilated` (same values, same gradients) in `nn.Conv(conv_general_dilated=...)`.

    lhs [B, H, W, C], rhs [kh, kw, C, F] -> [B, H, W, F] for an undilated, ungrouped "SAME" convolution with stride 1
    and an odd kernel, which has reverse-mode gradients only; anything else goes to `lax.conv_general_dilated`.
    """
    plain = (
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
        and all(side % 2 for side in rhs.shape[:2])
        and set((*window_strides, *(lhs_dilation or ()), *(rhs_dilation or ()))) == {1}
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and (padding == "SAME" or tuple(map(tuple, padding)) == _same(rhs))
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    if rhs.shape[:2] == (1, 1):
        return jnp.matmul(lhs, rhs[0, 0], precision=precision)
    return _conv(lhs, rhs, precision)


def _same(rhs):
    return tuple((side // 2, side // 2) for side in rhs.shape[:2])


def _lax_conv(lhs, rhs, padding, precision):
    return lax.conv_general_dilated(lhs, rhs, (1, 1), padding, dimension_numbers=_NHWC, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(lhs, rhs, precision):
    return _lax_conv(lhs, rhs, _same(rhs), precision)


def _conv_fwd(lhs, rhs, precision):
    # Not `_conv`, into which a policy of rematerialisation does not look.
    return _lax_conv(lhs, rhs, _same(rhs), precision), (lhs, rhs)


def _conv_bwd(precision, residuals, g):
    # Chosen where the program is lowered, for the platform it is lowered for: programs for a TPU are also compiled
    # on machines that have none.
    return lax.platform_dependent(
        *residuals,
        g,
        cpu=functools.partial(_gradients_cpu, precision),
        default=functools.partial(_gradients_lax, precision),
    )


def _gradients_cpu(precision, lhs, rhs, g):
    same = _same(rhs)
    lhs_bar = _lax_conv(g, rhs[::-1, ::-1].swapaxes(2, 3), same, precision)
    # Channels stand in for the batch and the batch for channels; one side is a kernel as large as the image: the one
    # with more channels, since the other one's transpose is dearer. With lhs as the kernel the result is mirrored.
    if lhs.shape[3] > g.shape[3]:
        rhs_bar = _lax_conv(g.transpose(3, 1, 2, 0), lhs.transpose(1, 2, 0, 3), same, precision)
        return lhs_bar, rhs_bar[:, ::-1, ::-1].transpose(1, 2, 3, 0)
    rhs_bar = _lax_conv(lhs.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), same, precision)
    return lhs_bar, rhs_bar.transpose(1, 2, 0, 3)


def _gradients_lax(precision, lhs, rhs, g):
    return jax.vjp(lambda lhs, rhs: _lax_conv(lhs, rhs, _same(rhs), precision), lhs, rhs)[1](g)


_conv.defvjp(_conv_fwd, _conv_bwd)
