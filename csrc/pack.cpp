// Cutting weights into panels, and back. Runs once at load time.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

namespace trine {
namespace {

float widen(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

float half_to_float(uint16_t h) {
    const uint32_t magnitude = h & 0x7fff;
    uint32_t bits = magnitude << 13;
    float x;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;  // exponent bias 127 - 15; subnormals come out right as well
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000 | magnitude << 13;
        memcpy(&x, &bits, 4);
    }
    return h & 0x8000 ? -x : x;
}

float element(const void* source, DType dtype, int64_t i) {
    if (dtype == F32) return static_cast<const float*>(source)[i];
    const uint16_t bits = static_cast<const uint16_t*>(source)[i];
    return dtype == BF16 ? widen(bits) : half_to_float(bits);
}

// The smallest bf16 that is not below x >= 0: values divided by it stay within the range of int8.
uint16_t bf16_above(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

// One panel of float elements. Its unit is a Word: an element, or a pair of bf16 neighbours in k; words of k follow one
// another, each with its 16 columns side by side. Sixteen words of a row at a time stay in the cache while they wait
// for the other rows.
template <class Word>
void pack_panel(const Weight& w, const char* source, int64_t panel, int64_t element_bytes) {
    Word* to = reinterpret_cast<Word*>(w.data + panel * w.panel_bytes);
    const int64_t columns = w.n - panel * PANEL < PANEL ? w.n - panel * PANEL : PANEL;
    const int64_t row_bytes = w.k * element_bytes, words = row_bytes / sizeof(Word), rest = row_bytes % sizeof(Word);
    const char* rows = source + panel * PANEL * row_bytes;
    for (int64_t start = 0; start < words; start += 16) {
        const int64_t end = start + 16 < words ? start + 16 : words;
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t i = start; i < end; ++i)
                memcpy(to + i * PANEL + c, rows + c * row_bytes + i * sizeof(Word), sizeof(Word));
    }
    for (int64_t c = 0; c < columns && rest; ++c)
        memcpy(to + words * PANEL + c, rows + c * row_bytes + words * sizeof(Word), rest);
}

void pack_int8_panel(const Weight& w, const void* source, DType dtype, int64_t panel) {
    int8_t* to = reinterpret_cast<int8_t*>(w.data + panel * w.panel_bytes);
    const int64_t groups = w.k_padded / w.group;
    uint16_t* scales = reinterpret_cast<uint16_t*>(w.scales) + panel * groups * PANEL;
    for (int64_t c = 0; c < PANEL && panel * PANEL + c < w.n; ++c) {
        const int64_t row = (panel * PANEL + c) * w.k;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t start = g * w.group, end = start + w.group < w.k ? start + w.group : w.k;
            float largest = 0;
            for (int64_t k = start; k < end; ++k) largest = fmaxf(largest, fabsf(element(source, dtype, row + k)));
            const uint16_t scale = bf16_above(largest / 127);
            scales[g * PANEL + c] = scale;
            const float inverse = largest > 0 ? 1 / widen(scale) : 0;
            for (int64_t k = start; k < end; ++k) {
                const float q = nearbyintf(element(source, dtype, row + k) * inverse);
                to[k / 4 * 4 * PANEL + c * 4 + k % 4] = static_cast<int8_t>(fminf(fmaxf(q, -127), 127));
            }
        }
    }
}

struct PackJob {
    const Weight& weight;
    const void* source;
    DType dtype;
};

void pack_one(void* context, int64_t panel) {
    const PackJob& job = *static_cast<PackJob*>(context);
    if (job.weight.dtype == INT8)
        pack_int8_panel(job.weight, job.source, job.dtype, panel);
    else if (job.weight.dtype == F16)
        pack_panel<uint16_t>(job.weight, static_cast<const char*>(job.source), panel, 2);
    else
        pack_panel<uint32_t>(job.weight, static_cast<const char*>(job.source), panel, job.weight.dtype == BF16 ? 2 : 4);
}

}  // namespace

Weight* new_weight(int64_t n, int64_t k, DType dtype, int64_t group) {
    Weight* w = static_cast<Weight*>(calloc(1, sizeof(Weight)));
    if (!w) return nullptr;
    w->n = n;
    w->k = k;
    w->dtype = dtype;
    w->group = dtype == INT8 ? group : 0;
    const int64_t multiple = dtype == INT8 ? group : 32;
    w->k_padded = (k + multiple - 1) / multiple * multiple;
    w->panels = (n + PANEL - 1) / PANEL;
    w->panel_bytes = w->k_padded * PANEL * (dtype == F32 ? 4 : dtype == INT8 ? 1 : 2);
    w->data_bytes = w->panels * w->panel_bytes;
    w->scale_bytes = dtype == INT8 ? w->panels * (w->k_padded / group) * PANEL * 2 : 0;
    w->data = static_cast<char*>(allocate_pages(w->data_bytes));
    w->scales = w->scale_bytes ? static_cast<char*>(allocate_pages(w->scale_bytes)) : nullptr;
    if (w->data && (w->scales || !w->scale_bytes)) return w;
    delete_weight(w);
    return nullptr;
}

void delete_weight(Weight* w) {
    free_pages(w->data, w->data_bytes);
    free_pages(w->scales, w->scale_bytes);
    free(w);
}

void pack_weight(const Weight& weight, const void* source, DType dtype) {
    PackJob job{weight, source, dtype};
    parallel_for(weight.panels, pack_one, &job);
}

}  // namespace trine
