// Attention on the tile registers of AMX: bf16 queries, keys and values, scores and sums in float32, weights rounded to
// bf16 for the product with the values.
//
// A task is some queries of one head. Keys (pairs of elements turned, so that positions lie side by side) and values
// (pairs of positions side by side) are packed once a task; 32 queries at a time see all keys, so that their softmax is
// a plain one and its scores stay in the second-level cache.
#pragma once

#include "amx.h"
#include "matmul.h"

namespace trine {
namespace TRINE_ISA {

// 2^x to 0.0001 of the result, 0 for what is far below: the weights are rounded to 8 bits.
INLINE vf exp2_short(vf x) {
    const vf limited = vmax(set1(W == 16 ? -200.0f : -126.0f), x);
    const vf n = round_nearest(limited), f = sub(limited, n);
    vf p = fma(set1(0.0551716546f), f, set1(0.24261116f));
    p = fma(p, f, set1(0.693260992f));
    p = fma(p, f, set1(0.999928071f));
    return scale_exponent(p, n);
}

constexpr float LOG2E = 1.44269504f;

struct TileAttention {
    const GraphAttentionArgs& a;
    int64_t keys, size, width;  // padded: keys and size to 32, the values' size to 32
    int64_t parts, queries_per_part;

    explicit TileAttention(const GraphAttentionArgs& args) : a(args) {
        keys = round_up(a.keys, 32);
        size = round_up(a.size, 32);
        width = round_up(a.v_size, 32);
        const int64_t pairs = a.batch * a.heads;
        parts = min(ceil_div(a.queries, 32), max<int64_t>(1, ceil_div(2 * num_threads(), pairs)));
        queries_per_part = round_up(ceil_div(a.queries, parts), 32);
        parts = ceil_div(a.queries, queries_per_part);
    }

    static const bf16* row(const float* x, const int64_t* strides, int64_t b, int64_t h, int64_t r) {
        return reinterpret_cast<const bf16*>(x) + b * strides[0] + h * strides[1] + r * strides[2];
    }

    // to[count][padded] from elements `stride` apart, zeros after the `used` first.
    static void copy_row(const bf16* from, int64_t stride, int64_t used, int64_t padded, bf16* to) {
        if (stride == 1)
            memcpy(to, from, used * sizeof(bf16));
        else
            for (int64_t i = 0; i < used; ++i) to[i] = from[i * stride];
        memset(to + used, 0, (padded - used) * sizeof(bf16));
    }

    // to [keys / 16][size / 2][16][2]
    void pack_keys(int64_t b, int64_t h, bf16* rows, bf16* to) const {
        float* out = reinterpret_cast<float*>(to);  // pairs
        const int64_t pairs = size / 2;
        for (int64_t k = 0; k < keys; k += 8) {
            for (int64_t i = 0; i < 8; ++i) {
                if (k + i < a.keys)
                    copy_row(row(a.k, a.k_strides, b, h, k + i), a.k_strides[3], a.size, size, rows + i * size);
                else
                    memset(rows + i * size, 0, size * sizeof(bf16));
            }
            float* panel = out + k / PANEL * pairs * PANEL + k % PANEL;
            for (int64_t d = 0; d < pairs; d += 8) {
                __m256 r[8];
                UNROLL
                for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<float*>(rows + i * size) + d);
                transpose8(r);
                UNROLL
                for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (d + i) * PANEL, r[i]);
            }
        }
    }

    // to [width / 16][keys / 2][16][2]
    void pack_values(int64_t b, int64_t h, bf16* rows, bf16* to) const {
        for (int64_t k = 0; k < keys; k += 2) {
            for (int64_t i = 0; i < 2; ++i) {
                if (k + i < a.keys)
                    copy_row(row(a.v, a.v_strides, b, h, k + i), a.v_strides[3], a.v_size, width, rows + i * width);
                else
                    memset(rows + i * width, 0, width * sizeof(bf16));
            }
            for (int64_t d = 0; d < width; d += PANEL) {
                const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + d));
                const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + width + d));
                const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
                __m256i* out = reinterpret_cast<__m256i*>(to + d / PANEL * keys * PANEL + k * PANEL);
                _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
                _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
            }
        }
    }

    // c[rows][n] = x[rows][k] b for up to 32 rows, n and k multiples of 32.
    static void product(const bf16* x, int64_t stride, int64_t rows, const bf16* b, int64_t k, int64_t n, float* c) {
        for (int64_t i = 0; i < n; i += 2 * PANEL) {
            const char* panels[2] = {reinterpret_cast<const char*>(b + i * k),
                                     reinterpret_cast<const char*>(b + (i + PANEL) * k)};
            if (rows > TILE_ROWS)
                amx_tall(x, stride, panels, k, c + i, n, false, Ahead{{panels[0], panels[1]}, 0});
            else
                amx_flat<2>(x, stride, panels, k, c + i, n, false);
        }
    }

    // A row's scores, times `scale`, to weights in bf16; returns what they must be divided by. Scores of whole vectors
    // are handled without asking which lanes exist.
    float weigh(const float* scores, float scale, bf16* to) const {
        const int64_t whole = a.keys / W * W, rest = a.keys - whole;
        vf most = set1(-__builtin_inff()), other = most;
        int64_t i = 0;
        for (; i + 2 * W <= whole; i += 2 * W) most = vmax(load(scores + i), most), other = vmax(load(scores + i + W), other);
        for (; i < whole; i += W) most = vmax(load(scores + i), most);
        if (rest) other = vmax(first_n(load(scores + whole), other, rest), other);
        const float largest = hmax(vmax(most, other));
        if (largest == -__builtin_inff()) {  // every key is hidden
            memset(to, 0, keys * sizeof(bf16));
            return 0;
        }
        const vf factor = set1(scale), shift = set1(-largest * scale);
        vf sum = zero();
        for (i = 0; i < whole; i += W) {
            const vf e = exp2_short(fma(load(scores + i), factor, shift));
            store(to + i, e);
            sum = add(sum, e);
        }
        if (rest) {
            const vf e = first_n(exp2_short(fma(load(scores + i), factor, shift)), zero(), rest);
            store(to + i, e);
            sum = add(sum, e);
            i += W;
        }
        for (; i < keys; i += W) store(to + i, zero());
        return hsum(sum);
    }

    // The mask added, in units of scores in powers of two; hidden keys of the padding don't matter.
    void add_mask(float* scores, const float* mask, int64_t step) const {
        const vf scale = set1(a.scale * LOG2E), log2e = set1(LOG2E);
        for (int64_t i = 0; i < a.keys; i += W) {
            const vf bias = step ? load_upto(mask + i, a.keys - i) : set1(*mask);
            store(scores + i, fma(bias, log2e, mul(load(scores + i), scale)));
        }
    }

    template <class Out>
    void write(const float* c, int64_t b, int64_t h, int64_t first, int64_t count, const float* totals) const {
        Out* y = reinterpret_cast<Out*>(a.y) + b * a.y_strides[0] + h * a.y_strides[1] + first * a.y_strides[2];
        for (int64_t r = 0; r < count; ++r, y += a.y_strides[2]) {
            const vf inverse = set1(a.guarded && totals[r] == 0 ? 0.0f : 1.0f / totals[r]);
            for (int64_t i = 0; i < a.v_size; i += W)
                store_upto(y + i, mul(load(c + r * width + i), inverse), a.v_size - i);
        }
    }

    void run(int64_t task) const {
        const int64_t b = task / parts / a.heads, h = task / parts % a.heads, start = task % parts * queries_per_part;
        const int64_t end = min(a.queries, start + queries_per_part), stride = keys + 32;
        const int64_t bf16s = keys * (size + width) + 32 * (size + 32) + 32 * stride + 8 * max(size, width);
        const int64_t floats = 32 * (keys + width) + 32;
        char* memory = static_cast<char*>(scratch(SCRATCH_ATTENTION, bf16s * 2 + floats * 4));
        float *scores = reinterpret_cast<float*>(memory), *c = scores + 32 * keys, *totals = c + 32 * width;
        bf16 *k = reinterpret_cast<bf16*>(totals + 32), *v = k + keys * size, *q = v + keys * width;
        bf16 *weights = q + 32 * (size + 32), *rows = weights + 32 * stride;
        pack_keys(b, h, rows, k);
        pack_values(b, h, rows, v);
        int64_t configured = 0;
        for (int64_t first = start; first < end; first += 32) {
            const int64_t count = min<int64_t>(32, end - first);
            if (count != configured) configure(configured = count);
            for (int64_t r = 0; r < count; ++r)
                copy_row(row(a.q, a.q_strides, b, h, first + r), 1, a.size, size, q + r * (size + 32));
            product(q, size + 32, count, k, size, keys, scores);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t* s = a.mask_strides;
                const bool plain = !a.mask && a.scale > 0;
                const float none = 0, *mask = a.mask ? a.mask + b * s[0] + h * s[1] + (first + r) * s[2] : &none;
                if (!plain) add_mask(scores + r * keys, mask, a.mask ? s[3] : 0);
                totals[r] = weigh(scores + r * keys, plain ? a.scale * LOG2E : 1.0f, weights + r * stride);
            }
            product(weights, stride, count, v, keys, width, c);
            a.y_dtype == BF16 ? write<bf16>(c, b, h, first, count, totals)
                              : write<float>(c, b, h, first, count, totals);
        }
        tile_release();
    }
};

}  // namespace TRINE_ISA
}  // namespace trine
