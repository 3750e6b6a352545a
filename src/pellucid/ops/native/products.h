// y = x W^T + b for few rows of x, on weights in the form that they are stored in.
//
// Legend: M rows of x, N rows of W (entries of y), K columns of both. A tile is MR rows of x by some rows of W, its sums in
// registers; W is read once for each MR rows. Every entry of y is summed in an order that depends on K alone: what a row
// gives never depends on how many others there are.
#pragma once
#include "lanes.h"
#include "team.h"

namespace pellucid {

enum Kind : int64_t { F32, BF16, INT8, INT4 };

struct Matrix {  // the same fields in library.py
    const void* weight;   // F32, BF16: (N, K).  INT8: (N / 64, K / 4, 64, 4).  INT4: see int4_tile.  N, K filled up with zeros
    const float* scale;   // INT8: (N,)
    const int32_t* sums;  // INT8: (N,) of each row's codes
    const void* bias;     // (N,) or null; of the model's dtype
    int64_t n, k, kind, bias_half;
};

struct Prepared {  // the rows of x as the kind of weights wants them
    char* rows;
    i64 stride;      // bytes of a row
    float* factor;   // INT8: (M,), what they were multiplied by to become integers; INT4: (M, K / 32), one divided by it
    int32_t* sums;   // INT4: (M, K / 32) of the integers
};

}  // namespace pellucid

namespace {
using namespace pellucid;

constexpr i64 BLOCK = 64;  // rows of W that lie side by side in packed weights
constexpr i64 GROUP = 32;  // columns of W that share a scale in 4 bits
constexpr i64 CHUNK = 192; // rows of x that stay in the second cache while W passes
constexpr i64 ROWS_AT_HAND = 24;  // so few that every four rows of W, as a checkpoint has them, meet all of them before the next four
constexpr int MR = W == 16 ? 6 : 4;
constexpr float SMALLEST = 1e-30f;

inline i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }
inline i64 row_bytes(const Matrix& m) { return up(m.kind == F32 ? 4 * m.k : m.kind == BF16 ? 2 * m.k : m.k, 64); }
inline i64 groups(const Matrix& m) { return up(m.k, GROUP) / GROUP; }

inline i64 prepared_bytes(const Matrix& m, i64 M) {
    return up(M * row_bytes(m), 64) + up(M * 4 * groups(m), 64) * 2;
}
inline Prepared prepared_at(char* memory, const Matrix& m, i64 M) {
    i64 stride = row_bytes(m), side = up(M * 4 * groups(m), 64);
    char* behind = memory + up(M * stride, 64);
    return {memory, stride, (float*)behind, (int32_t*)(behind + side)};
}

// --- preparing -----------------------------------------------------------------------------------------------------------

// x (n,) -> out = round(x * 127 / max|x|) + zero in bytes, filled up with `zero` to `padded`; the factor. `as_it_is`: x is whole already.
inline float quantize(const float* x, i64 n, i64 padded, int zero, bool as_it_is, uint8_t* out) {
    vi most = {};  // of the bits without the sign: a NaN is larger than everything, and stays
    i64 k = 0;
    for (; k + W <= n; k += W) {
        vi bits = *(const vi*)(x + k) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t top = 0;
    for (int i = 0; i < W; i++) top = most[i] > top ? most[i] : top;
    for (i64 r = k; r < n; r++) {
        int32_t bits;
        memcpy(&bits, x + r, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    float factor = as_it_is ? 1.0f : 127.0f / (largest < SMALLEST ? SMALLEST : largest);
    for (k = 0; k + W <= n; k += W) {
        vi a = whole(load(x + k) * factor) + zero;
        typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
        *(vb*)(out + k) = __builtin_convertvector(a, vb);
    }
    for (; k < n; k++) {
        vi a = whole(all(x[k]) * factor) + zero;
        out[k] = uint8_t(a[0]);
    }
    memset(out + n, zero, padded - n);
    return factor;
}

inline void prepare(const Matrix& m, const float* x, i64 row, bool as_it_is, const Prepared& to) {
    char* out = to.rows + row * to.stride;
    i64 k = 0;
    if (m.kind == F32) {
        memcpy(out, x, 4 * m.k);
    } else if (m.kind == BF16) {
        for (; k + W <= m.k; k += W) store((bf16*)out + k, load(x + k));
        for (; k < m.k; k++) narrow(x[k], (bf16*)out + k);
    } else if (m.kind == INT8) {
        to.factor[row] = quantize(x, m.k, to.stride, ZERO, as_it_is, (uint8_t*)out);
    } else {
        for (i64 g = 0; g < groups(m); g++) {
            int8_t* part = (int8_t*)out + g * GROUP;
            to.factor[row * groups(m) + g] = 1.0f / quantize(x + g * GROUP, GROUP, GROUP, 0, as_it_is, (uint8_t*)part);
            int32_t total = 0;
            for (i64 i = 0; i < GROUP; i++) total += part[i];
            to.sums[row * groups(m) + g] = total;
        }
    }
}

// Weights come from memory in the order that they are read in; asking for lines further on keeps more of them under way. Where W passes
// once (M = 1) they are asked for shortly before and not for long, so that the caches keep what others need: Python between two steps
// ran a third faster for it. Where W is read again for the next rows of x, two pages ahead and into the second cache. One row of W after
// the other (bfloat16, M = 1) reads 1.3 times as fast as four side by side. 4 bits gain nothing. (AMD Zen 4)
template <bool ONCE>
inline void soon(const void* p, i64 bytes, i64 ahead) {
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + (ONCE ? ahead : 8192) + i, 0, ONCE ? 0 : 2);
}

// --- tiles ---------------------------------------------------------------------------------------------------------------

#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

struct Output {  // of one product: row r of y begins at y + r * stride
    float* y;
    i64 stride;
};

// Rows as they lie in the checkpoint: dot products along K, NR rows of W at a time.
template <class T, int M, int NR>
inline void row_tile(const Matrix& m, const char* x, i64 x_stride, i64 n, i64 r, const Output& to) {
    const T *w = (const T*)m.weight + n * m.k, *rows[M];
    EACH(i, M) rows[i] = (const T*)(x + i * x_stride);
    vf sums[M][NR] = {};
    i64 k = 0;
    for (; k + STEP<T> <= m.k; k += STEP<T>) {
        vraw columns[NR];
        EACH(j, NR) columns[j] = raw(w + j * m.k + k);
        if (NR == 1) {
            soon<M == 1>(w + k, sizeof(vraw), 2048);
        } else {
            EACH(j, NR) __builtin_prefetch(w + (j + 8) * m.k + k, 0, 2);
        }
        EACH(i, M) {
            vraw mine = raw(rows[i] + k);
            EACH(j, NR) sums[i][j] = dot(sums[i][j], mine, columns[j], (const T*)nullptr);
        }
    }
    EACH(i, M) {
        float* y = to.y + (r + i) * to.stride + n;
        if constexpr (NR == 4) {
            sums_of_four(sums[i], y);
        } else {
            EACH(j, NR) y[j] = sum(sums[i][j]);
        }
        if (k == m.k && !m.bias) continue;
        EACH(j, NR) {
            for (i64 l = k; l < m.k; l++) y[j] += wide(rows[i][l]) * wide(w[j * m.k + l]);
            if (m.bias) y[j] += m.bias_half ? wide(((const bf16*)m.bias)[n + j]) : ((const float*)m.bias)[n + j];
        }
    }
}

// The lanes at entries n.. of one row of y: scaled sums and the bias; only what the matrix has.
inline void put(const Matrix& m, vf y, i64 n, float* row) {
    if (m.bias && n + W <= m.n) y += load((const float*)m.bias + n);
    if (n + W <= m.n) {
        store(row + n, y);
    } else {
        for (i64 i = 0; n + i < m.n; i++) row[n + i] = y[i] + (m.bias ? ((const float*)m.bias)[n + i] : 0.0f);
    }
}

// INT8: four columns of W * NV rows at a time, each lane one row.
template <int M, int NV>
inline void int8_tile(const Matrix& m, const Prepared& x, i64 n, i64 r, const Output& to) {
    const i64 block = n / BLOCK, lane = n % BLOCK, steps = up(m.k, 4) / 4;
    const int8_t* w = (const int8_t*)m.weight + (block * steps * BLOCK + lane) * 4;
    const char* a = x.rows + r * x.stride;
    vi sums[M][NV];
    EACH(j, NV) {
        vi start = *(const vi*)(m.sums + n + j * W) * -ZERO;
        EACH(i, M) sums[i][j] = start;
    }
    for (i64 k = 0; k < steps; k++, w += 4 * BLOCK) {
        vi codes[NV];
        EACH(j, NV) codes[j] = *(const vi*)(w + 4 * W * j);
        soon<M == 1>(w, 4 * W * NV, 4096);
        EACH(i, M) {
            vi mine = all(*(const int32_t*)(a + i * x.stride + 4 * k));
            EACH(j, NV) sums[i][j] = dot_int8(sums[i][j], mine, codes[j]);
        }
    }
    EACH(j, NV) {
        vf scale = load(m.scale + n + j * W);
        EACH(i, M) put(m, __builtin_convertvector(sums[i][j], vf) * scale / x.factor[r + i], n + j * W, to.y + (r + i) * to.stride);
    }
}

// INT4: (N / 64, K / 32, bytes): for each group of columns 64 scales (bfloat16), then 4 times 64 rows of 4 bytes, whose low
// halves are columns 4 p .. 4 p + 3 and whose high halves the same 16 further on. A code of 8 stands for zero.
template <int M, int NV>
inline void int4_tile(const Matrix& m, const Prepared& x, i64 n, i64 r, const Output& to) {
    const i64 G = groups(m), lane = n % BLOCK, bytes = BLOCK * 2 + BLOCK * GROUP / 2;
    const char *group = (const char*)m.weight + n / BLOCK * G * bytes, *a = x.rows + r * x.stride;
    vf y[M][NV] = {};
    for (i64 g = 0; g < G; g++, group += bytes) {
        const char* w = group + 2 * BLOCK + 4 * lane;
        vi sums[M][NV];
        EACH(i, M) {
            vi start = all(-8 * x.sums[(r + i) * G + g]);
            EACH(j, NV) sums[i][j] = start;
        }
        EACH(p, 4) {
            vi low[NV], high[NV];
            EACH(j, NV) {
                vi pair = *(const vi*)(w + (p * BLOCK + j * W) * 4);
                low[j] = pair & 0x0f0f0f0f, high[j] = (vi)((vu)pair >> 4) & 0x0f0f0f0f;
            }
            EACH(i, M) {
                const char* mine = a + i * x.stride + g * GROUP + 4 * p;
                vi first = all(*(const int32_t*)mine), second = all(*(const int32_t*)(mine + 16));
                EACH(j, NV) sums[i][j] = dot_int4(dot_int4(sums[i][j], low[j], first), high[j], second);
            }
        }
        EACH(j, NV) {
            vf scale = load((const bf16*)group + lane + j * W);
            EACH(i, M) y[i][j] += __builtin_convertvector(sums[i][j], vf) * (scale * x.factor[(r + i) * G + g]);
        }
    }
    EACH(j, NV) EACH(i, M) put(m, y[i][j], n + j * W, to.y + (r + i) * to.stride);
}

// --- a thread's share of a product -----------------------------------------------------------------------------------------

template <int M>
inline void tile(const Matrix& m, const Prepared& x, i64 n, i64 end, i64 r, const Output& to) {
    constexpr int ROWS = M == 1 ? 1 : 4, INT8_NV = W == 16 ? 4 : 2, INT4_NV = W == 16 && M == 1 ? 4 : 2;  // as many sums as there are registers
    const char* rows = x.rows + r * x.stride;
    switch (m.kind) {
        case F32:
            for (; n + ROWS <= end; n += ROWS) row_tile<float, M, ROWS>(m, rows, x.stride, n, r, to);
            for (; n < end; n++) row_tile<float, M, 1>(m, rows, x.stride, n, r, to);
            break;
        case BF16:
            for (; n + ROWS <= end; n += ROWS) row_tile<bf16, M, ROWS>(m, rows, x.stride, n, r, to);
            for (; n < end; n++) row_tile<bf16, M, 1>(m, rows, x.stride, n, r, to);
            break;
        case INT8:
            for (; n < end; n += W * INT8_NV) int8_tile<M, INT8_NV>(m, x, n, r, to);
            break;
        default:
            for (; n < end; n += W * INT4_NV) int4_tile<M, INT4_NV>(m, x, n, r, to);
    }
}

inline void tiles(const Matrix& m, const Prepared& x, i64 n, i64 end, i64 r, int rows, const Output& to) {
    switch (rows) {
        case 1: return tile<1>(m, x, n, end, r, to);
        case 2: return tile<2>(m, x, n, end, r, to);
        case 3: return tile<3>(m, x, n, end, r, to);
#if defined(__AVX512F__)
        case 4: return tile<4>(m, x, n, end, r, to);
        case 5: return tile<5>(m, x, n, end, r, to);
        default: return tile<6>(m, x, n, end, r, to);
#else
        default: return tile<4>(m, x, n, end, r, to);
#endif
    }
}

// Rows 0..M of y; the threads share out the blocks of W's rows.
inline void multiply(const Matrix& m, const Prepared& x, i64 M, const Output& to, const Crew& crew) {
    const i64 blocks = up(m.n, BLOCK) / BLOCK;
    for (i64 chunk = 0; chunk < M; chunk += CHUNK) {
        const i64 stop = chunk + CHUNK < M ? chunk + CHUNK : M, rows = stop - chunk;
        const i64 step = m.kind <= BF16 && MR < rows && rows <= ROWS_AT_HAND ? 4 : BLOCK;
        crew.stretches(blocks, [&](i64 block, int) {
            const i64 end = (block + 1) * BLOCK < m.n ? (block + 1) * BLOCK : m.n;
            for (i64 n = block * BLOCK; n < end; n += step)
                for (i64 r = chunk; r < stop; r += MR) tiles(m, x, n, n + step < end ? n + step : end, r, int(stop - r < MR ? stop - r : MR), to);
        });
    }
}

}  // namespace
