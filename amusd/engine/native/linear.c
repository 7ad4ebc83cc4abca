/* Matrix products of few rows with large weights, in float32. Decoding spends most of its time
   here.

   A pass over a few tokens should take as long as reading the weights once. So the weights are
   read in one stream, and each panel is multiplied with all rows of activations. Weights that a
   smaller format holds without loss are widened in registers: a quarter or half of the bytes, the
   same numbers.

   Every output is summed along the inputs in order, for any number of rows and any place among
   them. So the bits of a token's result do not depend on the rest of the batch. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "simd.h"

#define VECTORS (PANEL / LANES)
#define AHEAD 2048 /* bytes that the stream of weights is fetched ahead */
#define BLOCK_BYTES (2 * 2 * PANEL + BLOCK * PANEL)

/* Bytes of `inputs` weights of each output of a panel. */
static size_t panel_bytes(const Matrix *w)
{
    switch (w->format) {
    case FLOAT32: return (size_t)w->inputs * PANEL * 4;
    case INT8: return (size_t)w->inputs / BLOCK * BLOCK_BYTES;
    default: return (size_t)w->inputs * PANEL * 2;
    }
}

INLINE void fetch(const char *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch(at + AHEAD + i, _MM_HINT_T0);
}

/* Three vectors of weights, widened. */
INLINE void load_weights(int format, const char *at, __m512 *w)
{
    for (int v = 0; v < VECTORS; v++) {
        if (format == FLOAT32) {
            w[v] = _mm512_loadu_ps((const float *)at + v * LANES);
        } else {
            __m256i half = _mm256_loadu_si256((const __m256i *)(at + v * LANES * 2));
            w[v] = format == FLOAT16
                       ? _mm512_cvtph_ps(half)
                       : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
    }
}

INLINE __m512 load_half(const char *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

INLINE __m512 load_codes(const char *at)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)));
}

INLINE void multiply(int rows, const __m512 *w, const float *x, size_t stride,
                     __m512 sums[MAX_ROWS][VECTORS])
{
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        __m512 value = _mm512_set1_ps(x[(size_t)m * stride]);
        for (int v = 0; v < VECTORS; v++)
            sums[m][v] = _mm512_fmadd_ps(w[v], value, sums[m][v]);
    }
}

/* sums[m] = the panel at `at` times row m of x. */
INLINE void panel_product(int format, int rows, const char *at, const float *x, size_t stride,
                          size_t inputs, __m512 sums[MAX_ROWS][VECTORS])
{
    __m512 w[VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < VECTORS; v++)
            sums[m][v] = _mm512_setzero_ps();
    if (format != INT8) {
        size_t bytes = format == FLOAT32 ? 4 * PANEL : 2 * PANEL;
        for (size_t i = 0; i < inputs; i++, at += bytes) {
            fetch(at, bytes);
            load_weights(format, at, w);
            multiply(rows, w, x + i, stride, sums);
        }
        return;
    }
    for (size_t block = 0; block < inputs; block += BLOCK) {
        __m512 scales[VECTORS], offsets[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            scales[v] = load_half(at + v * LANES * 2);
            offsets[v] = load_half(at + (PANEL + v * LANES) * 2);
        }
        fetch(at, 2 * 2 * PANEL);
        at += 2 * 2 * PANEL;
        for (size_t i = block; i < block + BLOCK; i += 4) {
            fetch(at, 4 * PANEL);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, at += PANEL) {
                for (int v = 0; v < VECTORS; v++)
                    w[v] = _mm512_fmadd_ps(load_codes(at + v * LANES), scales[v], offsets[v]);
                multiply(rows, w, x + i + j, stride, sums);
            }
        }
    }
}

typedef void (*Kernel)(const char *at, const float *x, size_t stride, size_t inputs,
                       const float *bias, int adds, float *y, size_t y_stride);

#define DEFINE_KERNEL(FORMAT, ROWS)                                                              \
    static void kernel_##FORMAT##_##ROWS(const char *at, const float *x, size_t stride,          \
                                         size_t inputs, const float *bias, int adds, float *y,   \
                                         size_t y_stride)                                        \
    {                                                                                            \
        __m512 sums[MAX_ROWS][VECTORS];                                                         \
        panel_product(FORMAT, ROWS, at, x, stride, inputs, sums);                                \
        _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++) for (int v = 0; v < VECTORS; v++) \
        {                                                                                        \
            float *place = y + (size_t)m * y_stride + v * LANES;                                 \
            __m512 sum = sums[m][v];                                                             \
            if (bias)                                                                            \
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + v * LANES));                     \
            if (adds)                                                                            \
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(place));                                \
            _mm512_storeu_ps(place, sum);                                                        \
        }                                                                                        \
    }

#define DEFINE_KERNELS(FORMAT)                                                                   \
    DEFINE_KERNEL(FORMAT, 1)                                                                     \
    DEFINE_KERNEL(FORMAT, 2)                                                                     \
    DEFINE_KERNEL(FORMAT, 3)                                                                     \
    DEFINE_KERNEL(FORMAT, 4)                                                                     \
    DEFINE_KERNEL(FORMAT, 5)                                                                     \
    DEFINE_KERNEL(FORMAT, 6)                                                                     \
    DEFINE_KERNEL(FORMAT, 7)                                                                     \
    DEFINE_KERNEL(FORMAT, 8)

DEFINE_KERNELS(FLOAT32)
DEFINE_KERNELS(BFLOAT16)
DEFINE_KERNELS(FLOAT16)
DEFINE_KERNELS(INT8)

#define KERNELS_OF(FORMAT)                                                                       \
    {                                                                                            \
        NULL, kernel_##FORMAT##_1, kernel_##FORMAT##_2, kernel_##FORMAT##_3,                     \
            kernel_##FORMAT##_4, kernel_##FORMAT##_5, kernel_##FORMAT##_6, kernel_##FORMAT##_7,  \
            kernel_##FORMAT##_8                                                                  \
    }

static const Kernel KERNELS[4][MAX_ROWS + 1] = {KERNELS_OF(FLOAT32), KERNELS_OF(BFLOAT16),
                                                 KERNELS_OF(FLOAT16), KERNELS_OF(INT8)};

/* Write a panel as float32 [inputs][48]. */
static void widen(const Matrix *w, const char *at, float *plain)
{
    size_t inputs = (size_t)w->inputs;
    if (w->format == INT8) {
        for (size_t i = 0; i < inputs; i += BLOCK, at += BLOCK_BYTES)
            for (size_t j = 0; j < BLOCK; j++, plain += PANEL)
                for (int v = 0; v < VECTORS; v++) {
                    __m512 codes = load_codes(at + 4 * PANEL + j * PANEL + v * LANES);
                    __m512 scale = load_half(at + v * LANES * 2);
                    __m512 offset = load_half(at + (PANEL + v * LANES) * 2);
                    _mm512_storeu_ps(plain + v * LANES, _mm512_fmadd_ps(codes, scale, offset));
                }
        return;
    }
    for (size_t i = 0; i < inputs; i++, at += 2 * PANEL, plain += PANEL) {
        __m512 weights[VECTORS];
        if (w->format == BFLOAT16)
            load_weights(BFLOAT16, at, weights);
        else
            load_weights(FLOAT16, at, weights);
        for (int v = 0; v < VECTORS; v++)
            _mm512_storeu_ps(plain + v * LANES, weights[v]);
    }
}

/* One panel times all rows of x. */
static void panel_rows(const Matrix *w, size_t panel, const float *x, size_t rows, float *y,
                       size_t y_stride, int adds, float *scratch)
{
    const char *at = (const char *)w->data + panel * panel_bytes(w);
    const Kernel *kernels = KERNELS[w->format];
    const float *bias = w->bias ? w->bias + panel * PANEL : NULL;
    size_t stride = padded((size_t)w->inputs);
    size_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if (blocks > 2 && w->format != FLOAT32) { /* widened once, not for each block of rows */
        widen(w, at, scratch);
        at = (const char *)scratch;
        kernels = KERNELS[FLOAT32];
    }
    for (size_t block = 0; block < blocks; block++) {
        size_t first = rows * block / blocks, end = rows * (block + 1) / blocks;
        kernels[end - first](at, x + first * stride, stride, (size_t)w->inputs, bias, adds,
                             y + first * y_stride, y_stride);
    }
}

void linear(const Matrix *w, const float *x, size_t rows, float *y, int adds, float *scratch,
            const Member *member)
{
    size_t width = padded((size_t)w->outputs), panels = width / PANEL;
    size_t end = part_start(panels, member, 1);
    for (size_t panel = part_start(panels, member, 0); panel < end; panel++)
        panel_rows(w, panel, x, rows, y + panel * PANEL, width, adds, scratch);
}

/* Whether one of the first `width` values of a panel is NaN. */
INLINE int has_nan(const float *values, size_t width)
{
    int found = 0;
    for (size_t first = 0; first < width; first += LANES) {
        size_t count = width - first < LANES ? width - first : LANES;
        __m512 part = _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), values + first);
        found |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
    }
    return found != 0;
}

INLINE float exp_of(float x) { return _mm512_cvtss_f32(exp_vector(_mm512_set1_ps(x))); }

/* Insert a value that is above the last of the largest. Of equal ones the first stays ahead. */
INLINE void insert(float *logits, int64_t *rows, size_t count, float value, int64_t row)
{
    size_t at = count - 1;
    for (; at > 0 && value > logits[at - 1]; at--)
        logits[at] = logits[at - 1], rows[at] = rows[at - 1];
    logits[at] = value, rows[at] = row;
}

/* Count the values of a panel, `width` of them from row `start` of the head on. */
INLINE void take_panel(const float *values, size_t width, size_t start, float *logits,
                       int64_t *rows, size_t count)
{
    for (size_t first = 0; first < width; first += LANES) {
        size_t left = width - first < LANES ? width - first : LANES;
        __mmask16 valid = (__mmask16)((1u << left) - 1);
        __m512 part = _mm512_maskz_loadu_ps(valid, values + first);
        unsigned above = _mm512_mask_cmp_ps_mask(valid, part, _mm512_set1_ps(logits[count - 1]),
                                                 _CMP_GT_OQ);
        for (; above; above &= above - 1) {
            size_t i = first + (size_t)__builtin_ctz(above);
            if (values[i] > logits[count - 1])
                insert(logits, rows, count, values[i], (int64_t)(start + i));
        }
    }
}

/* The sum of e^(value - largest) of a panel. */
INLINE float exp_sum(const float *values, size_t width, float largest)
{
    __m512 sum = _mm512_setzero_ps();
    for (size_t first = 0; first < width; first += LANES) {
        size_t left = width - first < LANES ? width - first : LANES;
        __mmask16 valid = (__mmask16)((1u << left) - 1);
        __m512 part = _mm512_maskz_loadu_ps(valid, values + first);
        part = exp_vector(_mm512_sub_ps(part, _mm512_set1_ps(largest)));
        sum = _mm512_mask_add_ps(sum, valid, sum, part);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Search the logits of a panel, `width` of them from row `start` of the head on. */
static void search_panel(const float *values, size_t width, size_t start, const Top *top,
                         size_t row)
{
    size_t count = top->count;
    float *logits = top->logits + row * count, before = logits[0];
    if (has_nan(values, width))
        for (size_t i = 0; i < count; i++)
            logits[i] = __builtin_nanf(""); /* and stays: no value is greater */
    take_panel(values, width, start, logits, top->rows + row * count, count);
    if (count > 1 && logits[0] > -__builtin_inff()) {
        if (logits[0] > before)
            top->sums[row] *= exp_of(before - logits[0]);
        top->sums[row] += exp_sum(values, width, logits[0]);
    }
}

/* Pass on the logits of a panel, `width` of them from row `start` of the head on; `at` is their
   place in a slice. */
INLINE void take_row(const float *values, size_t width, size_t start, size_t at, const Top *top,
                     const Sink *sink, size_t row, size_t num_outputs)
{
    int kind = PLAIN;
    if (sink->sampling)
        kind = sink->sampling->rows[sink->first + row].kind;
    if (kind == STREAMED)
        __builtin_memcpy(slice_of(sink->sampling, row, sink->scratch) + at, values, width * 4);
    else if (sink->logits && (kind == STORED || !sink->sampling))
        __builtin_memcpy(sink->logits + row * num_outputs + start, values, width * 4);
    if (kind == PLAIN)
        search_panel(values, width, start, top, row);
}

void linear_top(const Matrix *w, const float *x, size_t rows, size_t num_outputs, const Top *top,
                const Sink *sink, float *scratch, const Member *member)
{
    size_t panels = padded(num_outputs) / PANEL, end = part_start(panels, member, 1);
    size_t count = top->count, first = part_start(panels, member, 0);
    float *found = scratch + padded((size_t)w->inputs) * PANEL; /* [rows][48] */
    for (size_t i = 0; i < rows * count; i++)
        top->logits[i] = -__builtin_inff(), top->rows[i] = 0;
    for (size_t row = 0; row < rows; row++)
        top->sums[row] = 0;
    if (sink->sampling)
        start_search(sink->sampling, sink->first, rows, sink->scratch);
    for (size_t panel = first; panel < end; panel++) {
        size_t start = panel * PANEL, at = (panel - first) % SLICE_PANELS * PANEL;
        size_t width = num_outputs - start < PANEL ? num_outputs - start : PANEL;
        panel_rows(w, panel, x, rows, found, PANEL, 0, scratch);
        for (size_t row = 0; row < rows; row++)
            take_row(found + row * PANEL, width, start, at, top, sink, row, num_outputs);
        if (sink->sampling && (at + PANEL == SLICE || panel + 1 == end))
            search_slice(sink->sampling, sink->first, rows, start - at, at + width,
                         sink->scratch);
    }
}

void merge_top(const Top *into, const Top *other, size_t rows)
{
    size_t count = into->count;
    for (size_t row = 0; row < rows; row++) {
        float *logits = into->logits + row * count, before = logits[0];
        const float *others = other->logits + row * count;
        if (others[0] != others[0]) /* NaN */
            for (size_t i = 0; i < count; i++)
                logits[i] = others[i];
        for (size_t i = 0; i < count && others[i] > logits[count - 1]; i++)
            insert(logits, into->rows + row * count, count, others[i],
                   other->rows[row * count + i]);
        if (count > 1 && logits[0] > -__builtin_inff()) /* else neither has any */
            into->sums[row] = into->sums[row] * exp_of(before - logits[0]) +
                              other->sums[row] * exp_of(others[0] - logits[0]);
    }
}

void top_probabilities(const Top *top, size_t rows, float *probabilities)
{
    for (size_t i = 0; i < rows * top->count; i++) {
        size_t row = i / top->count;
        probabilities[i] = exp_of(top->logits[i] - top->logits[row * top->count]) / top->sums[row];
    }
}

SIMD_END
#endif
