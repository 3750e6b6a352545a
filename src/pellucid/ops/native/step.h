// A whole step of a decoder for M tokens of any requests: norms, rotation, paged attention and gates in float32 between the
// products of products.h. The same fields as in library.py.
#pragma once
#include <initializer_list>

#include "products.h"

namespace pellucid {

struct Layer {
    Matrix qkv, out, gate_up, down;
    const void *norm1, *norm2, *q_norm, *k_norm;  // weights of the norms, of the model's dtype; the last two may be null
    const float *cos, *sin;                       // (P, turned / 2)
    void *keys, *values;                          // entries of the cache
    // The entry of a slot's head h begins slot * slot_stride + h * head_stride numbers into the cache.
    i64 heads, kv_heads, head_dim, turned, window, hidden, slot_stride, head_stride, group;
    double eps, qk_eps;
};

struct Step {
    const Layer* layers;
    const void *embedding, *norm;  // (V, D), (D,)
    i64 count, dim, vocab;
    i64 half, half_cache;          // whether the model, and the cache, are bfloat16
    double eps;
    // Token n of request[n], at position p = positions[n], has its entries at slot into[g][n], in layers of group g, and attends to
    // slots[g][request[n]][0 .. p].
    const i64 *tokens, *positions, *request, *const *into, *const *slots;
    i64 M, groups, requests, longest, places, table;  // places: slots of the cache; table: rows of cos, sin
    float* hidden;                 // (M, D): the last state, normed
};

}  // namespace pellucid

namespace {

struct Room {  // where a step's intermediate results lie in the shared memory
    float *x, *h, *qkv, *attended, *gate_up, *delta, *scores;
    Prepared of(const Matrix& m, i64 M) const { return prepared_at(rows, m, M); }
    char* rows;
    i64* starts;
    i64 qkv_width, attended_width, hidden, per_thread, widest;
};

constexpr i64 KEYS = 64, QUERIES = 128;  // of a tile of attention for many tokens
constexpr i64 AT_ONCE = 4;              // heads of one token that read the same keys
constexpr i64 FEW = 8;                  // tokens of one request that are too few for tiles

inline Room room_of(const Step& s, char* at, int threads, i64* bytes) {
    Room b{};
    i64 prepared = 0;
    for (i64 i = 0; i < s.count; i++) {
        const Layer& l = s.layers[i];
        b.qkv_width = l.qkv.n > b.qkv_width ? l.qkv.n : b.qkv_width;
        b.attended_width = l.out.k > b.attended_width ? l.out.k : b.attended_width;
        b.hidden = l.gate_up.n > b.hidden ? l.gate_up.n : b.hidden;
        b.widest = up(l.head_dim, 64) > b.widest ? up(l.head_dim, 64) : b.widest;
        for (const Matrix* m : {&l.qkv, &l.out, &l.gate_up, &l.down}) {
            i64 need = prepared_bytes(*m, s.M);
            prepared = need > prepared ? need : prepared;
        }
    }
    char* start = at;
    auto take = [&](i64 count) {
        char* here = at;
        at += up(4 * count, 64);
        return (float*)here;
    };
    b.x = take(s.M * s.dim), b.h = take(s.M * s.dim), b.delta = take(s.M * s.dim);
    b.qkv = take(s.M * b.qkv_width), b.attended = take(s.M * b.attended_width), b.gate_up = take(s.M * b.hidden);
    b.per_thread = AT_ONCE * up(s.longest, 64) + 2 * KEYS * b.widest + QUERIES * (KEYS + b.widest + 2);
    b.scores = take(threads * b.per_thread);
    b.starts = (i64*)take(2 * (s.M + 1));
    b.rows = (char*)take((prepared + 3) / 4);
    *bytes = at - start;
    return b;
}

// --- norms, rotation, gate -------------------------------------------------------------------------------------------------

template <class T>
inline void norm(const float* x, const T* weight, i64 n, float eps, float scale, float* out) {
    vf squares = {};
    i64 i = 0;
    for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += x[i] * x[i];
    const float r = scale / __builtin_sqrtf(total / n + eps);
    for (i = 0; i + W <= n; i += W) store(out + i, load(x + i) * r * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * r * wide(weight[i]);
}
inline void norm(const float* x, const void* weight, bool half, i64 n, float eps, float scale, float* out) {
    half ? norm(x, (const bf16*)weight, n, eps, scale, out) : norm(x, (const float*)weight, n, eps, scale, out);
}

inline void add(const float* delta, float* x, i64 n) {
    for (i64 i = 0; i < n; i++) x[i] += delta[i];
}

// One head of q or k, in place: scale * rope(norm(head)); the first `turned` entries rotate, each with the one half of them further on.
inline void turn(const Step& s, const Layer& l, const void* weight, i64 position, float scale, float* head) {
    if (weight) {
        norm(head, weight, s.half, l.head_dim, float(l.qk_eps), scale, head);
    } else if (scale != 1) {
        for (i64 i = 0; i < l.head_dim; i++) head[i] *= scale;
    }
    const i64 half = l.turned / 2;
    const float *cos = l.cos + position * half, *sin = l.sin + position * half;
    for (i64 i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

// SwiGLU: gate_up (2 n,) -> its first n become silu(gate) * up.
inline void gate(float* gate_up, i64 n) {
    i64 i = 0;
    for (; i + W <= n; i += W) {
        vf g = load(gate_up + i);
        store(gate_up + i, g / (1.0f + exp(-g)) * load(gate_up + n + i));
    }
    for (; i < n; i++) {
        float g = gate_up[i];
        gate_up[i] = g / (1.0f + exp(all(-g))[0]) * gate_up[n + i];
    }
}

// --- attention over pages ----------------------------------------------------------------------------------------------------

template <class T>
inline void write_entries(const Step& s, const Layer& l, const float* qkv, i64 n, i64 h) {
    const i64 d = l.head_dim, at = s.into[l.group][n] * l.slot_stride + h * l.head_stride;
    const float *k = qkv + (l.heads + h) * d, *v = k + l.kv_heads * d;
    T *key = (T*)l.keys + at, *value = (T*)l.values + at;
    for (i64 i = 0; i < d; i++) narrow(k[i], key + i), narrow(v[i], value + i);
}

template <class T>
inline float dot_head(const float* q, const T* k, i64 d) {
    vf sums = {};
    i64 i = 0;
    for (; i + W <= d; i += W) sums += load(q + i) * load(k + i);
    float total = sum(sums);
    for (; i < d; i++) total += q[i] * wide(k[i]);
    return total;
}

// scores become exp(score - max); their sum.
inline float exp_from_top(float* scores, i64 n) {
    float top = scores[0];
    for (i64 i = 1; i < n; i++) top = scores[i] > top ? scores[i] : top;
    vf sums = {};
    i64 i = 0;
    for (; i + W <= n; i += W) {
        vf e = exp(load(scores + i) - top);
        store(scores + i, e);
        sums += e;
    }
    float total = sum(sums);
    for (; i < n; i++) total += scores[i] = exp(all(scores[i] - top))[0];
    return total;
}

// A slot's row comes from anywhere: it is asked for some keys before it is needed.
constexpr i64 KEYS_AHEAD = 12;
template <class T>
inline void ask(const T* rows, const i64* slots, i64 j, i64 n, i64 stride, i64 d) {
    const char* row = (const char*)(rows + slots[j + KEYS_AHEAD < n ? j + KEYS_AHEAD : n - 1] * stride);
    for (i64 i = 0; i < d * i64(sizeof(T)); i += 64) __builtin_prefetch(row + i);
}

// For each of G heads, out[g * d ..] = shares[g * step ..] . values * factors[g]: NV vectors of the head at a time.
template <class T, int G, int NV>
inline void mix(const float* shares, i64 step, const i64* slots, i64 n, const T* values, i64 stride, const float* factors, i64 d, float* out) {
    vf sums[G][NV] = {};
    for (i64 j = 0; j < n; j++) {
        ask(values, slots, j, n, stride, NV * W);
        vf v[NV];
        EACH(i, NV) v[i] = load(values + slots[j] * stride + i * W);
        EACH(g, G) EACH(i, NV) sums[g][i] += shares[g * step + j] * v[i];
    }
    EACH(g, G) EACH(i, NV) store(out + g * d + i * W, sums[g][i] * factors[g]);
}
template <class T, int G>
inline void mix_heads(const float* shares, i64 step, const i64* slots, i64 n, const T* values, i64 stride, const float* factors, i64 d, float* out) {
    i64 i = 0;
    for (; i + 4 * W <= d; i += 4 * W) mix<T, G, 4>(shares, step, slots, n, values + i, stride, factors, d, out + i);
    for (; i + W <= d; i += W) mix<T, G, 1>(shares, step, slots, n, values + i, stride, factors, d, out + i);
    for (; i < d; i++)
        for (int g = 0; g < G; g++) {
            float total = 0;
            for (i64 j = 0; j < n; j++) total += shares[g * step + j] * wide(values[slots[j] * stride + i]);
            out[g * d + i] = total * factors[g];
        }
}

// Token n, the query heads of key/value head h, `AT_ONCE` of them at a time.
template <class T>
inline void attend(const Step& s, const Layer& l, const float* qkv, i64 n, i64 h, float* scores, float* out) {
    const i64 d = l.head_dim, G = l.heads / l.kv_heads, p = s.positions[n], step = up(s.longest, 64);
    const i64 from = l.window && p + 1 > l.window ? p + 1 - l.window : 0, length = p + 1 - from;
    const i64* slots = s.slots[l.group] + s.request[n] * s.longest + from;
    const T *keys = (const T*)l.keys + h * l.head_stride, *values = (const T*)l.values + h * l.head_stride;
    for (i64 first = h * G; first < (h + 1) * G; first += AT_ONCE) {
        const i64 heads = (h + 1) * G - first < AT_ONCE ? (h + 1) * G - first : AT_ONCE;
        for (i64 j = 0; j < length; j++) {
            ask(keys, slots, j, length, l.slot_stride, d);
            for (i64 g = 0; g < heads; g++) scores[g * step + j] = dot_head(qkv + (first + g) * d, keys + slots[j] * l.slot_stride, d);
        }
        float factors[AT_ONCE];
        for (i64 g = 0; g < heads; g++) factors[g] = 1.0f / exp_from_top(scores + g * step, length);
        for (i64 g = 0; g < heads; g += 2) {
            float *shares = scores + g * step, *to = out + (first + g) * d;
            g + 1 < heads ? mix_heads<T, 2>(shares, step, slots, length, values, l.slot_stride, factors + g, d, to)
                          : mix_heads<T, 1>(shares, step, slots, length, values, l.slot_stride, factors + g, d, to);
        }
    }
}

// out (M, NV vectors) += a (M rows, n) b (n, stride)
template <int M, int NV>
inline void add_product(const float* const* a, i64 n, const float* b, i64 stride, float* out, i64 out_stride) {
    vf sums[M][NV];
    EACH(i, M) EACH(j, NV) sums[i][j] = load(out + i * out_stride + j * W);
    for (i64 k = 0; k < n; k++) {
        vf columns[NV];
        EACH(j, NV) columns[j] = load(b + k * stride + j * W);
        EACH(i, M) EACH(j, NV) sums[i][j] += a[i][k] * columns[j];
    }
    EACH(i, M) EACH(j, NV) store(out + i * out_stride + j * W, sums[i][j]);
}
// The same for any number of rows, and `width` columns, a multiple of W.
inline void add_product(const float* const* a, i64 rows, i64 n, const float* b, i64 stride, i64 width, float* out, i64 out_stride) {
    constexpr int NV = W == 16 ? 4 : 2;
    for (i64 r = 0; r < rows;) {
        const bool many = r + MR <= rows;
        i64 c = 0;
        for (; c + NV * W <= width; c += NV * W) {
            float* to = out + r * out_stride + c;
            many ? add_product<MR, NV>(a + r, n, b + c, stride, to, out_stride) : add_product<1, NV>(a + r, n, b + c, stride, to, out_stride);
        }
        for (; c < width; c += W) {
            float* to = out + r * out_stride + c;
            many ? add_product<MR, 1>(a + r, n, b + c, stride, to, out_stride) : add_product<1, 1>(a + r, n, b + c, stride, to, out_stride);
        }
        r += many ? MR : 1;
    }
}

// Keys of n slots -> columns (d, KEYS); what lies behind the last one is never used, but must be a number.
template <class T>
inline void read_keys(const Layer& l, const i64* slots, i64 n, i64 h, float* columns) {
    const i64 d = l.head_dim;
    for (i64 j = 0; j < KEYS; j += W) {
        const T* rows[W];
        for (i64 i = 0; i < W; i++) rows[i] = (const T*)l.keys + slots[j + i < n ? j + i : 0] * l.slot_stride + h * l.head_stride;
        i64 i = 0;
        for (; i + W <= d; i += W) {
            transpose(rows, columns + i * KEYS + j, KEYS);
            for (const T*& row : rows) row += W;
        }
        for (i64 rest = 0; i + rest < d; rest++)
            for (i64 r = 0; r < W; r++) columns[(i + rest) * KEYS + j + r] = wide(rows[r][rest]);
    }
}

// Values of n slots -> values (n, width), filled up with zeros.
template <class T>
inline void read_values(const Layer& l, const i64* slots, i64 n, i64 h, i64 width, float* values) {
    const i64 d = l.head_dim;
    for (i64 j = 0; j < n; j++) {
        const T* v = (const T*)l.values + slots[j] * l.slot_stride + h * l.head_stride;
        i64 i = 0;
        for (; i + W <= d; i += W) store(values + j * width + i, load(v + i));
        for (; i < width; i++) values[j * width + i] = i < d ? wide(v[i]) : 0;
    }
}

// Tokens first..last of one request, in tiles of KEYS keys with running maxima (online softmax, arXiv 2205.14135).
template <class T>
inline void attend_tiles(const Step& s, const Layer& l, const Room& b, i64 first, i64 last, i64 h, float* memory) {
    const i64 d = l.head_dim, G = l.heads / l.kv_heads, rows = (last - first) * G, width = up(d, W);
    float *columns = memory, *values = columns + KEYS * b.widest, *scores = values + KEYS * b.widest;
    float *mixed = scores + QUERIES * KEYS, *tops = mixed + QUERIES * b.widest, *totals = tops + QUERIES;
    const float *q[QUERIES], *shares[QUERIES];
    for (i64 r = 0; r < rows; r++) {
        q[r] = b.qkv + (first + r / G) * l.qkv.n + (h * G + r % G) * d, shares[r] = scores + r * KEYS;
        tops[r] = -__builtin_inff(), totals[r] = 0;
    }
    memset(mixed, 0, rows * width * 4);
    const i64* slots = s.slots[l.group] + s.request[first] * s.longest;
    const i64 least = s.positions[first] + 1, end = s.positions[last - 1] + 1;
    for (i64 start = l.window && least > l.window ? least - l.window : 0; start < end; start += KEYS) {
        const i64 n = end - start < KEYS ? end - start : KEYS;
        read_keys<T>(l, slots + start, n, h, columns);
        read_values<T>(l, slots + start, n, h, width, values);
        memset(scores, 0, rows * KEYS * 4);
        add_product(q, rows, d, columns, KEYS, KEYS, scores, KEYS);
        for (i64 r = 0; r < rows; r++) {
            const i64 p = s.positions[first + r / G];
            const i64 from = l.window ? p + 1 - l.window - start : 0, to = p + 1 - start;  // the keys that this row sees
            float* row = scores + r * KEYS;
            for (i64 j = 0; j < KEYS; j++) row[j] = j >= from && j < to ? row[j] : -__builtin_inff();
            vf most = load(row);
            for (i64 j = W; j < KEYS; j += W) most = larger(most, load(row + j));
            float top = tops[r];
            for (int i = 0; i < W; i++) top = most[i] > top ? most[i] : top;
            if (top == -__builtin_inff()) {  // the window of this row begins further on
                memset(row, 0, KEYS * 4);
                continue;
            }
            const float kept = totals[r] > 0 ? exp(all(tops[r] - top))[0] : 0;
            vf total = {};
            for (i64 j = 0; j < KEYS; j += W) {
                vf x = load(row + j) - top;
                x = x < -87.0f ? vf{} : exp(x);  // a masked key has no share at all
                store(row + j, x);
                total += x;
            }
            tops[r] = top, totals[r] = totals[r] * kept + sum(total);
            if (kept != 1)
                for (i64 i = 0; i < width; i += W) store(mixed + r * width + i, load(mixed + r * width + i) * kept);
        }
        add_product(shares, rows, n, values, width, width, mixed, width);
    }
    for (i64 r = 0; r < rows; r++) {
        float* out = b.attended + (first + r / G) * l.out.k + (h * G + r % G) * d;
        for (i64 i = 0; i < d; i++) out[i] = mixed[r * width + i] / totals[r];
    }
}

// --- the step ------------------------------------------------------------------------------------------------------------------

inline void embed(const Step& s, i64 n, float* x) {
    const i64 at = s.tokens[n] * s.dim;
    for (i64 i = 0; i < s.dim; i++) x[i] = s.half ? wide(((const bf16*)s.embedding)[at + i]) : ((const float*)s.embedding)[at + i];
}

// Behind the tokens from n on that belong to one request, at most so many.
inline i64 unit_end(const Step& s, i64 n, i64 most) {
    i64 last = n + 1;
    while (last < s.M && last - n < most && s.request[last] == s.request[n]) last++;
    return last;
}

// One head of one token: q or k normed and turned, and k with its v written to the cache.
template <class T>
inline void place(const Step& s, const Layer& l, const Room& b, i64 n, i64 h) {
    float* row = b.qkv + n * l.qkv.n;
    const bool is_q = h < l.heads;
    const float scale = is_q ? 1.0f / __builtin_sqrtf(float(l.head_dim)) : 1.0f;
    turn(s, l, is_q ? l.q_norm : l.k_norm, s.positions[n], scale, row + h * l.head_dim);
    if (!is_q) write_entries<T>(s, l, row, n, h - l.heads);
}

template <class T>
inline void attention(const Step& s, const Layer& l, const Room& b, const Crew& crew) {
    const i64 all = l.heads + l.kv_heads, K = l.kv_heads, M = s.M;
    crew.stretches(M, [&](i64 n, int) {
        for (i64 h = 0; h < all; h++) place<T>(s, l, b, n, h);
    });
    // Tokens of one request, as many as a tile has rows for, are a unit of work for each head of keys and values.
    const i64 most = QUERIES * K / l.heads > 1 ? QUERIES * K / l.heads : 1;
    i64 units = 0;
    for (i64 n = 0; n < M; units++) b.starts[units] = n, n = unit_end(s, n, most);
    b.starts[units] = M;
    crew.each(units * K, [&](i64 u, int rank) {
        const i64 unit = units - 1 - u / K, h = u % K, first = b.starts[unit], last = b.starts[unit + 1];  // the longest first
        float* memory = b.scores + rank * b.per_thread;
        if (last - first >= FEW) return attend_tiles<T>(s, l, b, first, last, h, memory);
        for (i64 n = first; n < last; n++) attend<T>(s, l, b.qkv + n * l.qkv.n, n, h, memory, b.attended + n * l.out.k);
    });
}

inline void run_step(const Step& s, const Room& b, const Crew& crew) {
    const i64 D = s.dim, M = s.M;
    crew.stretches(M, [&](i64 r, int) { embed(s, r, b.x + r * D); });
    for (i64 i = 0; i < s.count; i++) {
        const Layer& l = s.layers[i];
        Prepared rows = b.of(l.qkv, M);
        crew.stretches(M, [&](i64 r, int) {
            if (i) add(b.delta + r * D, b.x + r * D, D);
            norm(b.x + r * D, l.norm1, s.half, D, float(l.eps), 1, b.h + r * D);
            prepare(l.qkv, b.h + r * D, r, false, rows);
        });
        multiply(l.qkv, rows, M, {b.qkv, l.qkv.n}, crew);
        s.half_cache ? attention<bf16>(s, l, b, crew) : attention<float>(s, l, b, crew);
        rows = b.of(l.out, M);
        crew.stretches(M, [&](i64 r, int) { prepare(l.out, b.attended + r * l.out.k, r, false, rows); });
        multiply(l.out, rows, M, {b.delta, D}, crew);
        rows = b.of(l.gate_up, M);
        crew.stretches(M, [&](i64 r, int) {
            add(b.delta + r * D, b.x + r * D, D);
            norm(b.x + r * D, l.norm2, s.half, D, float(l.eps), 1, b.h + r * D);
            prepare(l.gate_up, b.h + r * D, r, false, rows);
        });
        multiply(l.gate_up, rows, M, {b.gate_up, l.gate_up.n}, crew);
        rows = b.of(l.down, M);
        crew.stretches(M, [&](i64 r, int) {
            gate(b.gate_up + r * l.gate_up.n, l.hidden);
            prepare(l.down, b.gate_up + r * l.gate_up.n, r, false, rows);
        });
        multiply(l.down, rows, M, {b.delta, D}, crew);
    }
    crew.stretches(M, [&](i64 r, int) {
        add(b.delta + r * D, b.x + r * D, D);
        norm(b.x + r * D, s.norm, s.half, D, float(s.eps), 1, s.hidden + r * D);
    });
}

}  // namespace
