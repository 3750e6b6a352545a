// The words that the kernels are written with: vectors of W 32-bit lanes, bfloat16 as bits, dot products of short numbers.
// GCC's and Clang's vector types carry everything but those dot products, which are one instruction on newer processors.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using i64 = int64_t;
struct bf16 { uint16_t bits; };
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));  // W bfloat16 numbers as bits

inline vf all(float x) { return x - vf{}; }
inline vi all(int32_t x) { return x - vi{}; }
inline vf load(const float* p) { return *(const vf*)p; }
inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
inline void store(float* p, vf x) { *(vf*)p = x; }
inline void store(bf16* p, vf x) {  // to nearest, ties to even
    vu bits = (vu)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(vh*)p = __builtin_convertvector(bits, vh);
}
inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bf16* p) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
#endif
}

// The sums of four vectors, each in the order of `sum`, at 1.5 times the cost of one.
inline void sums_of_four(const vf* x, float* out) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);  // halves of each: 8 sums of a, 8 of b
    __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    __m512 all = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);  // 4 of each
    all += _mm512_permute_ps(all, 0x4e);
    all += _mm512_permute_ps(all, 0xb1);
    const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

// W rows of W numbers, as columns: out[i * stride + j] = rows[j][i].
template <class T>
inline void transpose(const T* const* rows, float* out, i64 stride) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), high = low + _mm512_set1_epi32(8);
    __m512 x[W], y[W];
    for (int i = 0; i < W; i++) x[i] = (__m512)load(rows[i]);
    for (int round = 0; round < 4; round++) {  // each shuffles the first half of the vectors with the second, as cards
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + W / 2]);
            y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + W / 2]);
        }
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
    for (int i = 0; i < W; i++) store(out + i * stride, (vf)x[i]);
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) out[i * stride + j] = wide(rows[j][i]);
#endif
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// e^x: 2^n times a polynomial, wrong by at most 2e-7 (1 + |x| / 4) of its value; it stays at e^-87 below and at e^88 above.
inline vf exp(vf x) {
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    vf y = x * 1.4426950408889634f;
    vf shifted = y + 12582912.0f;  // 1.5 * 2^23: the sum keeps whole numbers, to nearest, in its low bits
    vf f = y - (shifted - 12582912.0f);
    vf p = all(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
}
inline vi whole(vf x) {  // to nearest, ties to even; |x| < 2^22. An instruction, since the compiler may fuse a sum with what made x
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)x);
#else
    return (vi)(x + 12582912.0f) - 0x4b400000;
#endif
}

// --- rows of float32 or bfloat16, as they lie in a checkpoint ------------------------------------------------------------

typedef uint32_t vraw __attribute__((vector_size(4 * W), aligned(2), may_alias));  // 64, 32 or 16 bytes of a row, which may begin anywhere
template <class T> constexpr i64 STEP = 4 * W / sizeof(T);
template <class T> inline vraw raw(const T* p) { return *(const vraw*)p; }

inline vf dot(vf sums, vraw a, vraw b, const float*) { return (vf)a * (vf)b + sums; }
inline vf dot(vf sums, vraw a, vraw b, const bf16*) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums = (vf)(a << 16) * (vf)(b << 16) + sums;
    return (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000) + sums;
#endif
}

// --- 8 and 4 bits: each lane gets the sum of four products of bytes -------------------------------------------------------

// Activations are kept as a + ZERO in a byte: AVX-512's instruction takes them without a sign.
#if defined(__AVX512VNNI__)
constexpr int ZERO = 128;
#else
constexpr int ZERO = 0;
#endif

#if !defined(__AVX2__)
inline vi four(vi sums, vi a, vi b, bool sign_a) {  // byte by byte
    for (int at = 24; at >= 0; at -= 8) {
        vi x = a << at;
        sums += (sign_a ? x >> 24 : (vi)((vu)x >> 24)) * ((b << at) >> 24);
    }
    return sums;
}
#endif

// activations (+ ZERO) times weights in -127..127
inline vi dot_int8(vi sums, vi a, vi w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)w);
#elif defined(__AVX2__)  // |w| times a with w's sign: pairs stay below 2 * 127 * 127 < 2^15
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)a, (__m256i)w));
    return sums + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return four(sums, a, w, true);
#endif
}

// codes 0..15 times activations in -127..127
inline vi dot_int4(vi sums, vi codes, vi a) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)a);
#elif defined(__AVX2__)
    return sums + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)a), _mm256_set1_epi16(1));
#else
    return four(sums, codes, a, false);
#endif
}

}  // namespace
