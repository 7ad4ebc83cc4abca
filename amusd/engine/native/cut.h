/* The test of a cut on a vector of logits. */

#ifndef AMUSD_CUT_H
#define AMUSD_CUT_H

#include "native.h"
#include "simd.h"

/* The lanes that a cut keeps of the logits of rows `first` to `first + 15`. */
INLINE __mmask16 kept_lanes(__m512 values, size_t first, const Cut *cut)
{
    __m512 border = _mm512_set1_ps(cut->value);
    __mmask16 above = _mm512_cmp_ps_mask(values, border, _CMP_GT_OQ);
    if ((int64_t)first > cut->last_row)
        return above;
    __mmask16 equal = _mm512_cmp_ps_mask(values, border, _CMP_EQ_OQ);
    return above | (equal & lanes_below(first, (size_t)cut->last_row + 1));
}

#endif
