/* A forward pass of a Llama-like model over a batch, and the team of threads that runs it. */

#define _GNU_SOURCE /* sched_getaffinity */
#include "native.h"

#ifdef AMUSD_HAS_NATIVE

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

/* Polls of a barrier before the thread sleeps. A thread without a core of its own polls in vain,
   and keeps the others from theirs. */
#define SPINS 4096
#define SPINS_WITHOUT_CORE 16

struct Team {
    int size, spins;
    atomic_int arrived, round, sleeping; /* of the barrier */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a new task, or a new round */
    int64_t task; /* number of the current pass; -1 ends the threads */
    const Model *model;
    const Pass *pass;
    pthread_t threads[];
};

typedef struct {
    Team *team;
    int index;
} Start; /* what a new thread needs to know */

/* Sleep until the round is over. The last thread to arrive starts a round and then reads
   `sleeping`; this one counts itself and then reads the round: one of both sees the other. */
static void sleep_through(Team *team, int round)
{
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleeping, 1);
    while (atomic_load(&team->round) == round)
        pthread_cond_wait(&team->changed, &team->lock);
    atomic_fetch_sub(&team->sleeping, 1);
    pthread_mutex_unlock(&team->lock);
}

static void wake(Team *team)
{
    pthread_mutex_lock(&team->lock);
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
}

void wait_for_all(const Member *member)
{
    Team *team = member->team;
    if (member->size == 1)
        return;
    int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == team->size - 1) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
        if (atomic_load(&team->sleeping))
            wake(team);
        return;
    }
    for (int spins = 0; spins < team->spins; spins++) {
        if (atomic_load(&team->round) != round)
            return;
        __builtin_ia32_pause();
    }
    sleep_through(team, round);
}

static void norm_rows(const float *x, const float *weight, float *y, size_t rows, size_t width,
                      float eps, const Member *member)
{
    size_t stride = padded(width), end = part_start(rows, member, 1);
    for (size_t row = part_start(rows, member, 0); row < end; row++)
        rms_norm(x + row * stride, weight, y + row * stride, width, eps);
}

static void attention(const Model *model, const Pass *pass, size_t index, const Member *member)
{
    size_t rows = (size_t)pass->num_tokens, num_kv_heads = (size_t)model->num_kv_heads;
    size_t dim = (size_t)model->head_dim, num_heads = (size_t)model->num_heads;
    size_t from = padded((num_heads + 2 * num_kv_heads) * dim), to = padded(num_heads * dim);
    float *scratch = pass->scratch + (size_t)member->index * (size_t)pass->scratch_size;
    size_t end = part_start(rows, member, 1);
    for (size_t row = part_start(rows, member, 0); row < end; row++)
        store_token(model, &model->layers[index], &pass->tokens[row], index,
                    pass->qkv + row * from);
    wait_for_all(member);
    end = part_start(rows * num_kv_heads, member, 1);
    for (size_t at = part_start(rows * num_kv_heads, member, 0); at < end; at++) {
        size_t row = at / num_kv_heads;
        attend(model, &pass->tokens[row], index, pass->qkv + row * from,
               pass->attended + row * to, at % num_kv_heads, scratch);
    }
}

static void run_layer(const Model *model, const Pass *pass, size_t index, const Member *member)
{
    const Layer *layer = &model->layers[index];
    size_t rows = (size_t)pass->num_tokens, hidden = (size_t)model->hidden;
    size_t wide = padded(2 * (size_t)model->intermediate);
    size_t narrow = padded((size_t)model->intermediate);
    float *scratch = pass->scratch + (size_t)member->index * (size_t)pass->scratch_size;
    norm_rows(pass->hidden, layer->input_norm, pass->normed, rows, hidden, model->eps, member);
    wait_for_all(member);
    linear(&layer->qkv, pass->normed, rows, pass->qkv, 0, scratch, member);
    wait_for_all(member);
    attention(model, pass, index, member);
    wait_for_all(member);
    linear(&layer->out, pass->attended, rows, pass->hidden, 1, scratch, member);
    wait_for_all(member);
    norm_rows(pass->hidden, layer->post_norm, pass->normed, rows, hidden, model->eps, member);
    wait_for_all(member);
    linear(&layer->gate_up, pass->normed, rows, pass->gate_up, 0, scratch, member);
    wait_for_all(member);
    size_t end = part_start(rows, member, 1);
    for (size_t row = part_start(rows, member, 0); row < end; row++)
        gate(pass->gate_up + row * wide, pass->mixed + row * narrow, (size_t)model->intermediate);
    wait_for_all(member);
    linear(&layer->down, pass->mixed, rows, pass->hidden, 1, scratch, member);
    wait_for_all(member);
}

/* The largest logits of the outputs from `first` on, among the panels of a member. */
static Top top_of(const Pass *pass, int index, size_t first)
{
    size_t count = (size_t)pass->num_top;
    first += (size_t)index * (size_t)pass->num_outputs;
    return (Top){pass->top_logits + first * count, pass->top_rows + first * count,
                 pass->top_sums + first, count};
}

/* The largest logits of outputs [first, end) among this member's panels. */
static void run_head(const Model *model, const Pass *pass, size_t first, size_t end,
                     const Member *member)
{
    size_t rows = end - first, hidden = (size_t)model->hidden;
    size_t stride = padded(hidden), last = part_start(rows, member, 1);
    float *scratch = pass->scratch + (size_t)member->index * (size_t)pass->scratch_size;
    const SamplingBatch *sampling = pass->sampling;
    for (size_t row = part_start(rows, member, 0); row < last; row++)
        rms_norm(pass->hidden + (size_t)pass->output_rows[first + row] * stride, model->norm,
                 pass->normed + row * stride, hidden, model->eps);
    wait_for_all(member);
    Top top = top_of(pass, member->index, first);
    Sink sink = {pass->logits, NULL, first, NULL};
    if (sampling)
        sink = (Sink){sampling->logits, sampling, first,
                      sampling->scratch + member->index * sampling->scratch_size};
    linear_top(&model->head, pass->normed, rows, (size_t)model->num_outputs, &top, &sink, scratch,
               member);
}

/* Merge the largest logits of all members into those of the first, for outputs [first, end). */
static Top merge_heads(const Pass *pass, int num_members, size_t first, size_t end)
{
    Top top = top_of(pass, 0, first);
    for (int index = 1; index < num_members; index++) {
        Top other = top_of(pass, index, first);
        merge_top(&top, &other, end - first);
    }
    return top;
}

/* Choose the tokens of this member's part of outputs [first, end). */
static void run_sampling(const Pass *pass, size_t first, size_t end, const Member *member)
{
    const SamplingBatch *batch = pass->sampling;
    char *scratch = batch->scratch + (size_t)member->index * (size_t)batch->scratch_size;
    size_t last = part_start(end - first, member, 1);
    for (size_t row = part_start(end - first, member, 0); row < last; row++) {
        int kind = batch->rows[first + row].kind;
        if (kind == STREAMED) {
            finish_search(batch, first, row, member->size);
        } else if (kind == STORED) {
            sample_row(batch, first + row, batch->logits + row * (size_t)batch->head, scratch);
        } else {
            Top top = merge_heads(pass, member->size, first + row, first + row + 1);
            take_plain(batch, first + row, &top);
        }
    }
}

/* The head of all outputs. With sampling, groups of outputs are computed, whose logits fit. */
static void run_outputs(const Model *model, const Pass *pass, const Member *member)
{
    size_t rows = (size_t)pass->num_outputs;
    if (!pass->sampling) {
        run_head(model, pass, 0, rows, member);
        return;
    }
    size_t group = (size_t)pass->sampling->group;
    for (size_t first = 0; first < rows; first += group) {
        size_t end = first + group < rows ? first + group : rows;
        run_head(model, pass, first, end, member);
        wait_for_all(member);
        run_sampling(pass, first, end, member);
        wait_for_all(member);
    }
}

/* Embed this member's tokens. The first norm has the same parts, so it needs no barrier. */
static void run_embedding(const Model *model, const Pass *pass, const Member *member)
{
    size_t rows = (size_t)pass->num_tokens, stride = padded((size_t)model->hidden);
    size_t end = part_start(rows, member, 1);
    for (size_t row = part_start(rows, member, 0); row < end; row++)
        embed(model, pass->ids[row], pass->hidden + row * stride);
}

static void run_member(const Model *model, const Pass *pass, const Member *member)
{
    run_embedding(model, pass, member);
    for (size_t index = 0; index < (size_t)model->num_layers; index++)
        run_layer(model, pass, index, member);
    run_outputs(model, pass, member);
    wait_for_all(member);
}

static void *serve(void *argument)
{
    Start start = *(Start *)argument;
    Team *team = start.team;
    free(argument);
    int64_t done = 0;
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (team->task == done)
            pthread_cond_wait(&team->changed, &team->lock);
        done = team->task;
        pthread_mutex_unlock(&team->lock);
        if (done < 0)
            return NULL;
        Member member = {team, start.index, team->size};
        run_member(team->model, team->pass, &member);
    }
}

void amusd_team_close(Team *team)
{
    pthread_mutex_lock(&team->lock);
    team->task = -1;
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->size; i++)
        pthread_join(team->threads[i], NULL);
    free(team);
}

static int has_cores_for(int size)
{
#ifdef __linux__
    cpu_set_t usable;
    return sched_getaffinity(0, sizeof(usable), &usable) || CPU_COUNT(&usable) >= size;
#else
    (void)size;
    return 1;
#endif
}

/* A team of `size` threads, the caller's among them; NULL: no memory or no threads. */
Team *amusd_team_open(int size)
{
    Team *team = calloc(1, sizeof(Team) + (size_t)size * sizeof(pthread_t));
    if (!team)
        return NULL;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->changed, NULL);
    team->spins = has_cores_for(size) ? SPINS : SPINS_WITHOUT_CORE;
    team->size = 1;
    for (int i = 1; i < size; i++, team->size++) {
        Start *start = malloc(sizeof(Start));
        if (start)
            *start = (Start){team, i};
        if (!start || pthread_create(&team->threads[i], NULL, serve, start)) {
            free(start);
            amusd_team_close(team);
            return NULL;
        }
    }
    return team;
}

/* Fill pass->tokens and pass->output_rows from the chunks. */
static void place_tokens(const Pass *pass)
{
    int64_t row = 0, output = 0;
    for (int64_t index = 0; index < pass->num_chunks; index++) {
        const Chunk *chunk = &pass->chunks[index];
        int64_t first_output = chunk->num_tokens - chunk->num_outputs;
        for (int64_t i = 0; i < chunk->num_tokens; i++, row++) {
            pass->tokens[row] =
                (Token){chunk->keys, chunk->values, chunk->capacity, chunk->start + i};
            if (i >= first_output)
                pass->output_rows[output++] = row;
        }
    }
}

/* Run a pass and return 0. If a token id is outside the vocabulary, nothing runs and the result is
   -1. */
int amusd_forward(Team *team, const Model *model, const Pass *pass)
{
    for (int64_t i = 0; i < pass->num_tokens; i++)
        if (pass->ids[i] < 0 || pass->ids[i] >= model->vocabulary)
            return -1;
    place_tokens(pass);
    if (team->size > 1) {
        pthread_mutex_lock(&team->lock);
        team->model = model;
        team->pass = pass;
        team->task++;
        pthread_cond_broadcast(&team->changed);
        pthread_mutex_unlock(&team->lock);
    }
    Member member = {team, 0, team->size};
    run_member(model, pass, &member);
    if (pass->sampling)
        return 0;
    Top top = merge_heads(pass, team->size, 0, (size_t)pass->num_outputs);
    if (top.count > 1)
        top_probabilities(&top, (size_t)pass->num_outputs, pass->probabilities);
    return 0;
}

/* Write the sizes of at most `count` structures, in the order of STRUCTURES in library.py; return
   how many structures there are. */
int amusd_structure_sizes(size_t *sizes, int count)
{
    static const size_t all[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model),
                                 sizeof(Chunk),  sizeof(Token), sizeof(Sampling),
                                 sizeof(SamplingBatch), sizeof(Pass)};
    int known = (int)(sizeof(all) / sizeof(all[0]));
    for (int i = 0; i < known && i < count; i++)
        sizes[i] = all[i];
    return known;
}

int amusd_native_supported(void) { return __builtin_cpu_supports("avx512f") != 0; }

#else

int amusd_native_supported(void) { return 0; }

#endif
