// A stack of decoder layers of the Llama kind in one call: the same kernels as one by one, without what lies between
// them. A step of a small model is hundreds of calls of a few microseconds; made from here they cost nothing, and the
// workers find the next one while they still look for work.
#include <string.h>

#include "runtime.h"

namespace trine {
namespace {

int64_t bytes_of(DType dtype) { return dtype == F32 ? 4 : 2; }

// Buffers of a forward pass, rows x columns each, cut from one piece of scratch memory.
struct Arena {
    char* next;
    char* take(int64_t bytes) {
        char* own = next;
        next += (bytes + 63) / 64 * 64;
        return own;
    }
};

struct Pass {
    const Kernels& kernels;
    const DecoderArgs& args;
    char *x, *normed, *qkv, *q, *attended, *gated, *wide;

    void linear(const Weight* weight, const void* bias, const char* from, char* to, int64_t rows, int64_t columns,
                bool silu_mul = false) const {
        kernels.linear({weight, from, bias, to, rows, columns, args.dtype, args.dtype, silu_mul, nullptr, 0, 0,
                        NO_ACTIVATION});
    }

    void norm(const char* from, char* residual, const void* weight, char* to, int64_t rows) const {
        kernels.norm({from, residual, weight, nullptr, to, rows, args.hidden, args.eps, args.dtype});
    }

    // Keeps the wanted rows of a [tokens, columns] buffer, in place: wanted rows ascend.
    void keep_rows(char* buffer, int64_t columns) const {
        const int64_t bytes = columns * bytes_of(args.dtype);
        for (int64_t i = 0; i < args.output_count; ++i)
            if (args.output_rows[i] != i) memmove(buffer + i * bytes, buffer + args.output_rows[i] * bytes, bytes);
    }

    // Attention of one layer for the normed input: into `attended`.
    void attend(const DecoderLayer& layer) const {
        linear(layer.qkv, layer.qkv_bias, normed, qkv, args.tokens, args.hidden);
        kernels.prepare_qkv({qkv, q, args.positions, args.cos_sin, layer.q_norm, layer.k_norm, layer.k_cache,
                             layer.v_cache, args.slots, args.tokens, args.heads, args.kv_heads, args.head_dim,
                             args.rotary_dim, args.block_size, args.eps, args.dtype, args.cache_dtype});
        kernels.attention({q, layer.k_cache, layer.v_cache, attended, args.query_start, args.seq_lens,
                           args.block_table, args.sequences, args.block_table_stride, args.heads, args.kv_heads,
                           args.head_dim, args.block_size, layer.window, args.scale, args.dtype, args.cache_dtype});
    }

    // Output projection and MLP; what is to be added to the residual stream is left in `x`.
    void transform(const DecoderLayer& layer, int64_t rows) const {
        linear(layer.output, layer.output_bias, attended, x, rows, args.heads * args.head_dim);
        norm(x, args.residual, layer.post_norm, normed, rows);
        const int64_t inner = layer.gate_up->n / 2;
        if (inner % PANEL == 0) {
            linear(layer.gate_up, layer.gate_up_bias, normed, gated, rows, args.hidden, true);
        } else {
            linear(layer.gate_up, layer.gate_up_bias, normed, wide, rows, args.hidden);
            kernels.silu_mul(wide, gated, rows, inner, args.dtype);
        }
        linear(layer.down, layer.down_bias, gated, x, rows, inner);
    }
};

}  // namespace

void run_decoder(const Kernels& kernels, const DecoderArgs& args) {
    const int64_t query_size = args.heads * args.head_dim, qkv_size = query_size + 2 * args.kv_heads * args.head_dim;
    const int64_t inner = args.count ? args.layers[0].gate_up->n / 2 : 0;
    const int64_t row = bytes_of(args.dtype) * args.tokens;
    const int64_t sizes[] = {args.hidden, args.hidden, qkv_size, query_size, query_size, inner,
                             inner % PANEL ? 2 * inner : 0};
    int64_t total = 0;
    for (int64_t size : sizes) total += size * row + 64;
    Arena arena{static_cast<char*>(scratch(SCRATCH_DECODER, total))};
    Pass pass{kernels, args};
    char** buffers[] = {&pass.x, &pass.normed, &pass.qkv, &pass.q, &pass.attended, &pass.gated, &pass.wide};
    for (int i = 0; i < 7; ++i) *buffers[i] = arena.take(sizes[i] * row);

    int64_t rows = args.tokens;
    for (int64_t i = 0; i < args.count; ++i) {
        const DecoderLayer& layer = args.layers[i];
        pass.norm(i == 0 ? args.residual : pass.x, i == 0 ? nullptr : args.residual, layer.input_norm, pass.normed, rows);
        pass.attend(layer);
        if (i + 1 == args.count && args.output_count >= 0) {
            // What follows the last attention is wanted for some rows only.
            pass.keep_rows(pass.attended, query_size);
            pass.keep_rows(args.residual, args.hidden);
            rows = args.output_count;
            if (rows == 0) return;
        }
        pass.transform(layer, rows);
    }
    pass.norm(pass.x, args.residual, args.final_norm, static_cast<char*>(args.out), rows);
}

}  // namespace trine
