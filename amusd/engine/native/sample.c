/* Chooses tokens from rows of logits: edits, filters, noise, and log-probabilities. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "cut.h"
#include "search.h"

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
static void choose(const SamplingBatch *batch, size_t index, const Row *row)
{
    const Sampling *sampling = &batch->rows[index];
    Best best = {.wanted = (size_t)batch->num_top};
    double sum = 0;
    if (sampling->temperature > 0) {
        Stream stream = stream_of(sampling->seed, (uint64_t)sampling->position);
        find_with_noise(batch, row, sampling->temperature, &stream, &best);
    } else {
        find_largest(row, &best);
        if (best.wanted > 1)
            sum = sum_of_shares(row->x, row->width, &row->cut, row->largest, 1);
    }
    write_best(batch, index, &best, sum);
}

void sample_row(const SamplingBatch *batch, size_t index, const float *logits, char *scratch)
{
    const Sampling *sampling = &batch->rows[index];
    size_t width = (size_t)batch->head;
    Row raw = {logits, width, 0, KEEP_ALL, largest_of(logits, width)}, row = raw;
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
    choose(batch, index, &row);
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

/* What a member has found of a streamed row. */
typedef struct {
    Best best;
    Stream stream;
    float largest; /* NaN if any logit is */
} Search;

static size_t edited_bytes(size_t width) { return (width * sizeof(float) + 63) / 64 * 64; }

/* The searches of a group, [group], behind the buffers of filters and edits. */
static Search *searches_in(const SamplingBatch *batch, char *scratch)
{
    size_t width = (size_t)batch->head;
    return (Search *)(scratch + filter_scratch(width) + edited_bytes(width));
}

float *slice_of(const SamplingBatch *batch, size_t row, char *scratch)
{
    return (float *)(searches_in(batch, scratch) + batch->group) + row * SLICE;
}

void start_search(const SamplingBatch *batch, size_t first, size_t rows, char *scratch)
{
    for (size_t row = 0; row < rows; row++) {
        const Sampling *sampling = &batch->rows[first + row];
        Search *search = &searches_in(batch, scratch)[row];
        search->stream = stream_of(sampling->seed, (uint64_t)sampling->position);
        search->best.wanted = (size_t)batch->num_top;
        search->best.found = 0;
        search->largest = -INFINITY;
    }
}

/* The larger of two; NaN if one is. */
static float larger(float a, float b) { return isnan(a) || a > b ? a : b; }

void search_slice(const SamplingBatch *batch, size_t first, size_t rows, size_t start,
                  size_t width, char *scratch)
{
    for (size_t at = 0; at < rows; at++) {
        const Sampling *sampling = &batch->rows[first + at];
        if (sampling->kind != STREAMED)
            continue;
        Search *search = &searches_in(batch, scratch)[at];
        Row row = {slice_of(batch, at, scratch), width, start, KEEP_ALL, 0};
        search->largest = larger(search->largest, largest_of(row.x, width));
        find_with_noise(batch, &row, sampling->temperature, &search->stream, &search->best);
    }
}

void finish_search(const SamplingBatch *batch, size_t first, size_t row, int num_members)
{
    Search *search = &searches_in(batch, batch->scratch)[row];
    for (int member = 1; member < num_members; member++) {
        char *scratch = batch->scratch + member * batch->scratch_size;
        const Search *other = &searches_in(batch, scratch)[row];
        search->largest = larger(search->largest, other->largest);
        for (size_t i = 0; i < other->best.found; i++)
            insert_best(&search->best, other->best.scores[i], other->best.rows[i]);
    }
    clear(batch, first + row);
    if (isfinite(search->largest))
        write_best(batch, first + row, &search->best, 0);
}

/* Bytes of scratch that one thread needs to sample from `group` rows of this width at once. */
size_t amusd_sampling_scratch(size_t width, size_t group)
{
    size_t of_rows = group * (sizeof(Search) + SLICE * sizeof(float));
    return filter_scratch(width) + edited_bytes(width) + (of_rows + 63) / 64 * 64;
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
    enum { STEP = 8 * SIDE_BY_SIDE };
    Stream stream = stream_of(seed, position);
    for (size_t first = 0; first < count; first += STEP) {
        int64_t some[STEP] = {0};
        uint64_t random[STEP];
        __m512i wanted[SIDE_BY_SIDE], bits[SIDE_BY_SIDE];
        size_t left = count - first < STEP ? count - first : STEP;
        __builtin_memcpy(some, ids + first, left * sizeof(int64_t));
        for (size_t i = 0; i < SIDE_BY_SIDE; i++)
            wanted[i] = _mm512_loadu_si512(some + 8 * i);
        random_of_ids(&stream, wanted, bits);
        for (size_t i = 0; i < SIDE_BY_SIDE; i++)
            _mm512_storeu_si512(random + 8 * i, bits[i]);
        for (size_t i = 0; i < left; i++)
            noise[first + i] = gumbel_of((uint32_t)random[i]);
    }
}

SIMD_END
#endif
