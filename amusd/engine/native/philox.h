/* Random numbers of tokens: Philox4x32-10 of eight counters at a time, as noise.py defines it. */

#ifndef AMUSD_PHILOX_H
#define AMUSD_PHILOX_H

#include "simd.h"

#define SIDE_BY_SIDE 4 /* vectors of counters */
#define PHILOX_ROUNDS 10
#define PHILOX_FACTOR 0xD2511F53u
#define PHILOX_OTHER 0xCD9E8D57u

/* What all counters of a seed and a position share. Of the counters (block, position, 0, 0), the
   first round changes two words alone to something that depends on the block, and the second one
   three. */
typedef struct {
    uint32_t keys[PHILOX_ROUNDS][2];
    uint32_t product_high, product_low; /* of the first word in the second round */
} Stream;

static inline Stream stream_of(uint64_t seed, uint64_t position)
{
    Stream stream;
    uint32_t first = (uint32_t)seed, second = (uint32_t)(seed >> 32);
    for (int i = 0; i < PHILOX_ROUNDS; i++) {
        stream.keys[i][0] = first + (uint32_t)i * 0x9E3779B9u;
        stream.keys[i][1] = second + (uint32_t)i * 0xBB67AE85u;
    }
    uint64_t product = (uint64_t)((uint32_t)position ^ first) * PHILOX_FACTOR;
    stream.product_high = (uint32_t)(product >> 32);
    stream.product_low = (uint32_t)product;
    return stream;
}

INLINE __m512i broadcast(uint32_t word) { return _mm512_set1_epi32((int)word); }

/* The high half of each 64-bit lane in its low half. A shuffle has a port beside multiplication. */
INLINE __m512i high_words(__m512i x) { return _mm512_shuffle_epi32(x, 0xF5); }

INLINE __m512i xor_three(__m512i a, __m512i b, __m512i c)
{
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}

/* The four words of the counters (block, position, 0, 0). A word is the low half of a 64-bit lane;
   the high half is arbitrary, because a product reads low halves alone. A round of one vector of
   counters waits for the one before, so several vectors advance side by side. */
INLINE void random_words(const Stream *stream, const __m512i *blocks,
                         __m512i words[SIDE_BY_SIDE][4])
{
    const __m512i factor = _mm512_set1_epi64(PHILOX_FACTOR);
    const __m512i other = _mm512_set1_epi64(PHILOX_OTHER);
    __m512i a[SIDE_BY_SIDE], b[SIDE_BY_SIDE], c[SIDE_BY_SIDE], d[SIDE_BY_SIDE];
#pragma GCC unroll 4
    for (int v = 0; v < SIDE_BY_SIDE; v++) {
        __m512i p = _mm512_mul_epu32(blocks[v], factor);
        c[v] = _mm512_xor_si512(high_words(p), broadcast(stream->keys[0][1]));
        b[v] = _mm512_mul_epu32(c[v], other);
        d[v] = broadcast(stream->product_low);
        a[v] = _mm512_xor_si512(high_words(b[v]), broadcast(stream->keys[1][0]));
        c[v] = _mm512_xor_si512(p, broadcast(stream->product_high ^ stream->keys[1][1]));
    }
#pragma GCC unroll 1
    for (int i = 2; i < PHILOX_ROUNDS; i++) {
        __m512i key = broadcast(stream->keys[i][0]), next = broadcast(stream->keys[i][1]);
#pragma GCC unroll 4
        for (int v = 0; v < SIDE_BY_SIDE; v++) {
            __m512i p = _mm512_mul_epu32(a[v], factor), q = _mm512_mul_epu32(c[v], other);
            a[v] = xor_three(high_words(q), b[v], key);
            c[v] = xor_three(high_words(p), d[v], next);
            b[v] = q;
            d[v] = p;
        }
    }
    for (int v = 0; v < SIDE_BY_SIDE; v++)
        words[v][0] = a[v], words[v][1] = b[v], words[v][2] = c[v], words[v][3] = d[v];
}

/* Random numbers of 128 tokens from `first` on, a multiple of 4. */
INLINE void random_of_tokens(const Stream *stream, uint32_t first,
                             __m512i bits[2 * SIDE_BY_SIDE])
{
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i blocks[SIDE_BY_SIDE], words[SIDE_BY_SIDE][4];
    for (uint32_t v = 0; v < SIDE_BY_SIDE; v++)
        blocks[v] = _mm512_add_epi64(_mm512_set1_epi64(first / 4 + 8 * v), order);
    random_words(stream, blocks, words);
#pragma GCC unroll 4
    for (int v = 0; v < SIDE_BY_SIDE; v++) {
        __m512i low = _mm512_mask_shuffle_epi32(words[v][0], 0xAAAA, words[v][1], 0xA0);
        __m512i high = _mm512_mask_shuffle_epi32(words[v][2], 0xAAAA, words[v][3], 0xA0);
        bits[2 * v] = _mm512_unpacklo_epi64(low, high);
        bits[2 * v + 1] = _mm512_unpackhi_epi64(low, high);
    }
}

/* Random numbers of 32 token ids, eight in a vector, in the low half of each 64-bit lane. */
INLINE void random_of_ids(const Stream *stream, const __m512i *ids, __m512i bits[SIDE_BY_SIDE])
{
    __m512i blocks[SIDE_BY_SIDE], words[SIDE_BY_SIDE][4];
    for (int v = 0; v < SIDE_BY_SIDE; v++)
        blocks[v] = _mm512_srli_epi64(ids[v], 2);
    random_words(stream, blocks, words);
#pragma GCC unroll 4
    for (int v = 0; v < SIDE_BY_SIDE; v++) {
        __mmask8 odd = _mm512_test_epi64_mask(ids[v], _mm512_set1_epi64(1));
        __mmask8 upper = _mm512_test_epi64_mask(ids[v], _mm512_set1_epi64(2));
        bits[v] = _mm512_mask_blend_epi64(
            upper, _mm512_mask_blend_epi64(odd, words[v][0], words[v][1]),
            _mm512_mask_blend_epi64(odd, words[v][2], words[v][3]));
    }
}

#endif
