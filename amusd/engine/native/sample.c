/* Chooses tokens from rows of logits: edits, filters, noise, and log-probabilities.

   A token wins if its logit / temperature + noise is the largest. To compute the noise of every
   token exactly takes longer than a pass over a small model. So the random bits are computed for
   all, and a cheap upper bound of the noise rules out nearly every token; only the others are
   computed exactly. The token is the one that computing all of them exactly gives. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "cut.h"
#include "philox.h"

#include <math.h>

#define BLOCK_TOKENS 64
#define MAX_NOISE 22.9 /* above 33 ln(2), the noise of the largest random number */
#define LOG2_E 1.4426950408889634
#define MANTISSA 8388608.0 /* 2^23: bits of a float count log2 in steps of it */
#define NONE_YET (-(double)INFINITY)

/* The best tokens so far: the highest score first; of equal ones the first row. */
typedef struct {
    double scores[MAX_TOP];
    int64_t rows[MAX_TOP];
    size_t wanted, found;
} Best;

/* A row of logits, and the tokens that are kept of it. */
typedef struct {
    const float *x;
    size_t width;
    Cut cut;
    float largest;
} Row;

INLINE double worst_of(const Best *best)
{
    return best->found < best->wanted ? NONE_YET : best->scores[best->wanted - 1];
}

static void insert_best(Best *best, double score, int64_t row)
{
    if (!(score > worst_of(best)))
        return;
    size_t at = best->found < best->wanted ? best->found++ : best->wanted - 1;
    for (; at > 0 && score > best->scores[at - 1]; at--)
        best->scores[at] = best->scores[at - 1], best->rows[at] = best->rows[at - 1];
    best->scores[at] = score, best->rows[at] = row;
}

/* The largest logit; NaN if any is. */
static float largest_of(const float *x, size_t width)
{
    __m512 most = _mm512_set1_ps(-INFINITY);
    __mmask16 odd = 0;
    for (size_t first = 0; first < width; first += LANES) {
        __mmask16 valid = lanes_below(first, width);
        __m512 values = _mm512_maskz_loadu_ps(valid, x + first);
        odd |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        most = _mm512_mask_max_ps(most, valid, most, values);
    }
    return odd ? NAN : _mm512_reduce_max_ps(most);
}

/* The largest logits that are kept, as scores. */
static void find_largest(const Row *row, Best *best)
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
        insert_best(best, score, (int64_t)(first + lane));
    }
    *bound = bound_of(worst_of(best), temperature, &row->cut);
}

INLINE __m512 load_logits(const Row *row, size_t first)
{
    if (first + LANES <= row->width)
        return _mm512_loadu_ps(row->x + first);
    __m512 none = _mm512_set1_ps(-INFINITY);
    if (first >= row->width)
        return none;
    return _mm512_mask_loadu_ps(none, lanes_below(first, row->width), row->x + first);
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
    Bound bound = bound_of(worst_of(best), temperature, &row->cut);
    for (size_t first = 0; first < row->width; first += BLOCK_TOKENS) {
        __m512 values[4];
        __m512i bits[4];
        for (size_t i = 0; i < 4; i++)
            values[i] = load_logits(row, first + i * LANES);
        if (!reaches(values, 4, bound.least))
            continue;
        random_of_tokens(stream, (uint32_t)first, bits);
        random_of_tokens(stream, (uint32_t)first + 32, bits + 2);
        unsigned hits = 0;
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++)
            hits |= may_reach(&bound, values[i], bits[i]);
        if (__builtin_expect(hits == 0, 1))
            continue;
        for (size_t i = 0; i < 4; i++)
            score_vector(row, temperature, &bound, best, values[i], bits[i], first + i * LANES);
    }
}

/* The best of a reduced head. */
static void find_noisy_ids(const Row *row, double temperature, const Stream *stream,
                           const int64_t *ids, Best *best)
{
    Bound bound = bound_of(worst_of(best), temperature, &row->cut);
    for (size_t first = 0; first < row->width; first += LANES) {
        __m512 values = load_logits(row, first);
        if (!reaches(&values, 1, bound.least))
            continue;
        unsigned valid = lanes_below(first, row->width);
        __m512i low = _mm512_maskz_loadu_epi64((__mmask8)valid, ids + first);
        __m512i high = _mm512_maskz_loadu_epi64((__mmask8)(valid >> 8), ids + first + 8);
        __m256i first_half = _mm512_cvtepi64_epi32(random_of_ids(stream, low));
        __m256i second_half = _mm512_cvtepi64_epi32(random_of_ids(stream, high));
        __m512i bits = _mm512_inserti64x4(_mm512_castsi256_si512(first_half), second_half, 1);
        if (may_reach(&bound, values, bits))
            score_vector(row, temperature, &bound, best, values, bits, first);
    }
}

/* Set the logits of tokens outside the bitmask to minus infinity. */
static void ban(const SamplingBatch *batch, const Sampling *sampling, float *x, size_t width)
{
    size_t num_bits = 32 * (size_t)sampling->num_words;
    if (batch->head_ids) {
        for (size_t row = 0; row < width; row++) {
            size_t id = (size_t)batch->head_ids[row];
            if (id >= num_bits || !(sampling->allowed[id / 32] >> id % 32 & 1))
                x[row] = -INFINITY;
        }
        return;
    }
    for (size_t first = 0; first < width; first += LANES) {
        unsigned allowed = first < num_bits ? sampling->allowed[first / 32] >> first % 32 : 0;
        __mmask16 banned = (__mmask16)~allowed & lanes_below(first, width);
        _mm512_mask_storeu_ps(x + first, banned, _mm512_set1_ps(-INFINITY));
    }
}

INLINE int64_t id_of(const SamplingBatch *batch, int64_t row)
{
    return batch->head_ids ? batch->head_ids[row] : row;
}

INLINE int64_t row_of(const SamplingBatch *batch, int64_t id)
{
    if (id < 0 || id >= batch->num_ids)
        return -1;
    return batch->head_rows ? batch->head_rows[id] : id;
}

/* Write the log-probabilities of a token and of the likeliest ones. */
static void write_logprobs(const SamplingBatch *batch, size_t index, const Row *row,
                           double temperature, int64_t token)
{
    const Sampling *sampling = &batch->rows[index];
    int64_t *tokens = batch->logprob_tokens + index * (1 + MAX_TOP);
    double *logprobs = batch->logprobs + index * (1 + MAX_TOP);
    Best best = {.wanted = (size_t)sampling->num_logprobs};
    double sum = sum_of_shares(row->x, row->width, &row->cut, row->largest, temperature);
    double total = (double)row->largest / temperature + log(sum);
    int64_t at = row_of(batch, token);
    tokens[0] = token;
    logprobs[0] = -INFINITY;
    if (at >= 0 && (row->x[at] > row->cut.value ||
                    (row->x[at] == row->cut.value && at <= row->cut.last_row)))
        logprobs[0] = (double)row->x[at] / temperature - total;
    if (best.wanted)
        find_largest(row, &best);
    for (size_t i = 0; i < best.found; i++) {
        tokens[1 + i] = id_of(batch, best.rows[i]);
        logprobs[1 + i] = best.scores[i] / temperature - total;
    }
}

/* Write the best tokens and their probabilities: the softmax of their scores, or with `sum` that of
   all tokens. */
static void write_best(const SamplingBatch *batch, size_t index, const Best *best, double sum)
{
    int64_t *tokens = batch->tokens + index * (size_t)batch->num_top;
    float *probabilities = batch->probabilities + index * (size_t)batch->num_top;
    double shares[MAX_TOP], among = 0;
    for (size_t i = 0; i < best->found; i++)
        among += shares[i] = exp(best->scores[i] - best->scores[0]);
    for (size_t i = 0; i < best->found; i++) {
        tokens[i] = id_of(batch, best->rows[i]);
        probabilities[i] = (float)(shares[i] / (sum > 0 ? sum : among));
    }
}

static void clear(const SamplingBatch *batch, size_t index)
{
    size_t num_top = (size_t)batch->num_top;
    for (size_t i = index * num_top; i < (index + 1) * num_top; i++)
        batch->tokens[i] = NO_TOKEN, batch->probabilities[i] = 0;
    for (size_t i = index * (1 + MAX_TOP); i < (index + 1) * (1 + MAX_TOP); i++)
        batch->logprob_tokens[i] = NO_TOKEN, batch->logprobs[i] = -INFINITY;
}

/* The best tokens of a row of processed logits. */
static void choose(const SamplingBatch *batch, size_t index, const Row *row, Best *best)
{
    const Sampling *sampling = &batch->rows[index];
    if (sampling->temperature == 0) {
        find_largest(row, best);
        double sum = best->wanted > 1 ? sum_of_shares(row->x, row->width, &row->cut, row->largest, 1)
                                      : 0;
        write_best(batch, index, best, sum);
        return;
    }
    Stream stream = stream_of(sampling->seed, (uint64_t)sampling->position);
    if (batch->head_ids)
        find_noisy_ids(row, sampling->temperature, &stream, batch->head_ids, best);
    else
        find_noisy(row, sampling->temperature, &stream, best);
    write_best(batch, index, best, 0);
}

void sample_row(const SamplingBatch *batch, size_t index, const float *logits, char *scratch)
{
    const Sampling *sampling = &batch->rows[index];
    size_t width = (size_t)batch->head;
    Row raw = {logits, width, KEEP_ALL, largest_of(logits, width)}, row = raw;
    Best best = {.wanted = (size_t)batch->num_top};
    double temperature = sampling->temperature;
    clear(batch, index);
    if (!isfinite(raw.largest))
        return;
    if (sampling->num_edits || sampling->allowed) {
        float *edited = (float *)(scratch + filter_scratch(width));
        __builtin_memcpy(edited, logits, width * sizeof(float));
        edit_logits(sampling, batch->head_rows, (size_t)batch->num_ids, edited);
        if (sampling->allowed)
            ban(batch, sampling, edited, width);
        row.x = edited;
        row.largest = largest_of(edited, width);
    }
    int64_t *tokens = batch->tokens + index * (size_t)batch->num_top;
    if (row.largest == -INFINITY)
        tokens[0] = NOTHING_ALLOWED;
    if (!isfinite(row.largest))
        return;
    if (temperature > 0)
        row.cut = filter_cut(sampling, row.x, width, row.largest, scratch);
    choose(batch, index, &row, &best);
    if (sampling->num_logprobs < 0)
        return;
    int64_t token = sampling->target == NO_TOKEN ? tokens[0] : sampling->target;
    if (sampling->is_processed)
        write_logprobs(batch, index, &row, temperature > 0 ? temperature : 1, token);
    else
        write_logprobs(batch, index, &raw, 1, token);
}

void take_plain(const SamplingBatch *batch, size_t index, const Top *top)
{
    size_t num_top = (size_t)batch->num_top;
    clear(batch, index);
    if (!isfinite(top->logits[0]))
        return;
    if (num_top > 1)
        top_probabilities(top, 1, batch->probabilities + index * num_top);
    for (size_t i = 0; i < num_top && top->logits[i] > -INFINITY; i++)
        batch->tokens[index * num_top + i] = id_of(batch, top->rows[i]);
}

/* Bytes of scratch that one thread needs to sample from rows of this width. */
size_t amusd_sampling_scratch(size_t width)
{
    return filter_scratch(width) + (width * sizeof(float) + 63) / 64 * 64;
}

/* Choose the tokens of rows whose logits are there: batch->logits [num_rows][head]. */
void amusd_sample(const SamplingBatch *batch, size_t num_rows)
{
    for (size_t index = 0; index < num_rows; index++)
        sample_row(batch, index, batch->logits + index * (size_t)batch->head, batch->scratch);
}

/* The noise of token ids [count] at a position. */
void amusd_noise(uint64_t seed, uint64_t position, const int64_t *ids, size_t count, double *noise)
{
    Stream stream = stream_of(seed, position);
    for (size_t first = 0; first < count; first += 8) {
        __mmask8 valid = (__mmask8)lanes_below(first, count);
        __m512i bits = random_of_ids(&stream, _mm512_maskz_loadu_epi64(valid, ids + first));
        uint64_t random[8];
        _mm512_storeu_si512(random, bits);
        for (size_t i = first; i < count && i < first + 8; i++)
            noise[i] = gumbel_of((uint32_t)random[i - first]);
    }
}

SIMD_END
#endif
