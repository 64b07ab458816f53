// What the kernels of convolutions, pooling and resizing are given: plain data, the same for all instruction sets.
//
// Images lie with their channels innermost: element (n, y, x, c) at n * image + y * row + x * pixel + c, so that a
// kernel reads or writes a slice of the channels of a wider image as well.
#pragma once

#include "../runtime.h"

namespace trine {

// out = activation(conv(x, weight) + bias + residual), 2-D. `channels` and `filters` are those of one group.
//
// weight: of each group panels of 16 filters, the last filled up with zeros: [groups][ceil(filters / 16)][k][16]; bias:
// [groups][ceil(filters / 16) * 16] or null. k counts a filter's elements in the order (y, x, channel), or (channel, y,
// x) when x_channel is not 1: then x has its channels outermost.
// Winograd's kernels: [(m + 2)^2][filters / 16][channels][16], the transformed filters.
// Depthwise (channels and filters are 1, groups the channels): weight [ceil(groups / 16)][kernel_h][kernel_w][16], bias
// filled up with zeros to whole panels.
struct ConvArgs {
    const float* x;
    const float* weight;
    const float* bias;
    const float* residual;  // or null; may be `out` itself
    float* out;
    int64_t images, groups, channels, filters;
    int64_t height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    int64_t x_channel, x_pixel, x_row, x_image;
    int64_t out_pixel, out_row, out_image;
    int64_t residual_pixel, residual_row, residual_image;
    Activation activation;
    DType dtype;  // of the images: F32; depthwise also BF16
};

enum PoolKind : int32_t { POOL_MAX = 0, POOL_MEAN = 1, POOL_MEAN_WITH_PADDING = 2 };

// Windows over images. The mean divides by the number of elements inside the image, or inside the padded image, whose
// far edges are pad_bottom and pad_right beyond the image's.
struct PoolArgs {
    const float* x;
    float* out;
    int64_t images, channels, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left, pad_bottom, pad_right;
    int64_t x_pixel, x_row, x_image;
    int64_t out_pixel, out_row, out_image;
    PoolKind kind;
    DType dtype;  // of both images: F32 or BF16
};

// Resizing along both axes by tables: output row y is (1 - row_weight[y]) * x[row_low[y]] + row_weight[y] *
// x[row_high[y]], columns alike. Null weights: the nearest, row_low and column_low.
struct ResizeArgs {
    const float* x;
    float* out;
    const int32_t *row_low, *row_high, *column_low, *column_high;
    const float *row_weight, *column_weight;
    int64_t images, channels, out_height, out_width;
    int64_t x_pixel, x_row, x_image;
    int64_t out_pixel, out_row, out_image;
};

}  // namespace trine
