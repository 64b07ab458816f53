// What every part of the library shares: element types, packed weights, the thread pool, scratch memory.
// This header is compiled for several instruction sets, so it holds declarations and plain data only.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trine {

// Of weights and activations: the first four. Graphs move the others about, too; UINT8 stands for bool as well.
enum DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, UINT8 = 4, INT32 = 5, INT64 = 6 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// A weight [n, k] cut into panels of 16 output columns; k is padded with zeros to a multiple of `k_multiple`.
//   F32, F16  [n / 16][k][16]
//   BF16      [n / 16][k / 2][16][2]            pairs of k side by side, as vdpbf16ps and AMX read them
//   INT8      [n / 16][k / 4][16][4]            quadruples of k, and scales [n / 16][k / group][16] bf16
struct Weight {
    char* data;
    char* scales;
    int64_t n, k;         // as the model has them
    int64_t k_padded;     // a multiple of 32; INT8: of the group
    int64_t panels;       // ceil(n / 16)
    int64_t panel_bytes;  // bytes of one panel of `data`
    int64_t data_bytes, scale_bytes;
    int64_t group;  // INT8: neighbours in k that share a scale
    DType dtype;
};

constexpr int64_t PANEL = 16;

// Runs body(context, i) for every i in [0, count) on the pool and the calling thread; returns when all are done.
// Tasks are handed out one by one, so that a thread that was preempted delays its own task only.
void parallel_for(int64_t count, void (*body)(void* context, int64_t index), void* context);
int num_threads();
void set_num_threads(int count);

// 64-byte aligned memory of the calling thread, kept between calls; contents are lost when it grows.
enum ScratchSlot {
    SCRATCH_INPUT,
    SCRATCH_ACCUMULATOR,
    SCRATCH_ATTENTION,
    SCRATCH_PARTIAL,
    SCRATCH_DECODER,
    SCRATCH_TABLE,  // addresses that a convolution reads and writes
    SCRATCH_LINES,  // padded copies of rows of an image
    SCRATCH_ZEROS,  // never written to: what lies outside of an image
    SCRATCH_SLOTS
};
void* scratch(ScratchSlot slot, size_t bytes);

void* allocate_pages(size_t bytes);  // zeroed, with huge pages where the system gives them; null when out of memory
void free_pages(void* pages, size_t bytes);

// Null when out of memory.
Weight* new_weight(int64_t n, int64_t k, DType dtype, int64_t group);
void delete_weight(Weight* weight);
void pack_weight(const Weight& weight, const void* source, DType dtype);  // source [n, k], contiguous

// What a fused kernel applies last.
enum Activation : int32_t {
    NO_ACTIVATION = 0,
    RELU = 1,
    RELU6 = 2,
    SIGMOID = 3,
    TANH = 4,
    SILU = 5,
    HARDSWISH = 6,
    GELU = 7,
    GELU_TANH = 8
};

struct LinearArgs {
    const Weight* weight;
    const void* x;     // [rows, k], rows x_stride elements apart
    const void* bias;  // [n] of x's dtype, or null
    void* out;         // [rows, n], or [rows, n / 2] with silu_mul
    int64_t rows, x_stride;
    DType x_dtype, out_dtype;
    bool silu_mul;                // the first half of the columns is the gate: out = silu(gate) * up
    const void* residual;         // [rows, n] of x's dtype, or null: added before the activation
    int64_t residual_stride;      // elements from row to row
    int64_t out_stride;           // elements from row to row; 0: rows touch
    Activation activation;
};

struct NormArgs {
    const void* x;   // [rows, size]
    void* residual;  // [rows, size] or null: residual += x, and the sum is what gets normed
    const void* weight;
    const void* bias;  // null: RMS norm; else layer norm
    void* y;
    int64_t rows, size;
    float eps;
    DType dtype;
};

struct PrepareArgs {
    const void* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
    void* q;          // [tokens, heads, head_dim]
    const int64_t* positions;
    const float* cos_sin;  // [positions, rotary_dim], or null
    const void* q_norm;
    const void* k_norm;
    void* k_cache;  // [blocks, kv_heads, block_size, head_dim]
    void* v_cache;
    const int64_t* slots;
    int64_t tokens, heads, kv_heads, head_dim, rotary_dim, block_size;
    float eps;
    DType dtype, cache_dtype;
};

struct AttentionArgs {
    const void* q;  // [tokens, heads, head_dim]
    const void* k_cache;
    const void* v_cache;
    void* out;  // [tokens, heads * head_dim]
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* block_table;
    int64_t sequences, block_table_stride, heads, kv_heads, head_dim, block_size;
    int64_t window;  // positions a query sees, itself included; 0: all
    float scale;
    DType dtype, cache_dtype;
};

// How one row's token is chosen. Off: top_k 0, top_p 1, min_z (the logarithm of min_p) minus infinity.
struct SampleParams {
    double uniform;      // in [0, 1)
    double temperature;  // 0: greedy
    double top_k, top_p, min_z;
};

// Log-probabilities of rows of logits: log p(token) = logit - largest - log(total).
struct ScoreArgs {
    const float* x;          // rows of `size` logits, `stride` apart
    const int64_t* targets;  // [rows], within a row
    float* largest;          // [rows]
    double* total;           // [rows]
    int64_t* rank;           // [rows], of the target: 1 is the largest logit
    int64_t* top_ids;        // [rows, k]
    int64_t k, rows, size, stride;
};

// The distinct tokens of penalised rows: row r's are ids[r * capacity] and the sizes[r] - 1 after it.
struct PenaltyArgs {
    int64_t* ids;            // [all rows, capacity]; one entry of room is needed to count a token
    float* occurrences;      // [all rows, capacity], in the output
    int64_t* sizes;          // [all rows]
    const float* strengths;  // [all rows, 3]: repetition, presence and frequency penalty
    const int64_t* rows;     // [count], those to work on
    int64_t count, capacity;
};
void penalise(const PenaltyArgs& args, float* logits, const int64_t* lines, int64_t size, int64_t stride);
void count_tokens(const PenaltyArgs& args, const int64_t* tokens);

// A kernel that a tape can run (csrc/tape.h): it takes its arguments as one struct of `bytes` bytes, and gives 0, or -1
// when what it read (an index) was out of range.
struct StepKernel {
    const char* name;
    int (*run)(const void* args);
    int64_t bytes;
};

// One build of the kernels. Null entries don't exist: each build has them all.
struct Kernels {
    const char* name;
    void (*linear)(const LinearArgs&);
    void (*norm)(const NormArgs&);
    void (*silu_mul)(const void* gate_up, void* y, int64_t rows, int64_t size, DType dtype);
    void (*gelu)(const void* x, void* y, int64_t count, bool tanh, DType dtype);
    void (*prepare_qkv)(const PrepareArgs&);
    void (*attention)(const AttentionArgs&);
    void (*embedding)(const Weight&, const int64_t* ids, void* out, int64_t rows, DType out_dtype);
    void (*sample)(const float* x, const SampleParams* params, int64_t* out, int64_t rows, int64_t size,
                   int64_t stride);
    void (*score)(const ScoreArgs&);
    float (*probe_read)(const void* memory, int64_t bytes);
    float (*probe_fma)(int64_t tasks, int64_t steps);
    int vector_width;
    const StepKernel* steps;
    int step_count;
};

// One layer of a decoder of the Llama kind. Null: no such bias, no norm of heads.
struct DecoderLayer {
    const Weight *qkv, *output, *gate_up, *down;
    const void *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
    const void *input_norm, *post_norm, *q_norm, *k_norm;
    void *k_cache, *v_cache;
    int64_t window;
};

struct DecoderArgs {
    const DecoderLayer* layers;
    int64_t count;
    const void* final_norm;
    char* residual;  // [tokens, hidden]: the embeddings; overwritten
    void* out;       // [tokens, hidden], or [output_count, hidden]: the last layer's normed hidden states
    const int64_t* output_rows;  // ascending
    int64_t output_count;        // -1: all rows
    const int64_t* positions;
    const int64_t* slots;
    const float* cos_sin;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* block_table;
    int64_t tokens, sequences, block_table_stride, hidden, heads, kv_heads, head_dim, rotary_dim, block_size;
    float eps, scale;
    DType dtype, cache_dtype;
};

void run_decoder(const Kernels& kernels, const DecoderArgs& args);

}  // namespace trine
