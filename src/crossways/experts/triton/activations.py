"""The elementwise functions and their derivatives, inside a kernel, in float32."""

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """f(x), for f one of silu, gelu (the exact one) and relu."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(x <= 0.0, 0.0, x)  # unlike maximum, NaN stays NaN


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """f'(x)."""
    if KIND == "silu":
        gate = tl.sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    return tl.where(x > 0.0, 1.0, 0.0)
