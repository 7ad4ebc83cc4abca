/* What top-k, top-p and min-p keep of a row of logits, and sums of probabilities.

   A filter keeps a token, and every token ahead of it. The border is found by weight: each token
   weighs 1 for top-k and its share of the softmax for top-p. Histograms over ever narrower ranges
   of logits narrow it down, so nothing is sorted but the last few tokens. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "cut.h"

#include <float.h>
#include <math.h>

#define GROUP 64 /* logits of which the largest is compared first */
#define NUM_BINS 1024
#define NUM_SORTED 48
#define NEGLIGIBLE 46.0 /* e^-46 of each token of the largest vocabulary is below rounding */

/* Tokens by their logit, and their weights. */
typedef struct {
    float *values;
    int32_t *rows;
    double *weights;
    size_t count;
} Items;

size_t filter_scratch(size_t width)
{
    size_t slack = width + LANES; /* whole vectors are stored */
    return (slack * (sizeof(double) + sizeof(float) + sizeof(int32_t)) + 63) / 64 * 64;
}

static Items items_in(char *scratch, size_t width)
{
    size_t slack = width + LANES;
    char *values = scratch + slack * sizeof(double);
    return (Items){(float *)values, (int32_t *)(values + slack * sizeof(float)),
                   (double *)scratch, 0};
}

/* e^x for x of 0 or less, with a relative error below 1e-12. */
INLINE __m512d exp_of(__m512d x)
{
    static const double terms[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                   1.0 / 720,     1.0 / 120,    1.0 / 24,    1.0 / 6,
                                   0.5,           1.0,          1.0};
    x = _mm512_max_pd(x, _mm512_set1_pd(-700.0));
    __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0.693147180369123816490), x);
    r = _mm512_fnmadd_pd(n, _mm512_set1_pd(1.90821492927058770002e-10), r);
    __m512d sum = _mm512_set1_pd(terms[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(terms) / sizeof(terms[0]); i++)
        sum = _mm512_fmadd_pd(sum, r, _mm512_set1_pd(terms[i]));
    return _mm512_scalef_pd(sum, n);
}

/* e^((value - largest) * scale) of eight values. */
INLINE __m512d shares_of(__m256 values, double largest, double scale)
{
    __m512d ahead = _mm512_sub_pd(_mm512_cvtps_pd(values), _mm512_set1_pd(largest));
    return exp_of(_mm512_mul_pd(ahead, _mm512_set1_pd(scale)));
}

INLINE __m256 low_half(__m512 x) { return _mm512_castps512_ps256(x); }

INLINE __m256 high_half(__m512 x)
{
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}

double sum_of_shares(const float *x, size_t width, const Cut *cut, float largest,
                     double temperature)
{
    __m512d sum = _mm512_setzero_pd();
    double far = (double)largest - NEGLIGIBLE * temperature;
    __m512 from = _mm512_set1_ps(far > cut->value ? (float)far : cut->value);
    for (size_t first = 0; first < width; first += LANES) {
        __mmask16 valid = lanes_below(first, width);
        __m512 values = _mm512_maskz_loadu_ps(valid, x + first);
        __mmask16 counts = _mm512_mask_cmp_ps_mask(valid, values, from, _CMP_GE_OQ);
        if (!counts)
            continue;
        if ((int64_t)(first + LANES) > cut->last_row)
            counts &= kept_lanes(values, first, cut);
        __m512d low = shares_of(low_half(values), largest, 1 / temperature);
        __m512d high = shares_of(high_half(values), largest, 1 / temperature);
        sum = _mm512_mask_add_pd(sum, (__mmask8)counts, sum, low);
        sum = _mm512_mask_add_pd(sum, (__mmask8)(counts >> 8), sum, high);
    }
    return _mm512_reduce_add_pd(sum);
}

/* Collect the logits of at least `least`, in the order of their rows. */
static void collect(Items *items, const float *x, size_t width, float least)
{
    __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    size_t count = 0;
    for (size_t first = 0; first < width; first += LANES) {
        __mmask16 valid = lanes_below(first, width);
        __m512 values = _mm512_maskz_loadu_ps(valid, x + first);
        __mmask16 kept =
            _mm512_mask_cmp_ps_mask(valid, values, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_ps(items->values + count, _mm512_maskz_compress_ps(kept, values));
        _mm512_storeu_si512(items->rows + count, _mm512_maskz_compress_epi32(kept, rows));
        count += (size_t)__builtin_popcount(kept);
        rows = _mm512_add_epi32(rows, _mm512_set1_epi32(LANES));
    }
    items->count = count;
}

static void weigh_equally(Items *items)
{
    for (size_t i = 0; i < items->count; i++)
        items->weights[i] = 1.0;
}

static void weigh_by_share(Items *items, float largest, double temperature)
{
    for (size_t i = 0; i < items->count; i += LANES / 2) {
        __m256 values = _mm256_loadu_ps(items->values + i);
        _mm512_storeu_pd(items->weights + i, shares_of(values, largest, 1 / temperature));
    }
}

/* The least and the largest logit of the items, 1 or more. */
static void range_of(const Items *items, float *least, float *most)
{
    __m512 low = _mm512_set1_ps(FLT_MAX), high = _mm512_set1_ps(-FLT_MAX);
    for (size_t first = 0; first < items->count; first += LANES) {
        __mmask16 valid = lanes_below(first, items->count);
        __m512 values = _mm512_maskz_loadu_ps(valid, items->values + first);
        low = _mm512_mask_min_ps(low, valid, low, values);
        high = _mm512_mask_max_ps(high, valid, high, values);
    }
    *least = _mm512_reduce_min_ps(low);
    *most = _mm512_reduce_max_ps(high);
}

/* The bins of eight logits; the largest of all is in the first one, and the least in the last. */
INLINE __m256i bins_of(const float *values, float most, double scale)
{
    __m512d behind = _mm512_sub_pd(_mm512_set1_pd(most), _mm512_cvtps_pd(_mm256_loadu_ps(values)));
    __m512d bins = _mm512_mul_pd(behind, _mm512_set1_pd(scale));
    return _mm512_cvttpd_epi32(_mm512_min_pd(bins, _mm512_set1_pd(NUM_BINS - 1)));
}

/* Keep the items of one bin, in their order. */
static void keep_bin(Items *items, float most, double scale, int bin)
{
    size_t count = 0;
    for (size_t first = 0; first < items->count; first += LANES) {
        __m512i bins = _mm512_inserti64x4(
            _mm512_castsi256_si512(bins_of(items->values + first, most, scale)),
            bins_of(items->values + first + LANES / 2, most, scale), 1);
        __mmask16 kept = _mm512_mask_cmpeq_epi32_mask(lanes_below(first, items->count), bins,
                                                      _mm512_set1_epi32(bin));
        if (!kept)
            continue;
        __m512 values = _mm512_loadu_ps(items->values + first);
        __m512i rows = _mm512_loadu_si512(items->rows + first);
        __m512d low = _mm512_loadu_pd(items->weights + first);
        __m512d high = _mm512_loadu_pd(items->weights + first + LANES / 2);
        size_t num_low = (size_t)__builtin_popcount(kept & 0xff);
        _mm512_storeu_ps(items->values + count, _mm512_maskz_compress_ps(kept, values));
        _mm512_storeu_si512(items->rows + count, _mm512_maskz_compress_epi32(kept, rows));
        _mm512_storeu_pd(items->weights + count, _mm512_maskz_compress_pd((__mmask8)kept, low));
        _mm512_storeu_pd(items->weights + count + num_low,
                         _mm512_maskz_compress_pd((__mmask8)(kept >> 8), high));
        count += (size_t)__builtin_popcount(kept);
    }
    items->count = count;
}

/* Keep the items of the bin in which the weights reach `target`, and return what is left of it. */
static double narrow(Items *items, float least, float most, double target)
{
    double weights[NUM_BINS] = {0}, scale = NUM_BINS / ((double)most - least);
    for (size_t first = 0; first < items->count; first += LANES / 2) {
        int32_t bins[LANES / 2];
        _mm256_storeu_si256((__m256i *)bins, bins_of(items->values + first, most, scale));
        for (size_t i = 0; i < LANES / 2 && first + i < items->count; i++)
            weights[bins[i]] += items->weights[first + i];
    }
    int border = 0;
    for (; border < NUM_BINS - 1 && weights[border] < target; border++)
        target -= weights[border];
    keep_bin(items, most, scale, border);
    return target;
}

/* Sort a few items, the largest first; equal ones stay in the order of their rows. */
static void sort(Items *items)
{
    for (size_t i = 1; i < items->count; i++) {
        float value = items->values[i];
        int32_t row = items->rows[i];
        double weight = items->weights[i];
        size_t at = i;
        for (; at > 0 && value > items->values[at - 1]; at--) {
            items->values[at] = items->values[at - 1];
            items->rows[at] = items->rows[at - 1];
            items->weights[at] = items->weights[at - 1];
        }
        items->values[at] = value, items->rows[at] = row, items->weights[at] = weight;
    }
}

/* The first item at which the weights reach `target`, counted from the largest logit on. */
static Cut border_of(Items *items, double target)
{
    float least, most;
    range_of(items, &least, &most);
    while (items->count > NUM_SORTED && least < most) {
        target = narrow(items, least, most, target);
        range_of(items, &least, &most);
    }
    if (least < most)
        sort(items);
    size_t at = 0;
    for (; at + 1 < items->count && items->weights[at] < target; at++)
        target -= items->weights[at];
    return (Cut){items->values[at], items->rows[at]};
}

/* The k-th of the largest logits of groups: no more than the k-th largest logit of all. */
static float least_of_top_k(const float *x, size_t width, size_t k, Items *items)
{
    size_t num_groups = width / GROUP;
    if (k > num_groups)
        return -FLT_MAX;
    for (size_t group = 0; group < num_groups; group++) {
        __m512 most = _mm512_loadu_ps(x + group * GROUP);
        for (size_t i = LANES; i < GROUP; i += LANES)
            most = _mm512_max_ps(most, _mm512_loadu_ps(x + group * GROUP + i));
        float largest = _mm512_reduce_max_ps(most);
        items->values[group] = largest < -FLT_MAX ? -FLT_MAX : largest;
        items->rows[group] = (int32_t)group;
    }
    items->count = num_groups;
    weigh_equally(items);
    return border_of(items, (double)k).value;
}

static Cut top_k_cut(const float *x, size_t width, size_t k, Items *items)
{
    collect(items, x, width, least_of_top_k(x, width, k, items));
    if (items->count < k)
        return KEEP_ALL;
    weigh_equally(items);
    return (Cut){border_of(items, (double)k).value, INT64_MAX};
}

/* Tokens so far behind that all of them together weigh less than 1 - top_p are left out first. */
static Cut top_p_cut(const Sampling *sampling, const float *x, size_t width, const Cut *cut,
                     float largest, Items *items)
{
    double temperature = sampling->temperature, top_p = sampling->top_p;
    double sum = sum_of_shares(x, width, cut, largest, temperature);
    double behind = log((double)width / ((1.0 - top_p) * sum)) * (1.0 + 1e-6) + 1e-6;
    double far = (double)largest - behind * temperature;
    far -= 1e-6 * fabs(far);
    collect(items, x, width, far > cut->value ? (float)far : cut->value);
    weigh_by_share(items, largest, temperature);
    return border_of(items, top_p * sum);
}

/* The least logit whose quotient by the temperature is at least `score`, as doubles divide. */
static float least_logit(double score, double temperature)
{
    float found = (float)(score * temperature);
    while ((double)found / temperature >= score && found > -FLT_MAX)
        found = nextafterf(found, -FLT_MAX);
    while ((double)found / temperature < score)
        found = nextafterf(found, FLT_MAX);
    return found;
}

Cut filter_cut(const Sampling *sampling, const float *x, size_t width, float largest,
               char *scratch)
{
    Items items = items_in(scratch, width);
    size_t top_k = (size_t)sampling->top_k;
    Cut cut = KEEP_ALL;
    if (top_k > 0 && top_k < width)
        cut = top_k_cut(x, width, top_k, &items);
    if (sampling->top_p < 1.0)
        cut = top_p_cut(sampling, x, width, &cut, largest, &items);
    if (sampling->log_min_p > -DBL_MAX) {
        double score = (double)largest / sampling->temperature + sampling->log_min_p;
        float least = least_logit(score, sampling->temperature);
        if (least > cut.value)
            cut = (Cut){least, INT64_MAX};
    }
    return cut;
}

SIMD_END
#endif
