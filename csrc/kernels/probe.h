// What this machine can do: the yardsticks that bench/kernels_cpu.py measures the kernels against.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

// Reads `bytes` (a multiple of 64 KiB per task) once, on all threads. The sum keeps the compiler honest.
static float probe_read(const void* memory, int64_t bytes) {
    constexpr int64_t block = 256 * 1024;
    float result = 0;
    parallel(bytes / block, [&](int64_t task) {
        const char* p = static_cast<const char*>(memory) + task * block;
        vf sum[4] = {zero(), zero(), zero(), zero()};
        for (int64_t i = 0; i < block; i += 16 * W) {
            __builtin_prefetch(p + i + 2048);
            __builtin_prefetch(p + i + 2048 + 64);
            UNROLL
            for (int j = 0; j < 4; ++j) sum[j] = vmax(sum[j], as_float(loadi(p + i + j * 4 * W)));
        }
        const float largest = hmax(vmax(vmax(sum[0], sum[1]), vmax(sum[2], sum[3])));
        if (largest == 1.0f) result = largest;
    });
    return result;
}

// 2 * W * 12 * `steps` floating-point operations in each of `tasks` tasks: multiply-adds out of registers.
static float probe_fma(int64_t tasks, int64_t steps) {
    float result = 0;
    parallel(tasks, [&](int64_t task) {
        vf sum[12];
        for (int j = 0; j < 12; ++j) sum[j] = set1(float(j + task));
        const vf a = set1(0.999f), b = set1(0.001f);
        for (int64_t i = 0; i < steps; ++i) UNROLL
        for (int j = 0; j < 12; ++j) sum[j] = fma(sum[j], a, b);
        for (int j = 1; j < 12; ++j) sum[0] = add(sum[0], sum[j]);
        if (hsum(sum[0]) == 1.0f) result = 1;
    });
    return result;
}

}  // namespace TRINE_ISA
}  // namespace trine
