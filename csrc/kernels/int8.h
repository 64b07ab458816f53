// out = x wᵀ + bias for weights of 8-bit integers with a scale for each group of neighbours in k.
//
// x is rounded to 16-bit integers, each group of each row with a scale of its own: next to the weights' rounding its
// own is nothing, and products of 16-bit integers cost AVX2 the same as the detour that products of 8-bit integers take
// there. A group's sum of products is exact, so it does not matter in which order it is taken; the groups' sums are
// added in order of k in float32. A row's result does not depend on what else is in the batch, bit for bit.
//
// Decode is limited by reading the weight, half of bfloat16's bytes and a sixty-fourth for the scales. From some eight
// rows on AVX2 is limited by its integer products, 32 multiply-adds a cycle: twice the rate of float32.
#pragma once

#include "linear.h"

namespace trine {
namespace TRINE_ISA {

constexpr int PANEL_INT_VECTORS = 2 * PANEL_VECTORS;  // sums of pairs of products, two lanes a column
constexpr int MAX_INT_ROWS = W == 8 ? 2 : 6;
constexpr int64_t MAX_GROUP = 512;   // 512 * 127 * 32767 < 2^31
constexpr int64_t QUAD = 4 * PANEL;  // weights of a panel for four neighbours in k
constexpr int64_t INT8_AHEAD = 4096;  // bytes read ahead: one thin stream needs more of them than float weights' two

// x of one pass, rounded: blocks of rows [k / 4][rows of the block][4], and scales [rows][groups].
struct RoundedRows {
    int16_t* values;
    float* scales;
};

// One group of a panel, for a block of R rows: c[R][16] += the group's sums.
template <int R>
static void int8_group(const int16_t* x, const float* x_scales, int64_t groups, const char* weights, const bf16* scales,
                       int64_t quads, float* c, int64_t ldc) {
    constexpr int V = PANEL_INT_VECTORS;
    vi sum[R][V];
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = zeroi();
    UNROLL_2
    for (int64_t q = 0; q < quads; ++q) {
        vi value[R];
        UNROLL
        for (int r = 0; r < R; ++r) value[r] = broadcast64(x + (q * R + r) * 4);
        __builtin_prefetch(weights + q * QUAD + INT8_AHEAD);
        UNROLL
        for (int v = 0; v < V; ++v) {
            const vi w = widen_int8(weights + q * QUAD + v * W * 2);
            UNROLL
            for (int r = 0; r < R; ++r) sum[r][v] = dot_pairs(sum[r][v], w, value[r]);
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
        vi columns[PANEL_VECTORS];
        add_neighbours(sum[r], columns);
        UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            const vf scale = mul(load(scales + v * W), set1(x_scales[r * groups]));
            store(c + r * ldc + v * W, fma(to_float(columns[v]), scale, load(c + r * ldc + v * W)));
        }
    }
}

INLINE void int8_block(int64_t rows, const int16_t* x, const float* x_scales, int64_t groups, const char* weights,
                       const bf16* scales, int64_t quads, float* c, int64_t ldc) {
    using Function = decltype(&int8_group<1>);
    static constexpr Function functions[] = {int8_group<1>, int8_group<2>, int8_group<3>,
                                             int8_group<4>, int8_group<5>, int8_group<6>};
    functions[rows - 1](x, x_scales, groups, weights, scales, quads, c, ldc);
}

static void int8_task(const LinearJob& job, int64_t index) {
    const LinearTask task(job, index);
    const Weight& weight = *job.args->weight;
    const RoundedRows& x = *static_cast<const RoundedRows*>(job.x);
    const int64_t k = weight.k_padded, groups = k / weight.group, quads = weight.group / 4;
    const int64_t ldc = task.weight_panels * PANEL;
    float* c = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, task.rows * ldc * sizeof(float)));
    memset(c, 0, task.rows * ldc * sizeof(float));
    for (int64_t p = 0; p < task.weight_panels; ++p) {
        const int64_t panel = (task.address[p] - weight.data) / weight.panel_bytes;
        for (int64_t g = 0; g < groups; ++g) {
            const char* values = task.address[p] + g * weight.group * PANEL;
            // A stream of its own, too thin for the processor to foresee.
            __builtin_prefetch(weight.scales + ((panel * groups + g) * PANEL + 1024) * sizeof(bf16));
            const bf16* scales = reinterpret_cast<const bf16*>(weight.scales) + (panel * groups + g) * PANEL;
            for (int64_t i = task.first_block; i < task.end_block; ++i) {
                const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
                const int16_t* block = x.values + row * k + g * weight.group * size;
                float* sums = c + (row - task.row) * ldc + p * PANEL;
                int8_block(size, block, x.scales + row * groups + g, groups, values, scales, quads, sums, ldc);
            }
        }
    }
    write_out_any(job, task, c, ldc);
}

// Round one row, `next` values apart for each four of k.
template <class T>
static void round_row(const T* x, const Weight& weight, int16_t* to, int64_t next, float* scales) {
    alignas(64) float group[MAX_GROUP];
    alignas(64) int16_t rounded[MAX_GROUP];
    for (int64_t start = 0; start < weight.k_padded; start += weight.group) {
        vf largest = zero();
        for (int64_t i = 0; i < weight.group; i += W) {
            const int64_t left = weight.k - start - i;
            const vf value = left > 0 ? load_upto(x + start + i, left) : zero();
            largest = vmax(abs(value), largest);
            store(group + i, value);
        }
        const float limit = hmax(largest);
        *scales++ = limit / 32767;
        const vf inverse = set1(limit > 0 ? 32767 / limit : 0);
        for (int64_t i = 0; i < weight.group; i += W) store_int16(rounded + i, to_int(mul(load(group + i), inverse)));
        for (int64_t i = 0; i < weight.group; i += 4, to += next) memcpy(to, rounded + i, 4 * sizeof(int16_t));
    }
}

static void linear_int8(const LinearArgs& args) {
    const Weight& weight = *args.weight;
    const int64_t k = weight.k_padded, groups = k / weight.group;
    for (int64_t first = 0; first < args.rows; first += ROWS_PER_PASS) {
        LinearJob job(args, first, min(ROWS_PER_PASS, args.rows - first), MAX_INT_ROWS, ROWS_PER_TASK);
        const int64_t rows = job.blocks.rows;
        char* memory = static_cast<char*>(scratch(SCRATCH_INPUT, rows * k * 2 + rows * groups * 4));
        RoundedRows x{reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(memory + rows * k * 2)};
        over_blocks(job, [&](int64_t i) {
            const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
            for (int64_t r = 0; r < size; ++r)
                with_type(args.x_dtype, [&](auto type) {
                    const auto* from = static_cast<const decltype(type)*>(args.x) + (first + row + r) * args.x_stride;
                    round_row(from, weight, x.values + row * k + r * 4, size * 4, x.scales + (row + r) * groups);
                });
        });
        job.x = &x;
        run_tasks(job, [&](int64_t i) { int8_task(job, i); });
    }
}

}  // namespace TRINE_ISA
}  // namespace trine
