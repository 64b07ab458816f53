// The thread pool and the library's memory. Compiled for the baseline instruction set.
#include "runtime.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace trine {
namespace {

// The pool. One job runs at a time. `ticket` holds (tasks of the job << 32 | tasks handed out); whoever moves it on by
// one owns that task. Nobody can own a task of a job that is over, so a thread that was asleep in between is harmless:
// the job's fields are read only after a task was won, and they change only once every task won was reported done.
struct Pool {
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<uint32_t> done{0};
    alignas(64) std::atomic<uint32_t> sleepers{0};
    std::atomic<uint32_t> alarm{0};  // a futex: sleeping workers wait for it to change
    std::atomic<int> wanted{0};      // threads in all, the caller included; 0: not set yet
    std::atomic<bool> busy{false};
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int workers = 0;
};

Pool pool;

// A worker looks for work this often before it sleeps: some 50 µs at full speed, then as long with its core offered to
// others. It bridges the gap between two kernels of one forward pass, not the one between two steps.
constexpr int SPINS = 1000;
constexpr int YIELDS = 100;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

bool run_one() {
    uint64_t ticket = pool.ticket.load(std::memory_order_acquire);
    while (true) {
        const uint32_t next = static_cast<uint32_t>(ticket);
        if (next >= static_cast<uint32_t>(ticket >> 32)) return false;
        if (pool.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
            pool.body(pool.context, next);
            pool.done.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
}

bool work_left() {
    const uint64_t ticket = pool.ticket.load(std::memory_order_seq_cst);
    return static_cast<uint32_t>(ticket) < static_cast<uint32_t>(ticket >> 32);
}

void sleep_until_work(bool allowed) {
    const uint32_t seen = pool.alarm.load();
    pool.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (!allowed || !work_left()) syscall(SYS_futex, &pool.alarm, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    pool.sleepers.fetch_sub(1);
}

void wake_sleepers() {
    if (pool.sleepers.load(std::memory_order_seq_cst) == 0) return;
    pool.alarm.fetch_add(1);
    syscall(SYS_futex, &pool.alarm, FUTEX_WAKE_PRIVATE, 1 << 20, nullptr, nullptr, 0);
}

void* worker(void* argument) {
    const intptr_t index = reinterpret_cast<intptr_t>(argument);
    int idle = 0;
    while (true) {
        const bool allowed = index + 1 < pool.wanted.load(std::memory_order_relaxed);
        if (allowed && run_one()) {
            idle = 0;
        } else if (!allowed || ++idle > SPINS + YIELDS) {
            sleep_until_work(allowed);
            idle = 0;
        } else if (idle > SPINS) {
            sched_yield();
        } else {
            relax();
        }
    }
    return nullptr;
}

// A forked child has none of the parent's threads: it starts its own when it needs them.
void forget_workers() {
    pool.workers = 0;
    pool.ticket = 0;
    pool.sleepers = 0;
    pool.busy = false;
}

void start_workers() {
    static bool registered = false;
    if (!registered) pthread_atfork(nullptr, nullptr, forget_workers);
    registered = true;
    while (pool.workers + 1 < pool.wanted.load()) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, worker, reinterpret_cast<void*>(intptr_t(pool.workers))) != 0) break;
        pthread_detach(thread);
        ++pool.workers;
    }
}

struct Scratch {
    void* memory[SCRATCH_SLOTS];
    size_t bytes[SCRATCH_SLOTS];
};

__thread Scratch* own_scratch = nullptr;
pthread_key_t scratch_key;
pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

void free_scratch(void* pointer) {
    Scratch* own = static_cast<Scratch*>(pointer);
    for (int i = 0; i < SCRATCH_SLOTS; ++i) free_pages(own->memory[i], own->bytes[i]);
    free(own);
}

// The key exists for its destructor: a thread that ends gives its memory back.
void make_scratch_key() { pthread_key_create(&scratch_key, free_scratch); }

Scratch& scratch_of_thread() {
    if (own_scratch) return *own_scratch;
    pthread_once(&scratch_once, make_scratch_key);
    own_scratch = static_cast<Scratch*>(calloc(1, sizeof(Scratch)));
    if (!own_scratch) abort();
    pthread_setspecific(scratch_key, own_scratch);
    return *own_scratch;
}

constexpr size_t HUGE_PAGE = size_t(2) << 20;

}  // namespace

int num_threads() {
    if (pool.wanted.load() == 0) {
        cpu_set_t set;
        pool.wanted = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    return pool.wanted.load();
}

void set_num_threads(int count) { pool.wanted = count < 1 ? 1 : count; }

void parallel_for(int64_t count, void (*body)(void*, int64_t), void* context) {
    // Two callers at once: the second does its work alone rather than wait.
    if (count <= 1 || num_threads() == 1 || pool.busy.exchange(true, std::memory_order_acquire)) {
        for (int64_t i = 0; i < count; ++i) body(context, i);
        return;
    }
    if (pool.workers + 1 < pool.wanted.load()) start_workers();
    pool.body = body;
    pool.context = context;
    pool.done.store(0, std::memory_order_relaxed);
    pool.ticket.store(static_cast<uint64_t>(count) << 32, std::memory_order_seq_cst);
    wake_sleepers();
    while (run_one()) {
    }
    for (int spins = 0; pool.done.load(std::memory_order_acquire) != static_cast<uint32_t>(count); ++spins) {
        if (spins < SPINS)
            relax();
        else
            sched_yield();  // the thread with the last task may be waiting for this very core
    }
    pool.busy.store(false, std::memory_order_release);
}

void* allocate_pages(size_t bytes) {
    if (bytes == 0) bytes = 1;
    const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
    char* memory = static_cast<char*>(
        mmap(nullptr, bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) return nullptr;
    char* start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + alignment - 1) & ~(alignment - 1));
    const size_t size = (bytes + 4095) & ~size_t(4095);
    if (start > memory) munmap(memory, start - memory);
    if (memory + bytes + alignment > start + size) munmap(start + size, memory + bytes + alignment - start - size);
    if (bytes >= HUGE_PAGE) madvise(start, size, MADV_HUGEPAGE);
    return start;
}

void free_pages(void* pages, size_t bytes) {
    if (pages) munmap(pages, (bytes + 4095) & ~size_t(4095));
}

void* scratch(ScratchSlot slot, size_t bytes) {
    Scratch& own = scratch_of_thread();
    if (own.bytes[slot] < bytes) {
        free_pages(own.memory[slot], own.bytes[slot]);
        own.bytes[slot] = bytes + bytes / 4;
        own.memory[slot] = allocate_pages(own.bytes[slot]);
        if (!own.memory[slot]) abort();
    }
    return own.memory[slot];
}

}  // namespace trine
