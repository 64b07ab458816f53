// From the sums of whole panels to results; `finish_vector` (bytes.h) does the same for one vector of any kind. A core
// turns sums of its own type into floats.
#pragma once

#include "bytes.h"

namespace trine {
namespace TRINE_ISA {

// 2 W floats side by side.
INLINE void store_pair(float* p, vf a, vf b) { store(p, a), store(p + W, b); }
INLINE void store_pair(bf16* p, vf a, vf b) {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
    memcpy(p, &both, sizeof(both));
#else
    store(p, a), store(p + W, b);
#endif
}

// What a kernel applies last, as few forms as loops want to be compiled for.
enum Last { LAST_CLAMP, LAST_GELU_SHORT, LAST_ANY };

// As finish_vector for rows of floats, or of bf16: `columns` of neighbouring panels. The arguments are copied, since
// stores of bf16 may be to anything, as the compiler sees it.
template <class Residual, class Out, Last LAST, class Core>
static void finish_floats(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                          int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Finish f = a.finish;
    const Residual* residual = static_cast<const Residual*>(f.residual) + first * f.residual_stride + column;
    Out* out = static_cast<Out*>(f.out) + first * f.out_stride + column;
    const float infinity = __builtin_inff();
    const vf low = set1(f.activation == NO_ACTIVATION ? -infinity : 0.0f), high = set1(f.activation == RELU6 ? 6.0f : infinity);
    const auto last = [&](vf y) {
        if (LAST == LAST_CLAMP) return vmin(high, vmax(low, y));
        return LAST == LAST_GELU_SHORT ? gelu_short(y) : activate(y, f.activation);
    };
    int64_t v = 0;
    for (; v + 2 * W <= columns; v += 2 * W) {
        const vf one = set1(1.0f);
        const vf scale0 = f.scale ? load(f.scale + at + v) : one, scale1 = f.scale ? load(f.scale + at + v + W) : one;
        const vf bias0 = f.bias ? load(f.bias + at + v) : zero(), bias1 = f.bias ? load(f.bias + at + v + W) : zero();
        for (int64_t r = 0; r < rows; ++r) {
            vf y0 = fma(core.total(c + r * ldc + v, a, at + v), scale0, bias0);
            vf y1 = fma(core.total(c + r * ldc + v + W, a, at + v + W), scale1, bias1);
            if (f.residual) {
                y0 = add(y0, load(residual + r * f.residual_stride + v));
                y1 = add(y1, load(residual + r * f.residual_stride + v + W));
            }
            store_pair(out + r * f.out_stride + v, last(y0), last(y1));
        }
    }
    for (; v < columns; v += W) {
        const int64_t n = columns - v;
        const vf scale = f.scale ? load(f.scale + at + v) : set1(1.0f), bias = f.bias ? load(f.bias + at + v) : zero();
        for (int64_t r = 0; r < rows; ++r) {
            vf y = fma(core.total(c + r * ldc + v, a, at + v), scale, bias);
            if (f.residual) y = add(y, load_upto(residual + r * f.residual_stride + v, n));
            store_upto(out + r * f.out_stride + v, last(y), n);
        }
    }
}

template <class Residual, class Out, class Core>
static void finish_floats(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                          int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Activation activation = a.finish.activation;
    if (activation <= RELU6)
        finish_floats<Residual, Out, LAST_CLAMP>(a, core, c, ldc, rows, first, column, at, columns);
    else if (activation == GELU && sizeof(Out) == sizeof(bf16))
        finish_floats<Residual, Out, LAST_GELU_SHORT>(a, core, c, ldc, rows, first, column, at, columns);
    else
        finish_floats<Residual, Out, LAST_ANY>(a, core, c, ldc, rows, first, column, at, columns);
}

// Only sums of floats become bf16, or are added to it.
template <class Core>
static void finish_any_floats(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                              int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Finish& f = a.finish;
    if constexpr (__is_same(typename Core::Sum, float)) {
        const bool narrow = f.residual && f.residual_dtype == BF16;
        if (f.out_dtype == BF16)
            return (narrow ? finish_floats<bf16, bf16, Core>
                           : finish_floats<float, bf16, Core>)(a, core, c, ldc, rows, first, column, at, columns);
        if (narrow) return finish_floats<bf16, float, Core>(a, core, c, ldc, rows, first, column, at, columns);
    }
    finish_floats<float, float, Core>(a, core, c, ldc, rows, first, column, at, columns);
}

// Rows of neighbouring panels' sums to results: `columns` of them exist; `at` counts within the padded scale and bias.
template <class Core>
static void finish_run(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                       int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Finish& f = a.finish;
    if (f.in_steps) {  // of integers
        const int32_t* sums = reinterpret_cast<const int32_t*>(c);
        for (int64_t p = 0; p < columns; p += PANEL)
            finish_bytes(f, sums + p, ldc, rows, first, column + p, at + p, min(PANEL, columns - p), core.shares_left(a));
        return;
    }
    if (f.out_dtype <= BF16 && (!f.residual || f.residual_dtype <= BF16) && !f.columns)
        return finish_any_floats(a, core, c, ldc, rows, first, column, at, columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; i += W)
            finish_vector(f, core.total(c + r * ldc + i, a, at + i), first + r, column + i, at + i, columns - i);
}

}  // namespace TRINE_ISA
}  // namespace trine
