// Kernels for processors with AVX-512 BF16 on top (Cooper Lake, Zen 4 and later).
#define TRINE_ISA avx512_bf16
#include "../kernels/table.h"

namespace trine {
extern const Kernels kernels_avx512_bf16;
const Kernels kernels_avx512_bf16 = avx512_bf16::table("avx512_bf16");
}  // namespace trine
