// Functions of whole rows of float32: softmax, layer norm and its kin.
#pragma once

#include "elementwise.h"
#include "vec.h"

namespace trine {
namespace TRINE_ISA {

struct SoftmaxArgs {
    const float* x;  // [outer, size, inner], contiguous; over the middle
    float* y;
    int64_t outer, size, inner;
    int64_t logarithm;  // 1: the logarithm of the softmax
};

INLINE float max_of(const float* x, int64_t size) {
    vf most = set1(-__builtin_inff());
    int64_t i = 0;
    for (; i + W <= size; i += W) most = vmax(most, load(x + i));
    if (i < size) most = vmax(most, first_n(load_first(x + i, size - i), most, size - i));
    return hmax(most);
}

static void softmax_row(const float* x, float* y, int64_t size, bool logarithm) {
    const vf most = set1(max_of(x, size));
    vf sum = zero();
    for (int64_t i = 0; i < size; i += W) {
        const vf e = first_n(exp(sub(load_upto(x + i, size - i), most)), zero(), size - i);
        sum = add(sum, e);
        if (!logarithm) store_upto(y + i, e, size - i);
    }
    const float total = hsum(sum);
    if (logarithm) {
        const vf shift = add(most, set1(logf(total)));
        for (int64_t i = 0; i < size; i += W)
            store_upto(y + i, sub(load_upto(x + i, size - i), shift), size - i);
    } else {
        const vf scale = set1(1.0f / total);
        for (int64_t i = 0; i < size; i += W) store_upto(y + i, mul(load_upto(y + i, size - i), scale), size - i);
    }
}

// Up to W neighbouring columns of [size, inner].
static void softmax_columns(const float* x, float* y, int64_t size, int64_t inner, int64_t count, bool logarithm) {
    vf most = set1(-__builtin_inff()), sum = zero();
    for (int64_t i = 0; i < size; ++i) most = vmax(most, load_upto(x + i * inner, count));
    for (int64_t i = 0; i < size; ++i) sum = add(sum, exp(sub(load_upto(x + i * inner, count), most)));
    if (logarithm) {
        float totals[W];
        store(totals, sum);
        for (int j = 0; j < W; ++j) totals[j] = logf(totals[j]);
        sum = load(totals);
    }
    for (int64_t i = 0; i < size; ++i) {
        const vf d = sub(load_upto(x + i * inner, count), most);
        store_upto(y + i * inner, logarithm ? sub(d, sum) : div(exp(d), sum), count);
    }
}

static void softmax(const SoftmaxArgs& args) {
    if (args.inner == 1) {
        over_rows(args.outer, args.size, [&](int64_t start, int64_t end) {
            for (int64_t r = start; r < end; ++r)
                softmax_row(args.x + r * args.size, args.y + r * args.size, args.size, args.logarithm);
        });
        return;
    }
    const int64_t blocks = ceil_div(args.inner, W);
    over_rows(args.outer * blocks, args.size * W, [&](int64_t start, int64_t end) {
        for (int64_t i = start; i < end; ++i) {
            const int64_t column = i % blocks * W, offset = i / blocks * args.size * args.inner + column;
            softmax_columns(args.x + offset, args.y + offset, args.size, args.inner, args.inner - column,
                            args.logarithm);
        }
    });
}

struct RowNormArgs {
    const void* x;       // [rows, size], contiguous
    const float* scale;  // [size], or null
    const float* bias;   // [size], or null
    void* y;
    int64_t rows, size;
    float epsilon;
    int32_t rms;  // 1: no mean is taken off
    DType x_dtype, y_dtype;  // F32 or BF16
};

template <class X, class Y>
static void row_norm_of(const RowNormArgs& args) {
    const int64_t size = args.size;
    over_rows(args.rows, size, [&](int64_t start, int64_t end) {
        for (int64_t r = start; r < end; ++r) {
            const X* x = static_cast<const X*>(args.x) + r * size;
            Y* y = static_cast<Y*>(args.y) + r * size;
            const float mean = args.rms ? 0 : sum_over(size, [&](int64_t i) { return load_upto(x + i, size - i); }) / size;
            const vf center = set1(mean);
            const float squares = sum_over(size, [&](int64_t i) {
                const vf d = first_n(sub(load_upto(x + i, size - i), center), zero(), size - i);
                return mul(d, d);
            });
            const vf factor = set1(1.0f / __builtin_sqrtf(squares / size + args.epsilon));
            for (int64_t i = 0; i < size; i += W) {
                vf v = mul(sub(load_upto(x + i, size - i), center), factor);
                if (args.scale) v = mul(v, load_upto(args.scale + i, size - i));
                if (args.bias) v = add(v, load_upto(args.bias + i, size - i));
                store_upto(y + i, v, size - i);
            }
        }
    });
}

static void row_norm(const RowNormArgs& args) {
    if (args.x_dtype == BF16)
        args.y_dtype == BF16 ? row_norm_of<bf16, bf16>(args) : row_norm_of<bf16, float>(args);
    else
        args.y_dtype == BF16 ? row_norm_of<float, bf16>(args) : row_norm_of<float, float>(args);
}

// Groups of channels, each normed over all its places: group norm; with a channel a group, instance norm.
struct GroupNormArgs {
    const float* x;  // [outer, channels, places], or [outer, places, channels] with channels_last; contiguous
    const float* scale;  // [channels], or null
    const float* bias;
    float* y;
    int64_t outer, channels, places, groups;
    float epsilon;
    int32_t channels_last;
};

// Sums in double: a group may be an image.
static void group_norm_one(const GroupNormArgs& args, int64_t n, int64_t g) {
    const int64_t width = args.channels / args.groups, first = g * width;
    const int64_t rows = args.channels_last ? args.places : width, size = args.channels_last ? width : args.places;
    const int64_t stride = args.channels_last ? args.channels : args.places;
    const int64_t offset = n * args.channels * args.places + first * (args.channels_last ? 1 : args.places);
    const float* x = args.x + offset;
    float* y = args.y + offset;
    double total = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r)
        total += sum_over(size, [&](int64_t i) { return load_upto(x + r * stride + i, size - i); });
    const double mean = total / double(rows * size);
    const vf center = set1(float(mean));
    for (int64_t r = 0; r < rows; ++r)
        squares += sum_over(size, [&](int64_t i) {
            const vf d = first_n(sub(load_upto(x + r * stride + i, size - i), center), zero(), size - i);
            return mul(d, d);
        });
    const float factor = float(1.0 / __builtin_sqrt(squares / double(rows * size) + double(args.epsilon)));
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = x + r * stride;
        float* to = y + r * stride;
        if (args.channels_last) {
            for (int64_t i = 0; i < size; i += W) {
                const int64_t left = size - i;
                vf a = set1(factor), b = zero();
                if (args.scale) a = mul(a, load_upto(args.scale + first + i, left));
                if (args.bias) b = load_upto(args.bias + first + i, left);
                store_upto(to + i, fma(sub(load_upto(from + i, left), center), a, b), left);
            }
        } else {
            const vf a = set1(factor * (args.scale ? args.scale[first + r] : 1.0f));
            const vf b = set1(args.bias ? args.bias[first + r] : 0.0f);
            for (int64_t i = 0; i < size; i += W)
                store_upto(to + i, fma(sub(load_upto(from + i, size - i), center), a, b), size - i);
        }
    }
}

static void group_norm(const GroupNormArgs& args) {
    over_rows(args.outer * args.groups, args.channels / args.groups * args.places, [&](int64_t start, int64_t end) {
        for (int64_t i = start; i < end; ++i) group_norm_one(args, i / args.groups, i % args.groups);
    });
}

// One number for the middle of [outer, size, inner]; sums in blocks, so that rounding does not grow with the size.
enum Reduction : int32_t { R_SUM, R_MEAN, R_MAX, R_MIN, R_PROD, R_L1, R_L2, R_SUM_SQUARE };

struct ReduceArgs {
    const float* x;
    float* y;  // [outer, inner]
    int64_t outer, size, inner;
    int64_t kind;
};

INLINE vf reduce_pair(int64_t kind, vf a, vf b) {
    switch (kind) {
        case R_MAX: return max_or_nan(a, b);
        case R_MIN: return min_or_nan(a, b);
        case R_PROD: return mul(a, b);
        default: return add(a, b);
    }
}
INLINE vf reduce_item(int64_t kind, vf x) {
    return kind == R_L1 ? abs(x) : kind == R_L2 || kind == R_SUM_SQUARE ? mul(x, x) : x;
}
INLINE float reduce_start(int64_t kind) {
    return kind == R_MAX ? -__builtin_inff() : kind == R_MIN ? __builtin_inff() : kind == R_PROD ? 1.0f : 0.0f;
}
INLINE vf reduce_end(int64_t kind, vf x, int64_t size) {
    if (kind == R_MEAN) return div(x, set1(float(size)));
    if (kind != R_L2) return x;
    float lanes[W];
    store(lanes, x);
    for (int i = 0; i < W; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
    return load(lanes);
}

// Up to W neighbouring columns, `stride` apart from item to item.
static vf reduce_columns(int64_t kind, const float* x, int64_t size, int64_t stride, int64_t count) {
    constexpr int64_t block = 64;
    vf whole = set1(reduce_start(kind));
    for (int64_t start = 0; start < size; start += block) {
        vf part = set1(reduce_start(kind));
        for (int64_t i = start; i < min(size, start + block); ++i)
            part = reduce_pair(kind, part, reduce_item(kind, load_upto(x + i * stride, count)));
        whole = reduce_pair(kind, whole, part);
    }
    return whole;
}

// A row: its whole vectors as columns, then the lanes and the rest one by one.
static float reduce_row(int64_t kind, const float* x, int64_t size) {
    float lanes[W];
    const int64_t vectors = size / W;
    store(lanes, reduce_columns(kind, x, vectors, W, W));
    float whole = vectors ? lanes[0] : reduce_start(kind);
    const auto take = [&](float item) {
        float pair[W] = {};
        store(pair, reduce_pair(kind, set1(whole), set1(item)));
        whole = pair[0];
    };
    for (int i = 1; i < W && vectors; ++i) take(lanes[i]);
    for (int64_t i = vectors * W; i < size; ++i) {
        float item[W];
        store(item, reduce_item(kind, set1(x[i])));
        take(item[0]);
    }
    return whole;
}

static void reduce(const ReduceArgs& args) {
    if (args.inner == 1) {
        over_rows(args.outer, args.size, [&](int64_t start, int64_t end) {
            for (int64_t r = start; r < end; ++r) {
                float lanes[W];
                const float whole = reduce_row(args.kind, args.x + r * args.size, args.size);
                store(lanes, reduce_end(args.kind, set1(whole), args.size));
                args.y[r] = lanes[0];
            }
        });
        return;
    }
    const int64_t blocks = ceil_div(args.inner, W);
    over_rows(args.outer * blocks, args.size * W, [&](int64_t start, int64_t end) {
        for (int64_t i = start; i < end; ++i) {
            const int64_t outer = i / blocks, column = i % blocks * W, count = args.inner - column;
            const float* x = args.x + outer * args.size * args.inner + column;
            const vf whole = reduce_columns(args.kind, x, args.size, args.inner, count);
            store_upto(args.y + outer * args.inner + column, reduce_end(args.kind, whole, args.size), count);
        }
    });
}

}  // namespace TRINE_ISA
}  // namespace trine
