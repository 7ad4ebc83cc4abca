/* Finds the best tokens of rows of logits.

   A token wins if its logit / temperature + noise is the largest. To compute the noise of every
   token exactly takes longer than a pass over a small model. So the random bits are computed for
   all, and a cheap upper bound of the noise rules out nearly every token; only the others are
   computed exactly. The token is the one that computing all of them exactly gives. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "cut.h"
#include "search.h"

#define MAX_NOISE 22.9 /* above 33 ln(2), the noise of the largest random number */
#define LOG2_E 1.4426950408889634
#define MANTISSA 8388608.0 /* 2^23: bits of a float count log2 in steps of it */

INLINE double worst_of(const Best *best)
{
    return best->found < best->wanted ? NONE_YET : best->scores[best->wanted - 1];
}

void insert_best(Best *best, double score, int64_t row)
{
    if (!(score > worst_of(best)))
        return;
    size_t at = best->found < best->wanted ? best->found++ : best->wanted - 1;
    for (; at > 0 && score > best->scores[at - 1]; at--)
        best->scores[at] = best->scores[at - 1], best->rows[at] = best->rows[at - 1];
    best->scores[at] = score, best->rows[at] = row;
}

/* The logits of 16 rows, minus infinity behind the last one. */
INLINE __m512 load_logits(const float *x, size_t width, size_t first)
{
    if (first + LANES <= width)
        return _mm512_loadu_ps(x + first);
    __m512 none = _mm512_set1_ps(-INFINITY);
    if (first >= width)
        return none;
    return _mm512_mask_loadu_ps(none, lanes_below(first, width), x + first);
}

/* The largest logit; NaN if any is. The maximum of a vector takes a few cycles, so four are found
   side by side. */
float largest_of(const float *x, size_t width)
{
    __m512 most[4];
    __mmask16 odd = 0;
    for (size_t i = 0; i < 4; i++)
        most[i] = _mm512_set1_ps(-INFINITY);
    for (size_t first = 0; first < width; first += 4 * LANES) {
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            __m512 values = load_logits(x, width, first + i * LANES);
            odd |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
            most[i] = _mm512_max_ps(most[i], values);
        }
    }
    most[0] = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    return odd ? NAN : _mm512_reduce_max_ps(most[0]);
}

/* The largest logits that are kept, as scores. */
void find_largest(const Row *row, Best *best)
{
    for (size_t first = 0; first < row->width; first += LANES) {
        __mmask16 valid = lanes_below(first, row->width);
        __m512 values = _mm512_maskz_loadu_ps(valid, row->x + first);
        __m512 worst = _mm512_set1_ps((float)worst_of(best));
        __mmask16 above = _mm512_mask_cmp_ps_mask(valid, values, worst, _CMP_GT_OQ);
        if (!above)
            continue;
        above &= kept_lanes(values, first, &row->cut);
        for (unsigned left = above; left; left &= left - 1) {
            size_t at = first + (size_t)__builtin_ctz(left);
            insert_best(best, row->x[at], (int64_t)at);
        }
    }
}

/* A bound that a token has to reach.

   Its noise is -log(-log(u)), at most -log(1 - u), because -log(u) is at least 1 - u. So it can
   reach a score only if log2(1 - u) is at most (logit / temperature - score) * log2(e). The bits of
   a positive float, read as an integer, are 2^23 times (its log2 + 127), at most 0.09 of log2 too
   low, never too high. 2^32 (1 - u) is the complement of the random bits plus a half. */
typedef struct {
    __m512 scale, offset;
    float least; /* logits below cannot reach the score whatever their noise */
} Bound;

static Bound bound_of(double score, double temperature, const Cut *cut)
{
    double offset = 127.0 + 32.0 - score * LOG2_E;
    double margin = 1e-3 + fabs(offset) * 0x1p-20; /* for rounding in float */
    double least = (score - MAX_NOISE) * temperature;
    least -= 1e-6 * fabs(least);
    Bound bound = {_mm512_set1_ps((float)(LOG2_E / temperature * MANTISSA)),
                   _mm512_set1_ps((float)((offset + margin) * MANTISSA)), cut->value};
    if (least > cut->value)
        bound.least = (float)least;
    return bound;
}

/* The lanes whose noise may reach the bound; a comparison with NaN is decided exactly, too. */
INLINE __mmask16 may_reach(const Bound *bound, __m512 values, __m512i bits)
{
    __m512i rest = _mm512_ternarylogic_epi32(bits, bits, bits, 0x55); /* the complement */
    __m512 log2 = _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_cvtepu32_ps(rest)));
    __m512 reach = _mm512_fmadd_ps(values, bound->scale, bound->offset);
    return _mm512_cmp_ps_mask(log2, reach, _CMP_NGT_UQ);
}

/* Score the tokens of one vector that may be among the best. */
static void score_vector(const Row *row, double temperature, Bound *bound, Best *best,
                         __m512 values, __m512i bits, size_t first)
{
    unsigned hits = may_reach(bound, values, bits);
    hits &= kept_lanes(values, first, &row->cut) & lanes_below(first, row->width);
    if (!hits)
        return;
    uint32_t random[LANES];
    _mm512_storeu_si512(random, bits);
    for (; hits; hits &= hits - 1) {
        size_t lane = (size_t)__builtin_ctz(hits);
        double score = (double)row->x[first + lane] / temperature + gumbel_of(random[lane]);
        insert_best(best, score, (int64_t)(row->start + first + lane));
    }
    *bound = bound_of(worst_of(best), temperature, &row->cut);
}

INLINE int reaches(const __m512 *values, size_t count, float least)
{
    __m512 most = values[0];
    for (size_t i = 1; i < count; i++)
        most = _mm512_max_ps(most, values[i]);
    return _mm512_cmp_ps_mask(most, _mm512_set1_ps(least), _CMP_GE_OQ) != 0;
}

/* The best of a full head: a row's number is its token id. */
static void find_noisy(const Row *row, double temperature, const Stream *stream, Best *best)
{
    enum { VECTORS = 2 * SIDE_BY_SIDE };
    Bound bound = bound_of(worst_of(best), temperature, &row->cut);
    for (size_t first = 0; first < row->width; first += VECTORS * LANES) {
        __m512 values[VECTORS];
        __m512i bits[VECTORS];
        for (size_t i = 0; i < VECTORS; i++)
            values[i] = load_logits(row->x, row->width, first + i * LANES);
        if (!reaches(values, VECTORS, bound.least))
            continue;
        random_of_tokens(stream, (uint32_t)(row->start + first), bits);
        unsigned hits = 0;
#pragma GCC unroll 8
        for (size_t i = 0; i < VECTORS; i++)
            hits |= may_reach(&bound, values[i], bits[i]);
        if (__builtin_expect(hits == 0, 1))
            continue;
        for (size_t i = 0; i < VECTORS; i++)
            score_vector(row, temperature, &bound, best, values[i], bits[i], first + i * LANES);
    }
}

/* Eight token ids from `at` on; zero for those behind the last row. */
INLINE __m512i load_ids(const int64_t *ids, size_t width, size_t at)
{
    if (at >= width)
        return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi64((__mmask8)lanes_below(at, width), ids + at);
}

/* The best of a reduced head. */
static void find_noisy_ids(const Row *row, double temperature, const Stream *stream,
                           const int64_t *ids, Best *best)
{
    enum { VECTORS = SIDE_BY_SIDE / 2 };
    Bound bound = bound_of(worst_of(best), temperature, &row->cut);
    for (size_t first = 0; first < row->width; first += VECTORS * LANES) {
        __m512 values[VECTORS];
        __m512i wanted[SIDE_BY_SIDE], random[SIDE_BY_SIDE];
        for (size_t i = 0; i < VECTORS; i++)
            values[i] = load_logits(row->x, row->width, first + i * LANES);
        if (!reaches(values, VECTORS, bound.least))
            continue;
        for (size_t i = 0; i < SIDE_BY_SIDE; i++)
            wanted[i] = load_ids(ids + row->start, row->width, first + i * LANES / 2);
        random_of_ids(stream, wanted, random);
        for (size_t i = 0; i < VECTORS; i++) {
            __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(random[2 * i]));
            __m512i bits = _mm512_inserti64x4(low, _mm512_cvtepi64_epi32(random[2 * i + 1]), 1);
            if (may_reach(&bound, values[i], bits))
                score_vector(row, temperature, &bound, best, values[i], bits, first + i * LANES);
        }
    }
}

/* The best tokens by their scores with noise. */
void find_with_noise(const SamplingBatch *batch, const Row *row, double temperature,
                     const Stream *stream, Best *best)
{
    if (batch->head_ids)
        find_noisy_ids(row, temperature, stream, batch->head_ids, best);
    else
        find_noisy(row, temperature, stream, best);
}

SIMD_END
#endif
