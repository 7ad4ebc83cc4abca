/* Packs weights into panels of INT8, and tells whether that loses anything. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "simd.h"

#define AS_HALF (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE float half_of(float value) /* rounded to float16 */
{
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm512_cvtps_ph(_mm512_set1_ps(value), AS_HALF)));
}

static uint16_t half_bits(float value)
{
    __m256i bits = _mm512_cvtps_ph(_mm512_set1_ps(value), AS_HALF);
    return (uint16_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(bits));
}

/* Encode 32 weights as code * scale + offset; true if that gives the same numbers. */
static int encode(const float *weights, float scale, float offset, uint8_t *codes)
{
    int same = 1;
    __m512 divisor = _mm512_set1_ps(scale == 0.0f ? 1.0f : scale);
    for (int i = 0; i < BLOCK; i += LANES) {
        __m512 value = _mm512_loadu_ps(weights + i), from = _mm512_set1_ps(offset);
        __m512 code = _mm512_div_ps(_mm512_sub_ps(value, from), divisor);
        code = _mm512_roundscale_ps(code, AS_HALF);
        code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
        __m512 again = _mm512_fmadd_ps(code, _mm512_set1_ps(scale), from);
        same &= _mm512_cmp_ps_mask(value, again, _CMP_EQ_OQ) == 0xffff;
        _mm_storeu_si128((__m128i *)(codes + i),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
    }
    return same;
}

/* Encode 32 weights as Q8_0 or Q4_1 of GGUF do, else to the nearest; true if without loss. */
static int encode_block(const float *weights, float *scale, float *offset, uint8_t *codes)
{
    __m512 first = _mm512_loadu_ps(weights), second = _mm512_loadu_ps(weights + LANES);
    float least = _mm512_reduce_min_ps(_mm512_min_ps(first, second));
    float most = _mm512_reduce_max_ps(_mm512_max_ps(first, second));
    *scale = half_of((most > -least ? most : -least) / 127.0f);
    *offset = half_of(-128.0f * *scale);
    if (encode(weights, *scale, *offset, codes))
        return 1;
    *offset = half_of(least);
    *scale = half_of((most - least) / 15.0f);
    if (encode(weights, *scale, *offset, codes))
        return 1;
    *scale = half_of((most - least) / 255.0f);
    encode(weights, *scale, *offset, codes);
    return 0;
}

/* Pack weights [outputs][inputs] into panels of INT8; true if without loss. With `exactly`, stop
   at the first loss. */
int amusd_pack_int8(const float *weights, size_t outputs, size_t inputs, int exactly, char *to)
{
    static const float zeros[BLOCK];
    int same = 1;
    for (size_t start = 0; start < outputs; start += PANEL)
        for (size_t input = 0; input < inputs; input += BLOCK) {
            uint16_t *halves = (uint16_t *)to;
            uint8_t *codes = (uint8_t *)to + 2 * 2 * PANEL, column[BLOCK];
            for (size_t lane = 0; lane < PANEL; lane++) {
                size_t output = start + lane;
                const float *block = output < outputs ? weights + output * inputs + input : zeros;
                float scale, offset;
                same &= encode_block(block, &scale, &offset, column);
                if (exactly && !same)
                    return 0;
                halves[lane] = half_bits(scale);
                halves[PANEL + lane] = half_bits(offset);
                for (size_t i = 0; i < BLOCK; i++)
                    codes[i * PANEL + lane] = column[i];
            }
            to += 2 * 2 * PANEL + BLOCK * PANEL;
        }
    return same;
}

SIMD_END
#endif
