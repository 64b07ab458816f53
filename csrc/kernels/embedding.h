// Rows of a packed weight: token embeddings from the table that is also the output projection.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

// One row as floats, k ascending.
INLINE void unpack_row(const Weight& w, int64_t row, float* to) {
    const char* panel = w.data + row / PANEL * w.panel_bytes;
    const int64_t column = row % PANEL;
    if (w.dtype == INT8) {
        const bf16* scales = reinterpret_cast<const bf16*>(w.scales) + row / PANEL * (w.k_padded / w.group) * PANEL;
        const int8_t* values = reinterpret_cast<const int8_t*>(panel) + column * 4;
        for (int64_t start = 0; start < w.k; start += w.group) {
            const float scale = scalar(scales + start / w.group * PANEL + column);
            for (int64_t k = start; k < min(w.k, start + w.group); ++k)
                to[k] = values[k / 4 * 4 * PANEL + k % 4] * scale;
        }
    } else if (w.dtype == BF16) {
        for (int64_t k = 0; k < w.k; ++k)
            to[k] = scalar(reinterpret_cast<const bf16*>(panel) + k / 2 * 2 * PANEL + column * 2 + k % 2);
    } else if (w.dtype == F32) {
        for (int64_t k = 0; k < w.k; ++k) to[k] = reinterpret_cast<const float*>(panel)[k * PANEL + column];
    } else {
        for (int64_t k = 0; k < w.k; ++k)
            to[k] = _cvtsh_ss(reinterpret_cast<const uint16_t*>(panel)[k * PANEL + column]);
    }
}

static void embedding(const Weight& w, const int64_t* ids, void* out, int64_t rows, DType out_dtype) {
    const auto one = [&](int64_t i) {
        float* row = static_cast<float*>(scratch(SCRATCH_ACCUMULATOR, (w.k + W) * sizeof(float)));
        unpack_row(w, ids[i], row);
        with_type(out_dtype, [&](auto type) {
            auto* y = static_cast<decltype(type)*>(out) + i * w.k;
            for (int64_t k = 0; k < w.k; k += W) store_upto(y + k, load(row + k), w.k - k);
        });
    };
    if (rows >= 8)
        parallel(rows, one);
    else
        for (int64_t i = 0; i < rows; ++i) one(i);
}

}  // namespace TRINE_ISA
}  // namespace trine
