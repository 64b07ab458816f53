// 8-bit integers in vectors of W, and the way from sums to results.
#pragma once

#include "activation.h"
#include "quantized_args.h"

namespace trine {
namespace TRINE_ISA {

// W bytes as floats, their zero point subtracted. n of them exist.
INLINE vf bytes_to_float(const void* p, int64_t n, DType dtype, int32_t zero) {
    alignas(16) uint8_t buffer[16] = {};
    if (n < W) p = memcpy(buffer, p, n);
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    const vi wide = dtype == INT8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    return to_float(_mm512_sub_epi32(wide, set1i(zero)));
#else
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    const vi wide = dtype == INT8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    return to_float(_mm256_sub_epi32(wide, set1i(zero)));
#endif
}

// W floats, to the nearest integer (ties to even), plus zero, held to the type's range. n of them are stored.
INLINE void store_bytes(void* p, vf x, int64_t n, DType dtype, int32_t zero) {
    // Beyond any byte, and within what converts to an integer.
    vi q = to_int(vmin(set1(65536.0f), vmax(set1(-65536.0f), x)));
#if defined(__AVX512F__)
    q = _mm512_add_epi32(q, set1i(zero));
    const __m128i bytes =
        dtype == INT8 ? _mm512_cvtsepi32_epi8(q) : _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, zeroi()));
    if (n >= W) return _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
#else
    q = _mm256_add_epi32(q, set1i(zero));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i bytes = dtype == INT8 ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
    if (n >= W) return _mm_storel_epi64(static_cast<__m128i*>(p), bytes);
#endif
    alignas(16) uint8_t buffer[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), bytes);
    memcpy(p, buffer, n);
}

// One row's values at a place, as floats.
INLINE vf residual_at(const Finish& f, int64_t place, int64_t n) {
    if (f.residual_dtype == F32) return load_upto(static_cast<const float*>(f.residual) + place, n);
    if (f.residual_dtype == BF16) return load_upto(static_cast<const bf16*>(f.residual) + place, n);
    const char* bytes = static_cast<const char*>(f.residual) + place;
    return mul(bytes_to_float(bytes, n, f.residual_dtype, f.residual_zero), set1(f.residual_scale));
}

// One row's results at column `column` (counted over all groups) from W sums, of which n exist; `at` counts within the
// padded scale and bias.
INLINE void finish_vector(const Finish& f, vf sum, int64_t row, int64_t column, int64_t at, int64_t n) {
    vf y = f.scale ? mul(sum, load(f.scale + at)) : sum;
    if (f.bias) y = add(y, load(f.bias + at));
    if (f.residual) y = add(y, residual_at(f, row * f.residual_stride + column, n));
    y = activate(y, f.activation);
    if (f.columns) y = mul(y, load(f.columns + at));
    const int64_t place = row * f.out_stride + column;
    if (f.out_dtype == F32) return store_upto(static_cast<float*>(f.out) + place, y, n);
    if (f.out_dtype == BF16) return store_upto(static_cast<bf16*>(f.out) + place, y, n);
    store_bytes(static_cast<char*>(f.out) + place, mul(y, set1(f.out_inverse)), n, f.out_dtype, f.out_zero);
}

// 16 floats to the nearest integers, plus zero, held to [low, high], as bytes.
INLINE __m128i to_bytes(const vf (&y)[16 / W], const Finish& f) {
    const vf most = set1(65536.0f);  // beyond any byte, and within what converts to an integer, as is the other side
#if defined(__AVX512F__)
    const vi q = _mm512_add_epi32(to_int(vmin(most, vmax(sub(zero(), most), y[0]))), set1i(f.out_zero));
    return _mm512_cvtepi32_epi8(_mm512_max_epi32(set1i(f.low), _mm512_min_epi32(set1i(f.high), q)));
#else
    const vi packed = _mm256_packs_epi32(to_int(vmin(most, y[0])), to_int(vmin(most, y[1])));
    vi words = _mm256_adds_epi16(packed, _mm256_set1_epi16(static_cast<int16_t>(f.out_zero)));
    words = _mm256_max_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(f.low)));
    words = _mm256_min_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(f.high)));
    const vi bytes = f.out_dtype == INT8 ? _mm256_packs_epi16(words, words) : _mm256_packus_epi16(words, words);
    // Lanes hold columns 0-3 and 8-11, 4-7 and 12-15.
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
#endif
}

// Bytes out of `in_steps`: `rows` rows of 16 sums at c, of which n columns exist. shares: what is taken off first, or null.
static void finish_bytes(const Finish& finish, const int32_t* c, int64_t ldc, int64_t rows, int64_t first,
                         int64_t column, int64_t at, int64_t n, const int32_t* shares) {
    constexpr int V = 16 / W;
    const Finish f = finish;  // a copy: stores of bytes may be to anything, as the compiler sees it
    vf scale[V], bias[V];
    vi share[V];
    UNROLL
    for (int v = 0; v < V; ++v) {
        scale[v] = load(f.scale + at + v * W);
        bias[v] = f.bias ? load(f.bias + at + v * W) : zero();
        share[v] = shares ? loadi(shares + at + v * W) : zeroi();
    }
    const char* residual = static_cast<const char*>(f.residual) + first * f.residual_stride + column;
    char* out = static_cast<char*>(f.out) + first * f.out_stride + column;
    for (int64_t r = 0; r < rows; ++r, residual += f.residual_stride, out += f.out_stride) {
        vf y[V];
        UNROLL
        for (int v = 0; v < V; ++v) {
            y[v] = fma(to_float(subi(loadi(c + r * ldc + v * W), share[v])), scale[v], bias[v]);
            if (f.residual && v * W < n)
                y[v] = fma(bytes_to_float(residual + v * W, n - v * W, f.residual_dtype, 0), set1(f.residual_scale), y[v]);
        }
        const __m128i bytes = to_bytes(y, f);
        if (n >= 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
        } else {
            alignas(16) char rest[16];
            _mm_store_si128(reinterpret_cast<__m128i*>(rest), bytes);
            memcpy(out, rest, n);
        }
    }
}

// Pixels [first, end) of one image, the channels turned inwards.
static void quantize_turned(const QuantizeArgs& args, int64_t image, int64_t first, int64_t end) {
    const float* x = static_cast<const float*>(args.x) + image * args.channels * args.pixels;
    char* y = static_cast<char*>(args.y) + image * args.channels * args.pixels;
    const vf scale = set1(args.scale);
    for (int64_t p = first; p < end; p += W) {
        const int64_t n = min<int64_t>(W, end - p);
        for (int64_t c = 0; c < args.channels; ++c) {
            alignas(16) char bytes[W];
            store_bytes(bytes, div(load_upto(x + c * args.pixels + p, n), scale), W, args.dtype, args.zero);
            for (int64_t i = 0; i < n; ++i) y[(p + i) * args.channels + c] = bytes[i];
        }
    }
}

static void quantize(const QuantizeArgs& args) {
    if (args.channels) {
        constexpr int64_t PIXELS = 4096;
        const int64_t parts = ceil_div(args.pixels, PIXELS);
        return parallel(args.count / (args.channels * args.pixels) * parts, [&](int64_t task) {
            const int64_t first = task % parts * PIXELS;
            quantize_turned(args, task / parts, first, min(args.pixels, first + PIXELS));
        });
    }
    constexpr int64_t PART = 16 * 1024;
    const int64_t tasks = ceil_div(args.count, PART);
    const auto part = [&](int64_t task) {
        const int64_t end = min(args.count, (task + 1) * PART);
        for (int64_t i = task * PART; i < end; i += W) {
            const int64_t n = end - i;
            if (args.back) {
                const vf x = bytes_to_float(static_cast<const char*>(args.x) + i, n, args.dtype, args.zero);
                store_upto(static_cast<float*>(args.y) + i, mul(x, set1(args.scale)), n);
            } else {
                const vf x = div(load_upto(static_cast<const float*>(args.x) + i, n), set1(args.scale));
                store_bytes(static_cast<char*>(args.y) + i, x, n, args.dtype, args.zero);
            }
        }
    };
    if (tasks < 4)
        for (int64_t i = 0; i < tasks; ++i) part(i);
    else
        parallel(tasks, part);
}

static void add_bytes(const AddBytesArgs& args) {
    constexpr int64_t PART = 16 * 1024;
    parallel(ceil_div(args.count, PART), [&](int64_t task) {
        const int64_t end = min(args.count, (task + 1) * PART);
        for (int64_t i = task * PART; i < end; i += W) {
            const int64_t n = end - i;
            const vf a = bytes_to_float(static_cast<const char*>(args.a) + i, n, args.a_dtype, args.a_zero);
            const vf b = bytes_to_float(static_cast<const char*>(args.b) + i, n, args.b_dtype, args.b_zero);
            const vf sum = add(mul(a, set1(args.a_scale)), mul(b, set1(args.b_scale)));
            const vf y = mul(activate(sum, args.activation), set1(args.out_inverse));
            store_bytes(static_cast<char*>(args.y) + i, y, n, args.out_dtype, args.out_zero);
        }
    });
}

// One output pixel's greatest bytes, for 32 channels or the n that are left.
INLINE void greatest(const BytePoolArgs& a, const char* image, int64_t top, int64_t left, int64_t c, int64_t n,
                     char* out) {
    const bool is_signed = a.dtype == INT8;
    __m256i best = is_signed ? _mm256_set1_epi8(-128) : _mm256_setzero_si256();
    for (int64_t i = 0; i < a.kernel_h; ++i) {
        const int64_t y = top + i * a.dilation_h;
        if (y < 0 || y >= a.height) continue;
        for (int64_t j = 0; j < a.kernel_w; ++j) {
            const int64_t x = left + j * a.dilation_w;
            if (x < 0 || x >= a.width) continue;
            const char* from = image + (y * a.width + x) * a.channels + c;
            alignas(32) char buffer[32];
            if (n < 32) from = static_cast<const char*>(memcpy(buffer, from, n));
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            best = is_signed ? _mm256_max_epi8(best, bytes) : _mm256_max_epu8(best, bytes);
        }
    }
    if (n >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), best);
    alignas(32) char buffer[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), best);
    memcpy(out, buffer, n);
}

static void max_pool_bytes(const BytePoolArgs& a) {
    parallel(a.images * a.out_height, [&](int64_t line) {
        const int64_t n = line / a.out_height, top = line % a.out_height * a.stride_h - a.pad_top;
        const char* image = static_cast<const char*>(a.x) + n * a.height * a.width * a.channels;
        char* out = static_cast<char*>(a.out) + line * a.out_width * a.channels;
        for (int64_t x = 0; x < a.out_width; ++x)
            for (int64_t c = 0; c < a.channels; c += 32)
                greatest(a, image, top, x * a.stride_w - a.pad_left, c, min<int64_t>(32, a.channels - c),
                         out + x * a.channels + c);
    });
}

static void mean_bytes(const ByteMeanArgs& a) {
    const int64_t blocks = ceil_div(a.channels, W);
    parallel(a.images * blocks, [&](int64_t task) {
        const int64_t image = task / blocks, c = task % blocks * W, n = min<int64_t>(W, a.channels - c);
        const char* x = static_cast<const char*>(a.x) + image * a.pixels * a.channels + c;
        // Whole numbers below 2^24: these sums are exact for the first 65,000 pixels, and each further part is rounded.
        vf sum = zero();
        for (int64_t p = 0; p < a.pixels; ++p) sum = add(sum, bytes_to_float(x + p * a.channels, n, a.x_dtype, a.x_zero));
        finish_vector(a.finish, sum, image, c, c, n);
    });
}

}  // namespace TRINE_ISA
}  // namespace trine
