/* What the parts of the native engine share: structures, weights and the team of threads.

   Python fills Model, Chunk and Pass through ctypes (library.py). Both sides must agree on them, so
   amusd_structure_sizes gives their sizes and Python compares them at load. */

#ifndef AMUSD_NATIVE_H
#define AMUSD_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define AMUSD_HAS_NATIVE 1
#endif

#define LANES 16   /* floats of a vector */
#define PANEL 48   /* outputs of a panel of weights: three vectors */
#define BLOCK 32   /* inputs that share a scale in INT8 */
#define MAX_ROWS 8 /* rows of activations that meet a panel at once */

/* Formats of weights. All of them represent float32 numbers; INT8 is code * scale + offset. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

/* Weights [outputs][inputs], in panels of 48 outputs: [panels][inputs][48], zeros after the last
   output. In INT8 a block of 32 inputs is {f16 scale[48], f16 offset[48], u8 code[32][48]}. */
typedef struct {
    const void *data;
    const float *bias; /* [panels * 48], or NULL */
    int64_t format, outputs, inputs;
} Matrix;

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *input_norm, *post_norm; /* [hidden] */
    const float *query_norm, *key_norm;  /* [head_dim], or NULL */
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding;  /* [vocabulary][hidden], in embedding_format, not INT8 */
    const float *norm;      /* [hidden] */
    const float *cos, *sin; /* [context][head_dim / 2] */
    Matrix head;
    int64_t vocabulary, embedding_format;
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, num_outputs;
    float eps, scale; /* of the norms; of the attention scores */
} Model;

/* The tokens of one sequence in a batch, at positions [start, start + num_tokens). Its KV cache:
   keys [layers][kv_heads][capacity / 16][head_dim][16], values [layers][kv_heads][capacity]
   [head_dim]. The capacity is a multiple of 16. The last num_outputs tokens have an output. */
typedef struct {
    float *keys, *values;
    int64_t capacity, start, num_tokens, num_outputs;
} Chunk;

/* One token of a pass and the KV cache of its sequence. */
typedef struct {
    float *keys, *values;
    int64_t capacity, position;
} Token;

/* One forward pass. Python owns all buffers; rows have their width rounded up to a multiple of
   48. */
typedef struct {
    const Chunk *chunks;   /* [num_chunks], in the order of ids */
    const int64_t *ids;    /* [num_tokens] */
    Token *tokens;         /* [num_tokens], filled from the chunks */
    int64_t *output_rows;  /* [num_outputs]: tokens with an output, filled from the chunks */
    float *hidden;         /* [num_tokens][hidden] */
    float *normed;         /* [num_tokens][hidden] */
    float *qkv;            /* [num_tokens][(num_heads + 2 num_kv_heads) head_dim] */
    float *attended;       /* [num_tokens][num_heads head_dim] */
    float *gate_up;        /* [num_tokens][2 intermediate] */
    float *mixed;          /* [num_tokens][intermediate] */
    float *scratch;        /* [num_threads][scratch_size] */
    float *top_logits;     /* [num_threads][num_outputs][num_top]; of thread 0: the results */
    int64_t *top_rows;     /* [num_threads][num_outputs][num_top]; of thread 0: the results */
    float *top_sums;       /* [num_threads][num_outputs] */
    float *probabilities;  /* [num_outputs][num_top], written if num_top is above 1 */
    float *logits;         /* [num_outputs][num_outputs of the model], or NULL */
    int64_t num_chunks, num_tokens, num_outputs, num_top, scratch_size;
} Pass;

/* Threads that run the same function, each on its part, and wait for one another. */
typedef struct Team Team;

typedef struct {
    Team *team;
    int index, size;
} Member;

void wait_for_all(const Member *member);

static inline size_t padded(size_t width) { return (width + PANEL - 1) / PANEL * PANEL; }

/* Start of part `index + offset` of `size` equal parts of the numbers below `count`. */
static inline size_t part_start(size_t count, const Member *member, int offset)
{
    return count * (size_t)(member->index + offset) / (size_t)member->size;
}

/* y = x w^T + bias for the panels of this member, or y += with `adds`. */
void linear(const Matrix *w, const float *x, size_t rows, float *y, int adds, float *scratch,
            const Member *member);

/* The `count` largest logits of each output and their rows of the head, [rows][count], the largest
   first. Of equal ones the first row is ahead. All are NaN if any logit is. With a count above 1,
   `sums` has the sum of e^(logit - largest) of each output, [rows]. */
typedef struct {
    float *logits;
    int64_t *rows;
    float *sums;
    size_t count;
} Top;

/* The largest of x w^T of each row, over the panels of this member. */
void linear_top(const Matrix *w, const float *x, size_t rows, size_t num_outputs, const Top *top,
                float *all_logits, float *scratch, const Member *member);
/* Add the largest of other panels, behind those of `into`. */
void merge_top(const Top *into, const Top *other, size_t rows);
/* Softmax of the logits in `top`, [rows][count]. */
void top_probabilities(const Top *top, size_t rows, float *probabilities);

void embed(const Model *model, int64_t id, float *y);
void rms_norm(const float *x, const float *weight, float *y, size_t width, float eps);
void gate(const float *gate_up, float *y, size_t width);
void attend(const Model *model, const Token *token, size_t layer, const float *qkv, float *y,
            size_t kv_head, float *scratch);
void store_token(const Model *model, const Layer *layer, const Token *token, size_t index,
                 float *qkv);

#endif
