// The kernels that a tape can run. One line each: the function, which takes one struct of arguments, and that struct. The
// function's name is how trine/graph/native knows it.
#pragma once

#include "chain.h"
#include "conv.h"
#include "copy.h"
#include "depthwise.h"
#include "depthwise8.h"
#include "gather.h"
#include "matmul.h"
#include "pooling.h"
#include "reduced_conv.h"
#include "rows.h"
#if defined(TRINE_TILES)
#include "tile_attention.h"
#endif
#include "winograd.h"

namespace trine {
namespace TRINE_ISA {

static void linear(const LinearArgs& args);

// -1 where there are no tiles.
static int bf16_attention(const GraphAttentionArgs& args) {
#if defined(TRINE_TILES)
    const TileAttention attention(args);
    parallel(args.batch * args.heads * attention.parts, [&](int64_t task) { attention.run(task); });
    return 0;
#else
    return -1;
#endif
}

template <class Args>
INLINE int as_result(void (*kernel)(const Args&), const Args& args) {
    kernel(args);
    return 0;
}
template <class Args>
INLINE int as_result(int (*kernel)(const Args&), const Args& args) {
    return kernel(args);
}

#define TRINE_STEP(function, Args)                                                                      \
    StepKernel {                                                                                        \
        #function, [](const void* args) { return as_result(function, *static_cast<const Args*>(args)); }, sizeof(Args) \
    }

static constexpr StepKernel STEPS[] = {
    TRINE_STEP(linear, LinearArgs),
    TRINE_STEP(chain, ChainArgs),
    TRINE_STEP(copy, CopyArgs),
    TRINE_STEP(softmax, SoftmaxArgs),
    TRINE_STEP(row_norm, RowNormArgs),
    TRINE_STEP(group_norm, GroupNormArgs),
    TRINE_STEP(reduce, ReduceArgs),
    TRINE_STEP(gather, GatherArgs),
    TRINE_STEP(matmul, MatmulArgs),
    TRINE_STEP(graph_attention, GraphAttentionArgs),
    TRINE_STEP(bf16_attention, GraphAttentionArgs),
    TRINE_STEP(quantized_conv, WindowArgs),
    TRINE_STEP(bf16_conv, WindowArgs),
    TRINE_STEP(depthwise8, WindowArgs),
    TRINE_STEP(quantize, QuantizeArgs),
    TRINE_STEP(add_bytes, AddBytesArgs),
    TRINE_STEP(max_pool_bytes, BytePoolArgs),
    TRINE_STEP(mean_bytes, ByteMeanArgs),
    TRINE_STEP(conv, ConvArgs),
    TRINE_STEP(winograd2, ConvArgs),
    TRINE_STEP(winograd4, ConvArgs),
    TRINE_STEP(depthwise, ConvArgs),
    TRINE_STEP(pool, PoolArgs),
    TRINE_STEP(resize, ResizeArgs),
};

}  // namespace TRINE_ISA
}  // namespace trine
