/* Arithmetic that every sampler does to the same bits: the noise and the edits of logits; noise.py
   and reference_sampler.py define it. Fused operations would round otherwise. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define LN2 0.6931471805599453
#define SQRT2 1.4142135623730951
#define NUM_TERMS 11

/* Natural logarithm of a positive normal number. */
static double exact_log(double value)
{
    static const double terms[NUM_TERMS] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,
                                            1.0 / 9,  1.0 / 11, 1.0 / 13, 1.0 / 15,
                                            1.0 / 17, 1.0 / 19, 1.0 / 21};
    int64_t bits;
    double mantissa, ratio, square, series = terms[NUM_TERMS - 1];
    __builtin_memcpy(&bits, &value, sizeof(bits));
    double exponent = (double)((bits >> 52) - 1023);
    bits = (bits & ((1LL << 52) - 1)) | (1023LL << 52);
    __builtin_memcpy(&mantissa, &bits, sizeof(mantissa)); /* [1, 2) */
    if (mantissa > SQRT2) {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    ratio = (mantissa - 1.0) / (mantissa + 1.0);
    square = ratio * ratio;
    for (int i = NUM_TERMS - 2; i >= 0; i--)
        series = series * square + terms[i];
    return exponent * LN2 + (ratio * 2.0) * series;
}

double gumbel_of(uint32_t bits)
{
    double uniform = ((double)bits + 0.5) * 0x1p-32;
    return -exact_log(-exact_log(uniform));
}

void edit_logits(const Sampling *sampling, const int32_t *head_rows, size_t num_ids, float *logits)
{
    float penalty = sampling->repetition_penalty;
    for (int64_t i = 0; i < sampling->num_edits; i++) {
        size_t id = (size_t)sampling->ids[i]; /* a negative one is very large */
        int64_t row = id >= num_ids ? -1 : head_rows ? head_rows[id] : (int64_t)id;
        if (row < 0)
            continue;
        float value = logits[row];
        if (sampling->is_repeated[i])
            value = value > 0 ? value / penalty : value * penalty;
        logits[row] = value + sampling->offsets[i];
    }
}

#endif
