// out = x wᵀ + bias in float32 arithmetic, for float32, float16 and bfloat16 weights.
//
// Decode (few rows) is limited by reading the weight: each thread streams whole panels, contiguous in memory, and
// prefetches ahead. Prefill (many rows) is limited by multiply-adds: a micro-kernel keeps up to 6 rows x 2 vectors of
// sums in registers and widens the weights as it goes; x is packed in blocks of rows, and a slice of a panel stays in
// the first-level cache while all rows of the task pass over it.
//
// Every sum is made of slices of k, each one chain of fused multiply-adds, added in order: rounding grows with a slice's
// length instead of k's, and alike whatever the number of rows. A row's result does not depend on what else is in the
// batch, bit for bit.
#pragma once

#include "activation.h"
#include "vec.h"

namespace trine {
namespace TRINE_ISA {

constexpr int MAX_ROWS = 6;
constexpr int PANEL_VECTORS = PANEL / W;
constexpr int64_t SLICE_BYTES = 28 * 1024;  // of a panel, in the first-level cache while blocks of rows pass over it
constexpr int64_t NEAR_BYTES = 1024;        // how far a few rows, and
constexpr int64_t AHEAD_BYTES = 28 * 1024;  // more rows than that read ahead; neighbouring panels touch
constexpr int64_t ROWS_PER_TASK = 144;      // whose x takes a part of the second-level cache
constexpr int64_t ROWS_PER_PASS = 576;      // packed at a time
constexpr int64_t MAX_PANELS_PER_TASK = 8;

// A weight type: `step` values of k are loaded at a time, `bytes` of a panel, as `step` sets of PANEL_VECTORS vectors;
// registers suffice for blocks of `max_rows`.
struct Float32Panels {
    static constexpr int step = 1;
    static constexpr int64_t bytes = PANEL * 4;
    static constexpr int max_rows = MAX_ROWS;
    INLINE vf value(const char* p, int, int v) { return load(reinterpret_cast<const float*>(p) + v * W); }
    INLINE vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }
};
struct Float16Panels {
    static constexpr int step = 1;
    static constexpr int64_t bytes = PANEL * 2;
    static constexpr int max_rows = MAX_ROWS;
    INLINE vf value(const char* p, int, int v) { return load(reinterpret_cast<const f16*>(p) + v * W); }
    INLINE vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }
};
struct BFloat16Panels {
    static constexpr int step = 2;
    static constexpr int64_t bytes = PANEL * 4;
    static constexpr int max_rows = W == 8 ? 5 : MAX_ROWS;
    INLINE vf value(const char* p, int s, int v) {
        asm("" : "+r"(p));  // a second load is cheaper than the spill that the compiler would make of the first
        const vi pairs = loadi(p + v * W * 4);
        return s == 0 ? even_bf16(pairs) : odd_bf16(pairs);
    }
    INLINE vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }
};
#if defined(__AVX512BF16__)
// Pairs of bf16 multiplied as they are, x's too: "k" counts pairs, and a pair travels as the bits of one float.
struct BFloat16Pairs {
    static constexpr int step = 1;
    static constexpr int64_t bytes = PANEL * 4;
    static constexpr int max_rows = MAX_ROWS;
    INLINE vf value(const char* p, int, int v) { return as_float(loadi(p + v * W * 4)); }
    INLINE vf multiply_add(vf x, vf w, vf sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// How many panels the micro-kernel takes at once: enough chains of sums to hide the latency of a multiply-add.
constexpr int panels_at_once(int rows) { return (rows <= 3 ? 2 : 1) * (2 / PANEL_VECTORS); }

// How the micro-kernel finds x: row by row, `stride` apart, or packed with the block's rows side by side for each k.
struct ByRow {
    const float* data;
    int64_t stride;
    template <int R>
    INLINE float at(const ByRow& x, int r, int64_t k) {
        return x.data[r * x.stride + k];
    }
};
struct Packed {
    const float* data;
    template <int R>
    INLINE float at(const Packed& x, int r, int64_t k) {
        return x.data[k * R + r];
    }
};

// c[R][P * 16] (+)= x[R][k] b[P][k][16]
template <class X, class B, int R, int P>
INLINE void micro(const X& x, const char* const* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
    constexpr int V = P * PANEL_VECTORS;
    constexpr bool FEW = R <= 3;
    vf sum[R][V];
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = zero();

    for (int64_t i = 0; i < k; i += B::step) {
        const int64_t offset = i / B::step * B::bytes;
        UNROLL
        for (int p = 0; p < P; ++p)
            FEW ? __builtin_prefetch(b[p] + offset + NEAR_BYTES)
                : __builtin_prefetch(b[p] + offset + AHEAD_BYTES, 0, 2);
        UNROLL
        for (int s = 0; s < B::step; ++s) {
            if constexpr (FEW) {
                vf value[R];
                UNROLL
                for (int r = 0; r < R; ++r) value[r] = set1(X::template at<R>(x, r, i + s));
                UNROLL
                for (int v = 0; v < V; ++v) {
                    const vf w = B::value(b[v / PANEL_VECTORS] + offset, s, v % PANEL_VECTORS);
                    UNROLL
                    for (int r = 0; r < R; ++r) sum[r][v] = B::multiply_add(value[r], w, sum[r][v]);
                }
            } else {
                vf w[V];
                UNROLL
                for (int v = 0; v < V; ++v) w[v] = B::value(b[v / PANEL_VECTORS] + offset, s, v % PANEL_VECTORS);
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const vf value = set1(X::template at<R>(x, r, i + s));
                    UNROLL
                    for (int v = 0; v < V; ++v) sum[r][v] = B::multiply_add(value, w[v], sum[r][v]);
                }
            }
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r) UNROLL
    for (int v = 0; v < V; ++v) {
        float* to = c + r * ldc + v * W;
        store(to, accumulate ? add(load(to), sum[r][v]) : sum[r][v]);
    }
}

// The micro-kernel over `panels` neighbouring panels.
template <class X, class B, int R>
static void block_by_panels(const X& x, const char* const* b, int64_t panels, int64_t k, float* c, int64_t ldc,
                            bool accumulate) {
    constexpr int P = panels_at_once(R);
    int64_t p = 0;
    for (; p + P <= panels; p += P) micro<X, B, R, P>(x, b + p, k, c + p * PANEL, ldc, accumulate);
    for (; p < panels; ++p) micro<X, B, R, 1>(x, b + p, k, c + p * PANEL, ldc, accumulate);
}

template <class X, class B>
INLINE void block_of_rows(const X& x, int64_t rows, const char* const* b, int64_t panels, int64_t k, float* c,
                          int64_t ldc, bool accumulate) {
    using Function = decltype(&block_by_panels<X, B, 1>);
    static constexpr Function functions[MAX_ROWS] = {block_by_panels<X, B, 1>, block_by_panels<X, B, 2>,
                                                     block_by_panels<X, B, 3>, block_by_panels<X, B, 4>,
                                                     block_by_panels<X, B, 5>, block_by_panels<X, B, 6>};
    functions[rows - 1](x, b, panels, k, c, ldc, accumulate);
}

// Rows cut into blocks of at most `largest` and of nearly the same size (7 rows are 4 + 3, not 6 + 1).
struct Blocks {
    int64_t rows, count;
    Blocks(int64_t rows, int64_t largest) : rows(rows), count(ceil_div(rows, largest)) {}
    int64_t first(int64_t i) const { return i * (rows / count) + min(i, rows % count); }
};

// `uneven`: 8 rows are 5 + 3, since blocks of 4 have but as many chains of sums as a multiply-add takes cycles.
struct RowBlocks : Blocks {
    bool uneven;
    RowBlocks(int64_t rows, int64_t largest, bool uneven) : Blocks(rows, largest), uneven(uneven && rows == 8) {}
    int64_t first(int64_t i) const { return uneven && i == 1 ? 5 : Blocks::first(i); }
};

// c[rows][panels * 16] (+)= x[rows][k] b, for rows of floats that lie `stride` apart.
template <class B>
static void gemm(const float* x, int64_t stride, int64_t rows, const char* const* b, int64_t panels, int64_t k,
                 float* c, int64_t ldc, bool accumulate) {
    const Blocks blocks(rows, MAX_ROWS);
    for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t row = blocks.first(i), size = blocks.first(i + 1) - row;
        block_of_rows<ByRow, B>({x + row * stride, stride}, size, b, panels, k, c + row * ldc, ldc, accumulate);
    }
}

// What one call of linear() shares between its tasks: a pass over some rows. A task is a range of the rows' blocks x a
// range of the output's panels; tasks that share rows follow one another.
struct LinearJob {
    const LinearArgs* args;
    int64_t first_row;
    RowBlocks blocks;
    const void* x;  // the rows in the form that the kernel reads
    int64_t blocks_per_task, row_tasks;
    int64_t out_panels, panels_per_task, panel_tasks;

    LinearJob(const LinearArgs& args, int64_t first_row, int64_t rows, int64_t largest_block, int64_t rows_per_task,
              bool uneven = false)
        : args(&args), first_row(first_row), blocks(rows, largest_block, uneven), x(nullptr) {
        out_panels = args.silu_mul ? args.weight->panels / 2 : args.weight->panels;
        blocks_per_task = ceil_div(blocks.count, ceil_div(rows, rows_per_task));
        row_tasks = ceil_div(blocks.count, blocks_per_task);
        // Some six tasks a thread, so that a thread that falls behind is helped, but long runs of memory.
        const int64_t wanted = out_panels * row_tasks / (num_threads() * 6);
        panels_per_task = max<int64_t>(2, min(MAX_PANELS_PER_TASK, wanted)) / 2 * 2;
        panel_tasks = ceil_div(out_panels, panels_per_task);
    }
};

struct LinearTask {
    int64_t first_block, end_block, row, rows;  // rows count from the pass's first
    int64_t panel, panels;                      // of the output
    int64_t weight_panels;
    const char* address[2 * MAX_PANELS_PER_TASK];  // of the output's panels, then of those of the second half

    LinearTask(const LinearJob& job, int64_t index) {
        const Weight& weight = *job.args->weight;
        first_block = index / job.panel_tasks * job.blocks_per_task;
        end_block = min(first_block + job.blocks_per_task, job.blocks.count);
        row = job.blocks.first(first_block);
        rows = job.blocks.first(end_block) - row;
        panel = index % job.panel_tasks * job.panels_per_task;
        panels = min(job.panels_per_task, job.out_panels - panel);
        weight_panels = 0;
        for (int64_t half = 0; half < (job.args->silu_mul ? 2 : 1); ++half)
            for (int64_t p = 0; p < panels; ++p)
                address[weight_panels++] = weight.data + (half * job.out_panels + panel + p) * weight.panel_bytes;
    }
};

// Bias, activation and rounding of a task's sums c [rows][ldc]; with silu_mul the columns from ldc / 2 on are "up".
template <class X, class Out>
static void write_out(const LinearJob& job, const LinearTask& task, const float* c, int64_t ldc) {
    const LinearArgs& args = *job.args;
    const int64_t columns = args.silu_mul ? args.weight->n / 2 : args.weight->n;
    const X* bias = static_cast<const X*>(args.bias);
    const int64_t first = task.panel * PANEL;
    const int64_t count = min(task.panels * PANEL, columns - first);
    for (int64_t r = 0; r < task.rows; ++r) {
        const int64_t row = job.first_row + task.row + r;
        Out* out = static_cast<Out*>(args.out) + row * (args.out_stride ? args.out_stride : columns) + first;
        const X* residual = static_cast<const X*>(args.residual) + row * args.residual_stride + first;
        const float* sums = c + r * ldc;
        for (int64_t i = 0; i < count; i += W) {
            vf y = load(sums + i);
            if (bias) y = add(y, load_upto(bias + first + i, count - i));
            if (args.silu_mul) {
                vf up = load(sums + ldc / 2 + i);
                if (bias) up = add(up, load_upto(bias + columns + first + i, count - i));
                y = mul(silu(y), up);
            }
            if (args.residual) y = add(y, load_upto(residual + i, count - i));
            y = activate(y, args.activation);
            store_upto(out + i, y, count - i);
        }
    }
}

INLINE void write_out_any(const LinearJob& job, const LinearTask& task, const float* c, int64_t ldc) {
    with_type(job.args->x_dtype, [&](auto x) {
        with_type(job.args->out_dtype, [&](auto out) { write_out<decltype(x), decltype(out)>(job, task, c, ldc); });
    });
}

// task(index) for all tasks, on all threads if there is enough to do.
template <class Task>
INLINE void run_tasks(const LinearJob& job, const Task& task) {
    const int64_t tasks = job.row_tasks * job.panel_tasks;
    if (job.blocks.rows * job.args->weight->k_padded * job.args->weight->n < SERIAL_WORK)
        for (int64_t i = 0; i < tasks; ++i) task(i);
    else
        parallel(tasks, task);
}

// prepare(index) for all blocks of rows, on all threads if there is enough to do.
template <class Prepare>
INLINE void over_blocks(const LinearJob& job, const Prepare& prepare) {
    if (job.blocks.rows * job.args->weight->k > 128 * 1024)
        parallel(job.blocks.count, prepare);
    else
        for (int64_t i = 0; i < job.blocks.count; ++i) prepare(i);
}

template <class B>
static void float_task(const LinearJob& job, int64_t index) {
    const LinearTask task(job, index);
    const int64_t k = job.args->weight->panel_bytes / B::bytes * B::step;
    const int64_t ldc = task.weight_panels * PANEL;
    float* c = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, task.rows * ldc * sizeof(float)));
    const float* x = static_cast<const float*>(job.x);
    const int64_t depth = SLICE_BYTES / B::bytes * B::step;
    const int64_t together = panels_at_once(job.blocks.uneven ? 3 : task.rows);
    for (int64_t p = 0; p < task.weight_panels; p += together) {
        for (int64_t start = 0; start < k; start += depth) {
            const char* b[2 * MAX_PANELS_PER_TASK];
            const int64_t panels = min(together, task.weight_panels - p);
            for (int64_t i = 0; i < panels; ++i) b[i] = task.address[p + i] + start / B::step * B::bytes;
            for (int64_t i = task.first_block; i < task.end_block; ++i) {
                const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
                block_of_rows<Packed, B>({x + row * k + start * size}, size, b, panels, min(depth, k - start),
                                         c + (row - task.row) * ldc + p * PANEL, ldc, start > 0);
            }
        }
    }
    write_out_any(job, task, c, ldc);
}

// A block of rows of x as floats, side by side for each k, padded with zeros to k_padded. Stores of eight run over into
// what the next k writes; the last group goes through a buffer, since the next block may be another thread's.
template <class T>
static void pack_block(const T* x, int64_t stride, int64_t rows, int64_t k, int64_t k_padded, float* to) {
    alignas(64) float last[8 * 8];
    for (int64_t i = 0; i < k_padded; i += 8) {
        __m256 r[8];
        UNROLL
        for (int64_t j = 0; j < 8; ++j) r[j] = j < rows ? load8(x + j * stride + i, k - i) : _mm256_setzero_ps();
        transpose8(r);
        float* group = i + 8 < k_padded ? to + i * rows : last;
        UNROLL
        for (int64_t j = 0; j < 8; ++j) _mm256_storeu_ps(group + j * rows, r[j]);
    }
    memcpy(to + (k_padded - 8) * rows, last, 8 * rows * sizeof(float));
}

static void pack_rows(const LinearJob& job, float* to) {
    const LinearArgs& args = *job.args;
    const int64_t k = args.weight->k, k_padded = args.weight->k_padded;
    over_blocks(job, [&](int64_t i) {
        const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
        with_type(args.x_dtype, [&](auto type) {
            const auto* x = static_cast<const decltype(type)*>(args.x) + (job.first_row + row) * args.x_stride;
            pack_block(x, args.x_stride, size, k, k_padded, to + row * k_padded);
        });
    });
}

template <class B>
static void linear_of(const LinearArgs& args) {
    const int64_t k = args.weight->k_padded;
    for (int64_t row = 0; row < args.rows; row += ROWS_PER_PASS) {
        constexpr bool uneven = W == 8 && B::bytes == Float32Panels::bytes && B::step == 1;
        LinearJob job(args, row, min(ROWS_PER_PASS, args.rows - row), B::max_rows, ROWS_PER_TASK, uneven);
        float* x = static_cast<float*>(scratch(SCRATCH_INPUT, job.blocks.rows * k * sizeof(float)));
        pack_rows(job, x);
        job.x = x;
        run_tasks(job, [&](int64_t i) { float_task<B>(job, i); });
    }
}

struct Bf16Rows {
    const bf16* data;
    int64_t stride;
};

// Rows of x as bf16, `stride` apart and k_padded long: x itself if it is that already. Rows a multiple of 4 KiB apart
// would fall into one set of the cache, so they are copied as well, as are those an odd number of elements apart.
static Bf16Rows bf16_rows(const LinearArgs& args) {
    const int64_t k = args.weight->k, k_padded = args.weight->k_padded;
    const bf16* own = static_cast<const bf16*>(args.x);
    const bool apart = args.rows == 1 || (args.x_stride % 2048 && args.x_stride % 2 == 0);
    if (args.x_dtype == BF16 && k == k_padded && apart) return {own, args.x_stride};
    const int64_t stride = k_padded + 32;
    bf16* to = static_cast<bf16*>(scratch(SCRATCH_INPUT, args.rows * stride * sizeof(bf16)));
    with_type(args.x_dtype, [&](auto type) {
        const auto one = [&](int64_t r) {
            const auto* x = static_cast<const decltype(type)*>(args.x) + r * args.x_stride;
            for (int64_t i = 0; i < k_padded; i += W)
                store(to + r * stride + i, i < k ? load_upto(x + i, k - i) : zero());
        };
        if (args.rows * k > 128 * 1024)
            parallel(args.rows, one);
        else
            for (int64_t r = 0; r < args.rows; ++r) one(r);
    });
    return {to, stride};
}

#if defined(__AVX512BF16__)
static void linear_pairs(const LinearArgs& args) {
    const Bf16Rows rows = bf16_rows(args);
    const int64_t k = args.weight->k_padded / 2;
    for (int64_t first = 0; first < args.rows; first += ROWS_PER_PASS) {
        LinearJob job(args, first, min(ROWS_PER_PASS, args.rows - first), BFloat16Pairs::max_rows, ROWS_PER_TASK);
        float* x = static_cast<float*>(scratch(SCRATCH_PARTIAL, job.blocks.rows * k * sizeof(float)));
        over_blocks(job, [&](int64_t i) {
            const int64_t row = job.blocks.first(i), size = job.blocks.first(i + 1) - row;
            const float* from = reinterpret_cast<const float*>(rows.data + (first + row) * rows.stride);
            pack_block(from, rows.stride / 2, size, k, k, x + row * k);
        });
        job.x = x;
        run_tasks(job, [&](int64_t i) { float_task<BFloat16Pairs>(job, i); });
    }
}
#endif

static void linear_float(const LinearArgs& args) {
    if (args.weight->dtype == F32)
        linear_of<Float32Panels>(args);
    else if (args.weight->dtype == F16)
        linear_of<Float16Panels>(args);
    else
#if defined(__AVX512BF16__)
        linear_pairs(args);
#else
        linear_of<BFloat16Panels>(args);
#endif
}

}  // namespace TRINE_ISA
}  // namespace trine
