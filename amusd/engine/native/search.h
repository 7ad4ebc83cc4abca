/* The search for the best tokens of a row of logits. */

#ifndef AMUSD_SEARCH_H
#define AMUSD_SEARCH_H

#include "native.h"
#include "philox.h"

#include <math.h>

#define NONE_YET (-(double)INFINITY)

/* The best tokens so far: the highest score first; of equal ones the first row. */
typedef struct {
    double scores[MAX_TOP];
    int64_t rows[MAX_TOP];
    size_t wanted, found;
} Best;

/* Logits from row `start` of the head on, and the tokens that are kept of them. */
typedef struct {
    const float *x;
    size_t width, start;
    Cut cut;
    float largest;
} Row;

/* Insert a token if it is better than the worst of those wanted. */
void insert_best(Best *best, double score, int64_t row);
/* The largest logit; NaN if any is. */
float largest_of(const float *x, size_t width);
/* The largest logits that are kept, as scores. */
void find_largest(const Row *row, Best *best);
/* The best tokens by their scores with noise. */
void find_with_noise(const SamplingBatch *batch, const Row *row, double temperature,
                     const Stream *stream, Best *best);

#endif
