// The library's C interface, and the choice of a build of the kernels for this processor.
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime.h"
#include "tape.h"

namespace trine {

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#if !defined(TRINE_NO_AMX)
extern const Kernels kernels_amx;
#endif
extern const Kernels kernels_emulated;

namespace {

bool bit(unsigned word, int index) { return word >> index & 1; }

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};

// CPUID leaves 1 and 7, and what the operating system saves of the vector and tile registers (XCR0).
Features detect() {
    Features f;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return f;
    const bool fma = bit(c, 12), f16c = bit(c, 29);
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    f.avx2 = fma && f16c && bit(b, 5) && bit(b, 3) && bit(b, 8);  // with BMI 1 and 2
    const bool zmm = (xcr0 & 0xe6) == 0xe6;
    f.avx512 = f.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);  // F DQ BW VL VNNI
    const bool tiles = bit(d, 22) && bit(d, 24) && bit(d, 25) && (xcr0 & 0x60000) == 0x60000;        // BF16, TILE, INT8
    if (f.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = bit(a, 5);
    // Linux hands out the tile registers on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    f.amx = tiles && f.avx512_bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return f;
}

const Kernels* find(const char* name) {
    static const Features features = detect();
#if !defined(TRINE_NO_AMX)
    if (features.amx && !strcmp(name, "amx")) return &kernels_amx;
#endif
    if (features.avx512_bf16 && !strcmp(name, "avx512_bf16")) return &kernels_avx512_bf16;
    if (features.avx512 && !strcmp(name, "avx512")) return &kernels_avx512;
    if (features.avx2 && !strcmp(name, "avx2")) return &kernels_avx2;
    if (features.avx2 && !strcmp(name, "emulated")) return &kernels_emulated;
    return nullptr;
}

const Kernels* choose() {
    static const char* const names[] = {"amx", "avx512_bf16", "avx512", "avx2"};
    for (const char* name : names)
        if (const Kernels* found = find(name)) return found;
    return nullptr;
}

const Kernels* kernels = choose();

}  // namespace
}  // namespace trine

using namespace trine;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int trine_version() { return 1; }
EXPORT const char* trine_isa() { return kernels ? kernels->name : nullptr; }
// For tests: 0 when this processor can run the build `name`.
EXPORT int trine_set_isa(const char* name) {
    const Kernels* found = find(name);
    if (found) kernels = found;
    return found ? 0 : -1;
}
EXPORT void trine_set_num_threads(int count) { set_num_threads(count); }
EXPORT int trine_num_threads() { return num_threads(); }

EXPORT Weight* trine_weight_new(int64_t n, int64_t k, int dtype, int64_t group) {
    return new_weight(n, k, static_cast<DType>(dtype), group);
}
EXPORT void trine_weight_delete(Weight* weight) { delete_weight(weight); }
EXPORT void trine_weight_pack(const Weight* weight, const void* source, int dtype) {
    pack_weight(*weight, source, static_cast<DType>(dtype));
}
EXPORT int64_t trine_weight_bytes(const Weight* weight) { return weight->data_bytes + weight->scale_bytes; }

EXPORT void trine_linear(const Weight* weight, const void* x, const void* bias, void* out, int64_t rows,
                         int64_t x_stride, int x_dtype, int out_dtype, int silu_mul) {
    kernels->linear({weight, x, bias, out, rows, x_stride, static_cast<DType>(x_dtype), static_cast<DType>(out_dtype),
                     silu_mul != 0, nullptr, 0, 0, NO_ACTIVATION});
}
// -1 and nothing done when an id is not a row of the weight.
EXPORT int trine_embedding(const Weight* weight, const int64_t* ids, void* out, int64_t rows, int out_dtype) {
    for (int64_t i = 0; i < rows; ++i)
        if (ids[i] < 0 || ids[i] >= weight->n) return -1;
    kernels->embedding(*weight, ids, out, rows, static_cast<DType>(out_dtype));
    return 0;
}
EXPORT void trine_norm(const void* x, void* residual, const void* weight, const void* bias, void* y, int64_t rows,
                       int64_t size, float eps, int dtype) {
    kernels->norm({x, residual, weight, bias, y, rows, size, eps, static_cast<DType>(dtype)});
}
EXPORT void trine_silu_mul(const void* gate_up, void* y, int64_t rows, int64_t size, int dtype) {
    kernels->silu_mul(gate_up, y, rows, size, static_cast<DType>(dtype));
}
EXPORT void trine_gelu(const void* x, void* y, int64_t count, int approximate, int dtype) {
    kernels->gelu(x, y, count, approximate != 0, static_cast<DType>(dtype));
}
EXPORT void trine_sample(const float* x, const void* params, int64_t* out, int64_t rows, int64_t size, int64_t stride) {
    kernels->sample(x, static_cast<const SampleParams*>(params), out, rows, size, stride);
}
EXPORT void trine_score(const float* x, const int64_t* targets, float* largest, double* total, int64_t* rank,
                        int64_t* top_ids, int64_t k, int64_t rows, int64_t size, int64_t stride) {
    kernels->score({x, targets, largest, total, rank, top_ids, k, rows, size, stride});
}
EXPORT void trine_penalise(int64_t* ids, float* occurrences, int64_t* sizes, const float* strengths,
                           const int64_t* rows, int64_t count, int64_t capacity, float* logits, const int64_t* lines,
                           int64_t size, int64_t stride) {
    penalise({ids, occurrences, sizes, strengths, rows, count, capacity}, logits, lines, size, stride);
}
EXPORT void trine_count_tokens(int64_t* ids, float* occurrences, int64_t* sizes, const float* strengths,
                               const int64_t* rows, int64_t count, int64_t capacity, const int64_t* tokens) {
    count_tokens({ids, occurrences, sizes, strengths, rows, count, capacity}, tokens);
}
EXPORT float trine_probe_read(const void* memory, int64_t bytes) { return kernels->probe_read(memory, bytes); }
// Returns the floating-point operations of one task of `steps` steps.
EXPORT int64_t trine_probe_fma(int64_t tasks, int64_t steps) {
    kernels->probe_fma(tasks, steps);
    return int64_t(2) * 12 * kernels->vector_width * steps;
}
EXPORT void trine_prepare_qkv(const void* qkv, void* q, const int64_t* positions, const float* cos_sin,
                              const void* q_norm, const void* k_norm, void* k_cache, void* v_cache,
                              const int64_t* slots, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                              int64_t rotary_dim, int64_t block_size, float eps, int dtype, int cache_dtype) {
    kernels->prepare_qkv({qkv, q, positions, cos_sin, q_norm, k_norm, k_cache, v_cache, slots, tokens, heads, kv_heads,
                          head_dim, rotary_dim, block_size, eps, static_cast<DType>(dtype),
                          static_cast<DType>(cache_dtype)});
}
EXPORT void trine_attention(const void* q, const void* k_cache, const void* v_cache, void* out,
                            const int32_t* query_start, const int32_t* seq_lens, const int32_t* block_table,
                            int64_t sequences, int64_t block_table_stride, int64_t heads, int64_t kv_heads,
                            int64_t head_dim, int64_t block_size, int64_t window, float scale, int dtype,
                            int cache_dtype) {
    kernels->attention({q, k_cache, v_cache, out, query_start, seq_lens, block_table, sequences, block_table_stride,
                        heads, kv_heads, head_dim, block_size, window, scale, static_cast<DType>(dtype),
                        static_cast<DType>(cache_dtype)});
}
// `args` is a DecoderArgs, laid out as trine/kernels/cpu/decoder.py has it.
EXPORT void trine_decoder(const DecoderArgs* args) { run_decoder(*kernels, *args); }
// The kernel of a tape's steps by its name: its number in this build, or -1. `bytes` becomes the size of its arguments.
EXPORT int trine_step_find(const char* name, int64_t* bytes) {
    for (int i = 0; kernels && i < kernels->step_count; ++i)
        if (!strcmp(kernels->steps[i].name, name)) {
            *bytes = kernels->steps[i].bytes;
            return i;
        }
    return -1;
}
// -1, or the step that failed; laid out as trine/graph/native/tape.py has it. `times`: null, or nanoseconds of each step.
EXPORT int64_t trine_tape_run(const Tape* tape, int64_t first, int64_t end, char* args, char* const* bases,
                              int64_t* times) {
    return run_tape(*kernels, *tape, first, end, args, bases, times);
}
EXPORT void* trine_pages_new(int64_t bytes) { return allocate_pages(static_cast<size_t>(bytes)); }
EXPORT void trine_pages_delete(void* pages, int64_t bytes) { free_pages(pages, static_cast<size_t>(bytes)); }
