// Threads that stay: a step is one job for all of them, with barriers inside, instead of a parallel region for each product.
#pragma once
#include <atomic>
#include <cstdint>

// Inlined everywhere: the linker keeps one copy of an inline function, and it must not be the one for the newest processor.
#define INLINED __attribute__((always_inline)) inline

namespace pellucid {

// Waits politely: first busily, some microseconds; then giving the core to whoever wants it.
struct Patience {
    int turns = 0;
    void wait();
};

class Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};

  public:
    INLINED void wait(int threads) {
        if (threads == 1) return;
        int mine = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_release);
        } else {
            for (Patience p; round.load(std::memory_order_acquire) == mine;) p.wait();
        }
    }
};

struct Crew {  // what a job knows of the threads that run it
    int rank, threads;
    Barrier* barrier;
    char* memory;  // that they share, 64-aligned; what was in it is lost
    INLINED void meet() const { barrier->wait(threads); }
    // [from, to): this thread's share of n things
    INLINED int64_t from(int64_t n) const { return n * rank / threads; }
    INLINED int64_t to(int64_t n) const { return n * (rank + 1) / threads; }
};

using Job = void (*)(const void* about, const Crew& crew);

// Runs the job on so many threads, the caller's among them, with so many bytes of shared memory. One job at a time: other
// callers wait. False where there is no such memory.
bool run(int threads, int64_t bytes, Job job, const void* about);

}  // namespace pellucid
