// Convolutions and matrix products whose input is first gathered: rows of a product, one an output pixel, in the type
// that the product's instruction reads. Gathering costs a copy for each place of the kernel, and no more: a row is used
// for all filters, which at 27 products of 8 bits a cycle (AVX2) is ten times as long for 64 of them.
//
// A core says how numbers are stored in the rows and multiplies them with panels of weights. Integer sums are exact;
// the results depend on nothing else that is in the batch.
#pragma once

#include "finish.h"
#include "linear.h"
#if defined(TRINE_TILES)
#include "amx.h"
#endif

namespace trine {
namespace TRINE_ISA {

constexpr int64_t WINDOW_BYTES = 128 * 1024;  // of a task's rows: a quarter of the second-level cache
constexpr int64_t WINDOW_ROWS_LEAST = 24;
constexpr int64_t WINDOW_ROWS_MOST = 192;
constexpr int64_t SLACK = 64;  // bytes that copies may write beyond a row

#if !defined(__AVX512F__) && !defined(TRINE_TILES)
// Rows of 16-bit integers, x - zero, times int8 weights widened: for weights of which two neighbours' products with
// bytes may not fit 16 bits. Two thirds of the speed of bytes as they are.
struct WordCore {
    using Row = int16_t;
    using Sum = int32_t;
    static constexpr int64_t rows_at_once = 6;
    static constexpr int64_t panels_at_once = 1;
    static constexpr int64_t slice = 512;  // of k: 16 KiB of widened weights
    static constexpr int64_t weight_bytes = 1;
    DType dtype;
    int32_t zero;

    explicit WordCore(const WindowArgs& a) : dtype(a.x_dtype), zero(a.x_zero) {}
    Row padding() const { return 0; }
    int64_t element() const { return 1; }
    const Row* direct(const WindowArgs&) const { return nullptr; }

    void copy(const void* from, int64_t n, Row* to) const {
        const char* p = static_cast<const char*>(from);
        const __m256i shift = _mm256_set1_epi16(static_cast<int16_t>(zero));
        for (; n >= 16; n -= 16, p += 16, to += 16) put(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), shift, to);
        if (n == 0) return;
        alignas(16) char rest[16] = {};
        memcpy(rest, p, n);
        put(_mm_load_si128(reinterpret_cast<const __m128i*>(rest)), shift, to);
    }
    INLINE void put(const WordCore& core, __m128i bytes, __m256i shift, Row* to) {
        const __m256i wide = core.dtype == INT8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi16(wide, shift));
    }
    void put(__m128i bytes, __m256i shift, Row* to) const { put(*this, bytes, shift, to); }

    // c[R][16] (+)= x[R][2 pairs] w[pairs][16][2]; the weights are words already, or bytes.
    template <int R, bool WIDE>
    static void micro(const Row* x, int64_t stride, const char* w, int64_t pairs, Sum* c, bool accumulate) {
        vi sum[R][2];
        UNROLL
        for (int r = 0; r < R; ++r) {
            sum[r][0] = accumulate ? loadi(c + r * PANEL) : zeroi();
            sum[r][1] = accumulate ? loadi(c + r * PANEL + W) : zeroi();
        }
        for (int64_t p = 0; p < pairs; ++p) {
            const vi w0 = WIDE ? loadi(w + p * 64) : widen_int8(w + p * 32);
            const vi w1 = WIDE ? loadi(w + p * 64 + 32) : widen_int8(w + p * 32 + 16);
            UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t pair;
                memcpy(&pair, x + r * stride + 2 * p, 4);
                const vi value = set1i(pair);
                sum[r][0] = dot_pairs(sum[r][0], w0, value);
                sum[r][1] = dot_pairs(sum[r][1], w1, value);
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r) storei(c + r * PANEL, sum[r][0]), storei(c + r * PANEL + W, sum[r][1]);
    }

    template <bool WIDE>
    static void block(int64_t rows, const Row* x, int64_t stride, const char* w, int64_t pairs, Sum* c, bool more) {
        using Function = decltype(&micro<1, WIDE>);
        static constexpr Function functions[] = {micro<1, WIDE>, micro<2, WIDE>, micro<3, WIDE>,
                                                 micro<4, WIDE>, micro<5, WIDE>, micro<6, WIDE>};
        functions[rows - 1](x, stride, w, pairs, c, more);
    }

    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t, int64_t depth, Sum* c,
                 const int32_t*) const {
        if (rows <= rows_at_once) return block<false>(rows, x, stride, w, depth / 2, c, false);
        alignas(64) int16_t wide[slice * PANEL];
        const Blocks blocks(rows, rows_at_once);
        for (int64_t start = 0; start < depth; start += slice) {
            const int64_t length = min(slice, depth - start);
            for (int64_t i = 0; i < length * PANEL; i += 2 * W) storei(wide + i, widen_int8(w + start * PANEL + i));
            for (int64_t b = 0; b < blocks.count; ++b) {
                const int64_t row = blocks.first(b), size = blocks.first(b + 1) - row;
                block<true>(size, x + row * stride + start, stride, reinterpret_cast<const char*>(wide), length / 2,
                            c + row * PANEL, start > 0);
            }
        }
    }
    const int32_t* shares_left(const WindowArgs&) const { return nullptr; }
    vf total(const Sum* c, const WindowArgs&, int64_t) const { return to_float(loadi(c)); }
};
#endif

// Rows of unsigned bytes times int8 weights, four products a lane; the zero point's share is a filter's own constant.
// AVX2 sums two products in 16 bits, which saturate: its weights are such that they don't. Where four fit (`fits`), it
// widens half as often: of each 64 products, 3 instructions multiply instead of 4.
struct ByteCore {
    using Row = uint8_t;
    using Sum = int32_t;
    static constexpr int64_t rows_at_once = W == 8 ? 6 : 8;
#if defined(__AVX512F__) || defined(TRINE_TILES)
    static constexpr int64_t panels_at_once = 2;
#else
    static constexpr int64_t panels_at_once = 1;
    static constexpr int64_t slice = 1024;  // of k: 16 KiB of weights
    static constexpr int64_t rows_of_four = 4;  // more don't leave registers for two products to be added
#endif
    static constexpr int64_t weight_bytes = 1;
    uint8_t flip;  // signed bytes become unsigned ones, 128 more
    int32_t zero;
    bool four;

    explicit ByteCore(const WindowArgs& a)
        : flip(a.x_dtype == INT8 ? 0x80 : 0), zero(a.x_zero + (a.x_dtype == INT8 ? 128 : 0)), four(a.fits == 4) {}
    Row padding() const { return static_cast<Row>(zero); }
    int64_t element() const { return 1; }
    const Row* direct(const WindowArgs& a) const { return flip ? nullptr : static_cast<const Row*>(a.x); }
    // `count` pixels of fewer than four channels, four each.
    void interleave(const void* from, const WindowArgs& a, int64_t count, Row* to) const {
        const char* p = static_cast<const char*>(from);
        const uint32_t kept = (1u << 8 * a.x_channels) - 1, turned = flip * 0x01010101u & kept;
        for (int64_t i = 0; i < count; ++i, p += a.x_pixel, to += 4) {
            uint32_t pixel = 0;
            memcpy(&pixel, p, i + 4 <= count ? 4 : a.x_channels);  // the next pixels', too, where there are some
            pixel = (pixel & kept) ^ turned;
            memcpy(to, &pixel, 4);
        }
    }

    void copy(const void* from, int64_t n, Row* to) const {
        memcpy(to, from, n);
        if (flip)
            for (int64_t i = 0; i < n; ++i) to[i] ^= flip;
    }

#if defined(TRINE_TILES)
    // c[rows][32] = x[rows][depth] w for up to 32 rows; `next` is the second panel, or the first again.
    static void tiles_block(const Row* x, int64_t stride, int64_t rows, const char* w, const char* next, int64_t depth,
                            Sum* c) {
        const bool tall = rows > TILE_ROWS;
        tile_zero<0>();
        tile_zero<1>();
        if (tall) tile_zero<2>(), tile_zero<3>();
        for (int64_t i = 0; i < depth; i += 64) {
            tile_load<6>(w + i * PANEL, 64);
            tile_load<4>(x + i, stride);
            tile_dot_unsigned<0, 4, 6>();
            tile_load<7>(next + i * PANEL, 64);
            tile_dot_unsigned<1, 4, 7>();
            if (tall) {
                tile_load<5>(x + TILE_ROWS * stride + i, stride);
                tile_dot_unsigned<2, 5, 6>();
                tile_dot_unsigned<3, 5, 7>();
            }
        }
        tile_store<0>(c, 2 * PANEL * sizeof(Sum));
        tile_store<1>(c + PANEL, 2 * PANEL * sizeof(Sum));
        if (!tall) return;
        tile_store<2>(c + 2 * TILE_ROWS * PANEL, 2 * PANEL * sizeof(Sum));
        tile_store<3>(c + 2 * TILE_ROWS * PANEL + PANEL, 2 * PANEL * sizeof(Sum));
    }

    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t panels, int64_t depth, Sum* c,
                 const int32_t*) const {
        const char* next = panels > 1 ? w + depth * PANEL : w;
        int64_t configured = 0;
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
            const int64_t size = min(2 * TILE_ROWS, rows - row);
            if (size != configured) configure(configured = size);
            tiles_block(x + row * stride, stride, size, w, next, depth, c + row * 2 * PANEL);
        }
        tile_release();
    }
#elif defined(__AVX512F__)
    template <int R>
    static void micro(const Row* x, int64_t stride, const char* w, const char* next, int64_t depth, Sum* c) {
        vi sum[R][2];
        UNROLL
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zeroi();
        for (int64_t i = 0; i < depth; i += 4) {
            const vi w0 = loadi(w + i * PANEL), w1 = loadi(next + i * PANEL);
            UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t quad;
                memcpy(&quad, x + r * stride + i, 4);
                const vi value = set1i(quad);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], value, w0);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], value, w1);
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r) storei(c + r * 2 * PANEL, sum[r][0]), storei(c + r * 2 * PANEL + PANEL, sum[r][1]);
    }

    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t panels, int64_t depth, Sum* c,
                 const int32_t*) const {
        using Function = decltype(&micro<1>);
        static constexpr Function functions[] = {micro<1>, micro<2>, micro<3>, micro<4>,
                                                 micro<5>, micro<6>, micro<7>, micro<8>};
        const char* next = panels > 1 ? w + depth * PANEL : w;
        const Blocks blocks(rows, rows_at_once);
        for (int64_t b = 0; b < blocks.count; ++b) {
            const int64_t row = blocks.first(b), size = blocks.first(b + 1) - row;
            functions[size - 1](x + row * stride, stride, w, next, depth, c + row * 2 * PANEL);
        }
    }
#else
    // c[R][16] (+)= x[R][depth] w[depth / 4][16][4]; sums begin at minus `shares`, or where they were if that is null.
    template <int R, bool FOUR>
    static void micro(const Row* x, int64_t stride, const char* w, int64_t depth, Sum* c, const int32_t* shares) {
        const vi ones = _mm256_set1_epi16(1);
        vi sum[R][2];
        UNROLL
        for (int r = 0; r < R; ++r) UNROLL
        for (int v = 0; v < 2; ++v) sum[r][v] = shares ? subi(zeroi(), loadi(shares + v * W)) : loadi(c + r * PANEL + v * W);
        for (int64_t i = 0; i < depth; i += FOUR ? 8 : 4) {
            const char* at = w + i * PANEL;
            UNROLL
            for (int r = 0; r < R; ++r) {
                const vi value = broadcast32(x + r * stride + i);
                vi low = _mm256_maddubs_epi16(value, loadi(at)), high = _mm256_maddubs_epi16(value, loadi(at + 32));
                if (FOUR) {
                    const vi next = broadcast32(x + r * stride + i + 4);
                    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(next, loadi(at + 64)));
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(next, loadi(at + 96)));
                }
                sum[r][0] = dot_pairs(sum[r][0], low, ones);
                sum[r][1] = dot_pairs(sum[r][1], high, ones);
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r) storei(c + r * PANEL, sum[r][0]), storei(c + r * PANEL + W, sum[r][1]);
    }
    INLINE vi broadcast32(const Row* p) {
        int32_t value;
        memcpy(&value, p, 4);
        return set1i(value);
    }

    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t, int64_t depth, Sum* c,
                 const int32_t* shares) const {
        using Function = decltype(&micro<1, false>);
        static constexpr Function twos[] = {micro<1, false>, micro<2, false>, micro<3, false>,
                                            micro<4, false>, micro<5, false>, micro<6, false>};
        static constexpr Function fours[] = {micro<1, true>, micro<2, true>, micro<3, true>, micro<4, true>};
        const Blocks blocks(rows, four ? rows_of_four : rows_at_once);
        for (int64_t start = 0; start < depth; start += slice)
            for (int64_t b = 0; b < blocks.count; ++b) {
                const int64_t row = blocks.first(b), size = blocks.first(b + 1) - row;
                (four ? fours : twos)[size - 1](x + row * stride + start, stride, w + start * PANEL,
                                                min(slice, depth - start), c + row * PANEL, start ? nullptr : shares);
            }
    }
#endif
    // What is still to be taken off the sums.
    const int32_t* shares_left(const WindowArgs& a) const {
#if defined(__AVX512F__) || defined(TRINE_TILES)
        return a.shares;
#else
        return nullptr;
#endif
    }
    vf total(const Sum* c, const WindowArgs& a, int64_t at) const {
        const int32_t* shares = shares_left(a);
        return to_float(shares ? subi(loadi(c), loadi(shares + at)) : loadi(c));
    }
};

#if defined(TRINE_TILES) || defined(__AVX512BF16__)
// Rows of bf16, rounded from float32, times bf16 weights.
struct Bf16Core {
    using Row = bf16;
    using Sum = float;
    static constexpr int64_t rows_at_once = 8;
    static constexpr int64_t panels_at_once = 2;
    static constexpr int64_t weight_bytes = 2;

    bool narrow;  // the input is bf16 already

    explicit Bf16Core(const WindowArgs& a) : narrow(a.x_dtype == BF16) {}
    Row padding() const { return {0}; }
    int64_t element() const { return narrow ? 2 : 4; }
    const Row* direct(const WindowArgs& a) const { return narrow ? static_cast<const Row*>(a.x) : nullptr; }

    void copy(const void* from, int64_t n, Row* to) const {
        if (narrow) {
            memcpy(to, from, n * sizeof(Row));
            return;
        }
        const float* p = static_cast<const float*>(from);
        for (int64_t i = 0; i < n; i += W) store_upto(to + i, load_upto(p + i, n - i), n - i);
    }

    // `count` pixels of a planar image of float32, four channels each.
    void interleave(const void* from, const WindowArgs& a, int64_t count, Row* to) const {
        const float* planes[4];
        for (int64_t c = 0; c < 4; ++c) planes[c] = static_cast<const float*>(from) + min(c, a.x_channels - 1) * a.x_channel;
        alignas(64) Row part[4][W];
        for (int64_t i = 0; i < count; i += W) {
            const int64_t n = min<int64_t>(W, count - i);
            for (int64_t c = 0; c < 4; ++c)
                store(part[c], c < a.x_channels ? load_upto(planes[c] + i, n) : zero());
            uint64_t* pixels = reinterpret_cast<uint64_t*>(to + 4 * i);
            for (int64_t p = 0; p < n; ++p)
                pixels[p] = uint64_t(part[0][p].bits) | uint64_t(part[1][p].bits) << 16 | uint64_t(part[2][p].bits) << 32 |
                            uint64_t(part[3][p].bits) << 48;
        }
    }

#if defined(TRINE_TILES)
    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t panels, int64_t depth, Sum* c,
                 const int32_t*) const {
        const char* b[2] = {w, panels > 1 ? w + depth * 2 * PANEL : w};
        int64_t configured = 0;
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
            const int64_t size = min(2 * TILE_ROWS, rows - row);
            if (size != configured) configure(configured = size);
            const Row* from = x + row * stride;
            float* to = c + row * 2 * PANEL;
            if (size > TILE_ROWS)
                amx_tall(from, stride, b, depth, to, 2 * PANEL, false, Ahead{{b[0], b[1]}, 0});
            else
                amx_flat<2>(from, stride, b, depth, to, 2 * PANEL, false);
        }
        tile_release();
    }
#else
    template <int R>
    static void micro(const Row* x, int64_t stride, const char* w, const char* next, int64_t depth, Sum* c) {
        vf sum[R][2];
        UNROLL
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
        for (int64_t i = 0; i < depth; i += 2) {
            const vi w0 = loadi(w + i * 2 * PANEL), w1 = loadi(next + i * 2 * PANEL);
            UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t pair;
                memcpy(&pair, x + r * stride + i, 4);
                const vi value = set1i(pair);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], (__m512bh)value, (__m512bh)w0);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], (__m512bh)value, (__m512bh)w1);
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r) store(c + r * 2 * PANEL, sum[r][0]), store(c + r * 2 * PANEL + PANEL, sum[r][1]);
    }

    void product(const Row* x, int64_t stride, int64_t rows, const char* w, int64_t panels, int64_t depth, Sum* c,
                 const int32_t*) const {
        using Function = decltype(&micro<1>);
        static constexpr Function functions[] = {micro<1>, micro<2>, micro<3>, micro<4>,
                                                 micro<5>, micro<6>, micro<7>, micro<8>};
        const char* next = panels > 1 ? w + depth * 2 * PANEL : w;
        const Blocks blocks(rows, rows_at_once);
        for (int64_t b = 0; b < blocks.count; ++b) {
            const int64_t row = blocks.first(b), size = blocks.first(b + 1) - row;
            functions[size - 1](x + row * stride, stride, w, next, depth, c + row * 2 * PANEL);
        }
    }
#endif
    const int32_t* shares_left(const WindowArgs&) const { return nullptr; }
    vf total(const Sum* c, const WindowArgs&, int64_t) const { return load(c); }
};
#endif

// How a convolution is cut into tasks: ranges of output pixels x ranges of panels, of one group.
struct WindowJob {
    int64_t rows, rows_per_task, row_tasks, panels, panels_per_task, panel_tasks, stride;

    WindowJob(const WindowArgs& a, int64_t row_bytes, int64_t together) {
        rows = a.images * a.out_height * a.out_width;
        panels = ceil_div(a.filters, PANEL);
        stride = a.depth + SLACK;
        const int64_t most = max(WINDOW_ROWS_LEAST, min(WINDOW_ROWS_MOST, WINDOW_BYTES / (stride * row_bytes)));
        const int64_t wanted = num_threads() * 6;
        row_tasks = ceil_div(rows, most);
        if (row_tasks * a.groups < wanted) row_tasks = max(row_tasks, min(ceil_div(rows, 2 * WINDOW_ROWS_LEAST), wanted));
        rows_per_task = round_up(ceil_div(rows, row_tasks), min<int64_t>(rows, 12));
        row_tasks = ceil_div(rows, rows_per_task);
        // With few rows the filters are shared out; each task gathers for itself.
        const int64_t others = row_tasks * a.groups;
        const int64_t parts = max<int64_t>(1, min(ceil_div(panels, together), ceil_div(num_threads() * 3, others)));
        panels_per_task = round_up(ceil_div(panels, others >= num_threads() * 3 ? 1 : parts), together);
        panel_tasks = ceil_div(panels, panels_per_task);
    }
};

// The windows of the rows [first, first + count) of one group, as the core stores them.
template <class Core>
static void gather_windows(const WindowArgs& a, const Core& core, int64_t group, int64_t first, int64_t count, int64_t stride,
                           typename Core::Row* to) {
    const char* x = static_cast<const char*>(a.x) + group * a.channels * core.element();
    int64_t ox = first % a.out_width, oy = first / a.out_width % a.out_height, n = first / a.out_width / a.out_height;
    const int64_t places = a.kernel_h * a.kernel_w;
    const bool lines = a.dilation_w == 1 && a.x_pixel == a.channels;  // neighbouring pixels touch
    for (int64_t r = 0; r < count; ++r) {
        typename Core::Row* row = to + r * stride;
        const int64_t top = oy * a.stride_h - a.pad_top, left = ox * a.stride_w - a.pad_left;
        const char* image = x + n * a.x_image * core.element();
        if (places == 1 && !a.pad_top && !a.pad_left) {
            core.copy(image + (top * a.x_row + left * a.x_pixel) * core.element(), a.channels, row);
        } else {
            for (int64_t i = 0; i < a.kernel_h; ++i) {
                const int64_t y = top + i * a.dilation_h;
                const bool inside = y >= 0 && y < a.height;
                const char* line = image + y * a.x_row * core.element();
                if (inside && lines && left >= 0 && left + a.kernel_w <= a.width) {
                    core.copy(line + left * a.x_pixel * core.element(), a.kernel_w * a.channels, row);
                    row += a.kernel_w * a.channels;
                    continue;
                }
                for (int64_t j = 0; j < a.kernel_w; ++j, row += a.channels) {
                    const int64_t column = left + j * a.dilation_w;
                    if (inside && column >= 0 && column < a.width)
                        core.copy(line + column * a.x_pixel * core.element(), a.channels, row);
                    else
                        for (int64_t c = 0; c < a.channels; ++c) row[c] = core.padding();
                }
            }
        }
        for (typename Core::Row* end = to + r * stride + a.depth, *rest = to + r * stride + places * a.channels; rest < end;
             ++rest)
            *rest = {};
        if (++ox == a.out_width) {
            ox = 0;
            if (++oy == a.out_height) oy = 0, ++n;
        }
    }
}

// Whether pixels are rows of the product as they lie.
INLINE bool is_plain(const WindowArgs& a) {
    return a.kernel_h * a.kernel_w == 1 && a.stride_h == 1 && a.stride_w == 1 && !a.pad_top && !a.pad_left &&
           a.out_height == a.height && a.out_width == a.width && a.x_row == a.width * a.x_pixel &&
           a.x_image == a.height * a.x_row && a.depth == a.channels;
}

template <class Core>
static void window_task(const WindowArgs& a, const Core& core, const WindowJob& job, int64_t index) {
    using Row = typename Core::Row;
    using Sum = typename Core::Sum;
    const int64_t first_panel = index % job.panel_tasks * job.panels_per_task;
    const int64_t end_panel = min(first_panel + job.panels_per_task, job.panels);
    index /= job.panel_tasks;
    const int64_t first = index % job.row_tasks * job.rows_per_task, group = index / job.row_tasks;
    const int64_t rows = min(job.rows_per_task, job.rows - first);
    const Row* x = core.direct(a);
    int64_t stride = job.stride;
    if (x && is_plain(a)) {
        x += group * a.channels + first * a.x_pixel;
        stride = a.x_pixel;
    } else {
        Row* gathered = static_cast<Row*>(scratch(SCRATCH_INPUT, (rows * stride + SLACK) * sizeof(Row)));
        gather_windows(a, core, group, first, rows, stride, gathered);
        x = gathered;
    }
    constexpr int64_t together = Core::panels_at_once, ldc = together * PANEL;
    Sum* c = static_cast<Sum*>(scratch(SCRATCH_ACCUMULATOR, round_up(rows, 32) * ldc * sizeof(Sum)));
    const int64_t panel_bytes = a.depth * PANEL * Core::weight_bytes;
    const char* weight = static_cast<const char*>(a.weight) + group * job.panels * panel_bytes;
    for (int64_t p = first_panel; p < end_panel; p += together) {
        const int64_t panels = min(together, end_panel - p);
        const int32_t* shares = a.shares ? a.shares + (group * job.panels + p) * PANEL : nullptr;
        core.product(x, stride, rows, weight + p * panel_bytes, panels, a.depth, c, shares);
        for (int64_t q = p; q < p + panels; ++q) {
            const int64_t columns = min(PANEL, a.filters - q * PANEL), at = (group * job.panels + q) * PANEL;
            finish_run(a, core, c + (q - p) * PANEL, ldc, rows, first, group * a.filters + q * PANEL, at, columns);
        }
    }
}

template <class Core>
static void windows(const WindowArgs& a) {
    if (a.images * a.out_height * a.out_width == 0) return;
    const Core core(a);
    const WindowJob job(a, sizeof(typename Core::Row), Core::panels_at_once);
    const int64_t tasks = a.groups * job.row_tasks * job.panel_tasks;
    if (job.rows * a.depth * a.filters < SERIAL_WORK)
        for (int64_t i = 0; i < tasks; ++i) window_task(a, core, job, i);
    else
        parallel(tasks, [&](int64_t i) { window_task(a, core, job, i); });
}

}  // namespace TRINE_ISA
}  // namespace trine
