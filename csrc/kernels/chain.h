// Chains of elementwise operations on broadcast operands: a small program that runs on blocks of elements, so that what
// lies between the operations stays in the first-level cache. Registers hold a block as float32 or as int64 (which
// holds every smaller integer and bool, too).
#pragma once

#include <math.h>

#include "activation.h"
#include "vec.h"

namespace trine {
namespace TRINE_ISA {

constexpr int CHAIN_DIMS = 6, CHAIN_INPUTS = 10, CHAIN_OUTPUTS = 4, CHAIN_OPS = 24, CHAIN_REGISTERS = 16;
constexpr int64_t CHAIN_BLOCK = 256;

struct ChainInput {
    const void* data;
    int64_t strides[CHAIN_DIMS];  // in elements; 0 where it is broadcast
    int32_t dtype, to;            // to: the register it is loaded into
};
struct ChainOutput {
    void* data;  // contiguous
    int32_t dtype, from;
};
struct ChainOp {
    int32_t code, to, a, b, c, reserved;
    float p, q;
    int64_t n;
};
struct ChainArgs {
    ChainInput inputs[CHAIN_INPUTS];
    ChainOutput outputs[CHAIN_OUTPUTS];
    ChainOp ops[CHAIN_OPS];
    int64_t shape[CHAIN_DIMS];  // the outermost first
    int64_t count;              // elements: the product of shape
    int64_t task;               // elements of one task, a multiple of CHAIN_BLOCK
    int32_t input_count, output_count, op_count, dims;
};

enum ChainCode : int32_t {
    // float32 → float32
    C_ADD, C_SUB, C_MUL, C_DIV, C_MIN, C_MAX, C_POW, C_PRELU,
    C_NEG, C_ABS, C_RECIPROCAL, C_SQRT, C_EXP, C_LOG, C_FLOOR, C_CEIL, C_ROUND, C_ERF, C_SIN, C_COS, C_SQUARE,
    C_ACTIVATE,      // n: Activation
    C_CLIP,          // between p and q
    C_LEAKY,         // p: slope below zero
    C_ELU,           // p
    C_HARDSIGMOID,   // p x + q, between 0 and 1
    C_SOFTPLUS, C_SOFTSIGN, C_AFFINE,  // p x + q
    C_CONST,         // p
    C_WHERE,         // c (int) ? a : b
    // float32 → int64
    C_LESS, C_LESS_EQUAL, C_EQUAL, C_TO_INT, C_TO_BOOL, C_ISNAN,
    // int64 → int64
    C_IADD, C_ISUB, C_IMUL, C_IMIN, C_IMAX, C_INEG, C_IABS, C_AND, C_OR, C_XOR, C_NOT, C_ILESS, C_ILESS_EQUAL, C_IEQUAL,
    C_IWHERE, C_ICONST, C_IBOOL, C_WRAP32,
    // int64 → float32
    C_TO_FLOAT
};

union ChainRegister {
    float f[CHAIN_BLOCK];
    int64_t i[CHAIN_BLOCK];
};

template <class F>
INLINE void map1(float* to, const float* a, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; i += W) store_upto(to + i, f(load_upto(a + i, n - i)), n - i);
}
template <class F>
INLINE void map2(float* to, const float* a, const float* b, int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, f(load(a + i), load(b + i)));
    if (i < n) store_upto(to + i, f(load_upto(a + i, n - i), load_upto(b + i, n - i)), n - i);
}
template <class F>
INLINE void each_float(float* to, const float* a, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i) to[i] = f(a[i]);
}
template <class F>
INLINE void each_int(int64_t* to, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i) to[i] = f(i);
}

static void chain_float(const ChainOp& op, float* to, const float* a, const float* b, const int64_t* c, int64_t n) {
    const vf p = set1(op.p), q = set1(op.q);
    switch (op.code) {
        case C_ADD: return map2(to, a, b, n, [](vf x, vf y) { return add(x, y); });
        case C_SUB: return map2(to, a, b, n, [](vf x, vf y) { return sub(x, y); });
        case C_MUL: return map2(to, a, b, n, [](vf x, vf y) { return mul(x, y); });
        case C_DIV: return map2(to, a, b, n, [](vf x, vf y) { return div(x, y); });
        case C_MIN: return map2(to, a, b, n, [](vf x, vf y) { return min_or_nan(x, y); });
        case C_MAX: return map2(to, a, b, n, [](vf x, vf y) { return max_or_nan(x, y); });
        case C_POW:
            for (int64_t i = 0; i < n; ++i) to[i] = powf(a[i], b[i]);
            return;
        case C_PRELU:
            for (int64_t i = 0; i < n; ++i) to[i] = a[i] < 0 ? a[i] * b[i] : a[i];
            return;
        case C_NEG: return map1(to, a, n, [](vf x) { return flip_sign(x, set1(-0.0f)); });
        case C_ABS: return map1(to, a, n, [](vf x) { return abs(x); });
        case C_RECIPROCAL: return map1(to, a, n, [](vf x) { return div(set1(1.0f), x); });
        case C_SQRT: return each_float(to, a, n, [](float x) { return __builtin_sqrtf(x); });
        case C_EXP: return map1(to, a, n, [](vf x) { return exp_any(x); });
        case C_LOG: return each_float(to, a, n, [](float x) { return logf(x); });
        case C_FLOOR: return each_float(to, a, n, [](float x) { return __builtin_floorf(x); });
        case C_CEIL: return each_float(to, a, n, [](float x) { return __builtin_ceilf(x); });
        case C_ROUND: return map1(to, a, n, [](vf x) { return round_nearest(x); });
        case C_ERF: return map1(to, a, n, [](vf x) { return erf(x); });
        case C_SIN: return each_float(to, a, n, [](float x) { return sinf(x); });
        case C_COS: return each_float(to, a, n, [](float x) { return cosf(x); });
        case C_SQUARE: return map1(to, a, n, [](vf x) { return mul(x, x); });
        case C_ACTIVATE: {
            const Activation activation = static_cast<Activation>(op.n);
            return map1(to, a, n, [&](vf x) { return activate(x, activation); });
        }
        case C_CLIP: return map1(to, a, n, [&](vf x) { return vmin(q, vmax(p, x)); });
        case C_LEAKY: return each_float(to, a, n, [&](float x) { return x < 0 ? x * op.p : x; });
        case C_ELU: return each_float(to, a, n, [&](float x) { return x < 0 ? op.p * expm1f(x) : x; });
        case C_HARDSIGMOID: return map1(to, a, n, [&](vf x) { return clamp(add(mul(p, x), q), 0.0f, 1.0f); });
        case C_SOFTPLUS:
            return each_float(to, a, n, [](float x) { return (x > 0 ? x : 0) + log1pf(expf(-fabsf(x))); });
        case C_SOFTSIGN: return map1(to, a, n, [](vf x) { return div(x, add(set1(1.0f), abs(x))); });
        case C_AFFINE: return map1(to, a, n, [&](vf x) { return add(mul(p, x), q); });
        case C_CONST: return each_float(to, to, n, [&](float) { return op.p; });
        case C_WHERE:
            for (int64_t i = 0; i < n; ++i) to[i] = c[i] ? a[i] : b[i];
            return;
    }
}

static void chain_int(const ChainOp& op, int64_t* to, const ChainRegister& ra, const ChainRegister& rb,
                      const ChainRegister& rc, int64_t n) {
    const float *fa = ra.f, *fb = rb.f;
    const int64_t *a = ra.i, *b = rb.i, *c = rc.i;
    using U = uint64_t;  // sums wrap
    switch (op.code) {
        case C_LESS: return each_int(to, n, [&](int64_t i) { return int64_t(fa[i] < fb[i]); });
        case C_LESS_EQUAL: return each_int(to, n, [&](int64_t i) { return int64_t(fa[i] <= fb[i]); });
        case C_EQUAL: return each_int(to, n, [&](int64_t i) { return int64_t(fa[i] == fb[i]); });
        case C_TO_INT: return each_int(to, n, [&](int64_t i) { return static_cast<int64_t>(fa[i]); });
        case C_TO_BOOL: return each_int(to, n, [&](int64_t i) { return int64_t(fa[i] != 0); });
        case C_ISNAN: return each_int(to, n, [&](int64_t i) { return int64_t(fa[i] != fa[i]); });
        case C_IADD: return each_int(to, n, [&](int64_t i) { return int64_t(U(a[i]) + U(b[i])); });
        case C_ISUB: return each_int(to, n, [&](int64_t i) { return int64_t(U(a[i]) - U(b[i])); });
        case C_IMUL: return each_int(to, n, [&](int64_t i) { return int64_t(U(a[i]) * U(b[i])); });
        case C_IMIN: return each_int(to, n, [&](int64_t i) { return a[i] < b[i] ? a[i] : b[i]; });
        case C_IMAX: return each_int(to, n, [&](int64_t i) { return a[i] > b[i] ? a[i] : b[i]; });
        case C_INEG: return each_int(to, n, [&](int64_t i) { return int64_t(U(0) - U(a[i])); });
        case C_IABS: return each_int(to, n, [&](int64_t i) { return a[i] < 0 ? int64_t(U(0) - U(a[i])) : a[i]; });
        case C_AND: return each_int(to, n, [&](int64_t i) { return a[i] & b[i]; });
        case C_OR: return each_int(to, n, [&](int64_t i) { return a[i] | b[i]; });
        case C_XOR: return each_int(to, n, [&](int64_t i) { return a[i] ^ b[i]; });
        case C_NOT: return each_int(to, n, [&](int64_t i) { return int64_t(a[i] == 0); });
        case C_ILESS: return each_int(to, n, [&](int64_t i) { return int64_t(a[i] < b[i]); });
        case C_ILESS_EQUAL: return each_int(to, n, [&](int64_t i) { return int64_t(a[i] <= b[i]); });
        case C_IEQUAL: return each_int(to, n, [&](int64_t i) { return int64_t(a[i] == b[i]); });
        case C_IWHERE: return each_int(to, n, [&](int64_t i) { return c[i] ? a[i] : b[i]; });
        case C_ICONST: return each_int(to, n, [&](int64_t) { return op.n; });
        case C_IBOOL: return each_int(to, n, [&](int64_t i) { return int64_t(a[i] != 0); });
        case C_WRAP32: return each_int(to, n, [&](int64_t i) { return int64_t(static_cast<int32_t>(a[i])); });
    }
}

// `count` elements of one run, `stride` apart, into a register from element `at` on.
template <class T, class R>
INLINE void load_run(R* to, const T* from, int64_t stride, int64_t count) {
    if (stride == 1)
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<R>(from[i]);
    else if (stride == 0)
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<R>(from[0]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<R>(from[i * stride]);
}

// Elements [start, start + count) of the broadcast operand, run by run of the innermost dimension.
template <class T, class R>
static void load_operand(const ChainArgs& args, const ChainInput& input, int64_t start, int64_t count, R* to) {
    int64_t index[CHAIN_DIMS], rest = start, offset = 0;
    for (int d = args.dims - 1; d >= 0; --d) {
        index[d] = rest % args.shape[d];
        rest /= args.shape[d];
        offset += index[d] * input.strides[d];
    }
    const int last = args.dims - 1;
    const int64_t inner = args.shape[last], stride = input.strides[last];
    const T* data = static_cast<const T*>(input.data);
    for (int64_t done = 0; done < count;) {
        const int64_t run = min(inner - index[last], count - done);
        load_run(to + done, data + offset, stride, run);
        done += run;
        offset += run * stride;
        index[last] += run;
        for (int d = last; d > 0 && index[d] == args.shape[d]; --d) {
            offset += input.strides[d - 1] - index[d] * input.strides[d];
            index[d] = 0;
            ++index[d - 1];
        }
    }
}

static void load_any(const ChainArgs& args, const ChainInput& input, int64_t start, int64_t count, ChainRegister& to) {
    switch (input.dtype) {
        case F32: return load_operand<float>(args, input, start, count, to.f);
        case INT8: return load_operand<int8_t>(args, input, start, count, to.i);
        case UINT8: return load_operand<uint8_t>(args, input, start, count, to.i);
        case INT32: return load_operand<int32_t>(args, input, start, count, to.i);
        case INT64: return load_operand<int64_t>(args, input, start, count, to.i);
    }
}

// An operand of one element, all over a register.
static void load_single(const ChainInput& input, ChainRegister& to) {
    switch (input.dtype) {
        case F32: return load_run(to.f, static_cast<const float*>(input.data), 0, CHAIN_BLOCK);
        case INT8: return load_run(to.i, static_cast<const int8_t*>(input.data), 0, CHAIN_BLOCK);
        case UINT8: return load_run(to.i, static_cast<const uint8_t*>(input.data), 0, CHAIN_BLOCK);
        case INT32: return load_run(to.i, static_cast<const int32_t*>(input.data), 0, CHAIN_BLOCK);
        case INT64: return load_run(to.i, static_cast<const int64_t*>(input.data), 0, CHAIN_BLOCK);
    }
}

static void store_any(const ChainOutput& output, int64_t start, int64_t count, const ChainRegister& from) {
    switch (output.dtype) {
        case F32: memcpy(static_cast<float*>(output.data) + start, from.f, count * sizeof(float)); return;
        case INT8:
        case UINT8:
            for (int64_t i = 0; i < count; ++i)
                static_cast<uint8_t*>(output.data)[start + i] = static_cast<uint8_t>(from.i[i]);
            return;
        case INT32:
            for (int64_t i = 0; i < count; ++i)
                static_cast<int32_t*>(output.data)[start + i] = static_cast<int32_t>(from.i[i]);
            return;
        case INT64: memcpy(static_cast<int64_t*>(output.data) + start, from.i, count * sizeof(int64_t)); return;
    }
}

INLINE bool is_contiguous(const ChainArgs& args, const ChainInput& input) {
    return args.dims == 1 && input.strides[0] == 1 && input.dtype == F32;
}
INLINE bool is_single(const ChainArgs& args, const ChainInput& input) {
    for (int d = 0; d < args.dims; ++d)
        if (input.strides[d] != 0 && args.shape[d] != 1) return false;
    return true;
}

// Elements [first, end). An operand that lies as the result does is read where it is, and the last operation writes where
// the result belongs: a chain of one operation moves nothing twice. (Only the last, so that a result may lie on an
// operand.)
static void chain_task(const ChainArgs& args, int64_t first, int64_t end) {
    ChainRegister memory[CHAIN_REGISTERS];
    const ChainRegister* place[CHAIN_REGISTERS];
    for (int r = 0; r < CHAIN_REGISTERS; ++r) place[r] = &memory[r];
    for (int k = 0; k < args.input_count; ++k)
        if (is_single(args, args.inputs[k])) load_single(args.inputs[k], memory[args.inputs[k].to]);
    const ChainOutput& result = args.outputs[args.output_count - 1];
    const bool direct = args.op_count && args.ops[args.op_count - 1].to == result.from && result.dtype == F32;
    for (int64_t start = first; start < end; start += CHAIN_BLOCK) {
        const int64_t count = min(CHAIN_BLOCK, end - start);
        for (int k = 0; k < args.input_count; ++k) {
            const ChainInput& input = args.inputs[k];
            if (is_single(args, input)) continue;
            place[input.to] = &memory[input.to];
            if (is_contiguous(args, input))
                place[input.to] = reinterpret_cast<const ChainRegister*>(static_cast<const float*>(input.data) + start);
            else
                load_any(args, input, start, count, memory[input.to]);
        }
        for (int k = 0; k < args.op_count; ++k) {
            const ChainOp& op = args.ops[k];
            const ChainRegister &a = *place[op.a], &b = *place[op.b], &c = *place[op.c];
            const bool last = direct && k == args.op_count - 1;
            float* const to = last ? static_cast<float*>(result.data) + start : memory[op.to].f;
            if (op.code == C_TO_FLOAT)
                for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(a.i[i]);
            else if (op.code >= C_LESS)
                chain_int(op, memory[op.to].i, a, b, c, count);
            else
                chain_float(op, to, a.f, b.f, c.i, count);
            place[op.to] = &memory[op.to];
        }
        for (int k = 0; k < args.output_count - (direct ? 1 : 0); ++k)
            store_any(args.outputs[k], start, count, *place[args.outputs[k].from]);
    }
}

static void chain(const ChainArgs& args) {
    if (args.count <= args.task)
        chain_task(args, 0, args.count);
    else
        parallel(ceil_div(args.count, args.task),
                 [&](int64_t i) { chain_task(args, i * args.task, min(args.count, (i + 1) * args.task)); });
}

}  // namespace TRINE_ISA
}  // namespace trine
