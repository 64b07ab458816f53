// Walks a tape. Compiled for the baseline instruction set.
#include "tape.h"

#include <string.h>
#include <time.h>

namespace trine {
namespace {

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

}  // namespace

int64_t run_tape(const Kernels& kernels, const Tape& tape, int64_t first, int64_t end, char* args, char* const* bases,
                 int64_t* times) {
    for (int64_t i = 0; i < tape.pointer_count; ++i) {
        const TapePointer& pointer = tape.pointers[i];
        char* const address = bases[pointer.base] + pointer.offset;
        memcpy(args + pointer.place, &address, sizeof(address));
    }
    for (int64_t i = first; i < end; ++i) {
        const int64_t start = times ? now() : 0;
        const TapeStep& step = tape.steps[i];
        if (kernels.steps[step.kernel].run(args + step.args) != 0) return i;
        if (times) times[i] = now() - start;
    }
    return -1;
}

}  // namespace trine
