// Depthwise convolutions: each channel by itself, so vectors run along the channels. Along a row of the output up to
// four pixels are summed together, so that each element of the input and of the weight is loaded once for them; with
// the commonest kernel, 3 x 3 in steps of one, those of two rows.
#pragma once

#include "conv_tile.h"
#include "linear.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t DEPTHWISE_PIXELS = 4;

// Where a task writes: whole rows of the output, channels [first, end). Images are of T.
template <class T>
struct DepthwiseTask {
    const ConvArgs& a;
    bool clamp;
    int64_t n, y, first, end;
    int64_t top, ky_first, ky_end;  // rows of the kernel that meet the image

    DepthwiseTask(const ConvArgs& a, int64_t line, int64_t first, int64_t end)
        : a(a), clamp(is_clamp(a.activation)), n(line / a.out_height), y(line % a.out_height), first(first),
          end(end) {
        top = y * a.stride_h - a.pad_top;
        ky_first = top < 0 ? ceil_div(-top, a.dilation_h) : 0;
        ky_end = min(a.kernel_h, top < a.height ? ceil_div(a.height - top, a.dilation_h) : 0);
    }

    T* out(int64_t x) const { return reinterpret_cast<T*>(a.out) + n * a.out_image + y * a.out_row + x * a.out_pixel; }
    const T* image() const { return reinterpret_cast<const T*>(a.x) + n * a.x_image; }
    const T* residual(int64_t x) const {
        const int64_t place = n * a.residual_image + y * a.residual_row + x * a.residual_pixel;
        return a.residual ? reinterpret_cast<const T*>(a.residual) + place : nullptr;
    }
    // Of float32, what is no clamp is applied to whole lines (`activate_later`).
    INLINE vf last(const DepthwiseTask& t, vf x) {
        if (t.clamp) return clamped(t.a.activation, x);
        return sizeof(T) == sizeof(float) ? x : activate(x, t.a.activation);
    }

    // Of channel c, at the kernel's first place; places are PANEL apart.
    const float* weight(int64_t c) const {
        return a.weight + c / PANEL * a.kernel_h * a.kernel_w * PANEL + c % PANEL;
    }

    // V vectors of one pixel's channels from c on; where V is 1 there may be fewer channels than a vector holds.
    template <int V>
    inline __attribute__((always_inline)) void pixel_channels(int64_t x, int64_t kx_first, int64_t kx_end, int64_t c,
                                                              int64_t count) const {
        const int64_t left = x * a.stride_w - a.pad_left;
        const auto read = [&](const T* p) { return V > 1 || count >= W ? load(p) : load_first(p, count); };
        vf sum[V];
        const float* weights[V];
        UNROLL
        for (int v = 0; v < V; ++v) {
            sum[v] = a.bias ? load(a.bias + c + v * W) : zero();
            weights[v] = weight(c + v * W);
        }
        for (int64_t i = ky_first; i < ky_end; ++i) {
            const T* row = image() + (top + i * a.dilation_h) * a.x_row + left * a.x_pixel + c;
            for (int64_t j = kx_first; j < kx_end; ++j) UNROLL
            for (int v = 0; v < V; ++v) {
                const vf value = read(row + j * a.dilation_w * a.x_pixel + v * W);
                sum[v] = fma(value, load(weights[v] + (i * a.kernel_w + j) * PANEL), sum[v]);
            }
        }
        const T* added = residual(x);
        UNROLL
        for (int v = 0; v < V; ++v) {
            if (added) sum[v] = add(sum[v], read(added + c + v * W));
            store_upto(out(x) + c + v * W, last(*this, sum[v]), V > 1 ? W : count);
        }
    }

    // Any pixel, any kernel: channels [c, end).
    void pixel(int64_t x, int64_t c) const {
        const int64_t left = x * a.stride_w - a.pad_left;
        const int64_t kx_first = left < 0 ? ceil_div(-left, a.dilation_w) : 0;
        const int64_t kx_end = min(a.kernel_w, left < a.width ? ceil_div(a.width - left, a.dilation_w) : 0);
        for (; c + 4 * W <= end; c += 4 * W) pixel_channels<4>(x, kx_first, kx_end, c, 4 * W);
        for (; c < end; c += W) pixel_channels<1>(x, kx_first, kx_end, c, min<int64_t>(W, end - c));
    }

    // P pixels from x on of R rows, without dilation: whole vectors of channels. FULL: all rows of the kernel meet the
    // image; EDGE: some columns do not.
    template <int K, int S, int P, int R, bool FULL, bool EDGE>
    inline __attribute__((always_inline)) void pixels(int64_t x) const {
        constexpr int COLUMNS = (P - 1) * S + K, ROWS = (R - 1) * S + K;
        const int64_t left = x * S - a.pad_left, before = -left, after = a.width - left;
        const T* from = image() + top * a.x_row + left * a.x_pixel + first;
        const int64_t pixel = a.x_pixel, row = a.x_row * a.dilation_h, out_pixel = a.out_pixel, out_row = a.out_row;
        const int64_t added_pixel = a.residual_pixel, added_row = a.residual_row;
        const int64_t above = ky_first, below = R > 1 ? a.height - top : ky_end;
        const int64_t skip = a.kernel_h * K * PANEL - (PANEL - W), c_end = end;
        const bool clamps = clamp, six = a.activation == RELU6;
        const float* weights = weight(first);
        const float* bias = a.bias;
        const T* added = residual(x);
        T* to = out(x);
        for (int64_t c = first; c + W <= c_end; c += W, from += W) {
            vf sum[R][P];
            const vf start = bias ? load(bias + c) : zero();
            UNROLL
            for (int r = 0; r < R; ++r) UNROLL
            for (int p = 0; p < P; ++p) sum[r][p] = start;
            UNROLL
            for (int i = 0; i < ROWS; ++i) {
                if (!FULL && (i < above || i >= below)) continue;
                vf value[COLUMNS];
                UNROLL
                for (int j = 0; j < COLUMNS; ++j)
                    value[j] = !EDGE || (j >= before && j < after) ? load(from + i * row + j * pixel) : zero();
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const int y = i - r * S;
                    if (y < 0 || y >= K) continue;
                    UNROLL
                    for (int k = 0; k < K; ++k) {
                        const vf w = load(weights + (y * K + k) * PANEL);
                        UNROLL
                        for (int p = 0; p < P; ++p) sum[r][p] = fma(value[p * S + k], w, sum[r][p]);
                    }
                }
            }
            UNROLL
            for (int r = 0; r < R; ++r) UNROLL
            for (int p = 0; p < P; ++p) {
                if (added) sum[r][p] = add(sum[r][p], load(added + r * added_row + p * added_pixel + c));
                if (clamps) sum[r][p] = vmin(set1(six ? 6.0f : __builtin_inff()), relu(sum[r][p]));
                if (sizeof(T) != sizeof(float) && !clamps) sum[r][p] = activate(sum[r][p], a.activation);
                store(to + r * out_row + p * out_pixel + c, sum[r][p]);
            }
            weights += (c + W) % PANEL ? W : skip;
        }
    }

    template <int K, int S, int P, int R>
    void pixels(int64_t x) const {
        const int64_t left = x * S - a.pad_left;
        if (left < 0 || left + (P - 1) * S + K > a.width)
            pixels<K, S, P, R, false, true>(x);
        else if (ky_first == 0 && (R > 1 ? top + (R - 1) * S + K <= a.height : ky_end == K))
            pixels<K, S, P, R, true, false>(x);
        else
            pixels<K, S, P, R, false, false>(x);
    }

    template <int K, int S, int R>
    void rows() const {
        const Blocks blocks(a.out_width, DEPTHWISE_PIXELS);
        for (int64_t b = 0; b < blocks.count; ++b) {
            const int64_t x = blocks.first(b), count = blocks.first(b + 1) - x;
            if (count == 4) pixels<K, S, 4, R>(x);
            if (count == 3) pixels<K, S, 3, R>(x);
            if (count == 2) pixels<K, S, 2, R>(x);
            if (count == 1) pixels<K, S, 1, R>(x);
        }
    }

    // Channels that fill no vector.
    void rest() const {
        const int64_t c = first + (end - first) / W * W;
        for (int64_t x = 0; x < a.out_width && c < end; ++x) pixel(x, c);
    }

    void activate_later() const {
        if constexpr (sizeof(T) == sizeof(float))
            if (!clamp && a.activation != NO_ACTIVATION)
                for (int64_t x = 0; x < a.out_width; ++x) activate_row(a.activation, out(x) + first, end - first);
    }

    // One row; where the kernel's form is known, all of its rows are there.
    void run() const {
        const bool square = a.dilation_w == 1 && a.kernel_h == a.kernel_w && a.stride_w <= 2;
        if (square && a.kernel_w == 3)
            a.stride_w == 1 ? rows<3, 1, 1>() : rows<3, 2, 1>();
        else if (square && a.kernel_w == 5)
            a.stride_w == 1 ? rows<5, 1, 1>() : rows<5, 2, 1>();
        else
            for (int64_t x = 0; x < a.out_width; ++x) pixel(x, first);
        if (square && (a.kernel_w == 3 || a.kernel_w == 5)) rest();
        activate_later();
    }

    // This row and the next by a kernel of 3 x 3 in steps of one.
    void run_two() const {
        rows<3, 1, 2>();
        rest();
        activate_later();
        const DepthwiseTask next(a, n * a.out_height + y + 1, first, end);
        next.rest();
        next.activate_later();
    }
};

// body(line, first channel, end) for all rows of images and all channels: a few tasks a thread.
template <class Body>
INLINE void over_lines(int64_t lines, int64_t channels, int64_t work, const Body& body) {
    const int64_t wanted = 8 * num_threads();
    const int64_t line_tasks = min(lines, wanted), lines_per_task = ceil_div(lines, line_tasks);
    const int64_t cuts = max<int64_t>(1, min(channels / (4 * W), wanted / line_tasks));
    const int64_t width = round_up(ceil_div(channels, cuts), 4 * W), channel_tasks = ceil_div(channels, width);
    const auto task = [&](int64_t i) {
        const int64_t first = i % channel_tasks * width, line = i / channel_tasks * lines_per_task;
        for (int64_t l = line; l < min(lines, line + lines_per_task); ++l)
            body(l, first, min(channels, first + width));
    };
    const int64_t tasks = ceil_div(lines, lines_per_task) * channel_tasks;
    if (work < SERIAL_WORK / 4)
        for (int64_t i = 0; i < tasks; ++i) task(i);
    else
        parallel(tasks, task);
}

template <class T>
static void depthwise_of(const ConvArgs& a) {
    const bool pairs = a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 1 && a.stride_w == 1 && a.dilation_h == 1 &&
                       a.dilation_w == 1;
    const int64_t together = pairs ? 2 : 1, of_image = ceil_div(a.out_height, together);
    const int64_t work = a.images * a.out_height * a.out_width * a.groups * a.kernel_h * a.kernel_w;
    over_lines(a.images * of_image, a.groups, work, [&](int64_t index, int64_t first, int64_t end) {
        const int64_t y = index % of_image * together;
        const DepthwiseTask<T> task(a, index / of_image * a.out_height + y, first, end);
        pairs && y + 1 < a.out_height ? task.run_two() : task.run();
    });
}

static void depthwise(const ConvArgs& a) { a.dtype == BF16 ? depthwise_of<bf16>(a) : depthwise_of<float>(a); }

}  // namespace TRINE_ISA
}  // namespace trine
