// The choice of a token from a row of logits, greedy or drawn from what the filters leave; log-probabilities.
//
// The definition is trine/llm/sampling/distribution.py: integer weights round(2^34 e^z), whose sums are exact in
// double whatever the order; filters as a smallest z; the first token, by id, whose cumulative weight passes a share
// of the total. Here only blocks that matter are looked at: filters leave few tokens, and the block maxima say where.
#pragma once

#include "elementwise.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t BLOCK = 128;
constexpr float WEIGHT_SCALE = 17179869184.0f;  // 2^34
constexpr float NO_WEIGHT = -24.5f;             // 2^34 e^z rounds to 0 below
constexpr int BINS = 512;                       // of equal width in z, from 0 to NO_WEIGHT
// A nucleus is looked for above this many block maxima first, and in the whole row if it is not there.
constexpr int64_t NUCLEUS_BLOCKS = 256;

struct Candidate {
    float z, weight;
    int32_t id;
};

#if defined(__AVX512F__)
using vd = __m512d;
INLINE vd no_sum() { return _mm512_setzero_pd(); }
INLINE vd add_exactly(vd sum, vf x) {  // sum += x, in double
    sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    return _mm512_add_pd(sum, _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1))));
}
INLINE double total_of(vd sum) { return _mm512_reduce_add_pd(sum); }
INLINE bool has_nan(vf x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
INLINE vf zero_below(vf x, vf z, float limit) {  // x where z >= limit, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, set1(limit), _CMP_GE_OQ), x);
}
#else
using vd = __m256d;
INLINE vd no_sum() { return _mm256_setzero_pd(); }
INLINE vd add_exactly(vd sum, vf x) {
    sum = _mm256_add_pd(sum, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    return _mm256_add_pd(sum, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
INLINE double total_of(vd sum) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
INLINE bool has_nan(vf x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
INLINE vf zero_below(vf x, vf z, float limit) { return _mm256_and_ps(x, _mm256_cmp_ps(z, set1(limit), _CMP_GE_OQ)); }
#endif

// The logits at p, minus infinity from n on.
INLINE vf load_logits(const float* p, int64_t n) {
    const vf nothing = set1(-__builtin_inff());
    return n >= W ? load(p) : n <= 0 ? nothing : first_n(load_first(p, n), nothing, n);
}
INLINE int bin_of(float z) { return z > NO_WEIGHT ? static_cast<int>(z * (BINS / NO_WEIGHT)) : BINS; }
INLINE vf weight_of(vf z) { return round_nearest(mul(exp(z), set1(WEIGHT_SCALE))); }

// One row, as it is worked on.
struct Row {
    const float* x;
    int64_t size, blocks;
    float* maxima;       // [blocks]
    double* sums;        // [blocks]
    Candidate* found;    // [size], in the order of ids
    Candidate* ordered;  // [size], room for selections
    float largest, inverse;

    vf z(int64_t at) const { return mul(sub(load_logits(x + at, size - at), set1(largest)), set1(inverse)); }
    int64_t end_of(int64_t block) const { return min(size, (block + 1) * BLOCK); }
    float largest_z(int64_t block) const { return (maxima[block] - largest) * inverse; }
};

// Fills in the maxima; false when the row holds a NaN or its largest logit is not finite.
static bool find_maxima(Row& row) {
    float largest = -__builtin_inff();
    bool nan = false;
    for (int64_t block = 0; block < row.blocks; ++block) {
        vf best = set1(-__builtin_inff());
        for (int64_t i = block * BLOCK; i < row.end_of(block); i += W) {
            const vf logits = load_logits(row.x + i, row.size - i);
            best = vmax(logits, best);  // NaN never wins
            nan |= has_nan(logits);
        }
        row.maxima[block] = hmax(best);
        largest = max(largest, row.maxima[block]);
    }
    row.largest = largest;
    return !nan && largest - largest == 0.0f;
}

static int64_t first_largest(const Row& row) {
    int64_t block = 0;
    while (row.maxima[block] != row.largest) ++block;
    int64_t i = block * BLOCK;
    while (row.x[i] != row.largest) ++i;
    return i;
}

// The weight of the tokens with z >= limit: of every block's, and of all.
static double weigh(const Row& row, float limit) {
    double total = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        vd sum = no_sum();
        if (row.largest_z(block) >= max(limit, NO_WEIGHT)) {
            for (int64_t i = block * BLOCK; i < row.end_of(block); i += W) {
                const vf z = row.z(i);
                sum = add_exactly(sum, zero_below(weight_of(z), z, limit));
            }
        }
        row.sums[block] = total_of(sum);
        total += row.sums[block];
    }
    return total;
}

INLINE double share_of(double uniform, double total) { return min(__builtin_floor(uniform * total), total - 1); }

// Draws from the tokens with z >= limit.
static int64_t draw_from_row(const Row& row, double uniform, float limit) {
    const double target = share_of(uniform, weigh(row, limit));
    double reached = 0;
    int64_t block = 0;
    while (reached + row.sums[block] <= target) reached += row.sums[block++];
    alignas(64) float weights[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += W) {
        const vf z = row.z(block * BLOCK + i);
        store(weights + i, zero_below(weight_of(z), z, limit));
    }
    int64_t i = 0;
    while ((reached += weights[i]) <= target) ++i;
    return block * BLOCK + i;
}

// The k-th largest (from 0) of n values, which are put in another order: quickselect by the median of three.
static float select(float* values, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const float a = values[low], b = values[(low + high) / 2], c = values[high];
        const float pivot = max(min(a, b), min(max(a, b), c));
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) ++i;
            while (values[j] < pivot) --j;
            if (i > j) break;
            const float other = values[i];
            values[i++] = values[j];
            values[j--] = other;
        }
        if (k <= j)
            high = j;
        else if (k >= i)
            low = i;
        else
            return values[k];
    }
    return values[low];
}

// The largest z such that candidates from there on up weigh at least `target` (which all of them do): as `select`.
static float select_by_weight(Candidate* items, int64_t n, double target) {
    int64_t low = 0, high = n - 1;
    double above = 0;  // weight of the items before `low`
    while (low < high) {
        const float a = items[low].z, b = items[(low + high) / 2].z, c = items[high].z;
        const float pivot = max(min(a, b), min(max(a, b), c));
        int64_t i = low, j = high;
        while (i <= j) {
            while (items[i].z > pivot) ++i;
            while (items[j].z < pivot) --j;
            if (i > j) break;
            const Candidate other = items[i];
            items[i++] = items[j];
            items[j--] = other;
        }
        // [low, j] is at or above the pivot, (j, i) is the pivot, [i, high] at or below it.
        double upper = 0, middle = 0;
        for (int64_t k = low; k <= j; ++k) upper += items[k].weight;
        for (int64_t k = j + 1; k < i; ++k) middle += items[k].weight;
        if (above + upper >= target) {
            high = j;
        } else if (above + upper + middle >= target) {
            return pivot;
        } else {
            above += upper + middle;
            low = i;
        }
    }
    return items[low].z;
}

// The candidates with z >= bound, in the order of their ids; how many.
static int64_t collect(const Row& row, float bound) {
    int64_t count = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        if (row.largest_z(block) < bound) continue;
        const int64_t end = row.end_of(block);
        for (int64_t i = block * BLOCK; i < end; i += W) {
            alignas(64) float z[W];
            store(z, row.z(i));
            for (int64_t lane = 0; lane < min<int64_t>(W, end - i); ++lane)
                if (z[lane] >= bound) row.found[count++] = {z[lane], 0, int32_t(i + lane)};
        }
    }
    for (int64_t i = 0; i < count; i += W) {
        alignas(64) float z[W] = {}, weight[W];
        const int64_t n = min<int64_t>(W, count - i);
        for (int64_t lane = 0; lane < n; ++lane) z[lane] = row.found[i + lane].z;
        store(weight, weight_of(load(z)));
        for (int64_t lane = 0; lane < n; ++lane) row.found[i + lane].weight = weight[lane];
    }
    return count;
}

// A z that at least `count` tokens reach: that many blocks have a maximum from there on up.
static float bound_of(const Row& row, int64_t count) {
    if (count > row.blocks) return -__builtin_inff();
    float* values = reinterpret_cast<float*>(row.ordered);
    memcpy(values, row.maxima, row.blocks * sizeof(float));
    return (select(values, row.blocks, count - 1) - row.largest) * row.inverse;
}

static double weight_from(const Candidate* items, int64_t count, float limit) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (items[i].z >= limit) total += items[i].weight;
    return total;
}

// The smallest z in the nucleus that weighs `target`, which the candidates at or above `limit` hold.
static float nucleus(const Row& row, int64_t count, float limit, double target) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i)
        if (row.found[i].z >= limit) row.ordered[n++] = row.found[i];
    return select_by_weight(row.ordered, n, target);
}

// The same for the whole row: weights are sorted into bins by z, and then only the bin where the nucleus ends matters.
static float wide_nucleus(const Row& row, double target) {
    double bins[BINS + 1] = {};
    alignas(64) float z[W], weights[W];
    for (int64_t i = 0; i < row.size; i += W) {
        store(z, row.z(i));
        store(weights, weight_of(load(z)));
        for (int lane = 0; lane < W; ++lane) bins[bin_of(z[lane])] += weights[lane];
    }
    int bin = 0;
    for (; bin < BINS && bins[bin] < target; ++bin) target -= bins[bin];
    int64_t count = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        if (bin_of(row.largest_z(block)) > bin) continue;
        for (int64_t i = block * BLOCK; i < row.end_of(block); i += W) {
            store(z, row.z(i));
            store(weights, weight_of(load(z)));
            for (int lane = 0; lane < W; ++lane)
                if (bin_of(z[lane]) == bin && i + lane < row.size)
                    row.ordered[count++] = {z[lane], weights[lane], int32_t(i + lane)};
        }
    }
    return select_by_weight(row.ordered, count, target);
}

// `draw_from_row` from what the filters leave.
static int64_t draw_filtered(const Row& row, const SampleParams& params) {
    float limit = -__builtin_inff();
    int64_t count;
    const bool is_nucleus = params.top_p < 1;
    if (params.top_k > 0) {
        const int64_t k = min(static_cast<int64_t>(params.top_k), row.size);
        count = collect(row, bound_of(row, k));
        float* values = reinterpret_cast<float*>(row.ordered);
        for (int64_t i = 0; i < count; ++i) values[i] = row.found[i].z;
        limit = select(values, count, k - 1);
        if (is_nucleus) limit = nucleus(row, count, limit, weight_from(row.found, count, limit) * params.top_p);
    } else if (is_nucleus) {
        const double target = weigh(row, limit) * params.top_p;
        count = collect(row, bound_of(row, min(NUCLEUS_BLOCKS, row.blocks)));
        if (weight_from(row.found, count, limit) < target) {
            const float last = wide_nucleus(row, target);
            return draw_from_row(row, params.uniform, max(last, static_cast<float>(params.min_z)));
        }
        limit = nucleus(row, count, limit, target);
    } else {
        count = collect(row, static_cast<float>(params.min_z));
    }
    limit = max(limit, static_cast<float>(params.min_z));
    const double target = share_of(params.uniform, weight_from(row.found, count, limit));
    double reached = 0;
    for (int64_t i = 0;; ++i)
        if (row.found[i].z >= limit && (reached += row.found[i].weight) > target) return row.found[i].id;
}

static int64_t sample_row(Row& row, const SampleParams& params) {
    if (!find_maxima(row)) return -1;
    if (params.temperature <= 0) return first_largest(row);
    row.inverse = 1.0f / static_cast<float>(params.temperature);
    if (params.top_k > 0 || params.top_p < 1 || params.min_z > -__builtin_inf()) return draw_filtered(row, params);
    return draw_from_row(row, params.uniform, -__builtin_inff());
}

// The k largest logits, the largest first, of equal ones the smallest id.
static void find_top(const Row& row, int64_t k, int64_t* ids) {
    float bound = -__builtin_inff();
    Candidate* top = row.ordered;
    if (k <= row.blocks) {
        memcpy(static_cast<void*>(top), row.maxima, row.blocks * sizeof(float));
        bound = select(reinterpret_cast<float*>(top), row.blocks, k - 1);
    }
    int64_t count = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        if (row.maxima[block] < bound) continue;
        for (int64_t i = block * BLOCK; i < row.end_of(block); ++i) {
            const float x = row.x[i];
            if (!(x >= bound) || (count == k && !(x > top[k - 1].z))) continue;
            int64_t place = count < k ? count++ : k - 1;
            for (; place > 0 && top[place - 1].z < x; --place) top[place] = top[place - 1];
            top[place] = {x, 0, int32_t(i)};
        }
    }
    for (int64_t i = 0; i < k; ++i) ids[i] = i < count ? top[i].id : 0;
}

// The largest logit, the sum of e^(logit - largest), and how many logits are above the target's.
static void score_row(Row& row, const ScoreArgs& args, int64_t index) {
    find_maxima(row);
    row.inverse = 1;
    const float target = row.x[args.targets[index]];
    vd sum = no_sum();
    int64_t above = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        for (int64_t i = block * BLOCK; i < row.end_of(block); i += W) sum = add_exactly(sum, exp(row.z(i)));
        if (row.maxima[block] > target)
            for (int64_t i = block * BLOCK; i < row.end_of(block); ++i) above += row.x[i] > target;
    }
    args.largest[index] = row.largest;
    args.total[index] = total_of(sum);
    args.rank[index] = above + 1;
    find_top(row, args.k, args.top_ids + index * args.k);
}

// body(row, index) for every row of logits.
template <class Body>
INLINE void each_row(const float* x, int64_t rows, int64_t size, int64_t stride, const Body& body) {
    const int64_t blocks = ceil_div(size, BLOCK);
    const size_t bytes = blocks * (sizeof(float) + sizeof(double)) + 2 * size * sizeof(Candidate) + 64;
    over_rows(rows, size, [&](int64_t start, int64_t end) {
        Row row;
        row.size = size;
        row.blocks = blocks;
        row.sums = static_cast<double*>(scratch(SCRATCH_ACCUMULATOR, bytes));
        row.maxima = reinterpret_cast<float*>(row.sums + blocks);
        row.found = reinterpret_cast<Candidate*>(row.maxima + blocks);
        row.ordered = row.found + size;
        for (int64_t i = start; i < end; ++i) {
            row.x = x + i * stride;
            body(row, i);
        }
    });
}

// out: the token of each row; -1 where it holds a NaN, or its largest logit is infinite or minus infinity.
static void sample(const float* x, const SampleParams* params, int64_t* out, int64_t rows, int64_t size,
                   int64_t stride) {
    each_row(x, rows, size, stride, [&](Row& row, int64_t i) { out[i] = sample_row(row, params[i]); });
}

static void score(const ScoreArgs& args) {
    each_row(args.x, args.rows, args.size, args.stride, [&](Row& row, int64_t i) { score_row(row, args, i); });
}

}  // namespace TRINE_ISA
}  // namespace trine
