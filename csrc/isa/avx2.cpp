// Kernels for processors with AVX2, FMA and F16C (Haswell, Zen and later).
#define TRINE_ISA avx2
#include "../kernels/table.h"

namespace trine {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = avx2::table("avx2");
}  // namespace trine
