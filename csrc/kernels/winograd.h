// Winograd's minimal filtering for kernels of 3 x 3 and steps of one (Lavin and Gray, Fast Algorithms for Convolutional
// Neural Networks, 2015): F(m x m, 3 x 3) makes tiles of m x m outputs from (m + 2)^2 products instead of 9 m^2.
//
// The input's tiles are transformed for as many tiles as the second- and third-level caches hold, then each position of
// a tile is one matrix product of tiles by channels, whose results are transformed back a few tiles and filters at a
// time, with bias, residual and activation.
#pragma once

#include "conv_tile.h"
#include "linear.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t WINOGRAD_INPUT_BYTES = 1536 * 1024;  // of transformed input at a time
constexpr int64_t WINOGRAD_OUTPUT_BYTES = 192 * 1024;  // of a task's products

// The transforms for the points 0, 1, -1 and infinity.
struct Winograd2 {
    static constexpr int m = 2, size = 4;
    INLINE void input(const vf (&d)[4], vf (&t)[4]) {
        t[0] = sub(d[2], d[0]);
        t[1] = add(d[1], d[2]);
        t[2] = sub(d[2], d[1]);
        t[3] = sub(d[3], d[1]);
    }
    INLINE void output(const vf (&s)[4], vf (&y)[2]) {
        y[0] = add(add(s[0], s[1]), s[2]);
        y[1] = add(sub(s[1], s[2]), s[3]);
    }
};

// The points 0, a, -a, b, -b and infinity. 1 and 2 are the usual a and b; with these, whose squares are short numbers as
// well, rounding errors are a quarter of theirs: 2e-6 of the output's scale, as much as of a plain sum.
struct Winograd4 {
    static constexpr int m = 4, size = 6;
    static constexpr float a = 0.625f, b = 1.5f;
    INLINE void input(const vf (&d)[6], vf (&t)[6]) {
        const vf both = set1(a * a * b * b), sum = set1(-(a * a + b * b));
        t[0] = fma(both, d[0], fma(sum, d[2], d[4]));
        t[5] = fma(both, d[1], fma(sum, d[3], d[5]));
        const vf even_a = fma(set1(-b * b), d[2], d[4]), odd_a = mul(set1(a), fma(set1(-b * b), d[1], d[3]));
        t[1] = add(even_a, odd_a);
        t[2] = sub(even_a, odd_a);
        const vf even_b = fma(set1(-a * a), d[2], d[4]), odd_b = mul(set1(b), fma(set1(-a * a), d[1], d[3]));
        t[3] = add(even_b, odd_b);
        t[4] = sub(even_b, odd_b);
    }
    INLINE void output(const vf (&s)[6], vf (&y)[4]) {
        const vf sum_a = add(s[1], s[2]), difference_a = sub(s[1], s[2]);
        const vf sum_b = add(s[3], s[4]), difference_b = sub(s[3], s[4]);
        y[0] = add(s[0], add(sum_a, sum_b));
        y[1] = fma(set1(a), difference_a, mul(set1(b), difference_b));
        y[2] = fma(set1(a * a), sum_a, mul(set1(b * b), sum_b));
        y[3] = fma(set1(a * a * a), difference_a, fma(set1(b * b * b), difference_b, s[5]));
    }
};

template <class F>
struct Winograd {
    static constexpr int64_t M = F::m, SIZE = F::size, POSITIONS = SIZE * SIZE;
    const ConvArgs& args;
    int64_t tiles_h, tiles_w, tiles;
    int64_t chunk;                    // tiles transformed at a time
    int64_t position;                 // floats between two positions of the transformed input
    int64_t columns, tiles_together;  // of a task of the products

    explicit Winograd(const ConvArgs& a) : args(a) {
        tiles_h = ceil_div(a.out_height, M);
        tiles_w = ceil_div(a.out_width, M);
        tiles = a.images * tiles_h * tiles_w;
        const int64_t most = max<int64_t>(48, WINOGRAD_INPUT_BYTES / (POSITIONS * a.channels * 4));
        chunk = ceil_div(tiles, ceil_div(tiles, most));
        position = apart(chunk * a.channels);
        // Wide tasks read the input less often, high ones the weight; each thread should have a few.
        columns = 4 * PANEL;
        const int64_t fit = WINOGRAD_OUTPUT_BYTES / (POSITIONS * columns * 4);
        if (chunk > 2 * fit) columns = 2 * PANEL;
        columns = min(columns, round_up(a.filters, BLOCK_FILTERS));
        if (a.filters / columns * ceil_div(chunk, 2 * fit) < 4 * num_threads()) columns = BLOCK_FILTERS;
        const int64_t together = max<int64_t>(BLOCK_PIXELS, WINOGRAD_OUTPUT_BYTES / (POSITIONS * columns * 4));
        tiles_together = ceil_div(chunk, ceil_div(chunk, together));
    }

    // Positions lie a little more than a multiple of 4 KiB apart, so that they do not share one set of the cache.
    static int64_t apart(int64_t floats) { return round_up(floats, 1024) + 16; }

    // The input's tile `index` to [position][channels], `stride` floats from one position to the next.
    void transform_input(int64_t index, float* to) const {
        const int64_t n = index / (tiles_h * tiles_w);
        const int64_t top = index / tiles_w % tiles_h * M - args.pad_top, left = index % tiles_w * M - args.pad_left;
        const float* image = args.x + n * args.x_image;
        if (top >= 0 && left >= 0 && top + SIZE <= args.height && left + SIZE <= args.width) {
            const float* corner = image + top * args.x_row + left * args.x_pixel;
            const int64_t row = args.x_row, pixel = args.x_pixel;
            transform_input_at([=](int64_t i, int64_t j) { return corner + i * row + j * pixel; }, to);
            return;
        }
        const float* zeros = static_cast<const float*>(scratch(SCRATCH_ZEROS, args.channels * sizeof(float)));
        const float* address[POSITIONS];
        for (int64_t i = 0; i < SIZE; ++i)
            for (int64_t j = 0; j < SIZE; ++j) {
                const int64_t y = top + i, x = left + j;
                const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
                address[i * SIZE + j] = inside ? image + y * args.x_row + x * args.x_pixel : zeros;
            }
        transform_input_at([&](int64_t i, int64_t j) { return address[i * SIZE + j]; }, to);
    }

    template <class At>
    inline __attribute__((always_inline)) void transform_input_at(const At& at, float* to) const {
        for (int64_t c = 0; c < args.channels; c += W) {
            vf between[SIZE][SIZE];
            UNROLL
            for (int64_t j = 0; j < SIZE; ++j) {
                vf d[SIZE], t[SIZE];
                UNROLL
                for (int64_t i = 0; i < SIZE; ++i) d[i] = load(at(i, j) + c);
                F::input(d, t);
                UNROLL
                for (int64_t i = 0; i < SIZE; ++i) between[i][j] = t[i];
            }
            UNROLL
            for (int64_t i = 0; i < SIZE; ++i) {
                vf t[SIZE];
                F::input(between[i], t);
                UNROLL
                for (int64_t j = 0; j < SIZE; ++j) store(to + (i * SIZE + j) * position + c, t[j]);
            }
        }
    }

    // Products of tiles [first, first + count) of a chunk with `width` filters from `column` on, for all positions:
    // to [position][count][width].
    void multiply(const float* input, int64_t first, int64_t count, int64_t column, int64_t width, float* to,
                  int64_t to_position) const {
        const int64_t channels = args.channels, panels = args.filters / PANEL;
        const Blocks blocks(count, BLOCK_PIXELS);
        const float* x = input + first * channels;
        const int64_t slices = ceil_div(channels, BLOCK_DEPTH), slice = ceil_div(channels, slices);
        for (int64_t p = 0; p < POSITIONS; ++p) {
            const float* weight = args.weight + (p * panels + column / PANEL) * channels * PANEL;
            for (int64_t start = 0; start < channels; start += slice) {
                PixelTiles t;
                t.segments = 1;
                t.line_step = channels;
                t.offset = p * position + start;
                t.run = min(slice, channels - start);
                t.panel = channels * PANEL;
                t.out = {nullptr, to, width};
                t.add = {nullptr, to, width};
                t.adds = start > 0;
                t.bias = nullptr;
                t.activation = NO_ACTIVATION;
                for (int64_t c = 0; c < width; c += BLOCK_FILTERS) {
                    t.weight = weight + (c / PANEL * channels + start) * PANEL;
                    t.column = p * to_position + c;
                    t.columns = min(BLOCK_FILTERS, width - c);
                    tiles_of_blocks(t, blocks, &x, 1, 0);
                }
            }
        }
    }

    // One tile's products back to outputs: `width` filters from `column` on.
    void transform_output(const float* from, int64_t from_position, int64_t index, int64_t column, int64_t width) const {
        const int64_t n = index / (tiles_h * tiles_w);
        const int64_t y = index / tiles_w % tiles_h * M, x = index % tiles_w * M;
        const int64_t height = min(M, args.out_height - y), across = min(M, args.out_width - x);
        float* out = args.out + n * args.out_image + y * args.out_row + x * args.out_pixel + column;
        const float* residual = args.residual;
        if (residual)
            residual += n * args.residual_image + y * args.residual_row + x * args.residual_pixel + column;
        for (int64_t c = 0; c < width; c += W) {
            vf between[M][SIZE];
            UNROLL
            for (int64_t j = 0; j < SIZE; ++j) {
                vf s[SIZE], t[M];
                UNROLL
                for (int64_t i = 0; i < SIZE; ++i) s[i] = load(from + (i * SIZE + j) * from_position + c);
                F::output(s, t);
                UNROLL
                for (int64_t i = 0; i < M; ++i) between[i][j] = t[i];
            }
            const vf bias = args.bias ? load(args.bias + column + c) : zero();
            for (int64_t i = 0; i < height; ++i) {
                vf t[M];
                F::output(between[i], t);
                for (int64_t j = 0; j < across; ++j) {
                    vf value = add(t[j], bias);
                    if (residual)
                        value = add(value, load(residual + i * args.residual_row + j * args.residual_pixel + c));
                    value = activate(value, args.activation);
                    store(out + i * args.out_row + j * args.out_pixel + c, value);
                }
            }
        }
    }

    void run_chunk(int64_t start, float* input) const {
        const int64_t count = min(chunk, tiles - start);
        const int64_t tiles_a_task = max<int64_t>(1, ceil_div(count, num_threads() * 6));
        parallel(ceil_div(count, tiles_a_task), [&](int64_t task) {
            for (int64_t i = task * tiles_a_task; i < min(count, (task + 1) * tiles_a_task); ++i)
                transform_input(start + i, input + i * args.channels);
        });
        const int64_t column_tasks = ceil_div(args.filters, columns);
        parallel(ceil_div(count, tiles_together) * column_tasks, [&](int64_t task) {
            const int64_t first = task / column_tasks * tiles_together, together = min(tiles_together, count - first);
            const int64_t column = task % column_tasks * columns, width = min(columns, args.filters - column);
            const int64_t to_position = apart(together * width);
            float* to = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, POSITIONS * to_position * sizeof(float)));
            multiply(input, first, together, column, width, to, to_position);
            for (int64_t i = 0; i < together; ++i)
                transform_output(to + i * width, to_position, start + first + i, column, width);
        });
    }

    void run() const {
        float* input = static_cast<float*>(scratch(SCRATCH_INPUT, POSITIONS * position * sizeof(float)));
        for (int64_t start = 0; start < tiles; start += chunk) run_chunk(start, input);
    }
};

// Channels and filters are multiples of 16, in one group.
static void winograd2(const ConvArgs& args) { Winograd<Winograd2>(args).run(); }
static void winograd4(const ConvArgs& args) { Winograd<Winograd4>(args).run(); }

}  // namespace TRINE_ISA
}  // namespace trine
