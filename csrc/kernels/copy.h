// Copies between any two layouts: rows moved as they are, matrices turned by blocks of 8 x 8, all else one by one.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

constexpr int COPY_DIMS = 8;

// Dimensions stand in the order of y's strides, the largest first; no two neighbours could be one.
struct CopyArgs {
    const void* x;
    void* y;
    int64_t shape[COPY_DIMS], x_strides[COPY_DIMS], y_strides[COPY_DIMS];  // in elements
    int64_t dims, itemsize;
    int64_t turned;  // the dimension that x has innermost (stride 1) when it is another than y's; else -1
};

// body(x offset, y offset) for all indices of the dimensions but the last and `turned`, shared among threads.
template <class Body>
INLINE void over_outer(const CopyArgs& args, int64_t skip, int64_t parts, int64_t bytes, const Body& body) {
    int64_t count = 1;
    for (int d = 0; d < args.dims - 1; ++d)
        if (d != skip) count *= args.shape[d];
    const auto one = [&](int64_t i) {
        int64_t rest = i / parts, x = 0, y = 0;
        for (int64_t d = args.dims - 2; d >= 0; --d) {
            if (d == skip) continue;
            const int64_t index = rest % args.shape[d];
            rest /= args.shape[d];
            x += index * args.x_strides[d];
            y += index * args.y_strides[d];
        }
        body(x, y, i % parts);
    };
    // Tasks of some 64 KiB.
    const int64_t total = count * parts, group = max<int64_t>(1, 64 * 1024 * total / max<int64_t>(1, bytes));
    if (bytes <= 128 * 1024)
        for (int64_t i = 0; i < total; ++i) one(i);
    else
        parallel(ceil_div(total, group), [&](int64_t task) {
            for (int64_t i = task * group; i < min(total, (task + 1) * group); ++i) one(i);
        });
}

template <class T>
static void copy_of(const CopyArgs& args, int64_t bytes) {
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    const int64_t last = args.dims - 1, n = args.shape[last], xs = args.x_strides[last], ys = args.y_strides[last];
    if (xs == 1 && ys == 1) {
        // Long rows are cut, so that threads share them.
        const int64_t parts = max<int64_t>(1, min(n, n * int64_t(sizeof(T)) / (64 * 1024)));
        over_outer(args, -1, parts, bytes, [&](int64_t from, int64_t to, int64_t part) {
            const int64_t start = n * part / parts, end = n * (part + 1) / parts;
            const T* source = x + from + start;
            T* target = y + to + start;
            if ((end - start) * sizeof(T) <= 64)
                for (int64_t i = 0; i < end - start; ++i) target[i] = source[i];
            else
                memcpy(target, source, (end - start) * sizeof(T));
        });
        return;
    }
    if (args.turned >= 0 && ys == 1 && sizeof(T) == 4) {
        const int64_t t = args.turned, m = args.shape[t], yt = args.y_strides[t];
        constexpr int64_t block = 64;
        over_outer(args, t, ceil_div(m, block), bytes, [&](int64_t from, int64_t to, int64_t part) {
            const int64_t start = part * block, end = min(m, start + block);
            for (int64_t j = 0; j < n; j += 8)
                for (int64_t i = start; i < end; i += 8) {
                    const float* source = reinterpret_cast<const float*>(x + from + i + j * xs);
                    float* target = reinterpret_cast<float*>(y + to + i * yt + j);
                    if (i + 8 <= end && j + 8 <= n) {
                        __m256 r[8];
                        for (int k = 0; k < 8; ++k) r[k] = _mm256_loadu_ps(source + k * xs);
                        transpose8(r);
                        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(target + k * yt, r[k]);
                    } else {
                        for (int64_t k = 0; k < min<int64_t>(8, n - j); ++k)
                            for (int64_t l = 0; l < min<int64_t>(8, end - i); ++l)
                                target[l * yt + k] = source[k * xs + l];
                    }
                }
        });
        return;
    }
    over_outer(args, -1, 1, bytes, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t i = 0; i < n; ++i) y[to + i * ys] = x[from + i * xs];
    });
}

static void copy(const CopyArgs& args) {
    int64_t bytes = args.itemsize;
    for (int d = 0; d < args.dims; ++d) bytes *= args.shape[d];
    if (bytes == 0) return;
    switch (args.itemsize) {
        case 1: return copy_of<uint8_t>(args, bytes);
        case 2: return copy_of<uint16_t>(args, bytes);
        case 4: return copy_of<uint32_t>(args, bytes);
        case 8: return copy_of<uint64_t>(args, bytes);
    }
}

}  // namespace TRINE_ISA
}  // namespace trine
