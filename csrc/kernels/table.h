// The table of one build's kernels. Included last by isa/*.cpp, each compiled for its own instruction set.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "embedding.h"
#include "int8.h"
#include "linear.h"
#include "prepare_qkv.h"
#include "probe.h"

namespace trine {
namespace TRINE_ISA {

static void linear(const LinearArgs& args) { args.weight->dtype == INT8 ? linear_int8(args) : linear_float(args); }

static constexpr Kernels table(const char* name) {
    return Kernels{name,      linear,    norm,   silu_mul,   gelu,      prepare_qkv,
                   attention, embedding, argmax, probe_read, probe_fma, W};
}

}  // namespace TRINE_ISA
}  // namespace trine
