// See team.h. Threads that find no work give way after some microseconds, and sleep when there has been none for a while: between
// two steps, or while the last piece of a long part is at work. Every part wakes those who sleep.
#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() sched_yield()
#endif

namespace pellucid {
namespace {

constexpr int BUSY = 3000;          // pauses, some 40 microseconds: longer than what one thread does between two parts
constexpr int YIELDS = BUSY + 500;  // then a helper sleeps until the next part
constexpr uint64_t NONE = 0xffffffff;

struct Patience {
    int turns = 0;
    void wait() {
        if (++turns < BUSY) {
            PAUSE();
        } else {
            sched_yield();
        }
    }
};

struct Team {
    std::mutex callers, sleep;
    std::condition_variable wake;
    std::atomic<int64_t> parts{0};
    std::atomic<int> sleepers{0};
    int helpers = 0;
    Crew crew{1, nullptr};
    int64_t size = 0;

    // The part that is shared out: its number in the high half, the next piece in the low half. Who raises it from what it read
    // has that piece; the fields were that part's own, since they change only while the low half is NONE: they are released and
    // acquired each, so that whoever sees one of the next part no longer finds the ticket of this one (ARM may show them earlier).
    alignas(64) std::atomic<uint64_t> ticket{NONE};
    std::atomic<uint64_t> pieces{0};
    std::atomic<int> wanted{0};
    std::atomic<Piece> piece{nullptr};
    std::atomic<const void*> about{nullptr};
    alignas(64) std::atomic<uint64_t> done{0};

    bool take(int rank) {
        uint64_t t = ticket.load(std::memory_order_acquire);
        while ((t & NONE) < pieces.load(std::memory_order_acquire) && rank < wanted.load(std::memory_order_acquire)) {
            Piece call = piece.load(std::memory_order_acquire);
            const void* with = about.load(std::memory_order_acquire);
            if (ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
                call(with, int64_t(t & NONE), rank);
                done.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    void share(int64_t n, Piece call, const void* with) {
        const uint64_t part = ticket.load(std::memory_order_relaxed) | NONE;
        ticket.store(part, std::memory_order_seq_cst);
        pieces.store(uint64_t(n), std::memory_order_release), wanted.store(crew.threads, std::memory_order_release);
        piece.store(call, std::memory_order_release), about.store(with, std::memory_order_release);
        done.store(0, std::memory_order_relaxed);
        ticket.store(part + 1, std::memory_order_release);  // the next number, piece 0
        parts++;
        if (sleepers) {
            { std::lock_guard<std::mutex> lock(sleep); }  // whoever is about to sleep has seen the part, or sleeps
            wake.notify_all();
        }
        while (take(0)) {
        }
        for (Patience p; done.load(std::memory_order_acquire) < uint64_t(n);) p.wait();
    }

    void help(int rank) {
        for (Patience p;;) {
            if (take(rank)) {
                p.turns = 0;
            } else if (p.turns < YIELDS) {
                p.wait();
            } else {
                std::unique_lock<std::mutex> lock(sleep);
                sleepers++;
                const int64_t seen = parts;
                if (!take(rank)) wake.wait(lock, [&] { return parts != seen; });
                sleepers--;
                p.turns = 0;
            }
        }
    }

    int hire(int threads) {  // as many as the system gives
        while (helpers < threads - 1) {
            try {
                const int rank = helpers + 1;
                std::thread([this, rank] { help(rank); }).detach();
                helpers++;
            } catch (const std::system_error&) {
                break;
            }
        }
        return threads < helpers + 1 ? threads : helpers + 1;
    }

    bool run(int threads, int64_t bytes, Job job, const void* with) {
        std::lock_guard<std::mutex> only(callers);
        if (bytes > size) {
            std::free(crew.memory);
            size = (bytes + bytes / 4 + 63) / 64 * 64;
            crew.memory = static_cast<char*>(std::aligned_alloc(64, size));
            if (!crew.memory) return size = 0, false;
        }
        crew.threads = hire(threads);
        job(with, crew);
        return true;
    }
};

Team* team = nullptr;  // never deleted: its threads may still wait when the process ends

Team* the_team() {
    static std::once_flag once;
    std::call_once(once, [] {
        team = new Team;
        pthread_atfork(nullptr, nullptr, [] { team = new Team; });  // the threads have stayed with the parent
    });
    return team;
}

}  // namespace

void share(int64_t n, Piece piece, const void* about) { the_team()->share(n, piece, about); }

bool run(int threads, int64_t bytes, Job job, const void* about) { return the_team()->run(threads, bytes, job, about); }

}  // namespace pellucid
