// What Python calls: checks what it is given, and takes the variant for this processor.
#include <cstdint>

#include "step.h"

#define EXPORTED __attribute__((visibility("default")))

namespace {

struct Variant {
    const char* name;
    int (*product)(const Matrix*, const float*, i64, int, int, float*);
    int (*step)(const Step*, int);
};

}  // namespace

extern "C" {

#define DECLARE(v)                                                       \
    int product_##v(const Matrix*, const float*, i64, int, int, float*); \
    int step_##v(const Step*, int);
DECLARE(base)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif
}

namespace {

#define ENTRY(v) {#v, product_##v, step_##v}
const Variant VARIANTS[] = {
#if defined(__x86_64__)
    ENTRY(avx512), ENTRY(avx2),
#endif
    ENTRY(base),
};
constexpr int COUNT = sizeof VARIANTS / sizeof *VARIANTS;
const Variant* chosen = nullptr;

bool runs_here(int variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (variant == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (variant == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return variant == COUNT - 1;
}

bool outside(const i64* values, i64 n, i64 end) {
    for (i64 i = 0; i < n; i++)
        if (values[i] < 0 || values[i] >= end) return true;
    return false;
}

}  // namespace

extern "C" {

// The name of variant i, or null behind the last.
EXPORTED const char* pellucid_variant(int i) { return i < COUNT ? VARIANTS[i].name : nullptr; }

// Takes variant i from now on; 0 where this processor has it.
EXPORTED int pellucid_use(int i) {
    if (i < 0 || i >= COUNT || !runs_here(i)) return 1;
    chosen = VARIANTS + i;
    return 0;
}

// 0 done, 1 no memory
EXPORTED int pellucid_product(const Matrix* m, const float* x, i64 M, int threads, int as_it_is, float* y) {
    return chosen->product(m, x, M, threads, as_it_is, y);
}

// 0 done, 1 no memory, 2 a token outside of the vocabulary, 3 a position outside of the tables, 4 a slot outside of the cache
EXPORTED int pellucid_step(const Step* s, int threads) {
    if (outside(s->tokens, s->M, s->vocab)) return 2;
    if (outside(s->positions, s->M, s->table) || outside(s->positions, s->M, s->longest) || outside(s->request, s->M, s->requests)) return 3;
    for (i64 g = 0; g < s->groups; g++) {
        if (outside(s->into[g], s->M, s->places)) return 4;
        for (i64 n = 0; n < s->M; n++)
            if (n + 1 == s->M || s->request[n + 1] != s->request[n])  // the last token of a request reads the most slots
                if (outside(s->slots[g] + s->request[n] * s->longest, s->positions[n] + 1, s->places)) return 4;
    }
    return chosen->step(s, threads);
}
}
