// What the kernels on 8-bit integers are given: plain data, the same for all instruction sets.
#pragma once

#include "../runtime.h"

namespace trine {

// How sums become results: y = activation(sum * scale + bias + residual) * columns, as float32, or rounded to 8 bits.
// With `in_steps` all of it counts in steps of the result, residual_zero is in the bias, out_inverse in the scales, and
// instead of an activation results are held to [low, high]: results and residuals are bytes, without columns.
struct Finish {
    const float* scale;    // [groups][panels * 16] or null: 1
    const float* bias;     // as scale, or null
    const float* columns;  // as scale, or null: what each column is multiplied by at last
    const void* residual;  // rows like the result's, or null
    void* out;
    int64_t out_stride, residual_stride;  // elements from row to row
    DType out_dtype, residual_dtype;      // F32, BF16, UINT8, INT8
    int32_t out_zero, residual_zero;
    float out_inverse, residual_scale;  // 1 / scale of the result, scale of the residual
    Activation activation;
    int32_t in_steps, low, high;
};

// out = finish(conv(x - x_zero, weight)): images with their channels innermost, results as rows of pixels. A product by
// a matrix is a convolution by 1 x 1 over one line of pixels. `channels` and `filters` are those of one group.
//
// weight: [groups][panels][k in steps][16][step], the last panel filled up with zeros, k = (y, x, channel) padded with
// zeros to `depth`. int8: steps of 4, or of 2 where `fits` is 1; bf16: of 2. `fits` says what AVX2 may add in 16 bits: 2,
// two neighbours' products with bytes; 4, those of a step and of the next one, too (`depth` is a multiple of 8); 1, none.
// shares [groups][panels * 16]: the zero point times each filter's sum of weights, taken away.
// Depthwise (channels and filters are 1, groups the channels): see depthwise8.h. Missing channels and steps between lines
// are for tiles (tile_conv.h).
struct WindowArgs {
    const void* x;
    const void* weight;
    const int32_t* shares;
    Finish finish;
    int64_t images, groups, channels, filters, depth;
    int64_t height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    int64_t x_pixel, x_row, x_image;
    int64_t x_channels;  // 0: all; else those that x has of the four `channels`
    int64_t x_channel;   // then elements from one to the next: 1 for bytes, planes of bf16
    int64_t out_step;    // lines of the result from one written to the next; 0: 1
    DType x_dtype;
    int32_t x_zero;
    int32_t fits;
};

// The greatest byte of each window; padding never is.
struct BytePoolArgs {
    const void* x;
    void* out;
    int64_t images, channels, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    DType dtype;
};

// out[image][channel] = finish(sum over the pixels of (x - x_zero)).
struct ByteMeanArgs {
    const void* x;
    Finish finish;
    int64_t images, pixels, channels;
    DType x_dtype;
    int32_t x_zero;
};

// count elements: y = round(x / scale) + zero, or back. Images [channels][pixels] with `channels` > 0 come out with the
// channels innermost.
struct QuantizeArgs {
    const void* x;
    void* y;
    int64_t count;
    int64_t channels, pixels;
    float scale;
    int32_t zero;
    DType dtype;    // of the integers
    int32_t back;  // from integers to float32
};

// y = activation(a + b), of integers.
struct AddBytesArgs {
    const void *a, *b;
    void* y;
    int64_t count;
    float a_scale, b_scale, out_inverse;
    int32_t a_zero, b_zero, out_zero;
    DType a_dtype, b_dtype, out_dtype;
    Activation activation;
};

}  // namespace trine
