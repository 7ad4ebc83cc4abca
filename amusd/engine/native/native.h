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
#define MAX_TOP 20 /* likeliest tokens beside a token with a log-probability */

#define NO_TOKEN (-1)        /* the logits are not finite */
#define NOTHING_ALLOWED (-2) /* all tokens are banned */

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

/* How the token of one output is chosen; see SamplingParameters and LogitEdits. */
typedef struct {
    double temperature; /* 0: the largest logit wins */
    double top_p;       /* 1: all */
    double log_min_p;   /* minus infinity: all */
    uint64_t seed;
    const int64_t *ids;          /* [num_edits], distinct; unknown ones are skipped */
    const uint8_t *is_repeated;  /* [num_edits] */
    const float *offsets;        /* [num_edits] */
    const uint32_t *allowed;     /* [num_words] bits by token id, lowest first, or NULL: all */
    int64_t position, top_k, num_edits, num_words;
    int64_t num_logprobs; /* likeliest tokens with a log-probability; -1: none, nor of the token */
    int64_t target;       /* token with a log-probability; NO_TOKEN: the chosen one */
    float repetition_penalty;
    int32_t is_processed; /* whether log-probabilities are those after edits and filters */
    int32_t kind;         /* PLAIN, STREAMED or STORED */
    int32_t unused;
} Sampling;

/* PLAIN: greedy decoding, no edits, no log-probabilities. STREAMED: noise and nothing else, so the
   token is found while the head computes the logits, and they are never in memory as a whole.
   STORED: all others, whose logits are stored. */
enum { PLAIN = 0, STREAMED = 1, STORED = 2 };

/* The sampling of all outputs of a pass, and its results. */
typedef struct {
    const Sampling *rows;     /* [num_outputs] */
    const int64_t *head_ids;  /* [head]: the token id of each row of a reduced head, or NULL */
    const int32_t *head_rows; /* [num_ids]: the row of each token id or -1, or NULL */
    float *logits;            /* [group][head], of as many outputs as are sampled at once */
    char *scratch;            /* [num_threads][scratch_size] */
    int64_t *tokens;          /* [num_outputs][num_top], NO_TOKEN behind the last possible one */
    float *probabilities;     /* [num_outputs][num_top] */
    int64_t *logprob_tokens;  /* [num_outputs][1 + MAX_TOP], NO_TOKEN behind the last one */
    double *logprobs;         /* [num_outputs][1 + MAX_TOP] */
    int64_t num_ids, head, num_top, group, scratch_size;
} SamplingBatch;

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
    const SamplingBatch *sampling; /* NULL: greedy decoding for all outputs */
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

/* Where logits go beside the search for the largest ones. */
typedef struct {
    float *logits;                 /* [rows][num_outputs], or NULL */
    const SamplingBatch *sampling; /* NULL: the logits of all rows are stored and searched */
    size_t first;                  /* output of the first row */
    char *scratch;                 /* of this member's sampling */
} Sink;

/* The largest of x w^T of each row, over the panels of this member. With sampling, this searches
   plain rows, passes streamed ones to `search_slice`, and stores the others. */
void linear_top(const Matrix *w, const float *x, size_t rows, size_t num_outputs, const Top *top,
                const Sink *sink, float *scratch, const Member *member);
/* Add the largest of other panels, behind those of `into`. */
void merge_top(const Top *into, const Top *other, size_t rows);
/* Softmax of the logits in `top`, [rows][count]. */
void top_probabilities(const Top *top, size_t rows, float *probabilities);

/* Gumbel noise of a random number. */
double gumbel_of(uint32_t bits);
/* Penalise tokens and add the offsets; `head_rows` [num_ids], or NULL with a full head. */
void edit_logits(const Sampling *sampling, const int32_t *head_rows, size_t num_ids, float *logits);

/* What filters keep of a row: logits above `value`, and those equal to it up to `last_row`. */
typedef struct {
    float value;
    int64_t last_row;
} Cut;

#define KEEP_ALL ((Cut){-__FLT_MAX__, INT64_MAX})

/* The cut of top-k, top-p and min-p; `largest` is the largest of x [width], which is finite. */
Cut filter_cut(const Sampling *sampling, const float *x, size_t width, float largest,
               char *scratch);
/* Bytes of the scratch that a row of this width needs. */
size_t filter_scratch(size_t width);
/* The sum of e^((x - largest) / temperature) of the logits that a cut keeps. */
double sum_of_shares(const float *x, size_t width, const Cut *cut, float largest,
                     double temperature);

#define SLICE_PANELS 16 /* panels whose logits stay in the cache until they are searched */
#define SLICE (SLICE_PANELS * PANEL)

/* Begin the search for the tokens of streamed rows among outputs [first, first + rows). */
void start_search(const SamplingBatch *batch, size_t first, size_t rows, char *scratch);
/* The slice of logits of a row, [SLICE]. */
float *slice_of(const SamplingBatch *batch, size_t row, char *scratch);
/* Search the slices of streamed rows: `width` logits from row `start` of the head on. */
void search_slice(const SamplingBatch *batch, size_t first, size_t rows, size_t start,
                  size_t width, char *scratch);
/* Choose the token of streamed output `first + row` from what all members have found. */
void finish_search(const SamplingBatch *batch, size_t first, size_t row, int num_members);
/* Choose the token of output `index` from its logits [head]. */
void sample_row(const SamplingBatch *batch, size_t index, const float *logits, char *scratch);
/* Choose the token of a plain output from its largest logits, [num_top]. */
void take_plain(const SamplingBatch *batch, size_t index, const Top *top);

void embed(const Model *model, int64_t id, float *y);
void rms_norm(const float *x, const float *weight, float *y, size_t width, float eps);
void gate(const float *gate_up, float *y, size_t width);
void attend(const Model *model, const Token *token, size_t layer, const float *qkv, float *y,
            size_t kv_head, float *scratch);
void store_token(const Model *model, const Layer *layer, const Token *token, size_t index,
                 float *qkv);

#endif
