// From the sums of whole panels to results; `finish_vector` (bytes.h) does the same for one vector of any kind. A core
// turns sums of its own type into floats.
#pragma once

#include "bytes.h"

namespace trine {
namespace TRINE_ISA {

// As finish_vector for rows of floats, or of bf16: `columns` of a panel.
template <class Residual, class Out, class Core>
static void finish_floats(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                          int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Finish& f = a.finish;
    const Residual* residual = static_cast<const Residual*>(f.residual) + first * f.residual_stride + column;
    Out* out = static_cast<Out*>(f.out) + first * f.out_stride + column;
    const float infinity = __builtin_inff();
    const vf low = set1(f.activation == NO_ACTIVATION ? -infinity : 0.0f), high = set1(f.activation == RELU6 ? 6.0f : infinity);
    for (int64_t v = 0; v < columns; v += W) {
        const int64_t n = columns - v;
        const vf scale = f.scale ? load(f.scale + at + v) : set1(1.0f), bias = f.bias ? load(f.bias + at + v) : zero();
        for (int64_t r = 0; r < rows; ++r) {
            vf y = fma(core.total(c + r * ldc + v, a, at + v), scale, bias);
            if (f.residual) y = add(y, load_upto(residual + r * f.residual_stride + v, n));
            y = f.activation > RELU6 ? activate_for<Out>(y, f.activation) : vmin(high, vmax(low, y));
            store_upto(out + r * f.out_stride + v, y, n);
        }
    }
}

// Rows of one panel's sums to results: `columns` of them exist; `at` counts within the padded scale and bias.
template <class Core>
static void finish_run(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                       int64_t first, int64_t column, int64_t at, int64_t columns) {
    const Finish& f = a.finish;
    if (f.in_steps)  // of integers
        return finish_bytes(f, reinterpret_cast<const int32_t*>(c), ldc, rows, first, column, at, columns, core.shares_left(a));
    if ((!f.residual || f.residual_dtype <= BF16) && f.out_dtype <= BF16 && !f.columns) {
        const bool narrow = f.residual && f.residual_dtype == BF16;
        if (f.out_dtype == F32)
            return (narrow ? finish_floats<bf16, float, Core>
                           : finish_floats<float, float, Core>)(a, core, c, ldc, rows, first, column, at, columns);
        return (narrow ? finish_floats<bf16, bf16, Core>
                       : finish_floats<float, bf16, Core>)(a, core, c, ldc, rows, first, column, at, columns);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; i += W)
            finish_vector(f, core.total(c + r * ldc + i, a, at + i), first + r, column + i, at + i, columns - i);
}

}  // namespace TRINE_ISA
}  // namespace trine
