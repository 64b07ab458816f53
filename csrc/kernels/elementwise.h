// Norms and activations: one pass over memory, rows shared among threads when there is enough to do.
#pragma once

#include "activation.h"
#include "vec.h"

namespace trine {
namespace TRINE_ISA {

// Work worth waking other threads for, in elements.
constexpr int64_t PARALLEL_ELEMENTS = 32 * 1024;

// body(first row, end row), in parallel when rows * size is large.
template <class Body>
INLINE void over_rows(int64_t rows, int64_t size, const Body& body) {
    const int64_t block = max<int64_t>(1, PARALLEL_ELEMENTS / 4 / max<int64_t>(1, size));
    if (rows * size < PARALLEL_ELEMENTS)
        body(int64_t(0), rows);
    else
        parallel(ceil_div(rows, block), [&](int64_t i) { body(i * block, min(rows, i * block + block)); });
}

// The sum over i of f(vector at i), for a row of `size` elements; two chains of sums hide the latency of an addition.
template <class F>
INLINE float sum_over(int64_t size, const F& f) {
    vf even = zero(), odd = zero();
    int64_t i = 0;
    for (; i + W < size; i += 2 * W) {
        even = add(even, f(i));
        odd = add(odd, f(i + W));
    }
    if (i < size) even = add(even, f(i));
    return hsum(add(even, odd));
}

// One row: residual += x (rounded to T, as the residual stream is), then RMS norm or, with a bias, layer norm of it.
template <class T>
static void norm_row(const NormArgs& args, int64_t row) {
    const int64_t size = args.size;
    const T* x = static_cast<const T*>(args.x) + row * size;
    T* residual = args.residual ? static_cast<T*>(args.residual) + row * size : nullptr;
    const T* weight = static_cast<const T*>(args.weight);
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.y) + row * size;
    float* value = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, (size + W) * sizeof(float)));

    const auto read = [&](int64_t i) {
        vf v = load_upto(x + i, size - i);
        if (residual) {
            store_upto(residual + i, add(load_upto(residual + i, size - i), v), size - i);
            v = load_upto(residual + i, size - i);
        }
        store(value + i, v);
        return v;
    };
    float mean = 0, squares;
    if (bias) {
        mean = sum_over(size, read) / size;
        squares = sum_over(size, [&](int64_t i) {
            const vf d = first_n(sub(load(value + i), set1(mean)), zero(), size - i);
            return mul(d, d);
        });
    } else {
        squares = sum_over(size, [&](int64_t i) {
            const vf v = read(i);
            return mul(v, v);
        });
    }
    const vf scale = set1(1.0f / __builtin_sqrtf(squares / size + args.eps));
    for (int64_t i = 0; i < size; i += W) {
        vf v = mul(mul(sub(load(value + i), set1(mean)), scale), load_upto(weight + i, size - i));
        if (bias) v = add(v, load_upto(bias + i, size - i));
        store_upto(y + i, v, size - i);
    }
}

static void norm(const NormArgs& args) {
    with_type(args.dtype, [&](auto type) {
        over_rows(args.rows, args.size, [&](int64_t start, int64_t end) {
            for (int64_t row = start; row < end; ++row) norm_row<decltype(type)>(args, row);
        });
    });
}

// gate_up [rows, 2 * size] to y [rows, size].
static void silu_mul(const void* gate_up, void* y, int64_t rows, int64_t size, DType dtype) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(rows, size, [&](int64_t start, int64_t end) {
            for (int64_t row = start; row < end; ++row) {
                const T* gate = static_cast<const T*>(gate_up) + row * 2 * size;
                T* to = static_cast<T*>(y) + row * size;
                for (int64_t i = 0; i < size; i += W) {
                    const vf activated = silu(load_upto(gate + i, size - i));
                    store_upto(to + i, mul(activated, load_upto(gate + size + i, size - i)), size - i);
                }
            }
        });
    });
}

static void gelu(const void* x, void* y, int64_t count, bool approximate, DType dtype) {
    constexpr int64_t block = PARALLEL_ELEMENTS / 4;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(ceil_div(count, block), block, [&](int64_t start, int64_t end) {
            for (int64_t i = start * block; i < min(count, end * block); i += W)
                store_upto(static_cast<T*>(y) + i,
                           gelu_of(load_upto(static_cast<const T*>(x) + i, count - i), approximate), count - i);
        });
    });
}

}  // namespace TRINE_ISA
}  // namespace trine
