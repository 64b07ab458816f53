// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes. With TRINE_EMULATE_TILES they are plain
// memory, so that the code on top of them can be tested on a processor without AMX.
#pragma once

#include "vec.h"

namespace trine {
namespace TRINE_ISA {

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t count, int64_t bytes = 64) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = count ? static_cast<uint16_t>(bytes) : 0;
    }
};

#if defined(TRINE_EMULATE_TILES)

struct Tiles {
    int32_t value[8][16][16];
    uint8_t rows[8];
    uint16_t row_bytes[8];
};
static __thread Tiles tiles;

INLINE void tile_configure(const TileConfig& config) {
    memcpy(tiles.rows, config.rows, 8);
    memcpy(tiles.row_bytes, config.row_bytes, sizeof(tiles.row_bytes));
}
INLINE void tile_release() {}
template <int T>
INLINE void tile_zero() {
    memset(tiles.value[T], 0, sizeof(tiles.value[T]));
}
template <int T>
INLINE void tile_load(const void* p, int64_t stride) {
    for (int r = 0; r < tiles.rows[T]; ++r)
        memcpy(tiles.value[T][r], static_cast<const char*>(p) + r * stride, tiles.row_bytes[T]);
}
template <int T>
INLINE void tile_store(void* p, int64_t stride) {
    for (int r = 0; r < tiles.rows[T]; ++r)
        memcpy(static_cast<char*>(p) + r * stride, tiles.value[T][r], tiles.row_bytes[T]);
}
template <int C, int A, int B>
INLINE void tile_dot_bf16() {
    for (int m = 0; m < tiles.rows[A]; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum;
            memcpy(&sum, &tiles.value[C][m][n], 4);
            for (int k = 0; k < tiles.row_bytes[A] / 4; ++k)
                for (int half = 0; half < 2; ++half) {
                    const bf16 a{static_cast<uint16_t>(tiles.value[A][m][k] >> (16 * half))};
                    const bf16 b{static_cast<uint16_t>(tiles.value[B][k][n] >> (16 * half))};
                    sum += scalar(&a) * scalar(&b);
                }
            memcpy(&tiles.value[C][m][n], &sum, 4);
        }
}
template <int C, int A, int B, class Left>
INLINE void tile_dot_bytes() {
    for (int m = 0; m < tiles.rows[A]; ++m)
        for (int n = 0; n < 16; ++n)
            for (int k = 0; k < tiles.row_bytes[A]; ++k)
                tiles.value[C][m][n] += reinterpret_cast<const Left*>(tiles.value[A][m])[k] *
                                        reinterpret_cast<const int8_t*>(tiles.value[B][k / 4])[n * 4 + k % 4];
}
template <int C, int A, int B>
INLINE void tile_dot_signed() {
    tile_dot_bytes<C, A, B, int8_t>();
}
template <int C, int A, int B>
INLINE void tile_dot_unsigned() {  // A unsigned, B signed
    tile_dot_bytes<C, A, B, uint8_t>();
}

#else

INLINE void tile_configure(const TileConfig& config) { _tile_loadconfig(&config); }
INLINE void tile_release() { _tile_release(); }
template <int T>
INLINE void tile_zero() {
    _tile_zero(T);
}
template <int T>
INLINE void tile_load(const void* p, int64_t stride) {
    _tile_loadd(T, p, stride);
}
template <int T>
INLINE void tile_store(void* p, int64_t stride) {
    _tile_stored(T, p, stride);
}
template <int C, int A, int B>
INLINE void tile_dot_bf16() {
    _tile_dpbf16ps(C, A, B);
}
template <int C, int A, int B>
INLINE void tile_dot_signed() {
    _tile_dpbssd(C, A, B);
}
template <int C, int A, int B>
INLINE void tile_dot_unsigned() {  // A unsigned, B signed
    _tile_dpbusd(C, A, B);
}

#endif

}  // namespace TRINE_ISA
}  // namespace trine
