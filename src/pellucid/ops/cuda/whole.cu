// All layers of a step of one row in one kernel (see whole.py beside this file, which says how it is launched and what the numbers are).
//
// P programs, one on each processor and all there at once, walk through the layers together. In each phase of a layer every program makes a
// few entries of a vector that all need in the next one:
//
//     qkv      rows of q, k, v of the norm of x                      (product A)
//     part     attention of the G query heads of a key/value head over one of S parts of the context
//     mixed    the parts joined, a slice of the heads each
//     middle   rows of the output product, added to x                (product O)
//     gated    rows of silu(gate) up of the norm of it               (product G)
//     x        rows of the down product, added to middle             (product W)
//
// There is no barrier between programs. An entry travels as a word of 8 bytes, half of it the float32 value and half a tag that no other
// layer and no other launch has: who needs it reads the word until the tag is right (`hear`, `tell`). Words lie in two places by turns;
// whoever writes a layer's has heard from all programs that the layer before the last is done. All sums have one order. So that waiting
// does not take the memory's time, words are read when a count says that they should be there: one thread of each program (the watcher)
// reads the counts and nothing else, and lets the others go on. A count is a hint; what is right is decided by tags.
//
// Weights do not wait for anything: one thread of each program (the feeder) has the copy engine fill a ring of SLOTS in shared memory with
// the program's rows, layer after layer, as far ahead as there is room, and the memory never rests. In a product each warp owns some
// columns, 64 in a row, of all rows: it hears these entries of the vector and begins (`listen`, `multiply`). The warps' sums of a row meet in
// shared memory, and the first warp tells them.
//
// The tensor cores multiply, since a thread that takes bfloat16 apart itself spends more instructions than there is time for. The vector
// stays as good as float32: it is the sum of three bfloat16 numbers (8 + 8 + 8 bits), which are three columns of the second factor. What is
// rounded to bfloat16 anyway (`mixed` and `gated`, as in the chain of kernels) travels two to a word and needs one column.
//
// Numbers fixed when this is compiled: D width, I hidden width, H, K heads, HD head dim, S parts, P programs, RA RO RG RW rows of a program, NORM, SLOTS,
// AHEAD bytes of the head that are asked for, WARPS that compute, PATIENCE.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

constexpr int G = H / K, THREADS = 32 * WARPS, PAD = 64, SLOT = 16896;  // PAD bytes between rows: neighbours lie in other banks
constexpr int WIDEST = I > H * HD ? (I > D ? I : D) : (H * HD > D ? H * HD : D);  // of the vectors
constexpr int ACROSS = WARPS + 1;  // numbers from row to row of sums: not a multiple of the banks
constexpr int QKV = (H + 2 * K) * HD, SUMS = QKV + S * H * HD, MIXED = SUMS + S * H, MIDDLE = MIXED + H * HD, GATED = MIDDLE + D, X = GATED + I,
              PLACE = X + D;
enum Kind { FROM_X, FROM_QKV, FROM_PARTS, FROM_MIXED, FROM_MIDDLE, FROM_GATED, KINDS };
constexpr int TELLING = G * HD / 32;  // warps that tell parts
constexpr int LANES = HD / 8, AT_ONCE = 32 / LANES;  // lanes of a key, keys of a warp
constexpr int ROUNDS = WARPS > 8 ? 1 : 3;  // of keys that are on their way
constexpr int STEP = WARPS * AT_ONCE;

struct Layer {  // addresses; one row of `layers`
    const u16 *qkv, *out, *up, *down, *norm1, *norm2, *q_norm, *k_norm;
    u16 *keys, *values;
    const long long* slots;
    long long stride, window;
};

__device__ __forceinline__ float low(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }
__device__ __forceinline__ float wide(u16 one) { return __uint_as_float((u32)one << 16); }
__device__ __forceinline__ u16 narrow(float x) {  // to the nearest, ties to even
    u32 b = __float_as_uint(x);
    return x != x ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

__device__ __forceinline__ u32 both(float first, float second) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}

__device__ __forceinline__ void tell_two(u64* word, u32 two, u32 tag) {
    u64 w = (u64)tag << 32 | two;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(word), "l"(w) : "memory");
}
__device__ __forceinline__ void tell(u64* word, float value, u32 tag) { tell_two(word, __float_as_uint(value), tag); }

__device__ __forceinline__ float hear(const u64* word, u32 tag) {
    u64 w;
    for (int left = PATIENCE; left; left--) {
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(w) : "l"(word) : "memory");
        if ((u32)(w >> 32) == tag) return __uint_as_float((u32)w);
    }
    return __uint_as_float(0x7fffffff);  // nobody will say it: better no number than no end
}

// Entries and weights of every `each`-th part from `first` on; those from `used` on weigh nothing.
template <int N> __device__ __forceinline__ void hear_parts(float (&value)[N], float (&norm)[N], const u64* values, const u64* norms, int first, int each, int used, u32 tag) {
    bool all = false;
    for (int left = PATIENCE; left && !all; left--) {
        u64 v[N], w[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            int s = min(first + n * each, used - 1);
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v[n]) : "l"(values + s * H * HD) : "memory");
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(w[n]) : "l"(norms + s * H) : "memory");
        }
        all = true;
#pragma unroll
        for (int n = 0; n < N; n++) {
            all &= (u32)(v[n] >> 32) == tag && (u32)(w[n] >> 32) == tag;
            value[n] = __uint_as_float((u32)v[n]), norm[n] = first + n * each < used ? __uint_as_float((u32)w[n]) : -1e30f;
        }
    }
    if (!all) value[0] = norm[0] = __uint_as_float(0x7fffffff);
}

__device__ __forceinline__ u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile("{ .reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN; }" ::"r"(shared_at(barrier)), "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_at(barrier)) : "memory"); }
__device__ __forceinline__ void count_up(u32* count) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
__device__ __forceinline__ void watch(const u32* count, u32 target) {
    for (int left = PATIENCE; left; left--) {
        u32 seen;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
        if ((int)(seen - target) >= 0) return;
    }
}
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }  // all but the feeder

template <int N> __device__ __forceinline__ float sum_over(float x) {  // of N lanes in a row
#pragma unroll
    for (int n = N / 2; n; n /= 2) x += __shfl_xor_sync(~0u, x, n);
    return x;
}

__device__ __forceinline__ void counted(u32* count, int lane) {  // a warp's words are told
    __syncwarp();
    if (lane == 0) count_up(count);
}

__device__ __forceinline__ float row_sum(const float* sums, int row) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[row * ACROSS + w];
    return sum;
}

// Rows of weights (of COLS columns) that a slot takes.
__device__ __forceinline__ constexpr int rows_of(int cols) { return cols <= 1024 ? 8 : cols <= 2048 ? 4 : cols <= 4096 ? 2 : 1; }

struct Ring {  // of weights: filled by the feeder, freed by each warp
    char* room;
    u64 *full, *empty;
    int slot;
    u32 parity;

    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void feed(const u16* from, int rows, int columns) {
        wait(empty + slot, parity ^ 1);
        u32 barrier = shared_at(full + slot);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(rows * columns * 2) : "memory");
        for (int r = 0; r < rows; r++)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             shared_at(room + slot * SLOT + r * (columns * 2 + PAD))),
                         "l"(from + (long long)r * columns), "r"(columns * 2), "r"(barrier)
                         : "memory");
        next();
    }
    // The next 8 rows, and this lane's one among them.
    template <int COLS> __device__ __forceinline__ const char* open(int row) {
        constexpr int EACH = rows_of(COLS);
        const char* mine = room;
#pragma unroll
        for (int n = 0; n < 8 / EACH; n++) {
            wait(full + slot, parity);
            if (row / EACH == n) mine = room + slot * SLOT + row % EACH * (COLS * 2 + PAD);
            next();
        }
        return mine;
    }
    template <int COLS> __device__ __forceinline__ void close(int lane, int groups) {
        __syncwarp();
        for (int n = 0; n < groups * 8 / rows_of(COLS); n++) {
            if (lane == 0) arrive(empty + slot);
            next();
        }
    }
};

template <int ROWS, int COLS> __device__ __forceinline__ void feed_rows(Ring& ring, const u16* weight, int first) {
    constexpr int EACH = rows_of(COLS);
    for (int r = 0; r < ROWS; r += EACH) ring.feed(weight + (long long)(first + r) * COLS, EACH, COLS);
}

// Whether a warp's n-th slice of the columns is one (always, where the warps share them evenly).
template <int COLS> __device__ __forceinline__ bool within(int warp, int n) { return COLS % (64 * WARPS) == 0 || (n * WARPS + warp) * 64 < COLS; }

// d (16, 8) += a (16, 16) b (16, 8), bfloat16 and float32.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// This warp's share of the sums of the next ROWS rows in the ring: to sums[row][warp]. The 16 rows of the first factor are 8 rows of weights
// in columns 0 .. 31 of a slice and the same 8 in columns 32 .. 63; columns 0 .. 2 of the second factor are the vector's three parts in the
// former, 3 .. 5 in the latter. Which 16 columns are together in one product does not matter: a lane reads 8 in a row.
constexpr int BATCH_SLOTS = 6;
__device__ __forceinline__ constexpr int batch_of(int groups, int slots) {  // groups of 8 rows whose latencies hide each other's
    int n = groups;
    while (n > 1 && (groups % n || n * slots > BATCH_SLOTS)) n--;
    return n;
}

template <int ROWS, int COLS, int N>
__device__ __forceinline__ void multiply(Ring& ring, const u32 (&b)[N][4], float* sums, int warp, int lane) {
    constexpr int BATCH = batch_of(ROWS / 8, 8 / rows_of(COLS));
    int row = lane / 4, quarter = lane % 4;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += 8 * BATCH) {
        const char* weights[BATCH];
        Ring at = ring;
#pragma unroll
        for (int g = 0; g < BATCH; g++) weights[g] = at.open<COLS>(row) + 2 * (warp * 64 + quarter * 8);
        float d[BATCH][4] = {};
#pragma unroll
        for (int n = 0; n < N; n++)
            if (within<COLS>(warp, n)) {
#pragma unroll
                for (int g = 0; g < BATCH; g++) {
                    uint4 one = *(const uint4*)(weights[g] + n * 128 * WARPS), two = *(const uint4*)(weights[g] + n * 128 * WARPS + 64);
                    mma(d[g], one.x, two.x, one.y, two.y, b[n][0], b[n][1]);
                    mma(d[g], one.z, two.z, one.w, two.w, b[n][2], b[n][3]);
                }
            }
#pragma unroll
        for (int g = 0; g < BATCH; g++) {
            float sum = quarter == 0 ? d[g][0] + d[g][1] : quarter == 1 ? d[g][0] + d[g][3] : quarter == 2 ? d[g][2] + d[g][3] : 0;
            sum = sum_over<4>(sum);
            if (quarter == 0) sums[(r + 8 * g + row) * ACROSS + warp] = sum;
        }
        ring.close<COLS>(lane, BATCH);
    }
}

// A warp's columns of the vector, times a norm's weights if there are any, by way of `vector` (3, COLS) in shared memory to b: the second
// factor of `multiply`. The squares' sum goes to squares[warp].  PAIRS: a word holds two bfloat16 entries.
template <int COLS, int N, bool PAIRS>
__device__ __forceinline__ void listen(u32 (&b)[N][4], const u64* words, u32 tag, const u16* norm, u32* vector, float* squares, int warp, int lane,
                                       u64* ready, int layer) {
    int column = warp * 64 + lane * 2;
    u32 w[N];
    if (norm) {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (within<COLS>(warp, n)) w[n] = *(const u32*)(norm + column + n * 64 * WARPS);
    }
    wait(ready, layer & 1);
    u64 first[N], second[N];
    bool all = false;
    for (int left = PATIENCE; left && !all; left--) {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (within<COLS>(warp, n)) {
                if (PAIRS) asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(first[n]) : "l"(words + column / 2 + n * 32 * WARPS) : "memory");
                else
                    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(first[n]), "=l"(second[n]) : "l"(words + column + n * 64 * WARPS) : "memory");
            }
        all = true;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (within<COLS>(warp, n)) all &= (u32)(first[n] >> 32) == tag && (PAIRS || (u32)(second[n] >> 32) == tag);
    }
    if (!all) first[0] = PAIRS ? 0x7fff7fff : 0x7fffffff;
    float square = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
        if (within<COLS>(warp, n)) {
            u32* to = vector + column / 2 + n * 32 * WARPS;
            if (PAIRS) {
                to[0] = (u32)first[n];
                continue;
            }
            float x = __uint_as_float((u32)first[n]), y = __uint_as_float((u32)second[n]);
            square += x * x + y * y;
            if (norm) x *= low(w[n]), y *= high(w[n]);
#pragma unroll
            for (int p = 0; p < 3; p++) {
                u32 two = both(x, y);
                to[p * COLS / 2] = two;
                x -= low(two), y -= high(two);
            }
        }
    if (!PAIRS) {
        square = sum_over<32>(square);
        if (lane == 0) squares[warp] = square;
    }
    __syncwarp();
    int piece = lane / 4 % 3, half = lane / 12;
    bool zero = half > 1 || (PAIRS && piece);
#pragma unroll
    for (int n = 0; n < N; n++)
        if (within<COLS>(warp, n)) {
            uint4 four{};
            if (!zero) four = *(const uint4*)(vector + (piece * COLS + warp * 64 + n * 64 * WARPS + half * 32 + lane % 4 * 8) / 2);
            b[n][0] = four.x, b[n][1] = four.y, b[n][2] = four.z, b[n][3] = four.w;
        }
}

// 8 entries of a key and of its value.
__device__ __forceinline__ void fetch(uint4& k, uint4& v, const Layer& y, long long slot, int kh, int e) {
    long long entry = (slot * K + kh) * HD + e;
    k = *(const uint4*)(y.keys + entry), v = *(const uint4*)(y.values + entry);
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1)
    whole(const long long* numbers, const long long* drawn, const u16* table, const Layer* layers, const float* frequencies, const u16* last_norm,
          const char* head, u64* words, long long* counter, u16* result, int count, int turned, float eps, float head_eps, float factor, float scale) {
    extern __shared__ __align__(1024) char shared[];
    Layer* kept = (Layer*)(shared + SLOTS * SLOT + (WIDEST * 6 > WARPS * G * HD * 4 ? WIDEST * 6 : WARPS * G * HD * 4));
    __shared__ u64 full[SLOTS], empty[SLOTS], ready[KINDS];
    __shared__ float sums_even[2 * RG > RA ? 2 * RG * ACROSS : RA * ACROSS], sums_odd[RO > RW ? RO * ACROSS : RW * ACROSS], squares[WARPS];
    __shared__ float raw[(G + 2) * HD], heads[(G + 2) * HD], part_top[WARPS][G], part_sum[WARPS][G];
    u32* vector = (u32*)(shared + SLOTS * SLOT);  // and the parts, which are needed at other times
    float(*parts)[G][HD] = (float(*)[G][HD])(shared + SLOTS * SLOT);  // [WARPS]
    int t = threadIdx.x, warp = t / 32, lane = t % 32, pid = blockIdx.x;
    if (t < SLOTS) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_at(full + t)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_at(empty + t)), "n"(WARPS) : "memory");
    }
    if (t < KINDS) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_at(ready + t)) : "memory");
    for (int i = t; i < count * (int)(sizeof(Layer) / 8); i += blockDim.x) ((u64*)kept)[i] = ((const u64*)layers)[i];
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    Ring ring{shared, full, empty, 0, 0};

    u32* counts = (u32*)counter + 32;  // of words told, 32 numbers apart: one of each kind, of the parts one for each key/value head
    u32 launch = (u32)counter[0];
    long long row = numbers[1];
    int position = (int)numbers[2], kh = pid % K, split = pid / K;

    if (warp == WARPS) {  // the feeder
        if (lane == 0) {
            for (int l = 0; l < count; l++) {
                const Layer& y = kept[l];
                feed_rows<RA, D>(ring, y.qkv, pid * RA);
                feed_rows<RO, H * HD>(ring, y.out, pid * RO);
                feed_rows<RG, D>(ring, y.up, pid * RG);
                feed_rows<RG, D>(ring, y.up + (long long)I * D, pid * RG);
                feed_rows<RW, I>(ring, y.down, pid * RW);
            }
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(head + (long long)pid * AHEAD), "r"(AHEAD) : "memory");
        }
        return;
    }
    if (warp == WARPS + 1) {  // the watcher
        if (lane == 0)
            for (int l = 0; l < count; l++) {
                u32 times = launch * count + l + 1;
                watch(counts + 32 * FROM_X, P * (times + launch)), arrive(ready + FROM_X);  // the embedding counts once more
                watch(counts + 32 * FROM_QKV, P * times), arrive(ready + FROM_QKV);
                watch(counts + 32 * (KINDS + kh), S * TELLING * times), arrive(ready + FROM_PARTS);
                watch(counts + 32 * FROM_MIXED, K * S * times), arrive(ready + FROM_MIXED);
                watch(counts + 32 * FROM_MIDDLE, P * times), arrive(ready + FROM_MIDDLE);
                watch(counts + 32 * FROM_GATED, P * times), arrive(ready + FROM_GATED);
            }
        return;
    }

    u32 tag = (launch + 1) * (count + 1);  // of the embedding's words; then one more for each layer
    float residual = 0;  // of this program's rows of x, in the first lanes
    if (t < RW) {
        long long source = numbers[4], token = source < 0 ? numbers[0] : drawn[source];
        if (token < 0) token = 0;  // logits that were no numbers; who reads them says so
        tell(words + PLACE + X + pid * RW + t, residual = wide(table[token * D + pid * RW + t]), tag);
    }
    if (t == 0) count_up(counts + 32 * FROM_X);
    float cos_ = 1, sin_ = 0;  // of the head's entry t % HD
    int at = t % HD, partner = at < turned / 2 ? at + turned / 2 : at < turned ? at - turned / 2 : at;
    if (at < turned) {
        float angle = (float)position * frequencies[at % (turned / 2)];
        cos_ = cosf(angle) * factor, sin_ = (at < turned / 2 ? -sinf(angle) : sinf(angle)) * factor;
    }
    constexpr int ND = (D / 64 + WARPS - 1) / WARPS, NH = (H * HD / 64 + WARPS - 1) / WARPS, NI = (I / 64 + WARPS - 1) / WARPS;

    int e = lane % LANES * 8, next_id[ROUNDS], next_own;
    // The positions of this program's part, of those that the window leaves; the token's own entry is not in the cache yet.
    auto span = [&](const Layer& y, int& begin, int& end, int& used) {
        int first = y.window && position + 1 > y.window ? position + 1 - (int)y.window : 0, share = (position + 1 - first + S - 1) / S;
        used = (position + share - first) / share, begin = first + split * share, end = min(begin + share, position + 1);
    };
    auto look_up = [&](const Layer& y) {  // the first slots that a layer reads, and the one that it writes: long before it begins
        int begin, end, used;
        span(y, begin, end, used);
        const long long* slots = y.slots + row * y.stride;
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            int key = begin + warp * AT_ONCE + lane / LANES + n * STEP;
            next_id[n] = key < min(end, position) ? (int)slots[key] : 0;
        }
        next_own = end > position ? (int)slots[position] : 0;
    };
    look_up(kept[0]);

    for (int l = 0; l < count; l++) {
        const Layer& y = kept[l];
        u64 *here = words + (l % 2) * PLACE, *before = words + ((l + 1) % 2) * PLACE + X;
        u32 now = tag + l + 1, last = tag + l;
        if (l + 1 < count && t < D / 32) {  // the next layer's norms are on their way
            const u16* next = t < D / 64 ? kept[l + 1].norm1 + t * 64 : kept[l + 1].norm2 + (t - D / 64) * 64;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(next));
        }
        int begin, end, used;
        span(y, begin, end, used);
        const long long* slots = y.slots + row * y.stride;
        int key = begin + warp * AT_ONCE + lane / LANES, cached = min(end, position), own_slot = next_own;
        uint4 k[ROUNDS], v[ROUNDS];
        int id[ROUNDS];  // slots of the keys after these
#pragma unroll
        for (int n = 0; n < ROUNDS; n++)
            if (key + n * STEP < cached) fetch(k[n], v[n], y, next_id[n], kh, e);
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) id[n] = key + (ROUNDS + n) * STEP < cached ? (int)slots[key + (ROUNDS + n) * STEP] : 0;
        constexpr int TIMES = ((G + 2) * HD + THREADS - 1) / THREADS;
        u16 norm[TIMES], norm_partner[TIMES];
        if (NORM) {
#pragma unroll
            for (int n = 0; n < TIMES; n++) {
                const u16* weight = t + n * THREADS < G * HD ? y.q_norm : y.k_norm;
                norm[n] = weight[at], norm_partner[n] = weight[partner];
            }
        }
        {  // A
            u32 x[ND][4];
            listen<D, ND, false>(x, before, last, y.norm1, vector, squares, warp, lane, ready + FROM_X, l);
            multiply<RA, D, ND>(ring, x, sums_even, warp, lane);
            meet();
            if (warp == 0) {
                float rstd = rsqrtf(sum_over<WARPS>(squares[lane % WARPS]) / D + eps);
                for (int r = lane; r < RA; r += 32) tell(here + pid * RA + r, row_sum(sums_even, r) * rstd, now);
                counted(counts + 32 * FROM_QKV, lane);
            }
        }
        u32* part_count = counts + 32 * (KINDS + kh);
        if (split < used) {  // part
            wait(ready + FROM_QKV, l & 1);
            for (int i = t; i < (G + 2) * HD; i += THREADS) {
                int h = i / HD, row = h < G ? kh * G + h : h == G ? H + kh : H + K + kh;
                raw[i] = hear(here + row * HD + i % HD, now);
            }
            meet();
#pragma unroll
            for (int n = 0; n < TIMES; n++) {
                int i = t + n * THREADS, h = i / HD;
                if (i >= (G + 2) * HD) break;
                float x = raw[i], p = raw[h * HD + partner];
                if (h <= G) {
                    if (NORM) {
                        float square = 0;
#pragma unroll
                        for (int j = 0; j < HD; j += 32) square += raw[h * HD + j + lane] * raw[h * HD + j + lane];
                        float rstd = rsqrtf(sum_over<32>(square) / HD + head_eps);
                        x *= rstd * wide(norm[n]), p *= rstd * wide(norm_partner[n]);
                    }
                    x = x * cos_ + p * sin_;
                }
                heads[i] = h < G ? x * scale : wide(narrow(x));
                if (h >= G && end > position) (h == G ? y.keys : y.values)[((long long)own_slot * K + kh) * HD + at] = narrow(x);
            }
            meet();
            float q[G][8], mixed[G][8], top[G], total[G];
#pragma unroll
            for (int g = 0; g < G; g++) {
                top[g] = -1e30f, total[g] = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) q[g][i] = heads[g * HD + e + i], mixed[g][i] = 0;
            }
            for (int any = begin + warp * AT_ONCE; any < end; any += ROUNDS * STEP) {
#pragma unroll
                for (int n = 0; n < ROUNDS; n++) {
                    if (any + n * STEP >= end) break;
                    float kf[8] = {low(k[n].x), high(k[n].x), low(k[n].y), high(k[n].y), low(k[n].z), high(k[n].z), low(k[n].w), high(k[n].w)};
                    float vf[8] = {low(v[n].x), high(v[n].x), low(v[n].y), high(v[n].y), low(v[n].z), high(v[n].z), low(v[n].w), high(v[n].w)};
                    int this_key = key;
                    if (key + ROUNDS * STEP < cached) fetch(k[n], v[n], y, id[n], kh, e);
                    if (key + 2 * ROUNDS * STEP < cached) id[n] = (int)slots[key + 2 * ROUNDS * STEP];
                    key += STEP;
                    if (this_key == position) {
#pragma unroll
                        for (int i = 0; i < 8; i++) kf[i] = heads[G * HD + e + i], vf[i] = heads[(G + 1) * HD + e + i];
                    }
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        float score = 0;
#pragma unroll
                        for (int i = 0; i < 8; i++) score += q[g][i] * kf[i];
                        score = sum_over<LANES>(score);
                        if (this_key < end) {
                            float higher = fmaxf(top[g], score), kept = exp2f(top[g] - higher), weight = exp2f(score - higher);
                            top[g] = higher, total[g] = total[g] * kept + weight;
#pragma unroll
                            for (int i = 0; i < 8; i++) mixed[g][i] = mixed[g][i] * kept + weight * vf[i];
                        }
                    }
                }
            }
#pragma unroll
            for (int g = 0; g < G; g++) {  // the keys of a warp, then the warps
#pragma unroll
                for (int n = LANES; n < 32; n *= 2) {
                    float other = __shfl_xor_sync(~0u, top[g], n), sum = __shfl_xor_sync(~0u, total[g], n), higher = fmaxf(top[g], other);
                    float mine = exp2f(top[g] - higher), theirs = exp2f(other - higher);
                    top[g] = higher, total[g] = total[g] * mine + sum * theirs;
#pragma unroll
                    for (int i = 0; i < 8; i++) mixed[g][i] = mixed[g][i] * mine + __shfl_xor_sync(~0u, mixed[g][i], n) * theirs;
                }
                if (lane < LANES) {
#pragma unroll
                    for (int i = 0; i < 8; i++) parts[warp][g][e + i] = mixed[g][i];
                }
                if (lane == 0) part_top[warp][g] = top[g], part_sum[warp][g] = total[g];
            }
            meet();
            for (int i = t; i < G * HD; i += THREADS) {
                int g = i / HD;
                float highest = -1e30f, sum = 0, value = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, part_top[w][g]);
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    float weight = exp2f(part_top[w][g] - highest);
                    sum += part_sum[w][g] * weight, value += parts[w][g][i % HD] * weight;
                }
                tell(here + QKV + (split * H + kh * G + g) * HD + i % HD, value / sum, now);
                if (i % HD == 0) tell(here + SUMS + split * H + kh * G + g, highest + log2f(sum), now);
                counted(part_count, lane);
            }
        } else if (split < S) {
            for (int w = warp; w < TELLING; w += WARPS) counted(part_count, lane);
        }
        if (split < S && warp == 0) {  // mixed: EACH lanes for an entry
            constexpr int SLICE = G * HD / S, EACH = 32 / SLICE;
            wait(ready + FROM_PARTS, l & 1);
            int entry = split * SLICE + lane / EACH, h = kh * G + entry / HD;
            float value[S / EACH], norm[S / EACH], highest = -1e30f, sum = 0, all = 0;
            hear_parts<S / EACH>(value, norm, here + QKV + h * HD + entry % HD, here + SUMS + h, lane % EACH, EACH, used, now);
#pragma unroll
            for (int n = 0; n < S / EACH; n++) highest = fmaxf(highest, norm[n]);
#pragma unroll
            for (int n = 1; n < EACH; n *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, n));
#pragma unroll
            for (int n = 0; n < S / EACH; n++) {
                float weight = exp2f(norm[n] - highest);
                sum += weight, all += weight * value[n];
            }
            sum = sum_over<EACH>(sum), all = sum_over<EACH>(all);
            float mine = all / sum, next = __shfl_down_sync(~0u, mine, EACH);
            if (lane % (2 * EACH) == 0) tell_two(here + MIXED + (h * HD + entry % HD) / 2, both(mine, next), now);
            counted(counts + 32 * FROM_MIXED, lane);
        }
        if (l + 1 < count) look_up(kept[l + 1]);
        {  // O
            u32 x[NH][4];
            listen<H * HD, NH, true>(x, here + MIXED, now, nullptr, vector, squares, warp, lane, ready + FROM_MIXED, l);
            multiply<RO, H * HD, NH>(ring, x, sums_odd, warp, lane);
            meet();
            if (warp == 0) {
                if (lane < RO) tell(here + MIDDLE + pid * RO + lane, residual += row_sum(sums_odd, lane), now);
                counted(counts + 32 * FROM_MIDDLE, lane);
            }
        }
        {  // G
            u32 x[ND][4];
            listen<D, ND, false>(x, here + MIDDLE, now, y.norm2, vector, squares, warp, lane, ready + FROM_MIDDLE, l);
            multiply<2 * RG, D, ND>(ring, x, sums_even, warp, lane);
            meet();
            if (warp == 0) {
                float rstd = rsqrtf(sum_over<WARPS>(squares[lane % WARPS]) / D + eps);
                for (int r = lane; r < (RG + 31) / 32 * 32; r += 32) {
                    int row = min(r, RG - 1);
                    float gate = row_sum(sums_even, row) * rstd, up = row_sum(sums_even, RG + row) * rstd;
                    float mine = gate / (1 + __expf(-gate)) * up, next = __shfl_down_sync(~0u, mine, 1);
                    if (r < RG && r % 2 == 0) tell_two(here + GATED + (pid * RG + r) / 2, both(mine, next), now);
                }
                counted(counts + 32 * FROM_GATED, lane);
            }
        }
        {  // W
            u32 x[NI][4];
            listen<I, NI, true>(x, here + GATED, now, nullptr, vector, squares, warp, lane, ready + FROM_GATED, l);
            multiply<RW, I, NI>(ring, x, sums_odd, warp, lane);
            meet();
            if (warp == 0) {
                if (lane < RW) tell(here + X + pid * RW + lane, residual += row_sum(sums_odd, lane), now);
                counted(counts + 32 * FROM_X, lane);
            }
        }
    }
    if (pid == 0) {  // the last norm
        const u64* x = words + ((count + 1) % 2) * PLACE + X;
        float square = 0;
        for (int i = t; i < D; i += THREADS) {
            float value = hear(x + i, tag + count);
            square += value * value;
        }
        square = sum_over<32>(square);
        if (lane == 0) squares[warp] = square;
        meet();
        float rstd = rsqrtf(sum_over<WARPS>(squares[t % WARPS]) / D + eps);
        for (int i = t; i < D; i += THREADS) result[i] = narrow(hear(x + i, tag + count) * rstd * wide(last_norm[i]));
        if (t == 0) counter[0]++;  // all others have read it: their words are here
    }
}
