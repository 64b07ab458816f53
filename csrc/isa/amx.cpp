// Kernels for processors with AMX (Sapphire Rapids and later).
#define TRINE_ISA amx
#define TRINE_TILES
#include "../kernels/table.h"

namespace trine {
extern const Kernels kernels_amx;
const Kernels kernels_amx = amx::table("amx");
}  // namespace trine
