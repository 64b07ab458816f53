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

void set_pointer(const TapePointer& pointer, char* args, char* const* bases, int64_t turn) {
    char* const address = bases[pointer.base] + pointer.offset + turn * pointer.advance;
    memcpy(args + pointer.place, &address, sizeof(address));
}

// Steps [first, end), once; `times` grow.
int64_t run_steps(const Kernels& kernels, const Tape& tape, int64_t first, int64_t end, char* args, int64_t* times) {
    for (int64_t i = first; i < end; ++i) {
        const int64_t start = times ? now() : 0;
        const TapeStep& step = tape.steps[i];
        if (kernels.steps[step.kernel].run(args + step.args) != 0) return i;
        if (times) times[i] += now() - start;
    }
    return -1;
}

}  // namespace

int64_t run_tape(const Kernels& kernels, const Tape& tape, int64_t first, int64_t end, char* args, char* const* bases,
                 int64_t* times) {
    for (int64_t i = 0; i < tape.pointer_count; ++i) set_pointer(tape.pointers[i], args, bases, 0);
    for (int64_t i = first; times && i < end; ++i) times[i] = 0;
    const TapeLoop *loop = tape.loops, *const last = loop + tape.loop_count;
    while (first < end) {
        while (loop < last && loop->end <= first) ++loop;
        const bool inside = loop < last && loop->first == first;
        const int64_t stop = inside ? loop->end : loop < last && loop->first < end ? loop->first : end;
        for (int64_t turn = 0; turn < (inside ? loop->count : 1); ++turn) {
            if (turn > 0)
                for (int64_t i = loop->first_pointer; i < loop->end_pointer; ++i)
                    if (tape.pointers[i].advance) set_pointer(tape.pointers[i], args, bases, turn);
            const int64_t failed = run_steps(kernels, tape, first, stop, args, times);
            if (failed >= 0) return failed;
        }
        first = stop;
    }
    return -1;
}

}  // namespace trine
