// Products of two computed matrices, and attention on top of them. The second operand is cut into panels of 16 columns
// as packed weights are (linear.h), a task's own part at a time.
#pragma once

#include "linear.h"

namespace trine {
namespace TRINE_ISA {

// Panels of b [k][n]: to[n / 16][k][16], with zeros where n ends. Element (i, j) lies at i * rows + j * columns.
static void pack_panels(const float* b, int64_t k, int64_t n, int64_t rows, int64_t columns, float* to) {
    for (int64_t p = 0; p < n; p += PANEL, to += k * PANEL) {
        const int64_t width = min(PANEL, n - p);
        const float* from = b + p * columns;
        if (columns == 1) {
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < PANEL; j += W)
                    store(to + i * PANEL + j, j < width ? load_upto(from + i * rows + j, width - j) : zero());
        } else if (rows == 1) {
            for (int64_t j = 0; j < PANEL; j += 8)
                for (int64_t i = 0; i < k; i += 8) {
                    __m256 r[8];
                    for (int64_t l = 0; l < 8; ++l)
                        r[l] = j + l < width ? load8(from + (j + l) * columns + i, k - i) : _mm256_setzero_ps();
                    transpose8(r);
                    for (int64_t l = 0; l < min<int64_t>(8, k - i); ++l)
                        _mm256_storeu_ps(to + (i + l) * PANEL + j, r[l]);
                }
        } else {
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < PANEL; ++j)
                    to[i * PANEL + j] = j < width ? from[i * rows + j * columns] : 0.0f;
        }
    }
}

// c[rows][n rounded up to 16] (+)= a[rows][k] by panels: few panels at a time, so that they stay in the first-level
// cache while all rows pass over them.
static void by_panels(const float* a, int64_t stride, int64_t rows, const float* panels, int64_t n, int64_t k, float* c,
                      int64_t ldc, bool accumulate) {
    constexpr int64_t together = 2 / PANEL_VECTORS;
    const int64_t count = ceil_div(n, PANEL);
    for (int64_t p = 0; p < count; p += together) {
        const int64_t own = min(together, count - p);
        const char* address[together];
        for (int64_t i = 0; i < own; ++i) address[i] = reinterpret_cast<const char*>(panels + (p + i) * k * PANEL);
        gemm<Float32Panels>(a, stride, rows, address, own, k, c + p * PANEL, ldc, accumulate);
    }
}

constexpr int MATMUL_DIMS = 4;

struct MatmulArgs {
    const float* a;  // [batch…, m, k]: rows a_row apart, k side by side
    const float* b;  // [batch…, k, n]: element (i, j) at i * b_row + j * b_column
    float* y;        // [batch…, m, n], contiguous
    int64_t shape[MATMUL_DIMS], a_strides[MATMUL_DIMS], b_strides[MATMUL_DIMS];  // of the batch
    int64_t m, n, k, a_row, b_row, b_column;
};

static void matmul(const MatmulArgs& args) {
    constexpr int64_t rows_a_task = 144, columns_a_task = 8 * PANEL, depth = 512;
    int64_t batch = 1;
    for (int d = 0; d < MATMUL_DIMS; ++d) batch *= args.shape[d];
    const int64_t row_tasks = ceil_div(args.m, rows_a_task), column_tasks = ceil_div(args.n, columns_a_task);
    const auto one = [&](int64_t task) {
        const int64_t first = task % column_tasks * columns_a_task, n = min(columns_a_task, args.n - first);
        const int64_t row = task / column_tasks % row_tasks * rows_a_task, m = min(rows_a_task, args.m - row);
        const int64_t item = task / column_tasks / row_tasks;
        int64_t rest = item;
        const float *a = args.a + row * args.a_row, *b = args.b + first * args.b_column;
        for (int d = MATMUL_DIMS - 1; d >= 0; --d) {
            a += rest % args.shape[d] * args.a_strides[d];
            b += rest % args.shape[d] * args.b_strides[d];
            rest /= args.shape[d];
        }
        const int64_t ldc = round_up(n, PANEL);
        float* c = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, m * ldc * sizeof(float)));
        float* panels = static_cast<float*>(scratch(SCRATCH_INPUT, min(depth, args.k) * ldc * sizeof(float)));
        if (args.k == 0) memset(c, 0, m * ldc * sizeof(float));
        for (int64_t start = 0; start < args.k; start += depth) {
            const int64_t k = min(depth, args.k - start);
            pack_panels(b + start * args.b_row, k, n, args.b_row, args.b_column, panels);
            by_panels(a + start, args.a_row, m, panels, n, k, c, ldc, start > 0);
        }
        float* y = args.y + (item * args.m + row) * args.n + first;
        for (int64_t r = 0; r < m; ++r) memcpy(y + r * args.n, c + r * ldc, n * sizeof(float));
    };
    const int64_t tasks = batch * row_tasks * column_tasks;
    if (batch * args.m * args.n * max<int64_t>(1, args.k) < SERIAL_WORK)
        for (int64_t i = 0; i < tasks; ++i) one(i);
    else
        parallel(tasks, one);
}

// softmax(q kᵀ scale + mask) v. Strides are those of [batch, heads, rows, columns], in elements; 0 where broadcast.
struct GraphAttentionArgs {
    const float *q, *k, *v, *mask;  // mask: null, or broadcast to [batch, heads, queries, keys]
    float* y;                       // bf16_attention: q, k and v are bf16, y is of y_dtype
    int64_t q_strides[4], k_strides[4], v_strides[4], mask_strides[4], y_strides[4];
    int64_t batch, heads, queries, keys, size, v_size;
    float scale;
    int32_t guarded;  // 1: a row whose mask hides every key gives zeros, not NaN
    DType y_dtype;    // F32; bf16_attention: or BF16
};

// Scores to weights in place, `ldc` apart; what each row's weights must be divided by goes to `total`.
static void attention_weights(const GraphAttentionArgs& args, const float* mask, int64_t rows, float* scores,
                              int64_t ldc, float* total) {
    const int64_t keys = args.keys, step = args.mask_strides[3];
    const vf scale = set1(args.scale);
    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * ldc;
        vf most = set1(-__builtin_inff());
        const float* bias = mask ? mask + r * args.mask_strides[2] : nullptr;
        for (int64_t i = 0; i < keys; i += W) {
            vf s = mul(load(row + i), scale);
            if (bias) s = add(s, step ? load_upto(bias + i, keys - i) : set1(*bias));
            store(row + i, s);
            most = vmax(first_n(s, most, keys - i), most);
        }
        const vf largest = set1(hmax(most));
        if (hmax(most) == -__builtin_inff()) {  // every key is hidden
            memset(row, 0, keys * sizeof(float));
            total[r] = 0;
            continue;
        }
        vf sum = zero();
        for (int64_t i = 0; i < keys; i += W) {
            const vf e = first_n(exp(sub(load(row + i), largest)), zero(), keys - i);
            store(row + i, e);
            sum = add(sum, e);
        }
        total[r] = hsum(sum);
    }
}

// The scores of a task's queries are whole, in the second-level cache: memory grows with the keys, not their square.
static void graph_attention(const GraphAttentionArgs& args) {
    const int64_t keys = args.keys, ldc = round_up(keys, PANEL), wide = round_up(args.v_size, PANEL);
    const int64_t pairs = args.batch * args.heads;
    int64_t rows = max<int64_t>(MAX_ROWS, min(args.queries, 48 * 1024 / max<int64_t>(1, ldc)) / MAX_ROWS * MAX_ROWS);
    while (rows > 4 * MAX_ROWS && pairs * ceil_div(args.queries, rows) < 2 * num_threads())
        rows = round_up(rows / 2, MAX_ROWS);
    if (args.queries <= rows + MAX_ROWS) rows = args.queries;
    const int64_t blocks = ceil_div(args.queries, max<int64_t>(1, rows));
    const auto one = [&](int64_t task) {
        const int64_t b = task / blocks / args.heads, h = task / blocks % args.heads;
        const int64_t first = task % blocks * rows, count = min(rows, args.queries - first);
        const auto at = [&](const float* x, const int64_t* s, int64_t row) { return x + b * s[0] + h * s[1] + row * s[2]; };
        const int64_t panels = ldc * args.size + 64, values = wide * keys + 64, scores = count * ldc + 64;
        float* k = static_cast<float*>(
            scratch(SCRATCH_ATTENTION, (panels + values + scores + count * wide + count) * sizeof(float)));
        float *v = k + panels, *s = v + values, *c = s + scores, *total = c + count * wide;
        pack_panels(at(args.k, args.k_strides, 0), args.size, keys, args.k_strides[3], args.k_strides[2], k);
        pack_panels(at(args.v, args.v_strides, 0), keys, args.v_size, args.v_strides[2], args.v_strides[3], v);
        by_panels(at(args.q, args.q_strides, first), args.q_strides[2], count, k, keys, args.size, s, ldc, false);
        const float* mask = args.mask ? at(args.mask, args.mask_strides, first) : nullptr;
        attention_weights(args, mask, count, s, ldc, total);
        by_panels(s, ldc, count, v, args.v_size, keys, c, wide, false);
        float* y = args.y + b * args.y_strides[0] + h * args.y_strides[1] + first * args.y_strides[2];
        for (int64_t r = 0; r < count; ++r) {
            const vf inverse = set1(args.guarded && total[r] == 0 ? 0.0f : 1.0f / total[r]);
            for (int64_t i = 0; i < args.v_size; i += W)
                store_upto(y + r * args.y_strides[2] + i, mul(load(c + r * wide + i), inverse), args.v_size - i);
        }
    };
    if (pairs * args.queries * keys * (args.size + args.v_size) < SERIAL_WORK)
        for (int64_t i = 0; i < pairs * blocks; ++i) one(i);
    else
        parallel(pairs * blocks, one);
}

}  // namespace TRINE_ISA
}  // namespace trine
