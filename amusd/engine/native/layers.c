/* The parts of a layer besides matrix products: embedding, norms, gate, positions and attention.
   Each works on one token, so a token's result does not depend on the rest of the batch. */

#include "native.h"

#ifdef AMUSD_HAS_NATIVE
#include "simd.h"

#define MAX_GROUP 4 /* query heads that share keys and are computed at once */

/* y = the embedding of a token, widened to float32. */
void embed(const Model *model, int64_t id, float *y)
{
    size_t width = (size_t)model->hidden, first = (size_t)id * width;
    const float *plain = (const float *)model->embedding + first;
    const uint16_t *halves = (const uint16_t *)model->embedding + first;
    for (size_t i = 0; i < width; i += LANES) {
        __m512 values;
        if (model->embedding_format == FLOAT32)
            values = _mm512_loadu_ps(plain + i);
        else if (model->embedding_format == FLOAT16)
            values = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + i)));
        else
            values = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(halves + i))), 16));
        _mm512_storeu_ps(y + i, values);
    }
}

void rms_norm(const float *x, const float *weight, float *y, size_t width, float eps)
{
    __m512 squares = _mm512_setzero_ps();
    for (size_t i = 0; i < width; i += LANES) {
        __m512 values = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(values, values, squares);
    }
    float mean = _mm512_reduce_add_ps(squares) / (float)width;
    __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps));
    for (size_t i = 0; i < width; i += LANES) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_loadu_ps(weight + i), scaled));
    }
}

/* y = silu(gate) * up. The two are stored one after the other. */
void gate(const float *gate_up, float *y, size_t width)
{
    __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < width; i += LANES) {
        __m512 x = _mm512_loadu_ps(gate_up + i);
        __m512 below = _mm512_add_ps(one, exp_vector(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        __m512 silu = _mm512_div_ps(x, below);
        _mm512_storeu_ps(y + i, _mm512_mul_ps(silu, _mm512_loadu_ps(gate_up + width + i)));
    }
}

/* Rotate the halves of a head's vector by the angles of its position (RoPE, arXiv 2104.09864). */
static void rotate(float *head, const float *cos, const float *sin, size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i] + first * sin[i];
    }
}

void store_token(const Model *model, const Layer *layer, const Token *token, size_t index,
                 float *qkv)
{
    size_t dim = (size_t)model->head_dim, num_heads = (size_t)model->num_heads;
    size_t num_kv_heads = (size_t)model->num_kv_heads, capacity = (size_t)token->capacity;
    size_t position = (size_t)token->position;
    const float *cos = model->cos + position * dim / 2, *sin = model->sin + position * dim / 2;
    for (size_t head = 0; head < num_heads + num_kv_heads; head++) {
        const float *norm = head < num_heads ? layer->query_norm : layer->key_norm;
        if (norm)
            rms_norm(qkv + head * dim, norm, qkv + head * dim, dim, model->eps);
        rotate(qkv + head * dim, cos, sin, dim / 2);
    }
    const float *keys = qkv + num_heads * dim, *values = keys + num_kv_heads * dim;
    for (size_t head = 0; head < num_kv_heads; head++) {
        size_t slot = (index * num_kv_heads + head) * capacity;
        float *key = token->keys + (slot + position / LANES * LANES) * dim + position % LANES;
        for (size_t i = 0; i < dim; i++)
            key[i * LANES] = keys[head * dim + i];
        __builtin_memcpy(token->values + (slot + position) * dim, values + head * dim, dim * 4);
    }
}

/* Scores of `group` queries with 16 keys. Two sums each, so that no addition waits for the last. */
INLINE void score_block(int group, const float *keys, const float *query, size_t dim,
                        __m512 scale, float *scores, size_t stride)
{
    __m512 even[MAX_GROUP], odd[MAX_GROUP];
    for (int g = 0; g < group; g++)
        even[g] = odd[g] = _mm512_setzero_ps();
    for (size_t i = 0; i < dim; i += 2) {
        __m512 first = _mm512_loadu_ps(keys + i * LANES);
        __m512 second = _mm512_loadu_ps(keys + (i + 1) * LANES);
        for (int g = 0; g < group; g++) {
            const float *q = query + (size_t)g * dim + i;
            even[g] = _mm512_fmadd_ps(first, _mm512_set1_ps(q[0]), even[g]);
            odd[g] = _mm512_fmadd_ps(second, _mm512_set1_ps(q[1]), odd[g]);
        }
    }
    for (int g = 0; g < group; g++)
        _mm512_storeu_ps(scores + (size_t)g * stride,
                         _mm512_mul_ps(_mm512_add_ps(even[g], odd[g]), scale));
}

/* Turn the scores of `count` keys into weights that add up to 1, and the padding to 0. */
static void softmax(float *scores, size_t count, size_t padded_count)
{
    for (size_t i = count; i < padded_count; i++)
        scores[i] = -__builtin_inff();
    __m512 largest = _mm512_loadu_ps(scores);
    for (size_t i = LANES; i < padded_count; i += LANES)
        largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + i));
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), total = _mm512_setzero_ps();
    for (size_t i = 0; i < padded_count; i += LANES) {
        __m512 part = exp_vector(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most));
        _mm512_storeu_ps(scores + i, part);
        total = _mm512_add_ps(total, part);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (size_t i = 0; i < padded_count; i += LANES)
        _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), share));
}

/* y[g] = the weighted sum of `count` values, for `vectors` vectors of each value. */
INLINE void mix(int group, int vectors, const float *values, size_t dim, const float *weights,
                size_t stride, size_t count, float *y)
{
    __m512 sums[MAX_GROUP][4];
    for (int g = 0; g < group; g++)
        for (int v = 0; v < vectors; v++)
            sums[g][v] = _mm512_setzero_ps();
    for (size_t row = 0; row < count; row++, values += dim)
        for (int v = 0; v < vectors; v++) {
            __m512 value = _mm512_loadu_ps(values + v * LANES);
            for (int g = 0; g < group; g++) {
                __m512 weight = _mm512_set1_ps(weights[(size_t)g * stride + row]);
                sums[g][v] = _mm512_fmadd_ps(value, weight, sums[g][v]);
            }
        }
    for (int g = 0; g < group; g++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(y + (size_t)g * dim + v * LANES, sums[g][v]);
}

INLINE void attend_group(int group, const float *keys, const float *values, size_t dim,
                         size_t count, float scale, const float *query, float *y, float *scratch)
{
    size_t stride = (count + LANES - 1) / LANES * LANES;
    for (size_t block = 0; block < stride; block += LANES)
        score_block(group, keys + block * dim, query, dim, _mm512_set1_ps(scale),
                    scratch + block, stride);
    for (int g = 0; g < group; g++)
        softmax(scratch + (size_t)g * stride, count, stride);
    size_t at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES)
        mix(group, 4, values + at, dim, scratch, stride, count, y + at);
    for (; at < dim; at += LANES)
        mix(group, 1, values + at, dim, scratch, stride, count, y + at);
}

/* Attention of the query heads of one token that share the keys of `kv_head`. */
void attend(const Model *model, const Token *token, size_t layer, const float *qkv, float *y,
            size_t kv_head, float *scratch)
{
    size_t dim = (size_t)model->head_dim, count = (size_t)token->position + 1;
    size_t group = (size_t)(model->num_heads / model->num_kv_heads);
    size_t slot = (layer * (size_t)model->num_kv_heads + kv_head) * (size_t)token->capacity * dim;
    const float *keys = token->keys + slot, *values = token->values + slot;
    float scale = model->scale;
    for (size_t done = 0; done < group;) {
        size_t at = (kv_head * group + done) * dim, left = group - done;
        const float *query = qkv + at;
        float *to = y + at;
        switch (left) {
        case 1: attend_group(1, keys, values, dim, count, scale, query, to, scratch); break;
        case 2: attend_group(2, keys, values, dim, count, scale, query, to, scratch); break;
        case 3: attend_group(3, keys, values, dim, count, scale, query, to, scratch); break;
        default: attend_group(4, keys, values, dim, count, scale, query, to, scratch); break;
        }
        done += left < MAX_GROUP ? left : MAX_GROUP;
    }
}

SIMD_END
#endif
