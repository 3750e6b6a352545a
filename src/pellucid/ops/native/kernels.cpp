// Compiled once for each kind of processor, with VARIANT and the compiler's flags for it (see build.py).
#include "step.h"

#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)

namespace {

struct Product {
    const Matrix& m;
    const float* x;
    i64 M;
    bool as_it_is;
    float* y;
};

void product_job(const void* about, const Crew& crew) {
    const Product& p = *(const Product*)about;
    const Prepared rows = prepared_at(crew.memory, p.m, p.M);
    crew.stretches(p.M, [&](i64 r, int) { prepare(p.m, p.x + r * p.m.k, r, p.as_it_is, rows); });
    multiply(p.m, rows, p.M, {p.y, p.m.n}, crew);
}

void step_job(const void* about, const Crew& crew) {
    const Step& s = *(const Step*)about;
    i64 bytes;
    run_step(s, room_of(s, crew.memory, crew.threads, &bytes), crew);
}

}  // namespace

extern "C" {

int NAMED(product, VARIANT)(const Matrix* m, const float* x, i64 M, int threads, int as_it_is, float* y) {
    Product p{*m, x, M, as_it_is != 0, y};
    return run(threads, prepared_bytes(*m, M), product_job, &p) ? 0 : 1;
}

int NAMED(step, VARIANT)(const Step* s, int threads) {
    i64 bytes;
    room_of(*s, nullptr, threads, &bytes);
    return run(threads, bytes, step_job, s) ? 0 : 1;
}
}
