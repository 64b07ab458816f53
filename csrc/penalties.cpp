// Penalties on the logits of the tokens that sequences hold, and the counts of these tokens. Scalar: they are few.
#include "runtime.h"

namespace trine {

void penalise(const PenaltyArgs& args, float* logits, const int64_t* lines, int64_t size, int64_t stride) {
    for (int64_t i = 0; i < args.count; ++i) {
        const int64_t row = args.rows[i];
        const float repetition = args.strengths[row * 3], presence = args.strengths[row * 3 + 1],
                    frequency = args.strengths[row * 3 + 2];
        float* x = logits + lines[i] * stride;
        for (int64_t entry = row * args.capacity; entry < row * args.capacity + args.sizes[row]; ++entry) {
            const int64_t id = args.ids[entry];
            if (id < 0 || id >= size) continue;
            const float occurrences = args.occurrences[entry];
            const float repeated = x[id] > 0 ? x[id] / repetition : x[id] * repetition;
            x[id] = repeated - (occurrences > 0 ? presence : 0.0f) - frequency * occurrences;
        }
    }
}

void count_tokens(const PenaltyArgs& args, const int64_t* tokens) {
    for (int64_t i = 0; i < args.count; ++i) {
        const int64_t row = args.rows[i], start = row * args.capacity, end = start + args.sizes[row];
        int64_t entry = start;
        while (entry < end && args.ids[entry] != tokens[i]) ++entry;
        if (entry == end) {
            args.ids[entry] = tokens[i];
            args.occurrences[entry] = 0;
            ++args.sizes[row];
        }
        args.occurrences[entry] += 1;
    }
}

}  // namespace trine
