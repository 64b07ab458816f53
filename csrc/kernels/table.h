// The table of one build's kernels. Included last by isa/*.cpp, each compiled for its own instruction set.
#pragma once

#if defined(TRINE_TILES)
#include "amx.h"
#endif
#include "attention.h"
#include "elementwise.h"
#include "embedding.h"
#include "int8.h"
#include "linear.h"
#include "prepare_qkv.h"
#include "probe.h"
#include "sampling.h"
#include "steps.h"

namespace trine {
namespace TRINE_ISA {

static void linear(const LinearArgs& args) {
#if defined(TRINE_TILES)
    if (args.weight->dtype == INT8) return linear_amx_int8(args);
    if (args.weight->dtype == BF16) return linear_amx(args);
#endif
    if (args.weight->dtype == INT8) return linear_int8(args);
    linear_float(args);
}

static constexpr Kernels table(const char* name) {
    return Kernels{name,      linear,    norm,   silu_mul,   gelu,      prepare_qkv,
                   attention, embedding, sample, score,      probe_read, probe_fma, W,
                   STEPS,     sizeof(STEPS) / sizeof(STEPS[0])};
}

}  // namespace TRINE_ISA
}  // namespace trine
