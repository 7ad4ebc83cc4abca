/* Vectors of AVX-512 for the files that compute; they are built for it whatever the flags. */

#ifndef AMUSD_SIMD_H
#define AMUSD_SIMD_H

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#define SIMD_END _Pragma("clang attribute pop") /* at the end of each file */
#else
#pragma GCC target("avx512f")
#define SIMD_END
#endif

#define INLINE static inline __attribute__((always_inline))

/* The lanes of the 16 from `first` on that are below `width`. */
INLINE __mmask16 lanes_below(size_t first, size_t width)
{
    return width - first < 16 ? (__mmask16)((1u << (width - first)) - 1) : (__mmask16)0xffff;
}

/* e^x to about one unit in the last place; 0 far below, as the softmax needs. NaN stays NaN: of the
   two, max and min return the second operand then. */
INLINE __m512 exp_vector(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(88.7f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    /* Taylor's series; |r| is at most ln(2) / 2, where the next term is below the rounding. */
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

#endif
