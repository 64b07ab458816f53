// Pooling over windows, and resizing: vectors run along the channels.
#pragma once

#include "depthwise.h"

namespace trine {
namespace TRINE_ISA {

// V vectors of channels from c on, over all `count` addresses of a window; the last one has `channels` left.
template <bool MAX, int V, class T>
INLINE void pool_channels(const T* const* window, int64_t count, vf scale, T* out, int64_t c, int64_t channels) {
    const auto read = [&](const T* p, int v) {
        return V > 1 || channels >= W ? load(p + v * W) : load_first(p, channels);
    };
    vf value[V];
    UNROLL
    for (int v = 0; v < V; ++v) value[v] = MAX ? set1(-__builtin_inff()) : zero();
    for (int64_t i = 0; i < count; ++i) UNROLL
    for (int v = 0; v < V; ++v) {
        const vf x = read(window[i] + c, v);
        value[v] = MAX ? vmax_or_nan(value[v], x) : add(value[v], x);
    }
    UNROLL
    for (int v = 0; v < V; ++v)
        store_upto(out + c + v * W, MAX ? value[v] : mul(value[v], scale), V > 1 ? W : channels);
}

template <bool MAX, class T>
static void pool_line(const PoolArgs& a, int64_t line, int64_t first, int64_t end) {
    const int64_t n = line / a.out_height, y = line % a.out_height, top = y * a.stride_h - a.pad_top;
    const T** window = static_cast<const T**>(scratch(SCRATCH_TABLE, a.kernel_h * a.kernel_w * sizeof(T*)));
    const T* image = reinterpret_cast<const T*>(a.x) + n * a.x_image;
    for (int64_t x = 0; x < a.out_width; ++x) {
        const int64_t left = x * a.stride_w - a.pad_left;
        int64_t count = 0, padded = 0;
        for (int64_t i = 0; i < a.kernel_h; ++i) {
            const int64_t row = top + i * a.dilation_h;
            if (row >= a.height + a.pad_bottom) break;
            for (int64_t j = 0; j < a.kernel_w; ++j) {
                const int64_t column = left + j * a.dilation_w;
                if (column >= a.width + a.pad_right) break;
                ++padded;
                if (row >= 0 && row < a.height && column >= 0 && column < a.width)
                    window[count++] = image + row * a.x_row + column * a.x_pixel;
            }
        }
        const vf scale = set1(1.0f / float(a.kind == POOL_MEAN ? count : padded));
        T* out = reinterpret_cast<T*>(a.out) + n * a.out_image + y * a.out_row + x * a.out_pixel;
        int64_t c = first;
        for (; c + 4 * W <= end; c += 4 * W) pool_channels<MAX, 4, T>(window, count, scale, out, c, 4 * W);
        for (; c < end; c += W) pool_channels<MAX, 1, T>(window, count, scale, out, c, end - c);
    }
}

static void pool(const PoolArgs& a) {
    const int64_t lines = a.images * a.out_height;
    over_lines(lines, a.channels, lines * a.out_width * a.channels * a.kernel_h * a.kernel_w,
               [&](int64_t line, int64_t first, int64_t end) {
                   const bool narrow = a.dtype == BF16;
                   if (a.kind == POOL_MAX)
                       narrow ? pool_line<true, bf16>(a, line, first, end) : pool_line<true, float>(a, line, first, end);
                   else
                       narrow ? pool_line<false, bf16>(a, line, first, end) : pool_line<false, float>(a, line, first, end);
               });
}

static void resize_line(const ResizeArgs& a, int64_t line, int64_t first, int64_t end) {
    const int64_t n = line / a.out_height, y = line % a.out_height;
    const float* image = a.x + n * a.x_image;
    const float* low = image + a.row_low[y] * a.x_row;
    float* out = a.out + n * a.out_image + y * a.out_row;
    if (!a.row_weight) {
        for (int64_t x = 0; x < a.out_width; ++x)
            memcpy(out + x * a.out_pixel + first, low + a.column_low[x] * a.x_pixel + first,
                   (end - first) * sizeof(float));
        return;
    }
    const float* high = image + a.row_high[y] * a.x_row;
    const vf down = set1(a.row_weight[y]);
    for (int64_t x = 0; x < a.out_width; ++x) {
        const int64_t left = a.column_low[x] * a.x_pixel, right = a.column_high[x] * a.x_pixel;
        const vf along = set1(a.column_weight[x]);
        for (int64_t c = first; c < end; c += W) {
            const int64_t rest = end - c;
            const vf a00 = load_upto(low + left + c, rest), a01 = load_upto(low + right + c, rest);
            const vf a10 = load_upto(high + left + c, rest), a11 = load_upto(high + right + c, rest);
            const vf upper = fma(along, sub(a01, a00), a00), lower = fma(along, sub(a11, a10), a10);
            store_upto(out + x * a.out_pixel + c, fma(down, sub(lower, upper), upper), rest);
        }
    }
}

static void resize(const ResizeArgs& a) {
    const int64_t lines = a.images * a.out_height;
    over_lines(lines, a.channels, lines * a.out_width * a.channels * (a.row_weight ? 4 : 1),
               [&](int64_t line, int64_t first, int64_t end) { resize_line(a, line, first, end); });
}

}  // namespace TRINE_ISA
}  // namespace trine
