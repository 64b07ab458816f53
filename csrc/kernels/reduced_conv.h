// Convolutions and products by matrices on 8-bit integers or bf16: the way that suits the processor and the shape.
#pragma once

#include "windows.h"
#if defined(TRINE_TILES)
#include "tile_conv.h"
#endif

namespace trine {
namespace TRINE_ISA {

static void quantized_conv(const WindowArgs& a) {
#if defined(TRINE_TILES)
    if (tiles_suit<ByteTiles>(a)) return TileConv<ByteTiles, ByteCore>(a, ByteCore(a)).run();
    windows<ByteCore>(a);
#elif defined(__AVX512F__)
    windows<ByteCore>(a);
#else
    a.fits == 1 ? windows<WordCore>(a) : windows<ByteCore>(a);
#endif
}

// -1 where the processor has no arithmetic on bf16: whoever records a tape takes float32's kernels there.
static int bf16_conv(const WindowArgs& a) {
#if defined(TRINE_TILES)
    if (tiles_suit<Bf16Tiles>(a))
        TileConv<Bf16Tiles, Bf16Core>(a, Bf16Core(a)).run();
    else
        windows<Bf16Core>(a);
    return 0;
#elif defined(__AVX512BF16__)
    windows<Bf16Core>(a);
    return 0;
#else
    return -1;
#endif
}

}  // namespace TRINE_ISA
}  // namespace trine
