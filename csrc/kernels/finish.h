// From the sums of whole panels to results; `finish_vector` (bytes.h) does the same for one vector of any kind. A core
// turns sums of its own type into floats.
#pragma once

#include "bytes.h"

namespace trine {
namespace TRINE_ISA {

// As finish_vector for the rows of one panel: bytes out of sums, with what is constant for a column in registers.
template <class Core>
static void finish_bytes(const WindowArgs& a, const Core& core, const typename Core::Sum* c, int64_t ldc, int64_t rows,
                         int64_t first, int64_t column, int64_t at) {
    const Finish& f = a.finish;
    constexpr int V = PANEL / W;
    const vf inverse = set1(f.out_inverse), low = set1(f.activation == NO_ACTIVATION ? -65536.0f : 0.0f);
    const vf high = set1(f.activation == RELU6 ? 6.0f * f.out_inverse : 65536.0f);
    const float step = f.residual ? f.residual_scale * f.out_inverse : 0.0f;
    vf scale[V], bias[V];
    UNROLL
    for (int v = 0; v < V; ++v) {
        scale[v] = mul(load(f.scale + at + v * W), inverse);
        bias[v] = f.bias ? mul(load(f.bias + at + v * W), inverse) : zero();
        bias[v] = sub(bias[v], set1(step * f.residual_zero));
    }
    const char* residual = static_cast<const char*>(f.residual) + first * f.residual_stride + column;
    char* out = static_cast<char*>(f.out) + first * f.out_stride + column;
    for (int64_t r = 0; r < rows; ++r, residual += f.residual_stride, out += f.out_stride) {
        vf y[V];
        UNROLL
        for (int v = 0; v < V; ++v) {
            y[v] = fma(core.total(c + r * ldc + v * W, a, at + v * W), scale[v], bias[v]);
            if (f.residual) y[v] = fma(bytes_to_float(residual + v * W, W, f.residual_dtype, 0), set1(step), y[v]);
            y[v] = vmin(high, vmax(low, y[v]));
        }
        store_panel(out, y, f.out_dtype, f.out_zero);
    }
}

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
    if (columns == PANEL && is_simple(f)) return finish_bytes(a, core, c, ldc, rows, first, column, at);
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
