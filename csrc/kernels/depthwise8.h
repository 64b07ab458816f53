// A filter for each channel, on 8-bit integers. Up to four pixels above each other are put side by side, channel by
// channel, once for a line of the output: each of its pixels then multiplies as many such columns as the kernel is wide.
#pragma once

#include "bytes.h"

namespace trine {
namespace TRINE_ISA {

// weight: int8 [blocks][kernel_w][quads][4][8][4]: four neighbours in y side by side, for each block of 32 channels in the
// order in which unpacking leaves them: 0-3 and 16-19, 4-7 and 20-23, 8-11 and 24-27, 12-15 and 28-31. The last block
// begins 32 channels before the end; with fewer than 32 there is one, padded. Missing places have weights of zero. Pairs
// of products fit 16 bits; where they may not (`fits` is 1), every other place is missing. shares [blocks][4][8], and with
// `in_steps` (here without a residual) scale and bias, have that order, too.
struct DepthwiseLine {
    static constexpr int64_t BLOCK = 32, COLUMN = 4 * BLOCK;
    static constexpr int64_t BUFFER = 16 * 1024;  // bytes of columns: half of the first-level cache

    const WindowArgs& a;
    const Finish& f;
    int64_t channels, blocks, quads, places, columns;
    uint8_t flip;

    explicit DepthwiseLine(const WindowArgs& a)
        : a(a), f(a.finish), channels(a.groups), blocks(max<int64_t>(1, ceil_div(channels, BLOCK))),
          quads(ceil_div(a.kernel_h, a.fits == 1 ? 2 : 4)), places(a.fits == 1 ? 2 : 4),
          columns((a.out_width - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1),
          flip(a.x_dtype == INT8 ? 0x80 : 0) {}

    int64_t first_of(int64_t block) const { return max<int64_t>(0, min(block * BLOCK, channels - BLOCK)); }
    __m256i padding() const { return _mm256_set1_epi8(static_cast<char>(a.x_zero ^ flip)); }

    __m256i bytes(const char* p) const {
        alignas(32) char rest[BLOCK] = {};
        if (channels < BLOCK) p = static_cast<const char*>(memcpy(rest, p, channels));
        return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(flip));
    }

    // Four pixels' channels side by side.
    INLINE void interleave(const __m256i (&x)[4], char* to) {
        const __m256i low01 = _mm256_unpacklo_epi8(x[0], x[1]), high01 = _mm256_unpackhi_epi8(x[0], x[1]);
        const __m256i low23 = _mm256_unpacklo_epi8(x[2], x[3]), high23 = _mm256_unpackhi_epi8(x[2], x[3]);
        storei8(to, _mm256_unpacklo_epi16(low01, low23));
        storei8(to + 32, _mm256_unpackhi_epi16(low01, low23));
        storei8(to + 64, _mm256_unpacklo_epi16(high01, high23));
        storei8(to + 96, _mm256_unpackhi_epi16(high01, high23));
    }
    INLINE void storei8(char* p, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
    INLINE __m256i loadi8(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    // The columns of one quad of lines: [columns][quads][4][32].
    void fill(const char* image, int64_t top, int64_t quad, int64_t first, char* to) const {
        const char* lines[4] = {};
        for (int64_t i = 0; i < places; ++i) {
            const int64_t place = quad * places + i, y = top + place * a.dilation_h;
            const bool is_there = place < a.kernel_h && y >= 0 && y < a.height;
            lines[a.fits == 1 ? 2 * i : i] = is_there ? image + y * a.x_row + first : nullptr;
        }
        const int64_t before = min(a.pad_left, columns), after = min(columns, a.pad_left + a.width);
        for (int64_t c = 0; c < columns; ++c) {
            __m256i x[4];
            const bool inside = c >= before && c < after;
            UNROLL
            for (int i = 0; i < 4; ++i)
                x[i] = inside && lines[i] ? bytes(lines[i] + (c - a.pad_left) * a.x_pixel) : padding();
            interleave(x, to + (c * quads + quad) * COLUMN);
        }
    }

    INLINE __m256i dot(__m256i sum, __m256i x, __m256i weight) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpbusd_epi32(sum, x, weight);
#else
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weight), _mm256_set1_epi16(1)));
#endif
    }

    // The sums of P neighbouring pixels of a line, shares taken off.
    template <int P>
    INLINE void sums(const DepthwiseLine& l, const char* from, const char* w, const int32_t* shares, __m256i (&sum)[P][4]) {
        UNROLL
        for (int v = 0; v < 4; ++v) {
            const __m256i start = _mm256_sub_epi32(_mm256_setzero_si256(), loadi8(reinterpret_cast<const char*>(shares + 8 * v)));
            UNROLL
            for (int p = 0; p < P; ++p) sum[p][v] = start;
        }
        const int64_t pixel = l.a.stride_w * l.quads * COLUMN, next = l.a.dilation_w * l.quads * COLUMN;
        for (int64_t j = 0; j < l.a.kernel_w; ++j, from += next)
            for (int64_t q = 0; q < l.quads; ++q, w += COLUMN) {
                UNROLL
                for (int v = 0; v < 4; ++v) {
                    const __m256i weight = loadi8(w + 32 * v);
                    UNROLL
                    for (int p = 0; p < P; ++p) {
                        const __m256i x = loadi8(from + p * pixel + q * COLUMN + 32 * v);
                        sum[p][v] = dot(sum[p][v], x, weight);
                    }
                }
            }
    }

    // 32 bytes out of sums in their own order: packing puts them right.
    INLINE __m256i finished(const Finish& f, const __m256i (&sum)[4], int64_t at) {
        const __m256 most = _mm256_set1_ps(65536.0f);
        __m256i q[4];
        UNROLL
        for (int v = 0; v < 4; ++v) {
            const __m256 bias = f.bias ? _mm256_loadu_ps(f.bias + at + 8 * v) : _mm256_setzero_ps();
            const __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[v]), _mm256_loadu_ps(f.scale + at + 8 * v), bias);
            q[v] = _mm256_cvtps_epi32(_mm256_min_ps(most, y));
        }
        const __m256i low = held(f, _mm256_packs_epi32(q[0], q[1])), high = held(f, _mm256_packs_epi32(q[2], q[3]));
        return f.out_dtype == INT8 ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    }
    INLINE __m256i held(const Finish& f, __m256i words) {
        words = _mm256_adds_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(f.out_zero)));
        words = _mm256_max_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(f.low)));
        return _mm256_min_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(f.high)));
    }

    template <int P>
    void pixels(const char* from, int64_t block, int64_t row) const {
        __m256i sum[P][4];
        const char* w = static_cast<const char*>(a.weight) + block * a.kernel_w * quads * COLUMN;
        sums<P>(*this, from, w, a.shares + block * BLOCK, sum);
        const int64_t first = first_of(block);
        for (int p = 0; p < P; ++p) {
            if (f.in_steps)
                put(finished(f, sum[p], block * BLOCK), row + p, first);
            else
                put_any(sum[p], row + p, first);
        }
    }
    void put(__m256i bytes, int64_t row, int64_t first) const {
        char* out = static_cast<char*>(f.out) + row * f.out_stride + first;
        alignas(32) char rest[BLOCK];
        if (channels >= BLOCK) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
        storei8(rest, bytes);
        memcpy(out, rest, channels);
    }
    void put_any(const __m256i (&sum)[4], int64_t row, int64_t first) const {
        alignas(32) int32_t c[BLOCK];
        storei8(reinterpret_cast<char*>(c), _mm256_permute2x128_si256(sum[0], sum[1], 0x20));
        storei8(reinterpret_cast<char*>(c + 8), _mm256_permute2x128_si256(sum[2], sum[3], 0x20));
        storei8(reinterpret_cast<char*>(c + 16), _mm256_permute2x128_si256(sum[0], sum[1], 0x31));
        storei8(reinterpret_cast<char*>(c + 24), _mm256_permute2x128_si256(sum[2], sum[3], 0x31));
        const int64_t n = min(BLOCK, channels);
        for (int64_t i = 0; i < n; i += W)
            finish_vector(f, to_float(loadi(c + i)), row, first + i, first + i, n - i);
    }

    void run(int64_t line) const {
        const int64_t n = line / a.out_height, top = line % a.out_height * a.stride_h - a.pad_top;
        const char* image = static_cast<const char*>(a.x) + n * a.x_image;
        const int64_t own = columns * quads * COLUMN, together = max<int64_t>(1, min(blocks, BUFFER / own));
        char* buffer = static_cast<char*>(scratch(SCRATCH_INPUT, together * own));
        const int64_t step = a.stride_w * quads * COLUMN;
        for (int64_t begin = 0; begin < blocks; begin += together) {
            const int64_t end = min(blocks, begin + together);
            for (int64_t b = begin; b < end; ++b)
                for (int64_t q = 0; q < quads; ++q) fill(image, top, q, first_of(b), buffer + (b - begin) * own);
            for (int64_t b = begin; b < end; ++b) {
                const char* from = buffer + (b - begin) * own;
                int64_t x = 0;
                for (; x + 2 <= a.out_width; x += 2) pixels<2>(from + x * step, b, line * a.out_width + x);
                if (x < a.out_width) pixels<1>(from + x * step, b, line * a.out_width + x);
            }
        }
    }
};

static void depthwise8(const WindowArgs& a) {
    parallel(a.images * a.out_height, [&](int64_t line) { DepthwiseLine(a).run(line); });
}

}  // namespace TRINE_ISA
}  // namespace trine
