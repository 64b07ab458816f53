// The micro-kernel of convolutions: up to 6 output pixels x 2 vectors of filters are summed in registers, over a list
// of segments of the input: for each segment and pixel an address of `run` neighbouring floats. So a convolution is a
// matrix product whose left side is read where it lies (Dukhan, The Indirect Convolution Algorithm, 2019).
#pragma once

#include "activation.h"
#include "conv_args.h"
#include "linear.h"

namespace trine {
namespace TRINE_ISA {

constexpr int BLOCK_PIXELS = 6;
constexpr int NARROW_PIXELS = 8;  // with one vector of filters alone: as many chains of sums as hide the latency
constexpr int64_t BLOCK_FILTERS = 2 * W;
constexpr int64_t BLOCK_DEPTH = 384;  // k's of a panel that stay in the first-level cache while rows pass over them

// Clamping is done on the registers; the other activations, which take long anyway, on what was stored.
INLINE bool is_clamp(Activation activation) { return activation == RELU || activation == RELU6; }
INLINE vf clamped(Activation activation, vf x) {
    return vmin(set1(activation == RELU6 ? 6.0f : __builtin_inff()), relu(x));
}

static void activate_row(Activation activation, float* row, int64_t count) {
    with_activation(activation, [&](auto apply) {
        int64_t i = 0;
        for (; i + W <= count; i += W) store(row + i, apply(load(row + i)));
        if (i < count) store_upto(row + i, apply(load_upto(row + i, count - i)), count - i);
    });
}

// Where rows of pixels lie: at addresses in a table, or where there is none, `step` floats apart.
template <class T>
struct Rows {
    T* const* table;
    T* first;
    int64_t step;
    T* at(int64_t r) const { return table ? table[r] : first + r * step; }
    Rows from(int64_t r) const { return {table ? table + r : nullptr, first + r * step, step}; }
};

// A run of neighbouring blocks of R rows each, for one pair of vectors of filters.
struct PixelTiles {
    const float* const* x;  // of block b at b * x_block: [segments][R]; or, for lines, [segments]
    int64_t x_block, blocks;
    int64_t line_step;  // lines: row r of a run reads r * line_step further than x says; else 0
    int64_t segments, offset, run;  // `offset` is added to all addresses
    const float* weight;            // of the first panel, at the first k
    int64_t panel;                  // floats from one panel to the next
    Rows<float> out;                // `column` is added to them, and to those of `add`
    Rows<const float> add;          // what is added: the residual, or the sums so far
    bool adds;
    int64_t column, columns;        // at least 1 and at most BLOCK_FILTERS
    const float* bias;              // at the first column, or null
    Activation activation;          // none unless these are the last k's
};

// sum += the rows of block b by the weight.
template <int R, int V, bool LINES>
INLINE void tile_sums(const PixelTiles& t, int64_t b, vf (&sum)[R][V]) {
    const float* const* rows = LINES ? t.x : t.x + b * t.x_block;
    const float* w0 = t.weight;
    const int64_t next = W == 16 ? t.panel : W, run = t.run, step = t.line_step;
    const int64_t offset = LINES ? t.offset + b * R * step : t.offset;
    for (int64_t s = 0; s < t.segments; ++s, rows += LINES ? 1 : R) {
        const float* x[R];
        UNROLL
        for (int r = 0; r < R; ++r) x[r] = LINES ? rows[0] + offset + r * step : rows[r] + offset;
        for (int64_t k = 0; k < run; ++k, w0 += PANEL) {
            vf w[V];
            UNROLL
            for (int v = 0; v < V; ++v) w[v] = load(w0 + v * next);
            UNROLL
            for (int r = 0; r < R; ++r) {
                const vf value = set1(x[r][k]);
                UNROLL
                for (int v = 0; v < V; ++v) sum[r][v] = fma(value, w[v], sum[r][v]);
            }
        }
    }
}

template <int R, int V, bool LINES>
static void tiles_of(const PixelTiles& t) {
    const bool whole = t.columns >= V * W;
    const bool clamp = is_clamp(t.activation), later = !clamp && t.activation != NO_ACTIVATION;
    for (int64_t b = 0; b < t.blocks; ++b) {
        vf sum[R][V];
        UNROLL
        for (int v = 0; v < V; ++v) {
            const vf first = t.bias ? load(t.bias + v * W) : zero();
            UNROLL
            for (int r = 0; r < R; ++r) sum[r][v] = first;
        }
        tile_sums<R, V, LINES>(t, b, sum);
        if (t.adds) UNROLL
        for (int r = 0; r < R; ++r) {
            const float* added = t.add.at(b * R + r) + t.column;
            UNROLL
            for (int v = 0; v < V; ++v)
                sum[r][v] = add(sum[r][v], whole ? load(added + v * W) : load_upto(added + v * W, t.columns - v * W));
        }
        if (clamp) UNROLL
        for (int r = 0; r < R; ++r) UNROLL
        for (int v = 0; v < V; ++v) sum[r][v] = clamped(t.activation, sum[r][v]);
        UNROLL
        for (int r = 0; r < R; ++r) {
            float* out = t.out.at(b * R + r) + t.column;
            UNROLL
            for (int v = 0; v < V; ++v) {
                if (whole)
                    store(out + v * W, sum[r][v]);
                else
                    store_upto(out + v * W, sum[r][v], t.columns - v * W);
            }
            if (later) activate_row(t.activation, out, t.columns);
        }
    }
}

using TilesFunction = void (*)(const PixelTiles&);
template <bool LINES>
static constexpr TilesFunction WIDE_TILES[BLOCK_PIXELS] = {tiles_of<1, 2, LINES>, tiles_of<2, 2, LINES>,
                                                           tiles_of<3, 2, LINES>, tiles_of<4, 2, LINES>,
                                                           tiles_of<5, 2, LINES>, tiles_of<6, 2, LINES>};
template <bool LINES>
static constexpr TilesFunction NARROW_TILES[NARROW_PIXELS] = {
    tiles_of<1, 1, LINES>, tiles_of<2, 1, LINES>, tiles_of<3, 1, LINES>, tiles_of<4, 1, LINES>,
    tiles_of<5, 1, LINES>, tiles_of<6, 1, LINES>, tiles_of<7, 1, LINES>, tiles_of<8, 1, LINES>};

// All of `blocks`: the first ones have a row more than the others. `table` holds for each block [segments][its rows], of
// which those from `segment` on are read; or, with t.line_step, [segments].
INLINE void tiles_of_blocks(PixelTiles t, const Blocks& blocks, const float* const* table, int64_t segments,
                            int64_t segment) {
    const int64_t larger = blocks.rows % blocks.count, size = blocks.rows / blocks.count;
    const int64_t runs[2][2] = {{larger, size + 1}, {blocks.count - larger, size}};
    const bool wide = t.columns > W;
    for (const auto& [count, rows] : runs) {
        if (count == 0) continue;
        t.blocks = count;
        if (t.line_step) {
            t.x = table + segment;
            (wide ? WIDE_TILES<true> : NARROW_TILES<true>)[rows - 1](t);
            t.offset += count * rows * t.line_step;
        } else {
            t.x = table + segment * rows;
            t.x_block = segments * rows;
            (wide ? WIDE_TILES<false> : NARROW_TILES<false>)[rows - 1](t);
            table += count * t.x_block;
        }
        t.out = t.out.from(count * rows);
        t.add = t.add.from(count * rows);
    }
}

}  // namespace TRINE_ISA
}  // namespace trine
