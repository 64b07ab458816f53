// Linear layers on the tile registers of AMX: bf16 weights, and int8 weights from a few rows on.
//
// bf16: a block of up to 32 rows x 2 panels of sums stays in four tiles; up to 16 rows x 4 panels when there is no
// more. A weight tile, 32 neighbours in k of one panel, is 1 KiB in one piece (runtime.h). One product of tiles takes
// 16 cycles, so that few rows are limited by reading the weight (64 bytes a cycle would be needed to keep up) and many
// by the products: loads then come from the first two caches, the slice of a panel pair (K_DEPTH deep) from the first.
// All numbers of rows take this path, since the unit adds in an order of its own: so a row's result does not depend on
// what else is in the batch.
//
// int8: x is rounded to 16 bits (int8.h) and split into a signed high and an unsigned low byte; the two products, one
// shifted, add up to the exact sum that int8.h gets. So it is free to take either, by the number of rows.
#pragma once

#include "int8.h"
#include "tiles.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t TILE_ROWS = 16;
constexpr int64_t K_DEPTH = 1024;     // of a slice of two panels that blocks of rows pass over
constexpr int64_t X_BYTES = 5 << 18;  // of a task's rows: they stay in a 2 MiB second-level cache from task to task
constexpr int64_t AMX_INT8_ROWS = 3;  // from here on tiles beat vectors for int8 weights
constexpr int64_t PREFETCH_BYTES = TILE_BYTES;

INLINE void prefetch_tile(const char* p) {
    UNROLL
    for (int i = 0; i < TILE_BYTES; i += 64) __builtin_prefetch(p + PREFETCH_BYTES + i, 0, 2);
}

// Tiles 0 to 3: sums, [2 row tiles][2 panels] or [4 panels]; 4 and 5: x; 6 and 7: weights.
INLINE void configure(int64_t rows) {
    TileConfig config;
    const int64_t first = min(rows, TILE_ROWS), second = rows - first;
    config.set(0, first);
    config.set(1, first);
    config.set(2, second ? second : first);
    config.set(3, second ? second : first);
    config.set(4, first);
    config.set(5, second ? second : first);
    config.set(6, TILE_ROWS);
    config.set(7, TILE_ROWS);
    tile_configure(config);
}

template <int T>
INLINE void begin_sum(const float* c, int64_t ldc, bool accumulate) {
    if (accumulate)
        tile_load<T>(c, ldc * sizeof(float));
    else
        tile_zero<T>();
}

// What to bring into the second-level cache meanwhile: `rate` bytes of each of two panels for every 32 of k.
struct Ahead {
    const char* start[2];
    int64_t rate;
};

// c[16 + m][32] (+)= x[16 + m][k] b[2][k][16].
static void amx_tall(const bf16* x, int64_t stride, const char* const* b, int64_t k, float* c, int64_t ldc,
                     bool accumulate, const Ahead& ahead) {
    float* below = c + TILE_ROWS * ldc;
    begin_sum<0>(c, ldc, accumulate);
    begin_sum<1>(c + PANEL, ldc, accumulate);
    begin_sum<2>(below, ldc, accumulate);
    begin_sum<3>(below + PANEL, ldc, accumulate);
    for (int64_t i = 0; i < k; i += 32) {
        for (int64_t j = i / 32 * ahead.rate; j < (i / 32 + 1) * ahead.rate; j += 64) {
            __builtin_prefetch(ahead.start[0] + j, 0, 2);
            __builtin_prefetch(ahead.start[1] + j, 0, 2);
        }
        tile_load<6>(b[0] + i * 32, 64);
        tile_load<4>(x + i, stride * sizeof(bf16));
        tile_dot_bf16<0, 4, 6>();
        tile_load<7>(b[1] + i * 32, 64);
        tile_dot_bf16<1, 4, 7>();
        tile_load<5>(x + TILE_ROWS * stride + i, stride * sizeof(bf16));
        tile_dot_bf16<2, 5, 6>();
        tile_dot_bf16<3, 5, 7>();
    }
    tile_store<0>(c, ldc * sizeof(float));
    tile_store<1>(c + PANEL, ldc * sizeof(float));
    tile_store<2>(below, ldc * sizeof(float));
    tile_store<3>(below + PANEL, ldc * sizeof(float));
}

// c[m][16 P] (+)= x[m][k] b[P][k][16] for m <= 16 rows and P = 4, 2 or 1 panels.
template <int P>
static void amx_flat(const bf16* x, int64_t stride, const char* const* b, int64_t k, float* c, int64_t ldc,
                     bool accumulate) {
    begin_sum<0>(c, ldc, accumulate);
    if (P > 1) begin_sum<1>(c + PANEL, ldc, accumulate);
    if (P > 2) begin_sum<2>(c + 2 * PANEL, ldc, accumulate);
    if (P > 2) begin_sum<3>(c + 3 * PANEL, ldc, accumulate);
    for (int64_t i = 0; i < k; i += 32) {
        tile_load<4>(x + i, stride * sizeof(bf16));
        for (int p = 0; p < P; ++p) prefetch_tile(b[p] + i * 32);
        tile_load<6>(b[0] + i * 32, 64);
        tile_dot_bf16<0, 4, 6>();
        if (P > 1) {
            tile_load<7>(b[1] + i * 32, 64);
            tile_dot_bf16<1, 4, 7>();
        }
        if (P > 2) {
            tile_load<6>(b[2] + i * 32, 64);
            tile_dot_bf16<2, 4, 6>();
            tile_load<7>(b[3] + i * 32, 64);
            tile_dot_bf16<3, 4, 7>();
        }
    }
    tile_store<0>(c, ldc * sizeof(float));
    if (P > 1) tile_store<1>(c + PANEL, ldc * sizeof(float));
    if (P > 2) tile_store<2>(c + 2 * PANEL, ldc * sizeof(float));
    if (P > 2) tile_store<3>(c + 3 * PANEL, ldc * sizeof(float));
}

// A block of up to 32 rows over neighbouring panels. It reads a little ahead of itself, or what it is told to.
static void amx_block(const bf16* x, int64_t stride, int64_t rows, const char* const* b, int64_t panels, int64_t k,
                      float* c, int64_t ldc, bool accumulate, const Ahead* ahead) {
    int64_t p = 0;
    if (rows > TILE_ROWS)
        for (; p + 2 <= panels; p += 2) {
            const Ahead near{{b[p] + PREFETCH_BYTES, b[p + 1] + PREFETCH_BYTES}, TILE_BYTES};
            amx_tall(x, stride, b + p, k, c + p * PANEL, ldc, accumulate, ahead ? *ahead : near);
        }
    else
        for (; p + 4 <= panels; p += 4) amx_flat<4>(x, stride, b + p, k, c + p * PANEL, ldc, accumulate);
    if (p == panels) return;
    // The panels left over, by tiles of rows.
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        configure(min(TILE_ROWS, rows - r));
        int64_t q = p;
        for (; q + 2 <= panels; q += 2)
            amx_flat<2>(x + r * stride, stride, b + q, k, c + r * ldc + q * PANEL, ldc, accumulate);
        for (; q < panels; ++q) amx_flat<1>(x + r * stride, stride, b + q, k, c + r * ldc + q * PANEL, ldc, accumulate);
    }
    configure(rows);
}

// One block of rows reads its weights once, in long runs. Several share slices of two panels: the first reads a little
// ahead of itself, the others bring in the next slice.
static void amx_task(const LinearJob& job, int64_t index) {
    const LinearTask task(job, index);
    const Bf16Rows& x = *static_cast<const Bf16Rows*>(job.x);
    const int64_t k = job.args->weight->k_padded, ldc = task.weight_panels * PANEL;
    float* c = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, task.rows * ldc * sizeof(float)));
    const int64_t blocks = task.end_block - task.first_block;
    const int64_t depth = blocks == 1 ? k : K_DEPTH, together = blocks == 1 ? task.weight_panels : 2;
    int64_t configured = 0;
    for (int64_t start = 0; start < k; start += depth) {
        for (int64_t p = 0; p < task.weight_panels; p += together) {
            const char* b[2 * MAX_PANELS_PER_TASK];
            const int64_t panels = min(together, task.weight_panels - p), length = min(depth, k - start);
            for (int64_t i = 0; i < panels; ++i) b[i] = task.address[p + i] + start * 2 * PANEL;

            const bool same_k = p + together < task.weight_panels;
            const int64_t next = same_k ? p + together : 0, next_start = min(same_k ? start : start + depth, k);
            const int64_t next_bytes = min(depth, k - next_start) * 2 * PANEL, steps = length / 32;
            const int64_t rate = blocks == 1 ? 0 : round_up(ceil_div(next_bytes, (blocks - 1) * steps), 64);
            for (int64_t i = 0; i < blocks; ++i) {
                const int64_t row = job.blocks.first(task.first_block + i);
                const int64_t size = job.blocks.first(task.first_block + i + 1) - row;
                const int64_t skipped = next_start * 2 * PANEL + (i - 1) * steps * rate;
                const Ahead ahead{
                    {task.address[next] + skipped, task.address[min(next + 1, task.weight_panels - 1)] + skipped},
                    rate};
                if (size != configured) configure(configured = size);
                amx_block(x.data + row * x.stride + start, x.stride, size, b, panels, length,
                          c + (row - task.row) * ldc + p * PANEL, ldc, start > 0, i == 0 ? nullptr : &ahead);
            }
        }
    }
    tile_release();
    write_out_any(job, task, c, ldc);
}

INLINE int64_t amx_rows_per_task(int64_t k) {
    return max<int64_t>(4 * TILE_ROWS, min<int64_t>(X_BYTES / (2 * k), 512)) / 32 * 32;
}

static void linear_amx(const LinearArgs& args) {
    if (args.rows == 0) return;
    const Bf16Rows x = bf16_rows(args);
    LinearJob job(args, 0, args.rows, 2 * TILE_ROWS, amx_rows_per_task(args.weight->k_padded));
    job.x = &x;
    run_tasks(job, [&](int64_t i) { amx_task(job, i); });
}

// x of int8 layers: rounded rows split into bytes, and scales [rows][groups].
struct ByteRows {
    uint8_t *high, *low;  // [rows][stride]
    int64_t stride;
    float* scales;
};

// One group (two or more weight tiles deep) of two neighbouring panels for up to 16 rows: c[rows][32] += sums.
template <bool STREAM>
static void amx_int8_group(const ByteRows& x, int64_t row, int64_t rows, int64_t group, int64_t g,
                           const char* const* weights, const bf16* const* scales, int64_t groups, float* c,
                           int64_t ldc) {
    alignas(64) int32_t sums[4][TILE_ROWS][PANEL];
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t i = g * group; i < (g + 1) * group; i += 64) {
        if (STREAM) prefetch_tile(weights[0] + i * PANEL), prefetch_tile(weights[1] + i * PANEL);
        tile_load<6>(weights[0] + i * PANEL, 64);
        tile_load<4>(x.high + row * x.stride + i, x.stride);
        tile_dot_signed<0, 4, 6>();
        tile_load<5>(x.low + row * x.stride + i, x.stride);
        tile_dot_unsigned<1, 5, 6>();
        tile_load<7>(weights[1] + i * PANEL, 64);
        tile_dot_signed<2, 4, 7>();
        tile_dot_unsigned<3, 5, 7>();
    }
    tile_store<0>(sums[0], 64);
    tile_store<1>(sums[1], 64);
    tile_store<2>(sums[2], 64);
    tile_store<3>(sums[3], 64);
    for (int p = 0; p < 2; ++p)
        for (int v = 0; v < PANEL; v += W) {
            const vf weight_scale = load(scales[p] + g * PANEL + v);
            for (int64_t r = 0; r < rows; ++r) {
                const vi whole = shift_add(loadi(&sums[2 * p][r][v]), loadi(&sums[2 * p + 1][r][v]));
                const vf scale = mul(weight_scale, set1(x.scales[(row + r) * groups + g]));
                float* to = c + r * ldc + p * PANEL + v;
                store(to, fma(to_float(whole), scale, load(to)));
            }
        }
}

static void amx_int8_task(const LinearJob& job, int64_t index) {
    const LinearTask task(job, index);
    const Weight& weight = *job.args->weight;
    const ByteRows& x = *static_cast<const ByteRows*>(job.x);
    const int64_t k = weight.k_padded, groups = k / weight.group, ldc = (task.weight_panels + 1) / 2 * 2 * PANEL;
    float* c = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, task.rows * ldc * sizeof(float)));
    memset(c, 0, task.rows * ldc * sizeof(float));
    int64_t configured = 0;
    for (int64_t p = 0; p < task.weight_panels; p += 2) {
        const char* weights[2];
        const bf16* scales[2];
        for (int64_t i = 0; i < 2; ++i) {  // an odd last panel is its own neighbour
            weights[i] = task.address[min(p + i, task.weight_panels - 1)];
            scales[i] = reinterpret_cast<const bf16*>(weight.scales) +
                        (weights[i] - weight.data) / weight.panel_bytes * groups * PANEL;
        }
        for (int64_t g = 0; g < groups; ++g) {
            for (int i = 0; i < 2; ++i) __builtin_prefetch(scales[i] + g * PANEL + 1024);
            for (int64_t i = task.first_block; i < task.end_block; ++i) {
                const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
                if (size != configured) configure(configured = size);
                (i == task.first_block ? amx_int8_group<true>
                                       : amx_int8_group<false>)(x, row, size, weight.group, g, weights, scales, groups,
                                                                c + (row - task.row) * ldc + p * PANEL, ldc);
            }
        }
    }
    tile_release();
    write_out_any(job, task, c, ldc);
}

static void linear_amx_int8(const LinearArgs& args) {
    if (args.rows < AMX_INT8_ROWS) return linear_int8(args);
    const Weight& weight = *args.weight;
    const int64_t k = weight.k_padded, groups = k / weight.group, stride = k + 64;
    LinearJob job(args, 0, args.rows, TILE_ROWS, amx_rows_per_task(k));
    uint8_t* bytes = static_cast<uint8_t*>(scratch(SCRATCH_INPUT, args.rows * (2 * stride + 4 * groups)));
    const ByteRows x{bytes, bytes + args.rows * stride, stride,
                     reinterpret_cast<float*>(bytes + 2 * args.rows * stride)};
    over_blocks(job, [&](int64_t i) {
        int16_t* rounded = static_cast<int16_t*>(scratch(SCRATCH_PARTIAL, k * sizeof(int16_t)));
        for (int64_t r = job.blocks.first(i); r < job.blocks.first(i + 1); ++r) {
            with_type(args.x_dtype, [&](auto type) {
                const auto* from = static_cast<const decltype(type)*>(args.x) + r * args.x_stride;
                round_row(from, weight, rounded, 4, x.scales + r * groups);
            });
            for (int64_t j = 0; j < k; ++j) {
                x.high[r * stride + j] = static_cast<uint8_t>(rounded[j] >> 8);
                x.low[r * stride + j] = static_cast<uint8_t>(rounded[j]);
            }
        }
    });
    job.x = &x;
    run_tasks(job, [&](int64_t i) { amx_int8_task(job, i); });
}

}  // namespace TRINE_ISA
}  // namespace trine
