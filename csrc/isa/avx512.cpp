// Kernels for processors with AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake, Ice Lake and later).
#define TRINE_ISA avx512
#include "../kernels/table.h"

namespace trine {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = avx512::table("avx512");
}  // namespace trine
