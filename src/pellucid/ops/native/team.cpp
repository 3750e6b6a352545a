// See team.h. Waiting threads give way after some microseconds, and sleep when no job has come for a while.
#include "team.h"

#include <pthread.h>
#include <sched.h>

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

constexpr int BUSY = 3000;          // pauses, some 40 microseconds: longer than anything that one thread does while others wait
constexpr int YIELDS = BUSY + 500;  // then a worker sleeps until the next job

struct Team {
    std::mutex callers, sleep;
    std::condition_variable wake;
    std::atomic<int64_t> number{0};  // of the job
    Job job = nullptr;
    const void* about = nullptr;
    Crew crew{0, 1, nullptr, nullptr};
    int workers = 0;  // that exist, besides the caller
    Barrier inside, end;
    int64_t size = 0;

    void work(int rank, int64_t seen) {
        while (true) {
            for (Patience p; number.load(std::memory_order_acquire) == seen;) {
                if (p.turns < YIELDS) {
                    p.wait();
                } else {
                    std::unique_lock<std::mutex> lock(sleep);
                    wake.wait(lock, [&] { return number.load(std::memory_order_acquire) != seen; });
                }
            }
            seen++;  // each job waits for every worker, so none is missed
            if (rank < crew.threads) job(about, Crew{rank, crew.threads, &inside, crew.memory});
            end.wait(workers + 1);
        }
    }

    int hire(int threads) {  // as many as the system gives
        while (workers < threads - 1) {
            try {
                int rank = workers + 1;
                int64_t seen = number.load();
                std::thread([this, rank, seen] { work(rank, seen); }).detach();
                workers++;
            } catch (const std::system_error&) {
                break;
            }
        }
        return threads < workers + 1 ? threads : workers + 1;
    }

    bool run(int threads, int64_t bytes, Job what, const void* with) {
        std::lock_guard<std::mutex> only(callers);
        if (bytes > size) {
            std::free(crew.memory);
            size = (bytes + bytes / 4 + 63) / 64 * 64;
            crew.memory = static_cast<char*>(std::aligned_alloc(64, size));
            if (!crew.memory) return size = 0, false;
        }
        job = what, about = with, crew.threads = hire(threads);
        Crew mine{0, crew.threads, &inside, crew.memory};
        if (mine.threads == 1) return job(about, mine), true;
        {
            std::lock_guard<std::mutex> lock(sleep);  // or a worker that is about to sleep would miss it
            number.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        job(about, mine);
        end.wait(workers + 1);
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

void Patience::wait() {
    if (++turns < BUSY) {
        PAUSE();
    } else {
        sched_yield();
    }
}

bool run(int threads, int64_t bytes, Job job, const void* about) { return the_team()->run(threads, bytes, job, about); }

}  // namespace pellucid
