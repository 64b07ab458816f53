// Rows picked by number.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

struct GatherArgs {
    const char* x;        // [outer, size, row_bytes], contiguous
    const void* indices;  // [count], int32 or int64; negative ones count from the end
    char* y;              // [outer, count, row_bytes]
    int64_t outer, size, row_bytes, count;
    int64_t wide;  // 1: int64
};

// -1 when an index is out of range.
static int gather(const GatherArgs& args) {
    const auto index = [&](int64_t i) {
        const int64_t own = args.wide ? static_cast<const int64_t*>(args.indices)[i]
                                      : static_cast<const int32_t*>(args.indices)[i];
        return own < 0 ? own + args.size : own;
    };
    for (int64_t i = 0; i < args.count; ++i)
        if (index(i) < 0 || index(i) >= args.size) return -1;
    const int64_t rows = args.outer * args.count;
    const int64_t group = max<int64_t>(1, 32 * 1024 / max<int64_t>(1, args.row_bytes));
    const auto some = [&](int64_t task) {
        for (int64_t r = task * group; r < min(rows, (task + 1) * group); ++r) {
            const char* from = args.x + (r / args.count * args.size + index(r % args.count)) * args.row_bytes;
            memcpy(args.y + r * args.row_bytes, from, args.row_bytes);
        }
    };
    if (rows * args.row_bytes < 128 * 1024)
        for (int64_t task = 0; task * group < rows; ++task) some(task);
    else
        parallel(ceil_div(rows, group), some);
    return 0;
}

}  // namespace TRINE_ISA
}  // namespace trine
