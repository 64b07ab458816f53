// Vectors of W floats: the few operations that the kernels are written in. W = 16 with AVX-512, else 8 with AVX2.
// Everything lives in namespace TRINE_ISA (one per build) and is inlined: code for one instruction set can't end up in
// another's build.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "../runtime.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_2 _Pragma("unroll 2")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_2 _Pragma("GCC unroll 2")
#endif

namespace trine {
namespace TRINE_ISA {

constexpr int64_t SERIAL_WORK = 256 * 1024;  // multiply-adds not worth waking other threads for

template <class T>
INLINE T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
INLINE T max(T a, T b) {
    return a < b ? b : a;
}
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// parallel_for over a lambda.
template <class Body>
INLINE void parallel(int64_t count, const Body& body) {
    parallel_for(
        count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

#if defined(__AVX512F__)

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

INLINE vf zero() { return _mm512_setzero_ps(); }
INLINE vf set1(float x) { return _mm512_set1_ps(x); }
INLINE vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vi loadi(const void* p) { return _mm512_loadu_si512(p); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmax_or_nan(vf a, vf b) {  // NaN if either is
    return _mm512_mask_mov_ps(_mm512_max_ps(b, a), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b);
}
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf round_nearest(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf scale_exponent(vf x, vf n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, n whole
INLINE vf shift_exponent(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
INLINE float first_lane(vf x) { return _mm512_cvtss_f32(x); }
INLINE float hsum(vf x) { return _mm512_reduce_add_ps(x); }
INLINE float hmax(vf x) { return _mm512_reduce_max_ps(x); }
INLINE vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf as_float(vi x) { return _mm512_castsi512_ps(x); }
INLINE vf even_bf16(vi pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
INLINE vf odd_bf16(vi pairs) { return as_float(_mm512_and_si512(pairs, set1i(0xffff0000))); }
INLINE vf flip_sign(vf x, vf sign) { return _mm512_xor_ps(x, sign); }
INLINE vf abs(vf x) { return _mm512_abs_ps(x); }
INLINE vf sign_of(vf x) { return _mm512_and_ps(x, set1(-0.0f)); }
INLINE vf first_n(vf x, vf other, int64_t n) {  // x in lanes below n, other's lanes from there
    return _mm512_mask_blend_ps(n >= W ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1), other, x);
}

INLINE vf load(const bf16* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(x);  // subnormals become zeros
    memcpy(p, &rounded, sizeof(rounded));
#else
    const vi bits = _mm512_castps_si512(x);
    const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1i(1));
    vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, set1i(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1i(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

// Integer products for int8 weights: 2 W weights as 16-bit integers, each panel's in PANEL_INT_VECTORS vectors.
INLINE vi widen_int8(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void storei(void* p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vi zeroi() { return _mm512_setzero_si512(); }
INLINE vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vi broadcast64(const void* p) { return _mm512_set1_epi64(*static_cast<const int64_t*>(p)); }
INLINE vi dot_pairs(vi sum, vi a, vi b) { return _mm512_dpwssd_epi32(sum, a, b); }
// Neighbouring lanes added: the 16 sums of a panel from two vectors.
INLINE void add_neighbours(const vi* sums, vi* out) {
    const vi even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const vi odd = _mm512_add_epi32(even, set1i(1));
    out[0] = _mm512_add_epi32(_mm512_permutex2var_epi32(sums[0], even, sums[1]),
                              _mm512_permutex2var_epi32(sums[0], odd, sums[1]));
}
INLINE vi shift_add(vi high, vi low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }  // high * 256 + low
INLINE vi to_int(vf x) { return _mm512_cvtps_epi32(x); }
INLINE void store_int16(int16_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(x)); }

INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(f16* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

#else

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

INLINE vf zero() { return _mm256_setzero_ps(); }
INLINE vf set1(float x) { return _mm256_set1_ps(x); }
INLINE vi set1i(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vi loadi(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmax_or_nan(vf a, vf b) {  // NaN if either is
    return _mm256_blendv_ps(_mm256_max_ps(b, a), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
}
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf round_nearest(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vf as_float(vi x) { return _mm256_castsi256_ps(x); }
INLINE vf scale_exponent(vf x, vf n) {  // x * 2^n, n whole and from -126 to 127
    const vi exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set1i(127)), 23);
    return mul(x, as_float(exponent));
}
INLINE vf shift_exponent(vf x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
INLINE float first_lane(vf x) { return _mm256_cvtss_f32(x); }
INLINE float hsum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE float hmax(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE vf even_bf16(vi pairs) { return as_float(_mm256_slli_epi32(pairs, 16)); }
INLINE vf odd_bf16(vi pairs) { return as_float(_mm256_and_si256(pairs, set1i(0xffff0000))); }
INLINE vf flip_sign(vf x, vf sign) { return _mm256_xor_ps(x, sign); }
INLINE vf abs(vf x) { return _mm256_andnot_ps(set1(-0.0f), x); }
INLINE vf sign_of(vf x) { return _mm256_and_ps(x, set1(-0.0f)); }
INLINE vf first_n(vf x, vf other, int64_t n) {  // x in lanes below n, other's lanes from there
    const vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const vi limit = set1i(n >= W ? W : n <= 0 ? 0 : static_cast<int32_t>(n));
    return _mm256_blendv_ps(other, x, as_float(_mm256_cmpgt_epi32(limit, lane)));
}

INLINE vf load(const bf16* p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE void store(bf16* p, vf x) {
    const vi bits = _mm256_castps_si256(x);
    const vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1i(1));
    vi rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, set1i(0x7fff)));
    const vf unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    rounded = _mm256_castps_si256(_mm256_blendv_ps(as_float(rounded), as_float(set1i(0x7fc00000)), unordered));
    rounded = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128((__m128i*)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

INLINE vi widen_int8(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE void storei(void* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
INLINE vi zeroi() { return _mm256_setzero_si256(); }
INLINE vi subi(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE vi broadcast64(const void* p) { return _mm256_set1_epi64x(*static_cast<const int64_t*>(p)); }
INLINE vi dot_pairs(vi sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
// Neighbouring lanes added: the 16 sums of a panel from four vectors.
INLINE void add_neighbours(const vi* sums, vi* out) {
    out[0] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[0], sums[1]), 0xd8);
    out[1] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[2], sums[3]), 0xd8);
}
INLINE vi shift_add(vi high, vi low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }  // high * 256 + low
INLINE vi to_int(vf x) { return _mm256_cvtps_epi32(x); }
INLINE void store_int16(int16_t* p, vi x) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(f16* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

#endif

// The first n < W elements at p, zeros after them; and the same for storing.
template <class T>
INLINE vf load_first(const T* p, int64_t n) {
    alignas(64) T buffer[W] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
template <class T>
INLINE void store_first(T* p, vf x, int64_t n) {
    alignas(64) T buffer[W];
    store(buffer, x);
    memcpy(p, buffer, n * sizeof(T));
}
#if defined(__AVX512F__)
INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
INLINE vf load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE void store_first(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
INLINE vf load_first(const bf16* p, int64_t n) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
INLINE void store_first(bf16* p, vf x, int64_t n) {
    alignas(32) bf16 buffer[W];
    store(buffer, x);
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer)));
}
#endif
// Both kinds in one, for loops over sizes that need not be multiples of W.
template <class T>
INLINE vf load_upto(const T* p, int64_t n) {
    return n >= W ? load(p) : load_first(p, n);
}
template <class T>
INLINE void store_upto(T* p, vf x, int64_t n) {
    if (n >= W)
        store(p, x);
    else
        store_first(p, x, n);
}

INLINE float scalar(const float* p) { return *p; }
INLINE float scalar(const bf16* p) {
    const uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Eight floats at p, of which n exist: the rest are zeros.
INLINE __m256 load8(const float* p, int64_t n) {
    if (n >= 8) return _mm256_loadu_ps(p);
    float buffer[8] = {};
    if (n > 0) memcpy(buffer, p, n * sizeof(float));
    return _mm256_loadu_ps(buffer);
}
INLINE __m128i load8_bits(const void* p, int64_t n) {
    if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    uint16_t buffer[8] = {};
    if (n > 0) memcpy(buffer, p, n * 2);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
}
INLINE __m256 load8(const bf16* p, int64_t n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8_bits(p, n)), 16));
}
INLINE __m256 load8(const f16* p, int64_t n) { return _mm256_cvtph_ps(load8_bits(p, n)); }

INLINE void transpose8(__m256 (&r)[8]) {
    __m256 t[8], u[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

// 2^x to 2 units in the last place for x in [-126, 127]; below that 0 (so that masked scores, -inf, vanish exactly).
// Polynomial: the Taylor series of 2^f on [-0.5, 0.5], whose term after the last is below 2^-24 of the result.
INLINE vf exp2(vf x) {
    const vf clamped = vmax(x, set1(-126.0f));
    const vf n = round_nearest(clamped);
    const vf f = sub(clamped, n);
    vf p = set1(1.540353e-4f);
    p = fma(p, f, set1(1.3333558e-3f));
    p = fma(p, f, set1(9.6181291e-3f));
    p = fma(p, f, set1(5.5504109e-2f));
    p = fma(p, f, set1(2.4022651e-1f));
    p = fma(p, f, set1(6.9314718e-1f));
    p = fma(p, f, set1(1.0f));
    const vf result = scale_exponent(p, n);
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(zero(), _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_GE_OQ), result);
#else
    return _mm256_and_ps(result, _mm256_cmp_ps(x, set1(-126.0f), _CMP_GE_OQ));
#endif
}
// e^x: the argument is reduced in two steps, so that large arguments keep their precision. 0 below -87, limited to
// e^88. Not-a-number stays one.
INLINE vf exp(vf x) {
    const vf limited = vmin(set1(88.0f), x);
    const vf n = round_nearest(mul(limited, set1(1.44269504f)));
    vf f = fma(n, set1(-0.693359375f), limited);
    f = fma(n, set1(2.12194440e-4f), f);
    vf p = set1(1.9841270e-4f);
    p = fma(p, f, set1(1.3888889e-3f));
    p = fma(p, f, set1(8.3333333e-3f));
    p = fma(p, f, set1(4.1666667e-2f));
    p = fma(p, f, set1(1.6666667e-1f));
    p = fma(p, f, set1(0.5f));
    p = fma(p, f, set1(1.0f));
    p = fma(p, f, set1(1.0f));
    const vf result = scale_exponent(p, vmax(n, set1(-126.0f)));
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(zero(), _mm512_cmp_ps_mask(x, set1(-87.0f), _CMP_NLT_UQ), result);
#else
    return _mm256_and_ps(result, _mm256_cmp_ps(x, set1(-87.0f), _CMP_NLT_UQ));
#endif
}
// The larger and the smaller; not-a-number when either is. (vmax and vmin give the second when one is not a number.)
INLINE vf max_or_nan(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(vmax(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
#else
    return _mm256_blendv_ps(vmax(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
#endif
}
INLINE vf min_or_nan(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(vmin(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
#else
    return _mm256_blendv_ps(vmin(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
#endif
}
// x / (1 + e^-x).
INLINE vf silu(vf x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// body(pointer cast to the element type) for a type known at run time.
template <class Body>
INLINE void with_type(DType dtype, const Body& body) {
    if (dtype == F32)
        body(float{});
    else if (dtype == BF16)
        body(bf16{});
    else
        body(f16{});
}

}  // namespace TRINE_ISA
}  // namespace trine
