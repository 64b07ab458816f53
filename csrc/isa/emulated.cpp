// The kernels for AMX on emulated tiles and with AVX2: slow, for testing them on any processor.
#define TRINE_ISA emulated
#define TRINE_TILES
#define TRINE_EMULATE_TILES
#include "../kernels/table.h"

namespace trine {
extern const Kernels kernels_emulated;
const Kernels kernels_emulated = emulated::table("emulated");
}  // namespace trine
