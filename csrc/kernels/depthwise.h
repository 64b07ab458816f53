// Depthwise convolutions: each channel by itself, so vectors run along the channels. Along a row of the output up to
// four pixels are summed together, so that each element of the input and of the weight is loaded once for them.
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
    // Of float32, what is no clamp is applied to whole lines (`run`).
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

    // P pixels from x on, all inside the image, without dilation: whole vectors of channels. FULL: so are all rows of
    // the kernel.
    template <int K, int S, int P, bool FULL>
    inline __attribute__((always_inline)) void pixels(int64_t x) const {
        constexpr int COLUMNS = (P - 1) * S + K;
        const T* from = image() + top * a.x_row + (x * S - a.pad_left) * a.x_pixel + first;
        const int64_t pixel = a.x_pixel, row = a.x_row * a.dilation_h, out_pixel = a.out_pixel;
        const int64_t i_first = FULL ? 0 : ky_first, i_end = FULL ? K : ky_end, added_pixel = a.residual_pixel;
        const int64_t skip = a.kernel_h * K * PANEL - (PANEL - W), c_end = end;
        const bool clamps = clamp, six = a.activation == RELU6;
        const float* weights = weight(first);
        const float* bias = a.bias;
        const T* added = residual(x);
        T* to = out(x);
        for (int64_t c = first; c + W <= c_end; c += W, from += W) {
            vf sum[P];
            const vf start = bias ? load(bias + c) : zero();
            UNROLL
            for (int p = 0; p < P; ++p) sum[p] = start;
            for (int64_t i = i_first; i < i_end; ++i) {
                vf value[COLUMNS];
                UNROLL
                for (int j = 0; j < COLUMNS; ++j) value[j] = load(from + i * row + j * pixel);
                UNROLL
                for (int k = 0; k < K; ++k) {
                    const vf w = load(weights + (i * K + k) * PANEL);
                    UNROLL
                    for (int p = 0; p < P; ++p) sum[p] = fma(value[p * S + k], w, sum[p]);
                }
            }
            if (added) UNROLL
            for (int p = 0; p < P; ++p) sum[p] = add(sum[p], load(added + p * added_pixel + c));
            if (clamps) UNROLL
            for (int p = 0; p < P; ++p) sum[p] = vmin(set1(six ? 6.0f : __builtin_inff()), relu(sum[p]));
            if (sizeof(T) != sizeof(float) && !clamps) UNROLL
            for (int p = 0; p < P; ++p) sum[p] = activate(sum[p], a.activation);
            UNROLL
            for (int p = 0; p < P; ++p) store(to + p * out_pixel + c, sum[p]);
            weights += (c + W) % PANEL ? W : skip;
        }
    }

    template <int K, int S, int P>
    void pixels(int64_t x) const {
        if (ky_first == 0 && ky_end == K && a.kernel_h == K)
            pixels<K, S, P, true>(x);
        else
            pixels<K, S, P, false>(x);
    }

    template <int K, int S>
    void row() const {
        const int64_t inside = min(a.out_width, ceil_div(a.pad_left, S));
        const int64_t last = a.width + a.pad_left - K;  // the largest left edge inside the image, from the padding's
        const int64_t outside = max(inside, min(a.out_width, last < 0 ? 0 : last / S + 1));
        for (int64_t x = 0; x < inside; ++x) pixel(x, first);
        const Blocks blocks(outside - inside, DEPTHWISE_PIXELS);
        for (int64_t b = 0; b < blocks.count; ++b) {
            const int64_t x = inside + blocks.first(b), count = blocks.first(b + 1) - blocks.first(b);
            if (count == 4) pixels<K, S, 4>(x);
            if (count == 3) pixels<K, S, 3>(x);
            if (count == 2) pixels<K, S, 2>(x);
            if (count == 1) pixels<K, S, 1>(x);
            const int64_t rest = first + (end - first) / W * W;
            for (int64_t i = 0; i < count && rest < end; ++i) pixel(x + i, rest);
        }
        for (int64_t x = outside; x < a.out_width; ++x) pixel(x, first);
    }

    void run() const {
        const bool plain = a.dilation_w == 1;
        if (plain && a.kernel_w == 3 && a.stride_w == 1)
            row<3, 1>();
        else if (plain && a.kernel_w == 3 && a.stride_w == 2)
            row<3, 2>();
        else if (plain && a.kernel_w == 5 && a.stride_w == 1)
            row<5, 1>();
        else if (plain && a.kernel_w == 5 && a.stride_w == 2)
            row<5, 2>();
        else
            for (int64_t x = 0; x < a.out_width; ++x) pixel(x, first);
        if constexpr (sizeof(T) == sizeof(float))
            if (!clamp && a.activation != NO_ACTIVATION)
                for (int64_t x = 0; x < a.out_width; ++x) activate_row(a.activation, out(x) + first, end - first);
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

static void depthwise(const ConvArgs& a) {
    const int64_t lines = a.images * a.out_height;
    over_lines(lines, a.groups, lines * a.out_width * a.groups * a.kernel_h * a.kernel_w,
               [&](int64_t line, int64_t first, int64_t end) {
                   a.dtype == BF16 ? DepthwiseTask<bf16>(a, line, first, end).run()
                                   : DepthwiseTask<float>(a, line, first, end).run();
               });
}

}  // namespace TRINE_ISA
}  // namespace trine
