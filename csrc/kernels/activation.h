// What fused kernels apply last, by name (Activation in csrc/runtime.h). Not-a-number stays one.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

// vmax and vmin give their second operand when one is not a number.
INLINE vf clamp(vf x, float low, float high) { return vmin(set1(high), vmax(set1(low), x)); }

// e^x for every float: overflow gives infinity, underflow a subnormal or 0.
INLINE vf exp_any(vf x) {
    const vf limited = vmin(set1(89.0f), vmax(set1(-104.0f), x));
    const vf n = round_nearest(mul(limited, set1(1.44269504f)));
    vf f = fma(n, set1(-0.693359375f), limited);
    f = fma(n, set1(2.12194440e-4f), f);
    vf p = set1(1.9841270e-4f);
    p = fma(p, f, set1(1.3888889e-3f));
    p = fma(p, f, set1(8.3333333e-3f));
    p = fma(p, f, set1(4.1666667e-2f));
    p = fma(p, f, set1(1.6666667e-1f));
    p = fma(p, f, set1(0.5f));
    p = fma(p, f, set1(1.0f));
    p = fma(p, f, set1(1.0f));
    const vf half = round_nearest(mul(n, set1(0.5f)));
    return scale_exponent(scale_exponent(p, half), sub(n, half));
}

// P(u) / Q(u), the coefficients by rising powers; Q begins with 1.
template <int N, int M>
INLINE vf ratio(vf u, const float (&p)[N], const float (&q)[M]) {
    vf top = set1(p[N - 1]), bottom = set1(q[M - 1]);
    UNROLL
    for (int i = N - 2; i >= 0; --i) top = fma(top, u, set1(p[i]));
    UNROLL
    for (int i = M - 2; i >= 0; --i) bottom = fma(bottom, u, set1(q[i]));
    return div(top, bottom);
}

// tanh and erf as x P(x²) / Q(x²), fitted to the least relative error up to where the function rounds to 1: within 3
// units in the last place for every float (2.1e-8 and 1.9e-8 before rounding).
INLINE vf tanh(vf x) {
    const vf c = clamp(x, -9.02f, 9.02f);
    const vf r = ratio(mul(c, c), {1.0f, 0.133797139f, 0.00349402917f, 2.05833931e-05f, 1.33189566e-08f},
                       {1.0f, 0.467130274f, 0.0258710515f, 0.000328308408f, 7.76197112e-07f});
    return clamp(mul(c, r), -1.0f, 1.0f);
}
INLINE vf erf(vf x) {
    const vf c = clamp(x, -3.92f, 3.92f);
    const vf r = ratio(
        mul(c, c), {1.12837911f, 0.19040589f, 0.0527486466f, 0.00376559189f, 0.000284882146f, 2.05009133e-06f},
        {1.0f, 0.502075553f, 0.114108868f, 0.0149691664f, 0.00116252934f, 3.80917263e-05f});
    return clamp(mul(c, r), -1.0f, 1.0f);
}

INLINE vf gelu_of(vf x, bool approximate) {
    const vf half = mul(x, set1(0.5f));
    if (!approximate) return mul(half, add(set1(1.0f), erf(mul(x, set1(0.70710678f)))));
    const vf inner = mul(set1(0.79788456f), fma(mul(mul(x, x), x), set1(0.044715f), x));
    return mul(half, add(set1(1.0f), tanh(inner)));
}

// 1 / (1 + e^-x), with an exponential that need not reach further than to 2^127: the lowest bits of a number near 1.5 *
// 2^23 are a whole one, which as an exponent is the power of two.
INLINE vf sigmoid(vf x) {
    const vf limited = clamp(x, -88.0f, 86.0f), shift = set1(12582912.0f + 127.0f);
    const vf shifted = fma(limited, set1(-1.44269504f), shift), n = sub(shifted, shift);
    vf f = fma(n, set1(-0.693359375f), sub(zero(), limited));
    f = fma(n, set1(2.12194440e-4f), f);
    vf p = set1(1.3888889e-3f);
    p = fma(p, f, set1(8.3333333e-3f));
    p = fma(p, f, set1(4.1666667e-2f));
    p = fma(p, f, set1(1.6666667e-1f));
    p = fma(p, f, set1(0.5f));
    p = fma(p, f, set1(1.0f));
    p = fma(p, f, set1(1.0f));
    return div(set1(1.0f), fma(p, shift_exponent(shifted), set1(1.0f)));
}
INLINE vf relu(vf x) { return vmax(zero(), x); }

constexpr float GELU_SHORT[] = {0.398486614f,    -0.065324001f,   0.00908080582f, -0.000871875964f,
                                5.34171086e-05f, -1.85128351e-06f, 2.7339631e-08f};

// For results of 8 bits of mantissa: x times a polynomial for the normal distribution's integral, fitted to the least
// error of the product (0.0004), exact from 4 on in either direction.
INLINE vf gelu_short(vf x) {
    const vf c = clamp(x, -4.0f, 4.0f), u = mul(c, c);
    vf p = set1(GELU_SHORT[6]);
    UNROLL
    for (int i = 5; i >= 0; --i) p = fma(p, u, set1(GELU_SHORT[i]));
    return mul(x, fma(c, p, set1(0.5f)));
}

// body(f) with the activation as a function of a vector: a loop in `body` does not choose again for each vector.
template <class Body>
INLINE void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case RELU: return body([](vf x) { return relu(x); });
        case RELU6: return body([](vf x) { return clamp(x, 0.0f, 6.0f); });
        case SIGMOID: return body([](vf x) { return sigmoid(x); });
        case TANH: return body([](vf x) { return tanh(x); });
        case SILU: return body([](vf x) { return mul(x, sigmoid(x)); });
        case HARDSWISH:
            return body([](vf x) { return mul(x, mul(clamp(add(x, set1(3.0f)), 0.0f, 6.0f), set1(1.0f / 6.0f))); });
        case GELU: return body([](vf x) { return gelu_of(x, false); });
        case GELU_TANH: return body([](vf x) { return gelu_of(x, true); });
        default: return body([](vf x) { return x; });
    }
}

INLINE vf activate(vf x, Activation activation) {
    with_activation(activation, [&](auto apply) { x = apply(x); });
    return x;
}

}  // namespace TRINE_ISA
}  // namespace trine
