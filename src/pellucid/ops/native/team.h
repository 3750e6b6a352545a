// Threads that stay and help: a step shares out its work part by part, without starting or joining threads for each.
//
// Whoever is free takes the next piece, and a part is done when its pieces are: a thread that the system has put aside for
// somebody else's work holds up nobody, where at a barrier all would wait for it (beside one busy process, on two cores: five
// times as long).
#pragma once
#include <cstdint>

// Inlined everywhere: the linker keeps one copy of an inline function, and it must not be the one for the newest processor.
#define INLINED __attribute__((always_inline)) inline

namespace pellucid {

using Piece = void (*)(const void* about, int64_t i, int rank);

// Calls piece(about, i, rank) for each i below n, on the threads of the running job; returns when all are done.
void share(int64_t n, Piece piece, const void* about);

struct Crew {  // what a job knows of those who run it
    int threads;
    char* memory;  // that they share, 64-aligned; what was in it is lost

    // work(i, rank) for each i below n, in any order, by threads of ranks below `threads`
    template <class F>
    INLINED void each(int64_t n, const F& work) const {
        if (n > 1 && threads > 1) return share(n, [](const void* f, int64_t i, int rank) { (*(const F*)f)(i, rank); }, &work);
        for (int64_t i = 0; i < n; i++) work(i, 0);
    }
    // work(i, rank) again, several i to a piece: few enough pieces to cost nothing, enough that nobody waits long for the last
    template <class F>
    INLINED void stretches(int64_t n, const F& work) const {
        const int64_t pieces = n < 4 * threads ? n : 4 * threads;
        each(pieces, [&](int64_t p, int rank) {
            for (int64_t i = n * p / pieces; i < n * (p + 1) / pieces; i++) work(i, rank);
        });
    }
};

using Job = void (*)(const void* about, const Crew& crew);

// Runs the job on this thread, which may share out work to so many in all, with so many bytes of memory. One job at a time: other
// callers wait. False where there is no such memory.
bool run(int threads, int64_t bytes, Job job, const void* about);

}  // namespace pellucid
