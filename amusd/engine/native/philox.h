/* Random numbers of tokens: Philox4x32-10 of eight counters at a time, as noise.py defines it. */

#ifndef AMUSD_PHILOX_H
#define AMUSD_PHILOX_H

#include "simd.h"

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
   the high half is arbitrary, because a product reads low halves alone. */
INLINE void random_words(const Stream *stream, __m512i block, __m512i words[4])
{
    const __m512i factor = _mm512_set1_epi64(PHILOX_FACTOR);
    const __m512i other = _mm512_set1_epi64(PHILOX_OTHER);
    __m512i p = _mm512_mul_epu32(block, factor);
    __m512i c = _mm512_xor_si512(high_words(p), broadcast(stream->keys[0][1]));
    __m512i q = _mm512_mul_epu32(c, other), b = q, d = broadcast(stream->product_low);
    __m512i a = _mm512_xor_si512(high_words(q), broadcast(stream->keys[1][0]));
    c = _mm512_xor_si512(p, broadcast(stream->product_high ^ stream->keys[1][1]));
#pragma GCC unroll 10
    for (int i = 2; i < PHILOX_ROUNDS; i++) {
        p = _mm512_mul_epu32(a, factor);
        q = _mm512_mul_epu32(c, other);
        a = xor_three(high_words(q), b, broadcast(stream->keys[i][0]));
        c = xor_three(high_words(p), d, broadcast(stream->keys[i][1]));
        b = q;
        d = p;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

/* Random numbers of 32 tokens from `first` on, a multiple of 4. */
INLINE void random_of_tokens(const Stream *stream, uint32_t first, __m512i bits[2])
{
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i words[4], low, high;
    random_words(stream, _mm512_add_epi64(_mm512_set1_epi64(first / 4), order), words);
    low = _mm512_mask_shuffle_epi32(words[0], 0xAAAA, words[1], 0xA0);
    high = _mm512_mask_shuffle_epi32(words[2], 0xAAAA, words[3], 0xA0);
    bits[0] = _mm512_unpacklo_epi64(low, high);
    bits[1] = _mm512_unpackhi_epi64(low, high);
}

/* Random numbers of eight token ids, in the low half of each 64-bit lane. */
INLINE __m512i random_of_ids(const Stream *stream, __m512i ids)
{
    __m512i words[4];
    random_words(stream, _mm512_srli_epi64(ids, 2), words);
    __mmask8 odd = _mm512_test_epi64_mask(ids, _mm512_set1_epi64(1));
    __mmask8 upper = _mm512_test_epi64_mask(ids, _mm512_set1_epi64(2));
    return _mm512_mask_blend_epi64(upper, _mm512_mask_blend_epi64(odd, words[0], words[1]),
                                   _mm512_mask_blend_epi64(odd, words[2], words[3]));
}

#endif
