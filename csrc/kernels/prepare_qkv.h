// Between the query-key-value projection and attention: per-head RMS norm, rotary embedding, writing the paged cache.
#pragma once

#include "elementwise.h"

namespace trine {
namespace TRINE_ISA {

// One head in float32: norm (if any) and rotation (if any), then rounding to `to`.
template <class T, class Out>
INLINE void prepare_head(const T* x, const T* weight, const float* cos_sin, Out* to, const PrepareArgs& args) {
    constexpr int64_t MAX_SIZE = 1024;
    const int64_t size = args.head_dim;
    alignas(64) float head[MAX_SIZE + W];
    vf squares = zero();
    for (int64_t i = 0; i < size; i += W) {
        const vf value = load_upto(x + i, size - i);
        squares = fma(value, value, squares);
        store(head + i, value);
    }
    if (weight) {
        const vf scale = set1(1.0f / __builtin_sqrtf(hsum(squares) / size + args.eps));
        for (int64_t i = 0; i < size; i += W)
            store(head + i, mul(mul(load(head + i), scale), load_upto(weight + i, size - i)));
    }
    if (cos_sin) {
        const int64_t half = args.rotary_dim / 2;
        for (int64_t i = 0; i < half; i += W) {
            const vf cos = load_upto(cos_sin + i, half - i), sin = load_upto(cos_sin + half + i, half - i);
            const vf first = load(head + i), second = load_upto(head + half + i, half - i);
            store_upto(head + i, sub(mul(first, cos), mul(second, sin)), half - i);
            store_upto(head + half + i, add(mul(second, cos), mul(first, sin)), half - i);
        }
    }
    for (int64_t i = 0; i < size; i += W) store_upto(to + i, load(head + i), size - i);
}

template <class T, class Cache>
static void prepare_token(const PrepareArgs& args, int64_t token) {
    const int64_t size = args.head_dim;
    const T* x = static_cast<const T*>(args.qkv) + token * (args.heads + 2 * args.kv_heads) * size;
    T* q = static_cast<T*>(args.q) + token * args.heads * size;
    const float* cos_sin = args.cos_sin ? args.cos_sin + args.positions[token] * args.rotary_dim : nullptr;
    for (int64_t head = 0; head < args.heads; ++head, x += size, q += size)
        prepare_head(x, static_cast<const T*>(args.q_norm), cos_sin, q, args);

    const int64_t slot = args.slots[token];
    const int64_t block = slot / args.block_size, offset = slot % args.block_size;
    for (int64_t head = 0; head < args.kv_heads; ++head, x += size) {
        const int64_t at = ((block * args.kv_heads + head) * args.block_size + offset) * size;
        prepare_head(x, static_cast<const T*>(args.k_norm), cos_sin, static_cast<Cache*>(args.k_cache) + at, args);
        const T* v = x + args.kv_heads * size;
        Cache* to = static_cast<Cache*>(args.v_cache) + at;
        for (int64_t i = 0; i < size; i += W) store_upto(to + i, load_upto(v + i, size - i), size - i);
    }
}

static void prepare_qkv(const PrepareArgs& args) {
    with_type(args.dtype, [&](auto type) {
        with_type(args.cache_dtype, [&](auto cache) {
            over_rows(args.tokens, (args.heads + 2 * args.kv_heads) * args.head_dim, [&](int64_t start, int64_t end) {
                for (int64_t token = start; token < end; ++token)
                    prepare_token<decltype(type), decltype(cache)>(args, token);
            });
        });
    });
}

}  // namespace TRINE_ISA
}  // namespace trine
