// A tape: the steps of a graph for one set of shapes, run one after another without anything in between.
#pragma once

#include "runtime.h"

namespace trine {

struct TapeStep {
    int64_t kernel;  // in Kernels::steps
    int64_t args;    // where its arguments lie, in bytes from the start of all arguments
};

// A pointer among the arguments: *(char**)(args + place) = bases[base] + offset, in a loop `advance` more each time.
struct TapePointer {
    int64_t place, base, offset, advance;
};

// Steps [first, end), with the pointers [first_pointer, end_pointer), run `count` times. Loops are in order, and within
// or without any range of steps that is run.
struct TapeLoop {
    int64_t first, end, count, first_pointer, end_pointer;
};

struct Tape {
    const TapeStep* steps;
    const TapePointer* pointers;
    const TapeLoop* loops;
    int64_t step_count, pointer_count, loop_count;
};

// Runs the steps [first, end). `args` are the caller's own copy of the arguments; its pointers are set to where `bases`
// lie now when `first` is 0 or `bases` changed, that is, on every call: it costs less than to know. Two threads may run
// one tape on arguments of their own. Gives -1, or the number of the step that failed.
int64_t run_tape(const Kernels& kernels, const Tape& tape, int64_t first, int64_t end, char* args, char* const* bases,
                 int64_t* times);

}  // namespace trine
