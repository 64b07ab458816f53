// Causal attention over the paged cache: decode, prefill and chunked prefill in one kernel.
//
// A task is a block of queries of one sequence that share a key-value head (all query heads of the group, so that keys
// and values are read once for them): up to ROWS rows of queries. It walks over the context in tiles of 64 positions:
//   keys are transposed and values widened to float32 panels of 16 columns, once per tile;
//   scores = queries x keysᵀ and sums += probabilities x values run on the micro-kernel of linear.h;
//   the softmax is the online one of Milakov and Gimelshein (2018), as in FlashAttention (Dao et al. 2022).
//
// The order of operations depends on positions alone: tiles and segments begin at multiples of their size, and what is
// masked changes nothing. So a row's result is the same, bit for bit, whatever chunk or batch it is computed in. Every
// segment of 512 positions has its own softmax, merged in order; decode over a long context computes them in parallel.
//
// Decode is limited by reading the cache once; prefill by multiply-adds, of which the diagonal tiles waste a part.
#pragma once

#include "linear.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t TILE = 64;
constexpr int64_t SEGMENT = 512;
constexpr int64_t ROWS = 96;

// Eight neighbours in d of eight rows, as floats with rows side by side: to[d * PANEL + row].
INLINE void transpose_floats(__m256 (&r)[8], float* to) {
    transpose8(r);
    UNROLL
    for (int d = 0; d < 8; ++d) _mm256_storeu_ps(to + d * PANEL, r[d]);
}
INLINE int64_t transpose_step(const float* const* rows, int64_t d, float* to) {
    __m256 r[8];
    UNROLL
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows[i] + d);
    transpose_floats(r, to);
    return 8;
}
INLINE int64_t transpose_step(const f16* const* rows, int64_t d, float* to) {
    __m256 r[8];
    UNROLL
    for (int i = 0; i < 8; ++i) r[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(rows[i] + d)));
    transpose_floats(r, to);
    return 8;
}
// Sixteen at a time: pairs travel as one 32-bit element and are widened on the way out.
INLINE int64_t transpose_step(const bf16* const* rows, int64_t d, float* to) {
    __m256 r[8];
    UNROLL
    for (int i = 0; i < 8; ++i) r[i] = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)(rows[i] + d)));
    transpose8(r);
    UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i pairs = _mm256_castps_si256(r[i]);
        _mm256_storeu_si256((__m256i*)(to + 2 * i * PANEL), _mm256_slli_epi32(pairs, 16));
        _mm256_storeu_si256((__m256i*)(to + (2 * i + 1) * PANEL),
                            _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
    }
    return 16;
}

template <class T>
INLINE float to_scalar(const T* p) {
    alignas(64) float x[W];
    store(x, load_first(p, 1));
    return x[0];
}

// keys[TILE / 16][head_dim][16] from one pointer per position.
template <class T>
static void transpose_keys(const T* const* rows, int64_t positions, int64_t head_dim, float* keys) {
    constexpr int64_t step = sizeof(T) == 2 ? 16 : 8;
    for (int64_t p = 0; p < positions; p += 8) {
        float* to = keys + p / PANEL * PANEL * head_dim + p % PANEL;
        int64_t d = 0;
        while (d + step <= head_dim) d += transpose_step(rows + p, d, to + d * PANEL);
        for (; d < head_dim; ++d)
            for (int64_t i = 0; i < 8; ++i) to[d * PANEL + i] = to_scalar(rows[p + i] + d);
    }
}

// values[padded head_dim / 16][TILE][16].
template <class T>
static void widen_values(const T* const* rows, int64_t positions, int64_t head_dim, float* values) {
    for (int64_t d = 0; d < head_dim; d += W) {
        float* to = values + d / PANEL * PANEL * TILE + d % PANEL;
        for (int64_t p = 0; p < positions; ++p) store(to + p * PANEL, load_upto(rows[p] + d, head_dim - d));
    }
}

// The running softmax of up to `capacity` rows: the largest score, the sum of weights, the weighted sum of values.
struct Softmax {
    float *largest, *total, *sums;  // [rows], [rows], [rows][width]
};

struct AttentionTask {
    int32_t sequence, first_token, tokens, kv_head;
    int32_t segment;  // this one alone, its result going to `partial`; or -1: all, the result going to the output
    int32_t row_count;
    float* partial;  // Softmax of row_count rows in one piece
};

struct Workspace {
    float *queries, *keys, *values, *scores;
    Softmax segment, whole;
    const void* key_rows[TILE];
    const void* value_rows[TILE];
};

INLINE int64_t padded_head(const AttentionArgs& args) { return round_up(args.head_dim, PANEL); }
INLINE int64_t row_capacity(const AttentionArgs& args) { return max(ROWS, args.heads / args.kv_heads); }

INLINE Softmax softmax_at(float* memory, int64_t rows, int64_t width) {
    return {memory, memory + rows, memory + 2 * round_up(rows, 8)};
}
INLINE int64_t softmax_floats(int64_t rows, int64_t width) { return 2 * round_up(rows, 8) + rows * width; }

INLINE void lay_out(Workspace& w, const AttentionArgs& args) {
    const int64_t rows = row_capacity(args), width = padded_head(args), state = softmax_floats(rows, width);
    const int64_t floats = rows * width + 2 * TILE * width + rows * TILE + 2 * state;
    float* p = static_cast<float*>(scratch(SCRATCH_ATTENTION, floats * sizeof(float)));
    w.queries = p;
    w.keys = w.queries + rows * width;
    w.values = w.keys + TILE * width;
    w.scores = w.values + TILE * width;
    w.segment = softmax_at(w.scores + rows * TILE, rows, width);
    w.whole = softmax_at(w.scores + rows * TILE + state, rows, width);
}

INLINE void clear(Softmax& s, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) s.largest[r] = -__builtin_inff(), s.total[r] = 0;
    memset(s.sums, 0, rows * width * sizeof(float));
}

INLINE float exp2_scalar(float x) { return first_lane(exp2(set1(x))); }

// whole = whole and part together. A part in which a row saw nothing leaves that row as it was.
INLINE void merge(Softmax& whole, const Softmax& part, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        if (part.total[r] == 0) continue;
        const float largest = max(whole.largest[r], part.largest[r]);
        const float a = whole.total[r] == 0 ? 0 : exp2_scalar(whole.largest[r] - largest);
        const float b = exp2_scalar(part.largest[r] - largest);
        whole.largest[r] = largest;
        whole.total[r] = whole.total[r] * a + part.total[r] * b;
        for (int64_t d = 0; d < width; d += W) {
            float* sum = whole.sums + r * width + d;
            store(sum, fma(load(sum), set1(a), mul(load(part.sums + r * width + d), set1(b))));
        }
    }
}

// Read one tile of keys and values; positions from `length` on count as zeros, whatever the memory there holds.
template <class Cache>
static void load_tile(const AttentionArgs& args, const AttentionTask& task, int64_t start, int64_t length,
                      Workspace& w) {
    alignas(64) static constexpr Cache nothing[1024] = {};
    const int64_t positions = min(TILE, round_up(length - start, PANEL));
    const int32_t* blocks = args.block_table + task.sequence * args.block_table_stride;
    const Cache** keys = reinterpret_cast<const Cache**>(w.key_rows);
    const Cache** values = reinterpret_cast<const Cache**>(w.value_rows);
    int64_t block = start / args.block_size, offset = start % args.block_size;
    for (int64_t p = 0; p < positions; ++p) {
        keys[p] = values[p] = nothing;
        if (start + p >= length) continue;
        const int64_t at = ((blocks[block] * args.kv_heads + task.kv_head) * args.block_size + offset) * args.head_dim;
        keys[p] = static_cast<const Cache*>(args.k_cache) + at;
        values[p] = static_cast<const Cache*>(args.v_cache) + at;
        if (++offset == args.block_size) offset = 0, ++block;
    }
    transpose_keys(keys, positions, args.head_dim, w.keys);
    widen_values(values, positions, args.head_dim, w.values);
}

// One row of a tile: mask, update the running softmax, leave the weights in place of the scores. The row sees the
// tile's positions [from, to).
INLINE void softmax_row(float* scores, int64_t positions, int64_t from, int64_t to, Softmax& state, int64_t r,
                        int64_t width) {
    if (from >= to) {
        for (int64_t i = 0; i < positions; i += W) store(scores + i, zero());
        return;
    }
    const vf hidden = set1(-__builtin_inff());
    vf largest = hidden;
    for (int64_t i = 0; i < positions; i += W) {
        vf s = load(scores + i);
        if (to < i + W) s = first_n(s, hidden, to - i);
        if (from > i) s = first_n(hidden, s, from - i);
        store(scores + i, s);
        largest = vmax(s, largest);
    }
    const float before = state.largest[r];
    const float now = max(before, hmax(largest));
    vf total = zero();
    for (int64_t i = 0; i < positions; i += W) {
        const vf p = exp2(sub(load(scores + i), set1(now)));
        store(scores + i, p);
        total = add(total, p);
    }
    if (now > before) {
        const float correction = exp2_scalar(before - now);
        state.largest[r] = now;
        state.total[r] *= correction;
        float* sums = state.sums + r * width;
        for (int64_t d = 0; d < width; d += W) store(sums + d, mul(load(sums + d), set1(correction)));
    }
    state.total[r] += hsum(total);
}

template <class Cache>
static void attend_tile(const AttentionArgs& args, const AttentionTask& task, int64_t start, Workspace& w) {
    const int64_t group = args.heads / args.kv_heads, width = padded_head(args);
    const int64_t length = args.seq_lens[task.sequence];
    // Position of the task's first query; the last query sees nothing past its own position.
    const int64_t first = length - (args.query_start[task.sequence + 1] - task.first_token);
    load_tile<Cache>(args, task, start, min(length, first + task.tokens), w);

    // Rows whose position comes before the tile see nothing of it.
    const int64_t skipped = max<int64_t>(0, start - first) * group;
    const int64_t rows = task.row_count - skipped;
    const int64_t positions = min(TILE, round_up(first + task.tokens - start, PANEL));
    float* scores = w.scores + skipped * TILE;
    const char *key_panels[TILE / PANEL], *value_panels[64];
    for (int64_t p = 0; p < positions / PANEL; ++p)
        key_panels[p] = reinterpret_cast<const char*>(w.keys + p * PANEL * args.head_dim);
    for (int64_t p = 0; p < width / PANEL; ++p)
        value_panels[p] = reinterpret_cast<const char*>(w.values + p * PANEL * TILE);

    gemm<Float32Panels>(w.queries + skipped * width, width, rows, key_panels, positions / PANEL, args.head_dim, scores,
                        TILE, false);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t position = first + (skipped + r) / group;
        const int64_t from = args.window ? position - args.window + 1 - start : 0;
        softmax_row(scores + r * TILE, positions, from, min(positions, position + 1 - start), w.segment, skipped + r,
                    width);
    }
    gemm<Float32Panels>(scores, TILE, rows, value_panels, width / PANEL, positions, w.segment.sums + skipped * width,
                        width, true);
}

// Queries of the task as rows [token][head of the group], scaled for a softmax in powers of two.
template <class T>
static void load_queries(const AttentionArgs& args, const AttentionTask& task, float* to) {
    const int64_t group = args.heads / args.kv_heads, width = padded_head(args);
    const vf scale = set1(args.scale * 1.44269504f);
    for (int64_t r = 0; r < task.row_count; ++r, to += width) {
        const int64_t head = (task.first_token + r / group) * args.heads + task.kv_head * group + r % group;
        const T* q = static_cast<const T*>(args.q) + head * args.head_dim;
        for (int64_t d = 0; d < args.head_dim; d += W) store(to + d, mul(load_upto(q + d, args.head_dim - d), scale));
    }
}

template <class T>
static void write_rows(const AttentionArgs& args, const AttentionTask& task, const Softmax& result) {
    const int64_t group = args.heads / args.kv_heads, width = padded_head(args);
    for (int64_t r = 0; r < task.row_count; ++r) {
        const int64_t head = (task.first_token + r / group) * args.heads + task.kv_head * group + r % group;
        T* out = static_cast<T*>(args.out) + head * args.head_dim;
        const vf scale = set1(1.0f / result.total[r]);
        for (int64_t d = 0; d < args.head_dim; d += W)
            store_upto(out + d, mul(load(result.sums + r * width + d), scale), args.head_dim - d);
    }
}

template <class T, class Cache>
static void attention_task(const AttentionArgs& args, const AttentionTask& task) {
    Workspace w;
    lay_out(w, args);
    const int64_t width = padded_head(args), length = args.seq_lens[task.sequence];
    const int64_t first = length - (args.query_start[task.sequence + 1] - task.first_token);
    int64_t begin = args.window ? max<int64_t>(0, first - args.window + 1) / TILE * TILE : 0;
    int64_t end = first + task.tokens;
    if (task.segment >= 0) {
        begin = max(begin, task.segment * SEGMENT);
        end = min(end, (task.segment + 1) * SEGMENT);
        w.segment = softmax_at(task.partial, task.row_count, width);
    }
    load_queries<T>(args, task, w.queries);
    clear(w.segment, task.row_count, width);
    clear(w.whole, task.row_count, width);
    for (int64_t start = begin; start < end; start += TILE) {
        attend_tile<Cache>(args, task, start, w);
        const bool segment_ends = (start + TILE) % SEGMENT == 0 || start + TILE >= end;
        if (task.segment < 0 && segment_ends) {
            merge(w.whole, w.segment, task.row_count, width);
            clear(w.segment, task.row_count, width);
        }
    }
    if (task.segment < 0) write_rows<T>(args, task, w.whole);
}

// All tasks of a call. Decodes over several segments are split into them when there are few tasks otherwise.
struct AttentionPlan {
    AttentionTask* tasks;
    int64_t count = 0, partial_floats = 0, work = 0;
    bool split;

    INLINE int64_t segments(const AttentionArgs& args, int64_t s) { return ceil_div(args.seq_lens[s], SEGMENT); }

    // With tasks == nullptr only counts.
    void add(const AttentionArgs& args, int64_t s, float* partials) {
        const int64_t group = args.heads / args.kv_heads, width = padded_head(args);
        const int32_t start = args.query_start[s], end = args.query_start[s + 1];
        const int64_t step = max<int64_t>(1, ROWS / group);
        const bool split_this = split && end - start == 1 && segments(args, s) > 1;
        work += (end - start) * args.heads * args.head_dim * args.seq_lens[s];
        // The last queries, which see most, first.
        for (int64_t block = ceil_div(end - start, step) - 1; block >= 0; --block)
            for (int64_t head = 0; head < args.kv_heads; ++head)
                for (int64_t part = 0; part < (split_this ? segments(args, s) : 1); ++part) {
                    const int64_t first = start + block * step, tokens = min<int64_t>(step, end - first);
                    if (tasks)
                        tasks[count] = {int32_t(s),
                                        int32_t(first),
                                        int32_t(tokens),
                                        int32_t(head),
                                        split_this ? int32_t(part) : -1,
                                        int32_t(tokens * group),
                                        partials ? partials + partial_floats : nullptr};
                    ++count;
                    if (split_this) partial_floats += round_up(softmax_floats(group, width), 16);
                }
    }
};

// The segments of a split decode follow one another in the list of tasks: merge them and write the row.
template <class T>
static void join_segments(const AttentionArgs& args, const AttentionPlan& plan) {
    const int64_t group = args.heads / args.kv_heads, width = padded_head(args);
    Workspace w;
    lay_out(w, args);
    for (int64_t i = 0; i < plan.count; ++i) {
        const AttentionTask& task = plan.tasks[i];
        if (task.segment < 0) continue;
        if (task.segment == 0) clear(w.whole, group, width);
        merge(w.whole, softmax_at(task.partial, group, width), group, width);
        const bool last = i + 1 == plan.count || plan.tasks[i + 1].segment <= 0;
        if (last) write_rows<T>(args, task, w.whole);
    }
}

static void attention(const AttentionArgs& args) {
    AttentionPlan counted{nullptr};
    counted.split = false;
    for (int64_t s = 0; s < args.sequences; ++s) counted.add(args, s, nullptr);
    const bool split = counted.count < 4 * num_threads();
    counted = AttentionPlan{nullptr};
    counted.split = split;
    for (int64_t s = 0; s < args.sequences; ++s) counted.add(args, s, nullptr);

    const int64_t task_bytes = round_up(counted.count * sizeof(AttentionTask), 64);
    char* memory = static_cast<char*>(scratch(SCRATCH_PARTIAL, task_bytes + counted.partial_floats * sizeof(float)));
    AttentionPlan plan{reinterpret_cast<AttentionTask*>(memory)};
    plan.split = split;
    for (int64_t s = 0; s < args.sequences; ++s) plan.add(args, s, reinterpret_cast<float*>(memory + task_bytes));

    with_type(args.dtype, [&](auto type) {
        with_type(args.cache_dtype, [&](auto cache) {
            const auto run = [&](int64_t i) { attention_task<decltype(type), decltype(cache)>(args, plan.tasks[i]); };
            if (plan.work < SERIAL_WORK)
                for (int64_t i = 0; i < plan.count; ++i) run(i);
            else
                parallel(plan.count, run);
        });
        if (plan.partial_floats) join_segments<decltype(type)>(args, plan);
    });
}

}  // namespace TRINE_ISA
}  // namespace trine
